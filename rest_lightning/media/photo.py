"""The whole photograph around a speaking head: frames go back to where they were cut from."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rest_lightning.media.portrait import Portrait

Frames = NDArray[np.uint8]

MAX_HEIGHT_PX = 1080
_FEATHER = 0.12  # of the square's side: how wide the transition to the photograph is


class PhotoFrames:
    """Puts frames of the square that was shown back into the photograph.

    Call it with frames, uint8 (n, S, S, 3); it returns the photograph with each of them, uint8
    (n, height, width, 3). At the square's border the photograph stays, and from there to the inside
    the frame takes over smoothly, so that no edge is seen.

    Args:
        portrait: the photograph and the square.
        max_height_px: taller photographs are scaled down.

    Attributes:
        height, width: of the result in pixels, even numbers as H.264 wants them.
    """

    def __init__(self, portrait: Portrait, max_height_px: int = MAX_HEIGHT_PX) -> None:
        picture = portrait.picture
        scale = min(1.0, max_height_px / picture.height)
        self.height, self.width = (
            max(2, round(side * scale) // 2 * 2) for side in (picture.height, picture.width)
        )
        resized = picture.resize((self.width, self.height), Image.Resampling.LANCZOS)
        self._photo = np.asarray(resized)
        across, down = self.width / picture.width, self.height / picture.height
        left, top, side, _ = portrait.box
        box = (left * across, top * down, (left + side) * across, (top + side) * down)
        # Whole pixels inside the photograph, and the part of a frame that each of them shows.
        x0, y0 = max(0, round(box[0])), max(0, round(box[1]))
        x1, y1 = min(self.width, round(box[2])), min(self.height, round(box[3]))
        self._place = (slice(y0, y1), slice(x0, x1))
        self._size = (x1 - x0, y1 - y0)
        share = (box[2] - box[0], box[3] - box[1])
        self._part = (
            (x0 - box[0]) / share[0],
            (y0 - box[1]) / share[1],
            (x1 - box[0]) / share[0],
            (y1 - box[1]) / share[1],
        )
        weights = [
            _ramp(self._part[axis], self._part[axis + 2], self._size[axis]) for axis in (0, 1)
        ]
        # Where the square reaches the photograph's edge nothing lies beyond: no transition.
        for axis, (low, high, length) in enumerate(((x0, x1, self.width), (y0, y1, self.height))):
            middle = len(weights[axis]) // 2
            if low == 0:
                weights[axis][:middle] = 1.0
            if high == length:
                weights[axis][middle:] = 1.0
        self._alpha = (weights[1][:, None] * weights[0][None, :])[..., None]

    def __call__(self, frames: Frames) -> Frames:
        """Returns the photograph with each frame (n, S, S, 3) in it, (n, height, width, 3)."""
        result = np.repeat(self._photo[None], len(frames), axis=0)
        background = (1 - self._alpha) * self._photo[self._place]
        for frame, whole in zip(frames, result, strict=True):
            side = frame.shape[0]
            box = tuple(min(max(edge, 0.0), 1.0) * side for edge in self._part)
            square = Image.fromarray(frame).resize(
                self._size, Image.Resampling.BICUBIC, box=(box[0], box[1], box[2], box[3])
            )
            whole[self._place] = self._alpha * np.asarray(square) + background + 0.5
        return result


def _ramp(start: float, end: float, count: int) -> NDArray[np.float32]:
    """Weights of ``count`` pixels from ``start`` to ``end`` of a side: 0 at 0 and 1, 1 inside."""
    at = start + (np.arange(count) + 0.5) / count * (end - start)
    distance = np.clip(np.minimum(at, 1 - at) / _FEATHER, 0.0, 1.0)
    weights: NDArray[np.float32] = (distance * distance * (3 - 2 * distance)).astype(np.float32)
    return weights
