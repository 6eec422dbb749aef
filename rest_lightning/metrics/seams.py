"""Jumps at the borders of latents and chunks."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def border_jump_ratio(
    frames: Tensor, period: int = 8, first_frame: int = 0, ignore_period: int | None = None
) -> Tensor:
    """Mean |frame difference| across borders over the mean elsewhere; 1 = no jumps (decided here).

    Internal frame 0 is the reference, on its own; borders lie between internal frames 8k and 8k + 1, k > 0. The step
    from frame 0 to 1 leaves the image-like frame: it is a border of its own kind and counts for neither side.

    Args:
        frames: (B, 3, F, H, W), any scale.
        period: frames per latent (8), or per chunk (24).
        first_frame: internal number of the first frame given: 0 for clips and reconstructions, 1 for the frames that a
            session emits.
        ignore_period: borders of this period count for neither side, so that chunk borders (24) can be compared with
            steps inside latents (8).

    Returns:
        The ratio, a scalar; NaN when there is no border or nothing else.
    """
    steps = (frames[:, :, 1:] - frames[:, :, :-1]).abs().float().mean(dim=(0, 1, 3, 4))
    at_border, elsewhere = _sides(torch.arange(len(steps), device=frames.device) + first_frame, period, ignore_period)
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
        """Take in the next frames, uint8 (n, H, W, 3)."""
        for frame in frames:
            if self._last is not None:
                self._steps.append(float(np.abs(frame.astype(np.int16) - self._last).mean()))
            self._last = frame
        if self._last is not None:
            self._last = self._last.copy()  # of the frame, so that the piece can go

    def compute(self, period: int = 8, ignore_period: int | None = None) -> float:
        """The ratio so far; see :func:`border_jump_ratio`."""
        steps = torch.tensor(self._steps, dtype=torch.float64)
        at_border, elsewhere = _sides(torch.arange(len(steps)) + self.first_frame, period, ignore_period)
        return float(steps[at_border].mean() / steps[elsewhere].mean().clamp(min=1e-8))


def _sides(numbers: Tensor, period: int, ignore_period: int | None) -> tuple[Tensor, Tensor]:
    """Masks of the steps at borders and elsewhere; ``numbers`` are the internal frames that the steps leave."""
    if period < 2:
        raise ValueError(f"expected a period of at least 2 frames, got {period}: 8 is a latent, 24 a chunk")
    at_border = (numbers > 0) & (numbers % period == 0)
    elsewhere = (numbers > 0) & ~at_border
    if ignore_period is not None:
        elsewhere &= numbers % ignore_period != 0
    return at_border, elsewhere
