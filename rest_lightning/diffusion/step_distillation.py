"""Distillation of guidance and of steps, for a stage that REST does not have: the student learns
to stream in fewer steps and without guidance.

REST's own distillation, ASD, is :func:`~rest_lightning.diffusion.losses.asd_loss`.

Where the student takes one step, the frozen model takes several with guidance. That is guidance
distillation (Meng et al., "On Distillation of Guided Diffusion Models", arXiv 2210.03142) and
progressive distillation (Salimans and Ho, arXiv 2202.00512) in one target. On the straight path the
latter's target is an average velocity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rest_lightning.diffusion.noise import drop_reference, per_frame
from rest_lightning.diffusion.rollout import Context
from rest_lightning.diffusion.sampling import integrate, joint_guidance

if TYPE_CHECKING:
    from rest_lightning.models.transformer import A2VDiT


def sample_sigmas_of_steps(
    batch: int, num_chunks: int, chunk_length: int, table: Tensor, *, generator: torch.Generator
) -> Tensor:
    """Draws a noise level for every chunk, uniformly from those at which a sampler's steps begin.

    Args:
        table: descending levels of the sampler from 1 to 0 (num_steps + 1,); the last one begins no
            step.

    Returns:
        sigma (B, 1 + K * l) on the table's device, 0 for the reference; all frames of a chunk share
        one.
    """
    steps = torch.randint(
        len(table) - 1, (batch, num_chunks), generator=generator, device=generator.device
    )
    sigma = table[steps.to(table.device)].repeat_interleave(chunk_length, dim=1)
    return torch.cat([sigma.new_zeros(batch, 1), sigma], dim=1)


def levels_of_steps(sigma: Tensor, table: Tensor, num_substeps: int) -> Tensor:
    """Returns the levels that the source visits during one step of the student.

    They are looked up in the source's table and not computed, since LTX's schedule (with its
    terminal level) has no formula for a single level.

    Args:
        sigma: levels (B, f) at which steps of the student begin: entries 0, ``num_substeps``, 2
            ``num_substeps``, ... of ``table``; 0 (the reference) stays 0.
        table: descending levels of the source's sampler, from 1 to 0.
        num_substeps: steps of the source for one of the student's.

    Returns:
        (num_substeps + 1, B, f), descending along the first dimension.
    """
    starts = table[::num_substeps]
    index = num_substeps * (starts - sigma[..., None]).abs().argmin(-1)
    steps = torch.arange(num_substeps + 1, device=sigma.device).view(-1, *[1] * sigma.ndim)
    return table[(index + steps).clamp(max=len(table) - 1)].to(sigma.dtype)


def average_velocity(
    velocity: Callable[[Tensor, Tensor], Tensor], sample: Tensor, levels: Tensor
) -> Tensor:
    """Returns the velocity with which one Euler step ends where those over all ``levels`` end.

    Args:
        velocity: of a sample (B, C, f, h, w) and its levels (B, f).
        sample: at ``levels[0]``.
        levels: (num_substeps + 1, B, f), descending; frames whose levels are all equal (the
            reference) get 0.

    Returns:
        ``sum_j (sigma_j - sigma_(j+1)) * v_j / (sigma_0 - sigma_m)``, shape of ``sample``: the
        target of Salimans and Ho on the straight path, where ``x = sample - sigma * v``.
    """
    length = levels[0] - levels[-1]
    average = torch.zeros_like(sample)

    def weighted(sample: Tensor, step: int) -> Tensor:
        nonlocal average
        v = velocity(sample, levels[step])
        share = torch.where(length > 0, (levels[step] - levels[step + 1]) / length, 0.0)
        average = average + per_frame(share, sample) * v
        return v

    integrate(weighted, sample, levels)
    return average


def guided_velocity(
    model: A2VDiT,
    latents: Tensor,
    sigma: Tensor,
    speech_latents: Tensor,
    context: Context,
    guidance: float,
) -> Tensor:
    """Returns the velocity under joint guidance, with a context for each branch as in a stream.

    Args:
        model: a student.
        latents: (B, C, f, h, w) at ``sigma`` (B, f), slot 0 the reference.
        speech_latents: (B, f, n, d_A).
        context: of both branches; the unconditional one reads it without reference and speech.
        guidance: weight a of the conditional branch; 1 runs that one alone.
    """
    if guidance == 1.0:
        return model(
            latents,
            sigma,
            speech_latents,
            context_latents=context.latents,
            context_sigma=context.sigma,
        )
    every = torch.ones(len(latents), dtype=torch.bool, device=latents.device)
    velocity = model(
        torch.cat([latents, drop_reference(latents, every)]),
        sigma.repeat(2, 1),
        torch.cat([speech_latents, torch.zeros_like(speech_latents)]),
        context_latents=torch.cat([context.latents, drop_reference(context.latents, every)]),
        context_sigma=context.sigma.repeat(2, 1),
    )
    conditional, unconditional = velocity.chunk(2)
    return joint_guidance(unconditional, conditional, guidance)
