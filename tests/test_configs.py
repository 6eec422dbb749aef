"""Every configuration file runs, in process, at tiny size: none can rot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
FILES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
ABLATIONS = [file for file in FILES if file.startswith("ablation/")]
DATA = [file for file in FILES if file.startswith("data/")]
PAPER = [file for file in FILES if file.startswith("paper/") or file == "trainer/paper.yaml"]  # test_paper_configs.py
STRATEGIES = ["trainer/ddp.yaml", "trainer/fsdp.yaml"]  # tests/tasks/test_strategies.py runs them in two processes


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


OWN_TESTS = (*ABLATIONS, *DATA, *PAPER, *STRATEGIES, "predict.yaml")


@pytest.mark.parametrize("file", [f for f in FILES if f not in OWN_TESTS])
def test_file_is_part_of_the_recipe(recipe: Any, file: str) -> None:
    assert CONFIGS / file in recipe.used, f"configs/{file}: no test runs it, add one"
    assert all(recipe.final(stage).is_file() for stage in recipe.stages)


@pytest.mark.parametrize("file", DATA)
def test_data_file_feeds_a_stage(recipe: Any, tmp_path: Path, file: str) -> None:
    tiny = {"size_px": 64, "num_frames": 25, "batch_size": 2, "num_workers": 0, "progress": "false"}
    words = [f"--data.{name}={value}" for name, value in tiny.items()]
    cli = recipe.run(
        "vae", tmp_path, "--trainer.max_steps=1", "--final_checkpoint=false", *words, overlays=(CONFIGS / file,)
    )
    assert cli.trainer.global_step == 1
    given = yaml.safe_load((CONFIGS / file).read_text())["data"]
    for name in given.keys() - tiny.keys() - {"data_dir"}:
        assert cli.config.fit.data[name] == given[name]


@pytest.mark.parametrize("file", ABLATIONS)
def test_ablation_trains_and_streams(recipe: Any, tmp_path: Path, file: str) -> None:
    lines = (CONFIGS / file).read_text().splitlines()
    assert len(lines) <= 5
    assert lines[0].startswith("# ")
    assert "?" in lines[0]
    # Another SpeechAE does not fit the stages after it; its ablation begins there.
    stage = "speech_ae" if any("speech_ae:" in line for line in lines) else "asd"
    cli = recipe.run(stage, tmp_path, "--trainer.max_steps=1", "--final_checkpoint=false", overlays=(CONFIGS / file,))
    assert cli.trainer.global_step == 1
    for key, value in leaves(yaml.safe_load("\n".join(lines))):
        assert cli.config.fit[key] == value
        assert recipe.clis[stage].config.fit.get(key) != value, f"{key} is what the recipe has anyway"
    if stage != "asd":
        return

    from rest_lightning.callbacks.previews import borrowed_head
    from rest_lightning.talking_head import SamplingSettings

    with borrowed_head(cli.model, SamplingSettings(num_steps=2, shift=1.0), 64) as head:
        session = head.open(torch.zeros(3, 64, 64))
        frames = np.concatenate([session.push(np.zeros(40_000, np.float32)), session.flush()])
    assert frames.shape == (63, 64, 64, 3)


def test_predict(recipe: Any, tmp_path: Path, model_folder: Path, pairs: list[dict[str, str]]) -> None:
    from rest_lightning import lightning_cli

    cli = lightning_cli.run(
        [
            *("predict", "--config", str(CONFIGS / "predict.yaml"), "--model.model", str(model_folder)),
            f"--data.predict_pairs+={pairs[0]}",
            *(f"--trainer.callbacks.out_dir={tmp_path}", f"--trainer.default_root_dir={tmp_path}"),
            *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
        ]
    )
    assert cli.config.predict.return_predictions is False
    assert {path.suffix for path in tmp_path.iterdir()} == {".mp4", ".json", ".yaml"}
