"""A stream of one talking head: push speech, get frames."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rest_lightning.constants import SAMPLE_RATE, SAMPLES_PER_FRAME
from rest_lightning.errors import UserError
from rest_lightning.streaming.engine import ChunkEngine, EngineState
from rest_lightning.streaming.report import StreamClock, StreamReport

if TYPE_CHECKING:
    from rest_lightning.talking_head import SamplingSettings, TalkingHead

Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class SessionState:
    """A session between two pushes: engine, waiting samples, noise generator and counters."""

    engine: EngineState
    buffer: NDArray[np.float32]
    filled: int
    num_samples: int
    num_frames: int
    generator: Tensor


class StreamingSession:
    """Speech in, frames out, chunk by chunk, at a constant cost; made by :meth:`TalkingHead.open`.

    The first emitted frame shows the first 40 ms of speech. Internally frame 0 is the portrait itself with one frame of
    silence before the speech; it is never emitted.

    Args:
        model: the talking head.
        portrait: see :meth:`TalkingHead.open`.
        seed: see :meth:`TalkingHead.open`.
        sampling: None takes the model's own.
    """

    def __init__(
        self,
        model: TalkingHead,
        portrait: Any,
        *,
        seed: int = 0,
        sampling: SamplingSettings | None = None,
    ) -> None:
        self.model = model
        sampling = sampling or model.sampling
        self.clock = StreamClock(torch.cuda.synchronize if model.device.type == "cuda" else None)
        self.configuration: dict[str, Any] = {
            **asdict(sampling),
            "seed": seed,
            "size_px": model.size_px,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device.type,
        }
        self.reference = self._portrait(portrait)
        self.engine = ChunkEngine(model, 1, sampling, self.clock)
        self.generator = torch.Generator().manual_seed(seed)
        self.engine.start(self.reference)
        self._chunk_samples = self.engine.chunk_frames * SAMPLES_PER_FRAME
        self._buffer = np.zeros(self.engine.window_samples, dtype=np.float32)
        self._filled = model.speech_encoder.left_context_frames * SAMPLES_PER_FRAME
        self._num_samples = 0
        self._num_frames = 0
        self._finished = False

    @property
    def num_frames(self) -> int:
        """Frames emitted so far."""
        return self._num_frames

    def push(self, samples: Any) -> Frames:
        """Take in speech and return the frames that became ready.

        Args:
            samples: float samples in about [-1, 1], or int16; one dimension, 16 kHz, any length.

        Returns:
            uint8 (n, H, W, 3), n a multiple of the chunk's frames and often 0.

        Raises:
            UserError: a push after :meth:`flush`, more than one dimension, or samples that are not finite.
        """
        return self._stack(list(self._feed(samples)))

    def flush(self) -> Frames:
        """End the speech: the frames of what is left, so that the video is as long as the speech."""
        return self._stack(list(self._drain()))

    def stream(self, blocks: Iterable[Any]) -> Iterator[Frames]:
        """Push every block, flush at the end, and yield each chunk's frames as soon as they are ready."""
        for block in blocks:
            yield from self._feed(block)
        yield from self._drain()

    def switch_identity(self, portrait: Any) -> None:
        """Continue with another portrait from the next chunk on; costs one prefill."""
        self.reference = self._portrait(portrait)
        self.engine.show(self.reference)

    def report(self) -> StreamReport:
        """Frames, speed, latency and memory so far."""
        return self.clock.report(self.configuration)

    def snapshot(self) -> SessionState:
        """A copy of everything that the following frames depend on."""
        return SessionState(
            self.engine.snapshot(),
            self._buffer.copy(),
            self._filled,
            self._num_samples,
            self._num_frames,
            self.generator.get_state(),
        )

    def restore(self, state: SessionState) -> None:
        """Go back to a snapshot: the same speech then gives the same frames, bit for bit."""
        self.engine.restore(state.engine)
        self._buffer[:] = state.buffer
        self._filled, self._num_samples, self._num_frames = state.filled, state.num_samples, state.num_frames
        self.generator.set_state(state.generator)
        self._finished = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finished = True

    def _feed(self, samples: Any) -> Iterator[Frames]:
        if self._finished:
            raise UserError(
                "expected speech before flush() or the end of the session, got a push after it: open a new session"
            )
        block = as_samples(samples, self._num_samples)
        position = 0
        while position < len(block):
            count = min(len(block) - position, len(self._buffer) - self._filled)
            self._buffer[self._filled : self._filled + count] = block[position : position + count]
            self._filled += count
            self._num_samples += count
            position += count
            if self._filled == len(self._buffer):
                yield self._chunk(self.engine.chunk_frames)

    def _drain(self) -> Iterator[Frames]:
        if self._finished:
            return
        total = -(-self._num_samples // SAMPLES_PER_FRAME)
        while self._num_frames < total:
            self._buffer[self._filled :] = 0.0
            self._filled = len(self._buffer)
            yield self._chunk(min(self.engine.chunk_frames, total - self._num_frames))
        self._finished = True

    def _chunk(self, num_frames: int) -> Frames:
        noise = torch.randn(self.engine.latent_shape, generator=self.generator)
        frames = self.engine.step(torch.from_numpy(self._buffer)[None], noise)[0, :num_frames].cpu().numpy()
        self._buffer[: -self._chunk_samples] = self._buffer[self._chunk_samples :].copy()
        self._filled -= self._chunk_samples
        self._num_frames += num_frames
        self.clock.end_chunk(num_frames)
        return frames

    def _stack(self, chunks: list[Frames]) -> Frames:
        size = self.model.size_px
        return np.concatenate(chunks) if chunks else np.zeros((0, size, size, 3), dtype=np.uint8)

    def _portrait(self, portrait: Any) -> Tensor:
        size = self.model.size_px
        if isinstance(portrait, Tensor) and portrait.is_floating_point():
            if portrait.shape != (3, size, size):
                raise UserError(f"expected a portrait tensor of shape (3, {size}, {size}), got {tuple(portrait.shape)}")
            return portrait[None]
        from rest_lightning.data.portrait import load_portrait

        return load_portrait(portrait, size)[None]


def as_samples(samples: Any, position: int = 0) -> NDArray[np.float32]:
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
