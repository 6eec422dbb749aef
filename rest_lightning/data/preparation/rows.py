"""What became of every stretch of every video: one row per face track, or one for a video that gave
none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rest_lightning.errors import UserError
from rest_lightning.media.files import rounded, write_text_atomic

STATUSES = ("kept", "dropped", "failed")
STAGES = ("probe", "decode", "scene", "face", "track", "filter", "encode")
FILTERS = (
    "short",
    "small",
    "faces",
    "profile",
    "blur",
    "motion",
    "still",
    "dark",
    "hands",
    "text",
    "silence",
    "sync",
    "duplicate",
)
"""In the order in which they are asked; a row names the first that fails."""


@dataclass(frozen=True)
class Row:
    """One line of prepare.jsonl.

    Attributes:
        source: path below the input's root, with forward slashes.
        clip_id: None where the video gave no track.
        status: ``kept``, ``dropped`` (by a filter) or ``failed``.
        stage: that the row reached: ``probe``, ``decode``, ``scene``, ``face``, ``track``,
            ``filter``, ``encode``.
        reason: one line, or None.
        filter: the first that failed, see `FILTERS`.
        start_s, end_s: in the source.
        num_frames: at 25 fps.
        identity, split: set when all videos are done.
        box: ``[x, y, w, h]`` in pixels of the upright source; may reach outside it.
        scores: by name; the filters' scores have the filters' names.
        phash: 16 hexadecimal digits of the middle frame, or None.
        sound_hash: 16 hexadecimal digits of the sound, or None for silence.
        thumbnail: path below the dataset's folder, or None.
    """

    source: str
    clip_id: str | None
    status: str
    stage: str
    reason: str | None = None
    filter: str | None = None
    start_s: float | None = None
    end_s: float | None = None
    num_frames: int | None = None
    identity: str | None = None
    split: str | None = None
    box: Sequence[float] | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    phash: str | None = None
    sound_hash: str | None = None
    thumbnail: str | None = None

    def __post_init__(self) -> None:
        if self.status not in STATUSES or self.stage not in STAGES:
            raise UserError(
                f"{self.source}: expected a status of {', '.join(STATUSES)} and a stage of "
                f"{', '.join(STAGES)}, "
                f"got {self.status!r} and {self.stage!r}: prepare the folder again"
            )
        if self.box is not None:
            object.__setattr__(self, "box", tuple(self.box))  # of JSON it is a list

    def to_json(self) -> str:
        """One line of JSON without its end."""
        return json.dumps(rounded(asdict(self)), ensure_ascii=False)

    @classmethod
    def from_dict(cls, content: Any, name: str) -> Row:
        """Of parsed JSON. Raises a UserError, with ``name``, for anything else than a row."""
        known = {f.name for f in fields(cls)}
        if (
            not isinstance(content, dict)
            or not set(content) <= known
            or not {"source", "status"} <= set(content)
        ):
            raise UserError(
                f"{name}: expected a row of a preparation, got {str(content)[:80]!r}: "
                "prepare it again"
            )
        return cls(**content)


def rows_path(out: str | os.PathLike[str]) -> Path:
    """``<out>/prepare.jsonl``."""
    return Path(out) / "prepare.jsonl"


def sort_rows(rows: Iterable[Row]) -> list[Row]:
    """By source, then by time, then by clip."""
    return sorted(rows, key=lambda row: (row.source, row.start_s or 0.0, row.clip_id or ""))


def write_rows(out: str | os.PathLike[str], rows: Iterable[Row]) -> Path:
    """Write prepare.jsonl, sorted; whole or not at all."""
    write_text_atomic(rows_path(out), "".join(row.to_json() + "\n" for row in sort_rows(rows)))
    return rows_path(out)


def read_rows(out: str | os.PathLike[str]) -> list[Row]:
    """Rows of ``<out>/prepare.jsonl``.

    Raises:
        UserError: no such file, or another content.
    """
    path = rows_path(out)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UserError(
            f"expected {path}, got none: make it with `rest prepare VIDEOS --out {out}`"
        ) from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(Row.from_dict(json.loads(line), f"{path} line {number}"))
        except json.JSONDecodeError:
            raise UserError(
                f"{path} line {number}: expected JSON, got {line[:60]!r}: prepare it again"
            ) from None
    return rows
