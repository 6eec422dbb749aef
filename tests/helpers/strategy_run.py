"""One of several processes (torchrun) that train on rows of fixed draws: see
tests/tasks/test_strategies.py.

    python -m torch.distributed.run --standalone --nproc_per_node=2 \\
        strategy_run.py CONFIG FOLDER STAGE ...

CONFIG is a file of configs/trainer/ that names a strategy. The STAGE ``resume`` trains ASD twice,
once interrupted.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from tiny_student import (
    make_conditions,
    make_student,
    make_teacher,
    make_transformer,
    rows_of,
    save_transformer,
)
from torch import Tensor
from torch.distributed.tensor import DTensor

from rest_lightning.callbacks import MovingAverage
from rest_lightning.tasks.a2v import A2VModule, Conditions
from rest_lightning.tasks.student import ASDSettings, DistillSettings, RolloutSettings
from rest_lightning.torchvision_compat import ensure_torchvision

ensure_torchvision()
import lightning  # noqa: E402
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy  # noqa: E402

NUM_ROWS = 2


def make_stage(stage: str, folder: Path) -> A2VModule:
    """A stage with the weights that every process makes alike."""
    teacher, source = folder / "frozen_teacher.ckpt", folder / "frozen_source.ckpt"
    if not source.is_file():
        save_transformer(make_transformer("full", seed=5), teacher)
        save_transformer(make_transformer(seed=6), source)
    if stage == "teacher":
        return make_teacher()
    asd, rollout = ASDSettings(str(teacher)), RolloutSettings(2, 1.0, 0.5)
    if stage == "rollout":
        return make_student(asd=asd, rollout=rollout)
    if stage == "distill":
        return make_student(distill=DistillSettings(str(source), 3.0, 4, 2, 1.0))
    return make_student(asd=asd if stage == "asd" else None)


def losses_of(module: A2VModule, rows: slice, num_rows: int = NUM_ROWS) -> dict[str, Tensor]:
    """Losses of some rows of the one draw that all processes share; the SpeechAE is part of the
    graph.
    """
    clean = make_conditions(num_rows, 10)
    features = torch.randn(num_rows, 73, 10, 160, generator=torch.Generator().manual_seed(8))
    conditions = Conditions(clean.latents, module.speech_ae.encode(features))
    inputs = module.draw(conditions, torch.Generator().manual_seed(11))
    if inputs.rolled_out is not None:  # every other row: processes and batches differ
        inputs = replace(inputs, rolled_out=torch.arange(num_rows) % 2 == 0)
    return module.losses(rows_of(inputs, rows))


def read_strategy(config: Path) -> Strategy:
    """The strategy of a file of configs/trainer/."""
    strategy = yaml.safe_load(config.read_text())["trainer"]["strategy"]
    kinds = {kind.__name__: kind for kind in (DDPStrategy, ModelParallelStrategy)}
    made: Strategy = kinds[strategy["class_path"].rpartition(".")[2]](**strategy["init_args"])
    return made


def full(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor."""
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().clone()


def make_trainer(config: Path, max_steps: int, *callbacks: lightning.Callback) -> lightning.Trainer:
    """Two CPU processes with the strategy of ``config``, and nothing that writes by itself."""
    return lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=read_strategy(config),
        max_steps=max_steps,
        gradient_clip_val=1.0,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def train(
    config: Path,
    folder: Path,
    num_steps: int,
    target: str,
    source: str | None = None,
    seed: int = 0,
) -> None:
    """ASD up to ``num_steps``, each rank on clips and draws of its own, from ``source`` if given;
    saves ``target``.
    """
    module = make_stage("asd", folder)

    def training_step(batch: int, batch_idx: int) -> Tensor:
        number = 2 * module.trainer.global_step + torch.distributed.get_rank()
        features = torch.randn(
            NUM_ROWS, 73, 10, 160, generator=torch.Generator().manual_seed(number)
        )
        latents = make_conditions(NUM_ROWS, 10, seed=number).latents
        return module.losses(module.draw(Conditions(latents, module.speech_ae.encode(features))))[
            "loss"
        ]

    module.training_step = training_step  # type: ignore[method-assign, assignment]
    torch.manual_seed(seed)
    trainer = make_trainer(config, num_steps, MovingAverage(0.5))
    trainer.fit(module, range(1), ckpt_path=None if source is None else str(folder / source))
    trainer.save_checkpoint(folder / target)


def resume(config: Path, folder: Path) -> None:
    """``whole.ckpt`` after four steps, ``resumed.ckpt`` after two and, in another stage object, two
    more.
    """
    train(config, folder, 4, "whole.ckpt")
    train(config, folder, 2, "half.ckpt")
    train(config, folder, 4, "resumed.ckpt", "half.ckpt", seed=99)


def run(config: Path, folder: Path, stage: str) -> None:
    """One optimiser step; rank 0 saves gradients, ``Trainer`` the checkpoint, and every rank what
    it drew.
    """
    module = make_stage(stage, folder)
    results: dict[str, Any] = {}

    class OneRow(lightning.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            grads = {
                name: weight.grad
                for name, weight in module.named_parameters()
                if weight.requires_grad
            }
            results["gradients"] = {
                name: None if grad is None else full(grad) for name, grad in grads.items()
            }
            local = [grad.to_local() for grad in grads.values() if isinstance(grad, DTensor)]
            results["num_local"] = sum(grad.numel() for grad in local)

    def training_step(batch: int, batch_idx: int) -> Tensor:
        rank = torch.distributed.get_rank()
        # this rank's own, unused
        results["drawn"] = module.draw(make_conditions(NUM_ROWS, 10)).path.sigma
        return losses_of(module, slice(rank, rank + 1))["loss"]

    module.training_step = training_step  # type: ignore[method-assign, assignment]
    torch.manual_seed(0)
    # clips after the gradients are saved; AdamW's first step ignores it
    trainer = make_trainer(config, 1, OneRow())
    trainer.fit(module, range(1))
    trainer.save_checkpoint(folder / f"{stage}.ckpt")
    torch.save(results, folder / f"{stage}-{trainer.global_rank}.pt")


if __name__ == "__main__":
    for name in sys.argv[3:]:
        if name == "resume":
            resume(Path(sys.argv[1]), Path(sys.argv[2]))
        else:
            run(Path(sys.argv[1]), Path(sys.argv[2]), name)
