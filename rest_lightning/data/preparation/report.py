"""``report.html``: what is in a dataset, to be seen in a minute. One self-contained page, no script
from elsewhere.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Sequence
from html import escape
from io import BytesIO
from pathlib import Path

import numpy as np

from rest_lightning.data.layout import clip_path
from rest_lightning.data.preparation.rows import FILTERS, Row
from rest_lightning.data.preparation.summary import (
    Group,
    Score,
    Summary,
    duration,
    hours_of,
    limits_text,
    summarize,
)
from rest_lightning.errors import UserError
from rest_lightning.media.files import write_text_atomic
from rest_lightning.media.html import data_uri, fill_page, histogram

# pictures of kept clips, and of each filter's dropped ones: a megabyte in all
MAX_KEPT, MAX_DROPPED = 48, 12
MAX_IDENTITIES, MAX_FAILED = 100, 200
NUM_BINS = 32

STYLE = """
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 12px; margin-top: 22px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 14px 16px; }
.tile b { display: block; font-size: 27px; line-height: 1.2; letter-spacing: -.02em; }
.tile span { color: var(--soft); font-size: 13px; }
.share { display: flex; height: 14px; border-radius: 99px; overflow: hidden; margin: 16px 0 8px;
  background: var(--line); }
.share i { display: block; min-width: 2px; }
.keys { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 0; padding: 0; list-style: none; font-size: 13px; }
.b0 { background: var(--c0); } .b1 { background: var(--c1); } .b2 { background: var(--c7); }
.soft { color: var(--soft); font-weight: 400; }
.v0 { background: var(--c2); } .v1 { background: var(--c3); }
svg .c0 { fill: var(--c0); } svg .c1 { fill: var(--c1); }
td.bar { width: 30%; min-width: 120px; text-align: left; }
td.bar i { display: block; height: 9px; border-radius: 3px; min-width: 2px; }
td.why { text-align: left; white-space: normal; color: var(--soft); font-size: 13px; overflow-wrap: anywhere; }
.histograms { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 20px 26px; }
.filters { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 560px), 1fr)); gap: 4px 32px; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(84px, 1fr)); gap: 10px 8px;
  margin: 6px 0 18px; }
.sheet img { width: 100%; aspect-ratio: 1; border-radius: 8px; display: block; background: var(--stripe); }
.sheet figcaption { font-size: 11px; line-height: 1.35; margin-top: 3px; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
.sheet figcaption b { color: var(--ink); font-weight: 600; }
.lists { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 26px; }
.lists .scroll { max-height: 520px; overflow-y: auto; }
"""


def write_report(out: str | os.PathLike[str]) -> Path:
    """Write ``<out>/report.html``, whole or not at all.

    Args:
        out: folder of a dataset; one that `rest prepare` did not make shows what its manifest and
            sidecars know.

    Raises:
        UserError: no dataset in this folder, or it cannot be written.
    """
    summary = summarize(out)
    path = summary.out / "report.html"
    try:
        write_text_atomic(path, to_html(summary))
    except OSError as error:
        raise UserError(
            f"expected to write {path}, got '{error.strerror}': free some space"
        ) from None
    return path


def to_html(summary: Summary) -> str:
    """The page."""
    size = (
        (f", {summary.size_px}×{summary.size_px} pixels at 25 frames per second")
        if summary.size_px
        else ""
    )
    lead = escape(f"{summary.kind.capitalize()}{size}.")
    if not summary.filters_known:
        lead += " There is no prepare.jsonl here: what was left out, and why, is not known."
    sections = [
        _tiles(summary),
        _left_out(summary),
        _kept_sheet(summary),
        _people(summary),
        _histograms(summary.scores),
        _dropped_sheets(summary),
        _failed(summary.rows),
    ]
    name = summary.out.resolve().name
    return fill_page(
        name,
        lead,
        filter(None, sections),
        ("Made by rest prepare; colours follow the system's."),
        STYLE,
    )


def _tiles(summary: Summary) -> str:
    num_identities = len(summary.identities)
    tiles = [
        (f"{summary.num_videos:,}", "videos"),
        (f"{summary.count('kept'):,}", "clips kept"),
        (duration(summary.hours), "of video kept"),
        (f"{num_identities:,}", "identity" if num_identities == 1 else "identities"),
    ]
    if summary.filters_known:
        tiles.append((f"{summary.count('dropped'):,}", "clips dropped by a filter"))
        tiles.append((f"{summary.count('failed'):,}", "videos or parts that failed"))
    cells = "".join(
        f'<div class="tile"><b>{value}</b><span>{what}</span></div>' for value, what in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _left_out(summary: Summary) -> str:
    if not summary.filters_known:
        return ""
    counts = [(status, summary.count(status)) for status in ("kept", "dropped", "failed")]
    total = max(1, len(summary.rows))
    bar = "".join(
        f'<i class="b{i}" style="width:{100 * count / total:.2f}%"></i>'
        for i, (_, count) in enumerate(counts)
        if count
    )
    keys = "".join(
        f'<li><span class="dot b{i}"></span>{count:,} {status} ({100 * count / total:.1f} %)</li>'
        for i, (status, count) in enumerate(counts)
    )
    most = max((group.num_clips for group in summary.left_out), default=1)
    rows = "".join(_left_out_row(group, most) for group in summary.left_out)
    table = (
        '<div class="scroll" style="margin-top:16px"><table class="sortable"><thead><tr>'
        + "".join(
            _head(text, first)
            for text, first in (("", None), ("rows", "descending"), ("length", "descending"))
        )
        + (
            '<th scope="col"></th><th scope="col" style="text-align:left">for '
            "example</th></tr></thead>"
        )
        + f"<tbody>{rows}</tbody></table></div>"
        if rows
        else "<p>Nothing was left out.</p>"
    )
    head = f'<h2>Kept and left out</h2><div class="share">{bar}</div><ul class="keys">{keys}</ul>'
    return f"<section>{head}{table}</section>"


def _left_out_row(group: Group, most: int) -> str:
    look = "b2" if group.name.startswith("failed") else "b1"
    return (
        f'<tr><th scope="row" data-value="{escape(group.name)}">{escape(group.name)}</th>'
        f'<td data-value="{group.num_clips}">{group.num_clips:,}</td>'
        f'<td data-value="{group.hours:.6f}">{duration(group.hours) if group.hours else "–"}</td>'
        f'<td class="bar"><i class="{look}" '
        f'style="width:{100 * group.num_clips / most:.1f}%"></i></td>'
        f'<td class="why">{escape(group.example)}</td></tr>'
    )


def _kept_sheet(summary: Summary) -> str:
    """Kept clips, one of every identity before a second of any."""
    turns: dict[str, int] = {}
    order = []
    for row in sorted(summary.kept, key=lambda row: (row.identity or "", row.clip_id or "")):
        turn = turns.get(row.identity or "", 0)
        turns[row.identity or ""] = turn + 1
        order.append((turn, row))
    order.sort(key=lambda pair: pair[0])
    num_first = sum(turn == 0 for turn, _ in order)
    rows = [row for _, row in order]
    shown = _spread(rows[:num_first], MAX_KEPT) if num_first > MAX_KEPT else rows[:MAX_KEPT]
    if not shown:
        return (
            "<section><h2>Kept clips</h2><p>None: lower a threshold that the table above "
            "names.</p></section>"
        )
    note = f"{len(shown)} of {len(rows):,}" if len(shown) < len(rows) else f"all {len(rows)}"
    pictures = [
        _figure(summary.out, row, row.identity or "", duration(hours_of([row]))) for row in shown
    ]
    return (
        f"<section><h2>Kept clips</h2><h3>{note}</h3><div "
        f'class="sheet">{"".join(pictures)}</div></section>'
    )


def _dropped_sheets(summary: Summary) -> str:
    parts = []
    for name in FILTERS:
        rows = [row for row in summary.rows if row.status == "dropped" and row.filter == name]
        if not rows:
            continue
        # from one extreme to the other
        rows.sort(key=lambda row: (row.scores.get(name) or 0.0, row.clip_id or ""))
        shown = _spread(rows, MAX_DROPPED)
        limits = next((limits_text(score) for score in summary.scores if score.name == name), "")
        heading = (
            (f"{name}: {len(shown)} of {len(rows):,}")
            if len(shown) < len(rows)
            else f"{name}: {len(rows)}"
        )
        pictures = [
            _figure(summary.out, row, _score_text(row, name), row.source, row.reason)
            for row in shown
        ]
        note = f' <span class="soft">kept: {escape(limits)}</span>' if limits else ""
        parts.append(
            f"<div><h3>{escape(heading)}{note}</h3><div "
            f'class="sheet">{"".join(pictures)}</div></div>'
        )
    return (
        (f'<section><h2>Dropped clips</h2><div class="filters">{"".join(parts)}</div></section>')
        if parts
        else ""
    )


def _figure(out: Path, row: Row, first: str, second: str, title: str | None = None) -> str:
    uri = _picture(out, row)
    image = f'<img loading="lazy" src="{uri}" alt="">' if uri else '<img alt="">'
    text = escape(title or f"{row.clip_id} of {row.source}", quote=True)
    caption = f"<figcaption><b>{escape(first)}</b><br>{escape(second)}</figcaption>"
    return f'<figure title="{text}">{image}{caption}</figure>'


def _picture(out: Path, row: Row) -> str | None:
    """The thumbnail, or where there is none the middle frame; None where neither can be read."""
    try:
        if row.thumbnail is not None:
            return data_uri(out / row.thumbnail)
        if row.clip_id is None or not clip_path(out, row.clip_id).is_file():
            return None
        from PIL import Image

        from rest_lightning.media.video import VideoFile

        with VideoFile(clip_path(out, row.clip_id)) as video:
            frame = video.read(video.num_frames // 2, 1)[0]
        content = BytesIO()
        Image.fromarray(frame).resize((128, 128), Image.Resampling.BOX).save(
            content, "JPEG", quality=85
        )
        return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
    except UserError:
        return None


def _histograms(scores: Sequence[Score]) -> str:
    figures = []
    for score in scores:
        if len(score.values) < 2:
            continue
        low, high, bars = bins_of(score)
        num_failing = int(score.failing.sum())
        caption = (
            (f"{num_failing:,} of {len(score.values):,} beyond the threshold")
            if score.limits
            else "no threshold"
        )
        svg = histogram(bars, low, high, score.what, "clips", [limit for _, limit in score.limits])
        figures.append(
            f"<figure><h3>{escape(score.name)}</h3>{svg}<figcaption>{caption}</figcaption></figure>"
        )
    if not figures:
        return ""
    keys = (
        '<li><span class="dot b0"></span>within the threshold</li><li><span class="dot '
        'b1"></span>beyond it</li>'
    )
    note = (
        "Values in the outermost 0.5 % stand in the last bars. A clip that an early filter drops "
        "has no later scores."
    )
    return (
        f'<section><h2>Scores</h2><ul class="keys" style="margin-bottom:14px">{keys}</ul>'
        f'<div class="histograms">{"".join(figures)}</div><p class="keys soft">{note}</p></section>'
    )


def bins_of(score: Score) -> tuple[float, float, list[tuple[int, int]]]:
    """Low and high edge, and per bin how many values are within and beyond the limits; every value
    is counted.
    """
    inner = np.percentile(score.values, [0.5, 99.5]).tolist()
    known = [*inner, *(limit for _, limit in score.limits)]
    low, high = min(known), max(known)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    margin = 0.02 * (high - low)
    low, high = low - margin if low < 0 else max(0.0, low - margin), high + margin
    edges = np.linspace(low, high, NUM_BINS + 1)
    inside = np.clip(score.values, low, high)
    good = np.histogram(inside[~score.failing], edges)[0].tolist()
    bad = np.histogram(inside[score.failing], edges)[0].tolist()
    return low, high, list(zip(good, bad, strict=True))


def _people(summary: Summary) -> str:
    most = max((group.hours for group in summary.identities), default=0.0) or 1.0
    shown = summary.identities[:MAX_IDENTITIES]
    rows = "".join(
        f'<tr><th scope="row" data-value="{escape(g.name)}" '
        f'title="{escape(g.name)}">{escape(g.name)}</th>'
        f'<td data-value="{escape(g.split)}">{escape(g.split)}</td><td '
        f'data-value="{g.num_clips}">{g.num_clips:,}</td>'
        f'<td data-value="{g.hours:.6f}">{duration(g.hours)}</td>'
        f'<td class="bar"><i class="b0" style="width:{100 * g.hours / most:.1f}%"></i></td></tr>'
        for g in shown
    )
    heads = [
        _head(text, first)
        for text, first in (("identity", None), ("split", None), ("clips", "descending"))
    ]
    heads += [_head("length", "descending"), '<th scope="col"></th>']
    more = len(summary.identities) - len(shown)
    note = (
        (f"<p>The {len(shown)} with the most video; {more:,} more have less.</p>")
        if more > 0
        else ""
    )
    people = (
        f"<div><h2>Identities</h2>{note}"
        f'<div class="scroll"><table class="sortable"><thead><tr>{"".join(heads)}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></div>"
    )
    return f'<section><div class="lists">{people}{_splits(summary.splits)}</div></section>'


def _splits(splits: Sequence[Group]) -> str:
    total = sum(group.hours for group in splits) or 1.0
    looks = ("b0", "v0", "v1")
    bar = "".join(
        f'<i class="{look}" style="width:{100 * group.hours / total:.2f}%"></i>'
        for group, look in zip(splits, looks, strict=True)
        if group.hours
    )
    rows = "".join(
        '<tr><th scope="row"><span class="dot '
        f'{look}"></span>{group.name}</th><td>{group.num_identities:,}</td>'
        f"<td>{group.num_clips:,}</td><td>{duration(group.hours)}</td><td>{100 * group.hours / total:.1f} %</td></tr>"
        for group, look in zip(splits, looks, strict=True)
    )
    heads = "".join(
        f'<th scope="col">{text}</th>' for text in ("", "identities", "clips", "length", "share")
    )
    return (
        f'<div><h2>Splits</h2><div class="share">{bar}</div><div '
        f'class="scroll"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div><p>No identity is in two of "
        f"them.{_empty_text(splits)}</p></div>"
    )


def _empty_text(splits: Sequence[Group]) -> str:
    """What to do about splits without a clip; nothing when there are none."""
    empty = [group.name for group in splits if not group.num_clips]
    if not empty:
        return ""
    names = " and ".join(empty)
    return (
        f" None was drawn for {names}: splits are drawn person by person, so a set of few people "
        "needs a larger "
        "fraction, or a part of its own."
    )


def _failed(rows: Iterable[Row]) -> str:
    failed = [row for row in rows if row.status == "failed"]
    if not failed:
        return ""
    items = [
        (f"<li><b>{escape(row.source)}</b> ({row.stage}): {escape(row.reason or '')}</li>")
        for row in failed
    ]
    more = (
        (f"<li>… and {len(items) - MAX_FAILED:,} more in prepare.jsonl</li>")
        if len(items) > MAX_FAILED
        else ""
    )
    return (
        f"<section><h2>Failed</h2><details{' open' if len(items) <= 20 else ''}><summary>{len(items):,} videos or parts"
        f"</summary><ul>{''.join(items[:MAX_FAILED])}{more}</ul></details></section>"
    )


def _score_text(row: Row, name: str) -> str:
    score = row.scores.get(name)
    return f"{score:.3g}" if score is not None else name


def _head(text: str, first: str | None) -> str:
    order = f' data-first="{first}"' if first else ""
    return f'<th scope="col"{order}><button type="button">{text}</button></th>'


def _spread(rows: Sequence[Row], count: int) -> list[Row]:
    """Up to ``count`` rows, evenly spread."""
    if len(rows) <= count:
        return list(rows)
    return [rows[i] for i in np.linspace(0, len(rows) - 1, count).round().astype(int).tolist()]
