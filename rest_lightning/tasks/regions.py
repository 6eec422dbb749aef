"""Where mouth and eyes are: pixel weights from landmarks."""

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
    """Weight of every pixel: ``mouth`` and ``eyes`` inside their boxes, 1 elsewhere.

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
    """Landmarks (B, F, 3, 2) of a batch; NaN, unknown, where it has none."""
    found = batch.get("landmarks")
    if found is not None:
        return found
    clips: Tensor = batch["frames"] if "frames" in batch else batch["latents"]
    return clips.new_full((len(clips), num_frames, 3, 2), torch.nan)


def random_crops(
    frames: Tensor, weights: Tensor, centres: Tensor, side_px: int, centred: float = 0.5
) -> tuple[Tensor, Tensor]:
    """A random square of every clip, the same in all of its frames.

    Args:
        frames: (B, C, F, H, W).
        weights: of the pixels, (B, 1, F, H, W).
        centres: (B, F, 2) of what is to be seen more often, in fractions of the image; NaN where
            unknown.
        side_px: side of the squares, at most H and W.
        centred: share of the squares that are placed around the centre, about in their middle.

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
    """:func:`region_weights` of latent tokens: each the mean over its place and its frames (slot 0
    has one frame).

    Args:
        landmarks: (B, 8 n + 1, 3, 2) as there.
        height, width: of the latents.
        mouth: weight of the mouth's box; all else counts 1.

    Returns:
        (B, 1, 1 + n, height, width) float32.
    """
    samples = 8  # per side of a token: the box's edges fall between tokens
    fine = region_weights(landmarks, (samples * height, samples * width), mouth, 1.0)
    frames = F.avg_pool2d(fine[:, 0], samples)
    later = frames[:, 1:].unflatten(1, (-1, TEMPORAL_RATIO)).mean(2)
    return torch.cat([frames[:, :1], later], dim=1)[:, None]
