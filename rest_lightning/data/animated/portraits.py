"""Portraits to animate: a still with one near-frontal face, framed, with its mesh and what is
behind the head.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from rest_lightning.data.animated.mesh import (
    CHEEKS,
    CHIN,
    FACE_OVAL,
    FOREHEAD,
    OUTER_LIPS,
    MeshTracker,
    Picture,
    Points,
    eye_opening,
    face_height,
    lip_gap,
    yaw_rad,
)
from rest_lightning.media.faces import mediapipe_solutions

# of the face's height: a wider smile cannot be closed without pulling the face out of shape
MAX_GAP = 0.075
MAX_YAW_RAD = 0.45
MIN_FACE_PX = 80.0
MIN_EYES = 0.13
_EDGE = 0.012  # of a still's shorter side, cut off
_INPAINT_PX = 14  # heads do not move farther than this over their background


class PortraitRefused(Exception):
    """A still that cannot be animated; the text is the reason, in a word or two."""


@dataclass(frozen=True)
class Portrait:
    """A framed still.

    Attributes:
        name: of the file.
        picture: uint8 (size, size, 3), RGB.
        mesh: (478, 3) in pixels of ``picture``.
        alpha: float32 (size, size), 1 where the person is, 0 where the background is.
        background: uint8 (size, size, 3), the picture with the person's edge painted over.
        skin: (3,) median colour of the cheeks, RGB.
        lips: (3,) the same of the lips.
    """

    name: str
    picture: Picture
    mesh: Points
    alpha: NDArray[np.float32]
    background: Picture
    skin: NDArray[np.float64]
    lips: NDArray[np.float64]


@dataclass(frozen=True)
class Framing:
    """How a still is cut out.

    Attributes:
        face: height of the face, forehead to chin, as a share of the side.
        x, y: where the middle of the face is, as shares of the side.
        roll_rad: turn of the picture.
    """

    face: float = 0.64
    x: float = 0.5
    y: float = 0.53
    roll_rad: float = 0.0


def read_still(path: str | os.PathLike[str]) -> Picture:
    """Reads a picture as it is to be seen, uint8 RGB (H, W, 3).

    Raises:
        PortraitRefused: it cannot be read.
    """
    try:
        with Image.open(path) as image:
            picture = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise PortraitRefused(f"unreadable ({error})") from None
    edge = max(
        1, round(_EDGE * min(picture.shape[:2]))
    )  # many files have a dark or blurred line there
    return np.ascontiguousarray(picture[edge:-edge, edge:-edge])


def choose_framing(
    mesh: Points, shape: tuple[int, ...], rng: np.random.Generator | None = None
) -> Framing:
    """Returns a framing that stays within the still where it can: the face fills 0.58 to 0.72 of
    the side: the VAE sees a mouth in a few latents of 32x32 pixels, so its size decides the lips.

    Args:
        mesh: (478, 3) in the still's pixels.
        shape: of the still, (H, W, ...).
        rng: varies size, place and turn; None takes the middle of each.
    """
    draw = rng.uniform(-1, 1, 4) if rng is not None else np.zeros(4)
    height = float(face_height(mesh))
    centre = (mesh[FOREHEAD, :2] + mesh[CHIN, :2]) / 2
    x, y = 0.5 + 0.03 * draw[1], 0.53 + 0.025 * draw[2]
    # The largest side at which each edge of the square is at most a little outside; the top may
    # show repeated rows.
    rooms = [
        centre[0] / x,
        (shape[1] - centre[0]) / (1 - x),
        (shape[0] - centre[1]) / (1 - y),
        1.15 * centre[1] / y,
    ]
    side = 1.04 * min(rooms)
    face = float(np.clip(max(0.64 + 0.05 * draw[0], height / side), 0.58, 0.72))
    return Framing(face, x, y, 0.05 * draw[3])


def find_mesh(picture: Picture, tracker: MeshTracker) -> Points:
    """Returns the mesh (478, 3) of the largest face.

    Raises:
        PortraitRefused: no face, or a second one of more than 0.6 times its height.
    """
    faces = sorted(tracker.find(picture), key=lambda points: -float(face_height(points)))
    if not faces:
        raise PortraitRefused("no face")
    if len(faces) > 1 and face_height(faces[1]) > 0.6 * face_height(faces[0]):
        raise PortraitRefused("several faces")
    return faces[0]


def check_mesh(mesh: Points, shape: tuple[int, ...]) -> None:
    """Checks that a face in a picture of ``shape`` (H, W, ...) can be animated.

    Raises:
        PortraitRefused: too small, turned away, closed eyes, an open mouth, or partly outside.
    """
    height, oval = float(face_height(mesh)), mesh[FACE_OVAL, :2]
    inside = (oval > 0).all() and (oval < (shape[1], shape[0])).all()
    for wrong, reason in (
        (height < MIN_FACE_PX, "small face"),
        (abs(yaw_rad(mesh)) > MAX_YAW_RAD, "profile"),
        (min(eye_opening(mesh)) < MIN_EYES, "closed eyes"),
        (lip_gap(mesh) > MAX_GAP, "open mouth"),
        (not inside, "face leaves the picture"),
    ):
        if wrong:
            raise PortraitRefused(reason)


def frame_portrait(
    name: str,
    still: Picture,
    mesh: Points,
    framing: Framing,
    size_px: int,
    segment: Callable[[Picture], NDArray[np.float32]],
) -> Portrait:
    """Cuts the still out and separates the person from the background.

    Args:
        name: of the portrait.
        still: uint8 (H, W, 3).
        mesh: (478, 3) in its pixels.
        framing: where the face is to be.
        size_px: side of the result.
        segment: gives 1 where the person is, float32 (H, W), of an RGB picture.
    """
    height = float(face_height(mesh))
    scale = framing.face * size_px / height
    centre = (mesh[FOREHEAD, :2] + mesh[CHIN, :2]) / 2
    cos, sin = scale * np.cos(framing.roll_rad), scale * np.sin(framing.roll_rad)
    matrix = np.array([[cos, -sin], [sin, cos]])
    target = np.array([framing.x, framing.y]) * size_px
    affine = np.concatenate([matrix, (target - matrix @ centre)[:, None]], axis=1)
    if scale < 0.75:  # warpAffine has no area filter
        still = np.asarray(cv2.GaussianBlur(still, (0, 0), 0.45 / scale), np.uint8)
    cut = cv2.warpAffine(
        still, affine, (size_px, size_px), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE
    )
    picture = np.asarray(cut, np.uint8)
    moved = mesh.copy()
    moved[:, :2] = mesh[:, :2] @ matrix.T + affine[:, 2]
    moved[:, 2] *= scale
    seen = segment(picture)
    alpha = np.clip((seen - 0.25) / 0.35, 0.0, 1.0).astype(np.float32)
    alpha = alpha * alpha * (3 - 2 * alpha)
    person = (seen > 0.1).astype(np.uint8)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
    outside = np.asarray(cv2.dilate(person, kernel), np.uint8)
    inside = np.asarray(cv2.erode(person, kernel, iterations=_INPAINT_PX // 2), np.uint8)
    painted = cv2.inpaint(picture, outside & (1 - inside), 3, cv2.INPAINT_TELEA)
    background = np.asarray(painted, np.uint8)
    return Portrait(
        name,
        picture,
        moved,
        alpha,
        background,
        _median(picture, moved, CHEEKS),
        _median(picture, moved, OUTER_LIPS),
    )


class PersonSegmenter:
    """Where a person is in a picture: mediapipe's selfie segmentation (extra ``prepare``)."""

    def __init__(self) -> None:
        self._net = mediapipe_solutions().selfie_segmentation.SelfieSegmentation(model_selection=0)

    def __call__(self, picture: Picture) -> NDArray[np.float32]:
        """Returns 0 (background) to 1 (person), float32 (H, W)."""
        mask: NDArray[np.float32] = self._net.process(
            np.ascontiguousarray(picture)
        ).segmentation_mask
        return mask


def list_stills(root: Path) -> list[Path]:
    """Returns all pictures under a folder, sorted."""
    suffixes = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
    return sorted(
        path for path in root.rglob("*") if path.suffix.lower() in suffixes and path.is_file()
    )


def _median(picture: Picture, mesh: Points, which: NDArray[np.int64]) -> NDArray[np.float64]:
    size = len(picture) - 1
    x, y = (np.clip(mesh[which, axis].round().astype(int), 0, size) for axis in (0, 1))
    colour: NDArray[np.float64] = np.median(picture[y, x].astype(np.float64), axis=0)
    return colour
