"""Clips that are in a dataset twice: the same video under two names, in two sizes or encoded again.

Two clips are duplicates when picture, sound and length agree. A picture alone does not tell: all
clips of one recording session (MEAD has hundreds) show the same face before the same wall, and
differ in what is said.

- picture: 64-bit DCT hash of the middle frame (Zauner, "Implementation and benchmarking of
  perceptual image hash functions", 2010, as OpenCV's ``img_hash`` has it), at most
  ``max_duplicate_distance`` bits apart;
- sound: 64 signs of energy differences over 17 parts of the clip and 5 bands (after Haitsma and
  Kalker, "A highly robust audio fingerprinting system", 2002), at most `MAX_SOUND_DISTANCE` bits
  apart;
- length: within 2 % or three frames.

Silent clips have no sound to compare: they are duplicates of silent clips of another video alone.
What this does not find: the same speech cut at other places (more than a frame or two in a short
clip), or mirrored pictures.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rest_lightning.constants import SAMPLE_RATE
from rest_lightning.data.preparation.options import PrepareOptions
from rest_lightning.data.preparation.rows import Row

FILTER = "duplicate"
MAX_SOUND_DISTANCE = 12  # of 64 bits; two different sentences are about 32 apart
_NUM_PARTS = 17
_BANDS_HZ = np.geomspace(300, 3000, 6)  # what every codec and telephone keeps
_WINDOW = 1024  # samples: 64 ms
_SILENCE = 1e-4  # RMS; one step of 16-bit samples is 3e-5
_LENGTH_TOLERANCE, _MIN_TOLERANCE_FRAMES = 0.02, 3

Hashes = NDArray[np.uint64]


def phash(frame: NDArray[np.uint8]) -> str:
    """64-bit perceptual hash of a picture.

    Args:
        frame: uint8 (H, W, 3), RGB.

    Returns:
        16 hexadecimal digits: of the 8 x 8 lowest DCT coefficients of the 32 x 32 grey picture, row
            by row, whether
        each lies above their mean (the constant one counts as 0).
    """
    from PIL import Image
    from scipy.fft import dctn

    small = Image.fromarray(frame).convert("L").resize((32, 32), Image.Resampling.BOX)
    low = dctn(np.asarray(small, np.float64), norm="ortho")[:8, :8]
    low[0, 0] = 0.0
    return _hex(low > low.mean())


def sound_hash(samples: NDArray[np.float32]) -> str | None:
    """64-bit hash of what is heard, whatever its level and codec.

    Args:
        samples: float32 (n,), 16 kHz.

    Returns:
        16 hexadecimal digits, or None for silence and for less than a quarter of a second.
    """
    if (
        len(samples) < SAMPLE_RATE // 4
        or np.sqrt(np.mean(np.square(samples, dtype=np.float64))) < _SILENCE
    ):
        return None
    frames = np.lib.stride_tricks.sliding_window_view(samples, _WINDOW)[
        :: _WINDOW // 4
    ] * np.hanning(_WINDOW)
    power = np.abs(np.fft.rfft(frames)) ** 2
    edges = np.searchsorted(np.fft.rfftfreq(_WINDOW, 1 / SAMPLE_RATE), _BANDS_HZ)
    bands = np.stack([power[:, low:high].mean(1) for low, high in pairwise(edges)], axis=1)
    # Parts overlap by two thirds: a clip that was cut a frame later has nearly the same ones.
    centres, times = np.linspace(0, 1, _NUM_PARTS)[:, None], np.linspace(0, 1, len(bands))
    weights = (
        np.cos(np.clip(np.pi / 3 * (_NUM_PARTS - 1) * (times - centres), -np.pi / 2, np.pi / 2))
        ** 2
    )
    level = np.log(weights @ bands + 1e-12)
    return _hex(np.diff(np.diff(level, axis=1), axis=0) > 0)


def mark_duplicates(rows: Iterable[Row], options: PrepareOptions) -> list[Row]:
    """The rows, with the duplicates among the kept clips dropped; the reason names the clip that
    stays.

    Of several, that with the largest face stays (its box in source pixels), then the longest, then
    the first by name. The result depends neither on the order of the rows nor on what an earlier
    call has marked.
    """
    out = [_unmarked(row) for row in rows]
    if options.max_duplicate_distance is None:
        return out
    places = [
        i
        for i, row in enumerate(out)
        if row.status == "kept" and row.phash is not None and row.num_frames
    ]
    places.sort(key=lambda i: _rank(out[i]))
    clips = [out[i] for i in places]
    better: dict[int, list[int]] = {}
    for first, second in _pairs(clips, options.max_duplicate_distance).tolist():
        better.setdefault(second, []).append(first)
    dropped: set[int] = set()
    for number in range(len(clips)):
        stays = next(
            (other for other in sorted(better.get(number, [])) if other not in dropped), None
        )
        if stays is None:
            continue
        dropped.add(number)
        reason = (
            f"the same picture, sound and length as clip {clips[stays].clip_id} of "
            f"{clips[stays].source}"
        )
        out[places[number]] = replace(
            clips[number], status="dropped", stage="filter", filter=FILTER, reason=reason
        )
    return out


def _unmarked(row: Row) -> Row:
    if row.status == "dropped" and row.filter == FILTER:
        return replace(row, status="kept", stage="encode", filter=None, reason=None)
    return row


def _rank(row: Row) -> tuple[Any, ...]:
    """Sorts the best clip first; no two clips are equal."""
    side = row.box[2] if row.box is not None else 0
    return -side, -(row.num_frames or 0), row.source, row.start_s or 0.0, row.clip_id


def _pairs(clips: Sequence[Row], max_distance: int) -> NDArray[np.int64]:
    """Pairs (i, j), i < j, of duplicates, as (m, 2).

    Hashes at most d bits apart agree in one of d + 1 pieces of their bits (pigeonhole principle).
    So, piece by piece, clips are sorted by it and by length, and compared with those that follow
    while piece and length agree.
    """
    if not clips:
        return np.empty((0, 2), np.int64)
    pictures = np.array([int(row.phash or "0", 16) for row in clips], np.uint64)
    sounds = np.array([int(row.sound_hash or "0", 16) for row in clips], np.uint64)
    silent = np.array([row.sound_hash is None for row in clips])
    sources = np.unique([row.source for row in clips], return_inverse=True)[1]
    lengths = np.array([row.num_frames for row in clips])
    tolerance = np.maximum(_MIN_TOLERANCE_FRAMES, _LENGTH_TOLERANCE * lengths)

    edges = np.linspace(0, 64, max_distance + 2).astype(int).tolist()
    found = [np.empty((0, 2), np.int64)]
    for low, high in pairwise(edges):
        piece = (pictures >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        order = np.lexsort((lengths, piece))
        left = np.arange(len(order) - 1)
        step = 1
        while len(left):
            i, j = order[left], order[left + step]
            near = (piece[i] == piece[j]) & (lengths[j] - lengths[i] <= tolerance[i])
            # who left the range here will not come back: it is sorted
            left, i, j = left[near], i[near], j[near]
            alike = np.bitwise_count(pictures[i] ^ pictures[j]) <= max_distance
            alike &= silent[i] == silent[j]
            alike &= np.bitwise_count(sounds[i] ^ sounds[j]) <= MAX_SOUND_DISTANCE
            alike &= ~silent[i] | (sources[i] != sources[j])
            found.append(np.sort(np.stack([i[alike], j[alike]], axis=1), axis=1))
            step += 1
            left = left[left + step < len(order)]
    return np.unique(np.concatenate(found), axis=0)


def _hex(bits: NDArray[np.bool_]) -> str:
    return np.packbits(bits.reshape(-1)).tobytes().hex()
