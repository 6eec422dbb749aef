"""Where the face is: boxes per frame behind one interface, and SyncNet's crops around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol as Interface

import numpy as np
from numpy.typing import NDArray

from rest_lightning.errors import UserError

CROP_SCALE = 0.40  # syncnet_python's run_pipeline.py
MEDIAN_FRAMES = 13
BORDER_GREY = 110
FACE_PX = 224
MAX_GAP_FRAMES = 25  # a face that is lost for longer ends a track there
EYES_TO_MOUTH_PER_SIDE = 0.36  # of a detector's box on an upright face (decided here)

Frames = NDArray[np.uint8]
Boxes = NDArray[np.float64]


class FaceFinder(Interface):
    """Finds the face of every frame."""

    def boxes(self, frames: Frames) -> Boxes:
        """Centre and side in pixels, (n, 3): x, y, side.

        Raises:
            UserError: no face.
        """
        ...


class SidecarFaces:
    """Boxes from a true clip's landmarks, which the renderer knows.

    Args:
        landmarks: ``mouth``, ``left_eye`` and ``right_eye``, each F x [x, y] in fractions of the side.
    """

    def __init__(self, landmarks: Mapping[str, Sequence[Sequence[float]]] | None) -> None:
        if landmarks is None:
            raise UserError(
                "expected landmarks in the true clip's sidecar, got none: use a protocol with faces: mediapipe"
            )
        self.points = {name: np.asarray(points, dtype=np.float64) for name, points in landmarks.items()}

    def boxes(self, frames: Frames) -> Boxes:
        """See :class:`FaceFinder`; the first landmarks belong to the first frame."""
        mouth, eyes = self.points["mouth"], (self.points["left_eye"] + self.points["right_eye"]) / 2
        if len(mouth) < len(frames):
            raise UserError(f"expected landmarks of {len(frames)} frames, got {len(mouth)}: give a shorter video")
        mouth, eyes = mouth[: len(frames)], eyes[: len(frames)]
        side = np.linalg.norm(mouth - eyes, axis=1) / EYES_TO_MOUTH_PER_SIDE
        height, width = frames.shape[1:3]
        scale = np.array([width, height, width])
        return np.column_stack([(mouth + eyes) / 2, side]) * scale


class MediapipeFaces:
    """Boxes from mediapipe's detector (the ``prepare`` extra): the face nearest to the last one, gaps bridged.

    Args:
        min_confidence: of a detection.
    """

    def __init__(self, min_confidence: float = 0.5) -> None:
        self.min_confidence = min_confidence

    def boxes(self, frames: Frames) -> Boxes:
        """See :class:`FaceFinder`."""
        try:
            import mediapipe
        except ImportError as error:
            raise UserError("expected mediapipe for faces: pip install 'rest_lightning[prepare]'") from error
        height, width = frames.shape[1:3]
        found = np.full((len(frames), 3), np.nan)
        options = {"model_selection": 1, "min_detection_confidence": self.min_confidence}
        last: NDArray[np.float64] | None = None
        with mediapipe.solutions.face_detection.FaceDetection(**options) as detector:
            for number, frame in enumerate(frames):
                relative = [d.location_data.relative_bounding_box for d in detector.process(frame).detections or ()]
                boxes = [_centre_and_side(b.xmin, b.ymin, b.width, b.height, width, height) for b in relative]
                if boxes:
                    # The largest face first, then the one that moved least: other people are left alone.
                    last = max(boxes, key=lambda b: b[2]) if last is None else min(boxes, key=lambda b: _moved(b, last))
                    found[number] = last
        return bridge(found)


def bridge(boxes: Boxes) -> Boxes:
    """Boxes (n, 3) with the rows of NaN filled: linearly between their neighbours, with the nearest at the ends.

    Raises:
        UserError: no box at all, or none for more than 25 frames.
    """
    known = np.isfinite(boxes).all(axis=1)
    if not known.any():
        raise UserError(f"expected a face, found none in {len(boxes)} frames: crop the video to the face")
    indices = np.flatnonzero(known)
    gaps = np.diff(np.concatenate([[-1], indices, [len(boxes)]])) - 1
    if gaps.max() > MAX_GAP_FRAMES:
        start = int(np.concatenate([[-1], indices])[gaps.argmax()]) + 1
        raise UserError(f"expected a face, found none for {gaps.max()} frames from frame {start}: cut the video there")
    frames = np.arange(len(boxes))
    return np.column_stack([np.interp(frames, indices, boxes[known, i]) for i in range(3)])


def face_crops(frames: Frames, boxes: Boxes, size_px: int = FACE_PX) -> Frames:
    """SyncNet's crops (n, size_px, size_px, 3): boxes smoothed by a median over 13 frames, 0.4 of their half side more
    on the left, the right and twice that below (syncnet_python, run_pipeline.py), grey outside of the picture.
    """
    from PIL import Image
    from scipy.signal import medfilt

    x, y, half = (medfilt(np.ascontiguousarray(column), MEDIAN_FRAMES) for column in (*boxes.T[:2], boxes[:, 2] / 2))
    # medfilt pads with zeros, which pulls the ends to the corner: they keep the first and last full median.
    margin = min(MEDIAN_FRAMES // 2, (len(boxes) - 1) // 2)
    if margin:
        for column in (x, y, half):
            column[:margin], column[-margin:] = column[margin], column[-margin - 1]
    crops = np.empty((len(frames), size_px, size_px, 3), np.uint8)
    for i, frame in enumerate(frames):
        grow = half[i] * (1 + CROP_SCALE)
        box = (x[i] - grow, y[i] - half[i], x[i] + grow, y[i] + half[i] * (1 + 2 * CROP_SCALE))
        pad = int(np.ceil(max(0.0, -box[0], -box[1], box[2] - frame.shape[1], box[3] - frame.shape[0])))
        padded = np.pad(frame, ((pad, pad), (pad, pad), (0, 0)), constant_values=BORDER_GREY)
        shifted = tuple(float(value + pad) for value in box)
        image = Image.fromarray(padded).resize((size_px, size_px), Image.Resampling.BILINEAR, box=shifted)
        crops[i] = np.asarray(image)
    return crops


def _centre_and_side(x: float, y: float, w: float, h: float, width: int, height: int) -> NDArray[np.float64]:
    return np.array([(x + w / 2) * width, (y + h / 2) * height, max(w * width, h * height)])


def _moved(box: NDArray[np.float64], last: NDArray[np.float64] | None) -> float:
    return 0.0 if last is None else float(np.linalg.norm(box[:2] - last[:2]))
