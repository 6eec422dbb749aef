"""Eyes and glasses of the synthetic talkers, drawn over the skin in every frame (shapes decided
here).
"""

from __future__ import annotations

import numpy as np
import skia

from rest_lightning.data.synthetic.geometry import Array, Motion, depth
from rest_lightning.data.synthetic.identity import Identity
from rest_lightning.data.synthetic.raster import fill, polygon, stroke

_T = np.sin(np.linspace(-0.5, 0.5, 17) * np.pi)[None]


class Eyes:
    """Lids, eyeballs, irises and glasses for a track, and their drawing.

    Args:
        identity: whose eyes.
        motion: the moved head.
    """

    def __init__(self, identity: Identity, motion: Motion) -> None:
        p, m = identity, motion
        self._identity = p
        self._upper: list[Array] = []
        self._lower: list[Array] = []
        self._crease: list[Array] = []
        self._iris: list[Array] = []
        self._rim: list[Array] = []
        self.centre: list[Array] = []
        self._blink = m.blink[:, 0]
        a = np.abs(_T)
        widened = 1 + 0.12 * np.clip(m.brow_raise, 0, 1) + 0.10 * np.clip(-m.gaze_y, 0, 1)
        upper_height = 0.0225 * p.eye_height * widened
        lower_height = 0.0125 * p.eye_height
        for side in (-1.0, 1.0):
            out = _T * side  # 1 at the outer corner
            base = p.eye_y - p.eye_tilt * 0.05 * out - 0.0012 * out
            top = base - upper_height * (1 - a**2.2) ** 0.8 * (1 - 0.12 * out)
            bottom = base + lower_height * (1 - a**2.4) ** 0.8 * (1 + 0.15 * out)
            closed = base + 0.75 * (bottom - base)
            top = top + m.blink * (closed - top)
            bottom = bottom + m.blink * (closed - bottom)
            x = side * p.eye_x + _T * p.eye_width

            def place(x: Array, y: Array, out: float = 0.004) -> Array:
                x, y = np.broadcast_arrays(x, y)
                return motion.project(x, y, depth(p, x, y) + out)

            self._upper.append(place(x, top))
            self._lower.append(place(x, bottom))
            lid_line = 0.011 - 0.004 * (1 - m.blink)
            crease = (
                base
                - (upper_height + lid_line) * (1 - a**2.4) ** 0.6 * (1 - 0.1 * out)
                + 0.004 * m.blink
            )
            self._crease.append(place(x * 1.0, crease))
            gx = side * p.eye_x + 0.016 * m.gaze_x
            gy = p.eye_y - 0.004 + 0.008 * m.gaze_y + 0.004 * m.blink
            self._iris.append(place(gx, gy)[:, 0])
            centre = place(np.array([[side * p.eye_x]]), np.array([[p.eye_y - 0.003]]))[:, 0]
            self.centre.append(centre)
            if p.glasses != "none":
                self._rim.append(place(*self._rim_shape(side), 0.03))
        if p.glasses != "none":
            inner = p.eye_x - 0.068
            bridge_x = np.linspace(-inner, inner, 7)[None]
            bridge = p.eye_y - 0.008 - 0.008 * (1 - (bridge_x / inner) ** 2)
            self._bridge = place(bridge_x, bridge, 0.035)
            self._arms = []
            for side in (-1.0, 1.0):
                reach = 0.87 if p.hair_style in ("long", "wavy", "bob") else 1.0  # under the hair
                arm_x = side * np.array(
                    [[p.eye_x + 0.070, max(p.eye_x + 0.072, p.face_width * reach)]]
                )
                z = np.array([[float(depth(p, np.array(p.eye_x), np.array(p.eye_y))) + 0.02, 0.02]])
                self._arms.append(
                    motion.project(arm_x, np.array([[p.eye_y - 0.012, p.eye_y - 0.006]]), z)
                )
        self._make_paints()

    def _rim_shape(self, side: float) -> tuple[Array, Array]:
        p = self._identity
        angle = np.linspace(0, 2 * np.pi, 33)[None, :-1]
        n = 2.0 if p.glasses == "round" else 4.0
        c, s = np.cos(angle), np.sin(angle)
        x = np.sign(c) * np.abs(c) ** (2 / n) * 0.070
        y = np.sign(s) * np.abs(s) ** (2 / n) * (0.062 if p.glasses == "round" else 0.050)
        return side * (p.eye_x + 0.002) + x, p.eye_y + 0.006 + y

    def _make_paints(self) -> None:
        p = self._identity
        skin, iris = np.asarray(p.skin), np.asarray(p.iris)
        white = np.array([236.0, 232.0, 226.0]) * (0.90 + 0.10 * skin.mean() / 255)
        self._socket = fill(skin * np.array([0.62, 0.5, 0.46]), 0.30, 0.010)
        self._sclera = fill(white, 1.0, 0.0015)
        self._iris_paint = fill(iris * 0.62, 1.0, 0.0012)
        self._iris_inner = fill(np.minimum(iris * 1.25 + 8, 255), 0.9, 0.0022)
        self._pupil = fill((14.0, 10.0, 10.0))
        self._glint = fill((255.0, 255.0, 255.0), 0.95, 0.0008)
        self._lid_shadow = stroke((30.0, 18.0, 16.0), 0.011, 0.40, 0.004)
        lash = np.minimum(np.asarray(p.brow) * 0.45, skin * 0.35)
        self._lash = stroke(lash, 0.0042 + 0.0034 * min(p.lashes, 1.0), 0.95, 0.0010)
        self._lower_line = stroke(skin * np.array([0.55, 0.42, 0.40]), 0.0032, 0.60, 0.0014)
        self._crease_paint = stroke(skin * np.array([0.56, 0.44, 0.40]), 0.0042, 0.45, 0.0024)
        self._rim_paint = stroke(p.glasses_colour, 0.0095, 0.95, 0.0006)

    def draw(self, canvas: skia.Canvas, frame: int) -> None:
        """Draw frame `frame`; the canvas measures in fractions of the image."""
        for side in (0, 1):
            up, low = self._upper[side][frame], self._lower[side][frame]
            canvas.drawPath(polygon(self._crease[side][frame], False), self._crease_paint)
            if self._blink[frame] < 0.995:
                opening = polygon(np.concatenate([up, low[::-1]]))
                canvas.save()
                canvas.clipPath(opening, skia.ClipOp.kIntersect, True)
                canvas.drawPath(opening, self._sclera)
                x, y = self._iris[side][frame].tolist()
                canvas.drawCircle(x, y, 0.0228, self._iris_paint)
                canvas.drawCircle(x, y + 0.003, 0.0155, self._iris_inner)
                canvas.drawCircle(x, y, 0.0095, self._pupil)
                canvas.drawPath(polygon(up, False), self._lid_shadow)
                canvas.drawCircle(
                    x + 0.006 * np.sign(self._identity.light_x), y - 0.007, 0.0048, self._glint
                )
                canvas.restore()
            canvas.drawPath(polygon(low, False), self._lower_line)
            canvas.drawPath(polygon(up, False), self._lash)

    def draw_glasses(self, canvas: skia.Canvas, frame: int) -> None:
        """Draw the glasses, if the identity wears any."""
        if self._identity.glasses == "none":
            return
        for rim in self._rim:
            canvas.drawPath(polygon(rim[frame]), self._rim_paint)
        for line in (self._bridge, *self._arms):
            canvas.drawPath(polygon(line[frame], False), self._rim_paint)
