"""Guidance and step distillation, for a stage beyond REST: one branch and fewer steps imitate the
guided stream.

The frozen model takes several steps with guidance where the student takes one without: guidance
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
    """Noise levels at which a sampler's steps begin: uniform over the steps, drawn for every chunk
    on its own.

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
    """Levels of the source's ``num_substeps`` steps from each of ``sigma`` (B, f), by index in its
    table: (num_substeps + 1, B, f).

    So the source is evaluated at levels of its own sampler alone, wherever its table has them (also
    above LTX's terminal level, which no formula for single levels knows).

    Args:
        sigma: levels at which steps of the student begin, every ``num_substeps``-th of ``table``
            from the first on; 0 (the reference) stays 0.
        table: descending levels of the source's sampler, from 1 to 0.
        num_substeps: steps of the source for one of the student's.
    """
    starts = table[::num_substeps]
    index = num_substeps * (starts - sigma[..., None]).abs().argmin(-1)
    steps = torch.arange(num_substeps + 1, device=sigma.device).view(-1, *[1] * sigma.ndim)
    return table[(index + steps).clamp(max=len(table) - 1)].to(sigma.dtype)


def average_velocity(
    velocity: Callable[[Tensor, Tensor], Tensor], sample: Tensor, levels: Tensor
) -> Tensor:
    """The velocity whose one Euler step ends where Euler steps over all ``levels`` end.

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
    """Joint guidance of a student's two branches, each with a context of its own, as in a guided
    stream.

    Args:
        model: a student.
        latents: (B, C, f, h, w) at ``sigma`` (B, f), slot 0 the reference.
        speech_latents: (B, f, n, d_A).
        context: what both caches are fed with; the unconditional branch reads it without reference
            and speech.
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
