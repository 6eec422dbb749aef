"""Head geometry of the synthetic talkers: depth, rotation, projection, and movement of the skin.

Coordinates: x = 0 is the middle of the face, y is the image's vertical axis (0 top, 1 bottom), both
in fractions of the image side in the neutral frame; z points to the viewer, z = 0 is the plane of
the ears.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rest_lightning.data.synthetic.identity import Identity
from rest_lightning.data.synthetic.track import FaceTrack

Array = NDArray[np.float64]

PIVOT_Y = 0.62  # rotation about the top of the neck, between the ears


def smoothstep(low: float, high: float, x: Array | float) -> Array:
    """0 below `low`, 1 above `high`, smooth between."""
    t = np.clip((np.asarray(x, dtype=np.float64) - low) / (high - low), 0.0, 1.0)
    return t * t * (3 - 2 * t)


def bump(x: Array, y: Array, cx: float, cy: float, sx: float, sy: float) -> Array:
    """A Gaussian hill of height 1."""
    return np.exp(-0.5 * (((x - cx) / sx) ** 2 + ((y - cy) / sy) ** 2))


def depth(identity: Identity, x: Array, y: Array) -> Array:
    """Depth z of the head's surface, smooth everywhere, also outside the outline (hair, ears)."""
    rho = (x / (identity.face_width * 1.12)) ** 2 + ((y - 0.5) / 0.44) ** 2
    z = 0.20 * (1 - rho)
    z = -0.05 + 0.03 * np.logaddexp(0.0, (z + 0.05) / 0.03)  # flattens behind the ears
    z = np.minimum(z, 0.22)
    nose = 0.045 * identity.nose_height * bump(x, y, 0.0, identity.nose_y - 0.015, 0.03, 0.04)
    return z + nose


class Motion:
    """Moves points of a head through the frames of a track.

    Args:
        identity: whose head.
        track: the animation; all its curves have F frames.
    """

    def __init__(self, identity: Identity, track: FaceTrack) -> None:
        self.identity = identity
        self.track = track
        column = {
            name: getattr(track, name).astype(np.float64)[:, None]
            for name in track.__dataclass_fields__
        }
        self.opening = np.clip(column["mouth_opening"], 0.0, 1.2)
        self.width = np.clip(column["mouth_width"], -1.2, 1.2)
        self.rounding = np.clip(column["lip_rounding"], 0.0, 1.2)
        self.tongue = np.clip(column["tongue"], 0.0, 1.0)
        self.blink = np.clip(column["blink"], 0.0, 1.0)
        self.gaze_x = np.clip(column["gaze_x"], -1.0, 1.0)
        self.gaze_y = np.clip(column["gaze_y"], -1.0, 1.0)
        self.brow_raise = np.clip(column["brow_raise"], -1.0, 1.0)
        self._yaw, self._pitch, self._roll = (
            column[n] for n in ("yaw_rad", "pitch_rad", "roll_rad")
        )
        self._shift_x, self._shift_y, self._scale = (
            column[n] for n in ("shift_x", "shift_y", "scale")
        )

    @property
    def inner_height(self) -> Array:
        """Height of the mouth's opening between the lips, (F, 1); linear in mouth_opening."""
        return self.identity.open_height * self.opening * (1 - 0.1 * self.rounding)

    def project(self, x: Array, y: Array, z: Array) -> Array:
        """Image points (F, N, 2) in fractions of the image, of head points given as (N,) or
        (F, N).
        """
        y = y - PIVOT_Y
        x1 = x * np.cos(self._yaw) + z * np.sin(self._yaw)
        z1 = z * np.cos(self._yaw) - x * np.sin(self._yaw)
        y1 = y * np.cos(self._pitch) + z1 * np.sin(self._pitch)
        x2 = x1 * np.cos(self._roll) - y1 * np.sin(self._roll)
        y2 = x1 * np.sin(self._roll) + y1 * np.cos(self._roll)
        return np.stack(
            [0.5 + self._scale * x2 + self._shift_x, PIVOT_Y + self._scale * y2 + self._shift_y],
            axis=-1,
        )

    def skin(self, x: Array, y: Array) -> Array:
        """Image points (F, N, 2) of the face's skin and hair: jaw, brows and cheeks move, hair ends
        follow weakly.
        """
        p = self.identity
        z = depth(p, x, y)
        below = smoothstep(p.mouth_y - 0.03, p.mouth_y + 0.05, y)
        jaw = below * np.exp(
            -((np.abs(x) / (p.face_width * 0.95)) ** 4) * (1 - smoothstep(0.64, 0.76, y))
        )
        # hair beside the face stays
        jaw = jaw * np.exp(-((np.clip(np.abs(x) - p.face_width, 0, None) / 0.05) ** 2))
        dy = 0.74 * self.inner_height * jaw
        brow_band = bump(np.abs(x), y, p.eye_x, p.eye_y - p.brow_y - 0.008, 0.07, 0.03)
        inner_end = np.exp(-((np.abs(x) / 0.05) ** 2))
        dy = dy - 0.02 * self.brow_raise * brow_band * np.where(
            self.brow_raise < 0, 0.4 + 0.8 * inner_end, 1.0
        )
        # Rounding pulls the cheeks inwards, spreading pushes them out.
        around = bump(np.abs(x), y, p.mouth_width * 1.25, p.mouth_y, 0.045, 0.05)
        dx = np.sign(x) * around * (0.010 * self.width - 0.016 * self.rounding)
        moved = self.project(x + dx, y + dy, z)
        follow = (1 - 0.6 * smoothstep(0.84, 1.06, y))[None, :, None]
        still = np.stack([0.5 + x, y], axis=-1)[None]
        return still + follow * (moved - still)

    def body(self, x: Array, y: Array) -> Array:
        """Image points (F, N, 2) of neck and shoulders: the neck follows the head, the shoulders
        hardly.
        """
        moved = self.project(x, y, np.full_like(x, 0.02))
        follow = (1 - 0.92 * smoothstep(0.66, 0.97, y))[None, :, None]
        still = np.stack([0.5 + x, y], axis=-1)[None]
        return still + follow * (moved - still)

    def back(self, x: Array, y: Array) -> Array:
        """Image points (F, N, 2) of what lies behind the head (back hair, bun)."""
        moved = self.project(x, y, np.full_like(x, -0.06))
        follow = (1 - 0.7 * smoothstep(0.7, 1.06, y))[None, :, None]
        still = np.stack([0.5 + x, y], axis=-1)[None]
        return still + follow * (moved - still)
