"""Devices, streams and errors of captured programs, as far as a machine without a GPU can tell;
on CUDA the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tape import Tape

from rest_lightning.streaming import device as device_module
from rest_lightning.streaming import engine as engine_module
from rest_lightning.streaming.device import Program, cuda_capture, on_device
from rest_lightning.streaming.engine import ChunkEngine, explain_out_of_memory
from rest_lightning.talking_head import TalkingHead


def portrait() -> torch.Tensor:
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


class Driver:
    """Stands in for torch.cuda and records on which stream what happens; there is no CUDA here
    to ask.
    """

    def __init__(self) -> None:
        self.num_streams = self.num_pools = 0
        self.current: Any = "default"
        self.events: list[tuple[str, Any]] = []

    def Stream(self, device: torch.device) -> Any:
        self.num_streams += 1
        return SimpleNamespace(
            name=f"stream {self.num_streams}", device=device, wait_stream=lambda other: None
        )

    def graph_pool_handle(self) -> str:
        self.num_pools += 1
        return f"pool {self.num_pools}"

    def current_stream(self, device: torch.device) -> Any:
        return SimpleNamespace(wait_stream=lambda other: None)

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream.name
        yield
        self.current = before

    def CUDAGraph(self) -> Any:
        return SimpleNamespace(replay=lambda: None)

    @contextmanager
    def graph(self, graph: Any, pool: str, stream: Any, capture_error_mode: str) -> Iterator[None]:
        self.events.append(("capture", (stream.name, pool)))
        with self.stream(stream):
            yield

    def device(self, device: torch.device) -> Any:
        self.events.append(("device", device))
        return nullcontext()


def test_every_program_warms_up_and_captures_on_a_stream_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = Driver()
    monkeypatch.setattr(device_module.torch, "cuda", driver)
    device = torch.device("cuda:1")
    where: dict[str, list[Any]] = {"denoise": [], "decode": []}
    programs = {name: Program(cuda_capture(device)) for name in where}
    for variant in range(2):
        for name, program in programs.items():
            program.run(lambda name=name: where[name].append(driver.current), variant)  # type: ignore[misc]
    assert where == {"denoise": ["stream 1"] * 6, "decode": ["stream 2"] * 6}
    captures = [entry for kind, entry in driver.events if kind == "capture"]
    assert captures == [("stream 1", "pool 1"), ("stream 2", "pool 2")] * 2
    assert [entry for kind, entry in driver.events if kind == "device"] == [device] * 4
    programs["denoise"].again().run(lambda: where["denoise"].append(driver.current), 0)
    assert driver.num_streams == driver.num_pools == 2 and where["denoise"][-1] == "stream 1"


def test_a_device_is_made_the_current_one() -> None:
    context = on_device(torch.device("cuda:1"))
    assert isinstance(context, torch.cuda.device) and context.idx == 1
    assert isinstance(on_device(torch.device("cpu")), nullcontext)


def test_whatever_an_engine_does_it_does_on_its_device(
    make: Callable[..., TalkingHead], monkeypatch: pytest.MonkeyPatch
) -> None:
    depth, entered = 0, 0

    @contextmanager
    def guard(device: torch.device) -> Iterator[None]:
        nonlocal depth, entered
        depth, entered = depth + 1, entered + 1
        yield
        depth -= 1

    monkeypatch.setattr(engine_module, "on_device", guard)
    head = make()
    engine = ChunkEngine(head, 1, head.sampling, capture=Tape())
    assert entered
    audio, noise = torch.zeros(1, engine.window_samples), torch.zeros(engine.latent_shape)
    state: Any = None

    def restore() -> None:
        engine.restore(state)

    operations: list[tuple[Any, str]] = [
        (lambda: engine.start(portrait()), "start"),
        (lambda: engine.launch(audio, noise).frames(), "denoise"),
        (lambda: engine.step(audio, noise), "decode"),
        (lambda: engine.switch_identity(portrait()), "switch_identity"),
        (engine.warm_up, "warm_up"),
        (engine.snapshot, "snapshot"),
        (restore, "restore"),
    ]
    outside: list[Any] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if not depth and function not in (
                torch.ops.aten.zeros.default,
                torch.ops.aten.detach.default,
            ):
                outside.append(function)
            return function(*args, **(kwargs or {}))

    reference = portrait()
    operations[0] = (lambda: engine.start(reference), "start")
    operations[3] = (lambda: engine.switch_identity(reference), "switch_identity")
    for call, name in operations:
        if name == "restore":
            state = engine.snapshot()
        entered = 0
        with Watch():
            call()
        assert entered and not outside, (name, outside)


def test_memory_that_ends_inside_a_capture_is_told(make: Callable[..., TalkingHead]) -> None:
    head = make()
    with (
        pytest.raises(ValueError, match="expected memory on cpu for 1 stream"),
        explain_out_of_memory(head, 1, head.sampling),
    ):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        finally:  # as torch.cuda.graph does on leaving
            raise RuntimeError(
                "CUDA error: operation failed due to a previous error during capture"
            )
    with (
        pytest.raises(RuntimeError, match="misaligned"),
        explain_out_of_memory(head, 1, head.sampling),
    ):
        raise RuntimeError("misaligned address")


@pytest.mark.gpu
def test_programs_that_replay_together_do_not_disturb_each_other_on_cuda() -> None:
    device = torch.device("cuda")
    a, b = (torch.randn(2048, 2048, device=device) for _ in range(2))
    outs = [torch.empty_like(a) for _ in range(2)]
    programs = [Program(cuda_capture(device)) for _ in outs]
    streams = [torch.cuda.Stream(device) for _ in outs]
    wanted = [a @ b, b @ a]

    def product(i: int) -> None:
        torch.matmul(*((a, b) if i == 0 else (b, a)), out=outs[i])

    for _ in range(20):
        for i, program in enumerate(programs):
            streams[i].wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(streams[i]):
                program.run(lambda i=i: product(i), 0)  # type: ignore[misc]
        torch.cuda.synchronize()
        assert all(torch.equal(out, exact) for out, exact in zip(outs, wanted, strict=True))
