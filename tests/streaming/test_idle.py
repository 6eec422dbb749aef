"""Closed sessions leave their engines to later ones: the same frames, and nothing captured anew."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from tape import Tape

from rest_lightning.streaming import engine as engine_module
from rest_lightning.streaming.engine import EngineOptions
from rest_lightning.streaming.idle import IDLE, MOST_IDLE, IdleEngines
from rest_lightning.streaming.report import StreamClock
from rest_lightning.talking_head import TalkingHead


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tape]:
    """Sessions on the CPU capture as on CUDA."""
    tape = Tape()
    monkeypatch.setattr(EngineOptions, "captures", lambda self, device: True)
    monkeypatch.setattr(engine_module, "cuda_capture", lambda device: tape.capture)
    IDLE.clear()
    yield tape
    IDLE.clear()


def portrait(seed: int = 0) -> torch.Tensor:
    return torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def speech(num_frames: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=0.2, size=num_frames * 640).astype(np.float32)


def test_the_next_session_takes_the_engine_and_shows_the_same(
    make: Callable[..., TalkingHead], tape: Tape
) -> None:
    head, fresh = make(), make()
    with head.open(portrait(4), seed=3) as first:
        first.push(speech(60, seed=5))  # frames under way, speech left over: nothing of it may show
        first.switch_identity(portrait(6))
    engine, num_captured = first.engine, tape.num_captured
    assert num_captured >= 3 and IDLE.num_idle(head) == 1
    with head.open(portrait()) as second:
        assert second.engine is engine and IDLE.num_idle(head) == 0
        found = np.concatenate([second.push(speech(80)), second.flush()])
        report = second.report()
    assert tape.num_captured == num_captured
    assert (
        report.num_frames == 80
        and report.chunk_ms["count"] == 4
        and first.report().num_frames == 48
    )
    with fresh.open(portrait(), options=EngineOptions(reuse=False)) as alone:
        assert np.array_equal(found, np.concatenate([alone.push(speech(80)), alone.flush()]))
    assert IDLE.num_idle(fresh) == 0


def test_what_is_not_alike_is_not_taken(make: Callable[..., TalkingHead], tape: Tape) -> None:
    head = make()
    with head.open(portrait()) as session:
        engine = session.engine
    for arguments in ({"guidance": 3.0}, {"options": EngineOptions(first_chunk_length=1)}):
        with head.open(portrait(), **arguments) as other:  # type: ignore[arg-type]
            assert other.engine is not engine
    with head.open(portrait()) as one, head.open(portrait()) as two:
        assert one.engine is not two.engine
    assert IDLE.num_idle(head) == MOST_IDLE  # not all that were closed
    with torch.no_grad():
        next(head.transformer.parameters()).mul_(2)
    kept = [weakref.ref(entry[1]) for entry in IDLE._idle[head]]
    del engine, session, other, one, two
    with head.open(portrait()):  # captured graphs know the weights as they were
        assert IDLE.num_idle(head) == 0 and not any(reference() for reference in kept)


def test_an_engine_that_failed_is_not_kept(make: Callable[..., TalkingHead], tape: Tape) -> None:
    head = make()
    with pytest.raises(RuntimeError, match="lost"), head.open(portrait()):
        raise RuntimeError("lost")
    assert IDLE.num_idle(head) == 0


def test_idle_engines_go_with_their_model(make: Callable[..., TalkingHead], tape: Tape) -> None:
    head = make()
    with head.open(portrait(), options=EngineOptions(pack=False)) as session:
        session.push(speech(30))
    keys, weight = weakref.ref(session.engine.cache.keys), weakref.ref(next(head.parameters()))
    gc.collect()
    gc.disable()
    try:
        del session
        assert keys() is not None and IDLE.num_idle(head) == 1
        del head
        assert keys() is None and weight() is None
    finally:
        gc.enable()


def test_idle_engines_make_room_where_memory_ends(
    make: Callable[..., TalkingHead], tape: Tape, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, idle = make(), IdleEngines()
    options = EngineOptions(pack=False)
    engine = idle.open(head, head.sampling, StreamClock(), options)
    idle.close(engine)
    original = engine_module.ChunkEngine._allocate

    def allocate(self: engine_module.ChunkEngine) -> tuple[torch.Tensor, ...]:
        if idle.num_idle(head):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self)

    monkeypatch.setattr(engine_module.ChunkEngine, "_allocate", allocate)
    other = idle.open(
        head, head.sampling, StreamClock(), EngineOptions(pack=False, first_chunk_length=1)
    )
    assert other is not engine and idle.num_idle(head) == 0

    def never(self: engine_module.ChunkEngine) -> tuple[torch.Tensor, ...]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine_module.ChunkEngine, "_allocate", never)
    with pytest.raises(ValueError, match="got out of memory: lower"):
        idle.open(head, head.sampling, StreamClock(), options)


def test_a_closed_session_refuses_what_its_engine_would_do(
    make: Callable[..., TalkingHead],
) -> None:
    with make().open(portrait()) as session:
        session.push(speech(30))
        state = session.snapshot()
    calls = (
        session.snapshot,
        lambda: session.restore(state),
        lambda: session.switch_identity(portrait(2)),
    )
    for call in calls:
        with pytest.raises(ValueError, match="expected an open session, got one that is closed"):
            call()
    assert session.report().num_frames == 24 and session.num_frames == 24
    assert EngineOptions(reuse=True).reuses(torch.device("cpu")) and not EngineOptions().reuses(
        torch.device("cpu")
    )
    assert EngineOptions().reuses(torch.device("cuda")) and not EngineOptions(reuse=False).reuses(
        torch.device("cuda")
    )
