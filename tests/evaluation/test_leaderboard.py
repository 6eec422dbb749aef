"""`rest leaderboard`: what may stand in one table, in which order, and a page that needs nothing
but itself.
"""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from statistics import stdev
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from rest_lightning.cli import main
from rest_lightning.commands.score import print_numbers
from rest_lightning.evaluation.leaderboard import Group, make_board, to_markdown
from rest_lightning.evaluation.page import to_html
from rest_lightning.evaluation.row import ResultRow
from rest_lightning.media.html import Point, Series, lines, scatter

Make = Callable[..., dict[str, Any]]
CLAIM = {
    "protocol": "synthetic",
    "protocol_version": 1,
    "method": "Paper",
    "measured": False,
    "source": "arXiv <1>",
}


def board(*rows: dict[str, Any], sort_by: str | None = None) -> list[Group]:
    return make_board([ResultRow.from_dict(row) for row in rows], sort_by)


OTHER_EXTRACTOR = {"fid": {"name": "embedded-image", "sha256": "b" * 64}}


@pytest.mark.parametrize(
    "changes",
    [
        {"protocol": "rest-hdtf"},
        {"protocol_version": 2},
        {"extractors": OTHER_EXTRACTOR},
        {"num_clips": 7},
        {"num_frames": 120},
        {"config": {"size_px": 256, "fps": 25}},
        {"config": {"size_px": 128, "fps": 30}},
        {"config": {"size_px": 128, "fps": 25, "protocol": {"faces": "sidecar"}}},
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_never_in_one_table(
    make_row: Make, changes: dict[str, Any]
) -> None:
    first, second = board(make_row("a", 5.0), make_row("b", 1.0, **changes))
    assert [
        [entry.name for entry in group.entries]
        for group in sorted((first, second), key=lambda g: g.rows[0].method)
    ]
    assert len(first.entries) == len(second.entries) == 1
    assert (
        first.entries[0].rank == second.entries[0].rank == 1
        and first.best("fid") is second.best("fid") is None
    )


def test_a_failed_clip_does_not_move_a_row_to_another_table(make_row: Make) -> None:
    failed = make_row("b", 1.0, num_clips=7, failures=[{"clip": "x", "reason": "no face"}])
    (group,) = board(make_row("a"), failed)
    assert [(entry.name, entry.num_failures, entry.rank) for entry in group.entries] == [
        ("b", 1, 1),
        ("a", 0, 2),
    ]


def test_runs_of_a_method_are_one_entry_with_its_spread(make_row: Make) -> None:
    values = (4.0, 5.0, 9.0)
    rows = [
        make_row("a", value, sampler={"num_steps": 8, "seed": i}) for i, value in enumerate(values)
    ]
    (group,) = board(*rows, make_row("b", 5.5), rows[0])  # the same file twice is one run
    first, second = group.entries
    assert (first.name, second.name) == ("b", "a") and len(second.rows) == 3
    cell = second.cell("fid")
    assert cell is not None and (cell.mean, cell.spread) == (6.0, stdev(values))
    assert cell.text(2) == "6.00 ± 2.65"


@pytest.mark.parametrize(
    ("fid", "decimals"),
    [(245.4, 2), (16.9, 2), (1.5, 2), (0.99, 3), (0.113, 3), (1e-9, 4), (0.0, 2)],
)
def test_columns_of_small_numbers_have_more_decimals(
    make_row: Make, fid: float, decimals: int
) -> None:
    (group,) = board(make_row("a", fid=fid), make_row("b", fid=fid / 7))
    assert group.decimals("fid") == decimals
    assert f" {fid:.{decimals}f} " in to_markdown([group], "").replace("*", "")


def test_samplers_of_a_method_are_told_apart(make_row: Make) -> None:
    rows = [
        make_row("a", fid, sampler={"num_steps": steps, "seed": 0})
        for steps, fid in ((8, 2.0), (4, 3.0))
    ]
    (group,) = board(*rows)
    assert [entry.name for entry in group.entries] == ["a (num_steps 8)", "a (num_steps 4)"]


@pytest.mark.parametrize(
    ("key", "order"),
    [
        ("fid", "abc"),
        ("sync_c", "cba"),
        ("seam_ratio", "bac"),
        ("offset_frames", "cab"),
        ("frames_per_second", "bca"),
        ("time_to_first_frame_ms", "bca"),
    ],
)
def test_the_better_side_of_every_metric(make_row: Make, key: str, order: str) -> None:
    numbers = {
        "a": {"fid": 1.0, "sync_c": 2.0, "seam_ratio": 0.8, "offset_frames": -1.0},
        "b": {"fid": 2.0, "sync_c": 3.0, "seam_ratio": 1.1, "offset_frames": 3.0},
        "c": {"fid": 3.0, "sync_c": 4.0, "seam_ratio": 1.9, "offset_frames": 0.5},
    }
    speeds = {"a": 10.0, "b": 30.0, "c": 20.0}
    rows = []
    for name, metrics in numbers.items():
        speed = {"frames_per_second": speeds[name], "time_to_first_frame_ms": 900 / speeds[name]}
        rows.append(make_row(name, metrics=metrics, ground_truth=metrics, speed=speed))
    (group,) = board(*rows, sort_by=key)
    assert "".join(entry.name for entry in group.entries) == order
    assert "first frame (ms)" in to_markdown([group]) and "first frame (ms)" in to_html([group])
    assert group.best(key) is group.entries[0]


def test_a_method_without_the_metric_is_last_and_unranked(make_row: Make) -> None:
    rows = [make_row("a", metrics={"fid": None}, ground_truth={"fid": 0.0}), make_row("b", 9.0)]
    (group,) = board(*rows)
    assert [(entry.name, entry.rank) for entry in group.entries] == [("b", 1), ("a", None)]


def test_other_true_clips_are_told(make_row: Make) -> None:
    truth = make_row()["ground_truth"]
    (group,) = board(make_row("a"), make_row("b", ground_truth=truth | {"sync_c": 5.2}))
    assert any("did not score the same true clips" in warning for warning in group.warnings)
    (group,) = board(
        make_row("a"), make_row("b", ground_truth=truth | {"sync_c": 5.001, "fid": 1e-6})
    )
    assert group.warnings == []


def test_other_kinds_of_frames_are_told(make_row: Make) -> None:
    """Compression moves FID: raw frames of one method beside mp4 files of another are no fair
    table.
    """

    def row(name: str, source: dict[str, str] | None) -> dict[str, Any]:
        config = {"size_px": 128, "fps": 25, "notes": []}
        return make_row(
            name, config=config if source is None else config | {"frame_source": source}
        )

    raw, files = {"generated": "decoder", "truth": "mp4"}, {"generated": "mp4", "truth": "mp4"}
    (group,) = board(row("a", raw), row("b", files))
    (warning,) = group.warnings
    assert "decoder / mp4 and mp4 / mp4 (generated / true)" in warning
    for others in ([raw, raw], [raw, None]):
        (group,) = board(*(row(str(i), other) for i, other in enumerate(others)))
        assert group.warnings == []


class Tags(HTMLParser):
    """Checks that every tag is closed, and keeps attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if (
            tag not in ("meta", "img", "br", "line", "circle", "polyline")
            or tag == "circle"
            or tag == "polyline"
        ):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.attributes += [(tag, key, value or "") for key, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture
def results(make_row: Make, tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    evil = "<script>alert(1)</script> a|b"
    rows = {
        "ours": make_row("ours", 3.0),
        "evil": make_row(evil, 4.0, failures=[{"clip": "t<1>", "reason": "no face"}], num_clips=7),
        "hdtf": make_row("ours", 30.0, protocol="rest-hdtf"),
        "claim": CLAIM | {"metrics": {"fid": 14.597, "e_fid": 0.9}},
    }
    for name, row in rows.items():
        (folder / f"{name}.json").write_text(json.dumps(row))
    (folder / "ours.png").write_bytes(b"some pixels")
    (folder / "ours.mp4").write_bytes(b"some frames")
    return folder


def test_three_files(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["leaderboard", str(results), "--out", str(out), "--title", "A & B"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        f"leaderboard.{kind}" for kind in ("html", "json", "md")
    ]
    assert "3 measured rows" in capsys.readouterr().out

    page = (out / "leaderboard.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    text = "".join(tags.text)
    assert "<script>alert(1)</script> a|b" in text, "names are shown as text"
    assert page.count("<script") == 1
    for _, key, value in tags.attributes:
        if key in ("src", "href", "srcset", "poster", "action", "data", "xlink:href"):
            assert value.startswith("data:"), f"{key}={value} is not in the page"
    assert not re.search(r"url\(|@import|https?://", re.sub(r'data:[^"]*', "", page))
    sources = {
        value.split(",")[0]: base64.b64decode(value.split(",")[1])
        for _, key, value in tags.attributes
        if key == "src"
    }
    assert sources == {
        "data:image/png;base64": b"some pixels",
        "data:video/mp4;base64": b"some frames",
    }
    assert (
        "claimed" in text
        and "arXiv <1>" in text
        and "ground truth" in text
        and "no face" in text
        and "A & B" in text
    )
    svgs = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(svgs) == 4  # two tables: quality against speed, and drift
    assert all(ElementTree.fromstring(svg) is not None for svg in svgs)

    markdown = (out / "leaderboard.md").read_text()
    assert "Paper (claimed, not measured) | 14.597 | 0.9 | arXiv &lt;1>" in markdown
    assert "- failed: &lt;script>alert(1)&lt;/script> a\\|b, t&lt;1>: no face" in markdown
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    assert any(
        re.match(
            (
                r"\| 1 \| ours \| 1 \| 8 \| 0 \| 100.0 \| "
                r"\*\*3.00\*\*"
            ),
            line,
        )
        for line in tables
    )
    content = json.loads((out / "leaderboard.json").read_text())
    assert [
        (group["protocol"], len(group["entries"]), len(group["claimed"]))
        for group in content["groups"]
    ] == [
        ("rest-hdtf", 1, 0),
        ("synthetic", 2, 1),
    ]
    again = main(["leaderboard", str(results), "--out", str(out)])
    assert again == 0, "its own JSON is no row, and is not read"


def test_mistakes_are_one_line(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out")]
    for words, message in (
        ([str(tmp_path / "nowhere")], "does not exist"),
        ([str(results), "--sort-by", "beauty"], "expected a metric to sort by (fid, sync_c"),
        ([str(results), "--max-media-mb", "0.000001"], "expected at most 1e-06 MB to embed"),
    ):
        assert main(["leaderboard", *words, *out]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1
    (results / "broken.json").write_text('{"protocol": "x"}')
    assert main(["leaderboard", str(results), *out]) == 2
    assert "broken.json: expected the key 'protocol_version'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_points_and_curves_are_where_their_numbers_say() -> None:
    points = [
        Point("slow", 10.0, 1.0, 0),
        Point("fast", 100.0, 3.0, 1),
        Point("faster", 1000.0, 2.0, 2),
    ]
    svg = ElementTree.fromstring(scatter(points, "frames/s", "FID"))
    places = [(float(c.get("cx", 0)), float(c.get("cy", 0))) for c in svg.iter("circle")]
    assert places[1][0] - places[0][0] == pytest.approx(places[2][0] - places[1][0], abs=0.2), (
        "logarithmic"
    )
    assert places[0][1] - places[1][1] == pytest.approx(
        2 * (places[2][1] - places[1][1]), abs=0.2
    ), "linear"
    svg = ElementTree.fromstring(
        lines([Series("a", [1.0, 2.0, 4.0], 0), Series("truth", [1.0], None)], "second", "drift")
    )
    first = next(svg.iter("polyline")).get("points", "").split()
    x, y = zip(*((float(v) for v in pair.split(",")) for pair in first), strict=True)
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)
    assert y[1] - y[2] == pytest.approx(2 * (y[0] - y[1]), abs=0.2)


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0], [-1.0, 1.0], [1e-7, 2e-7], [0.0, 1e6]])
def test_plots_take_any_numbers(values: list[float]) -> None:
    svg = lines([Series("a", values, 0)], "second", "x")
    svg += scatter(
        [Point("p", 1.0 + i, value, i) for i, value in enumerate(values)],
        "fps",
        "x",
        truth=values[0],
    )
    assert not re.search(r"nan|inf", svg)


def test_leaderboard_does_not_load_torch(results: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from rest_lightning.cli import main; "
        f"assert main(['leaderboard', {str(results)!r}, '--out', {str(tmp_path / 'o')!r}]) == 0; "
        "assert not {'torch', 'lightning', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("spread", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("count", [1, 5, 9, 14])
def test_labels_stand_beside_their_points(count: int, spread: float) -> None:
    """Near their own marker, inside the picture, and not over one another; many become numbers."""
    random = np.random.default_rng(count)
    values = 1 + spread * random.random(count)
    speeds = 100 * (1 + spread * random.random(count))
    points = [
        Point(f"a method {i}", x, y, i) for i, (x, y) in enumerate(zip(speeds, values, strict=True))
    ]
    svg = ElementTree.fromstring(scatter(points, "fps", "FID"))
    texts = [each for each in svg.iter("text") if each.get("class") == "label"]
    assert [each.text for each in texts] == [
        str(i + 1) if count > 10 else f"a method {i}" for i in range(count)
    ]
    boxes = [(float(t.get("x", 0)), float(t.get("y", 0)), 6.6 * len(t.text or "")) for t in texts]
    markers = [(float(c.get("cx", 0)), float(c.get("cy", 0))) for c in svg.iter("circle")]
    for (left, bottom, width), (x, y) in zip(boxes, markers, strict=True):
        assert left >= 62 and left + width <= 560 and 10 < bottom < 300
        across = max(left - x, x - left - width, 0.0)
        assert across < 90 and abs(bottom - 4 - y) < 110
    for number, (left, bottom, width) in enumerate(boxes):
        for other_left, other_bottom, other_width in boxes[:number]:
            apart = left >= other_left + other_width - 0.5 or other_left >= left + width - 0.5
            assert apart or abs(bottom - other_bottom) >= 12.5


def test_tables_of_one_protocol_are_told_apart(make_row: Make) -> None:
    rows = [
        make_row(num_clips=clips, num_frames=frames)
        for clips, frames in ((8, 96), (4, 96), (8, 48))
    ]
    assert {group.title for group in board(*rows)} == {
        "synthetic v1: 8 clips, 96 frames",
        "synthetic v1: 4 clips, 96 frames",
        "synthetic v1: 8 clips, 48 frames",
    }
    assert [group.title for group in board(rows[0])] == ["synthetic v1"]


def test_a_score_is_printed_beside_that_of_the_true_clips(
    make_row: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    row = make_row()
    row["metrics"]["mean_red"] = None
    row["ground_truth"]["mean_red"] = None
    print_numbers(ResultRow.from_dict(row))
    lines_ = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines_] == ["FID", "Sync-C", "mean"]  # and no curve
    assert lines_[0][-4:] == ["5", "true", "clips", "0"]
    assert lines_[2][-4:] == ["-", "true", "clips", "-"]
