"""What a session that is over leaves behind: nothing that would wait for the garbage collector."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rest_lightning.streaming.engine import ChunkEngine, EngineOptions
from rest_lightning.talking_head import TalkingHead


@pytest.fixture(autouse=True)
def no_collection() -> Iterator[None]:
    """Reference counts alone decide what lives."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def portrait() -> torch.Tensor:
    return torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def speech(num_frames: int) -> np.ndarray:
    return np.random.default_rng(1).normal(scale=0.2, size=num_frames * 640).astype(np.float32)


def watched(engine: Any) -> dict[str, Any]:
    """Weak references to what is large."""
    state = engine.state
    tensors = {"keys": state.cache.keys, "values": state.cache.values, "rows": state.reference_rows}
    tensors |= {f"static {i}": tensor for i, tensor in enumerate(engine._static)}
    tensors |= {f"decoder {name}": past for name, past in state.decoder.items()}
    things = {"engine": engine, "state": state, "tables": engine.tables, **tensors}
    return {name: weakref.ref(thing) for name, thing in things.items()}


@pytest.mark.parametrize(
    "options",
    [
        EngineOptions(),
        EngineOptions(pack=False),
        EngineOptions(compile=True),
        EngineOptions(warm_up=True),
    ],
    ids=str,
)
def test_a_session_that_is_let_go_frees_its_memory_at_once(
    make: Callable[..., TalkingHead], options: EngineOptions
) -> None:
    head = make()
    if options.compile:  # its first import keeps the frames that it was called from, in a cycle
        torch.compile(torch.nn.Identity())
        gc.collect()
    session = head.open(portrait(), options=options)
    if not options.compile:  # compiling takes long, and dynamo keeps cycles of its own
        session.push(speech(60))
        session.flush()
        session.restore(session.snapshot())
    found = watched(session.engine)
    assert len(found) > 10 and all(reference() is not None for reference in found.values())
    del session
    assert [name for name, reference in found.items() if reference() is not None] == []


def test_a_batch_that_is_let_go_frees_its_memory_at_once(make: Callable[..., TalkingHead]) -> None:
    head = make()
    batch = head.open_batch(2)
    for row in range(2):
        batch.start(row, portrait())
        batch.push(row, speech(26))
        batch.step()
    found = watched(batch._widest) | {
        f"lane {size}": weakref.ref(engine) for size, engine in batch._lanes.items()
    }
    found |= {
        f"place {row}": weakref.ref(place.cache.keys) for row, place in enumerate(batch._places)
    }
    batch.close()
    del batch
    assert [name for name, reference in found.items() if reference() is not None] == []


def test_a_model_that_is_let_go_is_freed_at_once(make: Callable[..., TalkingHead]) -> None:
    head = make()
    with head.open(portrait(), options=EngineOptions(pack=False)) as session:
        session.push(speech(26))
    weights = [weakref.ref(parameter) for parameter in head.parameters()]
    del head, session
    assert not [reference for reference in weights if reference() is not None]


def test_warming_up_copies_no_state(make: Callable[..., TalkingHead]) -> None:
    """At paper size a copy of the cache would be a gigabyte, beside the cache."""
    head = make()
    engine = ChunkEngine(head, 1, head.sampling, options=EngineOptions(pack=False))
    num_bytes = engine.cache.keys.numel() * engine.cache.keys.element_size()
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if function in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default):
                largest = max(
                    largest, result.numel() * result.element_size() if result.ndim == 6 else 0
                )
            return result

    with Watch():
        engine.warm_up()
    assert largest < num_bytes / 2  # what a chunk moves in its cache
    assert (
        not engine.cache.keys.any()
        and not engine.cache.values.any()
        and engine.cache.num_frames == [0] * 2
    )
    assert not any(past.any() for past in (*engine.speech.values(), *engine.decoder.values()))
