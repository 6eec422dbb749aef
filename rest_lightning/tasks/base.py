"""What every training stage shares: the optimiser, the learning-rate curve, and which parts a
checkpoint carries.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.callbacks import Timer
from torch import nn

from rest_lightning.errors import UserError
from rest_lightning.parts import FROZEN_PARTS_KEY, PARTS_KEY, describe_part, load_part

RNG_KEY = "rest_rng_state"


@dataclass
class OptimizerSettings:
    """AdamW with a linear warm-up and a linear decay (the paper states neither: decided here).

    Attributes:
        lr: learning rate of the stage.
        lr_factors: factor on ``lr`` by part name, for parts that learn at another rate.
        betas, weight_decay: of AdamW.
        warmup_steps: optimiser steps until ``lr`` is reached.
        decay_start: progress (0 .. 1) from which ``lr`` falls linearly; 1 keeps it constant.
        final_lr_fraction: what is left of ``lr`` at the end.
    """

    lr: float = 1e-5
    lr_factors: dict[str, float] = field(default_factory=dict)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    warmup_steps: int = 100
    decay_start: float = 1.0
    final_lr_fraction: float = 0.02


class StageModule(LightningModule):
    """Base of all stages; subclasses name their trained and frozen parts and write the steps.

    A part is a network with a ``config`` property (see :mod:`rest_lightning.parts`). Trained parts
    travel in the checkpoint together with their configuration, frozen ones do not: they come from
    the checkpoint of their own stage.

    Args:
        trained: part name -> network that this stage trains.
        frozen: part name -> network that this stage only reads.
        initial: part name -> checkpoint of an earlier stage, or exported folder, that the part
            starts from.
        optimizer: settings of the optimiser.
    """

    def __init__(
        self,
        trained: Mapping[str, nn.Module],
        frozen: Mapping[str, nn.Module | None],
        initial: Mapping[str, str] | None,
        optimizer: OptimizerSettings | None,
    ) -> None:
        super().__init__()
        self.optimizer_settings = optimizer or OptimizerSettings()
        self._resumed_rng: dict[str, Any] | None = None
        self.trained_parts = tuple(trained)
        self.frozen_parts = tuple(name for name, part in frozen.items() if part is not None)
        for name, part in [*trained.items(), *frozen.items()]:
            setattr(self, name, part)
        for name in self.frozen_parts:
            getattr(self, name).requires_grad_(False).eval()
        for name, path in (initial or {}).items():
            load_part(getattr(self, name, None), name, path)

    def setup(self, stage: str) -> None:
        """Refuse a precision that rounds everything, buffers too.

        In bfloat16 the 1,000 noise levels of the table become about 120, statistics of latents and
        the moving average lose their last steps. Mixed precision computes as fast.

        Raises:
            UserError: ``bf16-true`` or another precision with weights of half the bits.
        """
        precision = str(self.trainer.precision)
        if precision in (
            "bf16-true",
            "16-true",
            "transformer-engine",
            "transformer-engine-float16",
        ):
            raise UserError(
                f"expected weights in float32, got trainer.precision {precision}, which also "
                "rounds the table of noise levels: use bf16-mixed"
            )

    def configure_optimizers(self) -> Any:
        """AdamW over the trained parts; the schedule follows :meth:`progress`, one step at a
        time.
        """
        settings = self.optimizer_settings
        groups = [
            {
                "params": [p for p in getattr(self, name).parameters() if p.requires_grad],
                "lr": settings.lr * settings.lr_factors.get(name, 1.0),
                "name": name,
            }
            for name in self.trained_parts
        ]
        groups = [group for group in groups if group["params"]]
        optimizer = torch.optim.AdamW(
            groups, betas=settings.betas, weight_decay=settings.weight_decay
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_fraction)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def lr_fraction(self, step: int) -> float:
        """Fraction of the learning rate at an optimiser step."""
        settings = self.optimizer_settings
        warmup = min(1.0, (step + 1) / max(1, settings.warmup_steps))
        if settings.decay_start >= 1.0:
            return warmup
        remaining = min(1.0, (1.0 - self.progress(step)) / (1.0 - settings.decay_start))
        return warmup * max(settings.final_lr_fraction, remaining)

    def progress(self, step: int) -> float:
        """How much of the stage is done, 0 .. 1, by steps or by the time budget, whichever is
        further.
        """
        trainer = self._trainer
        if trainer is None:
            return 0.0
        done = [0.0]
        if trainer.max_steps and trainer.max_steps > 0:
            done.append(step / trainer.max_steps)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Timer) and callback.time_remaining() is not None:
                elapsed = callback.time_elapsed()
                done.append(elapsed / max(1e-9, elapsed + callback.time_remaining()))  # type: ignore[operator]
        return min(1.0, max(done))

    def train(self, mode: bool = True) -> StageModule:
        """Switch the trained parts; frozen ones stay in eval mode."""
        super().train(mode)
        for name in self.frozen_parts:
            getattr(self, name).eval()
        return self

    def on_train_start(self) -> None:
        """Go on with the random numbers of the checkpoint; what comes before the first step may
        draw some.
        """
        if self._resumed_rng is not None:
            torch.set_rng_state(self._resumed_rng["cpu"])
            if (
                self._resumed_rng["cuda"]
                and len(self._resumed_rng["cuda"]) == torch.cuda.device_count()
            ):
                torch.cuda.set_rng_state_all(self._resumed_rng["cuda"])
            self._resumed_rng = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Describe the parts, leave the weights of frozen ones out; keep torch's random state
        (Lightning does not).
        """
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        checkpoint[RNG_KEY] = {"cpu": torch.get_rng_state(), "cuda": cuda}
        checkpoint[PARTS_KEY] = {
            name: describe_part(getattr(self, name)) for name in self.trained_parts
        }
        checkpoint[FROZEN_PARTS_KEY] = {
            name: describe_part(getattr(self, name)) for name in self.frozen_parts
        }
        for state in _model_states(checkpoint):
            for key in self._frozen_keys(state):
                del state[key]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the frozen parts back, so that loading stays strict for everything else."""
        self._resumed_rng = checkpoint.get(RNG_KEY)
        own = self.state_dict()
        for state in _model_states(checkpoint):
            state.update({key: own[key] for key in self._frozen_keys(own)})

    def _frozen_keys(self, keys: Iterable[str]) -> list[str]:
        return [key for key in keys if key.split(".", 1)[0] in self.frozen_parts]


def _model_states(checkpoint: dict[str, Any]) -> list[dict[str, Any]]:
    # With weight averaging a checkpoint holds the averaged weights and, apart, the current ones.
    return [checkpoint[key] for key in ("state_dict", "current_model_state") if key in checkpoint]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, then renames.

    Lightning writes to the system's temporary folder first and moves: on another file system that
    is a copy, and a process that is killed meanwhile leaves half a ``last.ckpt`` where a whole one
    was.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None
    ) -> None:
        """Write ``path``; an address such as ``s3://...`` is left to Lightning."""
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.part")
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
