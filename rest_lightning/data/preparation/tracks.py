"""Faces of single frames become tracks, and a track becomes one box that stands still."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rest_lightning.data.preparation.options import PrepareOptions
from rest_lightning.media.faces import Box, Face

# A face in 16 numbers: two hours of frames stay below 12 MB per face.
FIELDS = (
    *("x", "y", "w", "h", "left", "top", "right", "bottom"),
    *("eye_lx", "eye_ly", "eye_rx", "eye_ry", "mouth_x", "mouth_y", "nose_x", "nose_y"),
)
_BOX, _EXTREMES = slice(0, 4), slice(4, 8)
_EYE_L, _EYE_R, _MOUTH, _NOSE = slice(8, 10), slice(10, 12), slice(12, 14), slice(14, 16)
_MEDIAN_FRAMES = 5  # over the extremes: a landmark that flies off in one frame widens no box

Values = NDArray[np.float32]


class Seen(NamedTuple):
    """All faces of a video: frame numbers (n,), ascending, and `FIELDS` (n, 16), in source
    pixels.
    """

    frames: NDArray[np.int64]
    values: Values


@dataclass(frozen=True)
class Track:
    """One face through consecutive frames.

    Attributes:
        start: number of its first frame.
        values: `FIELDS` of every frame (n, 16); gaps are bridged linearly.
    """

    start: int
    values: Values

    @property
    def num_frames(self) -> int:
        """Frames, bridged ones included."""
        return len(self.values)

    @property
    def end(self) -> int:
        """Number of the first frame behind it."""
        return self.start + len(self.values)

    @property
    def extremes(self) -> NDArray[np.float64]:
        """Left, top, right, bottom of the landmarks in all frames, single outliers aside (4,)."""
        from scipy.ndimage import median_filter

        smooth = median_filter(
            self.values[:, _EXTREMES].astype(np.float64), (_MEDIAN_FRAMES, 1), mode="nearest"
        )
        return np.concatenate([smooth[:, :2].min(axis=0), smooth[:, 2:].max(axis=0)])

    def points(self, box: Box) -> dict[str, NDArray[np.float64]]:
        """Centres of mouth and eyes (n, 2) in fractions of a box."""
        x, y, width, height = box
        named = {"mouth": _MOUTH, "left_eye": _EYE_L, "right_eye": _EYE_R}
        return {
            name: (self.values[:, part].astype(np.float64) - (x, y)) / (width, height)
            for name, part in named.items()
        }

    def face_px(self) -> float:
        """Larger side of the landmarks' extremes, median over frames."""
        sides = self.values[:, 6:8] - self.values[:, 4:6]
        return float(np.median(sides.max(axis=1)))

    def profile(self) -> float:
        """How far the nose lies beside the middle between the eyes, in eye distances, 90th
        percentile.
        """
        eye_l, eye_r, nose = (
            self.values[:, part].astype(np.float64) for part in (_EYE_L, _EYE_R, _NOSE)
        )
        axis = eye_r - eye_l
        length = np.maximum(np.linalg.norm(axis, axis=1), 1e-6)
        beside = np.abs(((nose - (eye_l + eye_r) / 2) * axis).sum(axis=1)) / length**2
        return float(np.percentile(np.minimum(beside, 10.0), 90))


def face_values(face: Face, scale: float) -> Values:
    """`FIELDS` of a face, multiplied by ``scale``."""
    low, high = face.points.min(axis=0), face.points.max(axis=0)
    values = [face.box, low, high, face.left_eye, face.right_eye, face.mouth, face.nose]
    return (np.concatenate([np.asarray(v, np.float64) for v in values]) * scale).astype(np.float32)


def link_tracks(seen: Seen, breaks: Iterable[int], options: PrepareOptions) -> list[Track]:
    """Chain the faces of consecutive frames by the overlap of their boxes, best overlap first.

    Args:
        seen: all faces.
        breaks: numbers of frames that begin a scene; no track reaches across.
        options: gap, overlap and greatest length.

    Returns:
        Tracks by their start, then from left to right; long ones in equal parts.
    """
    if not len(seen.frames):
        return []
    scenes = np.unique(np.asarray(list(breaks), np.int64))
    open_tracks: list[_Chain] = []
    done: list[_Chain] = []
    numbers, first = np.unique(seen.frames, return_index=True)
    for number, values in zip(numbers.tolist(), np.split(seen.values, first[1:]), strict=True):
        scene = int(np.searchsorted(scenes, number, side="right"))
        alive = [
            chain
            for chain in open_tracks
            if number - chain.frames[-1] <= options.max_gap_frames + 1 and chain.scene == scene
        ]
        done += [chain for chain in open_tracks if chain not in alive]
        overlaps = _ious(
            np.array([chain.values[-1][_BOX] for chain in alive]).reshape(-1, 4), values[:, _BOX]
        )
        taken: set[int] = set()
        new = set(range(len(values)))
        for place in np.argsort(-overlaps, axis=None, kind="stable").tolist():
            old, face = divmod(place, len(values))
            if overlaps[old, face] < options.min_iou:
                break
            if old not in taken and face in new:
                alive[old].add(number, values[face])
                taken.add(old)
                new.remove(face)
        open_tracks = alive + [_Chain(scene, number, values[face]) for face in sorted(new)]
    chains = done + open_tracks
    tracks = [part for chain in chains for part in _parts(chain.track(), options.max_frames)]
    return sorted(
        tracks, key=lambda track: (track.start, float(track.values[0, 0]), track.num_frames)
    )


def static_box(track: Track, width: int, height: int, options: PrepareOptions) -> Box:
    """The square of a clip: extremes of the landmarks plus margin, kept inside the picture where
    the face allows.

    A box that would leave the picture is moved inside; one that is larger than the picture gives up
    margin, down to the face itself; only what is then still outside is padded. Whole pixels.

    Args:
        track: of one face.
        width, height: of the source.
        options: the margins.
    """
    left, top, right, bottom = track.extremes
    face_width, face_height = right - left, bottom - top
    longer = max(face_width, face_height)
    room = longer * options.margin
    side = max(face_width + 2 * room, face_height + room + longer * options.margin_top)
    side = max(min(side, width, height), longer, 16.0)
    x = (left + right) / 2 - side / 2
    spare = side - face_height
    shares = options.margin + options.margin_top
    y = top - spare * (options.margin_top / shares if shares else 0.5)
    side_px = round(side)
    return (
        float(_inside(x, side_px, width)),
        float(_inside(y, side_px, height)),
        float(side_px),
        float(side_px),
    )


def others_in_box(track: Track, box: Box, tracks: Sequence[Track]) -> float:
    """Share of a track's frames in which the box of another face reaches into its square by a tenth
    of that face.
    """
    x, y, width, height = box
    touched = np.zeros(track.num_frames, bool)
    for other in tracks:
        low, high = max(track.start, other.start), min(track.end, other.end)
        if other is track or low >= high:
            continue
        boxes = other.values[low - other.start : high - other.start, _BOX].astype(np.float64)
        inside_x = np.minimum(boxes[:, 0] + boxes[:, 2], x + width) - np.maximum(boxes[:, 0], x)
        inside_y = np.minimum(boxes[:, 1] + boxes[:, 3], y + height) - np.maximum(boxes[:, 1], y)
        share = inside_x.clip(0) * inside_y.clip(0) / np.maximum(boxes[:, 2] * boxes[:, 3], 1e-6)
        touched[low - track.start : high - track.start] |= share > 0.1
    return float(touched.mean())


class _Chain:
    """A track that grows."""

    def __init__(self, scene: int, number: int, values: Values) -> None:
        self.scene, self.frames, self.values = scene, [number], [values]

    def add(self, number: int, values: Values) -> None:
        self.frames.append(number)
        self.values.append(values)

    def track(self) -> Track:
        known = np.asarray(self.frames)
        wanted = np.arange(known[0], known[-1] + 1)
        columns = np.stack(self.values)
        filled = [np.interp(wanted, known, column) for column in columns.T]
        return Track(int(known[0]), np.stack(filled, axis=1).astype(np.float32))


def _parts(track: Track, max_frames: int) -> list[Track]:
    count = -(-track.num_frames // max_frames)
    edges = np.linspace(0, track.num_frames, count + 1).round().astype(int).tolist()
    return [Track(track.start + a, track.values[a:b]) for a, b in pairwise(edges)]


def _ious(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float64]:
    """Intersection over union of boxes x, y, w, h: (n, 4) and (m, 4) to (n, m)."""
    a, b = first[:, None].astype(np.float64), second[None].astype(np.float64)
    low = np.maximum(a[..., :2], b[..., :2])
    high = np.minimum(a[..., :2] + a[..., 2:], b[..., :2] + b[..., 2:])
    both = (high - low).clip(0).prod(axis=-1)
    union = a[..., 2:].prod(axis=-1) + b[..., 2:].prod(axis=-1) - both
    return both / np.maximum(union, 1e-6)


def _inside(start: float, side: int, whole: int) -> int:
    """The start moved so that the side lies inside, or centred on the picture's where it is
    larger.
    """
    if side >= whole:
        return min(max(round(start), whole - side), 0)
    return min(max(round(start), 0), whole - side)
