"""What a benchmark's figures should reach: the rows of a result's ``targets``, and the table that
people read.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

_SIGNS = {"<=": operator.le, ">=": operator.ge}
_WORDS = {True: "met", False: "MISSED"}
_VALUE_WIDTH = 40  # of a text, in the table

Row = dict[str, Any]


def find(scenarios: Mapping[str, Any], path: str) -> float | None:
    """The number under a dotted path, None where it is missing."""
    value: Any = scenarios
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def target_row(
    what: str, value: float | None, sign: str, limit: float | None, instead: str | None = None
) -> Row:
    """One row of ``targets``.

    Args:
        what: the figure, with its unit.
        value: measured; None where it was not.
        sign: ``<=`` or ``>=``, between value and limit.
        limit: None for a figure that is only told.
        instead: a reason not to judge a value that there is, such as ``rehearsal``.
    """
    met: bool | str = "not measured"
    if value is not None:
        met = instead or ("no target here" if limit is None else bool(_SIGNS[sign](value, limit)))
    return {
        "what": what,
        "value": value,
        "wanted": "printed" if limit is None else f"{sign} {limit:g}",
        "met": met,
    }


def target_lines(rows: Iterable[Row]) -> list[str]:
    """The same for people, a line each."""
    lines = []
    for row in rows:
        value = row["value"]
        told = (
            "-"
            if value is None
            else value[:_VALUE_WIDTH]
            if isinstance(value, str)
            else f"{value:.4g}"
        )
        lines.append(
            f"  {row['what']:54}{told:>10}  {row['wanted']:>9}  "
            f"{_WORDS.get(row['met'], row['met'])}"
        )
    return lines
