"""A stream of one talking head: push speech, get frames."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from torch import Tensor

from rest_lightning.errors import UserError
from rest_lightning.streaming.idle import IDLE
from rest_lightning.streaming.options import EngineOptions
from rest_lightning.streaming.overlap import Frames, Pending, Ready
from rest_lightning.streaming.report import StreamClock, StreamReport
from rest_lightning.streaming.row import Row, RowState, as_reference, as_samples

if TYPE_CHECKING:
    from rest_lightning.talking_head import SamplingSettings, TalkingHead

_LIVE_S = 0.005  # a source that lets us wait longer than this for a block is live


@dataclass(frozen=True)
class SessionState:
    """A session between two pushes: its row, and frames that were computed but not handed out."""

    row: RowState
    waiting: tuple[Frames, ...] = ()


class StreamingSession:
    """Speech in, frames out, chunk by chunk, at a constant cost; made by :meth:`TalkingHead.open`.

    The first emitted frame shows the first 40 ms of speech.

    Args:
        model: the talking head.
        portrait: see :meth:`TalkingHead.open`.
        seed: see :meth:`TalkingHead.open`.
        sampling: None takes the model's own.
        options: switches of the engine.
    """

    def __init__(
        self,
        model: TalkingHead,
        portrait: Any,
        *,
        seed: int = 0,
        sampling: SamplingSettings | None = None,
        options: EngineOptions | None = None,
    ) -> None:
        self.model = model
        sampling, options = sampling or model.sampling, options or EngineOptions()
        self.clock = StreamClock()
        self.configuration = describe(model, sampling, options) | {"seed": seed}
        reference = as_reference(portrait, model.size_px)
        self.engine = IDLE.open(model, sampling, self.clock, options)
        if options.warms_up(model.device) and not self.engine.num_captured:
            self.engine.warm_up()
        self._row = Row(self.engine, reference, seed)
        self._under_way: deque[tuple[Pending, int, int]] = deque()
        self._closed = False

    @property
    def num_frames(self) -> int:
        """Frames emitted so far."""
        return self._row.num_frames - sum(num_frames for _, num_frames, _ in self._under_way)

    @property
    def reference(self) -> Tensor:
        """The portrait, (1, 3, H, W) in [-1, 1]."""
        return self._row.reference

    def push(self, samples: Any) -> Frames:
        """Take in speech and return the frames that became ready.

        Args:
            samples: float samples in about [-1, 1], or int16; one dimension, 16 kHz, any length.

        Returns:
            uint8 (n, H, W, 3), n a multiple of the chunk's frames and often 0.

        Raises:
            UserError: a push after :meth:`flush`, more than one dimension, or samples that are not finite.
        """
        return self._stack([*self._feed(samples), *self._collect()])

    def flush(self) -> Frames:
        """End the speech: the frames of what is left, so that the video is as long as the speech."""
        return self._stack(list(self._drain()))

    def stream(self, blocks: Iterable[Any]) -> Iterator[Frames]:
        """Push every block, flush at the end, and yield each chunk's frames as soon as they are ready.

        On CUDA a chunk is decoded while the next one is denoised. Where the source is live, that is where it lets us
        wait for a block, nothing is held back for that: frames are handed out before the next block is asked for.
        """
        source = iter(blocks)
        while True:
            asked_s = time.perf_counter()
            try:
                block = next(source)
            except StopIteration:
                break
            is_live = time.perf_counter() - asked_s > _LIVE_S
            yield from self._feed(block)
            yield from self._collect(0 if is_live else self.engine.depth)
        yield from self._drain()

    def switch_identity(self, portrait: Any) -> None:
        """Continue with another portrait from the next chunk on; costs one prefill."""
        self._check_open()
        self._row.show(as_reference(portrait, self.model.size_px))

    def report(self) -> StreamReport:
        """Frames, speed, latency and memory so far."""
        return self.clock.report(self.configuration)

    def snapshot(self) -> SessionState:
        """A copy of everything that the following frames depend on."""
        self._check_open()
        waiting = [(Ready(pending.frames()), num_frames, mark) for pending, num_frames, mark in self._under_way]
        self._under_way = deque(waiting)
        frames = tuple(ready.frames()[0, :num_frames] for ready, num_frames, _ in waiting)
        return SessionState(self._row.snapshot(), frames)

    def restore(self, state: SessionState) -> None:
        """Go back to a snapshot: the same speech then gives the same frames, bit for bit.

        Raises:
            UserError: a snapshot of another model, type, size or guidance, or a session that is closed; the session is
                as it was then.
        """
        self._check_open()
        self._row.restore(state.row)
        self._under_way = deque((Ready(frames[None]), len(frames), self.clock.mark()) for frames in state.waiting)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and not self._closed:  # an engine in which something failed is not trusted again
            IDLE.close(self.engine)
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise UserError("expected an open session, got one that is closed: open a new session")

    def _feed(self, samples: Any) -> Iterator[Frames]:
        if self._closed or self._row.is_finished:
            raise UserError(
                "expected speech before flush() or the end of the session, got a push after it: open a new session"
            )
        block = as_samples(samples, self._row.num_samples)
        position = 0
        while position < len(block):
            position += self._row.fill(block[position:])
            if self._row.has_chunk:
                yield from self._launch()

    def _drain(self) -> Iterator[Frames]:
        if self._closed:
            return
        self._row.is_finished = True
        while self._row.has_chunk:
            yield from self._launch()
        yield from self._collect()

    def _launch(self) -> Iterator[Frames]:
        """Queue the next chunk, then hand out earlier ones: all that are ready, and what must be before one more."""
        if not self._row.num_frames:
            self.clock.input_complete()
        audio, noise, num_frames = self._row.take()
        self._under_way.append((self.engine.launch(audio, noise), num_frames, self.clock.mark()))
        yield from self._collect(self.engine.depth)

    def _collect(self, num_left: int = 0) -> Iterator[Frames]:
        """Hand out chunks in their order: those that are ready, and waiting for others until ``num_left`` are left."""
        while self._under_way and (len(self._under_way) > num_left or self._under_way[0][0].is_ready):
            pending, num_frames, mark = self._under_way.popleft()
            frames = pending.frames()[0, :num_frames]
            self.clock.end_chunk(num_frames, mark)
            yield frames

    def _stack(self, chunks: list[Frames]) -> Frames:
        size = self.model.size_px
        return np.concatenate(chunks) if chunks else np.zeros((0, size, size, 3), dtype=np.uint8)


def describe(model: TalkingHead, sampling: SamplingSettings, options: EngineOptions) -> dict[str, Any]:
    """What a report remembers of how a stream was made."""
    return {
        **asdict(sampling),
        "size_px": model.size_px,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "cuda_graphs": options.captures(model.device),
        "compile": options.compile,
        "packed": options.packs(model.device, model.dtype),
        "fused": options.fuses(model.device, model.dtype),
        "float8": options.float8,
        "attention": options.attention,
        "overlap": options.overlap and model.device.type == "cuda",
        "first_chunk_length": options.first_length(model.transformer.cache_options.chunk_length),
    }
