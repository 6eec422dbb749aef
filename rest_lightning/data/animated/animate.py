"""One animated clip: a driver's face moves a portrait's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from rest_lightning.data.animated.drivers import Driver
from rest_lightning.data.animated.mesh import (
    FACE_OVAL,
    INNER_LIPS,
    LEFT_EYE,
    LEFT_LIDS,
    LOWER_INNER,
    OUTER_LIPS,
    RIGHT_EYE,
    RIGHT_LIDS,
    UPPER_INNER,
    Points,
    face_height,
    head_pose,
    mouth_opening,
    rotation_matrix,
)
from rest_lightning.data.animated.portraits import Portrait
from rest_lightning.data.animated.warp import Layer, MeshWarp, remap

# From the still to the driver: a clip begins as a stream does, with the photograph itself.
FADE_FRAMES = 8
_UPPER_CREASE = (
    np.array([247, 30, 29, 27, 28, 56, 190]),
    np.array([467, 260, 259, 257, 258, 286, 414]),
)
# Rings around the face's oval: size, how far each goes with the head above and below the chin.
_RINGS = ((1.22, 1.0, 0.85), (1.55, 0.9, 0.35), (2.0, 0.5, 0.1))
_BORDER_POINTS = 7
_FEATHER_PX = 0.8


@dataclass(frozen=True)
class Style:
    """What a clip makes of its driver.

    Attributes:
        lips: factor on lips and jaw.
        brows: factor on the rest of the face.
        head: factor on the head's turns and shifts.
        sway: amplitude of a slow movement of the head that is added, as a factor (0: none).
        blinks_per_min: put in beside the driver's own.
        gaze_px: largest shift of the eyes, in pixels of a face of 120.
        brightness, contrast, saturation, warmth: of all pixels; 1, 1, 1 and 0 change nothing.
    """

    lips: float = 1.0
    brows: float = 1.0
    head: float = 1.0
    sway: float = 0.0
    blinks_per_min: float = 14.0
    gaze_px: float = 1.5
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    warmth: float = 0.0


@dataclass(frozen=True)
class AnimatedClip:
    """Frames uint8 (F, size, size, 3), the mesh of each (F, 478, 3) in pixels, mouth opening (F,)
    in [0, 1].
    """

    frames: NDArray[np.uint8]
    mesh: Points
    mouth_opening: NDArray[np.float64]


def animate(
    portrait: Portrait, driver: Driver, style: Style, rng: np.random.Generator
) -> AnimatedClip:
    """Moves ``portrait`` as ``driver`` does. The first frame is the portrait itself.

    Args:
        portrait: a framed still.
        driver: what moves it, one frame of it a frame.
        style: strengths.
        rng: of blinks, gaze and sway.
    """
    size = len(portrait.picture)
    meshes, shifts = moved_meshes(portrait, driver, style, rng)
    anchors, weights = _anchors(portrait.mesh, size)
    pose = head_pose(portrait.mesh)
    warp = MeshWarp(
        np.concatenate([portrait.mesh[:468, :2], anchors]),
        np.concatenate([portrait.mesh[:468, 2], np.full(len(anchors), 2 * size)]),
        (_eye_layer(LEFT_EYE), _eye_layer(RIGHT_EYE)),
    )
    canonical_anchors = pose.invert(
        np.concatenate(
            [anchors, np.full((len(anchors), 1), portrait.mesh[FACE_OVAL, 2].mean())], axis=1
        )
    )
    frames = np.empty((len(meshes), size, size, 3), np.uint8)
    colour = _colour_table(style)
    for i, mesh in enumerate(meshes):
        if i == 0:
            frames[i] = portrait.picture
            continue
        rigid = _pose_between(portrait.mesh, mesh)
        target = (pose.scale * canonical_anchors @ pose.rotation.T @ rigid[0].T)[:, :2]
        start = (pose.scale * canonical_anchors @ pose.rotation.T)[:, :2]
        moved_anchors = anchors + weights[:, None] * (target - start + rigid[1])
        x, y = warp.maps(
            np.concatenate([mesh[:468, :2], moved_anchors]),
            size,
            size,
            np.stack([shifts[i], shifts[i]]),
        )
        frame = remap(portrait.picture, x, y).astype(np.float32)
        frame = _paste_mouth(frame, mesh, portrait, driver, i)
        alpha = cv2.remap(portrait.alpha, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)[
            ..., None
        ]
        frame = alpha * frame + (1 - alpha) * portrait.background
        frames[i] = np.clip(frame + 0.5, 0, 255)
    frames = colour(frames)
    return AnimatedClip(frames, meshes, mouth_opening(meshes))


def moved_meshes(
    portrait: Portrait, driver: Driver, style: Style, rng: np.random.Generator
) -> tuple[Points, NDArray[np.float64]]:
    """Returns the portrait's mesh at every frame (F, 478, 3), and how far its eyes look aside (F,
    2) in pixels.
    """
    count = driver.num_frames
    pose = head_pose(portrait.mesh)
    still = pose.invert(portrait.mesh)
    closing = _closing(still)
    strength = np.full(478, style.brows)
    near = np.exp(
        -np.square(np.linalg.norm(still[:, :2] - still[OUTER_LIPS, :2].mean(axis=0), axis=1) / 0.75)
    )
    width = np.linalg.norm(still[INNER_LIPS[0]] - still[INNER_LIPS[10]])
    ratio = float(np.clip(width / driver.mouth_width, 0.8, 1.2))
    strength = strength + (style.lips * ratio - style.brows) * near
    fade = np.minimum(np.arange(count) / FADE_FRAMES, 1.0)
    fade = fade * fade * (3 - 2 * fade)
    rotation = style.head * driver.rotation
    shift = style.head * driver.shift
    if style.sway:
        rotation = rotation + style.sway * _slow(rng, count, 3) * [0.03, 0.045, 0.025]
        shift = shift + style.sway * _slow(rng, count, 2) * [0.05, 0.03]
    blink = _blinks(rng, count, style.blinks_per_min)
    gaze = _gaze(rng, count) * style.gaze_px * float(face_height(portrait.mesh)) / 120
    meshes = np.empty((count, 478, 3))
    for i in range(count):
        offset = fade[i] * (strength[:, None] * driver.expression[i] + closing)
        face = _uncrossed(still + offset)
        turned = pose.scale * face @ pose.rotation.T @ rotation_matrix(fade[i] * rotation[i]).T
        mesh = turned + pose.shift
        mesh[:, :2] += fade[i] * pose.scale * shift[i]
        meshes[i] = _blinked(mesh, blink[i] * fade[i])
    return meshes, gaze * fade[:, None]


def _closing(still: Points) -> Points:
    """Offsets (478, 3) that bring the lips of a canonical face together: a smile has to close to
    speak.
    """
    up, low = still[UPPER_INNER], still[LOWER_INNER]
    gap = np.maximum(low[:, 1] - up[:, 1] - 0.01, 0.0)
    offsets = np.zeros_like(still)
    if gap.max() <= 0:
        return offsets
    corners = still[[INNER_LIPS[0], INNER_LIPS[10]], 0]
    x = (still[:, 0] - corners[0]) / (corners[1] - corners[0])
    columns = (up[:, 0] - corners[0]) / (corners[1] - corners[0])
    at = np.interp(x, np.concatenate([[0.0], columns, [1.0]]), np.concatenate([[0.0], gap, [0.0]]))
    at[(x < 0) | (x > 1)] = 0.0
    middle = np.interp(x, columns, (up[:, 1] + low[:, 1]) / 2)
    below = still[:, 1] > middle
    reach = np.where(
        below, 0.75, 0.35
    )  # the jaw does more of it than the upper lip, and reaches farther
    distance = np.maximum(np.abs(still[:, 1] - middle) - at / 2, 0.0)
    offsets[:, 1] = np.where(below, -0.65, 0.35) * at * np.exp(-np.square(distance / reach))
    return offsets


def _uncrossed(face: Points) -> Points:
    """Keeps the lower lip below the upper one, in the canonical frame."""
    up, low = face[UPPER_INNER, 1], face[LOWER_INNER, 1]
    crossed = np.maximum(up - low, 0.0)
    face[UPPER_INNER, 1] -= crossed / 2
    face[LOWER_INNER, 1] += crossed / 2
    return face


def _blinked(mesh: Points, amount: float) -> Points:
    if amount <= 0:
        return mesh
    for (upper, lower), crease in zip((LEFT_LIDS, RIGHT_LIDS), _UPPER_CREASE, strict=True):
        way = 0.92 * amount * (mesh[lower, :2] - mesh[upper, :2])
        mesh[upper, :2] += way
        mesh[crease, :2] += 0.3 * way
    return mesh


def _eye_layer(eye: NDArray[np.int64]) -> Layer:
    """The eyeball: its corners move it, its lids bound it."""
    return Layer(eye, np.array([eye[0], eye[8]]))


def _anchors(mesh: Points, size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Points (n, 2) around the face and on the picture's border, and how far each goes with the
    head (n,).
    """
    oval = mesh[FACE_OVAL, :2]
    centre = oval.mean(axis=0)
    points, weights = [], []
    for scale, above, below in _RINGS:
        ring = centre + scale * (oval - centre)
        height = (oval[:, 1] - centre[1]) / np.ptp(oval[:, 1])
        weight = above + (below - above) * np.clip(2 * height, 0, 1)
        kept = ((ring > 6) & (ring < size - 7)).all(axis=1)
        points.append(ring[kept])
        weights.append(weight[kept])
    side = np.linspace(-1, size, _BORDER_POINTS)
    border = [
        (x, y) for x in side for y in side if x in (side[0], side[-1]) or y in (side[0], side[-1])
    ]
    points.append(np.array(border))
    weights.append(np.zeros(len(border)))
    return np.concatenate(points), np.concatenate(weights)


def _pose_between(still: Points, mesh: Points) -> tuple[Points, NDArray[np.float64]]:
    """Rotation (3, 3) and shift (2,) of the head between two meshes, from points that bone
    moves.
    """
    from rest_lightning.data.animated.mesh import fit_pose

    pose = fit_pose(still, mesh)
    origin = head_pose(still).shift
    shift: NDArray[np.float64] = (pose.apply(origin) - origin)[:2]
    return pose.rotation, shift


def _paste_mouth(
    frame: NDArray[np.float32], mesh: Points, portrait: Portrait, driver: Driver, i: int
) -> NDArray[np.float32]:
    """Puts the inside of the driver's mouth between the portrait's lips, in the portrait's
    light.
    """
    lips = mesh[INNER_LIPS, :2]
    gap_px = float(
        np.linalg.norm(mesh[UPPER_INNER[3:6], :2] - mesh[LOWER_INNER[3:6], :2], axis=1).mean()
    )
    visible = np.clip((gap_px - 0.6) / 1.4, 0.0, 1.0) * min(i / FADE_FRAMES, 1.0)
    source = driver.mesh[i, INNER_LIPS, :2]
    source_gap = float(
        np.linalg.norm(
            driver.mesh[i, UPPER_INNER[3:6], :2] - driver.mesh[i, LOWER_INNER[3:6], :2], axis=1
        ).mean()
    )
    if visible <= 0 or source_gap < 0.5:
        return frame
    affine = _mouth_map(lips, source, gap_px, source_gap)
    size = len(frame)
    low = np.maximum(np.floor(lips.min(axis=0)).astype(int) - 4, 0)
    high = np.minimum(np.ceil(lips.max(axis=0)).astype(int) + 5, size)
    if (high - low < 2).any():
        return frame
    rows, columns = np.mgrid[low[1] : high[1], low[0] : high[0]].astype(np.float32)
    x = (affine[0, 0] * columns + affine[0, 1] * rows + affine[0, 2]).astype(np.float32)
    y = (affine[1, 0] * columns + affine[1, 1] * rows + affine[1, 2]).astype(np.float32)
    inside = remap(driver.frames[i], x, y).astype(np.float32)
    inside = _calm(inside * _mouth_gains(portrait, driver))
    mask = np.zeros(inside.shape[:2], np.uint8)
    polygon = np.round((lips - low) * 16).astype(np.int32)
    cv2.fillPoly(mask, [polygon], 255, cv2.LINE_AA, 4)
    alpha = (
        cv2.GaussianBlur(mask.astype(np.float32) / 255, (0, 0), _FEATHER_PX * size / 256)[..., None]
        * visible
    )
    area = frame[low[1] : high[1], low[0] : high[0]]
    area[:] = alpha * inside + (1 - alpha) * area
    return frame


def _mouth_map(
    lips: NDArray[np.float64], source: NDArray[np.float64], gap_px: float, source_gap_px: float
) -> NDArray[np.float64]:
    """Affine (2, 3) from the portrait's pixels to the driver's: upper lip on upper lip, teeth
    upright, gap on gap.
    """

    def axes(points: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
        across = points[10] - points[0]
        width = float(np.linalg.norm(across))
        along = across / width
        return points[3:8].mean(axis=0), np.stack([along, [-along[1], along[0]]]), width

    to_origin, to_axes, to_width = axes(lips)
    from_origin, from_axes, from_width = axes(source)
    across = from_width / to_width
    down = float(np.clip(source_gap_px / gap_px, across / 1.5, across * 1.25))
    matrix = from_axes.T @ np.diag([across, down]) @ to_axes
    return np.concatenate([matrix, (from_origin - matrix @ to_origin)[:, None]], axis=1)


def _mouth_gains(portrait: Portrait, driver: Driver) -> NDArray[np.float32]:
    """Factors on R, G, B: the light's colour from the skin of both (half of it is skin, not light),
    brightness from lips.
    """
    luma = np.array([0.299, 0.587, 0.114])
    chroma = (portrait.skin / (portrait.skin @ luma)) / (driver.skin / (driver.skin @ luma))
    level = np.clip((portrait.lips @ luma) / (driver.lips @ luma), 0.75, 1.35)
    return (level * chroma**0.8).astype(np.float32)


def _calm(inside: NDArray[np.float32]) -> NDArray[np.float32]:
    """Teeth take the colour of the driver's light more than skin does: what is not red loses half
    of its colour.
    """
    luma = inside @ np.array([0.299, 0.587, 0.114], np.float32)
    red = np.clip((inside[..., 0] - inside[..., 1]) / (luma + 8) / 0.35, 0, 1)  # gums, tongue, lips
    keep = (0.4 + 0.5 * red)[..., None]
    mixed: NDArray[np.float32] = np.clip(
        luma[..., None] + keep * (inside - luma[..., None]), 0, 255
    )
    return mixed


def _slow(rng: np.random.Generator, count: int, channels: int) -> NDArray[np.float64]:
    """Smooth curves (count, channels) of about unit amplitude, 0.1 to 0.5 Hz."""
    time_s = np.arange(count)[:, None, None] / 25
    frequency = rng.uniform(0.1, 0.5, (1, channels, 3))
    phase = rng.uniform(0, 2 * np.pi, (1, channels, 3))
    curves: NDArray[np.float64] = np.sin(2 * np.pi * frequency * time_s + phase).sum(axis=2) / 1.7
    return curves - curves[:1]


def _blinks(rng: np.random.Generator, count: int, per_min: float) -> NDArray[np.float64]:
    """How far the eyes are closed, 0 to 1 (count,)."""
    curve = np.zeros(count)
    shape = np.array([0.35, 0.85, 1.0, 0.9, 0.6, 0.35, 0.12])
    time = rng.exponential(1.0) * 1500 / max(per_min, 1e-9)
    while time < count:
        start = int(time)
        part = shape[: count - start]
        curve[start : start + len(part)] = np.maximum(curve[start : start + len(part)], part)
        time += max(20.0, rng.exponential(1500 / max(per_min, 1e-9)))
    return curve


def _gaze(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    """Where the eyes look, (count, 2) in [-1, 1]: jumps that last a second or two, the start
    straight ahead.
    """
    curve = np.zeros((count, 2))
    time = int(rng.uniform(10, 50))
    while time < count:
        curve[time:] = rng.normal(0, 0.5, 2) * [1.0, 0.4] if rng.random() < 0.6 else 0.0
        time += int(rng.uniform(15, 60))
    return np.clip(curve, -1, 1)


def _colour_table(style: Style) -> Callable[[NDArray[np.uint8]], NDArray[np.uint8]]:
    """Returns the function that changes colours of uint8 pictures (..., 3) as ``style`` says."""
    table = np.arange(256, dtype=np.float32)
    table = (table - 128) * style.contrast + 128
    table = table * style.brightness
    gains = np.array([1 + style.warmth, 1.0, 1 - style.warmth], np.float32)
    tables = np.clip(table[None] * gains[:, None] + 0.5, 0, 255).astype(np.uint8)

    def change(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
        result = np.stack([tables[c][pictures[..., c]] for c in range(3)], axis=-1)
        if style.saturation != 1.0:
            grey = result.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
            mixed = grey[..., None] + style.saturation * (result - grey[..., None])
            result = np.clip(mixed + 0.5, 0, 255).astype(np.uint8)
        return result

    return change
