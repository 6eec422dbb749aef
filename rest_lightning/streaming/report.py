"""What a stream cost: seconds per stage, milliseconds per chunk, memory, and on what machine."""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rest_lightning.constants import FPS
from rest_lightning.streaming.output import whole_file

if TYPE_CHECKING:
    from rich.table import Table

STAGES = ("speech", "dit", "vae", "writing")
_TITLES = {"speech": "speech encoder", "dit": "DiT", "vae": "VAE decoder", "writing": "writing"}
_PACKAGES = ("rest_lightning", "torch", "lightning", "diffusers", "transformers", "numpy", "av")


class Distribution:
    """Quantiles of any number of durations in bounded memory.

    Exact up to ``num_exact`` values; beyond that from a histogram with logarithmic bins, within 0.5 %.
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
        """The value below which a share ``q`` in [0, 1] lies (numpy's linear rule while exact); None when empty."""
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
        return {"count": self.count, "mean": _rounded(mean), **quantiles, "max": _rounded(self.maximum)}


class StreamClock:
    """Times one stream. The session holds it, and everybody who works for the stream adds a stage to it.

    The wall clock starts when the clock is made (when a session is opened); so does the time to the first frame.

    Args:
        synchronize: called before a stage begins and before it ends, for example ``torch.cuda.synchronize``: without it
            the stages of an accelerator would be charged to whoever waits first.

    Attributes:
        stage_s: wall seconds per stage.
        chunk_ms: compute milliseconds of every chunk: all stages since the last chunk, but writing.
        chunk_stage_ms: the same, per stage.
        mark: makes a context around every stage, by its name: for profilers.
    """

    def __init__(self, synchronize: Callable[[], object] | None = None) -> None:
        self._synchronize = synchronize
        self.mark: Callable[[str], AbstractContextManager[object]] | None = None
        self.start()

    def start(self) -> None:
        """Sets everything to zero and starts the wall clock."""
        self.started_s = time.perf_counter()
        self.stopped_s: float | None = None
        self.first_frame_s: float | None = None
        self.num_frames = 0
        self.stage_s: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self.chunk_ms = Distribution()
        self.chunk_stage_ms: dict[str, Distribution] = {name: Distribution() for name in STAGES if name != "writing"}
        self._since_chunk_s: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Charges the block to a stage; any name may be used beside the four of ``STAGES``. Stages do not nest."""
        if self._synchronize is not None:
            self._synchronize()
        begin_s = time.perf_counter()
        try:
            with self.mark(name) if self.mark is not None else nullcontext():
                yield
        finally:
            if self._synchronize is not None:
                self._synchronize()
            self.add(name, time.perf_counter() - begin_s)

    def add(self, name: str, seconds: float) -> None:
        """Charges ``seconds`` to a stage."""
        self.stage_s[name] = self.stage_s.get(name, 0.0) + seconds
        if name != "writing":
            self._since_chunk_s[name] = self._since_chunk_s.get(name, 0.0) + seconds

    def end_chunk(self, num_frames: int) -> float:
        """Closes a chunk of ``num_frames`` frames that are ready to be shown; returns its compute time in ms."""
        if num_frames and self.first_frame_s is None:
            self.first_frame_s = time.perf_counter()
        compute_ms = 1000.0 * sum(self._since_chunk_s.values())
        self.chunk_ms.add(compute_ms)
        for name, seconds in self._since_chunk_s.items():
            self.chunk_stage_ms.setdefault(name, Distribution()).add(1000.0 * seconds)
        self._since_chunk_s.clear()
        self.num_frames += num_frames
        return compute_ms

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
        return None if self.first_frame_s is None else 1000.0 * (self.first_frame_s - self.started_s)

    def report(self, configuration: dict[str, Any] | None = None) -> StreamReport:
        """The numbers so far, with the machine and the versions."""
        return StreamReport(
            num_frames=self.num_frames,
            wall_s=self.wall_s,
            time_to_first_frame_ms=self.time_to_first_frame_ms,
            chunk_ms=self.chunk_ms.summary(),
            chunk_stage_ms={name: each.summary() for name, each in self.chunk_stage_ms.items() if each.count},
            stage_s=dict(self.stage_s),
            peak_memory_mb=peak_memory_mb(),
            configuration=dict(configuration or {}),
        )


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far, in MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


@cache
def hardware() -> dict[str, Any]:
    """Processor, cores, memory, and the accelerator when torch is loaded and has one."""
    found: dict[str, Any] = {"processor": _processor(), "num_cores": os.cpu_count(), "system": platform.platform()}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_gb"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)
    if (torch := sys.modules.get("torch")) is not None:
        found["num_threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            found["accelerator"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


@cache
def versions() -> dict[str, str]:
    """Installed versions of Python and of the packages that decide speed and results."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def commit() -> str | None:
    """Commit of the checkout that this package runs from, with ``+`` when files were changed; None elsewhere."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


@dataclass
class StreamReport:
    """The numbers of one stream; :meth:`to_dict` is what is written as JSON.

    Attributes:
        num_frames: frames that came out.
        wall_s: seconds from opening the session to the end, everything included.
        time_to_first_frame_ms: from opening the session to the first frame.
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
        """End to end: all frames by all seconds."""
        return self.num_frames / self.wall_s if self.wall_s > 0 else 0.0

    @property
    def real_time_factor(self) -> float:
        """How many times faster than the video plays."""
        return self.frames_per_second / self.fps

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "num_frames": self.num_frames,
            "video_s": round(self.video_s, 3),
            "wall_s": round(self.wall_s, 3),
            "frames_per_second": round(self.frames_per_second, 2),
            "real_time_factor": round(self.real_time_factor, 3),
            "time_to_first_frame_ms": _rounded(self.time_to_first_frame_ms),
            "chunk_ms": self.chunk_ms,
            "chunk_stage_ms": self.chunk_stage_ms,
            "stage_s": {name: round(seconds, 3) for name, seconds in self.stage_s.items()},
            "peak_memory_mb": round(self.peak_memory_mb, 1),
            **{key: asdict(self)[key] for key in ("fps", "configuration", "hardware", "versions", "commit")},
        }

    def to_json(self) -> str:
        """The same as text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON, whole or not at all. Raises a UserError when it cannot be written."""
        with whole_file(path) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")

    def table(self, title: str = "stream") -> Table:
        """The same for people, as a rich table."""
        from rich.table import Table

        table = Table(title=title, title_justify="left", show_header=False)
        table.add_column(style="dim")
        table.add_column(justify="right", style="bold")
        table.add_column(style="dim")
        rows: list[tuple[str, str, str]] = [
            ("frames", f"{self.num_frames:,}", f"{self.video_s:.2f} s of video at {self.fps} fps"),
            ("end to end", f"{self.frames_per_second:.1f} fps", f"{self.real_time_factor:.2f} x real time"),
            ("time to first frame", _ms(self.time_to_first_frame_ms), "from opening the portrait"),
        ]
        notes = {"p50": f"{self.chunk_ms['count']:,} chunks", "p95": "", "p99": "", "max": ""}
        rows += [(f"per chunk, {key}", _ms(self.chunk_ms[key]), note) for key, note in notes.items()]
        table.add_section()
        for row in rows:
            table.add_row(*row)
        table.add_section()
        other_s = max(0.0, self.wall_s - sum(self.stage_s.values()))
        for name, seconds in {**self.stage_s, "reading and waiting": other_s}.items():
            share = seconds / self.wall_s if self.wall_s > 0 else 0.0
            table.add_row(_TITLES.get(name, name), f"{seconds:.2f} s", f"{'█' * round(20 * share)} {share:.0%}".strip())
        table.add_section()
        table.add_row("peak memory", f"{self.peak_memory_mb:,.0f} MB", str(self.hardware.get("processor", "")))
        return table


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _ms(value: float | int | None) -> str:
    return "-" if value is None else f"{value:,.1f} ms"
