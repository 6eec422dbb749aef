"""Drivers: what a speaking face in a prepared clip does, apart from whose face it is and where its
head is.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

from rest_lightning.constants import SAMPLES_PER_FRAME
from rest_lightning.data import layout
from rest_lightning.data.animated.mesh import (
    CHEEKS,
    INNER_LIPS,
    NUM_POINTS,
    OUTER_LIPS,
    MeshTracker,
    Points,
    eye_opening,
    fit_pose,
    head_pose,
    lip_gap,
    rotation_vector,
)
from rest_lightning.errors import UserError
from rest_lightning.media.files import whole_file
from rest_lightning.media.video import read_clip_audio, read_frames

_MAX_LOST = 0.05  # of a clip's frames without a face; between neighbours they are interpolated
_POSE_SIGMA, _SHAPE_SIGMA = 1.5, 0.5  # frames; the mesh trembles more than heads do
_JOIN_FRAMES = 5


@dataclass(frozen=True)
class Driver:
    """A speaking face, frame by frame, in the canonical frame of `HeadPose` (rigid points at a mean
    distance of 1).

    Attributes:
        name: of the clip or clips.
        identity: who speaks.
        expression: (F, 478, 3) offsets from the face at rest.
        rotation: (F, 3) axis times angle of the head, around its mean pose.
        shift: (F, 2) of the head around its mean place.
        gap: (F,) inner lips over the face's height.
        mesh: (F, 478, 3) as seen, in pixels of ``frames``.
        frames: uint8 (F, H, W, 3).
        audio: float32 (640 F,).
        mouth_width: of the face at rest, in the canonical frame.
        skin: (3,) mean colour of the cheeks, RGB, 0 to 255.
        lips: (3,) the same of the lips.
    """

    name: str
    identity: str
    expression: Points
    rotation: Points
    shift: Points
    gap: NDArray[np.float64]
    mesh: Points
    frames: NDArray[np.uint8]
    audio: NDArray[np.float32]
    mouth_width: float
    skin: NDArray[np.float64]
    lips: NDArray[np.float64]

    @property
    def num_frames(self) -> int:
        """Frames at 25 per second."""
        return len(self.gap)


def open_driver(
    root: str | os.PathLike[str],
    row: layout.ManifestRow,
    cache: Path,
    tracker: MeshTracker | None = None,
) -> Driver:
    """Reads a prepared clip as a driver; its mesh is found once and kept in ``cache``.

    Raises:
        UserError: no speech track, or no face in more than 5 % of the frames.
    """
    path = layout.clip_path(root, row.clip_id)
    frames = read_frames(path)
    mesh = _mesh(row, frames, cache, tracker)
    template = head_pose(mesh[len(mesh) // 2]).invert(mesh[len(mesh) // 2])
    for _ in range(2):  # the mean of all frames is a better template than any one of them
        canonical = np.stack([fit_pose(template, points).invert(points) for points in mesh])
        template = canonical.mean(axis=0)
    template = head_pose(template).invert(template)
    poses = [fit_pose(template, points) for points in mesh]
    canonical = np.stack([pose.invert(points) for pose, points in zip(poses, mesh, strict=True)])
    gap = lip_gap(canonical)
    eyes = np.array([sum(eye_opening(points)) for points in canonical])
    open_eyes = eyes >= 0.85 * np.median(eyes)
    closed = gap <= np.quantile(gap, 0.25)
    rest = canonical[open_eyes & closed if (open_eyes & closed).sum() >= 3 else closed].mean(axis=0)
    rotations = np.stack([pose.rotation for pose in poses])
    mean_rotation = _nearest_rotation(rotations.mean(axis=0))
    rotation = np.stack([rotation_vector(r @ mean_rotation.T) for r in rotations])
    scale = float(np.mean([pose.scale for pose in poses]))
    shift = np.stack([pose.shift[:2] for pose in poses]) / scale
    skin = np.stack([_colour(f, m, CHEEKS) for f, m in zip(frames[::10], mesh[::10], strict=True)])
    lips = np.stack(
        [_colour(f, m, OUTER_LIPS) for f, m in zip(frames[::10], mesh[::10], strict=True)]
    )
    return Driver(
        name=row.clip_id,
        identity=row.identity,
        expression=gaussian_filter1d(canonical - rest, _SHAPE_SIGMA, axis=0),
        rotation=gaussian_filter1d(rotation, _POSE_SIGMA, axis=0),
        shift=gaussian_filter1d(shift - shift.mean(axis=0), _POSE_SIGMA, axis=0),
        gap=gap,
        mesh=mesh,
        frames=frames,
        audio=read_clip_audio(path, len(frames)),
        mouth_width=float(np.linalg.norm(rest[INNER_LIPS[0]] - rest[INNER_LIPS[10]])),
        skin=np.median(skin, axis=0),
        lips=np.median(lips, axis=0),
    )


def join(drivers: Sequence[Driver], num_frames: int) -> Driver:
    """Returns the first ``num_frames`` frames of one speaker's clips, one after another.

    Face and head go over from one to the next within 5 frames, and so does the sound. Clips join
    best where the speaker rests, which is how sentences begin and end.

    Raises:
        ValueError: they are too short together.
    """
    joined = drivers[0]
    for following in drivers[1:]:
        if joined.num_frames >= num_frames:
            break
        joined = _join_two(joined, following)
    if joined.num_frames < num_frames:
        raise ValueError(
            f"expected {num_frames} frames or more, got {joined.num_frames}: give more clips"
        )
    return cut(joined, 0, num_frames)


def cut(driver: Driver, start: int, num_frames: int) -> Driver:
    """Returns frames [start, start + num_frames)."""
    part = slice(start, start + num_frames)
    sound = slice(start * SAMPLES_PER_FRAME, (start + num_frames) * SAMPLES_PER_FRAME)
    arrays = {name: getattr(driver, name)[part] for name in _PER_FRAME}
    return replace(driver, **arrays, audio=driver.audio[sound])


def change_speed(driver: Driver, factor: float) -> Driver:
    """Returns the driver ``factor`` times as fast, sound and pitch included."""
    count = int(driver.num_frames / factor)
    times = np.arange(count) * factor
    frames = np.arange(driver.num_frames)

    def resample(values: NDArray[np.float64]) -> NDArray[np.float64]:
        flat = values.reshape(len(values), -1)
        columns = np.stack([np.interp(times, frames, column) for column in flat.T], axis=1)
        return columns.reshape(count, *values.shape[1:])

    samples = np.arange(count * SAMPLES_PER_FRAME) * factor
    audio = np.interp(samples, np.arange(len(driver.audio)), driver.audio).astype(np.float32)
    smooth: dict[str, Any] = {
        name: resample(getattr(driver, name)) for name in ("expression", "rotation", "shift", "gap")
    }
    nearest = np.minimum(np.round(times).astype(int), driver.num_frames - 1)
    return replace(
        driver, **smooth, mesh=driver.mesh[nearest], frames=driver.frames[nearest], audio=audio
    )


def mirror(driver: Driver) -> Driver:
    """Returns the driver as a mirror shows its head; the face's expression stays as it is."""
    return replace(driver, rotation=driver.rotation * [1, -1, -1], shift=driver.shift * [-1, 1])


_PER_FRAME = ("expression", "rotation", "shift", "gap", "mesh", "frames")


def _join_two(first: Driver, second: Driver) -> Driver:
    n = min(_JOIN_FRAMES, first.num_frames - 1, second.num_frames - 1)
    weight = np.linspace(0, 1, n + 2)[1:-1]
    arrays: dict[str, Any] = {}
    for name in _PER_FRAME:
        a, b = getattr(first, name), getattr(second, name)
        w = weight.reshape(-1, *[1] * (a.ndim - 1))
        overlap = (
            np.where(w < 0.5, a[-n:], b[:n])
            if name in ("mesh", "frames")
            else (1 - w) * a[-n:] + w * b[:n]
        )
        arrays[name] = np.concatenate([a[:-n], overlap.astype(a.dtype), b[n:]])
    m = n * SAMPLES_PER_FRAME
    fade = np.linspace(0, 1, m, dtype=np.float32)
    overlap = (1 - fade) * first.audio[-m:] + fade * second.audio[:m]
    audio = np.concatenate([first.audio[:-m], overlap, second.audio[m:]])
    return replace(first, name=f"{first.name}+{second.name}", audio=audio, **arrays)


def _mesh(
    row: layout.ManifestRow, frames: NDArray[np.uint8], cache: Path, tracker: MeshTracker | None
) -> Points:
    path = cache / f"{row.clip_id}-{row.sha256[:16]}.npy"
    if path.is_file():
        kept: Points = np.load(path).astype(np.float64)
        if kept.shape == (len(frames), NUM_POINTS, 3):
            return kept
    if tracker is None:
        with MeshTracker() as own:
            found = list(own.track(frames))
    else:
        found = list(tracker.track(frames))
    seen = np.array([points is not None for points in found])
    if seen.mean() < 1 - _MAX_LOST:
        raise UserError(
            f"clip {row.clip_id}: expected a face in every frame, got none in {(~seen).sum()} of "
            f"{len(seen)}: "
            "leave the clip out"
        )
    values = np.stack([points for points in found if points is not None]).reshape(seen.sum(), -1)
    index = np.arange(len(found))
    whole = np.stack([np.interp(index, index[seen], column) for column in values.T], axis=1)
    mesh: Points = whole.reshape(len(found), NUM_POINTS, 3)
    cache.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        np.save(temporary, mesh.astype(np.float32))
    return mesh


def _nearest_rotation(matrix: Points) -> Points:
    u, _, vt = np.linalg.svd(matrix)
    rotation: Points = u @ np.diag([1, 1, np.linalg.det(u @ vt)]) @ vt
    return rotation


def _colour(
    frame: NDArray[np.uint8], mesh: Points, which: NDArray[np.int64]
) -> NDArray[np.float64]:
    height, width = frame.shape[:2]
    x = np.clip(mesh[which, 0].round().astype(int), 0, width - 1)
    y = np.clip(mesh[which, 1].round().astype(int), 0, height - 1)
    colour: NDArray[np.float64] = np.median(frame[y, x].astype(np.float64), axis=0)
    return colour
