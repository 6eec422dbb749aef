"""The one exception for mistakes that a user can make."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

Result = TypeVar("Result")


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

    A signal that comes while C++ code of a library calls Python (torch reading weights, say) is
    turned into some error of that library. The block ends by the interrupt then, not by that error.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    raised: list[KeyboardInterrupt] = []

    def end(number: int, frame: object) -> None:
        ctrl_c = number == signal.SIGINT
        raised.append(KeyboardInterrupt() if ctrl_c else Terminated(number))
        raise raised[-1]

    signals = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    # A signal that is ignored (nohup) stays so.
    caught: dict[int, Any] = {
        s: signal.SIG_DFL for s in signals if signal.getsignal(s) == signal.SIG_DFL
    }
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        caught[signal.SIGINT] = signal.default_int_handler
    for number in caught:
        signal.signal(number, end)
    try:
        yield
    except Exception as error:
        if raised and raised[-1] not in causes(error):
            raise raised[-1] from None
        raise
    finally:
        for number, handler in caught.items():
            signal.signal(number, handler)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, then those that it was raised from or while handling, the latest first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def run_async(main: Coroutine[Any, Any, Result]) -> Result:
    """What ``main`` returns, run to its end. Ctrl-C cancels it, so that it can tidy up: asyncio
    sees to that where Python's own handler is in place, and there alone.
    """
    import asyncio  # a third of what `rest --help` takes

    with _python_s_ctrl_c():
        return asyncio.run(main)


@contextmanager
def _python_s_ctrl_c() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    if callable(before):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


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
