"""What every benchmark's JSON says of where it comes from, and how it is written."""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rest_lightning.machine import commit, hardware, versions
from rest_lightning.media.files import whole_file


def origin(args: argparse.Namespace) -> dict[str, Any]:
    """Machine, versions, commit, arguments and date; paths without the folders of one machine."""
    return {
        "hardware": hardware(),
        "versions": versions(),
        "commit": commit(),
        "config": {name: _portable(value) for name, value in vars(args).items()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_result(path: Path, result: dict[str, Any]) -> None:
    """The JSON, whole or not at all; numbers that are not finite are an error.

    Raises:
        UserError: the operating system refuses.
    """
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _portable(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_portable(item) for item in value]
    if isinstance(value, Path):
        here = Path.cwd()
        return (
            str(value.absolute().relative_to(here))
            if value.absolute().is_relative_to(here)
            else value.name
        )
    return value
