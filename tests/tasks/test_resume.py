"""Save, load, continue equals uninterrupted training, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import killed_runs
import pytest
import torch

OVERLAY = """
trainer:
  max_steps: 6
  callbacks:
    - class_path: rest_lightning.callbacks.averaging.MovingAverage
      init_args: {decay: 0.9}
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {dirpath: FOLDER, filename: "{step}", save_top_k: -1, every_n_train_steps: 3}
data: {windows_per_clip: 2}
"""


KILLED_OVERLAY = """
trainer:
  max_steps: 6
  accumulate_grad_batches: 2
  callbacks:
    - class_path: rest_lightning.callbacks.averaging.MovingAverage
      init_args: {decay: 0.9}
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args:
        {dirpath: FOLDER, filename: "{step}", save_top_k: -1, save_last: true,
         every_n_train_steps: 2}
data: {windows_per_clip: 3, batch_size: 1}
"""
# With 12 batches to an epoch, 2 to a step and a checkpoint every 2 steps: each checkpoint is
# written twice, as step=n and as last. (moment, which time)
MOMENTS = (
    ("batch_start", 2),  # before the first checkpoint: the run starts anew
    ("batch_start", 8),  # between two batches of one step
    ("before_optimizer_step", 5),
    ("after_optimizer_step", 8),  # step 4 is done, its checkpoint not begun
    ("half_written", 4),
    ("before_rename", 2),  # of the very first last.ckpt
    ("before_rename", 4),  # of the second one
    ("after_rename", 4),
    ("validation", 1),
)
KEPT = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers")
COMPARED = (*KEPT, "rest_rng_state", "rest_parts", "TalkingHeadDataModule", "epoch", "global_step")


def assert_same(first: Any, second: Any, where: str) -> None:
    assert type(first) is type(second), where
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_same(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), where
        for i, (a, b) in enumerate(zip(first, second, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    else:
        assert first == second, where


@pytest.mark.parametrize("stage", ["vae", "asd"])
def test_resumed_training_is_the_uninterrupted_one(recipe: Any, tmp_path: Path, stage: str) -> None:
    runs = {}
    for run in ("whole", "resumed"):
        overlay = tmp_path / f"{run}.yaml"
        overlay.write_text(OVERLAY.replace("FOLDER", str(tmp_path / run)))
        # Four batches an epoch: step 3 is in the middle of the first, step 6 of the second, a
        # validation between them.
        resume = ("--ckpt_path", str(tmp_path / "whole" / "step=3.ckpt"), "--seed_everything", "99")
        dropouts = (
            ("--model.noise.identity_dropout=0.3", "--model.noise.audio_dropout=0.3")
            if stage == "asd"
            else ()
        )
        words = (*dropouts, "--final_checkpoint=false", *(resume if run == "resumed" else ()))
        recipe.run(stage, tmp_path, *words, overlays=(overlay,))
        runs[run] = torch.load(tmp_path / run / "step=6.ckpt", weights_only=False)
    assert not (tmp_path / "resumed" / "step=3.ckpt").exists()
    whole, resumed = runs["whole"], runs["resumed"]
    assert whole["TalkingHeadDataModule"]["num_samples"] == 12
    for key in COMPARED:
        assert_same(whole[key], resumed[key], key)
    before = torch.load(tmp_path / "whole" / "step=3.ckpt", weights_only=False)
    assert any(
        not torch.equal(value, whole["state_dict"][name])
        for name, value in before["state_dict"].items()
    )


@pytest.mark.slow
def test_killed_and_resumed_training_is_the_uninterrupted_one(
    recipe: Any, tmp_path: Path, repository: Path
) -> None:
    """SIGKILL at moments before, between and inside the writing of checkpoints; the next run goes
    on from last.ckpt.
    """
    jobs: list[dict[str, Any]] = []

    def add(folder: Path, moment: str | None = None, count: int = 0, seed: str = "0") -> None:
        folder.mkdir(exist_ok=True)
        overlay = folder / "overlay.yaml"
        overlay.write_text(KILLED_OVERLAY.replace("FOLDER", str(folder)))
        settings = (
            "--seed_everything",
            seed,
            "--final_checkpoint=false",
            "--ckpt_path",
            str(folder / "last.ckpt"),
        )
        words = recipe.words("rollout", folder, *settings, overlays=(overlay,))
        jobs.append({"words": words, "moment": moment, "count": count})

    add(tmp_path / "whole")
    for moment, count in MOMENTS:
        folder = tmp_path / f"{moment}-{count}"
        add(folder, moment, count)
        add(folder)
    paths = os.pathsep.join((str(repository), str(repository / "tests" / "helpers")))
    done = subprocess.run(
        [sys.executable, killed_runs.__file__],
        input=json.dumps(jobs), env=os.environ | {"PYTHONPATH": paths}, cwd=repository,
        capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    codes = json.loads(done.stdout.rsplit("exit codes", 1)[1])
    assert codes == [0, *[-9, 0] * len(MOMENTS)], done.stderr[-3000:]
    whole = torch.load(tmp_path / "whole" / "step=6.ckpt", weights_only=False)
    for moment, count in MOMENTS:
        folder = tmp_path / f"{moment}-{count}"
        for name in ("step=6.ckpt", "last.ckpt"):
            again = torch.load(folder / name, weights_only=False)
            for key in COMPARED:
                assert_same(whole[key], again[key], f"{moment} {count}: {key}")
        assert not (folder / "last-v1.ckpt").exists()
