"""The report shows every number of prepare.jsonl, embeds its pictures, and reaches for nothing
else.
"""

from __future__ import annotations

import base64
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rest_lightning.data.layout import write_dataset_json
from rest_lightning.data.preparation.options import PrepareOptions
from rest_lightning.data.preparation.report import MAX_DROPPED, MAX_KEPT, bins_of, write_report
from rest_lightning.data.preparation.rows import Row, write_rows
from rest_lightning.data.preparation.summary import Score, inspect, summarize
from rest_lightning.errors import UserError
from rest_lightning.media.html import histogram

EVIL = "a <b>&\"'🎬'.mp4"
OPTIONS = PrepareOptions(max_text=None, min_sharpness=20.0)


def clip(number: int, **changes: Any) -> Row:
    row = Row(
        source=f"v{number:03d}.mp4", clip_id=f"v{number:03d}_0000", status="kept", stage="encode"
    )
    row = replace(
        row, num_frames=250, identity=f"person {number % 7}", split="train", box=[0, 0, 200, 200]
    )
    return replace(row, scores={"short": 250.0, "blur": 20.0 + number, "text": 0.5}, **changes)


def dropped(number: int, name: str, score: float) -> Row:
    row = clip(
        number,
        status="dropped",
        stage="filter",
        filter=name,
        reason=(f"expected more {name}, got {score}"),
    )
    return replace(row, scores={"short": 250.0, name: score}, split="train")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "my set"
    rows = [clip(i) for i in range(60)]
    rows[7] = replace(rows[7], split="test", identity="guest", num_frames=97)
    rows += [dropped(100 + i, "blur", float(i)) for i in range(15)]
    rows += [dropped(200, "profile", 0.9), dropped(201, "duplicate", 1.0)]
    rows += [
        Row(EVIL, None, "failed", "probe", ("expected a <video>, got none")),
        clip(300, status="failed"),
    ]
    rows[-1] = replace(
        rows[-1], stage="filter", reason=("expected its identity in the mapping"), identity=None
    )
    (out / "thumbs").mkdir(parents=True)
    for number, row in enumerate(rows):
        if row.clip_id is not None:
            colour = (number * 3 % 256, 100, number % 50)
            Image.new("RGB", (128, 128), colour).save(out / "thumbs" / f"{row.clip_id}.jpg")
            rows[number] = replace(row, thumbnail=f"thumbs/{row.clip_id}.jpg")
    write_dataset_json(out, {"kind": "prepared videos", "options": asdict(OPTIONS)})
    write_rows(out, rows)
    return out


class Page(HTMLParser):
    """Tables as lists of cells, pictures, addresses; fails on tags that are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.images: list[str] = []
        self.links: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        values = dict(attributes)
        self.links += [values[name] for name in ("src", "href") if values.get(name)]
        if tag == "img":
            self.images.append(values.get("src") or "")
        if tag not in ("img", "meta", "br", "link", "input"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attributes: Any) -> None:
        assert tag in ("circle", "line", "rect")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open) and self.rows:
            self.rows[-1][-1] += data


def test_the_page_tells_everything_and_loads_nothing(folder: Path) -> None:
    path = write_report(folder)
    assert path == folder / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert all(link.startswith("data:image/jpeg;base64,") for link in page.links)
    assert not re.findall(r"url\(|@import|https?://", text)
    table = {row[0]: row[1:] for row in page.rows if row}
    assert table["failed: probe"][0] == "1"
    assert table["failed: probe"][-1] == "expected a <video>, got none"
    assert table["dropped: blur"][:2] == ["15", "2.5 min"]
    assert table["dropped: duplicate"][0] == "1"
    assert table["train"] == ["7", "59", "9.8 min", "99.3 %"]
    assert table["test"] == ["1", "1", "4 s", "0.7 %"]
    assert table["guest"][:3] == ["test", "1", "4 s"]
    assert table["person 0"][:3] == ["train", "8", "1.3 min"], (
        "60 clips over 7 persons, one of them a guest's"
    )
    assert "None was drawn for val:" in text
    assert len(page.images) == MAX_KEPT + MAX_DROPPED + 2
    colours = [
        Image.open(BytesIO(base64.b64decode(uri.split(",")[1]))).getpixel((5, 5))
        for uri in page.images
    ]
    assert len(set(colours)) > 40
    assert "a &lt;b&gt;&amp;" in text
    assert "<b>&" not in text
    assert text.count("<svg") == 3, "short, blur and text; one value of profile is no histogram"
    assert "threshold 20" in text
    assert path.read_text(encoding="utf-8") == write_report(folder).read_text(encoding="utf-8")


def test_every_identity_is_shown_before_a_second_clip_of_any(folder: Path) -> None:
    text = write_report(folder).read_text(encoding="utf-8")
    sheet = text[text.index("Kept clips") : text.index("Identities")]
    names = re.findall(r"<figcaption><b>(.*?)</b>", sheet)
    assert set(names[:8]) == {"guest", *(f"person {i}" for i in range(7))}


def test_the_table_of_inspect(folder: Path) -> None:
    text = inspect(folder)
    assert "79 videos; clips: 60 kept (9.9 min), 17 dropped; 2 failed" in text
    lines = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    assert lines["dropped: blur"][2:5] == ["15", "2.5", "min"]
    assert lines["train"][1:3] == ["7", "59"]
    blur = np.array([20.0 + i for i in range(60)] + [float(i) for i in range(15)] + [320.0])
    expected = [f"{value:.4g}" for value in np.percentile(blur, [0, 5, 50, 95, 100])]
    assert lines["blur"][1:] == [*expected, "at", "least", "20", "15"]
    assert lines["text"][-2:] == ["-", "-"], "its filter is off"
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(
    "values", [[3.0, 3.0], [0.0, 0.0, 0.0, 1.0], list(np.random.default_rng(0).normal(9, 2, 500))]
)
@pytest.mark.parametrize("limits", [[], [("min", 4.0)], [("max", 30.0), ("min", -2.0)]])
def test_bins_hold_every_value(values: list[float], limits: list[tuple[str, float]]) -> None:
    numbers = np.array(values)
    failing = np.zeros(len(numbers), bool)
    for kind, limit in limits:
        failing |= numbers > limit if kind == "max" else numbers < limit
    low, high, bins = bins_of(Score("x", "x", numbers, failing, limits))
    assert sum(good for good, _ in bins) == (~failing).sum()
    assert sum(bad for _, bad in bins) == failing.sum()
    assert all(low <= limit <= high for _, limit in limits)
    svg = histogram(bins, low, high, "x", "clips", [limit for _, limit in limits])
    assert svg.count("<rect") == sum(bool(count) for pair in bins for count in pair)
    heights = [float(value) for value in re.findall(r'height="([\d.]+)"', svg)]
    assert max(heights) / sum(heights) == pytest.approx(
        max(map(max, bins)) / len(numbers), rel=0.02
    )


def test_another_dataset_shows_what_its_sidecars_know(make: Any, tmp_path: Path) -> None:
    root = make.dataset(tmp_path / "talkers")
    text = write_report(root).read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.images) == 6, "frames of the clips: there are no thumbnails"
    reds = [
        Image.open(BytesIO(base64.b64decode(uri.split(",")[1]))).getpixel((64, 64))[0]
        for uri in page.images
    ]
    assert all(abs(red - (30 + 20 * 190 // 41)) < 12 for red in reds), (
        "the middle frame's number, as its red tells"
    )
    assert "There is no prepare.jsonl here" in text
    assert "Kept and left out" not in text
    summary = summarize(root)
    assert [(group.name, group.num_clips) for group in summary.splits] == [
        ("train", 4),
        ("val", 1),
        ("test", 1),
    ]
    assert summary.hours == pytest.approx(6 * 41 / 25 / 3600)
    assert "no prepare.jsonl: what was left out, and why, is not known" in inspect(root)


def test_a_folder_without_a_dataset_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected .*dataset\.json beside the manifest, got none"):
        inspect(tmp_path)
