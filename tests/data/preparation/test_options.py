"""Options from YAML and the command line; wrong ones are told in one line."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from rest_lightning.cli import main
from rest_lightning.commands import prepare
from rest_lightning.config import read_dataclass, read_yaml
from rest_lightning.data.preparation.options import PrepareOptions
from rest_lightning.data.preparation.rows import Row, read_rows, write_rows
from rest_lightning.errors import UserError
from rest_lightning.options import CommandParser


def test_the_file_of_defaults_is_the_defaults(repository: Path) -> None:
    path = repository / "configs" / "data" / "prepare.yaml"
    assert read_dataclass(PrepareOptions, read_yaml(path), "it") == PrepareOptions()
    assert list(yaml.safe_load(path.read_text())) == list(asdict(PrepareOptions()))


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("size_px: 512\nmax_text: null\nbox: [0, 0, 64, 64]\n")
    parser = CommandParser("prepare", None)
    prepare.add_arguments(parser)
    words = ["--config", str(path), "--size-px", "128", "--min_face_px=80"]
    options = parser.parse(words)
    assert (options.size_px, options.max_text, options.min_face_px) == (128, None, 80.0)
    assert options.box == [0, 0, 64, 64]
    given = parser.parse(["--max-flow", "null", "--already-cropped", "--box", "0,0,64,64"])
    assert (given.max_flow, given.already_cropped, given.keep_dropped) == (None, True, False)
    assert given.box == [0.0, 0.0, 64.0, 64.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size_px": 200}, "expected size_px of 128, 256 or 512, got 200"),
        ({"size_px": "128"}, "expected size_px as int, got '128'"),
        ({"max_text": "much"}, "expected max_text as float, got 'much'"),
        ({"max_text": float("nan")}, "expected max_text as float, got nan"),
        ({"identity_rule": "name"}, "expected identity_rule of auto, hdtf, mead, file, got 'name'"),
        ({"keep_dropped": 1}, "expected keep_dropped as bool, got 1"),
        ({"box": [1, 2, 3]}, "expected box of 4 numbers"),
        ({"box": [0, 0, 64, 32]}, "expected a square box"),
        ({"box": [0, 0, 64, 64], "already_cropped": True}, "got both"),
        ({"min_frames": 10, "max_frames": 9}, "expected 1 <= min_frames <= max_frames"),
        ({"val_fraction": 0.9, "test_fraction": 0.2}, "got 0.9 and 0.2"),
        ({"look_every_frames": 0}, "expected look_every_frames above 0, got 0"),
    ],
)
def test_wrong_options_are_told(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        PrepareOptions(**values)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prepare"], "expected VIDEOS and --out FOLDER"),
        (
            ["prepare", "no", "--out", "o", "--already-cropped"],
            ("expected a folder of videos, got no such folder"),
        ),
        (["prepare", ".", "--out", "o", "--box", "1,2"], "expected box of 4 numbers"),
        (["prepare", ".", "--out", "o", "--box", "a,b"], "expected four numbers x,y,w,h"),
        (["prepare", ".", "--out", "o", "--max-txt=1"], "did you mean --max_text?"),
        (["prepare", ".", "--out", "o", "--max-text=much"], "--max_text: expected a number"),
        (["prepare", ".", "--out", "o", "--max-t=1"], "got --max-t"),
        (
            ["prepare", ".", "--out", "o", "--config", "no.yaml"],
            ("expected a configuration, but the file no.yaml does not exist"),
        ),
        (
            ["prepare", ".", "--out", "o", "--detector", "yolo"],
            ("expected a detector mediapipe or package.module:Class"),
        ),
    ],
)
def test_wrong_words_are_one_line(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "a.mp4").touch()
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    rows = [
        Row(
            'b/ü "q" 🙂.mp4',
            "b_0001",
            "kept",
            "encode",
            None,
            None,
            4.0,
            8.0,
            100,
            "b",
            "val",
            (0, 1, 64, 64),
        ),
        Row(
            'b/ü "q" 🙂.mp4',
            "b_0000",
            "dropped",
            "filter",
            "dark",
            "dark",
            0.0,
            4.0,
            100,
            scores={"dark": 0.1},
        ),
        Row("a.mp4", None, "failed", "probe", "empty"),
    ]
    write_rows(tmp_path, rows)
    assert read_rows(tmp_path) == rows[::-1]
    (tmp_path / "prepare.jsonl").write_text(json.dumps({"clip": 1}) + "\n")
    with pytest.raises(UserError, match="line 1: expected a row of a preparation"):
        read_rows(tmp_path)
