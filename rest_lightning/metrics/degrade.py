"""Known damage to clips: what a metric must answer to. All on uint8 (n, H, W, 3) but :func:`gaussian_blur`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def gaussian_blur(x: Tensor, sigma: Tensor, radius: int = 3) -> Tensor:
    """Gaussian blur of every image (n, C, H, W) with its own sigma (n, 1) in pixels; edges are repeated.

    Args:
        x: float images.
        sigma: above 0.
        radius: of the kernel in pixels; beyond, the bell is cut off.
    """
    if not len(x):
        return x
    weights = torch.softmax(-0.5 * (torch.arange(-radius, radius + 1.0) / sigma).square(), dim=1)
    weights = weights.repeat_interleave(x.shape[1], dim=0)  # of every channel
    flat = functional.pad(x, (radius,) * 4, mode="replicate").flatten(0, 1)[None]
    flat = functional.conv2d(flat, weights[:, None, :, None], groups=len(weights))
    return functional.conv2d(flat, weights[:, None, None, :], groups=len(weights))[0].view(x.shape)


def blur(frames: Tensor, sigma_px: float) -> Tensor:
    """The same Gaussian blur on every frame."""
    if sigma_px <= 0:
        return frames
    sigma, radius = torch.full((1, 1), sigma_px), max(1, round(3 * sigma_px))
    blurred = [gaussian_blur(frame.permute(2, 0, 1)[None].float(), sigma, radius)[0] for frame in frames]
    return torch.stack(blurred).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def noise(frames: Tensor, sd: float, generator: torch.Generator) -> Tensor:
    """White noise of ``sd`` grey levels of 255."""
    noisy = frames.float() + sd * torch.randn(frames.shape, generator=generator)
    return noisy.round().clamp(0, 255).to(torch.uint8)


def dropped(num_frames: int, share: float, generator: torch.Generator) -> Tensor:
    """Which frame is shown at every time (n,) when a share of frames is lost and the one before stays."""
    lost = torch.rand(num_frames, generator=generator) < share
    lost[:1] = False
    shown = torch.where(lost, 0, torch.arange(num_frames))
    return shown.cummax(dim=0).values


def shuffled(num_frames: int, share: float, generator: torch.Generator) -> Tensor:
    """Which frame is shown at every time (n,) when a share of frames changes places among themselves."""
    order = torch.arange(num_frames)
    chosen = torch.randperm(num_frames, generator=generator)[: round(share * num_frames)].sort().values
    order[chosen] = chosen[torch.randperm(len(chosen), generator=generator)]
    return order
