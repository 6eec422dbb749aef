"""A result row: what a number means, beside the number (docs/leaderboard.md). Needs no torch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rest_lightning.errors import UserError
from rest_lightning.media.files import whole_file

DECIMALS = 6
# lie beside rows: `rest ablate`, `rest leaderboard`
NOT_ROWS = ("ablation.json", "recipe.json", "leaderboard.json")
_HEX = set("0123456789abcdef")
_NEEDED_WHEN_CLAIMED = ("protocol", "protocol_version", "method", "measured", "metrics", "source")

Value = float | None | list[float | None]


@dataclass(frozen=True)
class ResultRow:
    """One method under one protocol.

    Attributes:
        protocol, protocol_version: what was measured, and how; rows of two protocols are never
            compared.
        method: name of what was scored.
        measured: False for figures that somebody published; these need ``source``, and only the
            keys up to ``metrics``.
        metrics: key -> number; None where a metric is not defined; a list is a curve
            (``..._by_second``).
        ground_truth: the same keys for the true clips in place of the generated ones, through the
            same code.
        num_clips: clips that count in every metric.
        num_frames: frames per clip.
        failures: ``{"clip", "reason"}`` of every clip that counts nowhere.
        extractors: metric -> ``{"name", "sha256"}`` of the network behind it.
        sampler: steps, guidance, seed and so on; empty where they are not known.
        speed: ``frames_per_second`` and so on; empty where it was not measured.
        hardware: where it ran.
        commit: of this package.
        config: resolved configuration, with ``size_px``, ``fps`` and what readers must know
            (``notes``).
        date: ISO 8601.
        source: of published figures.
    """

    protocol: str
    protocol_version: int
    method: str
    measured: bool
    metrics: Mapping[str, Value]
    ground_truth: Mapping[str, Value] = field(default_factory=dict)
    num_clips: int = 0
    num_frames: int = 0
    failures: Sequence[Mapping[str, str]] = ()
    extractors: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sampler: Mapping[str, Any] = field(default_factory=dict)
    speed: Mapping[str, Any] = field(default_factory=dict)
    hardware: Mapping[str, Any] = field(default_factory=dict)
    commit: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    date: str = ""
    source: str | None = None

    @property
    def num_attempted(self) -> int:
        """Clips that were asked for: those that count and those that failed."""
        return self.num_clips + len({failure["clip"] for failure in self.failures})

    def to_dict(self) -> dict[str, Any]:
        """The keys of a row (docs/leaderboard.md); ``source`` only where there is one; NaN and
        infinity are null.
        """
        content = {key: _plain(value) for key, value in asdict(self).items()}
        if self.source is None:
            del content["source"]
        return content

    @classmethod
    def from_dict(cls, content: Any, name: str = "result row") -> ResultRow:
        """Check and take over a parsed row; ``name`` is used in errors.

        Raises:
            UserError: a key that is missing, unknown or of the wrong type.
        """
        if not isinstance(content, dict):
            raise UserError(
                f"{name}: expected a JSON object with a result row, got "
                f"{_kind(content)}: remake the row"
            )
        claimed = content.get("measured") is False
        known = [f.name for f in fields(cls)]
        if unknown := [key for key in content if key not in known]:
            raise UserError(
                f"{name}: expected the keys of a result row, got an unknown key {unknown[0]!r}: "
                "remake the row, or keep other files out of the folder"
            )
        needed = _NEEDED_WHEN_CLAIMED if claimed else [key for key in known if key != "source"]
        if missing := [key for key in needed if key not in content]:
            raise UserError(
                f"{name}: expected the key {missing[0]!r} in a result row, got none: remake the row"
            )
        for key, value in content.items():
            if problem := _problem(key, value):
                raise UserError(f"{name}: expected {problem}, got {_kind(value)}: remake the row")
        if not claimed:
            _check_measured(content, name)
        return cls(**content)


def read_rows(path: str | os.PathLike[str]) -> list[ResultRow]:
    """The row, or list of rows, of a JSON file.

    Raises:
        UserError: no such file, no JSON, or a row that is not one (file and key are named).
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"expected a result row in {path}, got '{error.strerror}': check the name"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: expected JSON, got {error}: remake the row") from None
    entries = content if isinstance(content, list) else [content]
    return [
        ResultRow.from_dict(entry, str(path) if len(entries) == 1 else f"{path} entry {number}")
        for number, entry in enumerate(entries, 1)
    ]


def write_row(row: ResultRow, path: str | os.PathLike[str]) -> None:
    """Write the row as JSON, whole or not at all; what could not be read back is not written.

    Raises:
        UserError: a row that :func:`read_rows` would refuse, or a file that cannot be written.
    """
    text = json.dumps(row.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    ResultRow.from_dict(json.loads(text), str(path))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def row_files(paths: Sequence[Path]) -> Iterator[Path]:
    """JSON files among ``paths``; of a folder all below it that may be rows, in the order of their
    names.

    Raises:
        UserError: a path that is neither.
    """
    for path in paths:
        if path.is_dir():
            files = (file for file in path.rglob("*.json") if file.name not in NOT_ROWS)
            yield from sorted(file for file in files if not file.name.startswith("."))
        elif path.is_file():
            yield path
        else:
            raise UserError(
                f"expected a folder of result rows or a JSON file, but {path} does "
                "not "
                "exist: check it"
            )


def _check_measured(content: dict[str, Any], name: str) -> None:
    for key in ("size_px", "fps"):
        if key not in content["config"]:
            raise UserError(
                f"{name}: expected the key 'config.{key}' in a measured row, got "
                "none: "
                "remake the row"
            )
    if missing := sorted(set(content["metrics"]) ^ set(content["ground_truth"])):
        raise UserError(
            f"{name}: expected 'ground_truth' with the keys of 'metrics', got {missing[0]!r} in "
            "one alone: "
            "score the true clips, too"
        )


def _problem(key: str, value: Any) -> str | None:
    """What ``key`` should hold, None when ``value`` is that."""
    mapping = isinstance(value, dict)
    match key:
        case "protocol" | "method":
            return (
                None if isinstance(value, str) and value.strip() else (f"the key {key!r} as a name")
            )
        case "date":
            return None if isinstance(value, str) else "the key 'date' as text"
        case "commit" | "source":
            return None if value is None or isinstance(value, str) else f"the key {key!r} as text"
        case "measured":
            return None if isinstance(value, bool) else "the key 'measured' as true or false"
        case "protocol_version" | "num_clips" | "num_frames":
            good = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            return None if good else f"the key {key!r} as a whole number"
        case "metrics" | "ground_truth":
            if mapping and (wrong := [name for name, item in value.items() if not _is_value(item)]):
                return f"the key '{key}.{wrong[0]}' as a number, null or a list of these"
        case "failures":
            good = isinstance(value, list) and all(
                isinstance(item, dict)
                and {"clip", "reason"} == set(item)
                and all(isinstance(v, str) for v in item.values())
                for item in value
            )
            return None if good else "the key 'failures' as a list of {'clip', 'reason'}"
        case "extractors":
            if mapping and (
                wrong := [name for name, item in value.items() if not _is_extractor(item)]
            ):
                return f"the key 'extractors.{wrong[0]}' with a name and a SHA-256 of 64 hex digits"
    return None if mapping else f"the key {key!r} as an object"


def _is_value(value: Any) -> bool:
    if isinstance(value, list):
        return all(not isinstance(item, list) and _is_value(item) for item in value)
    return value is None or (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    )


def _is_extractor(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return False
    digest = value.get("sha256")
    return isinstance(digest, str) and len(digest) == 64 and set(digest) <= _HEX


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, DECIMALS) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def _kind(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{type(value).__name__} {text[:50]}..."
