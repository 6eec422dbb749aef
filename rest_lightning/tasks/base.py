"""What every training stage shares: the optimiser, the learning-rate curve, and the content of a
checkpoint.
"""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from lightning import LightningModule
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.callbacks import Timer
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from rest_lightning.config import reason_of
from rest_lightning.errors import UserError
from rest_lightning.media.files import whole_file
from rest_lightning.parts import (
    FROZEN_PARTS_KEY,
    PARTS_KEY,
    build_part,
    describe_part,
    fingerprint_of,
    load_part,
    open_part,
    open_speech_encoder,
    read_checkpoint,
)

RNG_KEY = "rest_rng_state"
_WAYS_OUT = {
    "test": "`rest test --config eval/synthetic --model.model CHECKPOINT --model.vae CHECKPOINT` "
    "scores what a teacher or student makes",
    "predict": "`rest export` makes a model of a student for `rest predict --config predict`",
}


@dataclass
class OptimizerSettings:
    """AdamW, or another optimiser, with a linear warm-up and a linear decay.

    REST states neither warm-up nor decay; both are choices of this project.

    Attributes:
        lr: learning rate of the stage.
        lr_factors: factor on ``lr`` by part name, for parts that learn at another rate.
        betas: of AdamW.
        weight_decay: of weights; norms, biases and tables do not decay.
        warmup_steps: optimiser steps until ``lr`` is reached.
        decay_start: progress (0 to 1) from which ``lr`` falls linearly; 1 keeps it constant.
        final_lr_fraction: fraction of ``lr`` at the end.
        algorithm: another optimiser: a function of parameter groups, which hold ``lr`` and
            ``weight_decay``. In a configuration it is a class, as in ``algorithm: {class_path:
            torch.optim.RMSprop, init_args: {momentum: 0.9}}``. None takes AdamW.
    """

    lr: float = 1e-5
    lr_factors: dict[str, float] = field(default_factory=dict)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    warmup_steps: int = 100
    decay_start: float = 1.0
    final_lr_fraction: float = 0.02
    algorithm: Callable[[Iterable[Any]], Optimizer] | None = None


class StageModule(LightningModule):
    """Base of all stages. A subclass names its trained and frozen parts and writes the steps.

    A part is a network with a ``config`` property (see :mod:`rest_lightning.parts`). A checkpoint
    holds the trained parts with their configuration. It does not hold the weights of frozen parts,
    which the checkpoint of their own stage has.

    Args:
        trained: part name -> network that this stage trains. Checkpoints store a class of your own
            by its import path.
        frozen: part name -> network that this stage only uses.
        initial: part name -> checkpoint of an earlier stage, or model folder, from which the part
            takes its first weights.
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
        frame = inspect.currentframe()
        names = (*trained, *frozen, "trained", "frozen")
        self.save_hyperparameters(ignore=names, frame=frame.f_back if frame is not None else None)
        settings = {name: plain(value) for name, value in self.hparams.items() if name[0] != "_"}
        self.hparams.clear()
        self.hparams.update(settings)  # a checkpoint may only hold tensors and plain values
        self.optimizer_settings = optimizer or OptimizerSettings()
        rates = {"lr": self.optimizer_settings.lr, **self.optimizer_settings.lr_factors}
        for name, rate in rates.items():
            if not 0 <= rate < float("inf"):
                raise UserError(
                    f"expected a learning rate of at least 0, got {rate:g} for {name}: set "
                    "model.optimizer.lr or lr_factors"
                )
        self._resumed_rng: dict[str, Any] | None = None
        self._clock = _Clock(0)
        self._watched: torch.Tensor | float = 0.0  # not finite once a loss was not
        self._makers: dict[str, str] = {}  # fingerprints that `check_maker` has accepted
        self.trained_parts = tuple(trained)
        self.frozen_parts = tuple(name for name, part in frozen.items() if part is not None)
        for name, part in [*trained.items(), *frozen.items()]:
            setattr(self, name, part)
        for name in (*self.trained_parts, *self.frozen_parts):
            describe_part(getattr(self, name))  # a part that cannot be saved fails here, at once
        for name in self.frozen_parts:
            getattr(self, name).requires_grad_(False).eval()
        for name, path in (initial or {}).items():
            load_part(getattr(self, name, None), name, path)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # Lightning's is no plain class method
        cls,
        checkpoint_path: str | Path,
        map_location: Any = None,
        hparams_file: None = None,
        strict: bool = True,
        weights_only: bool = True,
        **changes: Any,
    ) -> Self:
        """Returns the stage as it was trained: settings and trained parts from the checkpoint.

        A frozen part is built from its description where it has no weights of its own; otherwise
        it comes from the file that ``initial`` names, or from ``changes``.

        Args:
            checkpoint_path: of this stage.
            map_location: device of the module; None is the CPU.
            hparams_file: not used; the checkpoint holds all settings.
            strict: whether the checkpoint must hold exactly this module's weights.
            weights_only: True; nothing else is read.
            changes: arguments of the constructor in place of the checkpoint's.

        Raises:
            UserError: another stage's checkpoint, or a frozen part whose weights are nowhere.
        """
        checkpoint = read_checkpoint(checkpoint_path)
        described = checkpoint.get(PARTS_KEY, {})
        parameters = inspect.signature(cls.__init__).parameters
        takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        if not described or not (takes_any or described.keys() <= parameters.keys()):
            raise UserError(
                f"expected a checkpoint of {cls.__name__}, got {checkpoint_path} with "
                f"{', '.join(sorted(described)) or 'none of our parts'}"
            )
        settings = dict(checkpoint.get("hyper_parameters", {}))
        initial = {**(settings.pop("initial", None) or {}), **(changes.pop("initial", None) or {})}
        given: dict[str, Any] = {name: build_part(each) for name, each in described.items()}
        for name, description in checkpoint.get(FROZEN_PARTS_KEY, {}).items():
            is_ours = takes_any or name in parameters
            if is_ours and name not in changes and name not in ("teacher", "teacher_speech_ae"):
                given[name] = _frozen_part(name, description, initial.get(name), checkpoint_path)
        given |= typed_settings(cls, settings, skip={*given, *changes, "initial"}) | changes
        module = cls(**given)
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"], strict=strict)
        return module if map_location is None else module.to(map_location)

    def check_checkpoint(self, path: str | Path) -> None:
        """Checks that a checkpoint is one that this stage can go on from.

        Raises:
            UserError: another stage's, or one with weights of other shapes; names the first.
        """
        found = read_checkpoint(path)
        parts = set(found.get(PARTS_KEY, ()))
        if parts != set(self.trained_parts):
            raise UserError(
                f"expected a checkpoint of {type(self).__name__} with "
                f"{', '.join(self.trained_parts)}, got {path} with "
                f"{', '.join(sorted(parts)) or 'none of our parts'}: model.initial starts from the "
                "weights of another stage"
            )
        own = self.state_dict()
        for name, value in found.get("state_dict", {}).items():
            if name not in own or own[name].shape != value.shape:
                size = f"{tuple(own[name].shape)}" if name in own else "no such weights"
                raise UserError(
                    f"{path}: expected {name} of {size}, got {tuple(value.shape)}: give the "
                    "configuration that it was trained with"
                )

    @classmethod
    def refuse(cls, command: str) -> None:
        """Raises a UserError that says what to do, where ``command`` is ``test`` or ``predict``."""
        if command in _WAYS_OUT:
            raise UserError(
                f"expected a model for rest {command}, got the stage {cls.__name__}: `rest "
                f"validate` runs its losses on held-out clips, {_WAYS_OUT[command]}"
            )

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Does nothing; Lightning wants the method. :meth:`setup` tells what to run instead."""

    def setup(self, stage: str) -> None:
        """Refuses tests, and precisions that round the buffers as well as the weights.

        In bfloat16 the table's 1,000 noise levels become about 120, and statistics of latents and
        moving averages stop moving. Mixed precision is as fast without that.

        Raises:
            UserError: ``rest test`` or ``rest predict`` of a stage, or ``bf16-true`` or another
                precision with weights of half the bits.
        """
        self.refuse(stage)
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

    def check_maker(
        self, batch: Mapping[str, Any], key: str, part: nn.Module, with_config: bool = False
    ) -> None:
        """Refuses latents or speech features that another network made.

        Args:
            batch: may hold the maker's fingerprint under ``key``; a batch without one passes.
            key: ``latents_of`` or ``speech_of``.
            part: the network of this stage.
            with_config: see :func:`~rest_lightning.parts.fingerprint_of`.

        Raises:
            UserError: another network made them; previews and sessions would use this stage's.
        """
        made_by = batch.get(key)
        if made_by is None or made_by == self._makers.get(key):
            return
        own = fingerprint_of(part, with_config)
        if made_by != own:
            content = {"latents_of": "latents of the VAE", "speech_of": "features of the encoder"}
            raise UserError(
                f"expected {content[key]} {own}, got those of {made_by}: make them again with "
                "`rest encode --overwrite`"
            )
        self._makers[key] = own

    def configure_optimizers(self) -> Any:
        """Returns the optimiser over the trained parts, AdamW by default, and its schedule.

        The schedule follows :meth:`progress`, one step at a time.
        """
        settings = self.optimizer_settings
        parameters = dict(self.named_parameters())
        groups = [
            {
                "params": [parameters[name] for name in names],
                "lr": settings.lr * settings.lr_factors.get(part, 1.0),
                "weight_decay": settings.weight_decay if decays else 0.0,
                "name": _group_name(part, decays),
            }
            for part, decays, names in self.parameter_groups()
        ]
        optimizer = (
            self._adamw(groups) if settings.algorithm is None else settings.algorithm(groups)
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_fraction)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _adamw(self, groups: list[dict[str, Any]]) -> Optimizer:
        settings = self.optimizer_settings
        is_fused = all(each.is_cuda for group in groups for each in group["params"])
        optimizer = torch.optim.AdamW(
            groups, betas=settings.betas, weight_decay=settings.weight_decay, fused=is_fused or None
        )
        if is_fused:
            # Lightning refuses to clip gradients of an optimiser with this flag, because its kernel
            # could unscale them itself. It does so only with a scaler, and there is none here.
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        return optimizer

    def parameter_groups(self) -> list[tuple[str, bool, list[str]]]:
        """Returns (part, whether its weights decay, names of its parameters) of each group.

        Weight decay pulls towards zero. That suits matrices, but not gains, biases, and tables of
        positions or modulations, for which zero is no neutral value. Empty groups are left out.
        """
        groups = []
        for part in self.trained_parts:
            trained = [
                (f"{part}.{name}", parameter)
                for name, parameter in getattr(self, part).named_parameters()
                if parameter.requires_grad
            ]
            for decays in (True, False):
                names = [name for name, each in trained if _decays(name, each) == decays]
                if names:
                    groups.append((part, decays, names))
        return groups

    def lr_fraction(self, step: int) -> float:
        """Returns the fraction of the learning rate at an optimiser step."""
        settings = self.optimizer_settings
        warmup = min(1.0, (step + 1) / max(1, settings.warmup_steps))
        if settings.decay_start >= 1.0:
            return warmup
        remaining = min(1.0, (1.0 - self.progress(step)) / (1.0 - settings.decay_start))
        return warmup * max(settings.final_lr_fraction, remaining)

    def progress(self, step: int) -> float:
        """Returns how much of the stage is done, 0 to 1: by steps or by time, whichever is more."""
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
        """Switches the mode of the trained parts; frozen ones stay in evaluation mode."""
        super().train(mode)
        for name in self.frozen_parts:
            getattr(self, name).eval()
        return self

    def on_train_start(self) -> None:
        """Restores the random state of the checkpoint.

        Not earlier, since sanity checks and loaders may draw numbers before the first step.
        """
        if self._resumed_rng is not None:
            torch.set_rng_state(self._resumed_rng["cpu"])
            if (
                self._resumed_rng["cuda"]
                and len(self._resumed_rng["cuda"]) == torch.cuda.device_count()
            ):
                torch.cuda.set_rng_state_all(self._resumed_rng["cuda"])
            self._resumed_rng = None

    def on_train_epoch_start(self) -> None:
        """Starts the clock anew: the time between two epochs is no wait for data."""
        self._clock = _Clock(self.global_step)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Ends the wait for this batch."""
        self._clock.data_arrived()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Logs this process's samples per second and its share of time spent waiting for data."""
        names = batch.get("clip_id") if isinstance(batch, dict) else None
        self._clock.batch_done(0 if names is None else len(names))
        self._watch_loss(outputs)
        # Only what is logged with the last batch of such a step reaches the logger.
        is_due = self.global_step % max(1, self.trainer.log_every_n_steps) == 0  # type: ignore[attr-defined]
        if names is not None and is_due and self.global_step != self._clock.step:
            self.log_dict(self._clock.read())
            self._clock = _Clock(self.global_step)

    def _watch_loss(self, outputs: Any) -> None:
        """Ends a training whose loss is not finite. On a GPU that is asked at steps that are logged
        alone, since the answer waits for the device.
        """
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, torch.Tensor):
            return
        # NaN and infinity stay what they are when zero times them is added up
        self._watched = 0.0 * loss.detach() + self._watched
        is_due = self.global_step % max(1, self.trainer.log_every_n_steps) == 0  # type: ignore[attr-defined]
        if (loss.device.type == "cpu" or is_due) and not torch.isfinite(self._watched):
            self._refuse_divergence("the loss is not finite")

    def _refuse_divergence(self, what: str) -> NoReturn:
        raise UserError(
            f"expected a training that converges, but {what} at step {self.global_step}: lower "
            "model.optimizer.lr, or raise warmup_steps; checkpoints of before are whole"
        )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Logs the norm of each part's gradient, before it is clipped."""
        if (self.global_step + 1) % max(1, self.trainer.log_every_n_steps):  # type: ignore[attr-defined]
            return
        for part in self.trained_parts:
            parameters = getattr(self, part).parameters()
            gradients = [each.grad for each in parameters if each.grad is not None]
            if gradients:
                norm = torch.nn.utils.get_total_norm(gradients)
                norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
                self.log(f"grad_norm/{part}", norm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the parts' descriptions and torch's random state, which Lightning leaves out, and
        removes the weights of frozen parts.

        Raises:
            UserError: weights that are not finite: such a checkpoint would replace a good one.
        """
        for part in self.trained_parts:
            for name, weight in getattr(self, part).named_parameters():
                local = weight.to_local() if isinstance(weight, DTensor) else weight
                if not local.is_meta and not torch.isfinite(local).all():
                    self._refuse_divergence(f"the weights {part}.{name} are not finite")
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
        """Puts the weights of frozen parts back, so that loading can be strict."""
        self._regroup(checkpoint)
        self._resumed_rng = checkpoint.get(RNG_KEY)
        own = self.state_dict()
        for state in _model_states(checkpoint):
            state.update({key: own[key] for key in self._frozen_keys(own)})

    def _regroup(self, checkpoint: dict[str, Any]) -> None:
        """Converts the optimiser's state of old checkpoints, which had one group for each part."""
        groups = self.parameter_groups()
        for state in checkpoint.get("optimizer_states", ()):
            before = {group.get("name"): group for group in state["param_groups"]}
            if len(before) == len(groups) or before.keys() != {part for part, _, _ in groups}:
                continue
            places: dict[str, Any] = {}  # of parameters, in the old order
            for part, group in before.items():
                inside = [each for each in groups if each[0] == part]
                known = {name for _, _, names in inside for name in names}
                ordered = [name for name, _ in self.named_parameters() if name in known]
                places |= dict(zip(ordered, group["params"], strict=True))
            count, moved, regrouped = 0, {}, []
            for part, decays, names in groups:
                decay = before[part]["weight_decay"] if decays else 0.0
                numbers = list(range(count, count + len(names)))
                count += len(names)
                changes = {"params": numbers, "weight_decay": decay}
                regrouped.append({**before[part], **changes, "name": _group_name(part, decays)})
                for number, name in zip(numbers, names, strict=True):
                    if places[name] in state["state"]:
                        moved[number] = state["state"][places[name]]
            order = list(before)
            for scheduler in checkpoint.get("lr_schedulers", ()):
                for key in ("base_lrs", "_last_lr", "lr_lambdas"):
                    if key in scheduler:
                        scheduler[key] = [scheduler[key][order.index(g[0])] for g in groups]
            state["param_groups"], state["state"] = regrouped, moved

    def _frozen_keys(self, keys: Iterable[str]) -> list[str]:
        return [key for key in keys if key.split(".", 1)[0] in self.frozen_parts]


def plain(value: Any) -> Any:
    """Returns a setting as YAML would have it.

    A dataclass becomes a mapping, any other object the path of its class.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value) or type(value).__name__ == "Namespace":  # of argparse or jsonargparse
        return {key: plain(each) for key, each in vars(value).items()}
    of = value if callable(value) and hasattr(value, "__qualname__") else type(value)
    return {"class_path": f"{of.__module__}.{of.__qualname__}"}


def typed_settings(
    cls: type[StageModule], settings: Mapping[str, Any], skip: set[str]
) -> dict[str, Any]:
    """Returns settings of :func:`plain` in the types that the constructor of ``cls`` takes.

    Raises:
        UserError: a value that the constructor does not take (any more).
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    known = parser.add_class_arguments(
        cls, "stage", instantiate=False, fail_untyped=False, skip=skip
    )
    own = {name: value for name, value in settings.items() if f"stage.{name}" in known}
    try:
        values = parser.instantiate_classes(parser.parse_object({"stage": own}))["stage"]
    except ArgumentError as error:
        key, reason = reason_of(str(error))
        raise UserError(
            f"{key or 'the settings of the checkpoint'}: {reason}; give it to load_from_checkpoint"
        ) from None
    return {name: values[name] for name in own}


def _frozen_part(
    name: str, description: dict[str, Any], source: str | None, checkpoint: str | Path
) -> nn.Module:
    if source is not None and Path(source).exists():
        return open_part(name, source)
    if name == "speech_encoder":
        return open_speech_encoder(checkpoint)
    part = build_part(description)
    if any(True for _ in part.parameters()):
        raise UserError(
            f"expected the weights of the frozen {name}, which are not in {checkpoint}, got none: "
            f"give {name}=..., or initial={{'{name}': 'final.ckpt of its stage'}}"
        )
    return part


class _Clock:
    """Measures, from one step on, the wait for data and the number of samples."""

    def __init__(self, step: int) -> None:
        self.step = step
        self._mark_s = self._start_s = time.perf_counter()
        self._waited_s, self._num_samples = 0.0, 0

    def data_arrived(self) -> None:
        self._waited_s += time.perf_counter() - self._mark_s

    def batch_done(self, num_samples: int) -> None:
        self._num_samples += num_samples
        self._mark_s = time.perf_counter()

    def read(self) -> dict[str, float]:
        taken_s = max(1e-9, time.perf_counter() - self._start_s)
        return {
            "speed/samples_per_second": self._num_samples / taken_s,
            "speed/data_wait": self._waited_s / taken_s,
        }


TABLES = ("scale_shift_table", "spatial_embedding", "encoder_places", "decoder_places")


def _decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1 and name.rpartition(".")[2] not in TABLES


def _group_name(part: str, decays: bool) -> str:
    return part if decays else f"{part}/no_decay"


def _model_states(checkpoint: dict[str, Any]) -> list[dict[str, Any]]:
    # With weight averaging a checkpoint holds the averaged weights and, apart, the current ones.
    return [checkpoint[key] for key in ("state_dict", "current_model_state") if key in checkpoint]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target, then renames it.

    Lightning writes to the system's temporary folder and moves the file. Across file systems a move
    is a copy, so a process killed meanwhile would leave half a ``last.ckpt`` in place of a whole
    one.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None
    ) -> None:
        """Writes ``path``; an address such as ``s3://...`` is left to Lightning."""
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(target) as temporary, temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
