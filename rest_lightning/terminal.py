"""The three streams of a process of ``rest``: closed, full, or of another encoding, they never
spoil the work. Needs no torch.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import IO, Any

CLOSED = "<closed>"


class _Stderr(io.TextIOWrapper):
    """What cannot be told (a full disk, a terminal that is gone) is lost, and the work goes on."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


class _Closed(io.TextIOWrapper):
    """Stands for a stream that the process was started without."""

    name = CLOSED


def take_streams() -> None:
    """Makes stdin, stdout and stderr of this process usable; to be called once, at its start.

    A closed one leads nowhere: else the next file that is opened would get its number, and what a
    library prints would end up in that file. A terminal of another encoding shows "?" in place of a
    character that it does not have.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
        if getattr(sys, name) is None:
            mode = "rb" if number == 0 else "wb"
            file: Any = open(number, mode, closefd=False)  # noqa: SIM115  # open to the end
            setattr(sys, name, _Closed(file, encoding="utf-8", errors="replace"))
    accept_encoding()
    if isinstance(sys.stderr, io.TextIOWrapper) and sys.stderr.name != CLOSED:
        encoding = sys.stderr.encoding
        raw: Any = open(2, "wb", buffering=0, closefd=False)  # noqa: SIM115  # open to the end
        sys.stderr = _Stderr(raw, encoding=encoding, errors="replace", write_through=True)
        sys.__stderr__ = sys.stderr  # type: ignore[misc]  # logging's last resort writes there


def accept_encoding() -> None:
    """Lets stdout and stderr show "?" for characters that their encoding does not have."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def is_closed(stream: IO[Any] | None) -> bool:
    """Whether the process was started without this stream."""
    return stream is None or getattr(stream, "name", None) == CLOSED
