"""Self-rollout: contexts that the student generates itself, for a stage that REST does not have.

REST's distillation shows the student nothing but noised ground truth, so it never sees its own
errors. Here the context of a chunk is the student's own previous chunk, sampled chunk by chunk
through its own cache: the training of Self Forcing (arXiv 2506.08009) with REST's losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rest_lightning.diffusion.sampling import integrate
from rest_lightning.models.cache import IDContextCache

if TYPE_CHECKING:
    from rest_lightning.models.transformer import A2VDiT


@dataclass(frozen=True)
class Context:
    """What later chunks see of earlier ones in the parallel forward, in place of a cache.

    Attributes:
        latents: (B, C, f, h, w), slot 0 is the reference.
        sigma: their noise levels (B, f), 0 for the reference.
    """

    latents: Tensor
    sigma: Tensor


@torch.no_grad()
def roll_out(
    model: A2VDiT,
    reference: Tensor,
    noise: Tensor,
    speech_latents: Tensor | None,
    sigmas: Sequence[float],
) -> Context:
    """Samples chunk after chunk through an ID-Context Cache, without guidance; returns the latents
    whose keys and values the cache held.

    A parallel forward with this context reads the same keys and values as the stream, but with a
    gradient towards the weights that made them (none with ``cache_gradient: detached``). The
    latents themselves carry no gradient.

    Args:
        model: a student.
        reference: (B, C, 1, h, w), zero where it is dropped.
        noise: (B, C, K * l, h, w), unit Gaussian, from which the K chunks start.
        speech_latents: (B, 1 + K * l, n, d_A); slot 0, the reference's, is not read.
        sigmas: descending levels from 1 to 0, one more than there are steps.

    Returns:
        With ``last_step`` the samples that entered the last step, at its level; with ``clean_pass``
        the finished samples at level 0. No chunk reads the last one, so it stays noise at level 1.
    """
    options = model.cache_options
    assert options.cache_noise != "per_step", (
        "the levels of a training chunk are not those of a sampler"
    )
    rows, _, num_frames, height, width = noise.shape
    latents = torch.cat([reference, noise], dim=2)
    levels = torch.ones(rows, 1 + num_frames, device=noise.device)
    levels[:, 0] = 0.0
    cache = model.new_cache(rows, height, width)
    if options.reference_attends == "self":
        model.prefill(reference, cache)
    for start in range(1, 1 + num_frames - options.chunk_length, options.chunk_length):
        frames = slice(start, start + options.chunk_length)
        is_joined = cache.reference_expected
        joined = reference if is_joined else None
        speech = None if speech_latents is None else speech_latents[:, frames]
        if speech is not None and is_joined:
            speech = torch.cat([torch.zeros_like(speech[:, :1]), speech], dim=1)
        sample, fed = _generate_chunk(model, joined, latents[:, :, frames], speech, sigmas, cache)
        level = sigmas[-2]
        if options.cache_noise == "clean_pass":
            fed, level = sample, 0.0
            _velocity(model, joined, sample, level, speech, cache)
        cache.commit()
        latents[:, :, frames], levels[:, frames] = fed, level
    # Autocast may keep casts of the weights that it made without gradients: the training forward
    # needs its own.
    torch.clear_autocast_cache()
    return Context(latents, levels)


def _generate_chunk(
    model: A2VDiT,
    reference: Tensor | None,
    noise: Tensor,
    speech_latents: Tensor | None,
    sigmas: Sequence[float],
    cache: IDContextCache,
) -> tuple[Tensor, Tensor]:
    """Returns a finished chunk (B, C, l, h, w), and the sample that entered its last step."""
    entered = noise

    def velocity(sample: Tensor, step: int) -> Tensor:
        nonlocal entered
        entered = sample
        return _velocity(model, reference, sample, sigmas[step], speech_latents, cache)

    return integrate(velocity, noise, sigmas), entered


def _velocity(
    model: A2VDiT,
    reference: Tensor | None,
    sample: Tensor,
    sigma: float,
    speech_latents: Tensor | None,
    cache: IDContextCache,
) -> Tensor:
    """Returns the velocity of one chunk at one level.

    Where the first chunk is computed together with the reference, ``reference`` comes in front.
    """
    level = torch.full((sample.shape[0], sample.shape[2]), sigma, device=sample.device)
    if reference is None:
        return model(sample, level, speech_latents, cache=cache)
    level = torch.cat([torch.zeros_like(level[:, :1]), level], dim=1)
    return model(torch.cat([reference, sample], dim=2), level, speech_latents, cache=cache)[
        :, :, 1:
    ]
