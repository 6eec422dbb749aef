"""Where the face is: a box per frame behind one interface, for the crops of SyncNet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol as Interface

import numpy as np
from numpy.typing import NDArray

from rest_lightning.errors import UserError
from rest_lightning.media.faces import FaceBoxes

MAX_GAP_FRAMES = 25  # a face that is lost for longer ends a track there
# intersection over union with the last box: less is another face, as in SyncNet's pipeline
MIN_OVERLAP = 0.5
EYES_TO_MOUTH_PER_SIDE = 0.36  # of a detector's box on an upright face

Frames = NDArray[np.uint8]
Boxes = NDArray[np.float64]


class FaceFinder(Interface):
    """Finds the face of every frame."""

    def boxes(self, frames: Frames) -> Boxes:
        """Left, top, right and bottom in pixels, (n, 4).

        Raises:
            UserError: no face.
        """
        ...


class SidecarFaces:
    """Boxes from a true clip's landmarks, which the renderer knows.

    Args:
        landmarks: ``mouth``, ``left_eye`` and ``right_eye``, each F x [x, y] in fractions of the
            side.
    """

    def __init__(self, landmarks: Mapping[str, Sequence[Sequence[float]]] | None) -> None:
        if landmarks is None:
            raise UserError(
                "expected landmarks in the true clip's sidecar, got none: use a protocol with "
                "faces: mediapipe"
            )
        self.points = {
            name: np.asarray(points, dtype=np.float64) for name, points in landmarks.items()
        }

    def boxes(self, frames: Frames) -> Boxes:
        """See :class:`FaceFinder`; the first landmarks belong to the first frame."""
        mouth, eyes = self.points["mouth"], (self.points["left_eye"] + self.points["right_eye"]) / 2
        if len(mouth) < len(frames):
            raise UserError(
                f"expected landmarks of {len(frames)} frames, got {len(mouth)}: give "
                "a "
                "shorter video"
            )
        mouth, eyes = mouth[: len(frames)], eyes[: len(frames)]
        height, width = frames.shape[1:3]
        half = np.linalg.norm(mouth - eyes, axis=1, keepdims=True) / EYES_TO_MOUTH_PER_SIDE / 2
        centre = (mouth + eyes) / 2
        return np.hstack([centre - half, centre + half]) * [width, height, width, height]


class MediapipeFaces:
    """Boxes from mediapipe's detector (the ``prepare`` extra), see :func:`follow`; gaps are
    bridged.

    Args:
        min_confidence: of a detection.
    """

    def __init__(self, min_confidence: float = 0.5) -> None:
        self.min_confidence = min_confidence

    def boxes(self, frames: Frames) -> Boxes:
        """See :class:`FaceFinder`."""
        found = np.full((len(frames), 4), np.nan)
        last: NDArray[np.float64] | None = None
        with FaceBoxes(self.min_confidence) as detector:
            for number, frame in enumerate(frames):
                boxes = [_square(*box) for box, _, _ in detector.find(frame)]
                if (box := follow(boxes, last)) is not None:
                    found[number] = last = box
        return bridge(found)


def follow(boxes: Sequence[Boxes], last: Boxes | None) -> Boxes | None:
    """Returns the box, of those found in a frame, that continues a track.

    The largest wins, then the one that moved least.

    Args:
        boxes: left, top, right and bottom, each (4,).
        last: the track's last box, None where it begins.

    Returns:
        None when there is no box, or none that overlaps the last one enough: other people are
            ignored.
    """
    if last is None:
        return max(boxes, key=lambda box: box[2] - box[0], default=None)
    nearest = max(boxes, key=lambda box: _overlap(box, last), default=None)
    return nearest if nearest is not None and _overlap(nearest, last) > MIN_OVERLAP else None


def bridge(boxes: Boxes) -> Boxes:
    """Boxes (n, 4) with the rows of NaN filled: linearly between their neighbours, with the nearest
    at the ends.

    Raises:
        UserError: no box at all, or none for more than 25 frames.
    """
    known = np.isfinite(boxes).all(axis=1)
    if not known.any():
        raise UserError(
            f"expected a face, found none in {len(boxes)} frames: crop the video to the face"
        )
    indices = np.flatnonzero(known)
    gaps = np.diff(np.concatenate([[-1], indices, [len(boxes)]])) - 1
    if gaps.max() > MAX_GAP_FRAMES:
        start = int(np.concatenate([[-1], indices])[gaps.argmax()]) + 1
        raise UserError(
            f"expected a face, found none for {gaps.max()} frames from frame {start}: "
            "cut the video there"
        )
    frames = np.arange(len(boxes))
    return np.column_stack([np.interp(frames, indices, column[known]) for column in boxes.T])


def _square(x: float, y: float, width: float, height: float) -> NDArray[np.float64]:
    """Corners of the square around a box, in pixels."""
    half = max(width, height) / 2
    x, y = x + width / 2, y + height / 2
    return np.array([x - half, y - half, x + half, y + half])


def _overlap(a: Boxes, b: Boxes) -> float:
    """Intersection over union of two boxes (4,)."""
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    common = float(np.prod(sides.clip(min=0)))
    return common / float(np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - common)
