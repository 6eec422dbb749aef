from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rest_lightning.evaluation.clips import (
    NUM_THUMBNAILS,
    THUMBNAIL_PX,
    intervals,
    thumbnails,
    worst_first,
    write_clips,
    write_worst,
)


def test_worst_first() -> None:
    clips = [
        {"clip": "a", "sync_c": 5.0},
        {"clip": "b", "sync_c": None},
        {"clip": "c", "sync_c": 1.0},
    ]
    assert [clip["clip"] for clip in worst_first(clips)] == ["c", "a", "b"]
    assert worst_first([{"clip": "a"}]) == [{"clip": "a"}]


@pytest.mark.parametrize("num_clips", [5, 40, 400])
def test_intervals_hold_the_mean_as_often_as_they_say(num_clips: int) -> None:
    """Of normal numbers, whose intervals are known: half as wide as 1.96 standard errors."""
    rng = np.random.default_rng(num_clips)
    held, widths = 0, []
    for number in range(60):
        values = rng.normal(3.0, 2.0, num_clips)
        clips = [{"clip": str(i), "sync_d": float(v)} for i, v in enumerate(values)]
        low, high = intervals(clips, seed=number)["sync_d"]
        held += low <= 3.0 <= high
        widths.append(high - low)
    assert held >= (0.75 if num_clips == 5 else 0.88) * 60
    expected = 2 * 1.96 * 2.0 / np.sqrt(num_clips)
    assert np.mean(widths) == pytest.approx(expected, rel=0.3 if num_clips == 5 else 0.08)


def test_files(tmp_path: Path) -> None:
    clips = [
        {"clip": "a", "sync_c": 5.0, "seam_ratio": 1.0, "own": 2.0},
        {"clip": "b", "sync_c": 1.0, "seam_ratio": None, "own": 3.0},
    ]
    files = write_clips(clips, tmp_path / "row.json")
    rows = list(csv.DictReader((tmp_path / "row.clips.csv").open()))
    assert list(rows[0]) == ["clip", "sync_c", "seam_ratio", "own"]
    assert [row["clip"] for row in rows] == ["b", "a"] and rows[0]["seam_ratio"] == ""
    parquet = pytest.importorskip("pyarrow.parquet")
    assert files[1] == tmp_path / "row.clips.parquet"
    assert parquet.read_table(files[1]).to_pylist()[0] == {
        "clip": "b",
        "sync_c": 1.0,
        "seam_ratio": None,
        "own": 3.0,
    }
    assert intervals(clips) and "seam_ratio" not in intervals(clips)
    assert write_clips([], tmp_path / "none.json") == []


def test_thumbnails_come_piece_by_piece(tmp_path: Path) -> None:
    """A piece of a long clip may have none."""
    frames = np.full((4, 64, 64, 3), 200, np.uint8)
    pieces = [thumbnails(frames, frames // 2), thumbnails(frames[:0], frames[:0])]
    small = np.concatenate([*pieces, thumbnails(frames[:2], frames[:2] // 2)], axis=1)
    assert small.shape == (2, NUM_THUMBNAILS, THUMBNAIL_PX, THUMBNAIL_PX, 3)
    assert (small[0] == 100).all() and (small[1] == 200).all(), "the true ones first"
    path = write_worst([({"clip": "a"}, small)], tmp_path / "row.json")
    assert path == tmp_path / "row.worst.png"
    with Image.open(path) as sheet:
        assert sheet.width == NUM_THUMBNAILS * THUMBNAIL_PX
    assert write_worst([], tmp_path / "none.json") is None
