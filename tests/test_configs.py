"""Every configuration file runs, in process, at tiny size: none can rot."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from rest_lightning.models.speech_ae import SpeechPooling, SpeechProjection
from rest_lightning.parts import read_part

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
FILES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
ABLATIONS = [file for file in FILES if file.startswith("ablation/")]
PREPARE = "data/prepare.yaml"  # tests/data/preparation/test_options.py
DATA = [file for file in FILES if file.startswith("data/") and file != PREPARE]
# test_paper_configs.py
PAPER = [file for file in FILES if file.startswith("paper/") or file.endswith("/paper.yaml")]
# tests/evaluation/test_rest_test.py
EVAL = [file for file in FILES if file.startswith(("eval/", "protocol/")) or file == "test.yaml"]
# tests/tasks/test_strategies.py runs them in two processes
STRATEGIES = ["trainer/ddp.yaml", "trainer/fsdp.yaml"]
# How to generate, not how to train: one file for `rest predict` and for the previews of `rest fit`.
SAMPLED = [file for file in ABLATIONS if "\nsampling:" in (CONFIGS / file).read_text()]
# Those that have a test of their own; no_asd.yaml has one besides.
WITHOUT_SPEECH_AE = {
    "ablation/no_speech_ae.yaml": SpeechProjection,
    "ablation/pooled_speech.yaml": SpeechPooling,
}
APART = (*WITHOUT_SPEECH_AE, "ablation/no_speech_ae_pretraining.yaml")
TRAINED = [file for file in ABLATIONS if file not in (*SAMPLED, *APART)]
ONE_STEP = ("--trainer.max_steps=1", "--final_checkpoint=false")


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


OWN_TESTS = (
    *ABLATIONS,
    *DATA,
    *PAPER,
    *EVAL,
    *STRATEGIES,
    PREPARE,
    "predict.yaml",
    "embedded/vae_adversarial.yaml",
    "size/tiny/vae.yaml",
)


@pytest.mark.parametrize("file", [f for f in FILES if f not in OWN_TESTS])
def test_file_is_part_of_the_recipe(recipe: Any, file: str) -> None:
    assert CONFIGS / file in recipe.used, f"configs/{file}: no test runs it, add one"
    assert all(recipe.final(stage).is_file() for stage in recipe.stages)


@pytest.mark.parametrize("file", DATA)
def test_data_file_feeds_a_stage(recipe: Any, tmp_path: Path, file: str) -> None:
    tiny = {"size_px": 64, "num_frames": 25, "batch_size": 2, "num_workers": 0, "progress": "false"}
    words = [f"--data.{name}={value}" for name, value in tiny.items()]
    cli = recipe.run(
        "vae",
        tmp_path,
        *ONE_STEP,
        "--model.principal_batches=0",  # of thousands of numbers: takes seconds
        *words,
        overlays=(CONFIGS / file,),
    )
    assert cli.trainer.global_step == 1
    given = yaml.safe_load((CONFIGS / file).read_text())["data"]
    for name in given.keys() - tiny.keys() - {"data_dir"}:
        assert cli.config.fit.data[name] == given[name]


@pytest.mark.parametrize("file", ABLATIONS)
def test_ablation_is_short_and_asks_a_question(file: str) -> None:
    lines = (CONFIGS / file).read_text().splitlines()
    assert len(lines) <= 5
    assert all(len(line) <= 120 for line in lines)
    assert lines[0].startswith("# ")
    assert lines[0].count("?") == 1


def values(file: str) -> dict[str, Any]:
    return dict(leaves(yaml.safe_load((CONFIGS / file).read_text())))


def plain(key: str, value: Any) -> Any:
    """A value as a file has it: lists, and classes by their names alone."""
    if key.endswith("class_path") and isinstance(value, str):
        return value.rpartition(".")[2]
    return list(value) if isinstance(value, tuple) else value


def check_values(recipe: Any, config: Any, stage: str, file: str) -> None:
    """All values of an ablation arrived, and differ from the recipe's."""
    for key, value in values(file).items():
        assert plain(key, config[key]) == value
        mine = plain(key, recipe.clis[stage].config.fit.get(key))
        assert mine != value, f"{key} is what the recipe has"


def stream(module: Any) -> np.ndarray:
    """One and a half seconds of a student's stream."""
    from rest_lightning.callbacks.previews import borrowed_head
    from rest_lightning.diffusion.sampling import Sampling

    with borrowed_head(module, Sampling(num_steps=2, shift=1.0), 64) as head:
        session = head.open(torch.zeros(3, 64, 64))
        return np.concatenate([session.push(np.zeros(40_000, np.float32)), session.flush()])


@pytest.mark.parametrize("file", TRAINED)
def test_ablation_trains_and_streams(recipe: Any, tmp_path: Path, file: str) -> None:
    # Another number of speech tokens does not fit the stages after SpeechAE; its ablation begins
    # there.
    stage = "speech_ae" if file == "ablation/one_speech_token.yaml" else "asd"
    cli = recipe.run(stage, tmp_path, *ONE_STEP, overlays=(CONFIGS / file,))
    assert cli.trainer.global_step == 1
    check_values(recipe, cli.config.fit, stage, file)
    if stage == "asd":
        assert stream(cli.model).shape == (63, 64, 64, 3)


def test_without_asd_is_the_flow_loss_alone(recipe: Any, tmp_path: Path) -> None:
    overlay = CONFIGS / "ablation/no_asd.yaml"
    module = recipe.run("asd", tmp_path, *ONE_STEP, overlays=(overlay,)).model
    assert module.asd is None
    assert "teacher" not in module.frozen_parts
    assert recipe.clis["asd"].model.asd is not None


def test_without_pretraining_the_teacher_starts_with_a_random_speech_ae(
    recipe: Any, tmp_path: Path
) -> None:
    file = "ablation/no_speech_ae_pretraining.yaml"
    cli = recipe.run("speech_ae", tmp_path, overlays=(CONFIGS / file,))
    check_values(recipe, cli.config.fit, "speech_ae", file)
    assert cli.trainer.global_step == 0
    start = tmp_path / "final.ckpt"
    untrained, trained = (
        read_part("speech_ae", path)[1] for path in (start, recipe.final("speech_ae"))
    )
    # A residual branch ends in a zero that the first step of training moves.
    ends = [key for key in untrained if key.endswith("conv2.conv.weight")]
    assert ends and all(not untrained[key].any() and trained[key].any() for key in ends)
    teacher = recipe.run(
        "teacher", tmp_path / "teacher", *ONE_STEP, f"--model.initial.speech_ae={start}"
    )
    assert teacher.trainer.global_step == 1


@pytest.mark.parametrize("file", WITHOUT_SPEECH_AE)
def test_without_speech_ae_stages_follow_each_other(recipe: Any, tmp_path: Path, file: str) -> None:
    overlays = (CONFIGS / file, CONFIGS / "ablation/no_speech_ae_pretraining.yaml")
    recipe.run("speech_ae", tmp_path / "speech_ae", overlays=overlays)
    start = tmp_path / "speech_ae" / "final.ckpt"
    for stage in ("teacher", "asd"):
        initial = f"--model.initial.speech_ae={start}"
        cli = recipe.run(
            stage, tmp_path / stage, "--trainer.max_steps=1", initial, overlays=overlays[:1]
        )
        assert type(cli.model.speech_ae) is WITHOUT_SPEECH_AE[file]
        assert cli.trainer.global_step == 1
        check_values(recipe, cli.config.fit, stage, file)
        start = tmp_path / stage / "final.ckpt"
    assert stream(cli.model).shape == (63, 64, 64, 3)


@pytest.mark.parametrize("file", SAMPLED)
def test_sampling_ablation_serves_previews(recipe: Any, tmp_path: Path, file: str) -> None:
    previews = tmp_path / "previews.yaml"
    previews.write_text(
        "trainer: {callbacks+: [{class_path: rest_lightning.callbacks.previews.SampleVideos}]}\n"
        "sampling: {num_steps: 3, guidance: 2.5, reference_guidance: 0.0, shift: 1.0}\n"
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "no sample videos")
        cli = recipe.run("asd", tmp_path, overlays=(previews, CONFIGS / file), command="validate")
    given = {key.removeprefix("sampling."): value for key, value in values(file).items()}
    from rest_lightning.diffusion.sampling import Sampling

    (callback,) = (c for c in cli.trainer.callbacks if type(c).__name__ == "SampleVideos")
    others: dict[str, float | None] = {"num_steps": 3, "guidance": 2.5, "shift": 1.0}
    others |= {"reference_guidance": 0.0, "table_steps": None}
    assert asdict(callback.sampling.of(Sampling())) == others | given
    assert len(list(tmp_path.rglob("samples/step-*.mp4"))) == 1


@pytest.mark.parametrize("file", [None, *SAMPLED])
def test_predict(
    tmp_path: Path, model_folder: Path, pairs: list[dict[str, str]], file: str | None
) -> None:
    from rest_lightning import lightning_cli
    from rest_lightning.talking_head import TalkingHead

    configs = ["predict.yaml", file] if file else ["predict.yaml"]
    cli = lightning_cli.run(
        [
            *("predict", *(word for name in configs for word in ("--config", str(CONFIGS / name)))),
            *("--model.model", str(model_folder)),
            f"--data.predict_pairs+={pairs[0]}",
            *(f"--trainer.callbacks.out_dir={tmp_path}", f"--trainer.default_root_dir={tmp_path}"),
            *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
        ]
    )
    assert cli.config.predict.return_predictions is False
    assert {path.suffix for path in tmp_path.iterdir()} == {".mp4", ".json", ".yaml"}
    (report,) = (json.loads(path.read_text())["configuration"] for path in tmp_path.glob("*.json"))
    given = (
        {key.removeprefix("sampling."): value for key, value in values(file).items()}
        if file
        else {}
    )
    expected = asdict(TalkingHead.from_pretrained(model_folder).sampling) | given
    assert {key: report[key] for key in expected} == expected
