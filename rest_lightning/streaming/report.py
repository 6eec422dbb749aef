"""What a stream cost: seconds per stage, milliseconds per chunk, memory, and on what machine."""

from __future__ import annotations

import json
import math
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rest_lightning.constants import FPS
from rest_lightning.errors import UserError
from rest_lightning.machine import commit, hardware, peak_memory_mb, versions
from rest_lightning.media.files import whole_file

if TYPE_CHECKING:
    from rich.table import Table

STAGES = ("speech", "dit", "vae", "writing")
_TITLES = {"speech": "speech encoder", "dit": "DiT", "vae": "VAE decoder", "writing": "writing"}


class Distribution:
    """Quantiles of any number of durations in bounded memory.

    Exact up to ``num_exact`` values; beyond that from a histogram with logarithmic bins, within 0.5
    %.
    """

    _BINS_PER_E = 100.0

    def __init__(self, num_exact: int = 10_000) -> None:
        self.num_exact = num_exact
        self.count = 0
        self.total = 0.0
        self.maximum = 0.0
        self._values: list[float] = []
        self._bins: dict[int, int] = {}

    def add(self, value: float) -> None:
        """Counts one non-negative value."""
        self.count += 1
        self.total += value
        self.maximum = max(self.maximum, value)
        if self.count <= self.num_exact:
            self._values.append(value)
        bin_index = round(math.log(max(value, 1e-6)) * self._BINS_PER_E)
        self._bins[bin_index] = self._bins.get(bin_index, 0) + 1

    def quantile(self, q: float) -> float | None:
        """The value below which a share ``q`` in [0, 1] lies (numpy's linear rule while exact);
        None when empty.
        """
        if not self.count:
            return None
        if self.count <= self.num_exact:
            return float(np.quantile(self._values, q))
        rank, seen = q * (self.count - 1), 0
        for bin_index in sorted(self._bins):
            seen += self._bins[bin_index]
            if seen > rank:
                return math.exp(bin_index / self._BINS_PER_E)
        return self.maximum

    def summary(self) -> dict[str, float | int | None]:
        """Count, mean, p50, p95, p99 and the maximum."""
        quantiles = {f"p{q}": _rounded(self.quantile(q / 100)) for q in (50, 95, 99)}
        mean = self.total / self.count if self.count else None
        return {
            "count": self.count,
            "mean": _rounded(mean),
            **quantiles,
            "max": _rounded(self.maximum),
        }


def unlabelled(name: str) -> AbstractContextManager[object]:
    """No context around a stage."""
    return nullcontext()


class StreamClock:
    """Times one stream. The session holds it, and everybody who works for the stream adds a stage
    to it.

    The wall clock starts when the clock is made (when a session is opened); so does the time to the
    first frame. Stages of a device are timed by events, which are read when their chunk is closed
    or a report is made: the loop never waits for them. Where a device works on two chunks at once,
    the stages of a chunk add up to more than the chunk took.

    Attributes:
        chunk_ms: compute milliseconds of every chunk: all its stages but writing.
        chunk_stage_ms: the same, per stage.
        label: makes a context around every stage, by its name: for profilers.
    """

    def __init__(self) -> None:
        self._is_paused = False
        self.label: Callable[[str], AbstractContextManager[object]] = unlabelled
        self.start()

    def start(self) -> None:
        """Sets everything to zero and starts the wall clock."""
        self.started_s = time.perf_counter()
        self.stopped_s: float | None = None
        self.first_frame_s: float | None = None
        self.first_input_s: float | None = None
        self.num_frames = 0
        self.chunk_ms = Distribution()
        self.chunk_stage_ms: dict[str, Distribution] = {
            name: Distribution() for name in STAGES if name != "writing"
        }
        self._stage_s: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self._since_chunk_s: dict[str, float] = {}
        self._unread: deque[tuple[str, Any, Any]] = deque()
        self._num_stages = self._num_read = 0

    @contextmanager
    def stage(self, name: str, event: Callable[[], Any] | None = None) -> Iterator[None]:
        """Charges the block to a stage; any name may be used beside the four of ``STAGES``. Stages
        do not nest.

        Args:
            name: of the stage.
            event: makes moments on the time line of the device that works in this block, as
                ``torch.cuda.Event(enable_timing=True)`` does; None charges the host's time.
        """
        if self._is_paused:
            yield
            return
        if event is not None:
            begin, end = event(), event()
            begin.record()
            try:
                with self.label(name):
                    yield
            finally:
                end.record()
                self._unread.append((name, begin, end))
                self._num_stages += 1
            return
        begin_s = time.perf_counter()
        try:
            with self.label(name):
                yield
        finally:
            self.add(name, time.perf_counter() - begin_s)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Charges nothing for what happens in the block (warming up)."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def add(self, name: str, seconds: float) -> None:
        """Charges ``seconds`` to a stage."""
        self._stage_s[name] = self._stage_s.get(name, 0.0) + seconds
        if name != "writing":
            self._since_chunk_s[name] = self._since_chunk_s.get(name, 0.0) + seconds

    def mark(self) -> int:
        """The place between two chunks on the device's time line: hand it to :meth:`end_chunk` of
        the earlier one.
        """
        return self._num_stages

    def input_complete(self) -> None:
        """The last sample that the first frame needs has arrived; later calls do nothing."""
        if self.first_input_s is None:
            self.first_input_s = time.perf_counter()

    def end_chunk(self, num_frames: int, mark: int | None = None) -> float:
        """Closes a chunk of ``num_frames`` frames that are ready to be shown; returns its compute
        time in ms.

        Args:
            num_frames: of the chunk.
            mark: end of its stages, where the next chunk's were begun before it was ready.
        """
        if num_frames and self.first_frame_s is None:
            self.first_frame_s = time.perf_counter()
        self._read(self._num_stages if mark is None else mark)
        compute_ms = 1000.0 * sum(self._since_chunk_s.values())
        self.chunk_ms.add(compute_ms)
        for name, seconds in self._since_chunk_s.items():
            self.chunk_stage_ms.setdefault(name, Distribution()).add(1000.0 * seconds)
        self._since_chunk_s.clear()
        self.num_frames += num_frames
        return compute_ms

    def _read(self, until: int) -> None:
        """Charges the device's stages up to a mark; those of a chunk that is ready are over:
        nothing is waited for.
        """
        while self._unread and self._num_read < until:
            name, begin, end = self._unread.popleft()
            self._num_read += 1
            end.synchronize()
            self.add(name, begin.elapsed_time(end) / 1000.0)

    @property
    def stage_s(self) -> dict[str, float]:
        """Seconds per stage so far; waits for stages that a device has not finished."""
        self._read(self._num_stages)
        return dict(self._stage_s)

    def stop(self) -> None:
        """Stops the wall clock; a report asked for before this counts up to now."""
        self.stopped_s = time.perf_counter()

    @property
    def wall_s(self) -> float:
        """Seconds from the start to the stop, or to now."""
        return (self.stopped_s or time.perf_counter()) - self.started_s

    @property
    def time_to_first_frame_ms(self) -> float | None:
        """Milliseconds from the start until the first frame was ready; None before it."""
        return (
            None if self.first_frame_s is None else 1000.0 * (self.first_frame_s - self.started_s)
        )

    @property
    def first_frame_compute_ms(self) -> float | None:
        """Milliseconds from the arrival of the last sample that the first frame needs until it was
        ready.
        """
        if self.first_frame_s is None or self.first_input_s is None:
            return None
        return 1000.0 * (self.first_frame_s - self.first_input_s)

    def report(self, configuration: dict[str, Any] | None = None) -> StreamReport:
        """Returns the numbers so far, with the machine and the versions."""
        return StreamReport(
            num_frames=self.num_frames,
            wall_s=self.wall_s,
            time_to_first_frame_ms=self.time_to_first_frame_ms,
            first_frame_compute_ms=self.first_frame_compute_ms,
            chunk_ms=self.chunk_ms.summary(),
            chunk_stage_ms={
                name: each.summary() for name, each in self.chunk_stage_ms.items() if each.count
            },
            stage_s=self.stage_s,
            peak_memory_mb=peak_memory_mb(),
            configuration=dict(configuration or {}),
        )


@dataclass
class StreamReport:
    """The numbers of one stream; :meth:`to_dict` is what is written as JSON.

    Attributes:
        num_frames: frames that came out.
        wall_s: seconds from opening the session to the end, everything included.
        time_to_first_frame_ms: from opening the session to the first frame.
        first_frame_compute_ms: from the arrival of the last sample that the first frame needs to
            that frame.
        chunk_ms: count, mean, p50, p95, p99, max of the compute time per chunk.
        chunk_stage_ms: the same per stage.
        stage_s: seconds per stage in all; what is missing to ``wall_s`` was reading and waiting.
        peak_memory_mb: the largest resident memory of the process so far.
        configuration: what the caller wants to remember (model, steps, guidance, ...).
    """

    num_frames: int
    wall_s: float
    time_to_first_frame_ms: float | None
    chunk_ms: dict[str, float | int | None]
    chunk_stage_ms: dict[str, dict[str, float | int | None]]
    stage_s: dict[str, float]
    peak_memory_mb: float
    first_frame_compute_ms: float | None = None
    fps: int = FPS
    configuration: dict[str, Any] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=lambda: hardware())
    versions: dict[str, str] = field(default_factory=lambda: versions())
    commit: str | None = field(default_factory=lambda: commit())

    @property
    def video_s(self) -> float:
        """Seconds of video."""
        return self.num_frames / self.fps

    @property
    def frames_per_second(self) -> float:
        """Frames by seconds, end to end."""
        return self.num_frames / self.wall_s if self.wall_s > 0 else 0.0

    @property
    def real_time_factor(self) -> float:
        """How many times faster than the video plays."""
        return self.frames_per_second / self.fps

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, ready for JSON."""
        return {
            "num_frames": self.num_frames,
            "video_s": round(self.video_s, 3),
            "wall_s": round(self.wall_s, 3),
            "frames_per_second": round(self.frames_per_second, 2),
            "real_time_factor": round(self.real_time_factor, 3),
            "time_to_first_frame_ms": _rounded(self.time_to_first_frame_ms),
            "first_frame_compute_ms": _rounded(self.first_frame_compute_ms),
            "chunk_ms": self.chunk_ms,
            "chunk_stage_ms": self.chunk_stage_ms,
            "stage_s": {name: round(seconds, 3) for name, seconds in self.stage_s.items()},
            "peak_memory_mb": round(self.peak_memory_mb, 1),
            **{
                key: asdict(self)[key]
                for key in ("fps", "configuration", "hardware", "versions", "commit")
            },
        }

    def to_json(self) -> str:
        """Returns :meth:`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON, whole or not at all. Raises a UserError when it cannot be written."""
        with whole_file(path) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")

    def table(self, title: str = "stream") -> Table:
        """Returns the numbers for people, as a rich table."""
        from rich.table import Table

        table = Table(title=title, title_justify="left", show_header=False)
        table.add_column(style="dim")
        table.add_column(justify="right", style="bold")
        table.add_column(style="dim")
        rows: list[tuple[str, str, str]] = [
            ("frames", f"{self.num_frames:,}", f"{self.video_s:.2f} s of video at {self.fps} fps"),
            (
                "end to end",
                (f"{self.frames_per_second:.1f} fps"),
                f"{self.real_time_factor:.2f} x real time",
            ),
            ("time to first frame", _ms(self.time_to_first_frame_ms), "from opening the portrait"),
            ("computing it", _ms(self.first_frame_compute_ms), "from the last sample it needs"),
        ]
        notes = {"p50": f"{self.chunk_ms['count']:,} chunks", "p95": "", "p99": "", "max": ""}
        rows += [
            (f"per chunk, {key}", _ms(self.chunk_ms[key]), note) for key, note in notes.items()
        ]
        table.add_section()
        for row in rows:
            table.add_row(*row)
        table.add_section()
        other_s = max(0.0, self.wall_s - sum(self.stage_s.values()))
        for name, seconds in {**self.stage_s, "reading and waiting": other_s}.items():
            share = seconds / self.wall_s if self.wall_s > 0 else 0.0
            table.add_row(
                _TITLES.get(name, name),
                f"{seconds:.2f} s",
                (f"{'█' * round(20 * share)} {share:.0%}").strip(),
            )
        table.add_section()
        table.add_row(
            "peak memory",
            (f"{self.peak_memory_mb:,.0f} MB"),
            str(self.hardware.get("processor", "")),
        )
        return table


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _ms(value: float | int | None) -> str:
    return "-" if value is None else f"{value:,.1f} ms"


# -- profile ---------------------------------------------------------------------------------------
# Where a chunk's time goes: torch's profiler over a few chunks of a stream, by stage and
# operator.

_STAGE = "stage: "
_OUTSIDE = "outside of stages"
_KERNELS = "kernels on the device"


@dataclass(frozen=True)
class OperatorTime:
    """What one operator cost within one stage, per chunk.

    Attributes:
        stage, operator: names. What runs on an accelerator stands by itself, under ``kernels on the
            device``: a captured graph is launched as one, and no operator has the time of its
            kernels.
        calls: per chunk.
        cpu_ms, device_ms: in the operator itself, without the operators that it calls; device_ms is
            that of kernels alone.
    """

    stage: str
    operator: str
    calls: float
    cpu_ms: float
    device_ms: float


class ChunkProfiler:
    """Profiles ``num_chunks`` chunks after ``num_warmup`` others, and writes a Chrome trace when it
    is done.

    A stream that is too short for all of them gives what it has; one that ends within the warm-up
    is an error, raised on leaving the context. Profiling slows the chunks that it watches down:
    their share of the time is what to read.

    Args:
        clock: of the session; its stages appear in the trace.
        path: JSON for chrome://tracing or Perfetto; None profiles nothing.

    Raises:
        UserError: too short a stream, or a trace that cannot be written.
    """

    def __init__(
        self,
        clock: StreamClock,
        path: str | os.PathLike[str] | None,
        num_warmup: int = 2,
        num_chunks: int = 3,
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
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()
        if kind is None and self.path is not None and not self.num_profiled:
            raise UserError(
                f"expected more than {self.num_warmup} chunks to profile, got {self._seen}: give "
                "it longer speech"
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
        # By the clock, which asks the device: launching a graph takes no time, running it does.
        passed_s = {
            name: total_s - self._before_s.get(name, 0.0)
            for name, total_s in self.clock.stage_s.items()
        }
        self.stage_ms = {name: 1000 * s / count for name, s in passed_s.items() if s > 0}
        rows = [
            OperatorTime(*names, *(value / count for value in row)) for names, row in sums.items()
        ]
        self.operators = sorted(rows, key=lambda row: -max(row.cpu_ms, row.device_ms))

    def table(self, num_operators: int = 6) -> Table:
        """Stages with their most expensive operators, as a rich table; times are per chunk."""
        from rich.table import Table

        table = Table(
            title=(f"where the time of a chunk goes ({self.num_profiled} profiled)"),
            title_justify="left",
        )
        for name in ("stage", "operator", "calls", "CPU ms", "device ms", "share"):
            table.add_column(name, justify="left" if name in ("stage", "operator") else "right")
        total = sum(self.stage_ms.values())
        for stage, stage_ms in sorted(self.stage_ms.items(), key=lambda item: -item[1]):
            table.add_section()
            table.add_row(
                stage, "", "", f"{stage_ms:.2f}", "", f"{stage_ms / total:.0%}" if total else ""
            )
            for row in [row for row in self.operators if row.stage == stage][:num_operators]:
                share = f"{row.cpu_ms / total:.0%}" if total else ""
                table.add_row("", row.operator, f"{row.calls:.0f}", f"{row.cpu_ms:.2f}", "", share)
        self._add_kernels(table, 2 * num_operators)
        return table

    def _add_kernels(self, table: Table, num_kernels: int) -> None:
        kernels = [row for row in self.operators if row.stage == _KERNELS]
        device_ms = sum(row.device_ms for row in kernels)
        if not device_ms:
            return
        calls = sum(row.calls for row in kernels)
        table.add_section()
        table.add_row(_KERNELS, "", f"{calls:.0f}", "", f"{device_ms:.2f}", "")
        for row in kernels[:num_kernels]:
            share = f"{row.device_ms / device_ms:.0%}"
            table.add_row(
                "", row.operator[:60], f"{row.calls:.0f}", "", f"{row.device_ms:.2f}", share
            )


def _stage_of(event: Any) -> str:
    while event is not None:
        if event.name.startswith(_STAGE):
            return str(event.name.removeprefix(_STAGE))
        event = event.cpu_parent
    return _OUTSIDE
