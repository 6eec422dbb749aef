"""From noise to data: one Euler step, the plain loop over a table, and classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from rest_lightning.diffusion.noise import per_frame


def euler_step(sample: Tensor, velocity: Tensor, sigma: Tensor | float, sigma_next: Tensor | float) -> Tensor:
    """``sample + (sigma_next - sigma) * velocity`` in the dtype of ``sample``.

    Args:
        sample: noisy latents (B, C, f, h, w) at ``sigma``.
        velocity: noise - latents, as the network gives it.
        sigma: present level, a number or (B, f).
        sigma_next: next level, a number or (B, f). Frames with sigma_next == sigma stay as they are, exactly.
    """
    step = per_frame(sigma_next, sample) - per_frame(sigma, sample)
    return (sample + step * velocity).to(sample.dtype)


def integrate(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, table: Tensor) -> Tensor:
    """Walk ``table`` (num_steps + 1,) from ``noise`` down: ``velocity(sample, sigma)`` with sigma a 0-d tensor."""
    sample = noise
    for sigma, sigma_next in pairwise(table):
        sample = euler_step(sample, velocity(sample, sigma), sigma, sigma_next)
    return sample


def joint_guidance(v_uncond: Tensor, v_cond: Tensor, a: float) -> Tensor:
    """``(1 - a) * v(no speech, no reference) + a * v(speech, reference)`` (REST, a = 6; a = 1: no guidance)."""
    return torch.lerp(v_uncond, v_cond, a)


def split_guidance(v_none: Tensor, v_ref: Tensor, v_full: Tensor, a: float, b: float) -> Tensor:
    """``(1 - a - b) * v(none) + a * v(reference) + b * v(reference, speech)`` (READ: a = 2, b = 6).

    a = 0, b = 1 is no guidance.
    """
    return (1 - a - b) * v_none + a * v_ref + b * v_full


@dataclass(frozen=True)
class Guidance:
    """The branches of a guided velocity, run as one batch: (reference, speech) first, (none) last.

    READ's third branch, (reference), stands between them and runs only where it has a weight of its own.

    Args:
        weight: of (reference, speech): ``a`` of joint, ``b`` of split guidance. 1 alone is no guidance, one branch.
        reference_weight: of (reference), ``a`` of split guidance; at 0 that formula is joint guidance, two branches.
    """

    weight: float = 1.0
    reference_weight: float = 0.0

    @property
    def num_branches(self) -> int:
        """1, 2 or 3."""
        if self.reference_weight != 0.0:
            return 3
        return 1 if self.weight == 1.0 else 2

    def samples(self, sample: Tensor) -> Tensor:
        """(B, ...) -> (num_branches * B, ...): all branches denoise the same sample."""
        return torch.cat([sample] * self.num_branches) if self.num_branches > 1 else sample

    def references(self, reference_latent: Tensor) -> Tensor:
        """(B, ...) -> (num_branches * B, ...): zeroed in the last branch."""
        if self.num_branches == 1:
            return reference_latent
        return torch.cat([reference_latent] * (self.num_branches - 1) + [torch.zeros_like(reference_latent)])

    def speech(self, speech_latents: Tensor) -> Tensor:
        """(B, ...) -> (num_branches * B, ...): zeroed in all branches but the first."""
        if self.num_branches == 1:
            return speech_latents
        return torch.cat([speech_latents] + [torch.zeros_like(speech_latents)] * (self.num_branches - 1))

    def combine(self, velocity: Tensor) -> Tensor:
        """Velocities of all branches (num_branches * B, ...) to the guided velocity (B, ...)."""
        if self.num_branches == 1:
            return velocity
        v_full, *v_ref, v_none = velocity.chunk(self.num_branches)
        if not v_ref:
            return joint_guidance(v_none, v_full, self.weight)
        return split_guidance(v_none, v_ref[0], v_full, self.reference_weight, self.weight)
