"""Avatars that share one model: chunks that wait for it together are computed together."""

from __future__ import annotations

import asyncio
import inspect
import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from rest_lightning.avatar.timeline import Computed, Order
from rest_lightning.constants import FPS, SAMPLES_PER_FRAME, TEMPORAL_RATIO
from rest_lightning.errors import UserError

if TYPE_CHECKING:
    from rest_lightning.streaming.engine import EngineOptions
    from rest_lightning.streaming.report import StreamReport
    from rest_lightning.talking_head import TalkingHead

Frames = NDArray[np.uint8]
_Result = TypeVar("_Result")
_NUM_TURNAROUNDS = 8  # chunks that tell how long the next one will take


class ModelError(RuntimeError):
    """The model failed for one avatar; the message is one line."""


@dataclass
class _Job:
    row: int
    order: Order
    done: asyncio.Future[Frames | None]
    asked_s: float  # on the loop's clock
    posted_s: float = field(default_factory=time.perf_counter)


@dataclass
class _Row:
    """A place for one avatar.

    Attributes:
        turnarounds_s: from order to frames, of the last chunks.
        done_s: when the last one was computed.
    """

    turnarounds_s: deque[float] = field(default_factory=lambda: deque(maxlen=_NUM_TURNAROUNDS))
    done_s: float = 0.0


class AvatarPool:
    """Up to n avatars on one model; use it as an asynchronous context manager, or call
    :meth:`aclose`.

    The model works in a thread of its own. Orders that come while it is busy are computed together
    in its next step. A step that fails is repeated for each of its avatars alone, from the state
    before: only those that fail again end.

    Everything but the model runs in one event loop, the one that first waits for something here.

    Args:
        model: the talking head, on whatever device it is.
        num_avatars: n; memory for all of them is taken when the pool starts.
        options: switches of the engine.
        chunk_length: latents of 320 ms in a chunk, for models that were trained with several
            lengths; None takes the model's own. Short chunks answer sooner and cost more.
        sampling: ``num_steps``, ``guidance``, ... as in :meth:`TalkingHead.open_batch`.

    Attributes:
        chunk_frames: frames of a chunk; lookahead_frames: frames of speech read beyond it.
        warm_up_ms: time of a chunk of 1, 2, ... avatars together, measured when the pool starts.

    Raises:
        UserError: no avatar, or a chunk length that the model does not offer.
    """

    def __init__(
        self,
        model: TalkingHead,
        num_avatars: int = 1,
        *,
        options: EngineOptions | None = None,
        chunk_length: int | None = None,
        **sampling: Any,
    ) -> None:
        if num_avatars < 1:
            raise UserError(f"expected a pool of at least 1 avatar, got {num_avatars}")
        if isinstance(model, str | os.PathLike):
            name = os.fspath(model)
            raise UserError(
                f"expected a TalkingHead, got the name {name}: load it with "
                f"TalkingHead.from_pretrained({name!r})"
            )
        self.model, self.num_avatars = model, num_avatars
        own_length: int = model.transformer.cache_options.chunk_length
        self._open_batch: dict[str, Any] = {"options": options, **sampling}
        if chunk_length is not None and chunk_length != own_length:
            if "chunk_length" not in inspect.signature(model.open_batch).parameters:
                raise UserError(
                    f"expected chunk_length {own_length}, the only one that this model offers, "
                    f"got {chunk_length}: "
                    "leave it out"
                )
            self._open_batch["chunk_length"] = chunk_length
        self.chunk_frames = TEMPORAL_RATIO * (chunk_length or own_length)
        self.lookahead_frames: int = model.speech_encoder.lookahead_frames
        self._batch: Any = None
        self._starting: asyncio.Task[None] | None = None
        self._rows: dict[int, _Row] = {}
        self._jobs: list[_Job] = []
        self._calls: list[tuple[Callable[[], Any], asyncio.Future[Any]]] = []
        self._worker = ThreadPoolExecutor(1, "avatar-model")
        self._pump: asyncio.Task[None] | None = None
        self.warm_up_ms: list[float] = []
        self._is_closed = False

    # -- life -------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take the memory and warm up; returns when the first avatar can be opened. Further calls
        do nothing.

        Raises:
            UserError: not enough memory, or the pool is closed.
        """
        self._check_open()
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
        await asyncio.shield(self._starting)

    async def _start(self) -> None:
        if self._batch is None:
            await self._in_worker(self._warm_up)

    def warm_up(self) -> None:
        """The same as :meth:`start`, for callers that have no event loop yet.

        Raises:
            UserError: not enough memory, or the pool is closed.
        """
        self._check_open()
        self._worker.submit(self._warm_up).result()

    async def aclose(self) -> None:
        """End the thread; avatars that are still open end with a ModelError. A second call does
        nothing.
        """
        if self._is_closed:
            return
        self._is_closed = True
        if self._starting is not None:
            await asyncio.wait({self._starting})
        if self._pump is not None:
            await asyncio.wait({self._pump})
        if self._batch is not None:
            await self._in_worker(self._batch.close)
        self._worker.shutdown(wait=False)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def _check_open(self) -> None:
        if self._is_closed:
            raise UserError("expected an open pool of avatars, got a closed one: make a new one")

    def report(self) -> StreamReport:
        """What the model's chunks have cost since the pool was warm, of all avatars together.

        A chunk in it is one step. It counts frames that were computed, shown or not.

        Raises:
            UserError: the pool has not been started.
        """
        if self._batch is None:
            raise UserError("expected a started pool, got one that is not: await start() first")
        report: StreamReport = self._batch.report()
        return report

    # -- for avatars ------------------------------------------------------------------------------

    @property
    def is_closed(self) -> bool:
        """Whether :meth:`aclose` was called."""
        return self._is_closed

    @property
    def num_free(self) -> int:
        """Avatars that can still be opened."""
        return self.num_avatars - len(self._rows)

    def turnaround_s(self, row: int) -> float:
        """Seconds that the next chunk of a row will take, from its order on: the second largest of
        the last few.
        """
        seconds = sorted(self._rows[row].turnarounds_s)
        return seconds[-2] if len(seconds) > 1 else max([self._warm_s, *seconds])

    def turnarounds_s(self, row: int) -> tuple[float, ...]:
        """Seconds from order to frames of a row's last chunks, oldest first."""
        return tuple(self._rows[row].turnarounds_s)

    async def acquire(self, portrait: Any, seed: int, crop: Any = "auto") -> int:
        """Begin a stream; returns its row.

        Raises:
            UserError: no place, or a portrait that cannot be used.
        """
        await self.start()
        free = [row for row in range(self.num_avatars) if row not in self._rows]
        if not free:
            raise UserError(
                f"expected a place for one more avatar, got {self.num_avatars} of "
                f"{self.num_avatars} taken: "
                "close one, or make the pool larger"
            )
        row = free[0]
        self._rows[row] = _Row()
        try:
            reference = await self.load(portrait, crop)
            await self._call(lambda: self._batch.start(row, reference, seed=seed))
        except BaseException:
            del self._rows[row]
            raise
        return row

    async def load(self, portrait: Any, crop: Any = "auto") -> Any:
        """A portrait as a tensor (3, H, W) in [-1, 1], read in a thread; a tensor is taken as it
        is.

        Raises:
            UserError: an image that cannot be used.
        """
        import torch

        if isinstance(portrait, torch.Tensor):
            return portrait
        from rest_lightning.media.portrait import load_portrait

        return await asyncio.to_thread(load_portrait, portrait, self.model.size_px, crop)

    def submit(self, row: int, order: Order) -> asyncio.Future[Frames | None]:
        """Give an order; the future has its frames (n, H, W, 3), None when it was void.

        The future raises ModelError when the model fails in this row, or when the pool closes.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Frames | None] = loop.create_future()
        if self._is_closed:
            done.set_exception(ModelError("the pool of this avatar has been closed"))
            return done
        self._jobs.append(_Job(row, order, done, loop.time()))
        self._wake()
        return done

    async def release(self, row: int) -> None:
        """Give a row back."""
        if self._rows.pop(row, None) is None:
            return
        for job in [job for job in self._jobs if job.row == row]:
            self._jobs.remove(job)
            job.done.cancel()
        if not self._is_closed:
            await self._call(lambda: self._batch.stop(row) if row in self._batch.rows else None)

    async def _call(self, call: Callable[[], _Result]) -> _Result:
        """Run something in the model's thread, before its next step."""
        future: asyncio.Future[_Result] = asyncio.get_running_loop().create_future()
        self._calls.append((call, future))
        self._wake()
        return await asyncio.shield(future)

    # -- the model's thread -----------------------------------------------------------------------

    def _wake(self) -> None:
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._run())

    async def _run(self) -> None:
        """Let the model work as long as there is anything to do."""
        loop = asyncio.get_running_loop()
        while self._jobs or self._calls:
            calls, self._calls = self._calls, []
            for call, future in calls:
                try:
                    result = await self._in_worker(call)
                except Exception as error:
                    if not future.done():
                        future.set_exception(error)
                        future.exception()  # whoever waited may have gone
                else:
                    if not future.done():
                        future.set_result(result)
            jobs, self._jobs = self._jobs, []
            if not jobs:
                continue
            results = await self._in_worker(partial(self._compute, jobs))
            now_s = loop.time()
            for job, result in zip(jobs, results, strict=True):
                if job.done.done():
                    continue
                if isinstance(result, Exception):
                    job.done.set_exception(result)
                    continue
                if result is not None and job.row in self._rows:
                    row = self._rows[job.row]
                    # Its own chunk before this one does not count: that is waited for by
                    # interruptions alone.
                    row.turnarounds_s.append(now_s - max(job.asked_s, row.done_s))
                    row.done_s = now_s
                job.done.set_result(result)

    async def _in_worker(self, call: Callable[[], _Result]) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._worker, call)

    @property
    def _warm_s(self) -> float:
        """Seconds that a chunk of all avatars took, as far as that was in real time."""
        return min(self.warm_up_ms[-1] / 1e3, self.chunk_frames / FPS)

    def _warm_up(self) -> None:
        """Open the batch and compute chunks of 1, 2, ... rows."""
        import torch

        batch = self.model.open_batch(self.num_avatars, **self._open_batch)
        portrait = torch.zeros(3, self.model.size_px, self.model.size_px)
        chunk, ahead = (
            SAMPLES_PER_FRAME * count for count in (self.chunk_frames, self.lookahead_frames)
        )
        took_ms = 0.0
        for num_rows in range(1, self.num_avatars + 1):
            for row in range(num_rows):
                batch.start(row, portrait)
            for count in (chunk + ahead, chunk, chunk):
                for row in range(num_rows):
                    batch.push(row, np.zeros(count, np.float32))
                start_s = time.perf_counter()
                batch.step()
                took_ms = 1e3 * (time.perf_counter() - start_s)
            self.warm_up_ms.append(took_ms)
            for row in range(num_rows):
                batch.stop(row)
        batch.clock.start()  # reports leave the warm-up out
        self._batch = batch

    def _compute(self, jobs: list[_Job]) -> list[Frames | Exception | None]:
        """All jobs in their order; what belongs to different rows is computed together."""
        results: list[Frames | Exception | None] = [None] * len(jobs)
        together: dict[int, int] = {}  # row: place of its job
        for place, job in enumerate(jobs):
            if job.row in together:
                self._step(jobs, together, results)
            try:
                self._prepare(job)
                if not job.order.is_void:
                    self._push(job.row, job.order)
                    together[job.row] = place
            except Exception as error:
                results[place] = _failure(error)
        self._step(jobs, together, results)
        return results

    def _prepare(self, job: _Job) -> None:
        order, row = job.order, job.row
        if order.restore is not None:
            self._batch.restore_row(row, order.restore.state)
        order.mark.state = self._batch.snapshot_row(row)
        if order.identity is not None:
            self._batch.switch_identity(row, order.identity.portrait)

    def _push(self, row: int, order: Order) -> None:
        if order.is_amended and order.num_carried:
            self._batch.amend(row, order.samples[: order.num_carried])
        self._batch.push(row, order.samples[order.num_carried :])

    def _step(
        self, jobs: list[_Job], together: dict[int, int], results: list[Frames | Exception | None]
    ) -> None:
        if not together:
            return
        start_s = time.perf_counter()
        try:
            frames = self._batch.step()
        except Exception:
            # Nobody knows what the rows hold by now: all of them go back before the first is tried
            # alone.
            frames = {}
            for row, place in together.items():
                self._batch.restore_row(row, jobs[place].order.mark.state)
            for row, place in together.items():
                results[place] = self._alone(row, jobs[place])
        for row, computed in frames.items():
            if row in together:
                results[together[row]] = computed
                _note(jobs[together[row]], start_s, len(frames))
        for place in together.values():
            if results[place] is None:
                results[place] = ModelError("expected frames of the model, got none: this is a bug")
        together.clear()

    def _alone(self, row: int, job: _Job) -> Frames | Exception:
        """After a step that failed: one row from its state before."""
        order, start_s = job.order, time.perf_counter()
        try:
            if order.identity is not None:
                self._batch.switch_identity(row, order.identity.portrait)
            self._push(row, order)
            frames: Frames = self._batch.step()[row]
            _note(job, start_s, 1)
            return frames
        except Exception as error:
            if row in self._batch.rows:
                self._batch.stop(row)
            return _failure(error)


def _note(job: _Job, start_s: float, num_rows: int) -> None:
    """Write down how long a step took."""
    compute_ms, queued_ms = 1e3 * (time.perf_counter() - start_s), 1e3 * (start_s - job.posted_s)
    job.order.computed = Computed(compute_ms, queued_ms, num_rows)


def _failure(error: Exception) -> ModelError:
    said = " ".join(str(error).split())
    failure = ModelError(
        f"the model failed for this avatar ({type(error).__name__}: {said}): open a new one"
    )
    failure.__cause__ = error
    return failure
