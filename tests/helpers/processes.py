"""What a process has started, read from /proc."""

from __future__ import annotations

import re
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


def listening(pids: set[int]) -> set[str]:
    """Addresses of TCP on which processes listen, as the kernel writes them: hexadecimal."""
    sockets: dict[str, str] = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":  # LISTEN
                sockets[fields[9]] = fields[1].partition(":")[0]
    found = set()
    for pid in pids:
        try:
            names = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            continue  # it has ended meanwhile
        numbers = [match[1] for match in map(re.compile(r"socket:\[(\d+)\]").match, names) if match]
        found |= {sockets[number] for number in numbers if number in sockets}
    return found


def alive(pids: set[int]) -> set[int]:
    """Those that still run."""
    return pids & set(parents())
