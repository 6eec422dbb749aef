"""The one exception for mistakes that a user can make."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(ValueError):
    """A user's mistake, told in one line: what was expected, what came, and the way out.

    The command line prints the message without a traceback and exits with code 2.
    """


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
