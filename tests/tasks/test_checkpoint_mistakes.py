"""Mistakes with checkpoints, and trainings that diverge: one line, and what was good stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from rest_lightning.cli import main

# The last is a name of 0.1.
VAE = ("--config", "embedded/vae", "--config", "trainer/tiny", "--config", "size/tiny/vae")
ONE_LINE = "error: "


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, talkers: Path) -> tuple[Path, list[str]]:
    """The folder of a training of 2 steps, and its command."""
    root = tmp_path_factory.mktemp("run") / "vae"
    words = ["fit", *VAE, "--quiet", f"--data.data_dir={talkers}"]
    words += [f"--trainer.default_root_dir={root}", "--model.principal_batches=1"]
    assert main([*words, "--trainer.max_steps=2"]) == 0
    return root, words


def steps_of(root: Path) -> int:
    newest = max(root.rglob("last.ckpt"), key=lambda path: path.stat().st_mtime)
    return int(torch.load(newest, weights_only=True)["global_step"])


def test_last_goes_on_from_the_newest_of_the_run(run: tuple[Path, list[str]]) -> None:
    root, words = run
    steps = steps_of(root)
    assert main([*words, f"--trainer.max_steps={steps + 2}", "--ckpt_path=last"]) == 0
    assert steps_of(root) == steps + 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected a checkpoint to go on from, got no such file"),
        (b"hello\n", "expected a whole checkpoint, got"),
        (os.urandom(3000), "expected a whole checkpoint, got"),
        ("cut", "expected a whole checkpoint, got"),
        ("list", "expected the checkpoint of a stage, got"),
        ("other stage", "expected a checkpoint of VAEModule with vae, got"),
        ("other size", "vae.encoder.0.conv.weight of (8, 192, 1, 1), got (16, 192, 1, 1)"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_line(
    run: tuple[Path, list[str]],
    content: bytes | str | None,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, words = run
    good = torch.load(root / "final.ckpt", weights_only=True)
    before = (root / "final.ckpt").read_bytes()
    path = tmp_path / "a.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "cut":
        path.write_bytes(before[: len(before) // 2])
    elif content == "list":
        torch.save([1, 2], path)
    elif content == "other stage":
        torch.save({**good, "rest_parts": {"speech_ae": {}}}, path)
    elif content == "other size":
        state = {"vae.encoder.0.conv.weight": torch.zeros(16, 192, 1, 1)}
        torch.save({**good, "state_dict": state}, path)
    capsys.readouterr()
    assert main([*words, "--trainer.max_steps=9", f"--ckpt_path={path}"]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and told[0].startswith(ONE_LINE) and message in told[0], told
    assert (root / "final.ckpt").read_bytes() == before


def test_last_of_a_run_that_never_was(
    run: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*run[1], f"--trainer.default_root_dir={tmp_path / 'new'}", "--ckpt_path=last"]
    assert main(words) == 2
    assert "got no last.ckpt there: leave --ckpt_path out" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps", [3, 12])
def test_a_training_that_diverges_stops_and_leaves_what_was_good(
    run: tuple[Path, list[str]], steps: int, capsys: pytest.CaptureFixture[str]
) -> None:
    root, words = run
    before = (root / "final.ckpt").read_bytes()
    rate = ("--model.optimizer.lr=1e30", "--model.optimizer.warmup_steps=0")
    capsys.readouterr()
    assert main([*words, *rate, f"--trainer.max_steps={steps}"]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith(ONE_LINE)]
    assert len(told) == 1 and "not finite at step" in told[0] and "optimizer.lr" in told[0]
    assert (root / "final.ckpt").read_bytes() == before
    for path in root.rglob("*.ckpt"):
        state = torch.load(path, weights_only=True)["state_dict"]
        assert all(value.isfinite().all() for value in state.values()), path


@pytest.mark.parametrize(
    "rate", ["--model.optimizer.lr=-1e-3", "--model.optimizer.lr_factors={vae: -1}"]
)
def test_a_negative_learning_rate_is_refused(
    run: tuple[Path, list[str]], rate: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*run[1], rate]) == 2
    assert "expected a learning rate of at least 0, got -" in capsys.readouterr().err
