"""Scene cuts: where a small picture differs far more from the one before than its neighbours differ
from theirs.

The rule of PySceneDetect's AdaptiveDetector (a difference that is large on its own and against the
mean of those around it), on RGB at 32x32; camera movements differ everywhere, cuts once.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SMALL_PX = 32
_AROUND = 2  # frames on either side


def small_picture(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 (H, W, 3) to float32 (32, 32, 3), averaged over areas."""
    from PIL import Image

    return np.asarray(
        Image.fromarray(picture).resize((SMALL_PX, SMALL_PX), Image.Resampling.BOX), np.float32
    )


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
