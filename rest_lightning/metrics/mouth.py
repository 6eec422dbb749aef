"""How far a mouth is open, read from pixels: the embedded estimator behind the lip metrics.

Trained by ``python -m tools.mouth`` on synthetic talkers, where the renderer knows the truth,
and on a VAE's reconstructions of them. In result rows it is called ``embedded-mouth``
(docs/metrics.md); on faces that no renderer made it is out of its domain.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from rest_lightning.errors import UserError
from rest_lightning.metrics.weights import WEIGHTS_FILE, ShippedNetwork, sha256_of_weights

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "mouth"
EXTRACTOR_NAME = "embedded-mouth"
# The mouth's place in a prepared clip, in pixels of a 128x128 frame: from the tip of the nose to
# the chin, from cheek to cheek.
FRAME_PX = 128
CROP_PX = (28, 58, 100, 122)  # left, top, right, bottom
CROP_SIZE = (CROP_PX[3] - CROP_PX[1], CROP_PX[2] - CROP_PX[0])

Frames = NDArray[np.uint8] | Tensor


class MouthOpeningEstimator(ShippedNetwork):
    """Frames to mouth opening, 0 = lips touch, 1 = as wide as the renderer opens a mouth.

    Five strided convolutions over the mouth's crop and two linear layers. Brightness and contrast
    of the crop are normalised away first.

    Args:
        widths: channels of the five convolutions.
        hidden: width of the linear layer.
    """

    title, command, assets = "mouth estimator", "python -m tools.mouth", ASSETS

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64, 128, 128), hidden: int = 128) -> None:
        super().__init__()
        if len(widths) != 5:
            raise ValueError(
                "expected 5 widths (the crop is halved five times), got "
                f"{len(widths)}: change `widths`"
            )
        self.config = {"widths": tuple(widths), "hidden": hidden}
        layers: list[nn.Module] = []
        channels, height, width = 3, *CROP_SIZE
        for i, out in enumerate(widths):
            kernel = 5 if i == 0 else 3
            layers += [
                nn.Conv2d(channels, out, kernel, 2, kernel // 2, bias=False),
                nn.BatchNorm2d(out),
                nn.ReLU(),
            ]
            channels, height, width = out, -(-height // 2), -(-width // 2)
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(
            nn.Linear(channels * height * width, hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )

    def forward(self, frames: Frames) -> Tensor:
        """Openings (n,) in [0, 1] of frames: uint8 (n, H, W, 3), or float (n, 3, H, W) in
        [-1, 1].
        """
        return self.from_crops(crop_mouth(frames))

    def from_crops(self, crops: Tensor) -> Tensor:
        """Openings (n,) of crops (n, 3, 64, 72) in [-1, 1]."""
        mean = crops.mean(dim=(1, 2, 3), keepdim=True)
        std = crops.std(dim=(1, 2, 3), keepdim=True, correction=0)
        features = self.features((crops - mean) / (std + 0.05))
        return torch.sigmoid(self.head(features.flatten(1)).float())[:, 0]


def crop_mouth(frames: Frames, margin_px: int = 0) -> Tensor:
    """The mouth's region as float (n, 3, 64 + 2m, 72 + 2m) in [-1, 1], at the scale of a 128x128
    frame.

    Frames of another size are cropped in the same fractions and resized.

    Args:
        frames: uint8 (n, H, W, 3), or float (n, 3, H, W) in [-1, 1].
        margin_px: more on every side, at most 6, in pixels of a 128x128 frame.

    Raises:
        UserError: another type or shape.
    """
    data = torch.from_numpy(frames) if isinstance(frames, np.ndarray) else frames
    if data.ndim == 4 and data.dtype == torch.uint8 and data.shape[-1] == 3:
        height, width = data.shape[1:3]
        channels_last = True
    elif data.ndim == 4 and data.is_floating_point() and data.shape[1] == 3:
        height, width = data.shape[2:]
        channels_last = False
    else:
        raise UserError(
            "expected frames as uint8 (n, H, W, 3) or as float (n, 3, H, W) in [-1, 1], "
            f"got {str(data.dtype).removeprefix('torch.')} {tuple(data.shape)}: convert them"
        )
    low = (CROP_PX[1] - margin_px, CROP_PX[0] - margin_px)
    high = (CROP_PX[3] + margin_px, CROP_PX[2] + margin_px)
    rows = slice(round(low[0] * height / FRAME_PX), round(high[0] * height / FRAME_PX))
    columns = slice(round(low[1] * width / FRAME_PX), round(high[1] * width / FRAME_PX))
    if channels_last:
        crops = data[:, rows, columns].permute(0, 3, 1, 2).float().div(127.5).sub(1.0)
    else:
        crops = data[:, :, rows, columns].float()
    size = (high[0] - low[0], high[1] - low[1])
    if (height, width) != (FRAME_PX, FRAME_PX):
        crops = functional.interpolate(
            crops, size, mode="bilinear", antialias=True, align_corners=False
        )
    return crops


@cache
def shipped_estimator() -> MouthOpeningEstimator:
    """The estimator of the package, loaded once per process."""
    return MouthOpeningEstimator.from_pretrained()


@cache
def extractor() -> dict[str, str]:
    """Name and SHA-256 of the shipped weights, for result rows (docs/leaderboard.md)."""
    shipped_estimator()
    return {"name": EXTRACTOR_NAME, "sha256": sha256_of_weights(ASSETS / WEIGHTS_FILE)}


@torch.inference_mode()
def mouth_opening(
    frames: Frames, estimator: MouthOpeningEstimator | None = None, batch_size: int = 64
) -> NDArray[np.float32]:
    """Mouth opening (n,) in [0, 1] of any number of frames, a batch at a time.

    Args:
        frames: uint8 (n, H, W, 3), or float (n, 3, H, W) in [-1, 1].
        estimator: None takes the one that ships with the package.
        batch_size: frames per forward pass; 64 keeps the crops in a processor's cache.
    """
    estimator = shipped_estimator() if estimator is None else estimator
    parts = [
        estimator(frames[i : i + batch_size]).numpy() for i in range(0, len(frames), batch_size)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)
