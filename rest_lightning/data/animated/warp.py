"""Piecewise affine warps of a picture: triangles of a mesh move, and the pixels with them."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.spatial import Delaunay

Points2 = NDArray[np.float64]
_SUBPIXEL_BITS = 4


@dataclass(frozen=True)
class Layer:
    """An area that moves as a whole instead of with the triangles under it, such as the eyeball
    behind its lids.

    Attributes:
        polygon: (n,) numbers of the points around it, in order.
        anchors: (m,) numbers of points whose movement, fitted by one similarity, moves it.
    """

    polygon: NDArray[np.int64]
    anchors: NDArray[np.int64]


class MeshWarp:
    """Moves the pixels of a picture with points.

    Args:
        points: (n, 2) where the points are in the picture, in pixels; their hull is what can be
            seen afterwards, so the corners of the picture belong to them.
        depth: (n,) distance from the camera: where triangles come to lie over one another, the
            nearer one is seen.
        layers: areas that move as a whole.
    """

    def __init__(
        self, points: Points2, depth: NDArray[np.float64], layers: tuple[Layer, ...] = ()
    ) -> None:
        self.points = points
        triangles = Delaunay(points).simplices
        order = np.argsort(-depth[triangles].mean(axis=1))  # far ones are drawn first
        self._triangles: NDArray[np.int64] = triangles[order].astype(np.int64)
        self._layers = layers
        corners = points[self._triangles]
        self._source = np.moveaxis(corners, 1, 2)  # (t, 2, 3)

    def maps(
        self, moved: Points2, height: int, width: int, layer_shifts: Points2 | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Returns for every pixel where it comes from: x and y, both float32 (height, width), for
        ``cv2.remap``.

        Args:
            moved: (n, 2) where the points are now.
            height, width: of the result, in pixels.
            layer_shifts: (number of layers, 2) pixels by which a layer's content moves beside its
                anchors.
        """
        corners = moved[self._triangles]
        targets = np.concatenate(
            [np.moveaxis(corners, 1, 2), np.ones((len(corners), 1, 3))], axis=1
        )
        areas = np.linalg.det(targets)
        flat = np.abs(areas) < 1e-3  # nothing of it is seen; any finite map will do
        targets[flat] = np.eye(3)
        affine = self._source @ np.linalg.inv(targets)  # (t, 2, 3)
        affine[flat] = 0.0
        labels = np.zeros((height, width), np.int32)
        fixed = np.round(corners * (1 << _SUBPIXEL_BITS)).astype(np.int32)
        for number in np.flatnonzero(~flat):
            cv2.fillConvexPoly(labels, fixed[number], int(number), cv2.LINE_8, _SUBPIXEL_BITS)
        extra = []
        for index, layer in enumerate(self._layers):
            matrix = fit_similarity(moved[layer.anchors], self.points[layer.anchors])
            if layer_shifts is not None:
                matrix[:, 2] -= matrix[:, :2] @ layer_shifts[index]
            extra.append(matrix)
            polygon = np.round(moved[layer.polygon] * (1 << _SUBPIXEL_BITS)).astype(np.int32)
            cv2.fillPoly(labels, [polygon], len(affine) + index, cv2.LINE_8, _SUBPIXEL_BITS)
        table = np.concatenate([affine, np.array(extra).reshape(-1, 2, 3)]).astype(np.float32)
        rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
        chosen = table[labels]
        x = chosen[..., 0, 0] * columns + chosen[..., 0, 1] * rows + chosen[..., 0, 2]
        y = chosen[..., 1, 0] * columns + chosen[..., 1, 1] * rows + chosen[..., 1, 2]
        return x, y


def fit_similarity(source: Points2, target: Points2) -> NDArray[np.float64]:
    """Returns the (2, 3) similarity that takes ``source`` (n, 2) closest to ``target`` (n, 2), by
    least squares.
    """
    a0, b0 = source.mean(axis=0), target.mean(axis=0)
    a, b = source - a0, target - b0
    norm = np.square(a).sum()
    cos = (a * b).sum() / norm
    sin = (a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]).sum() / norm
    rotation = np.array([[cos, -sin], [sin, cos]])
    return np.concatenate([rotation, (b0 - rotation @ a0)[:, None]], axis=1)


def remap(
    picture: NDArray[np.uint8], x: NDArray[np.float32], y: NDArray[np.float32]
) -> NDArray[np.uint8]:
    """Returns the picture (H, W[, C]) read at (x, y), cubic, borders repeated."""
    read = cv2.remap(picture, x, y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(read, np.uint8)
