"""Where a chunk's time goes: torch's profiler over a few chunks of a stream, by stage and operator."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from rest_lightning.errors import UserError
from rest_lightning.streaming.output import whole_file
from rest_lightning.streaming.report import StreamClock, unlabelled

if TYPE_CHECKING:
    from rich.table import Table

_STAGE = "stage: "
_OUTSIDE = "outside of stages"
_KERNELS = "kernels on the device"


@dataclass(frozen=True)
class OperatorTime:
    """What one operator cost within one stage, per chunk.

    Attributes:
        stage, operator: names. What runs on an accelerator stands by itself, under ``kernels on the device``: a
            captured graph is launched as one, and no operator has the time of its kernels.
        calls: per chunk.
        cpu_ms, device_ms: in the operator itself, without the operators that it calls; device_ms is that of kernels
            alone, and 0 on the CPU.
    """

    stage: str
    operator: str
    calls: float
    cpu_ms: float
    device_ms: float


class ChunkProfiler:
    """Profiles ``num_chunks`` chunks after ``num_warmup`` others, and writes a Chrome trace when it is done.

    A stream that is too short for all of them gives what it has; one that ends within the warm-up is an error, raised
    on leaving the context. Profiling slows the chunks that it watches down: their share of the time is what to read.

    Args:
        clock: of the session; its stages appear in the trace.
        path: JSON for chrome://tracing or Perfetto; None profiles nothing.

    Raises:
        UserError: too short a stream, or a trace that cannot be written.
    """

    def __init__(
        self, clock: StreamClock, path: str | os.PathLike[str] | None, num_warmup: int = 2, num_chunks: int = 3
    ) -> None:
        self.clock, self.path = clock, path
        self.num_warmup, self.num_chunks = num_warmup, num_chunks
        self.operators: list[OperatorTime] = []
        self.stage_ms: dict[str, float] = {}
        self._seen = self.num_profiled = 0
        self._profile: Any = None
        self._before_s: dict[str, float] = {}

    def step(self) -> None:
        """To be called after every chunk."""
        self._seen += 1
        if self.path is None or self._seen > self.num_warmup + self.num_chunks:
            return
        if self._profile is not None:
            self.num_profiled += 1
        if self._seen == self.num_warmup:
            self._start()
        elif self._seen == self.num_warmup + self.num_chunks:
            self._stop()

    def __enter__(self) -> ChunkProfiler:
        if self.path is not None and self.num_warmup == 0:
            self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        if kind is None and self.path is not None and not self.num_profiled:
            raise UserError(
                f"expected more than {self.num_warmup} chunks to profile, got {self._seen}: give it longer speech"
            )

    def _start(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._before_s = self.clock.stage_s
        self.clock.label = lambda name: torch.profiler.record_function(_STAGE + name)
        self._profile = torch.profiler.profile(activities=activities)
        self._profile.start()

    def _stop(self) -> None:
        if self._profile is None:
            return
        profile, self._profile, self.clock.label = self._profile, None, unlabelled
        profile.stop()
        if not self.num_profiled:
            return
        self._sum(profile.events())
        assert self.path is not None
        with whole_file(self.path) as temporary:
            profile.export_chrome_trace(str(temporary))

    def _sum(self, events: Any) -> None:
        sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
        for event in events:
            if event.name.startswith(_STAGE):
                continue
            if event.device_type == torch.autograd.DeviceType.CPU:
                row = sums[_stage_of(event), event.name]
                row[1] += event.self_cpu_time_total / 1000
            else:
                row = sums[_KERNELS, event.name]
                row[2] += event.time_range.elapsed_us() / 1000
            row[0] += 1
        count = self.num_profiled
        # By the clock, which asks the device itself: launching a graph takes no time, and running it does.
        passed = {name: total - self._before_s.get(name, 0.0) for name, total in self.clock.stage_s.items()}
        self.stage_ms = {name: 1000 * seconds / count for name, seconds in passed.items() if seconds > 0}
        rows = [OperatorTime(*names, *(value / count for value in row)) for names, row in sums.items()]
        self.operators = sorted(rows, key=lambda row: -max(row.cpu_ms, row.device_ms))

    def table(self, num_operators: int = 6) -> Table:
        """Stages with their most expensive operators, as a rich table; times are per chunk."""
        from rich.table import Table

        table = Table(title=f"where the time of a chunk goes ({self.num_profiled} profiled)", title_justify="left")
        for name in ("stage", "operator", "calls", "CPU ms", "device ms", "share"):
            table.add_column(name, justify="left" if name in ("stage", "operator") else "right")
        total = sum(self.stage_ms.values())
        for stage, stage_ms in sorted(self.stage_ms.items(), key=lambda item: -item[1]):
            table.add_section()
            table.add_row(stage, "", "", f"{stage_ms:.2f}", "", f"{stage_ms / total:.0%}" if total else "")
            for row in [row for row in self.operators if row.stage == stage][:num_operators]:
                share = f"{row.cpu_ms / total:.0%}" if total else ""
                table.add_row("", row.operator, f"{row.calls:.0f}", f"{row.cpu_ms:.2f}", "", share)
        kernels = [row for row in self.operators if row.stage == _KERNELS]
        if kernels:
            table.add_section()
            device_ms = sum(row.device_ms for row in kernels)
            table.add_row(_KERNELS, "", f"{sum(row.calls for row in kernels):.0f}", "", f"{device_ms:.2f}", "")
        for row in kernels[: 2 * num_operators]:
            share = f"{row.device_ms / device_ms:.0%}" if device_ms else ""
            table.add_row("", row.operator[:60], f"{row.calls:.0f}", "", f"{row.device_ms:.2f}", share)
        return table


def _stage_of(event: Any) -> str:
    while event is not None:
        if event.name.startswith(_STAGE):
            return str(event.name.removeprefix(_STAGE))
        event = event.cpu_parent
    return _OUTSIDE
