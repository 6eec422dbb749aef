"""Pages that stand alone: the shell that all of them share, pictures and clips as data URIs, small
plots as SVG.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

from rest_lightning.errors import UserError

TEMPLATE = Path(__file__).with_name("page.html")
MEDIA_TYPES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".gif": "image/gif",
    ".mp4": "video/mp4",
    ".webm": "video/webm",
}


def fill_page(
    title: str, lead: str, sections: Iterable[str], footer: str = "", style: str = ""
) -> str:
    """A page of the house's look.

    Args:
        title: heading, plain text.
        lead: HTML below it.
        sections: HTML.
        footer: last line, plain text.
        style: further CSS.
    """
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(title),
        lead=lead,
        sections="\n".join(sections),
        footer=escape(footer),
        colours=style,
    )


def data_uri(path: Path) -> str:
    """A file as ``data:<type>;base64,...``."""
    kind = MEDIA_TYPES.get(path.suffix.lower())
    if kind is None:
        known = ", ".join(MEDIA_TYPES)
        raise UserError(f"expected a picture or clip ({known}), got {path}: convert it")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"expected a picture or clip {path}, got '{error.strerror}': check the name"
        ) from None
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# -- plots -----------------------------------------------------------------------------------------

WIDTH, HEIGHT = 560, 340
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 16, 46
NUM_COLOURS = 8
MAX_LABELS = 10  # more points get numbers
REAL_TIME_FPS = 25.0


@dataclass(frozen=True)
class Point:
    """A marker; ``label`` stands beside it, ``colour`` is a number of the page's palette."""

    label: str
    x: float
    y: float
    colour: int


@dataclass(frozen=True)
class Series:
    """A line through values one step apart, the first at one step; the dashed grey one is the
    ground truth.
    """

    label: str
    values: Sequence[float]
    colour: int | None


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    start_px: float
    end_px: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        low, high, value = (
            math.log(v) if self.logarithmic else v for v in (self.low, self.high, value)
        )
        return self.start_px + (value - low) / (high - low) * (self.end_px - self.start_px)


def scatter(points: Sequence[Point], x_label: str, y_label: str, truth: float | None = None) -> str:
    """Quality against speed: logarithmic x, a line at real time, the ground truth's level
    dashed.
    """
    speeds = [*(point.x for point in points), REAL_TIME_FPS]
    x_axis = _Axis(min(speeds) / 1.35, max(speeds) * 1.35, LEFT, WIDTH - RIGHT, logarithmic=True)
    levels = [*(point.y for point in points), *([] if truth is None else [truth])]
    y_axis = _y_axis(levels)
    ticks = [_tick_x(x_axis.place(x), x) for x in _log_ticks(x_axis.low, x_axis.high)]
    parts = [_grid_y(y_axis, y_label), _frame(x_label), *ticks]
    x = x_axis.place(REAL_TIME_FPS)
    parts.append(
        f'<line class="realtime" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
    )
    parts.append(f'<text class="note" x="{x + 4:.1f}" y="{TOP + 10}">real time</text>')
    if truth is not None:
        y = y_axis.place(truth)
        parts.append(
            f'<line class="truth" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(
            f'<text class="note" x="{WIDTH - RIGHT - 4}" y="{y - 5:.1f}" text-anchor="end">ground '
            "truth</text>"
        )
    places = [(x_axis.place(point.x), y_axis.place(point.y)) for point in points]
    for point, (x, y) in zip(points, places, strict=True):
        text = escape(f"{point.label}: {point.y:.3g} at {point.x:.1f}")
        parts.append(
            f'<circle class="c{point.colour % NUM_COLOURS}" cx="{x:.1f}" cy="{y:.1f}" r="5.5">'
        )
        parts.append(f"<title>{text}</title></circle>")
    # Many names would hide the picture: then numbers, counted from 1, stand for them.
    many = len(points) > MAX_LABELS
    labels = [str(point.colour + 1) if many else point.label for point in points]
    parts += _place_labels(labels, places)
    return _svg(parts, f"{y_label} against {x_label}")


def lines(series: Sequence[Series], step_name: str, y_label: str) -> str:
    """Curves over time, one value per ``step_name`` (second or minute)."""
    length = max(len(one.values) for one in series)
    x_axis = _Axis(0.0, max(length, 1), LEFT, WIDTH - RIGHT)
    y_axis = _y_axis([value for one in series for value in one.values])
    ticks = [_tick_x(x_axis.place(x), x) for x in _ticks(0, length, 8)]
    parts = [_grid_y(y_axis, y_label), _frame(f"{step_name}s"), *ticks]
    for one in series:
        points = " ".join(
            f"{x_axis.place(i + 1):.1f},{y_axis.place(v):.1f}" for i, v in enumerate(one.values)
        )
        look = "truth" if one.colour is None else f"c{one.colour % NUM_COLOURS}"
        parts.append(
            f'<polyline class="curve {look}" '
            f'points="{points}"><title>{escape(one.label)}</title></polyline>'
        )
    return _svg(parts, f"{y_label} over time")


def histogram(
    bars: Sequence[tuple[int, int]],
    low: float,
    high: float,
    x_label: str,
    y_label: str,
    limits: Sequence[float] = (),
) -> str:
    """Bars of equal width between ``low`` and ``high``.

    Args:
        bars: of each bin what is within the limits, and what is not, which stands on top in the
            second colour.
        low, high: edges of the first and the last bin.
        x_label, y_label: of the axes.
        limits: dashed lines.
    """
    x_axis = _Axis(low, high, LEFT, WIDTH - RIGHT)
    y_axis = _Axis(0.0, 1.08 * max(1, *(sum(bar) for bar in bars)), HEIGHT - BOTTOM, TOP)
    parts = [_grid_y(y_axis, y_label), _frame(x_label)]
    parts += [_tick_x(x_axis.place(value), value) for value in _ticks(low, high, 6)]
    width = (high - low) / len(bars)
    for number, (good, bad) in enumerate(bars):
        left, right = x_axis.place(low + number * width), x_axis.place(low + (number + 1) * width)
        text = f"{low + number * width:.4g} to {low + (number + 1) * width:.4g}: {good + bad}"
        for count, below, look in ((good, 0, "c0"), (bad, good, "c1")):
            if count:
                top, bottom = y_axis.place(below + count), y_axis.place(below)
                parts.append(
                    f'<rect class="{look}" x="{left + 0.7:.1f}" y="{top:.1f}" '
                    f'width="{right - left - 1.4:.1f}" '
                    f'height="{bottom - top:.1f}"><title>{text}</title></rect>'
                )
    for limit in limits:
        x = x_axis.place(limit)
        parts.append(
            f'<line class="truth" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        )
        end = ' text-anchor="end"' if x > (LEFT + WIDTH) / 2 else ""
        at = x - 5 if end else x + 5
        parts.append(
            f'<text class="note" x="{at:.1f}" y="{TOP + 10}"{end}>threshold {limit:g}</text>'
        )
    return _svg(parts, f"{y_label} by {x_label}")


def _svg(parts: Sequence[str], title: str) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
    return head + "".join(parts) + "</svg>"


def _y_axis(values: Sequence[float]) -> _Axis:
    low, high = min(values), max(values)
    margin = 0.1 * (high - low) or 0.1 * abs(high) or 1.0
    # zero is part of the picture where it is near
    floor = 0.0 if 0.0 <= low < 0.4 * high else low - margin
    return _Axis(floor, high + margin, HEIGHT - BOTTOM, TOP)


def _grid_y(axis: _Axis, label: str) -> str:
    parts = []
    for value in _ticks(axis.low, axis.high, 5):
        y = axis.place(value)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text class="axis" transform="translate(15 {middle:.0f}) rotate(-90)" '
        'text-anchor="middle">'
        f"{escape(label)}</text>"
    )
    return "".join(parts)


def _frame(x_label: str) -> str:
    y = HEIGHT - BOTTOM
    middle = (LEFT + WIDTH - RIGHT) / 2
    return (
        f'<line class="base" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
        f'<text class="axis" x="{middle:.0f}" y="{HEIGHT - 8}" '
        f'text-anchor="middle">{escape(x_label)}</text>'
    )


def _tick_x(x: float, value: float) -> str:
    y = HEIGHT - BOTTOM
    return (
        f'<line class="base" x1="{x:.1f}" x2="{x:.1f}" y1="{y}" y2="{y + 4}"/>'
        f'<text x="{x:.1f}" y="{y + 17}" text-anchor="middle">{value:g}</text>'
    )


def _place_labels(labels: Sequence[str], places: Sequence[tuple[float, float]]) -> list[str]:
    """Texts at their markers: right, left, above or below, where neither another text, a marker nor
    the edge is in the way; a thin line leads to those that found room a little further off alone.
    """
    taken = [(x - 7.0, y - 7.0, x + 7.0, y + 7.0) for x, y in places]
    parts: list[str] = []
    for label, (x, y) in zip(labels, places, strict=True):
        width, height = 6.6 * len(label), 13.0
        best: tuple[float, float, float, tuple[float, float, float, float]] | None = None
        for step in range(7):
            away = 10.0 + 13.0 * step
            for left, top in (
                (x + away, y - height / 2),
                (x - away - width, y - height / 2),
                (x - width / 2, y - away - height),
                (x - width / 2, y + away),
                (x + 10.0, y + away - height / 2),
                (x + 10.0, y - away - height / 2),
                (x - 10.0 - width, y + away - height / 2),
                (x - 10.0 - width, y - away - height / 2),
            ):
                box = (left, top, left + width, top + height)
                crossed = sum(_overlap(box, other) for other in taken)
                outside = _area(box) - _overlap(box, (LEFT, TOP, WIDTH - 2, HEIGHT - BOTTOM))
                cost = crossed + 4 * outside + 0.01 * away
                if best is None or cost < best[0]:
                    best = (cost, left, top, box)
            if best is not None and best[0] < 1.0:
                break
        assert best is not None
        _, left, top, box = best
        taken.append(box)
        near_x, near_y = min(max(x, left), left + width), min(max(y, top), top + height)
        if math.hypot(near_x - x, near_y - y) > 14:
            parts.append(
                f'<line class="grid" x1="{x:.1f}" y1="{y:.1f}" '
                f'x2="{near_x:.1f}" y2="{near_y:.1f}"/>'
            )
        parts.append(
            f'<text class="label" x="{left:.1f}" y="{top + 10.5:.1f}">{escape(label)}</text>'
        )
    return parts


_Box = tuple[float, float, float, float]  # left, top, right, bottom


def _area(box: _Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _overlap(one: _Box, other: _Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers in [low, high]."""
    rough = (high - low) / max(1, count)
    if rough <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten in [low, high]; the powers alone over more than three
    decades.
    """
    factors = (1, 2, 5) if high / low < 1000 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [value for power in powers for m in factors if low <= (value := m * 10.0**power) <= high]
