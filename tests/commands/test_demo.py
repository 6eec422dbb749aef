from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rest_lightning import talking_head
from rest_lightning.cli import main
from rest_lightning.commands import talk
from rest_lightning.media.video import read_frames


@pytest.fixture
def small_demo(
    make_speech: Callable[..., Path],
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> list[str]:
    """The command with one second of speech and the tiny model."""
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


def test_by_default_the_model_of_people_speaks_with_its_own_portrait(
    make_speech: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(talk, "SPEECH", make_speech(16_000))
    assert main(["demo", "--quiet", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "demo.json").read_text())
    assert report["configuration"]["model"] == "people"
    assert "assets/people/portraits/ada.png" in report["configuration"]["portrait"]
    frames = read_frames(tmp_path / "demo.mp4")
    assert frames.shape == (25, 256, 256, 3)
    with Image.open(talking_head.ASSETS / "people" / "portraits" / "ada.png") as image:
        portrait = np.asarray(image.convert("RGB").resize((256, 256)))
    # What does not move is held to the photograph: the corners.
    for corner in (np.s_[:48, :48], np.s_[:48, -48:]):
        assert np.abs(frames[-1][corner].astype(int) - portrait[corner]).mean() < 12
