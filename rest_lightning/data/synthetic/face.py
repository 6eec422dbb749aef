"""Render a synthetic talker: a painted head on a moving mesh, eyes and mouth drawn over it in every
frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import skia
from numpy.typing import NDArray

from rest_lightning.data.synthetic.body import paint_back, paint_background, paint_body
from rest_lightning.data.synthetic.eyes import Eyes
from rest_lightning.data.synthetic.geometry import Motion
from rest_lightning.data.synthetic.head import paint_head
from rest_lightning.data.synthetic.identity import Identity
from rest_lightning.data.synthetic.mouth import Mouth
from rest_lightning.data.synthetic.raster import Mesh
from rest_lightning.data.synthetic.track import FaceTrack
from rest_lightning.errors import UserError

# The camera is closer than the painted frame: talking-head crops are tight, and mouth and eyes need
# the pixels.
ZOOM = 1.2
CENTRE = (0.5, 0.55)


@dataclass(frozen=True)
class RenderedClip:
    """A rendered clip.

    Attributes:
        frames: uint8 (F, H, W, 3), sRGB.
        landmarks: "mouth", "left_eye", "right_eye" (left = the image's left) -> float32 (F, 2),
            centre points (x right, y down) in fractions of the image.
    """

    frames: NDArray[np.uint8]
    landmarks: dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class _Layers:
    background: NDArray[np.uint8]  # (H, W, 4)
    back: Mesh | None
    body: Mesh
    head: Mesh


@lru_cache(maxsize=2)
def _layers(identity: Identity, size_px: int) -> _Layers:
    """Everything of an identity that is painted once."""
    rgb = np.round(paint_background(identity, size_px) * 255).astype(np.uint8)
    opaque = np.full((size_px, size_px, 1), 255, dtype=np.uint8)
    back = paint_back(identity, size_px)
    return _Layers(
        background=np.concatenate([rgb, opaque], axis=-1),
        back=None if back is None else Mesh(back, 4, 6),
        body=Mesh(paint_body(identity, size_px), 4, 8),
        head=Mesh(paint_head(identity, size_px), 14, 18),
    )


def render_clip(identity: Identity, track: FaceTrack, size_px: int) -> RenderedClip:
    """Render every frame of a track. The same arguments give bit-identical frames.

    Args:
        identity: who talks.
        track: the animation, F frames.
        size_px: side of the square frames, 32 or more.

    Raises:
        UserError: frames are too small to draw a face.

    Returns:
        Frames and centre points of mouth and eyes.
    """
    if size_px < 32:
        raise UserError(
            f"expected frames of 32 pixels or more, got size_px={size_px}: choose 64, 128 or 256"
        )
    layers = _layers(identity, size_px)
    motion = Motion(identity, track)
    mouth, eyes = Mouth(identity, motion), Eyes(identity, motion)
    head = motion.skin(layers.head.x, layers.head.y)
    body = motion.body(layers.body.x, layers.body.y)
    back = None if layers.back is None else motion.back(layers.back.x, layers.back.y)
    frames = np.empty((track.num_frames, size_px, size_px, 3), dtype=np.uint8)
    buffer = np.empty_like(layers.background)
    surface = skia.Surface(buffer, skia.kRGBA_8888_ColorType)
    canvas = surface.getCanvas()
    canvas.scale(size_px, size_px)
    canvas.translate(*CENTRE)
    canvas.scale(ZOOM, ZOOM)
    canvas.translate(-CENTRE[0], -CENTRE[1])
    for frame in range(track.num_frames):
        buffer[:] = layers.background
        if layers.back is not None and back is not None:
            layers.back.draw(canvas, back[frame])
        layers.body.draw(canvas, body[frame])
        layers.head.draw(canvas, head[frame])
        eyes.draw(canvas, frame)
        mouth.draw(canvas, frame)
        eyes.draw_glasses(canvas, frame)
        for channel in range(3):  # four times as fast as one strided copy
            frames[frame, ..., channel] = buffer[..., channel]
    left, right = eyes.centre
    points = {"mouth": mouth.centre, "left_eye": left, "right_eye": right}
    centre = np.asarray(CENTRE)
    return RenderedClip(
        frames,
        {
            name: (centre + ZOOM * (value - centre)).astype(np.float32)
            for name, value in points.items()
        },
    )


def neutral_track(num_frames: int = 1, **curves: float) -> FaceTrack:
    """A track at rest; named curves are held at the given values."""
    values = {name: 0.0 for name in FaceTrack.__dataclass_fields__} | {"scale": 1.0} | curves
    return FaceTrack(
        **{name: np.full(num_frames, value, dtype=np.float32) for name, value in values.items()}
    )
