"""Faces in pictures: a detector and a 468-point mesh that need nothing but torch and the bundled
weights.

Both networks are MediaPipe's (Apache-2.0): the full-range BlazeFace detector (Bazarevsky et al.
2019) and the face mesh (Kartynnik et al. 2019). `tools/face_models.py` converted their weights from
the wheel of mediapipe 0.10.14; `assets/faces/README.md` tells where they come from. Anchors,
decoding, suppression, the rotated crop and the tracking follow MediaPipe's graphs; tests compare
the results with mediapipe where it is installed.

    finder, mesh = FaceFinder.load(), FaceMesh.load()
    faces = finder.find(picture)                  # uint8 (H, W, 3), largest face first
    landmarks = mesh.landmarks(picture, faces[0])
    landmarks.mouth_opening(), landmarks.pose().yaw_deg
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

Picture = NDArray[np.uint8]
Box = tuple[float, float, float, float]

WEIGHTS = Path(__file__).parents[1] / "assets" / "faces" / "face_models.safetensors"


class DetectorNet(nn.Module):
    """BlazeFace, full range: an encoder of five halvings and a decoder back to a quarter of the
    input's side.

    Fully convolutional: it runs on any size that 32 divides; it was trained on 192x192, where it
    sees faces of about 12 pixels up to the whole picture.
    """

    stride = 4

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, stride=2, padding=1)
        self.stage_1 = _stage(32, 32, 8, num_blocks=2, halve=False)
        self.stage_2 = _stage(32, 64, 16, num_blocks=2)
        self.lateral_2 = nn.Conv2d(64, 48, 1)
        self.stage_3 = _stage(64, 128, 32, num_blocks=2)
        self.lateral_3 = nn.Conv2d(128, 64, 1)
        self.stage_4 = _stage(128, 192, 48, num_blocks=2)
        self.lateral_4 = nn.Conv2d(192, 96, 1)
        self.stage_5 = _stage(192, 384, 96, num_blocks=3)
        self.up_4 = nn.Conv2d(384, 96, 1)
        self.merge_4 = _stage(96, 96, 48, num_blocks=2, halve=False)
        self.up_3 = nn.Conv2d(96, 64, 1)
        self.merge_3 = _stage(64, 64, 32, num_blocks=2, halve=False)
        self.up_2 = nn.Conv2d(64, 48, 1)
        self.merge_2 = _stage(48, 48, 24, num_blocks=1, halve=False)
        self.regressor = _head(48, 64)
        self.classifier = _head(48, 4)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what every cell of 4x4 pixels says.

        Args:
            pictures: float32 (B, 3, H, W) in [-1, 1]; H and W are multiples of 32.

        Returns:
            Regressions (B, 16, H / 4, W / 4) in pixels relative to the cell's centre: centre x, y,
            width, height, six key points x, y; and logits (B, 1, H / 4, W / 4).
        """
        x = self.stage_1(functional.relu(self.stem(pictures)))
        x = self.stage_2(x)
        quarter = functional.relu(self.lateral_2(x))
        x = self.stage_3(x)
        eighth = functional.relu(self.lateral_3(x))
        x = self.stage_4(x)
        sixteenth = functional.relu(self.lateral_4(x))
        x = self.stage_5(x)
        x = self.merge_4(sixteenth + _doubled(functional.relu(self.up_4(x))))
        x = self.merge_3(eighth + _doubled(functional.relu(self.up_3(x))))
        x = self.merge_2(quarter + _doubled(functional.relu(self.up_2(x))))
        return _depth_to_space(self.regressor(x)), _depth_to_space(self.classifier(x))


class _DoubleBlock(nn.Module):
    """Two separable convolutions through a bottleneck, with a residual where the shape stays."""

    def __init__(self, num_in: int, num_out: int, num_inner: int, halve: bool) -> None:
        super().__init__()
        stride = 2 if halve else 1
        self.depthwise_1 = nn.Conv2d(num_in, num_in, 3, stride=stride, padding=1, groups=num_in)
        self.pointwise_1 = nn.Conv2d(num_in, num_inner, 1)
        self.depthwise_2 = nn.Conv2d(num_inner, num_inner, 3, padding=1, groups=num_inner)
        self.pointwise_2 = nn.Conv2d(num_inner, num_out, 1)
        self.residual = num_in == num_out and not halve

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu_(self.pointwise_1(self.depthwise_1(x)))
        y = self.pointwise_2(self.depthwise_2(y))
        return functional.relu_(x + y if self.residual else y)


def _stage(
    num_in: int, num_out: int, num_inner: int, num_blocks: int, halve: bool = True
) -> nn.Sequential:
    blocks = [_DoubleBlock(num_in, num_out, num_inner, halve=True)] if halve else []
    blocks += [_DoubleBlock(num_out, num_out, num_inner, halve=False) for _ in range(num_blocks)]
    return nn.Sequential(*blocks)


def _head(num_in: int, num_out: int) -> nn.Sequential:
    halved = nn.Conv2d(num_out, num_out, 3, stride=2, padding=1, groups=num_out)
    return nn.Sequential(nn.Conv2d(num_in, num_out, 1), halved)


def _doubled(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def _depth_to_space(x: Tensor) -> Tensor:
    """(B, 4 C, H, W) to (B, C, 2 H, 2 W) in TensorFlow's order of channels: row, column, then C."""
    num, depth, height, width = x.shape
    x = x.view(num, 2, 2, depth // 4, height, width)
    return x.permute(0, 3, 4, 1, 5, 2).reshape(num, depth // 4, 2 * height, 2 * width)


class MeshNet(nn.Module):
    """MediaPipe's face mesh: a crop of 192x192 to 468 points and whether there is a face in it."""

    size_px = 192

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2)
        self.activation = nn.PReLU(16)
        widths = ((16, 16, 16), (32, 32, 32), (64, 64, 64), (128, 128, 128), (128, 128, 128))
        blocks = []
        before = 16
        for i, level in enumerate(widths):
            for j, width in enumerate(level if i else level[:2]):
                blocks.append(_MeshBlock(before, width, halve=i > 0 and j == 0))
                before = width
        self.trunk = nn.Sequential(*blocks)
        self.points = _mesh_head(num_blocks=3, num_out=3 * NUM_POINTS)
        self.flag = _mesh_head(num_blocks=1, num_out=1)

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """Returns points (B, 468, 3) in pixels of the crop, and logits (B,) of a face being there.

        Args:
            crops: float32 (B, 3, 192, 192) in [0, 1], upright faces.
        """
        x = self.activation(self.stem(functional.pad(crops, (0, 1, 0, 1))))
        x = self.trunk(x)
        return self.points(x).view(-1, NUM_POINTS, 3), self.flag(x).flatten()


class _MeshBlock(nn.Module):
    """A separable convolution with a residual: pooled where it halves, filled with zeros where it
    widens.
    """

    def __init__(self, num_in: int, num_out: int, halve: bool = False) -> None:
        super().__init__()
        stride = 2 if halve else 1
        self.depthwise = nn.Conv2d(num_in, num_in, 3, stride, 0 if halve else 1, groups=num_in)
        self.pointwise = nn.Conv2d(num_in, num_out, 1)
        self.activation = nn.PReLU(num_out)
        self.halve = halve
        self.num_more = num_out - num_in

    def forward(self, x: Tensor) -> Tensor:
        y = self.pointwise(self.depthwise(functional.pad(x, (0, 1, 0, 1)) if self.halve else x))
        skip = functional.max_pool2d(x, 2) if self.halve else x
        if self.num_more:
            skip = functional.pad(skip, (0, 0, 0, 0, 0, self.num_more))
        return self.activation(skip + y)


def _mesh_head(num_blocks: int, num_out: int) -> nn.Sequential:
    blocks: list[nn.Module] = [_MeshBlock(128, 128, halve=True)]
    blocks += [_MeshBlock(128, 128) for _ in range(num_blocks - 1)]
    blocks += [nn.Conv2d(128, 32, 1), nn.PReLU(32), _MeshBlock(32, 32), nn.Conv2d(32, num_out, 3)]
    return nn.Sequential(*blocks)


NUM_POINTS = 468


@dataclass(frozen=True)
class Face:
    """One face in one picture, in its pixels (x right, y down, the picture's edge at 0).

    Attributes:
        box: x, y, width, height: from the brows to the chin, as the detector was taught.
        keypoints: float32 (6, 2): the person's right eye (left in the picture), left eye, tip of
            the nose, middle of the mouth, right ear, left ear.
        score: 0 to 1.
    """

    box: Box
    keypoints: NDArray[np.float32]
    score: float


class FaceFinder:
    """Finds the faces of a picture, at several scales; the mesh confirms each.

    The picture is looked at with its longer side scaled to 192 pixels, as MediaPipe does, then to
    64, for faces that fill it or reach beyond it, then to 384, 768, ... until faces of
    ``smallest_px`` would have been seen. It stops when a face was found that is large at its scale:
    others of less than a quarter of its area may then be missing. A detection counts when the mesh,
    laid there, says that there is a face: the detector alone sees faces in noise.

    Args:
        net: the detector with its weights.
        mesh: confirms detections; None keeps them all.
        min_score: detections below are dropped.
        smallest_px: larger side of the smallest face box to look for; larger in pictures of more
            than 2,500 pixels a side: about 1 % of it.
    """

    def __init__(
        self,
        net: DetectorNet,
        mesh: FaceMesh | None,
        min_score: float = 0.5,
        smallest_px: float = 28.0,
    ) -> None:
        self.net = net
        self.mesh = mesh
        self.min_score = min_score
        self.smallest_px = smallest_px

    @classmethod
    def load(cls, path: Path = WEIGHTS, min_score: float = 0.5, smallest_px: float = 28.0) -> Self:
        """Returns a finder with the bundled weights. See the class for the arguments."""
        net = _loaded(DetectorNet(), "detector", path)
        return cls(net, FaceMesh.load(path), min_score, smallest_px)

    def find(self, picture: Picture) -> list[Face]:
        """Returns the faces of uint8 RGB (H, W, 3), the largest first; may be empty."""
        found: list[Face] = []
        finest = 0.0
        for side_px in self._sides(picture):
            scale = side_px / max(picture.shape[:2])
            finest = max(finest, scale)
            found = suppress([*found, *self._confirmed(picture, self.detect(picture, scale))])
            if any(finest * max(face.box[2:]) >= _LARGE_PX for face in found):
                break
        return sorted(found, key=lambda face: -face.box[2] * face.box[3])

    def detect(self, picture: Picture, scale: float) -> list[Face]:
        """Returns what the detector alone sees in the picture scaled by ``scale``, best first."""
        height, width = picture.shape[:2]
        size = max(1, round(width * scale)), max(1, round(height * scale))
        scaled = Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
        small = np.asarray(scaled)
        factors = np.array([width / size[0], height / size[1]], np.float32)
        found = []
        for top in _tiles(size[1]):
            for left in _tiles(size[0]):
                tile = small[top : top + _TILE_PX, left : left + _TILE_PX]
                found += self._detect(tile, (left, top), factors)
        return suppress(found)

    def _sides(self, picture: Picture) -> list[int]:
        """Longer sides at which the detector looks."""
        last_px = min(_SEEN_PX / self.smallest_px * max(picture.shape[:2]), _MAX_SIDE_PX)
        sides = [_TRAINED_PX]
        while sides[-1] < last_px:
            sides.append(min(2 * sides[-1], 32 * math.ceil(last_px / 32)))
        return [sides[0], _CLOSE_PX, *sides[1:]]

    def _confirmed(self, picture: Picture, faces: list[Face]) -> list[Face]:
        if self.mesh is None:
            return faces
        faces = faces[:_MAX_FACES]
        return [face for face in faces if self.mesh.score(picture, face) >= _CONFIRMED]

    def _detect(
        self, tile: Picture, corner: tuple[int, int], factors: NDArray[np.float32]
    ) -> list[Face]:
        """Detections before suppression.

        Args:
            tile: part of the scaled picture.
            corner: its left and top there.
            factors: width and height of the picture over those of the scaled one.
        """
        height, width = tile.shape[:2]
        # Letterboxed in the middle of whole cells of the coarsest scale.
        num_columns, num_rows = (max(math.ceil(n / 32), 4) for n in (width, height))
        left, top = (32 * num_columns - width) // 2, (32 * num_rows - height) // 2
        padded = np.zeros((1, 32 * num_rows, 32 * num_columns, 3), np.float32)
        padded[0, top : top + height, left : left + width] = tile / np.float32(127.5) - 1
        with torch.inference_mode():
            regressions, logits = self.net(torch.from_numpy(padded).permute(0, 3, 1, 2))
        scores = logits[0, 0].sigmoid()
        rows, columns = torch.nonzero(scores >= self.min_score, as_tuple=True)
        values = regressions[0, :, rows, columns].T.numpy()  # (n, 16)
        centres = (
            torch.stack([columns, rows], dim=1).numpy() * self.net.stride + self.net.stride / 2
        )
        # From the cell to the tile, to the scaled picture, to the picture.
        offset = centres + np.array([corner[0] - left, corner[1] - top])
        middles = values[:, :2] + offset
        keypoints = (values[:, 4:].reshape(-1, 6, 2) + offset[:, None]) * factors
        corners, extents = (middles - values[:, 2:4] / 2) * factors, values[:, 2:4] * factors
        return [
            Face((float(c[0]), float(c[1]), float(e[0]), float(e[1])), k.astype(np.float32), s)
            for c, e, k, s in zip(
                corners, extents, keypoints, scores[rows, columns].tolist(), strict=True
            )
        ]


_TRAINED_PX = 192
_CLOSE_PX = 64
_SEEN_PX = 24.0  # larger side of a face box that the detector finds for certain
_LARGE_PX = 48.0  # then a second face of half the area is found for certain too
_MAX_SIDE_PX = 2560
_TILE_PX, _TILE_STEP_PX = (
    768,
    640,
)  # memory does not grow with the picture; faces in the overlap are whole in one tile
_MAX_FACES = 32  # of one scale
_CONFIRMED = 0.9  # of the mesh: faces of 20 pixels and more have 0.98, noise has below 0.5


def _tiles(length: int) -> range:
    """Where tiles start along a side."""
    return range(0, max(1, length - (_TILE_PX - _TILE_STEP_PX)), _TILE_STEP_PX)


def suppress(faces: Iterable[Face], min_overlap: float = 0.3) -> list[Face]:
    """Returns one face for each heap of overlapping detections: their mean weighted by score
    (Bazarevsky et al. 2019).

    Args:
        faces: detections in any order.
        min_overlap: intersection over union from which two are the same face.
    """
    rest = sorted(faces, key=lambda face: -face.score)
    kept = []
    while rest:
        heap = [face for face in rest if overlap(face.box, rest[0].box) > min_overlap]
        weights = np.array([face.score for face in heap])
        weights /= weights.sum()
        box = np.average([face.box for face in heap], axis=0, weights=weights)
        keypoints = np.average([face.keypoints for face in heap], axis=0, weights=weights)
        kept.append(Face(tuple(box.tolist()), keypoints.astype(np.float32), rest[0].score))
        rest = [face for face in rest if overlap(face.box, heap[0].box) <= min_overlap]
    return kept


def overlap(a: Box, b: Box) -> float:
    """Returns intersection over union of two boxes x, y, width, height."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    both = max(width, 0.0) * max(height, 0.0)
    return both / max(a[2] * a[3] + b[2] * b[3] - both, 1e-12)


# Points of the mesh. "Right" and "left" are the person's: the right eye is left in the picture.
RIGHT_EYE = (33, 7, 163, 144, 145, 153, 154, 155, 133, 173, 157, 158, 159, 160, 161, 246)
LEFT_EYE = (263, 249, 390, 373, 374, 380, 381, 382, 362, 398, 384, 385, 386, 387, 388, 466)
OUTER_LIPS = (
    61,
    146,
    91,
    181,
    84,
    17,
    314,
    405,
    321,
    375,
    291,
    409,
    270,
    269,
    267,
    0,
    37,
    39,
    40,
    185,
)
INNER_LIPS = (
    78,
    95,
    88,
    178,
    87,
    14,
    317,
    402,
    318,
    324,
    308,
    415,
    310,
    311,
    312,
    13,
    82,
    81,
    80,
    191,
)
_FOREHEAD, _CHIN, _RIGHT_CHEEK, _LEFT_CHEEK = 10, 152, 234, 454
_RIGHT_CORNER, _LEFT_CORNER = 33, 263  # outer corners of the eyes
_LEVEL_DEG = 7.8  # how far the chin lies behind the forehead of a level head
_INNER_GAPS = ((82, 87), (13, 14), (312, 317))  # upper and lower edge of the inner lips
_RIGHT_GAPS = ((160, 144), (158, 153))  # upper and lower lid
_LEFT_GAPS = ((385, 380), (387, 373))


@dataclass(frozen=True)
class Pose:
    """Which way a head looks, in degrees; 0, 0, 0 looks into the camera.

    Attributes:
        yaw_deg: positive: turned to the right of the picture.
        pitch_deg: positive: raised; 0 is the median of 567 photographs and synthetic portraits.
        roll_deg: positive: tilted clockwise in the picture.
    """

    yaw_deg: float
    pitch_deg: float
    roll_deg: float


@dataclass(frozen=True)
class Landmarks:
    """The mesh of one face.

    Attributes:
        points: float32 (468, 3): x, y in pixels of the picture (its edge at 0), z in pixels too:
            depth relative to the head's middle, smaller is nearer.
        score: 0 to 1: whether there is a face.
    """

    points: NDArray[np.float32]
    score: float

    @property
    def box(self) -> Box:
        """Extremes of the points: x, y, width, height in pixels."""
        low, high = self.points[:, :2].min(axis=0), self.points[:, :2].max(axis=0)
        return float(low[0]), float(low[1]), float(high[0] - low[0]), float(high[1] - low[1])

    def size_px(self) -> float:
        """Returns the face's height from the top of the mesh to the chin in space: it does not
        shrink with a nod.
        """
        return self._distance(_FOREHEAD, _CHIN)

    def mouth_opening(self) -> float:
        """Returns the gap between the inner lips, the mean of three places, over `size_px`.

        Closed lips give 0 to 0.02, a smile that shows teeth 0.05 to 0.12.
        """
        return self._gap(_INNER_GAPS) / self.size_px()

    def eye_opening(self) -> tuple[float, float]:
        """Returns the eye aspect ratio (Soukupova and Cech 2016) of the right and of the left eye.

        It is the mean of two gaps between the lids over the eye's width: open eyes give 0.2 to 0.4,
        those of a laughing face down to 0.15, closed ones less.
        """
        right = self._gap(_RIGHT_GAPS) / self._distance(33, 133)
        left = self._gap(_LEFT_GAPS) / self._distance(263, 362)
        return right, left

    def pose(self) -> Pose:
        """Returns the head's turn, from the line through its cheeks and from the forehead to the
        chin, in space.
        """
        points = self.points.astype(np.float64)
        across = points[_LEFT_CHEEK] - points[_RIGHT_CHEEK]
        down = points[_CHIN] - points[_FOREHEAD]
        yaw = math.atan2(across[2], math.hypot(across[0], across[1]))
        lowered = math.atan2(down[2], math.hypot(down[0], down[1]))
        roll = math.atan2(across[1], across[0])
        pitch_deg = _LEVEL_DEG - math.degrees(lowered)
        return Pose(math.degrees(yaw), pitch_deg, math.degrees(roll))

    def _distance(self, a: int, b: int) -> float:
        return float(np.linalg.norm(self.points[a] - self.points[b]))

    def _gap(self, pairs: tuple[tuple[int, int], ...]) -> float:
        return sum(self._distance(upper, lower) for upper, lower in pairs) / len(pairs)


@dataclass(frozen=True)
class _Region:
    """A square in a picture: its middle and side in pixels, its turn in radians, clockwise."""

    x: float
    y: float
    side: float
    angle: float

    @classmethod
    def around(
        cls, box: Box, right_eye: NDArray[np.float32], left_eye: NDArray[np.float32]
    ) -> Self:
        """One and a half times the longer side of a box, turned until the eyes are level."""
        angle = math.atan2(left_eye[1] - right_eye[1], left_eye[0] - right_eye[0])
        return cls(
            box[0] + box[2] / 2, box[1] + box[3] / 2, _REGION_SCALE * max(box[2], box[3]), angle
        )


_REGION_SCALE = 1.5


class FaceMesh:
    """Finds the 468 points of MediaPipe's face mesh.

    Args:
        net: the network with its weights.
        min_score: below it `track` takes the face as lost.
    """

    def __init__(self, net: MeshNet, min_score: float = 0.5) -> None:
        self.net = net
        self.min_score = min_score

    @classmethod
    def load(cls, path: Path = WEIGHTS, min_score: float = 0.5) -> Self:
        """Returns a mesh with the bundled weights. See the class for the arguments."""
        return cls(_loaded(MeshNet(), "mesh", path), min_score)

    def landmarks(self, picture: Picture, face: Face) -> Landmarks:
        """Returns the mesh of a face that was found in uint8 RGB (H, W, 3).

        The network looks twice: where the detector says, then where its own points say. The result
            depends little on
        the detector. A low score says that there is no face after all.
        """
        return self.landmarks_of([picture], [face])[0]

    def landmarks_of(self, pictures: Sequence[Picture], faces: Sequence[Face]) -> list[Landmarks]:
        """Returns the meshes of one face each of several pictures, computed as one batch."""
        regions = [_Region.around(face.box, *face.keypoints[:2]) for face in faces]
        first = self._look(pictures, regions)
        return self._look(pictures, [_region_of(landmarks) for landmarks in first])

    def score(self, picture: Picture, face: Face) -> float:
        """Returns 0 to 1: whether a detection in uint8 RGB (H, W, 3) is a face. One look, half of
        `landmarks`.
        """
        return self._look([picture], [_Region.around(face.box, *face.keypoints[:2])])[0].score

    def track(self, pictures: Iterable[Picture], finder: FaceFinder) -> Iterator[Landmarks | None]:
        """Yields the mesh of one face for every picture of a video, None where there is none.

        Follows MediaPipe: the region of a picture comes from the points of the one before; the
        detector is asked where the face was lost, and gives the largest.

        Args:
            pictures: uint8 RGB (H, W, 3) in the order of time, any number.
            finder: finds the face at the start and after it was lost.
        """
        landmarks: Landmarks | None = None
        for picture in pictures:
            if landmarks is not None:
                landmarks = self._look([picture], [_region_of(landmarks)])[0]
            if landmarks is None or landmarks.score < self.min_score:
                faces = finder.find(picture)
                landmarks = self.landmarks(picture, faces[0]) if faces else None
            if landmarks is not None and landmarks.score < self.min_score:
                landmarks = None
            yield landmarks

    def _look(self, pictures: Sequence[Picture], regions: Sequence[_Region]) -> list[Landmarks]:
        if not pictures:
            return []
        crops = torch.stack(
            [_crop(*pair, self.net.size_px) for pair in zip(pictures, regions, strict=True)]
        )
        with torch.inference_mode():
            points, logits = self.net(crops.contiguous(memory_format=torch.channels_last))
        scores = logits.sigmoid().tolist()
        size_px = self.net.size_px
        return [
            Landmarks(_placed(p, region, size_px), score)
            for p, region, score in zip(points.numpy(), regions, scores, strict=True)
        ]


def _region_of(landmarks: Landmarks) -> _Region:
    points = landmarks.points
    return _Region.around(landmarks.box, points[_RIGHT_CORNER], points[_LEFT_CORNER])


def _crop(picture: Picture, region: _Region, size_px: int) -> Tensor:
    """A region as the network wants it: float32 (3, size_px, size_px) in [0, 1]; edges go on beyond
    the picture.
    """
    height, width = picture.shape[:2]
    step = region.side / size_px
    cos, sin = math.cos(region.angle), math.sin(region.angle)
    # Only the part under the region is converted; shrunk by a whole number first, so that nothing
    # aliases.
    reach = region.side / 2 * (abs(cos) + abs(sin)) + 2
    low = [int(min(max(c - reach, 0), n - 1)) for c, n in ((region.x, width), (region.y, height))]
    high = [
        int(min(max(c + reach + 1, k + 1), n))
        for c, k, n in zip((region.x, region.y), low, (width, height), strict=True)
    ]
    part = Image.fromarray(picture[low[1] : high[1], low[0] : high[0]])
    factor = max(1, int(step))
    small = np.asarray(part.reduce(factor) if factor > 1 else part)
    values = torch.from_numpy(small.copy()).permute(2, 0, 1)[None].float()
    # Pixel i of the crop lies at i * step from the region's edge, as MediaPipe samples it.
    along = (torch.arange(size_px) * step - region.side / 2).float()
    x = region.x + cos * along[None, :] - sin * along[:, None]
    y = region.y + sin * along[None, :] + cos * along[:, None]
    shift = (factor - 1) / 2
    x, y = ((c - k - shift) / factor for c, k in ((x, low[0]), (y, low[1])))
    grid = torch.stack([(2 * x + 1) / small.shape[1] - 1, (2 * y + 1) / small.shape[0] - 1], dim=-1)
    crop = functional.grid_sample(values, grid[None], "bilinear", "border", align_corners=False)
    return crop[0] / 255.0


def _placed(points: NDArray[np.float32], region: _Region, size_px: int) -> NDArray[np.float32]:
    """Points (468, 3) in pixels of the crop, as points of the picture."""
    x, y = ((points[:, i] / size_px - 0.5) * region.side for i in (0, 1))
    cos, sin = math.cos(region.angle), math.sin(region.angle)
    z = points[:, 2] * (region.side / size_px)
    placed = np.stack([region.x + cos * x - sin * y, region.y + sin * x + cos * y, z], axis=1)
    return placed.astype(np.float32)


def mouth_openings(frames: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Returns how far the mouth is open in every frame of a video: 0 closed, 1 as wide as it goes.

    Args:
        frames: uint8 RGB (n, H, W, 3) in the order of time.

    Returns:
        (n,) float32; NaN where no face is found.
    """
    finder = shared_finder()
    assert finder.mesh is not None
    found = finder.mesh.track(frames, finder)
    gaps = [math.nan if face is None else face.mouth_opening() for face in found]
    scaled = (np.array(gaps, np.float32) - _CLOSED_GAP) / (_WIDE_GAP - _CLOSED_GAP)
    return np.clip(scaled, 0.0, 1.0)


_CLOSED_GAP, _WIDE_GAP = 0.01, 0.16  # of the face's height


@lru_cache(maxsize=1)
def shared_finder() -> FaceFinder:
    """Returns one finder for the whole process. Threads may use it at the same time."""
    return FaceFinder.load()


def _loaded(net: Any, part: str, path: Path) -> Any:
    """The network in evaluation mode with its part of the weights."""
    state = {
        name.removeprefix(f"{part}."): value
        for name, value in _weights(path).items()
        if name.startswith(part)
    }
    net.load_state_dict({name: value.float() for name, value in state.items()})
    return net.eval().requires_grad_(False).to(memory_format=torch.channels_last)


@lru_cache(maxsize=1)
def _weights(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)
