"""The model in a thread of its own: sessions hand in chunks, and those that wait are computed
together.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rest_lightning.constants import SAMPLES_PER_FRAME, TEMPORAL_RATIO
from rest_lightning.serve.protocol import Pcm
from rest_lightning.streaming.device import Frames

if TYPE_CHECKING:
    from rest_lightning.streaming.engine import EngineOptions
    from rest_lightning.talking_head import TalkingHead


class ModelError(Exception):
    """The model failed in one session."""


@dataclass(frozen=True)
class Computed:
    """A chunk: frames (n, H, W, 3), how long the model took, how long the chunk waited for it, with
    how many others.
    """

    frames: Frames
    compute_ms: float
    queued_ms: float
    num_rows: int


@dataclass(frozen=True)
class _Job:
    window: Pcm
    num_new: int
    future: Future[Computed]
    asked_s: float


class Slot:
    """One session's row of the batch; made by :meth:`Scheduler.acquire`. Calls take effect in their
    order.
    """

    def __init__(self, scheduler: Scheduler, row: int) -> None:
        self._scheduler, self.row = scheduler, row

    def start(self, portrait: Tensor, seed: int) -> Future[None]:
        """Begin with a portrait (3, H, W) in [-1, 1]."""
        return self._scheduler.post(lambda: self._scheduler.start_row(self.row, portrait, seed))

    def show(self, portrait: Tensor) -> Future[None]:
        """Go on with another portrait from the next chunk on."""
        return self._scheduler.post(lambda: self._scheduler.show(self.row, portrait))

    def compute(self, window: Pcm, num_new: int) -> Future[Computed]:
        """A chunk of what the model reads for it; all but the last ``num_new`` samples were read
        for the one before.

        The future raises ModelError when the model fails in this row.
        """
        return self._scheduler.submit(self.row, window, num_new)

    def release(self) -> None:
        """Give the row back; a second call does nothing."""
        self._scheduler.release(self)


class Scheduler:
    """Rows of one :class:`rest_lightning.streaming.batch.BatchSession`, computed by a thread that
    nobody waits for.

    A session has one chunk in work at a time. All chunks that have come while the model was busy
    are computed together in the next step, so every session gets its turn, and sessions that began
    at different times stay staggered. When a step fails, its sessions are computed anew one by one,
    each from its portrait on: only those that fail again end.

    Args:
        model: the talking head.
        num_rows: sessions at once.
        options: of the engine.

    Attributes:
        chunk_frames: frames of a chunk; ``chunk_samples`` and ``lookahead_samples`` belong to them.
        warm_up_ms: time of a chunk of 1, 2, ... rows together, measured by :meth:`warm_up`.
    """

    def __init__(
        self, model: TalkingHead, num_rows: int, options: EngineOptions | None = None
    ) -> None:
        self.model, self.num_rows = model, num_rows
        self.chunk_frames = TEMPORAL_RATIO * model.transformer.cache_options.chunk_length
        self.chunk_samples = SAMPLES_PER_FRAME * self.chunk_frames
        self.lookahead_samples = SAMPLES_PER_FRAME * model.speech_encoder.lookahead_frames
        self.warm_up_ms: list[float] = []
        self._batch = model.open_batch(num_rows, options=options)
        self._free = list(range(num_rows))
        self._held: dict[int, Slot] = {}
        self._portraits: dict[int, tuple[Tensor, int]] = {}
        self._jobs: dict[int, _Job] = {}
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        """Warm up and begin to work; returns when the first session can be served."""
        self.warm_up()
        self._thread.start()

    def warm_up(self) -> None:
        """Compute chunks of 1, 2, ... rows: a slow first chunk would set a session's latency for
        good.
        """
        portrait = torch.zeros(3, self.model.size_px, self.model.size_px)
        for num_rows in range(1, self.num_rows + 1):
            for row in range(num_rows):
                self._batch.start(row, portrait)
            for count in (
                self.chunk_samples + self.lookahead_samples,
                self.chunk_samples,
                self.chunk_samples,
            ):
                for row in range(num_rows):
                    self._batch.push(row, np.zeros(count, np.float32))
                start_s = time.perf_counter()
                self._batch.step()
                took_ms = 1e3 * (time.perf_counter() - start_s)
            self.warm_up_ms.append(took_ms)
            for row in range(num_rows):
                self._batch.stop(row)

    def stop(self) -> None:
        """Let the thread end after what it has begun; chunks that wait fail."""
        self._inbox.put(None)

    def close(self) -> None:
        """Stop, and wait for the thread's end."""
        self.stop()
        if self._thread.is_alive():
            self._thread.join()
        self._batch.close()

    # -- called by the network's thread ------------------------------------------------------------

    @property
    def is_alive(self) -> bool:
        """Whether the model's thread works."""
        return self._thread.is_alive()

    @property
    def num_free(self) -> int:
        """Rows that no session holds."""
        return len(self._free)

    @property
    def rows(self) -> list[int]:
        """Rows in which the model has a stream."""
        return self._batch.rows

    def acquire(self) -> Slot | None:
        """A row for a session; None when all are taken."""
        if not self._free:
            return None
        slot = Slot(self, self._free.pop(0))
        self._held[slot.row] = slot
        return slot

    def release(self, slot: Slot) -> None:
        """See :meth:`Slot.release`."""
        if self._held.get(slot.row) is slot:
            del self._held[slot.row]
            self.post(lambda: self._stop(slot.row))
            self._free.append(slot.row)  # whoever takes it next comes after the stop

    def post(self, call: Callable[[], None]) -> Future[None]:
        """Run something in the model's thread, before its next step."""
        future: Future[None] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    call()
                    future.set_result(None)
                except Exception as error:
                    future.set_exception(error)

        self._inbox.put(run)
        return future

    def submit(self, row: int, window: Pcm, num_new: int) -> Future[Computed]:
        """See :meth:`Slot.compute`."""
        job = _Job(window, num_new, Future(), time.perf_counter())
        self._inbox.put(lambda: self._take_in(row, job))
        return job.future

    # -- the model's thread ------------------------------------------------------------------------

    def _run(self) -> None:
        while (call := self._inbox.get()) is not None:
            call()
            try:
                while (call := self._inbox.get_nowait()) is not None:
                    call()
            except queue.Empty:
                if self._jobs:
                    self._step()
                continue
            break
        while not self._inbox.empty():
            if (call := self._inbox.get()) is not None:
                call()
        for row in list(self._jobs):
            self._stop(row)

    def start_row(self, row: int, portrait: Tensor, seed: int) -> None:
        """In the model's thread: see :meth:`Slot.start`."""
        self._batch.start(row, portrait, seed=seed)
        self._portraits[row] = (portrait, seed)

    def show(self, row: int, portrait: Tensor) -> None:
        """In the model's thread: see :meth:`Slot.show`."""
        self._batch.switch_identity(row, portrait)
        self._portraits[row] = (portrait, self._portraits[row][1])

    def _stop(self, row: int) -> None:
        if (job := self._jobs.pop(row, None)) is not None:
            job.future.set_exception(ModelError("the session has ended"))
        self._portraits.pop(row, None)
        if row in self._batch.rows:
            self._batch.stop(row)

    def _take_in(self, row: int, job: _Job) -> None:
        if not job.future.set_running_or_notify_cancel():
            return
        try:
            self._batch.push(row, job.window[len(job.window) - job.num_new :])
            self._jobs[row] = job
        except Exception as error:  # the row was never started, or has failed before
            job.future.set_exception(_failure(error))

    def _step(self) -> None:
        jobs, self._jobs = self._jobs, {}
        start_s = time.perf_counter()
        try:
            frames = self._batch.step()
        except Exception:
            self._one_by_one(jobs)
            return
        for row, job in jobs.items():
            if row in frames:
                self._hand_out(job, frames[row], start_s, len(frames))
            else:
                job.future.set_exception(ModelError("expected a whole chunk of speech, got less"))

    def _one_by_one(self, jobs: dict[int, _Job]) -> None:
        """After a failure: nobody knows what the rows hold by now, so each begins anew with its own
        chunk.
        """
        for row, job in jobs.items():
            start_s = time.perf_counter()
            try:
                portrait, seed = self._portraits[row]
                self._batch.start(row, portrait, seed=seed)
                self._batch.push(row, job.window)
                self._hand_out(job, self._batch.step()[row], start_s, 1)
            except Exception as error:
                self._stop(row)
                job.future.set_exception(_failure(error))

    def _hand_out(self, job: _Job, frames: Frames, start_s: float, num_rows: int) -> None:
        queued_ms, compute_ms = 1e3 * (start_s - job.asked_s), 1e3 * (time.perf_counter() - start_s)
        job.future.set_result(Computed(frames, compute_ms, queued_ms, num_rows))


def _failure(error: Exception) -> ModelError:
    failure = ModelError(f"the model failed: {type(error).__name__}")
    failure.__cause__ = error
    return failure
