"""The one exception for mistakes that a user can make."""

from __future__ import annotations


class UserError(ValueError):
    """A user's mistake, told in one line: what was expected, what came, and the way out.

    The command line prints the message without a traceback and exits with code 2.
    """
