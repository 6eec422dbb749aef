"""The sound of a video as 16 kHz mono on the clock of its frames, in a file: two hours are 230 MB
and not in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from rest_lightning.constants import SAMPLE_RATE, SAMPLES_PER_FRAME
from rest_lightning.data.preparation.frames import decoded, open_container

_JUMP_SAMPLES = SAMPLE_RATE // 25  # time stamps further off than this are a gap, not jitter
_SILENCE = 1e-5  # of full scale: -100 dB


def decode_sound(path: Path, target: Path, num_samples: int, origin_s: Fraction) -> str | None:
    """Write the sound of a video as raw int16 samples.

    Every block is put where its time stamp says: sound that begins late or stops between is silence
    there, and what is heard before the first frame is left out.

    Args:
        path: the video; the track marked as default is taken, else the first; more channels are
            mixed down.
        target: gets exactly ``num_samples`` samples.
        num_samples: at 16 kHz.
        origin_s: time stamp of the first frame.

    Returns:
        What was wrong, in one line; None if nothing was.

    Raises:
        OSError: the target cannot be written.
    """
    damage: list[str] = []
    with open(target, "wb") as file:
        file.truncate(2 * num_samples)
        with open_container(path) as container:
            streams = container.streams.audio
            if not streams:
                return "expected an audio stream, got none"
            stream = next(
                (s for s in streams if s.disposition & av.stream.Disposition.default), streams[0]
            )
            num_written = 0
            for position, block in _placed(decoded(container, stream, damage, "sound"), origin_s):
                low, high = max(position, 0), min(position + len(block), num_samples)
                if low < high:
                    file.seek(2 * low)
                    file.write(block[low - position : high - position].tobytes())
                    num_written += high - low
    if not num_written:
        damage.append("expected sound beside the frames, got none that can be decoded")
    return damage[0] if damage else None


def read_sound(source: Path, start_frame: int, num_frames: int) -> NDArray[np.float32]:
    """Samples (640 * num_frames,) in [-1, 1] of frames from ``start_frame`` on, of `decode_sound`'s
    file.
    """
    count = num_frames * SAMPLES_PER_FRAME
    raw = np.fromfile(source, np.int16, count, offset=2 * start_frame * SAMPLES_PER_FRAME)
    samples = np.zeros(count, np.float32)
    samples[: len(raw)] = raw.astype(np.float32) / 32768.0
    return samples


def silent_share(samples: NDArray[np.float32], silence_db: float) -> float:
    """Share of 40 ms stretches whose RMS lies below ``silence_db`` dB of full scale, of samples
    (640 n,).
    """
    power = np.square(samples.reshape(-1, SAMPLES_PER_FRAME), dtype=np.float64).mean(axis=1)
    return float(np.mean(10 * np.log10(power + _SILENCE**2) < silence_db))


def _placed(frames: Iterator[Any], origin_s: Fraction) -> Iterator[tuple[int, NDArray[np.int16]]]:
    """Blocks of samples, and the number of the first of each, counted from ``origin_s``."""
    resampler: av.AudioResampler | None = None
    shape: tuple[Any, ...] = ()
    position, heard = 0, Fraction(0)  # the next sample; where the sound put in so far ends

    def convert(frame: Any) -> NDArray[np.int16]:
        # Integers: FFmpeg mixes channels down with weights that sum to one there, to floats with a
        # gain that clips.
        pieces = (
            []
            if resampler is None
            else [piece.to_ndarray()[0] for piece in resampler.resample(frame)]
        )
        return np.concatenate([np.zeros(0, np.int16), *pieces])

    for frame in frames:
        now = (frame.format.name, frame.layout.name, frame.sample_rate)
        stamp = (
            None
            if frame.pts is None or frame.time_base is None
            else frame.pts * frame.time_base - origin_s
        )
        jumps = stamp is not None and abs(stamp - heard) * SAMPLE_RATE > _JUMP_SAMPLES
        if resampler is None or now != shape or jumps:
            rest = convert(None)
            if len(rest):
                yield position, rest
            resampler, shape = av.AudioResampler("s16", "mono", SAMPLE_RATE), now
            heard = stamp if stamp is not None else heard
            position = round(heard * SAMPLE_RATE)
        heard += Fraction(frame.samples, frame.sample_rate)
        frame.pts = None
        block = convert(frame)
        yield position, block
        position += len(block)
    rest = convert(None)
    yield position, rest
