"""Scores of a clip, collected frame by frame from its crops; all are heuristics with a threshold in
the options.

Text and optical flow need OpenCV, which comes with mediapipe; without it these two scores are left
out.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rest_lightning.constants import FPS
from rest_lightning.data.preparation.options import PrepareOptions
from rest_lightning.media.faces import Box, HandFinder, Picture, hands_over

# sharpness: even clips of 128 pixels are reduced to it, so that it hardly depends on their size
_GREY_PX = 64
_FLOW_PX = 64
_TEXT_PX = (256, 86)  # the lower third of a square
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_STILL = 0.15  # mean difference of grey levels at 64x64
_MIN_CONTRAST, _MIN_TEXT_WIDTH, _MIN_STROKES = 60, 0.2, 10

Grey = NDArray[np.uint8]


class ClipScores:
    """Means, percentiles and shares over the frames of one clip.

    Args:
        options: how often hands and text are looked for.
        hands: finds hands; None leaves them out.
    """

    def __init__(self, options: PrepareOptions, hands: HandFinder | None) -> None:
        self.options, self.hands = options, hands
        self.brightness: list[float] = []
        self.sharpness: list[float] = []
        self.flow: list[float] = []
        self.with_hands: list[bool] = []
        self.with_text: list[bool] = []
        self.longest_still = 0  # frames
        self._still, self._anchor = 0, np.zeros(0, np.float32)
        self._last: Grey | None = None
        self._flow: Any = None
        if find_spec("cv2") is not None:
            cv2: Any = importlib.import_module("cv2")  # its type information misses much
            cv2.setNumThreads(1)
            self._flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)

    def add(self, crop: Picture, face: Box | None) -> None:
        """The next frame.

        Args:
            crop: uint8 RGB (size, size, 3).
            face: x, y, w, h in the crop's pixels; None where it is not known.
        """
        grey = to_grey(crop)
        self.brightness.append(float(grey.mean()) / 255)
        self.sharpness.append(sharpness(cut(grey, face)))
        small = resized(grey, _FLOW_PX, _FLOW_PX)
        self._watch(small.astype(np.float32))
        if self._flow is not None:
            if self._last is not None:
                moved = self._flow.calc(self._last, small, None)
                self.flow.append(100 * float(np.linalg.norm(moved, axis=2).mean()) / _FLOW_PX)
            self._last = small
        if (len(self.brightness) - 1) % self.options.look_every_frames == 0:
            self._look(crop, grey, face)

    def repeat(self) -> None:
        """The same picture once more."""
        for values in (self.brightness, self.sharpness):
            values.append(values[-1])
        if self._last is not None:
            self.flow.append(0.0)
        self._watch(self._anchor)

    def result(self) -> dict[str, float]:
        """Scores under the names of their filters."""
        scores = {"blur": float(np.median(self.sharpness)), "dark": float(np.mean(self.brightness))}
        scores["still"] = self.longest_still / FPS
        if self.flow:
            scores["motion"] = float(np.percentile(self.flow, 95))
        if self.with_hands:
            scores["hands"] = float(np.mean(self.with_hands))
        if self.with_text:
            scores["text"] = float(np.mean(self.with_text))
        return scores

    def _watch(self, small: NDArray[np.float32]) -> None:
        """Count frames that show what an earlier one showed: slow movement adds up until it is
        seen, the noise of a codec does not.
        """
        is_still = self._anchor.size and float(np.abs(small - self._anchor).mean()) < _STILL
        self._still = self._still + 1 if is_still else 0
        if not is_still:
            self._anchor = small
        self.longest_still = max(self.longest_still, self._still)

    def _look(self, crop: Picture, grey: Grey, face: Box | None) -> None:
        if self.hands is not None and face is not None:
            self.with_hands.append(hands_over(self.hands.find(crop), face))
        if self._flow is not None:
            self.with_text.append(has_text(grey))


def to_grey(picture: Picture) -> Grey:
    """Luma (BT.601) of uint8 RGB (H, W, 3)."""
    return np.asarray(np.round(picture.astype(np.float32) @ _LUMA), np.uint8)


def resized(grey: Grey, width: int, height: int) -> Grey:
    """Bilinear, averaged over areas where it is reduced."""
    from PIL import Image

    return np.asarray(Image.fromarray(grey).resize((width, height), Image.Resampling.BILINEAR))


def cut(grey: Grey, box: Box | None) -> Grey:
    """The part of a picture inside a box, or all of it where nothing is inside."""
    if box is None:
        return grey
    x, y, width, height = box
    part = grey[
        max(0, round(y)) : max(0, round(y + height)), max(0, round(x)) : max(0, round(x + width))
    ]
    return part if min(part.shape) >= 8 else grey


def sharpness(grey: Grey) -> float:
    """Variance of the Laplacian at 64x64 (Pech-Pacheco et al., "Diatom autofocusing in brightfield
    microscopy").

    Low for pictures out of focus and for those that were enlarged.
    """
    from scipy.ndimage import laplace

    return float(laplace(resized(grey, _GREY_PX, _GREY_PX).astype(np.float32)).var())


def has_text(grey: Grey) -> bool:
    """Whether the lower third of a square picture shows a line of text, such as a subtitle or a
    banner (heuristic).

    Strokes are narrow and differ strongly from what is around them on both sides: the morphological
    gradient is binarised and joined along rows. A line of text is then a wide, low, well-filled
    region with many strokes in it.
    """
    import cv2

    lower: Any = resized(grey[-(grey.shape[0] // 3) :], *_TEXT_PX)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3, 3))
    gradient = cv2.morphologyEx(lower, cv2.MORPH_GRADIENT, kernel)
    edges = (gradient > _MIN_CONTRAST).astype(np.uint8)
    joined = cv2.morphologyEx(edges, cv2.MORPH_CLOSE, np.ones((1, 9), np.uint8))
    joined = cv2.morphologyEx(joined, cv2.MORPH_OPEN, np.ones((3, 7), np.uint8))
    _, _, regions, _ = cv2.connectedComponentsWithStats(joined)
    for x, y, width, height, area in regions[1:].tolist():
        if not (
            width >= _MIN_TEXT_WIDTH * _TEXT_PX[0]
            and 5 <= height <= 0.5 * _TEXT_PX[1]
            and width >= 3 * height
        ):
            continue
        if area < 0.5 * width * height:
            continue
        row = edges[y : y + height, x : x + width]
        strokes = np.count_nonzero(np.diff(row.astype(np.int8), axis=1) == 1, axis=1)
        if np.median(strokes) >= max(_MIN_STROKES * width / _TEXT_PX[0], 5):
            return True
    return False
