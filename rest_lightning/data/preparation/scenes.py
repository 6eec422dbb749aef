"""Scene cuts: where a small picture differs far more from the one before than its neighbours differ
from theirs.

The rule of PySceneDetect's AdaptiveDetector (a difference that is large on its own and against the
mean of those around it), on RGB at 32x32; camera movements differ everywhere, cuts once.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rest_lightning.media.faces import Box

SMALL_PX = 32
_AROUND = 2  # frames on either side


def small_picture(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 (H, W, 3) to float32 (32, 32, 3), averaged over areas."""
    from PIL import Image

    return np.asarray(
        Image.fromarray(picture).resize((SMALL_PX, SMALL_PX), Image.Resampling.BOX), np.float32
    )


class FaceChanges:
    """Cuts inside the box of a face: another person at the same place of the same picture changes
    the whole picture by little.

    The largest face of a frame is compared with the same place of the frame before, at 32x32. The
    rule is that of `scene_cuts`.
    """

    def __init__(self) -> None:
        self._differences = array("f")
        self._last: NDArray[np.uint8] | None = None

    def add(self, picture: NDArray[np.uint8], boxes: Sequence[Box]) -> None:
        """The next frame, uint8 (H, W, 3), with the boxes x, y, w, h of its faces in its pixels."""
        change = 0.0
        if boxes and self._last is not None and self._last.shape == picture.shape:
            box = max(boxes, key=lambda box: box[2] * box[3])
            change = float(np.abs(_inside(picture, box) - _inside(self._last, box)).mean())
        self._differences.append(change)
        self._last = picture

    def repeat(self) -> None:
        """The same picture once more."""
        self._differences.append(0.0)

    def cuts(self, threshold: float, ratio: float) -> NDArray[np.int64]:
        """Numbers of the frames at which another face begins; see `scene_cuts`."""
        return scene_cuts(np.array(self._differences, np.float32), threshold, ratio)


def _inside(picture: NDArray[np.uint8], box: Box) -> NDArray[np.float32]:
    x, y, width, height = (round(value) for value in box)
    part = picture[max(0, y) : max(0, y + height), max(0, x) : max(0, x + width)]
    return small_picture(np.ascontiguousarray(part if min(part.shape[:2]) else picture))


def scene_cuts(
    differences: NDArray[np.float32], threshold: float, ratio: float
) -> NDArray[np.int64]:
    """Numbers of the frames that begin a scene; the first frame does not count.

    Args:
        differences: (n,), mean absolute difference of every frame's small picture to the one
            before, of 255.
        threshold: least difference of a cut.
        ratio: how many times the mean of the two differences before and the two behind it a cut
            has.
    """
    if not len(differences):
        return np.empty(0, np.int64)
    padded = np.pad(differences.astype(np.float64), _AROUND)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * _AROUND + 1)
    around = (windows.sum(axis=1) - differences) / (2 * _AROUND)
    is_cut = (differences >= threshold) & (differences >= ratio * around)
    is_cut[0] = False
    return np.flatnonzero(is_cut)
