"""Attacks with fixed seeds, each bounded in time: how many were tried, and how many went through.

``pytest tests/hostile`` ends with the table that docs/security.md shows.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

MAX_MEMORY_MB = 1000
# Of one attack; what has not been tried by then is not counted.
SECONDS = float(os.environ.get("REST_HOSTILE_SECONDS", "30"))
_TALLY: list[tuple[str, int, int, str]] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of them are slow."""
    for item in items:
        if "hostile" in item.path.parts:
            item.add_marker(pytest.mark.slow)


class Attacked(NamedTuple):
    """What came of an attack: how many inputs were refused in one line, and the peak memory."""

    tried: int
    faults: list[str]
    refused: int
    peak_mb: float


@pytest.fixture
def tally() -> Callable[..., None]:
    """Counts an attack for the table, and fails the test where something went through."""

    def count(name: str, tried: int, faults: list[str], note: str = "") -> None:
        _TALLY.append((name, tried, len(faults), note))
        assert tried > 0
        assert not faults, "\n".join(faults[:10])

    return count


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table."""
    if not _TALLY:
        return
    lines = ["", "| attack | tried | failed | seen |", "| --- | ---: | ---: | --- |"]
    lines += [f"| {name} | {tried} | {failed} | {note} |" for name, tried, failed, note in _TALLY]
    terminalreporter.write_line("\n".join(lines))


@pytest.fixture
def attack(tmp_path: Path) -> Callable[..., Attacked]:
    """Runs a module of this folder as a process.

    The process prints a JSON line for each try; one that ends in another way (a crash, the
    system's killer) is a fault of the try that it was at, and the next process goes on behind it.
    """

    def run(module: str, count: int, *words: str, seconds: float = SECONDS) -> Attacked:
        faults: list[str] = []
        refused = 0
        start_s, tried, peak_mb = time.monotonic(), 0, 0.0
        while tried < count and time.monotonic() - start_s < seconds:
            left_s = seconds - (time.monotonic() - start_s)
            program = Path(__file__).with_name(f"{module}.py")
            command = [sys.executable, str(program), str(tried), str(count), f"{left_s:.1f}"]
            done = subprocess.run(
                [*command, *words],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "helpers")},
                preexec_fn=_no_cores,
                timeout=seconds + 1200,
            )
            lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
            tried += len(lines)
            refused += sum(line["refused"] for line in lines)
            faults += [f"{line['try']}: {line['fault']}" for line in lines if line["fault"]]
            peak_mb = max([peak_mb, *(line["peak_mb"] for line in lines)])
            if done.returncode:
                last = done.stderr.strip().splitlines()[-1:] or [""]
                faults.append(f"try {tried} ended the process ({done.returncode}): {last[0]}")
                tried += 1
        if peak_mb > MAX_MEMORY_MB:
            faults.append(f"expected at most {MAX_MEMORY_MB} MB, took {peak_mb:.0f}")
        return Attacked(tried, faults, refused, peak_mb)

    return run


def _no_cores() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
