"""A model whose frames say what they are: frame number, and where a beep begins in their 40 ms of
speech, as black and white blocks that survive H.264. It stands in for a talking head where sound,
picture and time are to be measured.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rest_lightning.constants import SAMPLE_RATE, SAMPLES_PER_FRAME, TEMPORAL_RATIO

COLUMNS, ROWS = 8, 4  # blocks: number (low, high byte), beep, checksum
CHECK = 0xA5  # a frame that is all black, or a portrait, is no marked frame
ONSET_STEP = 10  # samples; 64 steps cover a frame
LOUD, QUIET_SAMPLES = 0.1, SAMPLE_RATE // 20  # a beep begins where it is loud after 50 ms of quiet
BLACK, WHITE = 24, 232

Frames = NDArray[np.uint8]


def blocks_of(number: int, onset: int | None, is_bright: bool) -> list[int]:
    """The four bytes of a frame: number (2), beep (bit 0), its onset (bits 1 to 6), kind of
    portrait (bit 7), check.
    """
    beep = (0 if onset is None else 1 | onset // ONSET_STEP << 1) | is_bright << 7
    low, high = number & 255, number >> 8 & 255
    return [low, high, beep, low ^ high ^ beep ^ CHECK]


def draw(values: list[int], size_px: int) -> Frames:
    """A frame (size_px, size_px, 3) of blocks, most significant bit on the left."""
    bits = np.unpackbits(np.asarray(values, np.uint8)[:, None], axis=1)
    levels = np.where(bits, WHITE, BLACK).astype(np.uint8)
    tall, wide = size_px // ROWS, size_px // COLUMNS
    return np.repeat(np.kron(levels, np.ones((tall, wide), np.uint8))[..., None], 3, axis=2)


def read(frame: Frames) -> dict[str, Any] | None:
    """What a frame says, None when it is not marked."""
    tall, wide = frame.shape[0] // ROWS, frame.shape[1] // COLUMNS
    bits = frame[tall // 2 :: tall, wide // 2 :: wide, 1][:ROWS, :COLUMNS] > 128
    low, high, beep, check = (int(value) for value in np.packbits(bits, axis=1)[:, 0])
    if low ^ high ^ beep ^ CHECK != check:
        return None
    onset = (beep >> 1 & 63) * ONSET_STEP if beep & 1 else None
    return {"number": low | high << 8, "onset": onset, "is_bright": bool(beep >> 7)}


@dataclass
class _Row:
    """A stream: speech that no frame has shown yet, and where it is."""

    is_bright: bool
    speech: NDArray[np.int16] = field(default_factory=lambda: np.zeros(0, np.int16))
    number: int = 0
    num_quiet: int = QUIET_SAMPLES

    def frame(self, size_px: int) -> Frames:
        samples, self.speech = self.speech[:SAMPLES_PER_FRAME], self.speech[SAMPLES_PER_FRAME:]
        onset = None
        for place in np.flatnonzero(np.abs(samples.astype(np.int32)) > LOUD * 32768):
            if self.num_quiet + place >= QUIET_SAMPLES:
                onset = int(place)
            self.num_quiet = -int(place) - 1  # counts from behind this sample
        self.num_quiet += SAMPLES_PER_FRAME
        self.number += 1
        return draw(blocks_of(self.number - 1, onset, self.is_bright), size_px)


class MarkedBatch:
    """Rows with the interface of :class:`rest_lightning.streaming.batch.BatchSession` that avatars
    use.

    Args:
        model: sizes and times.
    """

    def __init__(self, model: MarkedModel) -> None:
        from rest_lightning.streaming.report import StreamClock

        self.clock = StreamClock()
        self._model = model
        self._rows: dict[int, _Row] = {}

    @property
    def rows(self) -> list[int]:
        """Rows in use."""
        return sorted(self._rows)

    def start(self, row: int, portrait: Any, *, seed: int = 0) -> None:
        """Begin a stream at frame 0."""
        self._rows[row] = _Row(_is_bright(portrait))

    def switch_identity(self, row: int, portrait: Any) -> None:
        """Frames tell the kind of portrait."""
        self._rows[row].is_bright = _is_bright(portrait)

    def push(self, row: int, samples: Any) -> None:
        """Speech, int16 or float."""
        self._rows[row].speech = np.concatenate([self._rows[row].speech, _as_pcm(samples)])

    def amend(self, row: int, samples: Any) -> None:
        """Other speech in the place of the last."""
        held = self._rows[row].speech[: -len(samples)]
        self._rows[row].speech = np.concatenate([held, _as_pcm(samples)])

    def snapshot_row(self, row: int) -> _Row:
        """All there is."""
        return replace(self._rows[row])

    def restore_row(self, row: int, state: _Row) -> None:
        """Go back."""
        self._rows[row] = replace(state)

    def step(self) -> dict[int, Frames]:
        """A chunk of every row that has its speech, in the model's own time."""
        model = self._model
        ready = [row for row in self.rows if len(self._rows[row].speech) >= model.window_samples]
        if ready:
            time.sleep(model.chunk_s)
        frames = range(model.chunk_frames)
        return {
            row: np.stack([self._rows[row].frame(model.size_px) for _ in frames]) for row in ready
        }

    def stop(self, row: int) -> None:
        """End a stream."""
        del self._rows[row]

    def close(self) -> None:
        """Nothing to give back."""
        self._rows.clear()


class MarkedModel:
    """What the server needs of a :class:`rest_lightning.TalkingHead`.

    Args:
        size_px: side of the frames, a multiple of 8.
        chunk_s: how long a chunk takes, however many rows.
        chunk_length: latents of a chunk.
        lookahead_frames: what is read beyond it.
    """

    def __init__(
        self,
        size_px: int = 64,
        chunk_s: float = 0.0,
        chunk_length: int = 3,
        lookahead_frames: int = 0,
    ) -> None:
        self.size_px, self.chunk_s = size_px, chunk_s
        self.portraits: list[Path] = []  # the package's
        self.transformer = SimpleNamespace(cache_options=SimpleNamespace(chunk_length=chunk_length))
        self.speech_encoder = SimpleNamespace(lookahead_frames=lookahead_frames)
        self.chunk_frames = TEMPORAL_RATIO * chunk_length
        self.window_samples = SAMPLES_PER_FRAME * (self.chunk_frames + lookahead_frames)

    def open_batch(self, num_rows: int, options: Any = None) -> MarkedBatch:
        """Any number of rows."""
        return MarkedBatch(self)


def _as_pcm(samples: Any) -> NDArray[np.int16]:
    block = np.asarray(samples)
    return block if block.dtype == np.int16 else (block * 32767).astype(np.int16)


def _is_bright(portrait: Any) -> bool:
    """Whether a portrait in [-1, 1] is brighter than a fifth of white, as photographs are."""
    return bool(np.asarray(portrait).mean() > -0.6)
