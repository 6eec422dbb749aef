"""The forward process of training: noise levels, dropped conditions, and the noising itself.

Every random number comes from the generator that the caller passes, on the generator's device. So
the same seed gives the teacher and the student the same noise levels and masks, whatever device the
model is on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rest_lightning.errors import UserError


@dataclass(frozen=True)
class Drops:
    """Which samples of a batch lose a condition: two bool tensors (B,), True where dropped."""

    identity: Tensor
    audio: Tensor


@dataclass(frozen=True)
class NoisyPath:
    """A point on the straight path from data to noise.

    Attributes:
        noisy_latents: (B, C, f, h, w).
        velocity: (B, C, f, h, w).
        sigma: noise levels (B, f).
    """

    noisy_latents: Tensor
    velocity: Tensor
    sigma: Tensor


def _random_indices(low: Tensor, high: Tensor, generator: torch.Generator) -> Tensor:
    """Returns uniform integers in [low, high), elementwise.

    Draws are float64, so that every index is equally likely.
    """
    uniform = torch.rand(
        low.shape, generator=generator, device=generator.device, dtype=torch.float64
    )
    return torch.minimum(low + (uniform * (high - low)).long(), high - 1)


class SigmaSchedule:
    """How a training draws noise levels; a class derived from it takes the place of ``cans``.

    Named in a configuration: ``noise: {schedule: {class_path: my_package.MySchedule}}``.
    """

    def __call__(
        self,
        batch: int,
        num_chunks: int,
        chunk_length: int,
        table: Tensor,
        motion_dropout: float,
        *,
        generator: torch.Generator,
    ) -> Tensor:
        """Arguments and result of :func:`sample_sigmas_cans`; every draw from ``generator``."""
        raise NotImplementedError


def sample_sigmas_cans(
    batch: int,
    num_chunks: int,
    chunk_length: int,
    table: Tensor,
    motion_dropout: float = 0.5,
    *,
    generator: torch.Generator,
) -> Tensor:
    """Returns chunk-wise asynchronous noise levels (CANS, REST) for any number of chunks K.

    The table is cut into ``num_chunks`` equal bins; chunk i draws uniformly from bin i, so earlier
    chunks are strictly cleaner, and all frames of a chunk share the level. With probability
    ``motion_dropout`` all chunks of a sample share one level of the whole table. Slot 0, the
    reference, is always clean.

    Args:
        batch: B.
        num_chunks: K chunks.
        chunk_length: latent frames per chunk, l.
        table: ascending noise levels, from
            :func:`~rest_lightning.diffusion.schedule.training_table`.
        motion_dropout: probability in [0, 1].
        generator: source of every draw.

    Returns:
        sigma (B, 1 + K * l), on the table's device and in its dtype.
    """
    num_levels = len(table)
    if num_chunks < 1 or num_chunks > num_levels:
        raise UserError(
            f"expected 1 to {num_levels} chunks (one per training noise level), got {num_chunks}: "
            "change the clip"
        )
    device = generator.device
    edges = torch.arange(num_chunks + 1, device=device) * num_levels // num_chunks
    ordered = _random_indices(edges[:-1].expand(batch, -1), edges[1:].expand(batch, -1), generator)
    zeros = torch.zeros((batch, 1), dtype=torch.long, device=device)
    shared = _random_indices(zeros, zeros + num_levels, generator)
    is_shared = torch.rand((batch, 1), generator=generator, device=device) < motion_dropout
    indices = torch.where(is_shared, shared, ordered)
    return _with_reference(table[indices.to(table.device)].repeat_interleave(chunk_length, dim=1))


def sample_sigmas_ans(
    batch: int,
    num_chunks: int,
    chunk_length: int,
    table: Tensor,
    motion_dropout: float = 0.5,
    *,
    generator: torch.Generator,
) -> Tensor:
    """READ's asynchronous noise levels [0, t1, t2, ..., t2] with t1 < t2: one cleaner motion frame
    after the reference.

    (t1, t2) are two different levels of the table, sorted. READ does not say how they are drawn.
    With probability ``motion_dropout`` all frames share one level instead, a draw of its own from
    the whole table (READ's synchronous mode). The arguments are those of
    :func:`sample_sigmas_cans`, so that the two can be exchanged.
    """
    num_levels, num_frames = len(table), num_chunks * chunk_length
    if num_levels < 2:
        raise UserError(
            f"expected at least 2 training noise levels for ANS, got {num_levels}: use 1000 (REST)"
        )
    zeros = torch.zeros((batch, 1), dtype=torch.long, device=generator.device)
    first = _random_indices(zeros, zeros + num_levels, generator)
    second = (first + _random_indices(zeros + 1, zeros + num_levels, generator)) % num_levels
    low, high = torch.minimum(first, second), torch.maximum(first, second)
    shared = _random_indices(zeros, zeros + num_levels, generator)
    is_shared = (
        torch.rand((batch, 1), generator=generator, device=generator.device) < motion_dropout
    )
    low, high = torch.where(is_shared, shared, low), torch.where(is_shared, shared, high)
    indices = torch.cat([low, high.expand(-1, num_frames - 1)], dim=1)
    return _with_reference(table[indices.to(table.device)])


def _with_reference(sigma: Tensor) -> Tensor:
    return torch.cat([sigma.new_zeros((sigma.shape[0], 1)), sigma], dim=1)


def sample_drops(
    batch: int,
    identity: float = 0.1,
    audio: float = 0.1,
    joint: float = 0.0,
    *,
    generator: torch.Generator,
) -> Drops:
    """Returns which samples lose the reference or the speech (REST: 0.1 and 0.1, independent).

    ``joint`` is a further probability that a sample loses both. It trains the unconditional branch
    of joint guidance directly; independent dropout reaches that branch in only one sample of a
    hundred. REST has no such probability.
    """
    uniform = torch.rand((3, batch), generator=generator, device=generator.device)
    both = uniform[2] < joint
    return Drops(identity=(uniform[0] < identity) | both, audio=(uniform[1] < audio) | both)


def drop_reference(latents: Tensor, dropped: Tensor) -> Tensor:
    """Returns ``latents`` (B, C, f, h, w) with slot 0 zeroed where ``dropped`` (B,) is True."""
    keep = (~dropped).to(device=latents.device, dtype=latents.dtype).view(-1, 1, 1, 1, 1)
    return torch.cat([latents[:, :, :1] * keep, latents[:, :, 1:]], dim=2)


def drop_speech(speech_latents: Tensor, dropped: Tensor) -> Tensor:
    """Returns the speech condition (B, ...), zeroed for samples where ``dropped`` (B,) is True."""
    keep = (~dropped).to(device=speech_latents.device, dtype=speech_latents.dtype)
    return speech_latents * keep.view(-1, *[1] * (speech_latents.ndim - 1))


def per_frame(sigma: Tensor | float, like: Tensor) -> Tensor:
    """Returns noise levels, shaped to broadcast over ``like`` (B, C, f, h, w).

    Levels are a number, or one per frame (B, f).
    """
    sigma = torch.as_tensor(
        sigma, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32)
    )
    if sigma.ndim == 0:
        return sigma
    assert sigma.shape == (like.shape[0], like.shape[2]), (
        f"sigma {tuple(sigma.shape)} for latents {tuple(like.shape)}"
    )
    return sigma[:, None, :, None, None]


def add_noise(latents: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """Returns ``(1 - sigma) * latents + sigma * noise``, exact at 0 and at 1.

    Latents are (B, C, f, h, w); sigma is (B, f) or a number.
    """
    level = per_frame(sigma, latents)
    return ((1 - level) * latents + level * noise).to(latents.dtype)


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """Returns what the network regresses to: ``noise - latents``.

    That is the time derivative of the straight path.
    """
    return noise - latents


def noisy_path(latents: Tensor, noise: Tensor, sigma: Tensor) -> NoisyPath:
    """Returns noisy latents, target velocity and noise levels of one training example."""
    return NoisyPath(add_noise(latents, noise, sigma), velocity_target(latents, noise), sigma)
