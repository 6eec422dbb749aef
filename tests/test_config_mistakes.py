"""`rest fit` tells a wrong configuration in one line: file, key, nearest right one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rest_lightning.cli import main

TINY = ("--config", "embedded/asd", "--config", "model/tiny")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"data": {"num_frame": 97}}, "data.num_frame: did you mean num_frames?"),
        ({"trainr": {}}, "trainr: did you mean trainer?"),
        (
            {"model": {"init_args": {"mouth_wieght": 4}}},
            "model.init_args.mouth_wieght: did you mean mouth_weight?",
        ),
        (
            {"model": {"init_args": {"noise": {"stt": 4}}}},
            "model.init_args.noise.stt: did you mean std?",
        ),
        (
            {"model": {"init_args": {"transformer": {"init_args": {"num_layer": 2}}}}},
            "model.init_args.transformer.init_args.num_layer: did you mean num_layers?",
        ),
        (
            {"networks": {"transformer": {"init_args": {"num_layer": 2}}}},
            "model.init_args.transformer.init_args.num_layer: did you mean num_layers?",
        ),
        ({"networks": {"transfomer": {}}}, "networks.transfomer: did you mean transformer?"),
        (
            {"model": {"class_path": "StudentModul"}},
            "expected a class at model.class_path, got 'StudentModul': did you mean StudentModule?",
        ),
        (
            {"trainer": {"callbacks": [{"class_path": "SampleVideo"}]}},
            "expected a class at trainer.callbacks.class_path, got 'SampleVideo': did you mean "
            "SampleVideos?",
        ),
        (
            {
                "trainer": {
                    "callbacks": [{"class_path": "SampleVideos", "init_args": {"num_clip": 1}}]
                }
            },
            "trainer.callbacks.init_args.num_clip: did you mean num_clips?",
        ),
        ({"data": {"num_frames": "fast"}}, "data.num_frames: expected a whole number, got fast"),
    ],
)
def test_in_a_file(
    content: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(content))
    assert main(["fit", *TINY, "--config", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {file}: ")
    assert line.endswith(message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.num_frame", "97"], "got --data.num_frame: did you mean --data.num_frames?"),
        (["--trainer.max_step=3"], "got --trainer.max_step: did you mean --trainer.max_steps?"),
        (
            ["--model.mouth_wieght", "3"],
            "got --model.mouth_wieght: did you mean mouth_weight?",
        ),
        (["--model.noise.stt", "3"], "got --model.noise.stt: did you mean std?"),
        (["--trainer.callbacks", "Nothing"], "--trainer.callbacks: expected dot import path"),
        (["--data.num_frames", "x"], "--data.num_frames: expected a whole number, got x"),
        (["--conf", "embedded/asd"], "got --conf: "),
        (["stray"], "got stray: see rest fit --help"),
        (["--config", "embedded/ads"], "did you mean embedded/asd?"),
    ],
)
def test_on_the_command_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *TINY, *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_networks_need_a_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "model/tiny"]) == 2
    assert "put it behind a stage" in capsys.readouterr().err
    assert main(["fit", "--data.num_frames=97"]) == 2
    assert "expected a stage, got none" in capsys.readouterr().err


def test_print_config_shows_what_the_files_say_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    monkeypatch.chdir(tmp_path)
    assert main(["fit", *TINY, "--config", "ablation/no_asd", "--print_config"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    model = shown["model"]["init_args"]
    assert model["transformer"]["init_args"]["num_layers"] == 2
    assert model["transformer"]["init_args"]["attention"] == "chunked"
    assert model["speech_encoder"]["class_path"].endswith("LogMelEncoder")
    assert (model["asd"], model["optimizer"]["lr"]) == (None, 3e-4)
    assert shown["data"]["reference"] == "clip_start"
    assert shown["trainer"]["precision"] == "bf16-mixed"


@pytest.mark.parametrize(
    "value", [".nan", ".inf", "-.inf", ".NaN", "1.0e+400", "nan", "inf", "-Infinity"]
)
def test_numbers_that_are_not_finite_are_refused_with_file_and_key(
    value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    base = tmp_path / "base.yaml"
    base.write_text(f"model:\n  init_args:\n    optimizer: {{lr: [1.0, {value}]}}\n")
    path.write_text("base: base.yaml\ntrainer:\n  max_steps: 1\n")
    assert main(["fit", *TINY, "--config", str(path)]) == 2
    told = capsys.readouterr().err
    assert f"{base}: model.init_args.optimizer.lr: expected a finite number, got" in told
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
@pytest.mark.parametrize(
    "words",
    [
        ("fit", *TINY, "--model.optimizer.lr"),
        ("talk", "a.png", "a.wav", "-o", "a.mp4", "--guidance"),
        ("ablate", "--base", "embedded/asd", "--vae", "v", "--budget-min"),
        ("prepare", "in", "--out", "out", "--min_sharpness"),
    ],
)
def test_and_on_the_command_line(
    words: tuple[str, ...], value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words[:-1], f"{words[-1]}={value}"]) == 2
    told = capsys.readouterr().err
    assert (
        words[-1].rpartition(".")[2] in told and "expected" in told and len(told.splitlines()) == 1
    )
