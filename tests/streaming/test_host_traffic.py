"""Nothing in the loop waits for the device: only a chunk's own inputs go there from the host."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from no_values import HostTraffic, without_values

from rest_lightning.streaming.engine import ChunkEngine
from rest_lightning.talking_head import TalkingHead


def test_the_watch_sees_what_would_wait() -> None:
    x = torch.empty(3, device="meta")
    with HostTraffic() as traffic:
        x.fill_(2.0).mul_(x + 0.5)
        assert traffic.num_operations == 3 and not traffic.found
        torch.as_tensor(0.5, device="meta")
        x.copy_(torch.zeros(3))
        x[0] = torch.zeros(())
        x.to("meta")
        torch.zeros(3).to("meta")
    assert len(traffic.found) == 4


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_noise": "per_step"},
        {"cache_noise": "clean_pass", "use_sink": False},
        {"positions": "absolute"},
        {"reference_attends": "first_chunk", "first_chunk_slot": "adjacent"},
    ],
    ids=str,
)
def test_chunks_are_computed_without_the_host(
    make: Callable[..., TalkingHead], options: dict[str, Any]
) -> None:
    head = make(**options)
    with without_values(head), torch.inference_mode():
        engine = ChunkEngine(head, 2, head.sampling)
        engine.switch_identity(torch.zeros(2, 3, 64, 64, device="meta"))
        noise = torch.zeros(engine.latent_shape, device="meta")
        speech = torch.zeros(2, 3, 2, 8, device="meta")
        for length in (1, 3, 3, 3):
            with HostTraffic() as traffic:
                engine.denoise(noise[:, :, :length], speech[:, :length])
                engine._decode(length)
            assert traffic.num_operations > 200 and traffic.found == []


def test_rows_of_different_ages_are_masked_without_the_host(
    make: Callable[..., TalkingHead],
) -> None:
    head = make(use_sink=False)
    caches = [head.transformer.new_cache(3, 2, 2, device=device) for device in ("meta", "cpu")]
    for cache in caches:
        for chunk in range(4):
            cache.begin(3)
            with HostTraffic() as traffic:
                cache.commit()
                if chunk == 1:
                    cache.reset_rows([1])
            assert traffic.found == []
        cache.reset_rows([2])
    n, hidden = 4, caches[1].mask[:, 0, 0].isinf()
    assert caches[1].window_mask is not None
    assert (
        hidden[0, 3 * n : 4 * n].all() and not hidden[0, : 3 * n].any()
    )  # the sink, after the first chunk
    assert hidden[2, : 3 * n].all() and not hidden[2, 3 * n :].any()  # anew: no previous chunk


@pytest.mark.parametrize("scenario", ["Backbone", "CacheOrRecompute"])
def test_scenarios_measure_without_the_host(
    make: Callable[..., TalkingHead],
    scenario: str,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(repository))
    scenarios = importlib.import_module("benchmarks._scenarios")
    module = (
        importlib.import_module("benchmarks._device_scenarios")
        if scenario == "Backbone"
        else scenarios
    )
    head = make()
    calls: dict[str, Callable[[], Any]] = {}

    def keep(self: Any, given: dict[str, Callable[[], Any]], repeats: int) -> Any:
        calls.update(given)
        return {name: {"p50": 1.0} for name in given}

    monkeypatch.setattr(scenarios.Bench, "alternate", keep)
    arguments = {"matmul_size": 8} if scenario == "Backbone" else {}
    with without_values(head), torch.inference_mode():
        getattr(module, scenario)(repeats=1, **arguments).run(scenarios.Bench(head, "tiny", "meta"))
        for name, call in calls.items():
            with HostTraffic() as traffic:
                call()
            assert traffic.found == [], name
            assert traffic.num_operations > 100 or name == "matmul"


def test_moving_the_cache_takes_little_memory_in_between(
    make: Callable[..., TalkingHead], repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(repository))
    live_bytes = importlib.import_module("benchmarks._cost").LiveBytes
    head = make()
    head.transformer.num_layers = 16  # more layers than it has: only the buffers count
    cache = head.transformer.new_cache(2, 4, 4, dtype=torch.bfloat16)
    for _ in range(2):
        cache.begin(3)
        slot_bytes = cache.keys[0, 0, :, :, :48].numel() * 2  # of one layer, in bfloat16
        known = [cache.keys, cache.values, cache.mask, cache.rotation]
        with live_bytes(known) as live:
            cache._move()
        cache.commit()
        # In between: float32 and complex numbers of one layer, and the rotation. All layers at once
        # took 16 times that.
        assert live.peak < 16 * slot_bytes
