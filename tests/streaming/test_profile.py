"""The profiler's table where graphs are launched as one: stages by the device's own clock,
kernels by themselves.
"""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from rest_lightning.streaming.report import ChunkProfiler, StreamClock

CPU, CUDA = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA


class Moments:
    """Events of a device on which a stage takes as long as it is told."""

    def __init__(self) -> None:
        self.now_ms = 0.0

    def __call__(self) -> Any:
        moment = SimpleNamespace(ms=0.0, synchronize=lambda: None)
        moment.record = lambda: setattr(moment, "ms", self.now_ms)
        moment.elapsed_time = lambda end: end.ms - moment.ms
        return moment


def event(name: str, device: Any, us: float, parent: Any = None) -> Any:
    times = {"cpu_time_total": us, "self_cpu_time_total": us, "self_device_time_total": 0.0}
    span = SimpleNamespace(elapsed_us=lambda: us)
    return SimpleNamespace(
        name=name, device_type=device, cpu_parent=parent, time_range=span, **times
    )


def test_a_launched_graph_is_as_long_as_the_device_works(tmp_path: Path) -> None:
    clock, moments = StreamClock(), Moments()

    def chunk() -> None:
        for name, took_ms in (("dit", 90.0), ("vae", 30.0)):
            with clock.stage(name, moments):
                moments.now_ms += took_ms
        clock.end_chunk(24)

    profiler = ChunkProfiler(clock, tmp_path / "trace.json")
    chunk()
    profiler._start()
    profiler.num_profiled = 2
    for _ in range(2):
        chunk()
    stage = event("stage: dit", CPU, 50.0)
    events = [
        stage,
        event("cudaGraphLaunch", CPU, 40.0, stage),
        event("stage: dit", CUDA, 180_000.0),  # the range, as it stands on the device's time line
        event("flash_fwd_kernel", CUDA, 60_000.0),
        event("flash_fwd_kernel", CUDA, 60_000.0),
        event("nvjet_tst_128x256", CUDA, 100_000.0),
    ]
    profiler._profile.stop()
    profiler._profile = None
    profiler._sum(events)
    assert profiler.stage_ms == pytest.approx({"dit": 90.0, "vae": 30.0})
    rows = {(row.stage, row.operator): row for row in profiler.operators}
    kernel = rows["kernels on the device", "flash_fwd_kernel"]
    assert (kernel.calls, kernel.cpu_ms, kernel.device_ms) == (1.0, 0.0, 60.0)
    assert rows["dit", "cudaGraphLaunch"].cpu_ms == pytest.approx(0.02)
    assert not any(name.startswith("stage: ") for _, name in rows)
    out = io.StringIO()
    Console(file=out, width=160).print(profiler.table())
    text = out.getvalue()
    lines = {line.split("│")[1].strip(): line for line in text.splitlines() if line.count("│") > 3}
    assert "90.00" in lines["dit"] and "75%" in lines["dit"] and "25%" in lines["vae"]
    assert "110.00" in lines["kernels on the device"]
    assert "55%" in next(line for line in text.splitlines() if "flash_fwd_kernel" in line)
