"""Kills, interruptions and full disks for each command that makes files."""

from __future__ import annotations

import json
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stills import face
from tiny_head import make_head
from videos import levels, speech_like, write_video

TRIES = 15  # of two disturbances each
_IMPORTS = ("torch", "av", "rest_lightning.talking_head")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("kills") / "model"
    make_head(1).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def kills(
    attack: Callable[..., Any], tally: Callable[..., None]
) -> Callable[[str, dict[str, Any]], None]:
    def run(name: str, spec: dict[str, Any]) -> None:
        found = attack("kills", TRIES, json.dumps(spec))
        seen = "no process, no litter, the same files after the next run"
        tally(f"`{name}` killed, interrupted, on a full disk", 2 * found.tried, found.faults, seen)

    return run


Kills = Callable[[str, dict[str, Any]], None]


def test_talk(tmp_path: Path, model: str, kills: Kills) -> None:
    face(80, 96).save(tmp_path / "portrait.png")
    noise = np.random.default_rng(0).normal(scale=2000, size=16_000 * 20).astype("<i2")
    with wave.open(str(tmp_path / "speech.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(noise.tobytes())
    inputs = [str(tmp_path / name) for name in ("portrait.png", "speech.wav")]
    words = ["talk", *inputs, "-o", "OUT", "--overwrite", "--quiet", "--model", model]
    words += ["--crop", "centre"]
    kills("rest talk", {"words": words, "out": "a.mp4", "imports": _IMPORTS})


def test_export(model: str, kills: Kills) -> None:
    words = ["export", model, "--vae", model, "--out", "OUT", "--overwrite", "--size-px", "64"]
    kills("rest export", {"words": words, "out": "model", "imports": _IMPORTS})


def test_prepare(tmp_path: Path, kills: Kills) -> None:
    for number in range(3):
        path = tmp_path / "videos" / f"{number}.mp4"
        path.parent.mkdir(exist_ok=True)
        write_video(path, levels(25 + 10 * number), [speech_like(1.0 + 0.4 * number)])
    words = ["prepare", str(tmp_path / "videos"), "--out", "OUT", "--already-cropped", "--quiet"]
    words += ["--min_frames", "9", "--max_duplicate_distance", "0", "--size_px", "128"]
    words += ["--max_still_s", "null", "--min_sharpness", "null", "--max_flow", "null"]
    spec = {"words": words, "out": "data", "ignored": ["report.html"], "imports": _IMPORTS[1:2]}
    kills("rest prepare", spec)


def test_synthesize(kills: Kills) -> None:
    pytest.importorskip("skia", reason="the extra `synthetic` renders the clips")
    words = ["synthesize", "--out", "OUT", "--num-clips", "3", "--size-px", "64"]
    words += ["--num-frames", "25", "--num-workers", "1"]
    imports = ["av", "skia", "rest_lightning.data.synthetic.synthesize"]
    kills("rest synthesize", {"words": words, "out": "data", "imports": imports})


def test_encode(talkers: Path, model: str, kills: Kills) -> None:
    words = ["encode", "--speech-encoder", model, "--data", str(talkers), "--out", "OUT"]
    words += ["--num-frames", "9"]
    kills("rest encode", {"words": words, "out": "speech", "imports": _IMPORTS})


def test_fit(
    tmp_path: Path, talkers: Path, repository: Path, recipe_class: Any, kills: Kills
) -> None:
    words = recipe_class(tmp_path, talkers, repository).words("vae", Path("OUT"))
    ignored = ["events.out*", "hparams.yaml", "config.yaml", "metrics.csv"]
    imports = ["rest_lightning.lightning_cli", "rest_lightning.tasks.vae"]
    spec = {"words": words, "out": "run", "ignored": ignored, "imports": imports, "resumes": True}
    kills("rest fit", spec)
