"""Training on precomputed speech features is training on the audio."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rest_lightning.cli import main
from rest_lightning.errors import UserError

DIT = ("--data.augment=false", "--final_checkpoint=false")


def encode(recipe: Any, option: str, source: Path, out: Path, *more: str) -> None:
    words = ["encode", option, str(source), "--data", str(recipe.data), "--out", str(out)]
    assert main([*words, "--num-frames", "49", "--windows-per-clip", "3", *more]) == 0


@pytest.fixture(scope="module")
def caches(recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents and speech features of the recipe's clips, made by its own stages."""
    folder = tmp_path_factory.mktemp("caches")
    vae, references = recipe.final(recipe.vae_stage), ("--references-per-clip", "1")
    encode(recipe, "--model", vae, folder / "latents", *references)
    encode(recipe, "--speech-encoder", recipe.final("speech_ae"), folder / "speech")
    return folder


def test_same_weights_bit_by_bit(recipe: Any, caches: Path, tmp_path: Path) -> None:
    speech, latents = (
        f"--data.speech_dir={caches / 'speech'}",
        f"--data.latents_dir={caches / 'latents'}",
    )
    online, cached = (
        recipe.run("student", tmp_path / name, *DIT, latents, *words)
        for name, words in (("online", ()), ("cached", (speech,)))
    )
    assert "speech_steps" in next(iter(cached.datamodule.train_dataloader()))
    assert "speech_steps" not in next(iter(online.datamodule.train_dataloader()))
    before = torch.load(recipe.final("teacher"), weights_only=False)["state_dict"]
    assert cached.trainer.global_step == 3
    for name, value in online.model.state_dict().items():
        assert torch.equal(value, cached.model.state_dict()[name])
    assert any(
        not torch.equal(value, before[name])
        for name, value in online.model.state_dict().items()
        if name in before
    )


def test_speech_ae_takes_them_too(recipe: Any, caches: Path, tmp_path: Path) -> None:
    words = (
        *DIT,
        "--data.num_frames=49",
        f"--data.speech_dir={caches / 'speech'}",
        "--trainer.max_steps=1",
    )
    assert recipe.run("speech_ae", tmp_path, *words).trainer.global_step == 1


def test_stale_features_end_the_run(recipe: Any, caches: Path, tmp_path: Path) -> None:
    overlay = recipe.configs / "ablation/lookahead_0_ms.yaml"
    words = ("--data.num_frames=49", f"--data.speech_dir={caches / 'speech'}")
    with pytest.raises(
        UserError,
        match=r"expected features of the encoder .*: make them again",
    ):
        recipe.run("student", tmp_path, *DIT, *words, overlays=(overlay,))
    with pytest.raises(UserError, match="expected augment false with speech_dir"):
        recipe.run("speech_ae", tmp_path, *words, "--data.augment=true")
