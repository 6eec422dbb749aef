"""What a measurement says of where it was made (machine, versions, commit, memory), and how
threads wait.
"""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("rest_lightning", "torch", "lightning", "diffusers", "transformers", "numpy", "av")


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far, in MB (10^6 bytes)."""
    # Linux hands getrusage's figure on from a process to the program that it starts: it may be the
    # parent's.
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def resident_memory_mb(process: int | None = None) -> float:
    """Resident memory of a process (default: this one) now, in MB (10^6 bytes). Linux only."""
    pages = int(
        Path(f"/proc/{process or os.getpid()}/statm").read_text(encoding="utf-8").split()[1]
    )
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def num_usable_cores() -> int:
    """Cores that this process may run on: fewer than the machine's in a container or under
    ``taskset``.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def hardware() -> dict[str, Any]:
    """Processor, cores, memory, and the accelerator when torch is loaded and has one."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "num_cores": os.cpu_count(),
        "system": platform.platform(),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_gb"] = round(
            os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1
        )
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
    """Commit of the checkout that this package runs from, with ``+`` when files were changed; None
    elsewhere.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True
        )
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def spin_briefly() -> None:
    """Let a thread of the model that waits for the others give its core up soon; to be called
    before torch is imported.

    Encoders, the network and other programs need the cores too, and whoever spins on one of them
    takes the time of the very thread that is waited for. 10,000 turns cost a session alone 2 %;
    three sessions beside three browser pages on two cores were late with libgomp's 300,000 and are
    not with these (docs/serve.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
