"""Weights of pixels and tokens by region (mouth, eyes), and random crops, from landmarks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rest_lightning.constants import TEMPORAL_RATIO
from rest_lightning.metrics.image import EYE_BOX, MOUTH_BOX


def region_weights(
    landmarks: Tensor, size: tuple[int, int] | torch.Size, mouth: float, eyes: float
) -> Tensor:
    """Returns the weight of each pixel: ``mouth`` and ``eyes`` inside their boxes, else 1.

    Args:
        landmarks: (B, F, 3, 2) centres of mouth, left and right eye in fractions of the image; NaN
            where unknown.
        size: height and width in pixels.
        mouth, eyes: the weights.

    Returns:
        (B, 1, F, H, W) float32.
    """
    height, width = size
    y = (torch.arange(height, device=landmarks.device, dtype=torch.float32) + 0.5) / height
    x = (torch.arange(width, device=landmarks.device, dtype=torch.float32) + 0.5) / width
    weights = torch.ones(*landmarks.shape[:2], height, width, device=landmarks.device)
    for index, (value, box) in enumerate(((eyes, EYE_BOX), (eyes, EYE_BOX), (mouth, MOUTH_BOX))):
        centre = landmarks[:, :, (1, 2, 0)[index]]
        # Comparisons with NaN are false: an unknown landmark weighs nothing.
        inside_x = (x - centre[..., :1]).abs() <= box[0]
        inside_y = (y - centre[..., 1:]).abs() <= box[1]
        weights = torch.where(inside_y[..., :, None] & inside_x[..., None, :], value, weights)
    return weights[:, None]


def landmarks_of(batch: Mapping[str, Any], num_frames: int) -> Tensor:
    """Returns the landmarks (B, F, 3, 2) of a batch; NaN, unknown, where it has none."""
    found = batch.get("landmarks")
    if found is not None:
        return found
    clips: Tensor = batch["frames"] if "frames" in batch else batch["latents"]
    return clips.new_full((len(clips), num_frames, 3, 2), torch.nan)


def random_crops(
    frames: Tensor, weights: Tensor, centres: Tensor, side_px: int, centred: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Cuts a random square out of every clip, the same one in all of its frames.

    Args:
        frames: (B, C, F, H, W).
        weights: of the pixels, (B, 1, F, H, W).
        centres: (B, F, 2) of a region to be seen more often, in fractions of the image; NaN where
            unknown.
        side_px: side of the squares, at most H and W.
        centred: share of the squares that have this region near their middle, 0 to 1.

    Returns:
        Frames and weights of the squares, (B, C, F, side, side) and (B, 1, F, side, side).
    """
    size = torch.tensor([frames.shape[4], frames.shape[3]], device=frames.device)
    room = (size - side_px).to(torch.float32)
    corners = torch.rand(len(frames), 2, device=frames.device) * (room + 1)
    near = centres.nanmean(dim=1) * size - side_px * (0.35 + 0.3 * torch.rand_like(corners))
    chosen = (torch.rand(len(frames), 1, device=frames.device) < centred) & near.isfinite()
    corners = torch.minimum(torch.where(chosen, near, corners).floor().clamp(min=0), room)
    squares = [
        (slice(int(y), int(y) + side_px), slice(int(x), int(x) + side_px))
        for x, y in corners.tolist()
    ]

    def cut(pixels: Tensor) -> Tensor:
        return torch.stack([clip[..., y, x] for clip, (y, x) in zip(pixels, squares, strict=True)])

    return cut(frames), cut(weights)


def token_weights(landmarks: Tensor, height: int, width: int, mouth: float) -> Tensor:
    """Returns the weights of latent tokens: means of :func:`region_weights` over their pixels.

    A token covers 8 frames, and one frame in slot 0.

    Args:
        landmarks: (B, 8 n + 1, 3, 2), see :func:`region_weights`.
        height, width: of the latents.
        mouth: weight of the mouth's box; everything else counts 1.

    Returns:
        (B, 1, 1 + n, height, width) float32.
    """
    samples = 8  # pixels on a token's side: the box's edges do not fall on those of tokens
    fine = region_weights(landmarks, (samples * height, samples * width), mouth, 1.0)
    frames = F.avg_pool2d(fine[:, 0], samples)
    later = frames[:, 1:].unflatten(1, (-1, TEMPORAL_RATIO)).mean(2)
    return torch.cat([frames[:, :1], later], dim=1)[:, None]
