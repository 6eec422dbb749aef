"""Runs that share a machine: a folder belongs to one run at a time, and children end with their
parent. Needs no torch.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import select
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import FileIO
from multiprocessing.connection import wait
from pathlib import Path

from rest_lightning.errors import UserError, note

LOCK_NAME = ".rest.lock"
PARENT_VARIABLE = "REST_PARENT_PID"
_POLL_S = 0.1
_GRACE_S = 10.0

_held: set[FileIO] = set()


@contextmanager
def owned(folder: str | os.PathLike[str], command: str) -> Iterator[None]:
    """Holds a folder for this process; the system lets go when the process ends, however it ends.

    The lock is ``flock`` on ``.rest.lock`` in the folder, which names its holder and is removed at
    the end. Processes that this one starts do not hold it. On a file system without locks a note
    says so, and the work goes on.

    Args:
        folder: made when absent.
        command: that holds it, such as ``rest fit``, for the one that comes second.

    Raises:
        UserError: another run holds the folder, or it cannot be written.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _locked(folder / LOCK_NAME)
    except BlockingIOError:
        raise UserError(
            f"expected {folder} for this run alone, but another one works in it, "
            f"{_holder(folder / LOCK_NAME)}: wait for its end, or choose another folder"
        ) from None
    except OSError as error:
        reason = os.strerror(error.errno or 0).lower()
        raise UserError(
            f"expected a folder to write to, got '{reason}' for {folder}: choose another"
        ) from None
    _held.add(file)
    with suppress(OSError):  # a full disk: the lock holds, only without a name
        who = {"command": command, "pid": os.getpid(), "host": socket.gethostname()}
        file.truncate(0)
        file.write(json.dumps({**who, "since": time.strftime("%Y-%m-%d %H:%M:%S")}).encode())
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / LOCK_NAME).unlink()
        _held.discard(file)
        file.close()
        if is_new:
            with suppress(OSError):  # refuses when something was made
                folder.rmdir()


def _locked(path: Path) -> FileIO:
    """The open lock file, locked. Raises BlockingIOError when another process has it."""
    while True:
        # No buffer: what is not flushed would be written by the child of a fork once more.
        file = FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise
        except OSError as error:
            note(f"{path.parent} cannot be locked ({error.strerror}): let no other run work in it")
            return file
        # Its holder may have removed the file between our two calls: then another can be made.
        try:
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except FileNotFoundError:
            pass
        file.close()


def _holder(path: Path) -> str:
    try:
        who = json.loads(path.read_text(encoding="utf-8"))
        return f"`{who['command']}` (process {who['pid']} on {who['host']}, since {who['since']})"
    except (OSError, ValueError, KeyError, TypeError):  # it has ended, or begins
        return "which has not said its name"


def _let_go() -> None:
    """A forked child must not keep its parent's locks: they would outlive the parent."""
    for file in _held:
        with suppress(OSError):
            file.close()
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


# -- children --------------------------------------------------------------------------------------


def run_child(words: Sequence[str], environment: Mapping[str, str]) -> int:
    """Runs a command of this package in a process of its own, and returns its exit code.

    The child ends with this process. After Ctrl-C, SIGTERM and SIGHUP it is told to end, has 10 s
    to keep what it has, and is killed then.

    Args:
        words: the program and its arguments.
        environment: of the child.
    """
    told = {**environment, PARENT_VARIABLE: str(os.getpid())}
    process = subprocess.Popen(words, env=told)
    try:
        code = process.wait()
    except BaseException:
        process.terminate()
        try:
            process.wait(_GRACE_S)
        except BaseException:
            process.kill()
            process.wait()
        raise
    return 128 - code if code < 0 else code


def end_with_parent() -> None:
    """From now on this process ends at once when the one that started it has ended, however.

    For workers of ``multiprocessing``, and for what :func:`run_child` starts; elsewhere nothing
    changes.
    """
    parent = multiprocessing.parent_process()
    pid = os.environ.pop(PARENT_VARIABLE, "")
    if parent is not None:
        arguments: tuple[int, int | None] = (parent.pid or 0, parent.sentinel)
    elif pid.isdigit():
        arguments = (int(pid), None)
    else:
        return
    threading.Thread(target=_follow, args=arguments, name="parent", daemon=True).start()


def _follow(pid: int, sentinel: int | None) -> None:
    if sentinel is not None:
        wait([sentinel])
    else:
        _wait_for(pid)
    os._exit(1)


def _wait_for(pid: int) -> None:
    """Returns once the process ``pid``, our parent, has ended."""
    if hasattr(os, "pidfd_open"):
        with suppress(OSError):  # forbidden, or gone
            file = os.pidfd_open(pid)
            # Another process may have got the number by now: ours is our parent.
            if os.getppid() == pid:
                poll = select.poll()
                poll.register(file, select.POLLIN)
                poll.poll()
            return
    while os.getppid() == pid:
        time.sleep(_POLL_S)
