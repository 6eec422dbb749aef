"""The curves that drive a synthetic talker: one value per video frame at 25 fps."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

Curve = NDArray[np.float32]


@dataclass(frozen=True)
class FaceTrack:
    """Per-frame animation of a face; every array is float32 of shape (F,).

    Attributes:
        mouth_opening: 0 = lips touch, 1 = wide open. Exactly 0 on m, b, p.
        mouth_width: -1 = narrow, 0 = at rest, 1 = spread ("ee").
        lip_rounding: 0 = flat lips, 1 = protruded and rounded ("oo").
        tongue: 0 = low and hidden, 1 = tip raised to the teeth (l, n, d, t, th).
        blink: 0 = eyes open, 1 = eyes closed.
        gaze_x, gaze_y: direction of the eyes, -1 .. 1 (x right, y down, in image coordinates).
        brow_raise: -1 = frowning, 0 = at rest, 1 = raised.
        yaw_rad, pitch_rad, roll_rad: head rotation (yaw > 0 looks to the image's right, pitch > 0
            looks down, roll > 0 turns clockwise in the image).
        shift_x, shift_y: head translation in fractions of the image side.
        scale: size factor of the head, about 1.
    """

    mouth_opening: Curve
    mouth_width: Curve
    lip_rounding: Curve
    tongue: Curve
    blink: Curve
    gaze_x: Curve
    gaze_y: Curve
    brow_raise: Curve
    yaw_rad: Curve
    pitch_rad: Curve
    roll_rad: Curve
    shift_x: Curve
    shift_y: Curve
    scale: Curve

    def __post_init__(self) -> None:
        lengths = {f.name: len(getattr(self, f.name)) for f in fields(self)}
        if len(set(lengths.values())) != 1:
            raise ValueError(
                f"expected curves of one length, got {lengths}: resample them to the same frames"
            )

    @property
    def num_frames(self) -> int:
        """Number of video frames."""
        return len(self.mouth_opening)
