"""Slow change of what should stand still: the background and the colours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rest_lightning.constants import FPS

Frames = NDArray[np.uint8]
# (distance from the left or right edge, lowest row), in fractions of the image: no head or hair
# there.
_SIDES = ((0.08, 0.50), (0.16, 0.16))
COLOUR_WINDOW_S = 10.0
_LINEAR_TO_XYZ = (
    (0.4124564, 0.3575761, 0.1804375),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339, 0.1191920, 0.9503041),
)


def background_mask(height: int, width: int) -> NDArray[np.bool_]:
    """Returns the pixels (H, W) that show background in every prepared clip.

    They are the upper halves of both sides and both top corners.
    """
    y = ((np.arange(height) + 0.5) / height)[:, None]
    x = ((np.arange(width) + 0.5) / width)[None, :]
    mask = np.zeros((height, width), dtype=bool)
    for edge, bottom in _SIDES:
        mask |= ((x < edge) | (x > 1.0 - edge)) & (y < bottom)
    return mask


def background_drift(start: Frames, now: Frames) -> float:
    """Returns the mean absolute difference of background pixels, in grey levels (0 to 255).

    This measure is a choice of this project.

    Args:
        start: one frame, uint8 (H, W, 3).
        now: frames, uint8 (n, H, W, 3); each is compared with the start, so that flicker counts as
            well as drift.
    """
    mask = background_mask(*start.shape[:2])
    return float(np.abs(now[:, mask].astype(np.int16) - start[mask].astype(np.int16)).mean())


def mean_lab(frames: Frames) -> NDArray[np.float64]:
    """Returns the mean CIE L*a*b* colour (D65) of frames, uint8 sRGB (n, H, W, 3)."""
    return np.mean([srgb_to_lab(frame).reshape(-1, 3).mean(axis=0) for frame in frames], axis=0)


def srgb_to_lab(frame: Frames) -> NDArray[np.float64]:
    """Converts sRGB (..., 3) uint8 to CIE L*a*b*.

    The white point is D65 (IEC 61966-2-1, CIE 15).
    """
    value = np.arange(256) / 255.0
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)[frame]
    to_xyz = np.array(_LINEAR_TO_XYZ)
    xyz = linear @ (to_xyz / to_xyz.sum(axis=1, keepdims=True)).T
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    lab = [
        116.0 * f[..., 1] - 16.0,
        500.0 * (f[..., 0] - f[..., 1]),
        200.0 * (f[..., 1] - f[..., 2]),
    ]
    return np.stack(lab, axis=-1)


@dataclass(frozen=True)
class Drift:
    """What a :class:`DriftTracker` saw.

    Attributes:
        background: drift of the last second against the first frame, see :func:`background_drift`.
        background_by_second: the same for every second.
        colour_lab_per_minute: distance of the mean L*a*b* colours of the first and the last ten
            seconds (of the two halves of a video below 20 s), divided by the minutes between their
            middles; NaN below two seconds.
    """

    background: float
    background_by_second: list[float]
    colour_lab_per_minute: float


class DriftTracker:
    """Measures the drift of one video that arrives piece by piece, in bounded memory.

    Args:
        start: what background is compared with, uint8 (H, W, 3); None takes the first frame that
            comes.
        fps: frames per second.
    """

    def __init__(self, start: Frames | None = None, fps: int = FPS) -> None:
        self.start, self.fps = start, fps
        self._tail: list[Frames] = []  # the last second, or less
        self._seconds: list[float] = []
        self._lab: list[NDArray[np.float64]] = []

    def update(self, frames: Frames) -> None:
        """Takes in the next frames, uint8 (n, H, W, 3)."""
        for frame in frames:
            if self.start is None:
                self.start = frame.copy()
            if len(self._tail) == self.fps:
                self._close_second()
            self._tail.append(frame.copy())

    def compute(self) -> Drift:
        """Returns the drift so far.

        A last second that is not full counts when it is at least half full.
        """
        if self._tail and (2 * len(self._tail) >= self.fps or not self._seconds):
            self._close_second()
        nan = float("nan")
        return Drift(
            self._seconds[-1] if self._seconds else nan, list(self._seconds), self._colour_drift()
        )

    def colour_lab_by_minute(self) -> list[float]:
        """Distance of each second's mean L*a*b* to that of the first ten seconds, averaged by
        minute; once complete.
        """
        if not self._lab:
            return []
        lab = np.stack(self._lab)
        distance = np.linalg.norm(lab - lab[: int(COLOUR_WINDOW_S)].mean(axis=0), axis=1)
        return [float(distance[start : start + 60].mean()) for start in range(0, len(distance), 60)]

    def _close_second(self) -> None:
        frames = np.stack(self._tail)
        assert self.start is not None
        self._seconds.append(background_drift(self.start, frames))
        # five frames a second tell a mean colour
        self._lab.append(mean_lab(frames[:: max(1, self.fps // 5)]))
        self._tail.clear()

    def _colour_drift(self) -> float:
        num_seconds = len(self._lab)
        window = min(int(COLOUR_WINDOW_S), num_seconds // 2)
        if window < 1:
            return float("nan")
        first, last = np.mean(self._lab[:window], axis=0), np.mean(self._lab[-window:], axis=0)
        return float(np.linalg.norm(last - first) * 60.0 / (num_seconds - window))
