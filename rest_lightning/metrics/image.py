"""Single-frame quality: PSNR, of a box as well, and sharpness."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional

Frames = NDArray[np.uint8] | Tensor
# Half width and half height in fractions of the image's side, chosen for heads that fill a prepared
# clip; the VAE's loss weights the same boxes.
MOUTH_BOX = (0.15, 0.12)
EYE_BOX = (0.09, 0.06)
_LUMA = (0.299, 0.587, 0.114)  # BT.601


def psnr_db(squared_error: Tensor) -> Tensor:
    """Returns the peak signal-to-noise ratio in dB, at most 106 dB.

    It is computed from the mean squared error of frames in [-1, 1].
    """
    return 10.0 * torch.log10(4.0 / squared_error.clamp(min=1e-10))


def video_psnr_db(frames: Frames, truth: Frames, mask: Tensor | None = None) -> float:
    """Returns the PSNR in dB of a whole video.

    It is computed from the mean squared error over all frames, as in video coding.

    Args:
        frames, truth: uint8 (n, H, W, 3).
        mask: bool (n, H, W): only these pixels count.

    Raises:
        ValueError: videos of different shapes.
    """
    a, b = torch.as_tensor(frames), torch.as_tensor(truth)
    if a.shape != b.shape:
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ValueError(f"expected two videos of one shape, got {shapes}: cut the longer one")
    total, count = 0.0, 0
    for i in range(len(a)):  # frame by frame: no copy of the video as floats
        squared = (a[i].float() - b[i].float()).square()
        if mask is not None:
            squared = squared[mask[i]]
        total += float(squared.sum(dtype=torch.float64))
        count += squared.numel()
    mean = total / max(count, 1) / 127.5**2
    return float(psnr_db(torch.tensor(mean, dtype=torch.float64)))


def box_mask(
    centres: ArrayLike, size: tuple[int, int], box: tuple[float, float] = MOUTH_BOX
) -> Tensor:
    """Returns the pixels within a box around a landmark.

    Args:
        centres: (n, 2), x and y in fractions of the image; NaN gives an empty mask.
        size: height and width in pixels.
        box: half width and half height in fractions of the image.

    Returns:
        bool (n, H, W).
    """
    points = torch.as_tensor(np.asarray(centres, dtype=np.float32))
    y = (torch.arange(size[0], dtype=torch.float32) + 0.5) / size[0]
    x = (torch.arange(size[1], dtype=torch.float32) + 0.5) / size[1]
    inside_x = (x - points[:, :1]).abs() <= box[0]
    inside_y = (y - points[:, 1:]).abs() <= box[1]
    return inside_y[:, :, None] & inside_x[:, None, :]


def sharpness(frames: Frames, mask: Tensor | None = None) -> float:
    """Returns the root mean square of the luma's Laplacian, in grey levels (0 to 255).

    It falls when a video blurs. The measure is a choice of this project.

    Args:
        frames: uint8 (n, H, W, 3).
        mask: bool (n, H, W): only these pixels count; the outermost ring of pixels never does.
    """
    data = torch.as_tensor(frames)
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])[None, None]
    luma = torch.tensor(_LUMA)
    total, count = 0.0, 0
    for i in range(len(data)):
        grey = data[i].float() @ luma
        squared = functional.conv2d(grey[None, None], kernel)[0, 0].square()
        if mask is not None:
            squared = squared[mask[i, 1:-1, 1:-1]]
        total += float(squared.sum(dtype=torch.float64))
        count += squared.numel()
    return float((total / max(count, 1)) ** 0.5)


# -- seams -----------------------------------------------------------------------------------------
# Jumps at the borders of latents and chunks.


def border_jump_ratio(
    frames: Tensor, period: int = 8, first_frame: int = 0, ignore_period: int | None = None
) -> Tensor:
    """Returns the mean |frame difference| across borders over the mean elsewhere; 1 is no jump.

    Internal frame 0 is the reference, on its own; borders lie between internal frames 8k and 8k +
    1, k > 0. The step from frame 0 to 1 leaves the image-like frame: it is a border of its own kind
    and counts for neither side.

    Args:
        frames: (B, 3, F, H, W), any scale.
        period: frames per latent (8), or per chunk (24).
        first_frame: internal number of the first frame given: 0 for clips and reconstructions, 1
            for the frames that a session emits.
        ignore_period: borders of this period count for neither side, so that chunk borders (24) can
            be compared with steps inside latents (8).

    Returns:
        The ratio, a scalar; NaN when there is no border or nothing else.
    """
    steps = (frames[:, :, 1:] - frames[:, :, :-1]).abs().float().mean(dim=(0, 1, 3, 4))
    at_border, elsewhere = _sides(
        torch.arange(len(steps), device=frames.device) + first_frame, period, ignore_period
    )
    return steps[at_border].mean() / steps[elsewhere].mean().clamp(min=1e-8)


class BorderJumps:
    """:func:`border_jump_ratio` of one video that arrives piece by piece, in bounded memory.

    Args:
        first_frame: see :func:`border_jump_ratio`.
    """

    def __init__(self, first_frame: int = 1) -> None:
        self.first_frame = first_frame
        self._last: NDArray[np.uint8] | None = None
        self._steps: list[float] = []  # one number a frame: 90,000 an hour

    def update(self, frames: NDArray[np.uint8]) -> None:
        """Takes in the next frames, uint8 (n, H, W, 3)."""
        for frame in frames:
            if self._last is not None:
                self._steps.append(float(np.abs(frame.astype(np.int16) - self._last).mean()))
            self._last = frame
        if self._last is not None:
            self._last = self._last.copy()  # of the frame, so that the piece can go

    def compute(self, period: int = 8, ignore_period: int | None = None) -> float:
        """Returns the ratio so far; see :func:`border_jump_ratio`."""
        steps = torch.tensor(self._steps, dtype=torch.float64)
        at_border, elsewhere = _sides(
            torch.arange(len(steps)) + self.first_frame, period, ignore_period
        )
        return float(steps[at_border].mean() / steps[elsewhere].mean().clamp(min=1e-8))


def _sides(numbers: Tensor, period: int, ignore_period: int | None) -> tuple[Tensor, Tensor]:
    """Masks of the steps at borders and elsewhere; ``numbers`` are the internal frames that the
    steps leave.
    """
    if period < 2:
        raise ValueError(
            f"expected a period of at least 2 frames, got {period}: 8 is a latent, 24 a chunk"
        )
    at_border = (numbers > 0) & (numbers % period == 0)
    elsewhere = (numbers > 0) & ~at_border
    if ignore_period is not None:
        elsewhere &= numbers % ignore_period != 0
    return at_border, elsewhere
