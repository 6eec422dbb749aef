"""A command whose optional package is missing names the extra before it begins."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from rest_lightning.cli import main
from rest_lightning.extras import MODULES

COMMANDS = {
    "synthesize --out out --num-clips 1": "synthetic",
    "animate --portraits in --drivers in --out out --num-clips 1": "prepare",
    "prepare in --out out": "prepare",
    "prepare in --out out --already-cropped --engine ray": "ray",
    "serve --port 0": "serve",
    "serve --port 0 --engine ray": "ray",
    "converse --realtime ws://127.0.0.1:9": "converse",
    "converse --realtime espeak": "synthetic",
}


@pytest.mark.parametrize(
    ("command", "module"),
    [(command, module) for command, extra in COMMANDS.items() for module in MODULES[extra]],
)
def test_missing_package_is_one_line_and_nothing_is_made(
    command: str,
    module: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_bytes(b"no video, but it is not looked at")
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    if command.startswith("prepare in --out out") and module == "cv2":
        pytest.skip("mediapipe brings it, and scores that need it are left out")
    assert main(command.split()) == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1
    assert module in told
    assert f"rest_lightning[{COMMANDS[command]}]" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_extras_are_those_of_the_package(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text("utf-8"))["project"]
    assert set(MODULES) <= set(project["optional-dependencies"])


def test_help_needs_no_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in {name for names in MODULES.values() for name in names}:
        monkeypatch.setitem(sys.modules, module, None)
    for command in {command.split()[0] for command in COMMANDS}:
        assert main([command, "--help"]) == 0
        assert re.search(rf"usage: rest {command}", capsys.readouterr().out)
