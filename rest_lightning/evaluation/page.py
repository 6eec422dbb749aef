"""The leaderboard as one self-contained HTML page: no script, font, image or clip from elsewhere.
Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from rest_lightning.evaluation.leaderboard import (
    APART,
    CLAIMED,
    SPEED,
    SPEEDS,
    Entry,
    Group,
    claimed_text,
    metric_of,
    notes,
)
from rest_lightning.evaluation.row import ResultRow
from rest_lightning.media.html import (
    MAX_LABELS,
    MEDIA_TYPES,
    NUM_COLOURS,
    Point,
    Series,
    data_uri,
    fill_page,
    lines,
    scatter,
)

MAX_CURVES = NUM_COLOURS
TRUTH = "ground truth"
Media = Mapping[str, Sequence[Path]]


def to_html(
    groups: Sequence[Group],
    media: Media | None = None,
    title: str = "Leaderboard",
    footer: str = "",
) -> str:
    """The page.

    Args:
        groups: of :func:`make_board`.
        media: method -> pictures and clips to embed as data URIs.
        title: heading.
        footer: last line.

    Raises:
        UserError: a picture or clip that cannot be read, or of a kind that browsers do not show.
    """
    colours = "".join(
        f"svg circle.c{i}, .dot.c{i} {{ fill: var(--c{i}); background: var(--c{i}); }} "
        f"svg .curve.c{i} {{ stroke: var(--c{i}); }} "
        for i in range(NUM_COLOURS)
    )
    lead = escape(APART) + " Click a heading to sort; green is the best of a column."
    return fill_page(
        title, lead, (_section(group, media or {}) for group in groups), footer, colours
    )


def _section(group: Group, media: Media) -> str:
    parts = [f"<section><h2>{escape(group.title)}</h2>", _chips(group)]
    parts += [f'<p class="note">{escape(note)}</p>' for note in notes(group)]
    if group.entries:
        parts += [_table(group), _plots(group)]
    parts += [
        _claims(group),
        _media(group, media),
        _failures(group),
        _extractors(group),
        "</section>",
    ]
    return "\n".join(part for part in parts if part)


def _chips(group: Group) -> str:
    if not group.entries:
        return '<ul class="chips"><li>published figures alone: nothing was measured</li></ul>'
    sizes = sorted({f"{row.config['size_px']} px, {row.config['fps']} fps" for row in group.rows})
    chips = [
        f"<b>{group.num_attempted}</b> clips asked for",
        f"<b>{group.num_frames}</b> frames each",
        *map(escape, sizes),
        f"extractors <code>{group.fingerprint}</code>",
    ]
    return f'<ul class="chips">{"".join(f"<li>{chip}</li>" for chip in chips)}</ul>'


def _table(group: Group) -> str:
    keys = [*group.speeds, *group.columns]
    heads = [
        _head("method", None),
        _head("runs", "high"),
        _head("clips", "high"),
        _head("failed", "low"),
    ]
    heads += [
        _head((f"{metric_of(key).label} {metric_of(key).arrow}"), metric_of(key).goal)
        for key in keys
    ]
    best = {key: group.best(key) for key in keys}
    rows = [_truth_row(group)]
    for number, entry in enumerate(group.entries):
        look = ' class="failed"' if entry.num_failures else ""
        cells = [
            f'<td data-value="{len(entry.rows)}">{len(entry.rows)}</td>',
            f'<td data-value="{entry.rows[0].num_clips}">{entry.num_clips}</td>',
            f'<td{look} data-value="{entry.num_failures}">{entry.num_failures}</td>',
            *(_cell(entry, key, best[key] is entry, group.decimals(key)) for key in keys),
        ]
        rank = "–" if entry.rank is None else str(entry.rank)
        name = escape(entry.name)
        head = (
            f'<th scope="row" data-value="{name}" title="{name}"><span class="rank">{rank}</span>'
            f'<span class="dot c{number % NUM_COLOURS}"></span>{name}</th>'
        )
        rows.append(f"<tr>{head}{''.join(cells)}</tr>")
    return (
        f'<div class="scroll"><table class="sortable"><thead><tr>{"".join(heads)}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _head(text: str, goal: str | float | None) -> str:
    first = ' data-first="descending"' if goal == "high" else ""
    return f'<th scope="col"{first}><button type="button">{escape(text.strip())}</button></th>'


def _truth_row(group: Group) -> str:
    truth = group.ground_truth
    cells = [
        f"<td>{truth[key].text(group.decimals(key)) if key in truth else '–'}</td>"
        for key in group.columns
    ]
    label = f'<th scope="row"><span class="rank"></span>{TRUTH}</th>'
    return f'<tr class="truth">{label}{"<td></td>" * (3 + len(group.speeds))}{"".join(cells)}</tr>'


def _cell(entry: Entry, key: str, is_best: bool, decimals: int) -> str:
    cell = entry.cell(key)
    if cell is None:
        return '<td data-value="">–</td>'
    spread = "" if cell.spread is None else f" <small>± {cell.spread:.{decimals}f}</small>"
    look = ' class="best"' if is_best else ""
    return f'<td{look} data-value="{cell.mean!r}">{cell.mean:.{decimals}f}{spread}</td>'


def _plots(group: Group) -> str:
    figures = [_quality_and_speed(group), *(_drift(group, key) for key in group.curves)]
    figures = [figure for figure in figures if figure]
    return f'<div class="plots">{"".join(figures)}</div>' if figures else ""


def _quality_and_speed(group: Group) -> str:
    key = group.sort_by if group.sort_by not in SPEEDS else None
    if key is None:
        return ""
    points = []
    for number, entry in enumerate(group.entries):
        quality, speed = entry.cell(key), entry.cell(SPEED)
        if quality is not None and speed is not None and speed.mean > 0:
            points.append(Point(entry.name, speed.mean, quality.mean, number))
    if not points:
        return ""
    metric, truth = metric_of(key), group.ground_truth.get(key)
    svg = scatter(
        points,
        ("frames per second, end to end"),
        metric.label,
        None if truth is None else truth.mean,
    )
    many = len(points) > MAX_LABELS
    key_to_names = " Numbers are places in the table's first order." if many else ""
    better = {"low": "lower", "high": "higher"}.get(str(metric.goal), "nearer to the truth")
    return (
        f"<figure><h3>Quality against speed</h3>{svg}"
        f"<figcaption>{escape(metric.label)}: {better} is better; further right is "
        f"faster.{key_to_names}</figcaption></figure>"
    )


def _drift(group: Group, key: str) -> str:
    name, _, step = key.rpartition("_by_")
    series = [Series(TRUTH, curve, None)] if (curve := group.ground_truth_curve(key)) else []
    shown = [(number, entry) for number, entry in enumerate(group.entries) if entry.curve(key)]
    series += [Series(entry.name, entry.curve(key), number) for number, entry in shown[:MAX_CURVES]]
    if not series:
        return ""
    label = metric_of(name).label if name else key
    legend = [
        f'<li><span class="dash"></span>{TRUTH}</li>'
        if one.colour is None
        else f'<li><span class="dot c{one.colour % NUM_COLOURS}"></span>{escape(one.label)}</li>'
        for one in series
    ]
    left_out = len(shown) - MAX_CURVES
    caption = (
        (f"<figcaption>The first {MAX_CURVES} of {len(shown)} methods.</figcaption>")
        if left_out > 0
        else ""
    )
    heading = label[:1].upper() + label[1:]
    return (
        f"<figure><h3>{escape(heading)} over time</h3>{lines(series, step or 'step', label)}"
        f'<ul class="legend">{"".join(legend)}</ul>{caption}</figure>'
    )


def _claims(group: Group) -> str:
    if not group.claimed:
        return ""
    keys = group.claimed_columns
    heads = [
        _head("method", None),
        *(_head(f"{metric_of(k).label} {metric_of(k).arrow}", metric_of(k).goal) for k in keys),
    ]
    rows = "".join(_claim(row, keys) for row in group.claimed)
    return (
        f'<div class="claims"><h3>Published figures</h3><p>{CLAIMED.capitalize()} here: other '
        "extractors, clips and "
        "code. Read them beside the table, not in it.</p>"
        f'<div class="scroll"><table class="sortable"><thead><tr>{"".join(heads)}'
        '<th scope="col" class="text">source</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div></div>"
    )


def _claim(row: ResultRow, keys: Sequence[str]) -> str:
    name = escape(row.method)
    cells = "".join(
        f'<td data-value="{"" if value is None else value}">{claimed_text(row, key)}</td>'
        for key, value in ((key, row.metrics.get(key)) for key in keys)
    )
    head = f'<th scope="row" data-value="{name}">{name}<span class="claim">claimed</span></th>'
    return f"<tr>{head}{cells}<td>{escape(str(row.source))}</td></tr>"


def _media(group: Group, media: Media) -> str:
    figures = []
    for entry in group.entries:
        for path in dict.fromkeys(path for row in entry.rows for path in media.get(row.method, ())):
            source, name = data_uri(path), escape(entry.name)
            name += ": the worst clips" if path.name.endswith(".worst.png") else ""
            if MEDIA_TYPES[path.suffix.lower()].startswith("video/"):
                shown = (
                    f'<video controls loop playsinline preload="metadata" src="{source}"></video>'
                )
            else:
                shown = f'<img src="{source}" alt="{name}">'
            kind = ' class="clip"' if shown.startswith("<video") else ""
            figures.append(f"<figure{kind}>{shown}<figcaption>{name}</figcaption></figure>")
    return f'<div class="media">{"".join(figures)}</div>' if figures else ""


def _failures(group: Group) -> str:
    items = [
        (
            f"<li><b>{escape(entry.name)}</b>, {escape(failure['clip'])}: "
            f"{escape(failure['reason'])}</li>"
        )
        for entry in group.entries
        for row in entry.rows
        for failure in row.failures
    ]
    return (
        (
            f"<details><summary>{len(items)} failed "
            f"clips</summary><ul>{''.join(items)}</ul></details>"
        )
        if items
        else ""
    )


def _extractors(group: Group) -> str:
    if not group.extractors:
        return ""
    rows = "".join(
        f"<li>{escape(metric)}: {escape(str(entry['name']))} "
        f"<code>{escape(entry['sha256'])}</code></li>"
        for metric, entry in group.extractors.items()
    )
    return f"<details><summary>Extractors and their SHA-256</summary><ul>{rows}</ul></details>"
