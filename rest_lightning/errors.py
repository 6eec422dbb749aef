"""The one exception for mistakes that a user can make."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A user's mistake, told in one line: what was expected, what came, and the way out.

    The command line prints the message without a traceback and exits with code 2.
    """


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, treated as Ctrl-C: what was made is kept.

    Attributes:
        number: of the signal; the exit code is 128 + number.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def ends_as_by_ctrl_c() -> Iterator[None]:
    """Within the block SIGTERM (``docker stop``, ``systemctl stop``) and SIGHUP (a closed terminal)
    raise `Terminated`. Elsewhere than in the main thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        raise Terminated(number)

    signals = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    # A signal that is ignored (nohup) stays so.
    caught = [s for s in signals if signal.getsignal(s) == signal.SIG_DFL]
    for number in caught:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)


def note(text: str) -> None:
    """Tell what is odd and stops nothing: one line on stderr."""
    print(f"note: {' '.join(text.split())}", file=sys.stderr, flush=True)


def exit_code(run: Callable[[], int]) -> int:
    """The exit code of ``run()``; a user's mistake is one line on stderr and 2."""
    try:
        return run()
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
