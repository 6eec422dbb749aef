"""One stream's own part: the speech that its next chunk reads, its noise, its portrait, and its place in an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rest_lightning.constants import SAMPLE_RATE, SAMPLES_PER_FRAME, TEMPORAL_RATIO
from rest_lightning.errors import UserError
from rest_lightning.streaming.state import EngineState, StreamState

if TYPE_CHECKING:
    from rest_lightning.streaming.engine import ChunkEngine

Samples = NDArray[np.float32]


@dataclass(frozen=True)
class RowState:
    """A row between two chunks: engine, waiting samples, noise generator, portrait and counters."""

    engine: EngineState
    buffer: Samples
    filled: int
    num_samples: int
    num_frames: int
    is_finished: bool
    generator: Tensor
    reference: Tensor


class Row:
    """A stream of an engine: speech goes in with :meth:`fill`, and :meth:`take` gives what the next chunk needs.

    The first emitted frame shows the first 40 ms of speech. Internally frame 0 is the portrait itself with one frame of
    silence before the speech; it is never emitted.

    Args:
        engine: tells the lengths of chunks and windows.
        reference: portrait (1, 3, H, W) in [-1, 1].
        seed: of the noise.
        place: memory of this one stream; None: the engine's own.

    Attributes:
        num_samples: samples of speech taken in.
        num_frames: frames launched so far.
        is_finished: whether the speech has ended.
    """

    def __init__(self, engine: ChunkEngine, reference: Tensor, seed: int, place: StreamState | None = None) -> None:
        self._engine, self._place, self.reference = engine, place or engine, reference
        self.generator = torch.Generator().manual_seed(seed)
        self._buffer: Samples = np.zeros(engine.window_samples, dtype=np.float32)
        self._filled = engine.model.speech_encoder.left_context_frames * SAMPLES_PER_FRAME
        self.num_samples = self.num_frames = 0
        self.is_finished = False
        self._place.start(reference)

    @property
    def num_latents(self) -> int:
        """Latents of the next chunk."""
        return self._engine.chunk_length if self.num_frames else self._engine.first_length

    @property
    def num_missing(self) -> int:
        """Samples that the next chunk still needs."""
        return self._engine.samples_of(self.num_latents) - self._filled

    @property
    def total_frames(self) -> int:
        """Frames of all speech so far; 40 ms begun count as one."""
        return -(-self.num_samples // SAMPLES_PER_FRAME)

    @property
    def has_chunk(self) -> bool:
        """Whether a chunk can be taken: all its samples are there, or the speech has ended before it was shown."""
        return self.num_missing == 0 or (self.is_finished and self.num_frames < self.total_frames)

    def fill(self, block: Samples) -> int:
        """Take in samples, at most as many as are missing; returns how many."""
        count = min(len(block), self.num_missing)
        self._buffer[self._filled : self._filled + count] = block[:count]
        self._filled += count
        self.num_samples += count
        return count

    def take(self) -> tuple[Tensor, Tensor, int]:
        """Audio (1, samples) and noise (1, C, l, h, w) of the next chunk, and how many of its frames are shown."""
        if self.num_missing:  # the ragged end
            self._buffer[self._filled :] = 0.0
            self._filled = self._engine.samples_of(self.num_latents)
        num_latents = self.num_latents
        audio = torch.from_numpy(self._buffer[: self._filled].copy())[None]
        _, channels, _, *place = self._engine.latent_shape
        noise = torch.randn((1, channels, num_latents, *place), generator=self.generator)
        num_frames = TEMPORAL_RATIO * num_latents
        if self.is_finished:
            num_frames = min(num_frames, self.total_frames - self.num_frames)
        shift = TEMPORAL_RATIO * num_latents * SAMPLES_PER_FRAME
        self._filled -= shift
        self._buffer[: self._filled] = audio[0, shift:].numpy()
        self.num_frames += num_frames
        return audio, noise, num_frames

    def show(self, reference: Tensor) -> None:
        """Go on with another portrait from the next chunk on."""
        self._place.show(reference)
        self.reference = reference

    def snapshot(self) -> RowState:
        """A copy of everything that the following frames depend on."""
        return RowState(
            self._place.snapshot(),
            self._buffer.copy(),
            self._filled,
            self.num_samples,
            self.num_frames,
            self.is_finished,
            self.generator.get_state(),
            self.reference,
        )

    def restore(self, saved: RowState) -> None:
        """Go back to a snapshot. See :meth:`StreamState.restore`."""
        self._place.restore(saved.engine)
        self._buffer[:] = saved.buffer
        self._filled, self.num_samples, self.num_frames = saved.filled, saved.num_samples, saved.num_frames
        self.is_finished, self.reference = saved.is_finished, saved.reference
        self.generator.set_state(saved.generator)


def as_reference(portrait: Any, size_px: int) -> Tensor:
    """A portrait as :meth:`TalkingHead.open` takes it, as a tensor (1, 3, size_px, size_px) in [-1, 1].

    Raises:
        UserError: a tensor of another shape, or what :func:`rest_lightning.media.portrait.read_portrait` refuses.
    """
    if isinstance(portrait, Tensor) and portrait.is_floating_point():
        if portrait.shape != (3, size_px, size_px):
            raise UserError(
                f"expected a portrait tensor of shape (3, {size_px}, {size_px}), got {tuple(portrait.shape)}"
            )
        return portrait[None]
    from rest_lightning.media.portrait import load_portrait

    return load_portrait(portrait, size_px)[None]


def as_samples(samples: Any, position: int = 0) -> Samples:
    """Check a block of speech and bring it to float32; int16 is scaled to [-1, 1].

    Args:
        samples: array, list or tensor of one dimension.
        position: samples before this block, for the error's time stamp.

    Raises:
        UserError: more than one dimension, an integer type other than int16, NaN or infinity.
    """
    block = samples.detach().cpu().numpy() if isinstance(samples, Tensor) else np.asarray(samples)
    if block.ndim != 1:
        raise UserError(
            f"expected speech of one dimension (mono, {SAMPLE_RATE} Hz), got shape {block.shape}: average the channels"
        )
    if block.dtype == np.int16:
        return block.astype(np.float32) / 32768.0
    if not np.issubdtype(block.dtype, np.floating):
        raise UserError(f"expected speech as float or int16, got {block.dtype}: convert it to float32 in [-1, 1]")
    block = block.astype(np.float32)
    finite = np.isfinite(block)
    if not finite.all():
        at_s = (position + int(np.argmin(finite))) / SAMPLE_RATE
        raise UserError(
            f"expected finite samples, got NaN or infinity at {at_s:.2f} s of the speech: repair the source"
        )
    return block
