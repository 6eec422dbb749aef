"""Chunks under way: order, hand-out and snapshots, with a decoder in a thread of its own; on CUDA
the real thing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rest_lightning.streaming.engine import GRAPHS_VARIABLE, EngineOptions
from rest_lightning.streaming.session import StreamingSession
from rest_lightning.talking_head import TalkingHead


def portrait(seed: int = 0) -> torch.Tensor:
    return torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def speech(num_frames: float, seed: int = 1) -> np.ndarray:
    return (
        np.random.default_rng(seed).normal(scale=0.2, size=int(num_frames * 640)).astype(np.float32)
    )


class Worker:
    """What `overlap.Device` does with a CUDA stream, with a thread: decoding goes on while the next
    chunk is launched.

    ``gate`` holds decoding back, so that a test decides when frames arrive.
    """

    depth = 1

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1)
        self.gate = threading.Event()
        self.gate.set()
        self.num_launched = 0

    def launch(
        self,
        take: Callable[[], object],
        decode: Callable[[], None],
        frames: Tensor,
        num_frames: int,
        finite: Tensor,
    ) -> Any:
        self.num_launched += 1

        def work(function: Callable[[], Any]) -> Any:
            with torch.inference_mode():
                return function()

        def decoded() -> tuple[np.ndarray, np.ndarray]:
            self.gate.wait(10)
            decode()
            return frames[:, :num_frames].numpy().copy(), finite.numpy().copy()

        self.pool.submit(work, take).result()
        return InThread(self.pool.submit(work, decoded))

    def join(self) -> None:
        self.pool.submit(lambda: None).result()


class InThread:
    def __init__(self, future: Future[tuple[np.ndarray, np.ndarray]]) -> None:
        self.future = future

    @property
    def is_ready(self) -> bool:
        return self.future.done()

    def frames(self) -> np.ndarray:
        return self.future.result(10)[0]

    @property
    def finite(self) -> np.ndarray:
        return self.future.result(10)[1]


def open_overlapped(head: TalkingHead) -> tuple[StreamingSession, Worker]:
    session, worker = head.open(portrait()), Worker()
    session.engine._way, session.engine.depth = worker, worker.depth  # type: ignore[assignment]
    return session, worker


@pytest.mark.parametrize("cuts", [[], [1], [20_000, 21_000], list(range(5000, 80_000, 5000))])
def test_chunks_come_in_order_however_they_are_decoded(head: TalkingHead, cuts: list[int]) -> None:
    samples = speech(130.5)
    plain = head.open(portrait())
    expected = np.concatenate([plain.push(samples), plain.flush()])
    session, _ = open_overlapped(head)
    assert np.array_equal(np.concatenate(list(session.stream(np.split(samples, cuts)))), expected)
    session, _ = open_overlapped(head)
    parts = [session.push(block) for block in np.split(samples, cuts)]
    assert session.num_frames == len(np.concatenate(parts))  # a push holds nothing back
    assert np.array_equal(np.concatenate([*parts, session.flush()]), expected)
    report = session.report()
    assert report.num_frames == 131 and report.chunk_ms["count"] == 6


def test_the_next_chunk_is_launched_before_the_last_is_fetched(
    head: TalkingHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a busy machine is no live source
    monkeypatch.setattr("rest_lightning.streaming.session._LIVE_S", 60.0)
    # what is decoded early would be handed out early
    monkeypatch.setattr(InThread, "is_ready", False)
    session, worker = open_overlapped(head)
    launched = []
    for frames in session.stream([speech(200)]):
        launched.append(worker.num_launched)
        assert len(frames) in (24, 8)
    assert launched[:3] == [2, 3, 4] and launched[-1] == 9


def test_a_live_source_gets_its_frames_before_the_next_block(head: TalkingHead) -> None:
    samples, events = speech(74), []

    def live() -> Iterator[np.ndarray]:
        for block in (samples[: 26 * 640], samples[26 * 640 : 50 * 640], samples[50 * 640 :]):
            time.sleep(0.02)
            events.append("block")
            yield block

    session, _ = open_overlapped(head)
    for _ in session.stream(live()):
        events.append("frames")  # noqa: PERF401  # the source appends too
    assert events == ["block", "frames"] * 3 + ["frames"]


def test_a_snapshot_keeps_frames_that_are_under_way(head: TalkingHead) -> None:
    session, worker = open_overlapped(head)
    stream = session.stream([speech(74)])
    first = next(stream)
    assert len(session._under_way) == 1
    worker.gate.clear()
    threading.Timer(0.05, worker.gate.set).start()
    state = session.snapshot()
    assert len(state.waiting) == 1
    rest = np.concatenate(list(stream))
    session.restore(state)
    assert session.num_frames == 24
    again = np.concatenate([session.push(speech(74)[50 * 640 :]), session.flush()])
    assert np.array_equal(again, rest)
    other = head.open(portrait(4))
    other.restore(state)
    assert np.array_equal(np.concatenate([other.push(speech(74)[50 * 640 :]), other.flush()]), rest)
    assert torch.equal(other.reference[0], portrait())
    assert len(first) == 24


# -- on CUDA ---------------------------------------------------------------------------------------


def video(head: TalkingHead, options: EngineOptions, **sampling: Any) -> np.ndarray:
    session = head.open(portrait(), options=options, **sampling)
    parts = list(session.stream([speech(60)]))
    session = head.open(portrait(), options=options, **sampling)
    session.push(speech(26))
    session.switch_identity(portrait(5))
    return np.concatenate([*parts, session.push(speech(60, seed=2)), session.flush()])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "cache_options", [{}, {"reference_attends": "first_chunk"}, {"cache_noise": "per_step"}]
)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_captured_equals_eager_on_cuda(
    make: Callable[..., TalkingHead],
    cache_options: dict[str, Any],
    guidance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head = make(**cache_options).to("cuda")
    eager = video(head, EngineOptions(graphs=False, overlap=False), guidance=guidance)
    for options in (EngineOptions(), EngineOptions(overlap=False), EngineOptions(graphs=False)):
        found = video(head, options, guidance=guidance)
        assert np.abs(found.astype(int) - eager.astype(int)).max() <= 1
    session = head.open(portrait())
    assert session.engine.num_captured >= 3 and session.engine.depth == 1
    monkeypatch.setenv(GRAPHS_VARIABLE, "0")
    session = head.open(portrait())
    session.push(speech(60))
    assert session.engine.num_captured == 0
    assert set(session.report().stage_s) >= {"speech", "dit", "vae"}
    assert all(session.report().stage_s[name] > 0 for name in ("speech", "dit", "vae"))


@pytest.mark.gpu
@pytest.mark.slow
def test_compiled_and_captured_equals_eager_on_cuda(make: Callable[..., TalkingHead]) -> None:
    head = make().to("cuda")
    eager = video(head, EngineOptions(graphs=False, overlap=False))
    compiled = video(head, EngineOptions(compile=True))
    assert np.abs(compiled.astype(int) - eager.astype(int)).max() <= 2


@pytest.mark.gpu
def test_nothing_waits_for_the_device_on_cuda(make: Callable[..., TalkingHead]) -> None:
    session = make().to("cuda").open(portrait(), options=EngineOptions(graphs=False))
    session.push(speech(60))
    session._row.push(speech(24))
    audio, noise, _ = session._row.take()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = session.engine.launch(audio, noise)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert pending.frames().shape == (1, 24, 64, 64, 3)


@pytest.mark.gpu
def test_rows_of_a_batch_on_cuda(make: Callable[..., TalkingHead]) -> None:
    head = make().to("cuda")
    with head.open_batch(2) as batch:
        frames: dict[int, list[np.ndarray]] = {0: [], 1: []}
        for row in range(2):  # row 1 joins when row 0 has had a chunk
            batch.start(row, portrait(row), seed=row)
            batch.push(row, speech(50 + 24 * row, seed=row))
            for computed, part in batch.step().items():
                frames[computed].append(part)
            batch.finish(row)
        while batch.rows:
            for computed, part in batch.step().items():
                frames[computed].append(part)
    for row in range(2):
        session = head.open(portrait(row), seed=row)
        alone = np.concatenate([session.push(speech(50 + 24 * row, seed=row)), session.flush()])
        together = np.concatenate(frames[row])
        assert together.shape == alone.shape
        assert np.abs(together.astype(int) - alone.astype(int)).max() <= 2
