"""From noise to data: the Euler loop, classifier-free guidance, and a model's sampling settings."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from rest_lightning.diffusion.noise import per_frame
from rest_lightning.diffusion.schedule import lowest_level, sampling_sigmas
from rest_lightning.errors import UserError


def euler_step(
    sample: Tensor, velocity: Tensor, sigma: Tensor | float, sigma_next: Tensor | float
) -> Tensor:
    """``sample + (sigma_next - sigma) * velocity`` in the dtype of ``sample``.

    Args:
        sample: noisy latents (B, C, f, h, w) at ``sigma``.
        velocity: noise - latents, as the network gives it.
        sigma: present level, a number or (B, f).
        sigma_next: next level, a number or (B, f). Frames with sigma_next == sigma stay as they
            are, exactly.
    """
    step = per_frame(sigma_next, sample) - per_frame(sigma, sample)
    return (sample + step * velocity).to(sample.dtype)


def integrate(
    velocity: Callable[[Tensor, int], Tensor], noise: Tensor, sigmas: Sequence[float] | Tensor
) -> Tensor:
    """Returns data from noise: one Euler step from each level to the next (REST sec. 3.3).

    The streaming engine, whole clips, self-rollout, step distillation and the benchmarks all run
    this loop.

    Args:
        velocity: ``velocity(sample, step)`` is noise - latents of ``sample`` at ``sigmas[step]``,
            in its shape.
        noise: where to start, at ``sigmas[0]``: (B, C, f, h, w).
        sigmas: descending levels, one more than there are steps: numbers, or a tensor (num_steps +
            1, ...) whose entries are numbers or (B, f).
    """
    sample = noise
    for step in range(len(sigmas) - 1):
        sample = euler_step(sample, velocity(sample, step), sigmas[step], sigmas[step + 1])
    return sample


def joint_guidance(v_uncond: Tensor, v_cond: Tensor, a: float) -> Tensor:
    """``(1 - a) * v(no speech, no reference) + a * v(speech, reference)`` (REST, a = 6; a = 1: no
    guidance).
    """
    return torch.lerp(v_uncond, v_cond, a)


def split_guidance(v_none: Tensor, v_ref: Tensor, v_full: Tensor, a: float, b: float) -> Tensor:
    """``(1 - a - b) * v(none) + a * v(reference) + b * v(reference, speech)`` (READ: a = 2, b = 6).

    a = 0, b = 1 is no guidance.
    """
    return (1 - a - b) * v_none + a * v_ref + b * v_full


@dataclass(frozen=True)
class Guidance:
    """The branches of a guided velocity, run as one batch: (reference, speech) first, then
    (reference), then (none).

    A branch without a weight does not run: (reference) in REST's joint guidance, (none) where the
    two weights add up to 1, which guides by the speech alone.

    Args:
        weight: of (reference, speech): ``a`` of joint, ``b`` of split guidance. 1 alone is no
            guidance, one branch.
        reference_weight: of (reference), ``a`` of split guidance; at 0 that formula is joint
            guidance, two branches.
    """

    weight: float = 1.0
    reference_weight: float = 0.0

    @property
    def num_branches(self) -> int:
        """Number of branches: 1, 2 or 3."""
        return 1 + (self.reference_weight != 0.0) + self.has_none

    @property
    def has_none(self) -> bool:
        """Whether the branch without reference and speech has a weight."""
        return self.weight + self.reference_weight != 1.0

    def samples(self, sample: Tensor) -> Tensor:
        """Repeats samples (B, ...) for all branches: (num_branches * B, ...)."""
        return torch.cat([sample] * self.num_branches) if self.num_branches > 1 else sample

    def references(self, reference_latent: Tensor) -> Tensor:
        """Repeats references (B, ...) for all branches; they are zero in (none)."""
        if not self.has_none:
            return self.samples(reference_latent)
        return torch.cat(
            [reference_latent] * (self.num_branches - 1) + [torch.zeros_like(reference_latent)]
        )

    def speech(self, speech_latents: Tensor) -> Tensor:
        """Repeats speech (B, ...) for all branches; it is zero in all but the first."""
        if self.num_branches == 1:
            return speech_latents
        return torch.cat(
            [speech_latents] + [torch.zeros_like(speech_latents)] * (self.num_branches - 1)
        )

    def combine(self, velocity: Tensor) -> Tensor:
        """Combines velocities (num_branches * B, ...) into the guided velocity (B, ...)."""
        if self.num_branches == 1:
            return velocity
        v_full, *others = velocity.chunk(self.num_branches)
        if len(others) == 1:  # whichever it is: the weights of the two add up to 1
            return joint_guidance(others[0], v_full, self.weight)
        v_ref, v_none = others
        return split_guidance(v_none, v_ref, v_full, self.reference_weight, self.weight)


_MAX_STEPS, _MAX_GUIDANCE, _MAX_SHIFT = 1000, 100.0, 1000.0


@dataclass
class Sampling:
    """How a model wants to be sampled; the defaults of ``open``.

    Attributes:
        num_steps: Euler steps per chunk (REST: 8).
        guidance: weight of the branch with reference and speech: ``a`` of joint guidance (REST: 6),
            ``b`` of split guidance (READ: 6); 1 without reference_guidance runs that branch alone.
        shift: shift of the sigma table (SD3's form); None takes LTX's, which depends on the number
            of tokens.
        reference_guidance: weight ``a`` of the branch with the reference alone in split guidance
            (READ: 2); at 0 split guidance is joint guidance, and that branch does not run. At ``1 -
            guidance`` the branch without a reference does not run.
        table_steps: of distilled models: steps of a longer sigma table, of which every n-th level
            is used; None: the table has ``num_steps`` steps.

    Raises:
        UserError: steps outside 1 to 1000, a weight beyond 100 or not finite, a shift outside
            0.001 to 1000, or a ``table_steps`` that ``num_steps`` does not divide.
    """

    num_steps: int = 8
    guidance: float = 6.0
    shift: float | None = None
    reference_guidance: float = 0.0
    table_steps: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.num_steps <= _MAX_STEPS:
            raise UserError(
                f"expected 1 to {_MAX_STEPS} denoising steps (at least 1), got {self.num_steps}: 8 "
                "is the paper's choice"
            )
        for name in ("guidance", "reference_guidance"):
            if not abs(getattr(self, name)) <= _MAX_GUIDANCE:  # NaN too
                raise UserError(
                    f"expected a finite {name} of at most {_MAX_GUIDANCE:g}, got "
                    f"{getattr(self, name)}: READ's are 6 and 2"
                )
        if self.shift is not None and not 1 / _MAX_SHIFT <= self.shift <= _MAX_SHIFT:
            raise UserError(
                f"expected a positive shift of the sigma table ({1 / _MAX_SHIFT:g} to "
                f"{_MAX_SHIFT:g}), got {self.shift}: 1 leaves it straight"
            )
        if self.table_steps is not None and self.table_steps % self.num_steps:
            raise UserError(
                f"expected a number of steps that divides table_steps {self.table_steps}, got "
                f"{self.num_steps}: this model has learnt every n-th level of that table"
            )

    def sigmas(self, num_tokens: int) -> list[float]:
        """Returns ``num_steps + 1`` descending noise levels, for ``num_tokens`` latent tokens."""
        return sampling_sigmas(self.num_steps, self.shift, num_tokens, self.table_steps)

    @property
    def branches(self) -> Guidance:
        """Returns the branches that guidance runs, with their weights."""
        return Guidance(self.guidance, self.reference_guidance)


def warn_of_unseen_levels(
    sampling: Sampling, num_tokens: int, training_noise: dict[str, float] | None
) -> None:
    """Warns where a sampler evaluates a model at a lower noise level than it was trained at.

    The keys that later chunks read from the cache come from that last level, too.

    Args:
        sampling: the sampler.
        num_tokens: latent tokens of the window.
        training_noise: `A2VDiT.training_noise` of the model; None where it is not known.
    """
    if training_noise is None:
        return
    last, lowest = sampling.sigmas(num_tokens)[-2], lowest_level(training_noise)
    if last < 0.999 * lowest:
        warnings.warn(
            f"the sampler's last step, whose keys later chunks read, is at noise level {last:.3f}, "
            f"and this model was trained at {lowest:.3f} and above: take fewer steps or a "
            "larger shift, or train with noise.uniform_share (docs/method.md#noise)",
            stacklevel=3,
        )


@dataclass
class SamplingChanges:
    """Changes to a model's own :class:`Sampling`; None keeps a value."""

    num_steps: int | None = None
    guidance: float | None = None
    shift: float | None = None
    reference_guidance: float | None = None
    table_steps: int | None = None

    def of(self, settings: Sampling) -> Sampling:
        """Returns ``settings`` with the changes applied.

        A model that is guided by the speech alone stays so: where its two weights add up to 1 and
        ``guidance`` alone is changed, ``reference_guidance`` follows.
        """
        changes = {name: value for name, value in asdict(self).items() if value is not None}
        by_speech = settings.reference_guidance != 0.0 and not settings.branches.has_none
        if self.guidance is not None and by_speech:
            changes.setdefault("reference_guidance", 1.0 - self.guidance)
        return replace(settings, **changes)
