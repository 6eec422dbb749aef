"""Rows: exactly the keys of the specification; what is wrong is named with its file."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rest_lightning.errors import UserError
from rest_lightning.evaluation.row import ResultRow, read_rows, row_files, write_row

Make = Callable[..., dict[str, Any]]
KEYS = [
    *(
        "protocol",
        "protocol_version",
        "method",
        "measured",
        "metrics",
        "ground_truth",
        "num_clips",
        "num_frames",
    ),
    *("failures", "extractors", "sampler", "speed", "hardware", "commit", "config", "date"),
]


def test_round_trip_keeps_the_keys_of_the_specification(make_row: Make, tmp_path: Path) -> None:
    row = ResultRow.from_dict(
        make_row(failures=[{"clip": "a", "reason": "b"}, {"clip": "a", "reason": "c"}])
    )
    write_row(row, tmp_path / "deep" / "row.json")
    content = json.loads((tmp_path / "deep" / "row.json").read_text())
    assert list(content) == KEYS
    assert read_rows(tmp_path / "deep" / "row.json") == [row]
    assert row.num_attempted == 9
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["row.json"]


def test_nan_becomes_null_and_curves_stay(make_row: Make, tmp_path: Path) -> None:
    row = replace(
        ResultRow.from_dict(make_row()),
        metrics={"fid": float("nan"), "x_by_second": [1.0, float("inf")]},
    )
    assert row.to_dict()["metrics"] == {"fid": None, "x_by_second": [1.0, None]}
    with pytest.raises(
        UserError,
        match=(
            r"row.json: expected 'ground_truth' with the keys of "
            r"'metrics', got"
        ),
    ):
        write_row(row, tmp_path / "row.json")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_key_is_named(make_row: Make, tmp_path: Path, key: str) -> None:
    row = make_row()
    del row[key]
    path = tmp_path / "some.json"
    path.write_text(json.dumps(row))
    with pytest.raises(UserError, match=rf"some.json: expected the key '{key}'"):
        read_rows(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": 1}, "unknown key 'extra'"),
        ({"protocol_version": "1"}, "'protocol_version' as a whole number, got \"1\""),
        ({"num_clips": True}, "'num_clips' as a whole number"),
        ({"num_clips": -1}, "'num_clips' as a whole number"),
        ({"method": " "}, "'method' as a name"),
        ({"measured": "yes"}, "'measured' as true or false"),
        ({"metrics": {"fid": "low"}}, "'metrics.fid' as a number"),
        ({"metrics": [1]}, "'metrics' as an object"),
        ({"ground_truth": {}}, "'ground_truth' with the keys of 'metrics'"),
        ({"failures": [{"clip": "a"}]}, "'failures' as a list of"),
        (
            {"extractors": {"fid": {"name": "x", "sha256": "12"}}},
            ("'extractors.fid' with a name and a SHA-256"),
        ),
        ({"config": {"fps": 25}}, "'config.size_px'"),
        ({"date": None}, "'date' as text"),
    ],
)
def test_a_wrong_key_is_named(make_row: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        ResultRow.from_dict(make_row(**changes), "some.json")
    assert str(caught.value).startswith("some.json: expected") and message in str(caught.value)


def test_published_figures_need_a_source_and_little_else() -> None:
    row = {
        "protocol": "p",
        "protocol_version": 1,
        "method": "m",
        "measured": False,
        "metrics": {"fid": 3},
    }
    with pytest.raises(UserError, match="expected the key 'source'"):
        ResultRow.from_dict(row)
    assert ResultRow.from_dict(row | {"source": "a paper"}).to_dict()["source"] == "a paper"


def test_published_file_of_the_repository_is_valid(repository: Path) -> None:
    rows = read_rows(repository / "benchmarks/published/rest.json")
    assert not any(row.measured for row in rows)
    (rest,) = (row for row in rows if row.method == "REST" and row.protocol == "rest-hdtf")
    assert (rest.metrics["fid"], rest.metrics["sync_c"]) == (14.597, 8.335)


def test_a_list_names_its_entry(make_row: Make, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([make_row(), make_row(commit=3)]))
    with pytest.raises(
        UserError,
        match=(
            r"rows.json entry 2: expected the key 'commit' as text, "
            r"got 3"
        ),
    ):
        read_rows(path)
    path.write_text("{")
    with pytest.raises(UserError, match=r"rows.json: expected JSON"):
        read_rows(path)
    with pytest.raises(UserError, match="does not exist"):
        list(row_files([tmp_path / "nowhere"]))


def test_rows_and_leaderboard_do_without_torch() -> None:
    code = (
        "from rest_lightning.evaluation import row, leaderboard, page, protocol; "
        "from rest_lightning.media import html; "
        "import rest_lightning.commands.leaderboard, sys; "
    )
    code += "assert not {'torch', 'lightning', 'torchmetrics'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == ""
