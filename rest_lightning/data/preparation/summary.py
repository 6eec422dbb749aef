"""What is in a dataset, as numbers: for the report and for ``rest prepare --inspect``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rest_lightning.constants import FPS
from rest_lightning.data.layout import SPLITS, read_dataset_json, read_manifest, read_sidecar
from rest_lightning.data.preparation.filters import RULES, score_of_rule
from rest_lightning.data.preparation.rows import FILTERS, STAGES, Row, read_rows, rows_path

NOUNS = {
    "short": "length in frames",
    "small": "face in source pixels",
    "faces": "share of frames with another face",
    "profile": "turn of the head in eye distances",
    "blur": "sharpness (variance of the Laplacian)",
    "motion": "optical flow in % of the side",
    "still": "longest stretch without movement in s",
    "dark": "brightness",
    "hands": "share of frames with a hand over the face",
    "text": "share of frames with text below",
    "silence": "share of silence",
    "sync": "frames between sound and lips",
    "sync_confidence": "confidence of the sync",
}


@dataclass(frozen=True)
class Group:
    """Some clips together: how many, and how long."""

    name: str
    num_clips: int
    hours: float
    example: str = ""
    split: str = ""
    num_identities: int = 0


@dataclass(frozen=True)
class Score:
    """One score of all clips that have it.

    Attributes:
        name: as in the rows.
        what: unit, for people.
        values: (n,).
        failing: (n,) whether the score breaks its threshold.
        limits: of the thresholds, as ``("min" or "max", value)``.
    """

    name: str
    what: str
    values: NDArray[np.float64]
    failing: NDArray[np.bool_]
    limits: Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Summary:
    """Numbers of a dataset.

    Attributes:
        out: its folder.
        kind: how it was made.
        size_px: side of its clips, or None.
        rows: of prepare.jsonl; of another dataset one kept row per clip of its manifest.
        filters_known: whether there was a prepare.jsonl, so that what was left out is known.
        left_out: by stage (failed) and by filter (dropped), in the order of the work.
        splits, identities: of the kept clips; identities with the most hours first.
        scores: those that at least one clip has.
    """

    out: Path
    kind: str
    size_px: int | None
    rows: Sequence[Row]
    filters_known: bool
    left_out: Sequence[Group]
    splits: Sequence[Group]
    identities: Sequence[Group]
    scores: Sequence[Score]
    kept: Sequence[Row] = field(default_factory=list)

    @property
    def hours(self) -> float:
        """Of the kept clips."""
        return hours_of(self.kept)

    def count(self, status: str) -> int:
        """Rows of a status."""
        return sum(row.status == status for row in self.rows)

    @property
    def num_videos(self) -> int:
        """Different sources."""
        return len({row.source for row in self.rows})


def summarize(out: str | os.PathLike[str]) -> Summary:
    """Read a dataset's rows, or of a dataset that `rest prepare` did not make its manifest and
    sidecars.

    Raises:
        UserError: no dataset in this folder.
    """
    out = Path(out)
    known = rows_path(out).is_file()
    info = read_dataset_json(out) if (out / "dataset.json").is_file() or not known else {}
    rows = read_rows(out) if known else _rows_of_manifest(out)
    options: dict[str, Any] = info.get("options") or {}
    kept = [row for row in rows if row.status == "kept"]
    return Summary(
        out=out,
        kind=str(info.get("kind", "prepared clips")),
        size_px=options.get("size_px") or (info.get("arguments") or {}).get("size_px"),
        rows=rows,
        filters_known=known,
        left_out=_left_out(rows),
        splits=[_group(name, [row for row in kept if row.split == name]) for name in SPLITS],
        identities=_by_identity(kept),
        scores=_scores(rows, options),
        kept=kept,
    )


def hours_of(rows: Iterable[Row]) -> float:
    """Hours of video in rows that have a length."""
    return sum(row.num_frames or 0 for row in rows) / FPS / 3600


def duration(hours: float) -> str:
    """Hours for people: ``12.3 h``, ``4.5 min``, ``7 s``."""
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.0f} s"


def inspect(out: str | os.PathLike[str]) -> str:
    """The report as text: what was kept and left out, splits, identities with the most hours,
    scores.

    Raises:
        UserError: no dataset in this folder.
    """
    summary = summarize(out)
    size = f", {summary.size_px} px" if summary.size_px else ""
    parts = [
        f"{summary.out}: {summary.kind}{size}",
        f"{summary.num_videos} videos; clips: {summary.count('kept')} kept "
        f"({duration(summary.hours)}), "
        f"{summary.count('dropped')} dropped; {summary.count('failed')} failed",
    ]
    if not summary.filters_known:
        parts.append("no prepare.jsonl: what was left out, and why, is not known")
    if summary.left_out:
        parts.append(
            _table(
                ["left out", "rows", "length", "example"],
                [
                    [group.name, str(group.num_clips), duration(group.hours), group.example[:70]]
                    for group in summary.left_out
                ],
            )
        )
    parts.append(
        _table(
            ["split", "identities", "clips", "length"],
            [
                [group.name, str(group.num_identities), str(group.num_clips), duration(group.hours)]
                for group in summary.splits
            ],
        )
    )
    shown = summary.identities[:20]
    rows = [
        [group.name[:40], group.split, str(group.num_clips), duration(group.hours)]
        for group in shown
    ]
    if len(summary.identities) > len(shown):
        rows.append([f"... {len(summary.identities) - len(shown)} more", "", "", ""])
    parts.append(_table(["identity", "split", "clips", "length"], rows))
    if summary.scores:
        head = ["score", "least", "5 %", "median", "95 %", "most", "threshold", "failing"]
        parts.append(_table(head, [_score_line(score) for score in summary.scores]))
    return "\n\n".join(parts) + "\n"


def limits_text(score: Score) -> str:
    """``at least 64``, ``at most 3``, or nothing."""
    return ", ".join(
        (f"at {'least' if kind == 'min' else 'most'} {limit:g}") for kind, limit in score.limits
    )


def _rows_of_manifest(out: Path) -> list[Row]:
    rows = []
    for clip in read_manifest(out):
        sidecar = read_sidecar(out, clip.clip_id)
        scores = {"short": float(clip.num_frames), **sidecar.quality}
        box = None if sidecar.crop_box is None else list(sidecar.crop_box)
        row = Row(
            sidecar.source,
            clip.clip_id,
            "kept",
            "encode",
            num_frames=clip.num_frames,
            identity=clip.identity,
        )
        rows.append(Row(**{**vars(row), "split": clip.split, "box": box, "scores": scores}))
    return rows


def _left_out(rows: Sequence[Row]) -> list[Group]:
    groups = []
    for stage in STAGES:
        found = [row for row in rows if row.status == "failed" and row.stage == stage]
        if found:
            groups.append(_group(f"failed: {stage}", found))
    for name in FILTERS:
        found = [row for row in rows if row.status == "dropped" and row.filter == name]
        if found:
            groups.append(_group(f"dropped: {name}", found))
    return groups


def _by_identity(kept: Sequence[Row]) -> list[Group]:
    of: dict[str, list[Row]] = {}
    for row in kept:
        of.setdefault(row.identity or "unknown", []).append(row)
    groups = [_group(name, found) for name, found in of.items()]
    return sorted(groups, key=lambda group: (-group.hours, group.name))


def _group(name: str, rows: Sequence[Row]) -> Group:
    reasons = sorted(row.reason for row in rows if row.reason)
    split = rows[0].split or "" if rows else ""
    identities = {row.identity for row in rows if row.identity}
    return Group(
        name, len(rows), hours_of(rows), reasons[0] if reasons else "", split, len(identities)
    )


def _scores(rows: Sequence[Row], options: dict[str, Any]) -> list[Score]:
    names: dict[str, None] = dict.fromkeys(score_of_rule(rule) for rule in RULES)
    names.update(dict.fromkeys(name for row in rows for name in sorted(row.scores)))
    scores = []
    for name in names:
        found = [row.scores[name] for row in rows if row.scores.get(name) is not None]
        if not found:
            continue
        values = np.array(found, np.float64)
        failing = np.zeros(len(values), bool)
        limits = []
        for rule in RULES:
            limit = options.get(rule.option)
            if score_of_rule(rule) == name and limit is not None:
                limits.append((str(rule.kind), float(limit)))
                failing |= values > limit if rule.kind == "max" else values < limit
        scores.append(Score(name, NOUNS.get(name, name.replace("_", " ")), values, failing, limits))
    return scores


def _score_line(score: Score) -> list[str]:
    numbers = np.percentile(score.values, [0, 5, 50, 95, 100])
    return [
        score.name,
        *(f"{number:.4g}" for number in numbers),
        limits_text(score) or "-",
        str(int(score.failing.sum())) if score.limits else "-",
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, numbers on the right."""
    widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]
    align: list[Callable[[str, int], str]] = [
        str.rjust if rows and all(_is_number(row[i]) for row in rows) else str.ljust
        for i in range(len(head))
    ]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            place(cell, width) for cell, width, place in zip(line, widths, align, strict=True)
        ).rstrip()
        for line in lines
    )


def _is_number(cell: str) -> bool:
    return cell in ("", "-") or cell[:1].isdigit() or cell[:2].lstrip("-")[:1].isdigit()
