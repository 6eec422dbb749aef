"""The programs of examples/ run, at tiny size, and give what they say."""

from __future__ import annotations

import doctest
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from stills import face
from tiny_head import make_head

from rest_lightning.media.video import VideoFile
from rest_lightning.media.writer import Mp4Writer
from rest_lightning.talking_head import TalkingHead

ROOT = Path(__file__).resolve().parent.parent
SPEECH = ROOT / "rest_lightning" / "assets" / "speech.wav"
PROGRAMS = sorted((ROOT / "examples").glob("*.py"))


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        f"example_{name}", ROOT / "examples" / f"{name}.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("example") / "model"
    make_head().save_pretrained(folder)
    return folder


@pytest.fixture
def portrait(tmp_path: Path) -> Path:
    path = tmp_path / "portrait.png"
    face(128, 128).save(path)
    return path


def test_training_moves_the_trained_parts_alone(
    talkers: Path, tiny_model: Path, tmp_path: Path
) -> None:
    words = ["--data", str(talkers), "--out", str(tmp_path / "mine"), "--model", str(tiny_model)]
    tiny = ["--num-steps", "2", "--batch-size", "2", "--num-frames", "49"]
    load("train_on_your_videos").main([*words, *tiny])
    before = TalkingHead.from_pretrained(tiny_model)
    after = TalkingHead.from_pretrained(tmp_path / "mine")
    moved = {
        name.split(".")[0]
        for name, value in before.state_dict().items()
        if not torch.equal(value, after.state_dict()[name])
    }
    assert moved == {"transformer", "speech_ae"}


def test_stream_writes_a_video_with_sound(tiny_model: Path, portrait: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.mp4"
    load("stream_to_window").main(
        [str(portrait), str(SPEECH), "--out", str(out), "--model", str(tiny_model)]
    )
    assert VideoFile(out).num_frames > 25


def test_stream_reports_a_mistake_in_one_line(tiny_model: Path, portrait: Path) -> None:
    with pytest.raises(SystemExit, match=r"error: expected a speech file.*none\.wav"):
        load("stream_to_window").main([str(portrait), "none.wav", "--model", str(tiny_model)])


def test_pacing_waits_for_the_clock() -> None:
    import time

    program = load("stream_to_window")
    started_s = time.monotonic()
    blocks = list(program.at_the_pace_of_sound([np.zeros(400)] * 3, 8000))
    assert len(blocks) == 3
    assert time.monotonic() - started_s >= 0.15


def test_ablation_has_a_row_for_each_number_of_steps(tiny_model: Path, portrait: Path) -> None:
    words = [str(portrait), str(SPEECH), "--steps", "1", "2", "--model", str(tiny_model)]
    rows = load("ablation").main(words)
    assert list(rows) == [1, 2]
    assert rows[1]["sharpness"] != rows[2]["sharpness"]
    assert all(row["frames_per_second"] > 0 for row in rows.values())


def test_own_metric_tells_trembling_from_motion(tmp_path: Path) -> None:
    program = load("own_metric")
    ramp = torch.arange(0, 50, 5, dtype=torch.uint8)[:, None, None, None].expand(10, 8, 8, 3)
    steady, trembling = program.Flicker(), program.Flicker()
    steady.update(ramp)
    trembling.update(torch.where(torch.arange(10)[:, None, None, None] % 2 == 0, ramp, ramp + 9))
    assert steady.compute()["flicker"] == 0
    assert trembling.compute()["flicker"] == pytest.approx(18)
    with Mp4Writer(tmp_path / "a.mp4", 64) as writer:
        writer.write(np.full((5, 64, 64, 3), 90, np.uint8))
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    assert program.main([str(tmp_path)]) < 1
    assert doctest.testmod(program).failed == 0


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_every_program_is_listed(path: Path) -> None:
    assert f"]({path.name})" in (ROOT / "examples" / "README.md").read_text("utf-8")
