"""The face mesh: which point is what, the head's own frame, and measures of lips and eyes.

Points are those of mediapipe's face mesh with irises, (478, 3): x right, y down, z away from the
camera (smaller is nearer), all in pixels of the picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rest_lightning.media.faces import mediapipe_solutions
from rest_lightning.media.files import Closing

Picture = NDArray[np.uint8]
Points = NDArray[np.float64]

NUM_POINTS = 478

# Points that bone moves and expression does not: forehead, temples, bridge of the nose, corners of
# the eyes.
RIGID = np.array(
    [
        10,
        338,
        297,
        332,
        109,
        67,
        103,
        151,
        9,
        8,
        168,
        6,
        197,
        195,
        127,
        356,
        234,
        454,
        33,
        133,
        362,
        263,
        21,
        251,
        54,
        284,
    ]
)
INNER_LIPS = np.array(
    [78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308, 324, 318, 402, 317, 14, 87, 178, 88, 95]
)
OUTER_LIPS = np.array(
    [61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291, 375, 321, 405, 314, 17, 84, 181, 91, 146]
)
UPPER_INNER, LOWER_INNER = (
    INNER_LIPS[1:10],
    INNER_LIPS[11:][::-1],
)  # left to right, corners left out
FACE_OVAL = np.array(
    [
        10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377,
        152, 148, 176, 149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109,
    ]
)  # fmt: skip
LEFT_EYE = np.array([33, 246, 161, 160, 159, 158, 157, 173, 133, 155, 154, 153, 145, 144, 163, 7])
RIGHT_EYE = np.array(
    [263, 466, 388, 387, 386, 385, 384, 398, 362, 382, 381, 380, 374, 373, 390, 249]
)
LEFT_LIDS = (LEFT_EYE[1:8], LEFT_EYE[9:][::-1])  # upper, lower, outer corner to inner
RIGHT_LIDS = (RIGHT_EYE[1:8], RIGHT_EYE[9:][::-1])
CHEEKS = np.array([50, 101, 118, 205, 280, 330, 347, 425])
FOREHEAD, CHIN = 10, 152
WIDE_OPEN = 0.16  # gap of the inner lips over the face's height at which the sidecar says 1


@dataclass(frozen=True)
class HeadPose:
    """Where a head is: ``points = scale * canonical @ rotation.T + shift``.

    Attributes:
        scale: pixels per unit of the canonical frame, in which the rigid points have a mean
            distance of 1.
        rotation: (3, 3).
        shift: (3,) in pixels.
    """

    scale: float
    rotation: Points
    shift: Points

    def apply(self, canonical: Points) -> Points:
        """Canonical points (..., 3) to pixels."""
        return self.scale * canonical @ self.rotation.T + self.shift

    def invert(self, points: Points) -> Points:
        """Pixels (..., 3) to canonical points."""
        return (points - self.shift) @ self.rotation / self.scale


class MeshTracker(Closing):
    """Follows the one face of a video with mediapipe's mesh with attention to lips and eyes (extra
    ``prepare``).

    Args:
        video: whether pictures follow one another; False looks at each on its own.

    Raises:
        UserError: mediapipe is not installed.
    """

    def __init__(self, video: bool = True) -> None:
        self._net: Any = mediapipe_solutions().face_mesh.FaceMesh(
            static_image_mode=not video, refine_landmarks=True, max_num_faces=1 if video else 2
        )

    def track(self, pictures: Iterable[Picture]) -> Iterator[Points | None]:
        """Yields the mesh (478, 3) of every picture, uint8 RGB (H, W, 3); None where no face is
        seen.
        """
        for picture in pictures:
            found = self.find(picture)
            yield found[0] if found else None

    def find(self, picture: Picture) -> list[Points]:
        """Returns the meshes of all faces."""
        height, width = picture.shape[:2]
        found = self._net.process(np.ascontiguousarray(picture)).multi_face_landmarks or ()
        size = np.array([width, height, width])
        return [np.array([(p.x, p.y, p.z) for p in face.landmark]) * size for face in found]

    def close(self) -> None:
        """Releases the model."""
        self._net.close()


def head_pose(points: Points) -> HeadPose:
    """Returns the pose of a mesh (478, 3) from the face's own structure.

    x runs from the right eye's outer corner to the left one's, y from between the eyes to the
    mouth, z out of the face.
    """
    rigid = points[RIGID]
    centre = rigid.mean(axis=0)
    scale = float(np.linalg.norm(rigid - centre, axis=1).mean())
    x = points[263] - points[33]
    x = x / np.linalg.norm(x)
    down = (
        points[OUTER_LIPS].mean(axis=0) - (points[33] + points[263] + points[133] + points[362]) / 4
    )
    y = down - (down @ x) * x
    y = y / np.linalg.norm(y)
    return HeadPose(scale, np.stack([x, y, np.cross(x, y)], axis=1), centre)


def fit_pose(canonical: Points, points: Points) -> HeadPose:
    """Returns the similarity that takes the rigid points of ``canonical`` to those of ``points``
    (Umeyama, 1991).
    """
    a, b = canonical[RIGID], points[RIGID]
    a0, b0 = a - a.mean(axis=0), b - b.mean(axis=0)
    u, s, vt = np.linalg.svd(b0.T @ a0)
    sign = np.sign(np.linalg.det(u @ vt))
    u[:, 2] *= sign
    rotation = u @ vt
    scale = float((s[0] + s[1] + sign * s[2]) / np.square(a0).sum())
    return HeadPose(scale, rotation, b.mean(axis=0) - scale * a.mean(axis=0) @ rotation.T)


def rotation_vector(rotation: Points) -> Points:
    """Returns axis times angle (3,) of a rotation matrix whose angle is below pi."""
    angle = np.arccos(np.clip((np.trace(rotation) - 1) / 2, -1.0, 1.0))
    skew = np.array(
        [
            rotation[2, 1] - rotation[1, 2],
            rotation[0, 2] - rotation[2, 0],
            rotation[1, 0] - rotation[0, 1],
        ]
    )
    return skew / 2 * (1.0 if angle < 1e-6 else angle / np.sin(angle))


def rotation_matrix(vector: Points) -> Points:
    """Returns the rotation matrix of axis times angle (3,) (Rodrigues' formula)."""
    angle = float(np.linalg.norm(vector))
    if angle < 1e-9:
        return np.eye(3)
    x, y, z = vector / angle
    k = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * k @ k


def face_height(points: Points) -> Any:
    """Returns the distance from the top of the forehead to the chin, in pixels; (..., 478, 3) to
    (...).
    """
    return np.linalg.norm(points[..., FOREHEAD, :2] - points[..., CHIN, :2], axis=-1)


def lip_gap(points: Points) -> Any:
    """Returns the gap of the inner lips over the face's height; (..., 478, 3) to (...)."""
    upper, lower = points[..., UPPER_INNER[3:6], :2], points[..., LOWER_INNER[3:6], :2]
    return np.linalg.norm(upper - lower, axis=-1).mean(axis=-1) / face_height(points)


def mouth_opening(points: Points) -> Any:
    """Returns what sidecars say: 0 where lips touch, 1 where they are wide open; (..., 478, 3) to
    (...).
    """
    return np.clip((lip_gap(points) - 0.004) / (WIDE_OPEN - 0.004), 0.0, 1.0)


def eye_opening(points: Points) -> tuple[float, float]:
    """Returns height over width of the left and the right eye (the image's left); about 0.3 open,
    below 0.12 closed.
    """

    def ratio(eye: NDArray[np.int64], lids: tuple[NDArray[np.int64], NDArray[np.int64]]) -> float:
        height = np.linalg.norm(points[lids[0], :2] - points[lids[1], :2], axis=1)[2:5].mean()
        return float(height / np.linalg.norm(points[eye[0], :2] - points[eye[8], :2]))

    return ratio(LEFT_EYE, LEFT_LIDS), ratio(RIGHT_EYE, RIGHT_LIDS)


def yaw_rad(points: Points) -> float:
    """Returns how far the head is turned to a side, from the pose of its own structure."""
    forward = head_pose(points).rotation[:, 2]
    return float(np.arctan2(forward[0], abs(forward[2])))
