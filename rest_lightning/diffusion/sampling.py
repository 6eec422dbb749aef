"""From noise to data: one Euler step, the plain loop over a table, and classifier-free guidance. Pure functions."""

from __future__ import annotations

from collections.abc import Callable
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
