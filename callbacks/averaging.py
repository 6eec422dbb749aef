"""The exponential moving average of the weights that a stage trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import UserError

# Keys of a checkpoint; Lightning's WeightAveraging uses the same ones, so each reads the other's.
CURRENT_KEY = "current_model_state"
STATE_KEY = "averaging_state"
COUNT = "n_averaged"


class MovingAverage(Callback):
    """Averages the trained weights: ``a_1 = w_1``, ``a_n = decay * a_(n-1) + (1 - decay) * w_n``.

    One copy of the parameters that get a gradient, beside them on their device; frozen parts and
    buffers are not copied. With sharded networks (FSDP2) each process averages its own share. The
    average is updated after each optimiser step, however many batches that step took, by one
    ``torch._foreach_lerp_`` for all parameters.

    Validation, sample videos and what a stage leaves behind use the averaged weights. In a
    checkpoint ``state_dict`` holds the averaged weights and ``current_model_state`` the current
    ones, from which a resumed training goes on. A resumed training that has no step left ends with
    the averaged weights, too. The papers do not say whether they average (docs/method.md).

    Args:
        decay: in [0, 1); the average reaches back about ``1 / (1 - decay)`` steps.

    Raises:
        UserError: a decay outside [0, 1).
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0.0 <= decay < 1.0:
            raise UserError(
                f"expected a decay of at least 0 and below 1, got {decay}: 0.999 averages about "
                "1,000 steps"
            )
        self.decay = decay
        self._forget()

    def _forget(self) -> None:
        self._average: dict[str, Tensor] = {}  # a process's own share of sharded parameters
        self._num_updates = 0
        self._latest_step = 0
        self._is_swapped = False  # the module holds the average, and `_average` the current weights

    # -- training ----------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """A new fit begins with a new average."""
        if stage == "fit":
            self._forget()

    @torch.no_grad()
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Take in the weights where this batch completed an optimiser step."""
        if trainer.global_step <= self._latest_step:
            return
        self._latest_step = trainer.global_step
        parameters = averaged_parameters(pl_module)
        current = [local(parameter) for parameter in parameters.values()]
        if self._num_updates == 0:
            self._average = {
                name: weight.clone() for name, weight in zip(parameters, current, strict=True)
            }
        else:
            average = self._on_device_of(parameters)
            torch._foreach_lerp_(average, current, 1.0 - self.decay)
        self._num_updates += 1

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the average."""
        self._swap(pl_module, to_average=True)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Train on from the current weights."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._swap(pl_module, to_average=False)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """A checkpoint that is saved now holds what it would hold outside of a validation."""
        self._swap(pl_module, to_average=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the module."""
        self._swap(pl_module, to_average=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same where a resumed training had no step left, and so no training ended."""
        self._swap(pl_module, to_average=True)

    @torch.no_grad()
    def _swap(self, module: LightningModule, to_average: bool) -> None:
        if not self._num_updates or self._is_swapped == to_average:
            return
        parameters = dict(module.named_parameters())
        self._on_device_of(parameters)
        for name, other in self._average.items():  # one parameter at a time: no second copy of all
            own = local(parameters[name])
            kept = own.clone()
            own.copy_(other)
            other.copy_(kept)
        self._is_swapped = to_average

    def _on_device_of(self, parameters: Mapping[str, nn.Parameter]) -> list[Tensor]:
        """The average, where the parameters are by now: a checkpoint is read before they move."""
        for name, value in self._average.items():
            self._average[name] = value.to(local(parameters[name]).device)
        return list(self._average.values())

    # -- checkpoints -------------------------------------------------------------------------------

    @torch.no_grad()
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the average in ``state_dict``, and the current weights beside it."""
        if not self._num_updates:
            return
        parameters = dict(pl_module.named_parameters())
        state = checkpoint["state_dict"]
        averaged: dict[str, Tensor] = {}
        current: dict[str, Tensor] = {}
        for name, share in self._average.items():
            held, other = state.get(name), sharded_like(parameters[name], share)
            if not isinstance(held, DTensor):  # else each process saves its own share
                other = whole(other)
            if held is None:  # sharded, and this is not the process that saves
                continue
            average, now = (held, other) if self._is_swapped else (other, held)
            averaged[name], current[name] = average, whole(now)
        checkpoint["state_dict"] = {**state, **averaged}
        checkpoint[CURRENT_KEY] = current
        checkpoint[STATE_KEY] = {COUNT: torch.tensor(self._num_updates)}

    @torch.no_grad()
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the average from the module, which has read it, and give it the current weights."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        parameters = averaged_parameters(pl_module)
        self._forget()
        self._latest_step = checkpoint["global_step"]
        if CURRENT_KEY not in checkpoint:
            rank_zero_info(
                "The checkpoint holds no averaged weights: the average begins with the next step."
            )
            return
        self._average = {name: local(parameter).clone() for name, parameter in parameters.items()}
        self._num_updates = int(checkpoint[STATE_KEY][COUNT])
        current = checkpoint[CURRENT_KEY]
        for name, parameter in parameters.items():
            set_whole(parameter, current[name])


def averaged_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that :class:`MovingAverage` copies, by name: those that get a gradient."""
    return {name: each for name, each in module.named_parameters() if each.requires_grad}


def local(parameter: Tensor) -> Tensor:
    """This process's share of a parameter, in the same memory."""
    value = parameter.detach()
    return value.to_local() if isinstance(value, DTensor) else value


def sharded_like(parameter: Tensor, share: Tensor) -> Tensor:
    """A process's share of a tensor as that tensor, sharded as ``parameter`` is, or not at all."""
    if not isinstance(parameter, DTensor):
        return share
    return DTensor.from_local(
        share,
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered on the CPU; all processes have to call. Another one as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    together: Tensor = tensor.full_tensor()
    return together.cpu()


def set_whole(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a parameter, sharded or not."""
    own = local(parameter)
    if isinstance(parameter, DTensor):
        value = value.to(own.device)
        value = local(distribute_tensor(value, parameter.device_mesh, parameter.placements))
    own.copy_(value)
