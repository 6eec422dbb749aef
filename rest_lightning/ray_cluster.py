"""Ray, for the commands that can use it: the cluster that ``RAY_ADDRESS`` names, or one of this
machine alone.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from rest_lightning.errors import UserError
from rest_lightning.extras import require


def environment() -> dict[str, str]:
    """What Ray should find in its environment, as far as the user has not set it; it is read when
    Ray is imported.
    """
    wanted = {
        "RAY_USAGE_STATS_ENABLED": "0",  # nothing of a user's work is told to others
        "RAY_DEDUP_LOGS": "0",  # lines of several sessions look alike, and each counts
    }
    if not os.environ.get("RAY_ADDRESS"):
        # Ray's own switch for loopback, whatever its name says: a cluster of one machine listens to
        # nobody else.
        wanted["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        # By default Ray runs its workers at nice 15: beside any other work a replica would neither
        # start in time nor keep the pace of its sessions.
        wanted["RAY_worker_niceness"] = "0"
    return {name: value for name, value in wanted.items() if name not in os.environ}


@contextmanager
def joined(settings: Mapping[str, Any], own_settings: Mapping[str, Any]) -> Iterator[bool]:
    """Connected to a cluster for as long as the block takes; whoever is connected already stays so.

    Args:
        settings: of ``ray.init``.
        own_settings: further ones, of a cluster that is started here.

    Yields:
        Whether the cluster was started here, and ends with the block.

    Raises:
        UserError: no Ray, or no cluster.
    """
    os.environ.update(environment())
    require("ray", "--engine ray")
    import ray

    if ray.is_initialized():
        yield False
        return
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _join(address, settings)
    else:
        _start({**settings, "include_dashboard": False, **own_settings})
    try:
        with nullcontext() if address else _ends_with_us():
            yield not address
    finally:
        ray.shutdown()


@contextmanager
def _ends_with_us() -> Iterator[None]:
    """Ray's own processes end within a minute or two of a driver that is killed; a helper, which
    learns of our end by a closed pipe, ends them at once.
    """
    if not sys.platform.startswith("linux"):
        yield
        return
    words = [f"{pid}:{_start_of(pid)}" for pid in _below(os.getpid())]
    helper = [sys.executable, "-m", "rest_lightning.ray_cluster", *words]
    with subprocess.Popen(helper, stdin=subprocess.PIPE, start_new_session=True) as process:
        try:
            yield
        finally:
            process.kill()


def _below(pid: int) -> list[int]:
    """All processes that one has started, and those that these have."""
    try:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        children = [int(word) for task in tasks for word in (task / "children").read_text().split()]
    except OSError:
        return []
    return [each for child in children for each in (child, *_below(child))]


def _start_of(pid: int) -> str:
    """When a process began, in the kernel's ticks: numbers of processes are used again."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _end_all(words: list[str]) -> None:
    """The helper: waits for the end of stdin, then ends the processes ``pid:start``."""
    sys.stdin.read()
    for pid, _, start in (word.partition(":") for word in words):
        if start and _start_of(int(pid)) == start:
            with suppress(OSError):
                os.kill(int(pid), signal.SIGKILL)


def _join(address: str, settings: Mapping[str, Any]) -> None:
    import ray

    try:
        host, colon, port = address.rpartition(":")
        # Ray itself would try for minutes where nobody listens
        if colon and port.isdigit() and "/" not in host:
            socket.create_connection((host, int(port)), timeout=20).close()
        ray.init(address=address, **settings)
    except Exception as error:  # Ray raises bare ones too
        ray.shutdown()
        text = (
            f"expected a Ray cluster at RAY_ADDRESS={address}, got '{_line(error)}': start "
            "one, "
            "or unset it"
        )
        raise UserError(text) from None


def _start(settings: Mapping[str, Any]) -> None:
    import ray

    for is_last in (False, True):
        try:
            ray.init(address="local", **settings)
            return
        except Exception as error:
            # a bare Exception where Ray's processes took more than its 30 s to start
            ray.shutdown()
            if is_last:
                raise UserError(
                    f"expected a Ray cluster on this machine, got '{_line(error)}': try again"
                ) from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


if __name__ == "__main__":
    _end_all(sys.argv[1:])
