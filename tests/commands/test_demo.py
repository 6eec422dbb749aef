from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rest_lightning import talking_head
from rest_lightning.cli import main
from rest_lightning.commands import talk


@pytest.fixture
def small_demo(
    portrait: Path,
    make_speech: Callable[..., Path],
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> list[str]:
    """The command with one second of speech and the tiny model."""
    monkeypatch.setattr(talking_head, "portraits_in", lambda folder: [portrait])
    monkeypatch.setattr(talk, "SPEECH", make_speech(16_000))
    return ["demo", "--model", str(tiny_model)]


def test_demo_writes_three_files_again_and_again(
    small_demo: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "outputs"
    for seed in ("0", "1"):
        assert main([*small_demo, "--out", str(out), "--seed", seed]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["demo.json", "demo.mp4", "demo.png"]
    report = json.loads((out / "demo.json").read_text())
    assert report["num_frames"] == 25 and report["configuration"]["seed"] == 1
    printed = capsys.readouterr().out
    assert "time to first frame" in printed and f"wrote {out / 'demo.mp4'}" in printed


def test_demo_needs_a_folder(
    small_demo: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "outputs").touch()
    for out in (tmp_path / "outputs", tmp_path / "outputs" / "deeper"):
        assert main([*small_demo, "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert str(out) in error and "--out" in error and len(error.splitlines()) == 1
