"""The mouth of a synthetic talker: lips, teeth and tongue as contours driven by the track."""

from __future__ import annotations

import numpy as np
import skia

from rest_lightning.data.synthetic.geometry import Array, Motion, depth, smoothstep
from rest_lightning.data.synthetic.identity import Identity
from rest_lightning.data.synthetic.raster import fill, polygon, stroke

# -1 .. 1 from corner to corner, denser at the corners
_T = np.sin(np.linspace(-0.5, 0.5, 25) * np.pi)[None]
_BEHIND = np.array([0.0, 0.02])
_CAVITY = (52.0, 16.0, 18.0)
_TONGUE = (186.0, 88.0, 88.0)


class Mouth:
    """All contours of the mouth for a track, and their drawing.

    Args:
        identity: whose mouth.
        motion: the moved head.
    """

    def __init__(self, identity: Identity, motion: Motion) -> None:
        p, m = identity, motion
        self._identity = p
        h = m.inner_height
        o, r = m.opening, m.rounding
        w = np.where(m.width > 0, 0.17, 0.15) * m.width
        half = p.mouth_width * (1 + w) * (1 - 0.40 * np.clip(r, 0, 1)) * (1 - 0.08 * o)
        a = np.abs(_T)
        # wide and rounded mouths are ovals
        round_off = 0.85 - 0.30 * np.clip(0.6 * o + 0.6 * r, 0, 1)
        smile = p.mouth_corner + 0.010 * np.clip(m.width, 0, 1)

        # Corners sit between the lips; a spread mouth lifts them a little.
        def middle(t: Array) -> Array:
            rest = p.mouth_y - smile * np.abs(t) ** 1.8 + 0.26 * h * np.abs(t) ** 2.5
            return rest + 0.0024 * p.cupid_bow * (np.exp(-((t / 0.22) ** 2)) - 0.5)

        def upper_edge(t: Array) -> Array:
            return middle(t) - 0.22 * h * (1 - np.abs(t) ** 2.2) ** round_off

        def lower_edge(t: Array) -> Array:
            return middle(t) + 0.78 * h * (1 - np.abs(t) ** 2.3) ** round_off

        upper, lower = upper_edge(_T), lower_edge(_T)
        thick_up = p.upper_lip * (1 + 0.30 * r - 0.14 * o - 0.12 * m.width)
        thick_low = p.lower_lip * (1 + 0.25 * r - 0.12 * o - 0.10 * m.width)
        dip = 1 - 0.30 * p.cupid_bow * np.exp(-((_T / 0.17) ** 2))
        outer_up = upper - thick_up * (1 - a**1.9) ** 0.9 * dip
        outer_low = lower + thick_low * (1 - a**2.3) ** 0.75
        inner_x, outer_x = _T * half * 0.95, _T * half * 1.06
        self._forward = 0.018 + 0.022 * r

        def place(x: Array, y: Array) -> Array:
            x, y = np.broadcast_arrays(x, y)
            return motion.project(x, y, depth(p, x, np.minimum(y, p.mouth_y)) + self._forward)

        self.upper, self.lower = place(inner_x, upper), place(inner_x, lower)
        self.outer_up, self.outer_low = place(outer_x, outer_up), place(outer_x, outer_low)
        mid_low = 0.45 * lower + 0.55 * outer_low
        self._shine = place(inner_x * 0.55, mid_low)
        self._crease = place(inner_x * 0.75, outer_low + 0.012)
        # Upper teeth hang from the skull, lower teeth ride on the jaw; both are cut by the lips.
        show_up = 0.027 * np.tanh(h / 0.030)
        teeth_edge = upper_edge(0.88 * _T) + show_up * (1 - 0.55 * a**3)
        self._teeth_up = place(_T * half * 0.88, teeth_edge)
        show_low = 0.011 * smoothstep(0.35, 0.9, o)
        self._teeth_low = place(
            _T * half * 0.56, lower_edge(0.6 * _T) - show_low * (1 - 0.5 * a**4)
        )
        tip = (0.26 + 0.42 * m.tongue) * h + 0.004 * m.tongue
        tongue_edge = lower_edge(0.74 * _T) - tip * np.sqrt(1 - 0.98 * a**2)
        self._tongue_top = place(_T * half * (0.74 - 0.12 * m.tongue), tongue_edge)
        centre_y = middle(np.zeros((1, 1))) + 0.28 * h
        self.centre = place(np.zeros_like(h), centre_y)[:, 0]
        self._open = o[:, 0]
        self._make_paints()

    def _make_paints(self) -> None:
        lip = np.asarray(self._identity.lip)
        skin = np.asarray(self._identity.skin)
        self._lip = fill(lip, 1.0, 0.0028)
        self._lip_dark = fill(lip * np.array([0.80, 0.72, 0.74]), 0.75, 0.0022)
        self._line = stroke(lip * np.array([0.42, 0.30, 0.32]), 0.0056, 0.9, 0.0014)
        self._shine_paint = stroke(
            lip * 0.55 + np.array([255.0, 225.0, 218.0]) * 0.45, 0.007, 0.45, 0.005
        )
        self._crease_paint = stroke(skin * np.array([0.62, 0.50, 0.46]), 0.010, 0.32, 0.007)
        self._cavity = fill(_CAVITY)
        self._tongue_paint = fill(_TONGUE, 0.95, 0.003)
        teeth = np.asarray(self._identity.teeth)
        self._teeth_paint = fill(teeth, 1.0, 0.0012)
        self._teeth_low_paint = fill(teeth * 0.78, 0.9, 0.0014)
        self._shadow = stroke(_CAVITY, 0.008, 0.45, 0.004)
        self._corner = fill(_CAVITY, 0.75, 0.006)

    def draw(self, canvas: skia.Canvas, frame: int) -> None:
        """Draw frame `frame`; the canvas measures in fractions of the image."""
        up, low = self.upper[frame], self.lower[frame]
        outer_up, outer_low = self.outer_up[frame], self.outer_low[frame]
        canvas.drawPath(polygon(self._crease[frame], False), self._crease_paint)
        canvas.drawPath(polygon(np.concatenate([outer_up, outer_low[::-1]])), self._lip)
        canvas.drawPath(polygon(np.concatenate([outer_up, up[::-1]])), self._lip_dark)
        canvas.drawPath(polygon(self._shine[frame], False), self._shine_paint)
        if self._open[frame] > 0.0:
            inner = polygon(np.concatenate([up, low[::-1]]))
            canvas.save()
            canvas.clipPath(inner, skia.ClipOp.kIntersect, True)
            canvas.drawPath(inner, self._cavity)
            # closes the shapes behind the lips
            below, above = low[::-1] + _BEHIND, up[::-1] - _BEHIND
            tongue = np.concatenate([self._tongue_top[frame], below])
            canvas.drawPath(polygon(tongue), self._tongue_paint)
            if self._open[frame] > 0.35:
                canvas.drawPath(
                    polygon(np.concatenate([self._teeth_low[frame], below])), self._teeth_low_paint
                )
            canvas.drawPath(
                polygon(np.concatenate([self._teeth_up[frame], above])), self._teeth_paint
            )
            canvas.drawPath(polygon(up, False), self._shadow)
            for end in (0, -1):
                x, y = up[end].tolist()
                canvas.drawCircle(x, y, 0.012, self._corner)
            canvas.restore()
        canvas.drawPath(polygon(up, False), self._line)
