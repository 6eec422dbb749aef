"""Noise levels: descending tables for sampling, an ascending table for training.

sigma = 1 is pure noise and sigma = 0 is clean data. LTX and diffusers use the same convention; no
other one occurs in this package. How training draws levels from its table (CANS, ANS) is in
:mod:`rest_lightning.diffusion.noise`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rest_lightning.errors import UserError

LTX_BASE_SHIFT, LTX_MAX_SHIFT = 0.95, 2.05
LTX_BASE_TOKENS, LTX_MAX_TOKENS = 1024, 4096
LTX_TERMINAL = 0.1


def ltx_shift(
    num_tokens: int,
    base_shift: float = LTX_BASE_SHIFT,
    max_shift: float = LTX_MAX_SHIFT,
    base_tokens: int = LTX_BASE_TOKENS,
    max_tokens: int = LTX_MAX_TOKENS,
) -> float:
    """LTX's shift factor for a sequence of ``num_tokens`` latent tokens: longer ones spend more
    steps in the noise.

    ``exp(mu)`` with ``mu`` on the line through (base_tokens, base_shift) and (max_tokens,
    max_shift), not clamped (diffusers ``calculate_shift``). The defaults are the scheduler
    configuration published with LTX-Video 0.9.
    """
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return math.exp(base_shift + slope * (num_tokens - base_tokens))


def sigma_table(
    num_steps: int,
    shift: float = 1.0,
    terminal: float | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Noise levels that ``num_steps`` Euler steps visit: float32 (num_steps + 1,), strictly
    descending from 1 to 0.

    Uniform times ``t`` moved by ``shift * t / (1 + (shift - 1) * t)`` (SD3's shift; with ``shift =
    exp(mu)`` this is diffusers' "exponential" dynamic shift, ``sigmoid(mu + logit(t))``).

    Args:
        num_steps: Euler steps, at least 1.
        shift: 1 = uniform; above 1 more steps near the noise.
        terminal: if given, the levels are stretched so that the last one before 0 equals it (LTX:
            0.1; no effect on a single step).
        device: where the table is made.

    Raises:
        UserError: for no steps, a shift that is not positive, a terminal outside (0, 1).
    """
    if num_steps < 1:
        raise UserError(
            f"expected at least 1 denoising step, got {num_steps}: use 8 (REST) or 2 to 8"
        )
    if not shift > 0:
        raise UserError(
            f"expected a sigma shift above 0, got {shift}: 1 is uniform, 2 to 8 are usual"
        )
    if terminal is not None and not 0 < terminal < 1:
        raise UserError(
            f"expected a terminal sigma between 0 and 1, got {terminal}: use 0.1 (LTX) or none"
        )
    times = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    sigmas = shift * times / (1 + (shift - 1) * times)
    if terminal is not None and num_steps > 1:
        stretch = (1 - terminal) / (1 - sigmas[-2])
        sigmas[:-1] = 1 - (1 - sigmas[:-1]) * stretch
    return sigmas.to(dtype=torch.float32, device=device)


def ltx_sigma_table(
    num_steps: int,
    num_tokens: int,
    terminal: float | None = LTX_TERMINAL,
    device: torch.device | str | None = None,
) -> Tensor:
    """LTX's shifted schedule (REST: "the schedule of LTX-Video"): :func:`sigma_table` with
    :func:`ltx_shift`.

    Equals the sigmas of diffusers' ``FlowMatchEulerDiscreteScheduler`` with LTX-Video's published
    configuration.

    Args:
        num_steps: Euler steps.
        num_tokens: f * h * w latent tokens. LTX counts the whole sequence. A stream has no end, so
            here its sequence is the window (reference, previous and current chunk: 7 * h * w); REST
            does not say.
        terminal: the last level before 0.
        device: where the table is made.
    """
    return sigma_table(num_steps, ltx_shift(num_tokens), terminal, device)


def sampling_sigmas(
    num_steps: int, shift: float | None, num_tokens: int, table_steps: int | None = None
) -> list[float]:
    """Returns the noise levels of a sampler, ``num_steps + 1`` numbers from 1 to 0.

    They are plain numbers, so that no step waits for a device to tell its level.

    Args:
        num_steps: Euler steps.
        shift: of :func:`sigma_table`; None takes LTX's schedule, :func:`ltx_sigma_table`.
        num_tokens: latent tokens, which LTX's schedule depends on.
        table_steps: a multiple of ``num_steps``: every n-th level of a table of that many steps is
            taken, as a distilled student has learnt them. LTX's table of 4 steps is no part of its
            table of 8, since both end at the same level before 0.

    Raises:
        UserError: ``num_steps`` does not divide ``table_steps``.
    """
    total = num_steps if table_steps is None else table_steps
    if total % num_steps:
        raise UserError(
            f"expected a number of steps that divides table_steps {total}, got {num_steps}: use "
            f"one of {', '.join(str(n) for n in range(1, total + 1) if total % n == 0)}"
        )
    table = ltx_sigma_table(total, num_tokens) if shift is None else sigma_table(total, shift)
    return [float(sigma) for sigma in table[:: total // num_steps]]


def training_table(
    num_levels: int = 1000,
    mean: float = 2.05,
    std: float = 1.0,
    device: torch.device | str | None = None,
    uniform_share: float = 0.0,
) -> Tensor:
    """Noise levels of training: float32 (num_levels,), strictly ascending, in (0, 1).

    The quantiles at (i + 0.5) / num_levels of ``sigmoid(Normal(mean, std))``, the shifted
    logit-normal of READ (mean 2.05, std 1): a uniform index draws from that distribution. READ's
    table of 1,000 levels begins at 0.224, above the 0.1 where LTX's sampler takes its last step.

    Args:
        num_levels: length of the table.
        mean, std: of the logit.
        device: where the table is made.
        uniform_share: u in [0, 1]: quantiles of ``(1 - u) * sigmoid(Normal(mean, std)) + u *
            Uniform(0, 1)`` as a mixture, which reaches down to 0 (READ has none).

    Raises:
        UserError: no level, a std that is not above 0, or a share outside [0, 1].
    """
    if num_levels < 1:
        raise UserError(
            f"expected at least 1 training noise level, got {num_levels}: use 1000 (REST)"
        )
    if not std > 0:
        raise UserError(
            "expected a standard deviation above 0 for the training noise, got "
            f"{std}: "
            "use 1.0 (READ)"
        )
    if not 0.0 <= uniform_share <= 1.0:
        raise UserError(
            f"expected a uniform_share of the training noise from 0 to 1, got {uniform_share}: "
            "use 0 (READ) or a little, as 0.1"
        )
    quantiles = (torch.arange(num_levels, dtype=torch.float64) + 0.5) / num_levels
    levels = torch.sigmoid(mean + std * torch.special.ndtri(quantiles))
    if uniform_share:
        # The mixture's quantiles lie between those of its parts: halve the interval, to rounding.
        low, high = torch.minimum(levels, quantiles), torch.maximum(levels, quantiles)
        for _ in range(60):
            levels = (low + high) / 2
            normal = torch.special.ndtr((torch.logit(levels) - mean) / std)
            is_low = (1 - uniform_share) * normal + uniform_share * levels < quantiles
            low, high = torch.where(is_low, levels, low), torch.where(is_low, high, levels)
    return levels.to(dtype=torch.float32, device=device)


def lowest_level(training_noise: dict[str, Any]) -> float:
    """Returns the lowest noise level above 0 of a training with these arguments of
    :func:`training_table`.
    """
    with torch.device("cpu"):
        return float(training_table(**training_noise)[0])
