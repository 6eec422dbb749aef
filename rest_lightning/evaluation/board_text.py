"""The leaderboard as Markdown and as JSON. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rest_lightning.evaluation.board import SPEED, Group, metric_of
from rest_lightning.evaluation.row import ResultRow

CLAIMED = "claimed, not measured"
APART = (
    "Tables are never to be compared with one another: protocol, extractors, clips asked for and frames per clip "
    "each move every number."
)


def to_markdown(groups: Sequence[Group], heading: str = "Leaderboard") -> str:
    """Tables of all groups, with the ground truth first, the failures, and the published figures apart."""
    parts = [f"# {heading}", "", APART]
    for group in groups:
        parts += ["", f"## {group.title}", "", *_group(group)]
    return "\n".join(parts) + "\n"


def to_json(groups: Sequence[Group]) -> dict[str, Any]:
    """Everything as plain values: groups, their entries in order with mean and spread, all rows."""
    return {
        "groups": [
            {
                "protocol": group.protocol,
                "protocol_version": group.version,
                "extractors": dict(group.extractors),
                "extractors_fingerprint": group.fingerprint,
                "num_clips_asked_for": group.num_attempted,
                "num_frames": group.num_frames,
                "sorted_by": group.sort_by,
                "ground_truth": {key: cell.mean for key, cell in group.ground_truth.items()},
                "entries": [
                    {
                        "rank": entry.rank,
                        "method": entry.name,
                        "num_runs": len(entry.rows),
                        "num_failures": entry.num_failures,
                        "metrics": {
                            key: {"mean": cell.mean, "spread": cell.spread}
                            for key in (*group.columns, SPEED)
                            if (cell := entry.cell(key)) is not None
                        },
                        "rows": [row.to_dict() for row in entry.rows],
                    }
                    for entry in group.entries
                ],
                "claimed": [row.to_dict() for row in group.claimed],
                "warnings": group.warnings,
            }
            for group in groups
        ]
    }


def about(group: Group) -> str:
    """One line on what all rows of a group share."""
    if not group.entries:
        return "Published figures alone: nothing was measured under this protocol."
    sizes = sorted({f"{row.config['size_px']} px, {row.config['fps']} fps" for row in group.rows})
    return (
        f"{group.num_attempted} clips asked for, {group.num_frames} frames each, {' / '.join(sizes)}; "
        f"extractors {group.fingerprint}: {extractor_names(group)}."
    )


def extractor_names(group: Group) -> str:
    """``fid embedded-image 1a2b3c4d, ...``."""
    names = (f"{metric} {entry['name']} {entry['sha256'][:8]}" for metric, entry in group.extractors.items())
    return ", ".join(names) or "none"


def notes(group: Group) -> list[str]:
    """What the rows say that a reader must know, each once."""
    found = [str(note) for row in group.rows for note in row.config.get("notes", ())]
    return [*group.warnings, *dict.fromkeys(found)]


def claimed_text(row: ResultRow, key: str) -> str:
    """A published figure, or a dash."""
    value = row.speed.get(key) if key == SPEED else row.metrics.get(key)
    return f"{value:g}" if isinstance(value, int | float) else "–"


def _group(group: Group) -> list[str]:
    columns = group.columns
    lines = [about(group), ""]
    lines += [f"> **Note:** {note}" for note in notes(group)]
    if notes(group):
        lines.append("")
    keys = [SPEED, *columns]
    headings = ["#", "method", "runs", "clips", "failed"]
    headings += [f"{metric_of(key).label} {metric_of(key).arrow}".strip() for key in keys]
    if group.entries:
        truth = group.ground_truth
        lines += [_row(headings), _row(["--:", "---", *["--:"] * (len(headings) - 2)])]
        cells = [truth[key].text(group.decimals(key)) if key in truth else "–" for key in columns]
        lines.append(_row(["", "*ground truth*", *[""] * 4, *(f"*{cell}*" for cell in cells)]))
    for entry in group.entries:
        shown = []
        for key in keys:
            cell = entry.cell(key)
            text = "–" if cell is None else cell.text(group.decimals(key))
            shown.append(f"**{text}**" if group.best(key) is entry else text)
        counts = [str(len(entry.rows)), entry.num_clips, str(entry.num_failures)]
        lines.append(_row([str(entry.rank or "–"), _escape(entry.name), *counts, *shown]))
    reasons = _failures(group)
    if reasons:
        lines += ["", *reasons]
    if group.claimed:
        claimed = group.claimed_columns
        names = [metric_of(key).label for key in claimed]
        lines += ["", f"Published figures ({CLAIMED}; other extractors, clips and code):", ""]
        lines += [_row(["method", *names, "source"]), _row(["---", *["--:"] * len(claimed), "---"])]
        for row in group.claimed:
            values = [claimed_text(row, key) for key in claimed]
            lines.append(_row([f"{_escape(row.method)} ({CLAIMED})", *values, _escape(str(row.source))]))
    return lines


def _failures(group: Group) -> list[str]:
    return [
        f"- failed: {_escape(entry.name)}, {_escape(failure['clip'])}: {_escape(failure['reason'])}"
        for entry in group.entries
        for row in entry.rows
        for failure in row.failures
    ]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _escape(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
