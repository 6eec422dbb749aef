"""What a process has started, read from /proc."""

from __future__ import annotations

from pathlib import Path


def parents() -> dict[int, int]:
    """Parent of every process."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended meanwhile
        if fields[0] != "Z":
            found[int(folder.name)] = int(fields[1])
    return found


def descendants(pid: int) -> set[int]:
    """All processes below one."""
    known = parents()
    below: set[int] = set()
    layer = {pid}
    while layer:
        layer = {child for child, parent in known.items() if parent in layer} - below
        below |= layer
    return below


def alive(pids: set[int]) -> set[int]:
    """Those that still run."""
    return pids & set(parents())
