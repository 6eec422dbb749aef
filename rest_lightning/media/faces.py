"""Finds faces and hands in videos that are prepared for training: mediapipe behind an interface
that takes other detectors, too.

mediapipe 0.10.14 (extra ``prepare``) carries its models inside its wheel; nothing is downloaded.
Portraits need no extra: :mod:`rest_lightning.media.face_models` finds their faces.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rest_lightning.errors import UserError
from rest_lightning.extras import install_command
from rest_lightning.media.files import Closing

Picture = NDArray[np.uint8]
Points = NDArray[np.float64]
Box = tuple[float, float, float, float]

# Of mediapipe's 468-point mesh: corners of the eyes (left = the image's left), lips, tip of the
# nose.
_LEFT_EYE, _RIGHT_EYE, _LIPS, _NOSE = (33, 133), (362, 263), (13, 14), 1
_MESH_SCALE = 1.6  # the mesh sees this many times the detected box
_MIN_MESH_PX = 192  # smaller crops are enlarged: the mesh's own detector misses tiny faces


@dataclass(frozen=True)
class Face:
    """One face in one picture, in its pixels (x right, y down).

    Attributes:
        box: x, y, width, height as the detector gives it.
        points: (n, 2) landmarks; their extremes make the crop.
        left_eye, right_eye, mouth, nose: (2,); left = the image's left.
        confidence: 0 to 1.
    """

    box: Box
    points: Points
    left_eye: Points
    right_eye: Points
    mouth: Points
    nose: Points
    confidence: float = 1.0


class FaceDetector(Protocol):
    """Finds all faces of a picture. Made once per video as ``Class(source=path,
    min_confidence=0.5)``.

    Built for each process anew; pictures come in the order of time.
    """

    def detect(self, picture: Picture, time_s: float) -> list[Face]:
        """Faces in uint8 RGB (H, W, 3), seen ``time_s`` after the video's first frame."""
        ...

    def close(self) -> None:
        """Releases the models."""
        ...


def make_detector(name: str, source: Path, min_confidence: float) -> FaceDetector:
    """``mediapipe``, or the class of an import path ``package.module:Class``.

    Raises:
        UserError: no such class, or mediapipe is not installed.
    """
    detector: FaceDetector = check_detector(name)(source=source, min_confidence=min_confidence)
    return detector


def check_detector(name: str) -> Any:
    """The class that `make_detector` makes. Raises a UserError where there is none."""
    if name == "mediapipe":
        mediapipe_solutions()
        return MediapipeDetector
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise UserError(
            f"expected a detector mediapipe or package.module:Class, got {name!r}: correct the name"
        )
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"expected the detector {name}, got {error}: install it, or correct the name"
        ) from None


def mediapipe_solutions() -> Any:
    """``mediapipe.solutions``, with its log silenced.

    Raises:
        UserError: it is not installed, or is a release without models.
    """
    os.environ.setdefault("GLOG_minloglevel", "2")
    warnings.filterwarnings("ignore", message=".*GetPrototype.*")  # protobuf's, at every picture
    way_out = (
        f"{install_command('prepare')} (Python 3.12 or older), or give --box x,y,w,h or "
        "--already-cropped"
    )
    try:
        import mediapipe
    except ImportError as error:
        raise UserError(f"expected mediapipe for faces: {way_out}") from error
    if not hasattr(mediapipe, "solutions"):
        raise UserError(
            f"expected mediapipe 0.10.14, got {mediapipe.__version__} without models: {way_out}"
        )
    return mediapipe.solutions


class FaceBoxes(Closing):
    """mediapipe's full-range face detector, 192x192 inside.

    Args:
        min_confidence: of a detection.
    """

    def __init__(self, min_confidence: float = 0.5) -> None:
        face_detection = mediapipe_solutions().face_detection
        self._net = face_detection.FaceDetection(
            model_selection=1, min_detection_confidence=min_confidence
        )

    def find(self, picture: Picture) -> list[tuple[Box, Points, float]]:
        """Of every face: box x, y, w, h, six points (eyes, nose, mouth, ears) in pixels, and
        confidence.
        """
        height, width = picture.shape[:2]
        found = []
        for detection in self._net.process(np.ascontiguousarray(picture)).detections or ():
            data = detection.location_data
            b = data.relative_bounding_box
            points = np.array([(p.x * width, p.y * height) for p in data.relative_keypoints])
            box = (b.xmin * width, b.ymin * height, b.width * width, b.height * height)
            found.append((box, points, float(detection.score[0])))
        return found

    def close(self) -> None:
        """Releases the model."""
        self._net.close()


class MediapipeDetector:
    """Faces by :class:`FaceBoxes`, landmarks of each by the 468-point mesh on its crop.

    Every picture is looked at on its own: the result does not depend on what was seen before.

    Args:
        source: the video, not used.
        min_confidence: of a detection.
    """

    def __init__(self, source: Path, min_confidence: float = 0.5) -> None:
        self._boxes = FaceBoxes(min_confidence)
        mesh = mediapipe_solutions().face_mesh
        self._mesh = mesh.FaceMesh(
            static_image_mode=True, max_num_faces=1, min_detection_confidence=0.3
        )

    def detect(self, picture: Picture, time_s: float) -> list[Face]:
        """See :class:`FaceDetector`."""
        return [self._face(picture, *found) for found in self._boxes.find(picture)]

    def close(self) -> None:
        """See :class:`FaceDetector`."""
        self._boxes.close()
        self._mesh.close()

    def _face(self, picture: Picture, box: Box, six: Points, confidence: float) -> Face:
        points = self._landmarks(picture, box)
        # a face too turned for the mesh: the detector's box stands for its landmarks
        if points is None:
            x, y, width, height = box
            corners = np.array([(x, y), (x + width, y + height)])
            return Face(box, np.vstack([corners, six]), six[0], six[1], six[3], six[2], confidence)
        left_eye, right_eye = (
            points[list(_LEFT_EYE)].mean(axis=0),
            points[list(_RIGHT_EYE)].mean(axis=0),
        )
        return Face(
            box,
            points,
            left_eye,
            right_eye,
            points[list(_LIPS)].mean(axis=0),
            points[_NOSE],
            confidence,
        )

    def _landmarks(self, picture: Picture, box: Box) -> Points | None:
        side = _MESH_SCALE * max(box[2:])
        left, top = (box[i] + box[i + 2] / 2 - side / 2 for i in (0, 1))
        x0, y0 = max(0, int(left)), max(0, int(top))
        crop = picture[y0 : max(0, int(top + side)), x0 : max(0, int(left + side))]
        if min(crop.shape[:2], default=0) < 16:
            return None
        height, width = crop.shape[:2]
        found = self._mesh.process(enlarged(crop, _MIN_MESH_PX)).multi_face_landmarks
        if not found:
            return None
        return np.array([(x0 + p.x * width, y0 + p.y * height) for p in found[0].landmark])


class HandFinder:
    """Hands by mediapipe's hand model.

    Args:
        min_confidence: of a detection.
    """

    def __init__(self, min_confidence: float = 0.5) -> None:
        hands = mediapipe_solutions().hands
        self._net = hands.Hands(
            static_image_mode=True, max_num_hands=2, min_detection_confidence=min_confidence
        )

    def find(self, picture: Picture) -> list[Points]:
        """21 points (21, 2) in pixels of every hand in uint8 RGB (H, W, 3)."""
        height, width = picture.shape[:2]
        found = self._net.process(np.ascontiguousarray(picture)).multi_hand_landmarks or ()
        return [np.array([(p.x * width, p.y * height) for p in hand.landmark]) for hand in found]

    def close(self) -> None:
        """Releases the model."""
        self._net.close()


def enlarged(picture: Picture, least_px: int) -> Picture:
    """The picture with its shorter side at least ``least_px``, bilinear."""
    height, width = picture.shape[:2]
    scale = least_px / min(height, width)
    if scale <= 1:
        return np.ascontiguousarray(picture)
    from PIL import Image

    size = (round(width * scale), round(height * scale))
    return np.asarray(
        Image.fromarray(np.ascontiguousarray(picture)).resize(size, Image.Resampling.BILINEAR)
    )


def hands_over(hands: Sequence[Points], face: Box) -> bool:
    """Whether a hand covers part of a face's box: at least three of its 21 points are inside."""
    x, y, width, height = face
    return any(
        ((hand >= (x, y)) & (hand <= (x + width, y + height))).all(axis=1).sum() >= 3  # a finger
        for hand in hands
    )
