"""Save, load, continue equals uninterrupted training, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

OVERLAY = """
trainer:
  max_steps: 6
  callbacks:
    - class_path: lightning.pytorch.callbacks.EMAWeightAveraging
      init_args: {decay: 0.9}
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {dirpath: FOLDER, filename: "{step}", save_top_k: -1, every_n_train_steps: 3}
data: {windows_per_clip: 2}
"""


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
        # Four batches an epoch: step 3 is in the middle of the first, step 6 of the second, a validation between them.
        resume = ("--ckpt_path", str(tmp_path / "whole" / "step=3.ckpt"), "--seed_everything", "99")
        dropouts = ("--model.noise.identity_dropout=0.3", "--model.noise.audio_dropout=0.3") if stage == "asd" else ()
        words = (*dropouts, "--final_checkpoint=false", *(resume if run == "resumed" else ()))
        recipe.run(stage, tmp_path, *words, overlays=(overlay,))
        runs[run] = torch.load(tmp_path / run / "step=6.ckpt", weights_only=False)
    assert not (tmp_path / "resumed" / "step=3.ckpt").exists()
    whole, resumed = runs["whole"], runs["resumed"]
    assert whole["TalkingHeadDataModule"]["num_samples"] == 12
    kept = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers")
    for key in (*kept, "rest_rng_state", "rest_parts", "TalkingHeadDataModule", "epoch", "global_step"):
        assert_same(whole[key], resumed[key], key)
    before = torch.load(tmp_path / "whole" / "step=3.ckpt", weights_only=False)
    assert any(not torch.equal(value, whole["state_dict"][name]) for name, value in before["state_dict"].items())
