"""Kills, interruptions and full disks for each command that makes files.

Two for each command, or as many as REST_HOSTILE_KILLS says; then without a limit of time.
"""

from __future__ import annotations

import json
import os
import shutil
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stills import face
from tiny_head import make_head
from videos import levels, speech_like, write_video

_DISTURBANCES = 2  # before a run that may finish
_ASKED = os.environ.get("REST_HOSTILE_KILLS")
TRIES = -(-int(_ASKED or 2) // _DISTURBANCES)
# Of a run of Lightning: what its loggers write, and what it was given.
_LOGS = ["events.out*", "hparams.yaml", "config.yaml", "metrics.csv"]
_IMPORTS = ("torch", "av", "rest_lightning.talking_head")


Kills = Callable[[str, dict[str, Any]], None]


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
        limit = {"seconds": 7200.0} if _ASKED else {}
        found = attack("kills", TRIES, json.dumps(spec | {"disturbances": _DISTURBANCES}), **limit)
        seen = "no process, no litter, the same files after the next run"
        tried = _DISTURBANCES * found.tried
        tally(f"`{name}` killed, interrupted, on a full disk", tried, found.faults, seen)

    return run


@pytest.fixture
def speech(tmp_path: Path) -> Callable[[float], Path]:
    """Makes a file of noise of so many seconds."""

    def make(seconds: float) -> Path:
        noise = np.random.default_rng(0).normal(scale=2000, size=int(16_000 * seconds))
        with wave.open(str(tmp_path / "speech.wav"), "wb") as file:
            file.setparams((1, 2, 16_000, 0, "NONE", ""))
            file.writeframes(noise.astype("<i2").tobytes())
        return tmp_path / "speech.wav"

    return make


def test_talk(tmp_path: Path, model: str, speech: Callable[[float], Path], kills: Kills) -> None:
    face(80, 96).save(tmp_path / "portrait.png")
    inputs = [str(tmp_path / "portrait.png"), str(speech(20))]
    words = ["talk", *inputs, "-o", "OUT", "--overwrite", "--quiet", "--model", model]
    words += ["--crop", "centre"]
    kills("rest talk", {"words": words, "out": "a.mp4", "imports": _IMPORTS})


def test_predict(
    tmp_path: Path, model: str, speech: Callable[[float], Path], repository: Path, kills: Kills
) -> None:
    face(80, 96).save(tmp_path / "portrait.png")
    speech(3)
    lines = [f"portrait.png,speech.wav,{number},centre" for number in range(3)]
    (tmp_path / "pairs.csv").write_text("\n".join(["portrait,speech,name,crop", *lines]))
    sink = [{"class_path": "VideoSink", "init_args": {"out_dir": "OUT"}}]
    words = ["predict", "--config", str(repository / "configs/predict.yaml"), "--quiet"]
    words += ["--model.model", model, "--data.predict_pairs", str(tmp_path / "pairs.csv")]
    words += ["--trainer.accelerator", "cpu", "--trainer.callbacks", json.dumps(sink)]
    words += ["--trainer.default_root_dir", str(tmp_path / "run")]
    spec: dict[str, Any] = {"words": words, "out": "videos"}
    spec["imports"] = ["rest_lightning.lightning_cli", "rest_lightning.tasks.predict"]
    kills("rest predict", spec | {"compared": {"*.json": ["num_frames"]}})


def test_score(tmp_path: Path, talkers: Path, repository: Path, kills: Kills) -> None:
    import yaml

    protocol = yaml.safe_load((repository / "configs/protocol/synthetic.yaml").read_text("utf-8"))
    protocol |= {"num_clips": 3, "num_frames": 48, "size_px": 64, "name": "tiny"}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(protocol))
    (tmp_path / "truth").mkdir()
    for path in sorted((talkers / "clips").glob("*.mp4"))[:3]:
        for each in (path, path.with_suffix(".json")):
            shutil.copy(each, tmp_path / "truth")
    words = ["score", "--protocol", str(tmp_path / "tiny.yaml"), "--out", "OUT", "--overwrite"]
    words += ["--generated", str(tmp_path / "truth"), "--truth", str(tmp_path / "truth")]
    results = ["metrics", "ground_truth", "num_clips", "num_frames", "failures"]
    spec: dict[str, Any] = {"words": words, "out": "row.json", "compared": {"row.json": results}}
    kills("rest score", spec | {"imports": ["rest_lightning.evaluation.scorer"]})


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
    imports = ["rest_lightning.lightning_cli", "rest_lightning.tasks.vae"]
    spec = {"words": words, "out": "run", "ignored": _LOGS, "imports": imports, "resumes": True}
    kills("rest fit", spec)


def test_ablate(tmp_path: Path, recipe: Any, repository: Path, kills: Kills) -> None:
    import yaml

    protocol = yaml.safe_load((repository / "configs/protocol/synthetic.yaml").read_text("utf-8"))
    protocol |= {"num_clips": 1, "num_frames": 48, "size_px": 64, "name": "tiny", "min_clips": 1}
    (tmp_path / "protocol.yaml").write_text(yaml.safe_dump(protocol | {"measures": ["talking"]}))
    evaluation = {"protocol": str(tmp_path / "protocol.yaml")}
    trainer = {"accelerator": "cpu", "enable_progress_bar": False}
    trainer["callbacks"] = [{"class_path": "Evaluation", "init_args": evaluation}]
    data = {"data_dir": str(recipe.data), "num_frames": 57, "progress": False}
    content = {"base": "test", "data": data, "trainer": trainer}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content))
    sources = {"transformer": "teacher", "speech_ae": "teacher", "vae": recipe.vae_stage}
    initial = {part: str(recipe.final(stage)) for part, stage in sources.items()}
    sampling = {"num_steps": 1, "guidance": 1.0, "shift": 1.0}
    base = {"model": {"init_args": {"initial": initial}}, "sampling": sampling}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    configs = ["embedded/student", "trainer/tiny", "model/tiny", "data/tiny"]
    words = ["ablate", "--base", *configs, str(tmp_path / "base.yaml"), "--out", "OUT"]
    words += ["--vae", initial["vae"], "--data", str(recipe.data), "--seeds", "1"]
    words += ["--protocol", str(tmp_path / "tiny.yaml"), "--budget-steps", "3"]
    results = ["metrics", "ground_truth", "num_clips", "num_frames", "failures"]
    # The tables name the speed and the date.
    spec = {
        "ignored": [*_LOGS, "ablation.*", "row.clips.*"],
        "compared": {"row.json": results},
        "children": True,
    }
    kills("rest ablate", {"words": words, "out": "runs", "imports": [], **spec})


def test_train_embedded(tmp_path: Path, recipe: Any, kills: Kills) -> None:
    """From where all stages but the last are done: caches, a training, an export."""
    from rest_lightning.commands.train_embedded import STAGES

    for stage in STAGES[:-1]:
        (tmp_path / "begun" / stage.name).mkdir(parents=True)
        shutil.copy(recipe.final(stage.name), tmp_path / "begun" / stage.name)
    tiny = [word for name in ("trainer", "model", "data") for word in ("--config", f"{name}/tiny")]
    words = ["train-embedded", "--data", str(recipe.data), "--out", "OUT", *tiny]
    # So long that the end comes by steps, and the schedules follow them.
    words += ["--budget-min", "600"]
    spec = {"ignored": [*_LOGS, "budget.yaml"], "begun": str(tmp_path / "begun"), "children": True}
    kills("rest train-embedded", {"words": words, "out": "runs", "imports": [], **spec})


def test_animate(tmp_path: Path, kills: Kills) -> None:
    """Shipped photographs, driven by a video of the shipped model."""
    pytest.importorskip("mediapipe", reason="the extra `prepare` is for `rest animate`")
    from rest_lightning import cli

    assets = Path(cli.__file__).parent / "assets"
    (tmp_path / "videos").mkdir()
    with wave.open(str(assets / "speech.wav")) as file:
        head = file.readframes(4 * file.getframerate())
        with wave.open(str(tmp_path / "speech.wav"), "wb") as short:
            short.setparams(file.getparams())
            short.writeframes(head)
    portraits = assets / "people" / "portraits"
    portrait = str(portraits / "ada.png")
    video = str(tmp_path / "videos" / "driver.mp4")
    assert cli.main(["talk", portrait, str(tmp_path / "speech.wav"), "-o", video, "--quiet"]) == 0
    prepare = ["prepare", str(tmp_path / "videos"), "--out", str(tmp_path / "drivers"), "--quiet"]
    prepare += ["--already-cropped", "--min_frames", "49", "--size_px", "128", "--max_still_s"]
    assert cli.main([*prepare, "null", "--min_sharpness", "null", "--max_flow", "null"]) == 0
    words = ["animate", "--portraits", str(portraits), "--out", "OUT"]
    words += ["--drivers", str(tmp_path / "drivers"), "--num-clips", "3", "--size-px", "64"]
    words += ["--num-frames", "25", "--num-workers", "1", "--val-fraction", "0"]
    words += ["--test-fraction", "0"]
    imports = ["av", "torch", "rest_lightning.data.animated.dataset"]
    kills("rest animate", {"words": words, "out": "data", "imports": imports})
