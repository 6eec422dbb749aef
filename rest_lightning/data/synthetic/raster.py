"""Drawing tools shared by the renderer's parts: textures on meshes, smooth paths, paints (skia)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import skia
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Textures cover more than the frame, so that motion never shows their border.
LEFT, TOP, SIDE = -0.6, -0.08, 1.2


def texture_grid(size_px: int) -> tuple[Array, Array]:
    """Head coordinates (x, y) of the pixels of a texture for frames of `size_px`; arrays (T, T)."""
    num = max(64, round(size_px * SIDE * 1.25))
    axis = (np.arange(num) + 0.5) / num * SIDE
    x, y = np.meshgrid(LEFT + axis, TOP + axis)
    return x, y


def over(base: Array, rgb: Array, alpha: Array) -> Array:
    """Lay a colour (..., 3) in linear or sRGB 0..1 with opacity (T, T) over premultiplied RGBA
    (T, T, 4).
    """
    a = np.clip(alpha, 0.0, 1.0)[..., None]
    top = np.concatenate([np.broadcast_to(rgb, (*alpha.shape, 3)) * a, a], axis=-1)
    return top + base * (1 - a)


def srgb_to_linear(rgb: Array | Sequence[float]) -> Array:
    """sRGB 0..255 to linear light 0..1 (gamma 2.2)."""
    return (np.asarray(rgb, dtype=np.float64) / 255) ** 2.2


def linear_to_srgb(rgb: Array) -> Array:
    """Linear light to sRGB 0..1 (gamma 2.2)."""
    return np.clip(rgb, 0.0, 1.0) ** (1 / 2.2)


class Mesh:
    """A texture on a grid of vertices.

    Args:
        premultiplied: RGBA in sRGB 0..1, alpha premultiplied, (T, T, 4), laid out as by
            `texture_grid`.
        columns, rows: number of cells.
    """

    def __init__(self, premultiplied: Array, columns: int, rows: int) -> None:
        alpha = premultiplied[..., 3]
        num = len(alpha)
        ys, xs = np.nonzero(alpha > 0.002)
        x0, x1 = max(xs.min() - 2, 0), min(xs.max() + 3, num)
        y0, y1 = max(ys.min() - 2, 0), min(ys.max() + 3, num)
        grid = np.meshgrid(np.linspace(x0, x1, columns + 1), np.linspace(y0, y1, rows + 1))
        gx, gy = (axis.ravel() for axis in grid)
        self.x = LEFT + gx / num * SIDE
        self.y = TOP + gy / num * SIDE
        self._texs = list(map(skia.Point, gx.tolist(), gy.tolist()))
        corner = np.arange(rows)[:, None] * (columns + 1) + np.arange(columns)
        quads = [
            corner,
            corner + 1,
            corner + columns + 1,
            corner + 1,
            corner + columns + 2,
            corner + columns + 1,
        ]
        self._indices = np.stack(quads, axis=-1).ravel().tolist()
        self._pixels = np.ascontiguousarray(
            np.round(np.clip(premultiplied, 0, 1) * 255).astype(np.uint8)
        )
        image = skia.Image.fromarray(
            self._pixels, skia.kRGBA_8888_ColorType, skia.kPremul_AlphaType
        )
        sampling = skia.SamplingOptions(skia.FilterMode.kLinear)
        self._paint = skia.Paint(
            Shader=image.makeShader(skia.TileMode.kClamp, skia.TileMode.kClamp, sampling)
        )

    def draw(self, canvas: skia.Canvas, points: Array) -> None:
        """Draw with the vertices at `points` (N, 2)."""
        positions = list(map(skia.Point, *points.T.tolist()))
        mode = skia.Vertices.kTriangles_VertexMode
        vertices = skia.Vertices(mode, positions, self._texs, None, self._indices)
        canvas.drawVertices(vertices, self._paint, skia.BlendMode.kSrcOver)


def colour(rgb: Sequence[float] | Array, alpha: float = 1.0) -> int:
    """Skia colour of sRGB 0..255 and opacity 0..1."""
    r, g, b = (int(min(255, max(0, round(float(v))))) for v in rgb)
    return int(skia.Color(r, g, b, int(min(255, max(0, round(alpha * 255))))))


def fill(rgb: Sequence[float] | Array, alpha: float = 1.0, blur: float = 0.0) -> skia.Paint:
    """An anti-aliased fill; `blur` is a standard deviation in canvas units."""
    paint = skia.Paint(AntiAlias=True, Color=colour(rgb, alpha))
    if blur > 0:
        paint.setMaskFilter(skia.MaskFilter.MakeBlur(skia.kNormal_BlurStyle, blur))
    return paint


def stroke(
    rgb: Sequence[float] | Array, width: float, alpha: float = 1.0, blur: float = 0.0
) -> skia.Paint:
    """An anti-aliased stroke with round ends."""
    paint = fill(rgb, alpha, blur)
    paint.setStyle(skia.Paint.kStroke_Style)
    paint.setStrokeWidth(width)
    paint.setStrokeCap(skia.Paint.kRound_Cap)
    paint.setStrokeJoin(skia.Paint.kRound_Join)
    return paint


def polygon(points: Array, closed: bool = True) -> skia.Path:
    """Path through points (N, 2)."""
    path = skia.Path()
    path.addPoly(list(map(skia.Point, *points.T.tolist())), closed)
    return path
