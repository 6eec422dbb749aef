"""For tests of time: a loop with a simulated clock, and pictures that tell what they show."""

from __future__ import annotations

import asyncio
import selectors
import struct
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from rest_lightning.constants import SAMPLES_PER_FRAME, TEMPORAL_RATIO

_Result = TypeVar("_Result")
_TRACE = struct.Struct("<IfB")  # frame of the stream, level of its speech, portrait
TRACED_SIZE_PX = 16  # unless told otherwise


class _Selector(selectors.DefaultSelector):
    """Where a loop would wait for a timer, its clock moves on instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(timeout if timeout is None else 0)
        if not events and timeout is not None and timeout > 0:
            self.now_s += timeout
        return events


class SimulatedLoop(asyncio.SelectorEventLoop):
    """Hours pass in seconds: when nothing can run, the clock jumps to the next timer.

    Work in executors is done at once, in this thread, and its result comes as much later as
    :meth:`charge` was told meanwhile. A simulation is deterministic.
    """

    def __init__(self) -> None:
        self._clock = _Selector()
        super().__init__(self._clock)
        self._charged_s = 0.0

    def time(self) -> float:
        """Simulated seconds since the loop was made."""
        return self._clock.now_s

    def charge(self, seconds: float) -> None:
        """Let the work that runs now take that long."""
        self._charged_s += seconds

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, call: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        """Call now, answer when its time has passed."""
        future = self.create_future()
        self._charged_s = 0.0
        try:
            result, error = call(*args), None
        except Exception as raised:
            result, error = None, raised

        def answer() -> None:
            if future.done():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        self.call_later(self._charged_s, answer)
        return future


def simulate(coroutine: Coroutine[Any, Any, _Result]) -> _Result:
    """Run a coroutine to its end in a :class:`SimulatedLoop`."""
    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        return runner.run(coroutine)


@dataclass(frozen=True)
class Trace:
    """What a traced picture tells.

    Attributes:
        frame: its number in the model's stream: in a face that moves without a jump, numbers follow
            one another.
        level: mean of the speech in the middle 20 ms of the picture's 40 ms, in [-1, 1].
        portrait: 0 for a dark portrait, 1 for a bright one.
    """

    frame: int
    level: float
    portrait: int


def read_trace(picture: NDArray[np.uint8]) -> Trace:
    """Read a picture of :class:`TracedModel`."""
    return Trace(*_TRACE.unpack(np.ascontiguousarray(picture).reshape(-1)[: _TRACE.size].tobytes()))


@dataclass
class _Row:
    portrait: int
    speech: NDArray[np.float32]
    frame: int = 0


class TracedModel:
    """Has what :class:`rest_lightning.avatar.AvatarPool` needs of a talking head; see
    :class:`Trace`.

    Args:
        chunk_length: latents of a chunk.
        lookahead_frames: frames that are read beyond it.
        compute_s: simulated seconds of a step, however many rows it has.
        broken_level: speech that is louder makes a step fail.
        size_px: side of the pictures.

    Attributes:
        num_steps: steps so far.
        num_rows: of every step.
    """

    def __init__(
        self,
        chunk_length: int = 3,
        lookahead_frames: int = 2,
        compute_s: float = 0.1,
        broken_level: float = 2.0,
        size_px: int = TRACED_SIZE_PX,
    ) -> None:
        self.compute_s, self.broken_level = compute_s, broken_level
        self.size_px, self.portraits = size_px, list[Path]()  # the portraits of the package
        self.transformer = SimpleNamespace(cache_options=SimpleNamespace(chunk_length=chunk_length))
        self.speech_encoder = SimpleNamespace(lookahead_frames=lookahead_frames)
        self.num_steps = 0
        self.num_rows: list[int] = []

    def open_batch(
        self, num_rows: int, *, options: Any = None, chunk_length: int | None = None
    ) -> TracedBatch:
        """Any number of rows."""
        own: int = self.transformer.cache_options.chunk_length
        return TracedBatch(self, TEMPORAL_RATIO * (chunk_length or own))


class TracedBatch:
    """The part of :class:`rest_lightning.BatchSession` that avatars use."""

    def __init__(self, model: TracedModel, chunk_frames: int) -> None:
        from rest_lightning.streaming.report import StreamClock

        self.clock = StreamClock()
        self._model, self._chunk_frames = model, chunk_frames
        self._rows: dict[int, _Row] = {}

    @property
    def rows(self) -> list[int]:
        """Rows in use."""
        return sorted(self._rows)

    def start(self, row: int, portrait: Any, *, seed: int = 0) -> None:
        """Begin a stream."""
        self._rows[row] = _Row(_is_bright(portrait), np.zeros(0, np.float32))

    def stop(self, row: int) -> None:
        """End a stream."""
        del self._rows[row]

    def switch_identity(self, row: int, portrait: Any) -> None:
        """Pictures tell the portrait."""
        self._rows[row].portrait = _is_bright(portrait)

    def push(self, row: int, samples: Any) -> None:
        """Speech, float32 at 16 kHz."""
        self._rows[row].speech = np.concatenate([self._rows[row].speech, samples])

    def amend(self, row: int, samples: Any) -> None:
        """Other speech in the place of the last."""
        self._rows[row].speech = np.concatenate([self._rows[row].speech[: -len(samples)], samples])

    def snapshot_row(self, row: int) -> tuple[int, NDArray[np.float32], int]:
        """All there is."""
        held = self._rows[row]
        return held.portrait, held.speech.copy(), held.frame

    def restore_row(self, row: int, state: tuple[int, NDArray[np.float32], int]) -> None:
        """Go back."""
        portrait, speech, frame = state
        self._rows[row] = _Row(portrait, speech.copy(), frame)

    def step(self) -> dict[int, NDArray[np.uint8]]:
        """A chunk of every row that has its speech."""
        model = self._model
        window = SAMPLES_PER_FRAME * (self._chunk_frames + model.speech_encoder.lookahead_frames)
        ready = [row for row in self.rows if len(self._rows[row].speech) >= window]
        if any(np.abs(self._rows[row].speech).max() > model.broken_level for row in ready):
            raise RuntimeError("the speech was too loud")
        if ready:
            model.num_steps += 1
            model.num_rows.append(len(ready))
            loop = asyncio._get_running_loop()
            if isinstance(loop, SimulatedLoop):
                loop.charge(model.compute_s)
            else:
                time.sleep(model.compute_s)
        return {row: self._frames(self._rows[row]) for row in ready}

    def close(self) -> None:
        """Nothing to give back."""
        self._rows.clear()

    def _frames(self, row: _Row) -> NDArray[np.uint8]:
        size = self._model.size_px
        frames = np.full((self._chunk_frames, size * size * 3), 128, np.uint8)
        for frame in frames:
            samples, row.speech = row.speech[:SAMPLES_PER_FRAME], row.speech[SAMPLES_PER_FRAME:]
            quarter = SAMPLES_PER_FRAME // 4
            trace = _TRACE.pack(row.frame, float(samples[quarter:-quarter].mean()), row.portrait)
            frame[: _TRACE.size] = np.frombuffer(trace, np.uint8)
            row.frame += 1
        return frames.reshape(self._chunk_frames, size, size, 3)


def _is_bright(portrait: Any) -> int:
    return int(np.asarray(portrait).mean() > 0)
