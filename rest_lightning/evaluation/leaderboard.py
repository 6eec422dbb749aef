"""The leaderboard: its metrics, which rows may share a table, and their order. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from rest_lightning.errors import UserError
from rest_lightning.evaluation.row import ResultRow, Value

MAX_DECIMALS = 4
GROUND_TRUTH_TOLERANCE = 0.01  # relative; beyond it two rows did not score the same true clips


@dataclass(frozen=True)
class Metric:
    """How a number is shown. ``goal``: ``low``, ``high``, or the value that is perfect; None has no
    better side.
    """

    label: str
    goal: str | float | None
    decimals: int = 2

    def badness(self, value: float) -> float:
        """Lower is better."""
        if self.goal == "low":
            return value
        return -value if self.goal == "high" else abs(value - float(self.goal or 0.0))

    @property
    def arrow(self) -> str:
        """The better side, for a heading."""
        if self.goal is None:
            return ""
        return {"low": "↓", "high": "↑"}.get(
            str(self.goal), f"→{self.goal:g}" if isinstance(self.goal, float) else ""
        )


# In the order of the columns. A key that is not here is shown under its own name, without a better
# side.
METRICS = {
    "fvd": Metric("FVD", "low", 1),
    "fvd_videomae": Metric("FVD VideoMAE", "low", 1),
    "fid": Metric("FID", "low", 2),
    "sync_c": Metric("Sync-C", "high", 2),
    "sync_d": Metric("Sync-D", "low", 2),
    "offset_frames": Metric("offset (frames)", 0.0, 2),
    "offset_abs_frames": Metric("|offset| (frames)", "low", 2),
    "e_fid": Metric("E-FID", "low", 3),
    "identity_similarity": Metric("identity", "high", 3),
    "lip_correlation": Metric("lip correlation", "high", 3),
    "opening_error": Metric("lip error", "low", 3),
    "lip_best_lag_frames": Metric("lip lag (frames)", 0.0, 2),
    "seam_ratio": Metric("seam ratio", 1.0, 2),
    "lip_motion_in_silence_per_s": Metric("silent lips (1/s)", "low", 3),
    "opening_in_silence": Metric("silent opening", "low", 3),
    "colour_drift_lab_per_minute": Metric("colour drift (Lab/min)", "low", 2),
    "background_drift": Metric("background drift", "low", 2),
    "sharpness_change_per_minute": Metric("sharpness change (1/min)", 0.0, 3),
    "colour_drift_lab": Metric("colour drift (Lab)", "low", 2),  # of curves
    "psnr_db": Metric("PSNR (dB)", "high", 2),
    "ssim": Metric("SSIM", "high", 3),
    "lpips": Metric("LPIPS", "low", 3),
    "backbone_run_time_s": Metric("backbone run time (s)", "low", 2),
}
SORT_ORDER = ("fvd", "fid", "sync_c", "lip_correlation")
SPEED = "frames_per_second"
# Of a row's ``speed``. Lightning's own clips have both, folders of videos neither.
SPEEDS = {
    SPEED: Metric("frames/s", "high", 1),
    "time_to_first_frame_ms": Metric("first frame (ms)", "low", 0),
}


@dataclass(frozen=True)
class Cell:
    """Mean over runs, and the spread (sample standard deviation) where there are several."""

    mean: float
    spread: float | None = None

    @classmethod
    def of(cls, values: Sequence[Any]) -> Cell | None:
        """None where no value is a number."""
        numbers = [
            float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)
        ]
        if not numbers:
            return None
        return cls(fmean(numbers), stdev(numbers) if len(numbers) > 1 else None)

    def text(self, decimals: int) -> str:
        """``mean`` or ``mean ± spread``."""
        spread = "" if self.spread is None else f" ± {self.spread:.{decimals}f}"
        return f"{self.mean:.{decimals}f}{spread}"


@dataclass
class Entry:
    """One line of a table: a method, over all its runs (training seeds)."""

    name: str
    rows: list[ResultRow]
    rank: int | None = None

    def cell(self, key: str) -> Cell | None:
        """A metric, or one of :data:`SPEEDS`."""
        return Cell.of(
            [row.speed.get(key) if key in SPEEDS else row.metrics.get(key) for row in self.rows]
        )

    def curve(self, key: str) -> list[float]:
        """A curve, averaged over runs; cut to the shortest."""
        return mean_curve([row.metrics.get(key) for row in self.rows])

    @property
    def num_clips(self) -> str:
        """Clips that count; a range where runs differ."""
        counts = sorted({row.num_clips for row in self.rows})
        return f"{counts[0]}" if len(counts) == 1 else f"{counts[0]}–{counts[-1]}"

    @property
    def num_failures(self) -> int:
        """Failed clips of all runs."""
        return sum(row.num_attempted - row.num_clips for row in self.rows)


@dataclass
class Group:
    """Rows that may be compared: one protocol, version, setting; the same extractors, numbers of
    clips and frames.
    """

    protocol: str
    version: int
    extractors: Mapping[str, Mapping[str, Any]]
    num_attempted: int
    num_frames: int
    entries: list[Entry] = field(default_factory=list)
    claimed: list[ResultRow] = field(default_factory=list)
    sort_by: str | None = None
    warnings: list[str] = field(default_factory=list)
    apart: str = ""  # what tells it from the other tables of its protocol

    @property
    def title(self) -> str:
        """``synthetic v1``; ``synthetic v1: 16 clips`` where there is another table of it."""
        return f"{self.protocol} v{self.version}" + (f": {self.apart}" if self.apart else "")

    @property
    def facts(self) -> tuple[str, ...]:
        """What rows of other tables of the same protocol may differ in, in words."""
        settings = sorted({str(row.config.get("size_px")) for row in self.rows})
        faces = sorted({str(_setting(row)[-1]) for row in self.rows} - {"None"})
        return (
            f"{self.num_attempted} clips",
            f"{self.num_frames} frames",
            f"{' / '.join(settings)} px",
            f"faces {' / '.join(faces) or 'not said'}",
            f"extractors {self.fingerprint}",
        )

    @property
    def fingerprint(self) -> str:
        """Short hash of all extractors."""
        return fingerprint(self.extractors) if self.extractors else "none"

    @property
    def rows(self) -> list[ResultRow]:
        """All measured rows."""
        return [row for entry in self.entries for row in entry.rows]

    @property
    def ground_truth(self) -> dict[str, Cell]:
        """The true clips through the same code, averaged over rows (equal but for rounding)."""
        cells = {
            key: Cell.of([row.ground_truth.get(key) for row in self.rows]) for key in self.columns
        }
        return {key: Cell(cell.mean) for key, cell in cells.items() if cell is not None}

    @property
    def columns(self) -> list[str]:
        """Keys that are numbers in at least one measured row, known ones first."""
        return _columns(self.rows)

    @property
    def speeds(self) -> list[str]:
        """The frames per second, and what else of :data:`SPEEDS` a measured row has."""
        return [key for key in SPEEDS if key == SPEED or any(key in row.speed for row in self.rows)]

    @property
    def claimed_columns(self) -> list[str]:
        """The same of the published figures."""
        return _columns(self.claimed)

    @property
    def curves(self) -> list[str]:
        """Keys of curves."""
        return sorted(
            {key for row in self.rows for key, value in row.metrics.items() if _is_curve(value)}
        )

    def ground_truth_curve(self, key: str) -> list[float]:
        """A curve of the true clips."""
        return mean_curve([row.ground_truth.get(key) for row in self.rows])

    def decimals(self, key: str) -> int:
        """Decimals of a column: a metric's usual ones, or three significant digits of the column's
        largest value.

        Distances in small feature spaces are a thousand times smaller than those that the usual
        ones are made for.
        """
        cells = (entry.cell(key) for entry in self.entries)
        largest = max((abs(cell.mean) for cell in cells if cell is not None), default=0.0)
        usual = metric_of(key).decimals
        return (
            usual
            if largest == 0
            else max(usual, min(2 - math.floor(math.log10(largest)), MAX_DECIMALS))
        )

    def best(self, key: str) -> Entry | None:
        """The entry with the best value of a metric; None where none is better."""
        metric = metric_of(key)
        if metric.goal is None:
            return None
        having = [
            (metric.badness(cell.mean), entry)
            for entry in self.entries
            if (cell := entry.cell(key)) is not None
        ]
        levels = {badness for badness, _ in having}
        return min(having, key=lambda pair: pair[0])[1] if len(levels) > 1 else None


def metric_of(key: str) -> Metric:
    """How a key is shown."""
    return (SPEEDS | METRICS).get(key) or Metric(key.replace("_", " "), None, 3)


def fingerprint(extractors: Mapping[str, Mapping[str, Any]]) -> str:
    """Eight hex digits of the names and hashes of all extractors."""
    content = {metric: [entry["name"], entry["sha256"]] for metric, entry in extractors.items()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def make_board(rows: Sequence[ResultRow], sort_by: str | None = None) -> list[Group]:
    """Groups of comparable rows, each sorted; published figures stand beside every group of their
    protocol.

    Args:
        rows: measured and published ones.
        sort_by: metric to sort by; None takes the first of FVD, FID, Sync-C and lip correlation
            that a group has.

    Raises:
        UserError: no row, or a ``sort_by`` that no row has.
    """
    rows = _without_repeats(rows)
    if not rows:
        raise UserError(
            "expected at least one result row, got none: make one with `rest score` or `rest test`"
        )
    groups: dict[tuple[Any, ...], Group] = {}
    by_group: dict[tuple[Any, ...], list[ResultRow]] = {}
    for row in (row for row in rows if row.measured):
        # What is left of two tables once their biases are taken off is not known (FID falls with
        # the number of clips).
        key = (
            *_protocol(row),
            fingerprint(row.extractors),
            row.num_attempted,
            row.num_frames,
            *_setting(row),
        )
        groups.setdefault(
            key,
            Group(
                row.protocol,
                row.protocol_version,
                row.extractors,
                row.num_attempted,
                row.num_frames,
            ),
        )
        by_group.setdefault(key, []).append(row)
    for row in (row for row in rows if not row.measured):
        beside = [
            group for group in groups.values() if (group.protocol, group.version) == _protocol(row)
        ]
        if not beside:
            key = (*_protocol(row), "", 0, 0)
            beside = [groups.setdefault(key, Group(*_protocol(row), {}, 0, 0))]
        for group in beside:
            group.claimed.append(row)
    for key, group in groups.items():
        group.entries = _entries(by_group.get(key, []))
        group.warnings = _warnings(group)
        _sort(group, sort_by)
    _tell_apart([group for group in groups.values() if group.entries])
    known_keys = list(
        dict.fromkeys(key for group in groups.values() for key in (*group.columns, *SPEEDS))
    )
    if sort_by is not None and sort_by not in known_keys:
        known = ", ".join(known_keys)
        raise UserError(
            f"expected a metric to sort by ({known}), got {sort_by!r}: choose one of them"
        )
    return sorted(
        groups.values(),
        key=lambda group: (not group.entries, group.protocol, group.version, -len(group.rows)),
    )


def _tell_apart(groups: Sequence[Group]) -> None:
    """Say in the titles of tables of one protocol what they differ in."""
    for group in groups:
        same = [
            one for one in groups if (one.protocol, one.version) == (group.protocol, group.version)
        ]
        differing = [
            fact
            for place, fact in enumerate(group.facts)
            if any(one.facts[place] != fact for one in same)
        ]
        group.apart = ", ".join(differing)


def mean_curve(curves: Sequence[Value | None]) -> list[float]:
    """Mean of curves, cut to the shortest and to the first value that is not defined."""
    lists = [
        [math.nan if v is None else v for v in curve]
        for curve in curves
        if isinstance(curve, list) and curve
    ]
    mean = [fmean(values) for values in zip(*lists, strict=False)]
    end = next((i for i, value in enumerate(mean) if math.isnan(value)), len(mean))
    return mean[:end]


def _columns(rows: Sequence[ResultRow]) -> list[str]:
    found = {
        key
        for row in rows
        for key, value in row.metrics.items()
        if value is not None and not _is_curve(value)
    }
    return [key for key in METRICS if key in found] + sorted(found - set(METRICS))


def _is_curve(value: Any) -> bool:
    return isinstance(value, list)


def _protocol(row: ResultRow) -> tuple[str, int]:
    return row.protocol, row.protocol_version


def _setting(row: ResultRow) -> tuple[str, ...]:
    """What a protocol fixes, for whoever changes its file and leaves its version."""
    protocol = row.config.get("protocol")
    faces = protocol.get("faces") if isinstance(protocol, Mapping) else None
    return tuple(str(value) for value in (row.config.get("size_px"), row.config.get("fps"), faces))


def _without_repeats(rows: Sequence[ResultRow]) -> list[ResultRow]:
    """A file that is named twice, or lies in two folders, is one run."""
    return list({json.dumps(row.to_dict(), sort_keys=True): row for row in rows}.values())


def _sampler(row: ResultRow) -> dict[str, Any]:
    return {key: value for key, value in row.sampler.items() if key != "seed"}


def _entries(rows: list[ResultRow]) -> list[Entry]:
    """One entry per method; a method that was sampled in several ways is told apart by what
    differs.
    """
    entries: dict[str, list[ResultRow]] = {}
    for row in rows:
        samplers = [_sampler(other) for other in rows if other.method == row.method]
        own = _sampler(row)
        differing = [key for key in own if any(other.get(key) != own[key] for other in samplers)]
        suffix = f" ({', '.join(f'{key} {own[key]}' for key in differing)})" if differing else ""
        entries.setdefault(row.method + suffix, []).append(row)
    return [Entry(name, members) for name, members in entries.items()]


def _warnings(group: Group) -> list[str]:
    warnings = []
    sources = {
        json.dumps(source, sort_keys=True): source
        for row in group.rows
        if (source := _frame_source(row))
    }
    if len(sources) > 1:
        warnings.append(
            "Frames come from "
            f"{' and '.join(' / '.join(source.values()) for source in sources.values())} "
            "(generated / "
            "true): compression alone moves FID, FVD and sharpness; score all of them from files "
            "of one kind"
        )
    for key, cell in group.ground_truth.items():
        # Frechet distances of the truth to itself are zero up to rounding: relative to what they
        # measure.
        scale = max(
            abs(cell.mean),
            *(abs(c.mean) for e in group.entries if (c := e.cell(key)) is not None),
            1e-9,
        )
        values = [
            value
            for row in group.rows
            if isinstance(value := row.ground_truth.get(key), int | float)
        ]
        if len(values) > 1 and max(values) - min(values) > GROUND_TRUTH_TOLERANCE * scale:
            label = metric_of(key).label
            warnings.append(
                f"{label} of the ground truth lies between {min(values):.4g} and "
                f"{max(values):.4g}: "
                "these rows did not score the same true clips, do not compare them"
            )
    return warnings


def _frame_source(row: ResultRow) -> dict[str, str] | None:
    source = row.config.get("frame_source")
    return (
        {key: str(value) for key, value in sorted(source.items())}
        if isinstance(source, Mapping)
        else None
    )


def _sort(group: Group, sort_by: str | None) -> None:
    order = (sort_by,) if sort_by is not None else SORT_ORDER
    keys = [
        key
        for key in order
        if key is not None and any(entry.cell(key) is not None for entry in group.entries)
    ]
    group.entries.sort(key=lambda entry: entry.name)
    if not keys:
        return
    group.sort_by = key = keys[0]
    metric = metric_of(key)

    def place(entry: Entry) -> float:
        cell = entry.cell(key)
        return math.inf if cell is None else metric.badness(cell.mean)

    group.entries.sort(key=place)
    for rank, entry in enumerate(group.entries, 1):
        entry.rank = None if entry.cell(key) is None else rank


# -- as text ---------------------------------------------------------------------------------------
# The leaderboard as Markdown and as JSON. Needs no torch.

CLAIMED = "claimed, not measured"
APART = (
    "Tables are never to be compared with one another: protocol, extractors, clips asked for and "
    "frames per clip "
    "each move every number."
)


def to_markdown(groups: Sequence[Group], heading: str = "Leaderboard") -> str:
    """Tables of all groups, with the ground truth first, the failures, and the published figures
    apart.
    """
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
                            for key in (*group.columns, *SPEEDS)
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
        f"{group.num_attempted} clips asked for, {group.num_frames} frames each, "
        f"{' / '.join(sizes)}; "
        f"extractors {group.fingerprint}: {extractor_names(group)}."
    )


def extractor_names(group: Group) -> str:
    """``fid embedded-image 1a2b3c4d, ...``."""
    names = (
        (f"{metric} {entry['name']} {entry['sha256'][:8]}")
        for metric, entry in group.extractors.items()
    )
    return ", ".join(names) or "none"


def notes(group: Group) -> list[str]:
    """What the rows say that a reader must know, each once."""
    found = [str(note) for row in group.rows for note in row.config.get("notes", ())]
    return [*group.warnings, *dict.fromkeys(found)]


def claimed_text(row: ResultRow, key: str) -> str:
    """A published figure, or a dash."""
    value = row.speed.get(key) if key in SPEEDS else row.metrics.get(key)
    return f"{value:g}" if isinstance(value, int | float) else "–"


def _group(group: Group) -> list[str]:
    columns = group.columns
    lines = [about(group), ""]
    lines += [f"> **Note:** {note}" for note in notes(group)]
    if notes(group):
        lines.append("")
    keys = [*group.speeds, *columns]
    headings = ["#", "method", "runs", "clips", "failed"]
    headings += [f"{metric_of(key).label} {metric_of(key).arrow}".strip() for key in keys]
    if group.entries:
        truth = group.ground_truth
        lines += [_row(headings), _row(["--:", "---", *["--:"] * (len(headings) - 2)])]
        cells = [truth[key].text(group.decimals(key)) if key in truth else "–" for key in columns]
        lines.append(
            _row(
                [
                    "",
                    "*ground truth*",
                    *[""] * (len(keys) - len(columns) + 3),
                    *(f"*{cell}*" for cell in cells),
                ]
            )
        )
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
            lines.append(
                _row([(f"{_escape(row.method)} ({CLAIMED})"), *values, _escape(str(row.source))])
            )
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
