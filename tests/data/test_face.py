"""Rendered talkers: repeatable, right shapes, a mouth whose opening can be measured, eyes that
close.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

pytest.importorskip("skia", reason="the synthetic extra is not installed")

from rest_lightning.data.synthetic.face import neutral_track, render_clip
from rest_lightning.data.synthetic.identity import Identity, sample_identity
from rest_lightning.data.synthetic.track import FaceTrack
from rest_lightning.errors import UserError

NAMES = ("mouth", "left_eye", "right_eye")


def person(seed: int, **changes: object) -> Identity:
    return replace(sample_identity(np.random.default_rng(seed)), **changes)  # type: ignore[arg-type]


def track(**curves: object) -> FaceTrack:
    """A track at rest but for the given curves."""
    num = max(np.size(v) for v in curves.values()) if curves else 1  # type: ignore[arg-type]
    rest = neutral_track(num)
    return replace(
        rest,
        **{k: np.broadcast_to(np.asarray(v, np.float32), num).copy() for k, v in curves.items()},
    )


def busy_track(num_frames: int) -> FaceTrack:
    """Every curve moves."""
    t = np.linspace(0, 3, num_frames)
    return track(
        mouth_opening=0.5 + 0.5 * np.sin(7 * t),
        mouth_width=np.sin(3 * t),
        lip_rounding=0.5 + 0.5 * np.sin(5 * t),
        tongue=0.5 + 0.5 * np.cos(4 * t),
        blink=np.clip(np.sin(6 * t), 0, 1),
        gaze_x=np.sin(2 * t),
        gaze_y=np.cos(2 * t),
        brow_raise=np.sin(4 * t),
        yaw_rad=0.3 * np.sin(t),
        pitch_rad=0.2 * np.cos(t),
        roll_rad=0.1 * np.sin(2 * t),
        shift_x=0.03 * np.sin(t),
        shift_y=0.02 * np.cos(t),
        scale=1 + 0.05 * np.sin(t),
    )


def around(frame: np.ndarray, centre: np.ndarray, half_x: float, half_y: float) -> np.ndarray:
    size = len(frame)
    x, y = centre * size
    rows = slice(max(round(y - half_y * size), 0), round(y + half_y * size))
    return frame[rows, max(round(x - half_x * size), 0) : round(x + half_x * size)].astype(
        np.float64
    )


def near(pixels: np.ndarray, colour: tuple[float, float, float], distance: float) -> np.ndarray:
    return np.linalg.norm(pixels - np.asarray(colour), axis=-1) < distance


def inner_mouth_px(frame: np.ndarray, centre: np.ndarray) -> int:
    """Pixels of green-painted teeth, cavity and blue-free tongue inside the lips."""
    crop = around(frame, centre, 0.14, 0.17)
    teeth = (crop[..., 1] > 1.25 * crop[..., 0]) & (crop[..., 1] > 1.25 * crop[..., 2])
    return int((teeth | near(crop, (52, 16, 18), 28) | near(crop, (186, 88, 88), 25)).sum())


@pytest.mark.parametrize("size_px", [64, 128, 256])
@pytest.mark.parametrize("num_frames", [1, 5])
def test_shapes_types_and_range(size_px: int, num_frames: int) -> None:
    clip = render_clip(person(0), busy_track(num_frames), size_px)
    assert clip.frames.shape == (num_frames, size_px, size_px, 3)
    assert clip.frames.dtype == np.uint8
    assert set(clip.landmarks) == set(NAMES)
    for points in clip.landmarks.values():
        assert points.shape == (num_frames, 2)
        assert points.dtype == np.float32
        assert points.min() > 0.1
        assert points.max() < 0.95


@pytest.mark.parametrize("seed", range(4))
def test_repeatable_and_independent_of_other_clips(seed: int) -> None:
    first = render_clip(person(seed), busy_track(6), 64)
    for other in range(10, 13):  # push the painted layers out of the cache
        render_clip(person(other), neutral_track(), 64)
    again = render_clip(person(seed), busy_track(6), 64)
    np.testing.assert_array_equal(first.frames, again.frames)
    for name in NAMES:
        np.testing.assert_array_equal(first.landmarks[name], again.landmarks[name])


def test_a_frame_does_not_depend_on_its_neighbours() -> None:
    whole = busy_track(5)
    clip = render_clip(person(1), whole, 64)
    for k in range(5):
        one = FaceTrack(
            **{name: getattr(whole, name)[k : k + 1] for name in FaceTrack.__dataclass_fields__}
        )
        np.testing.assert_array_equal(render_clip(person(1), one, 64).frames[0], clip.frames[k])


def test_identities_are_json_and_differ() -> None:
    people = [person(seed) for seed in range(12)]
    assert len({json.dumps(asdict(p)) for p in people}) == 12
    portraits = [render_clip(p, neutral_track(), 64).frames[0].astype(np.float64) for p in people]
    for i in range(12):
        for j in range(i):
            assert np.abs(portraits[i] - portraits[j]).mean() > 6
    assert person(3) == person(3)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("lip_rounding", [0.0, 0.8])
def test_inner_mouth_grows_with_opening(seed: int, lip_rounding: float) -> None:
    opening = np.linspace(0, 1, 9)
    # Green teeth and no beard make the inside countable; the geometry stays that of the identity.
    p = person(seed, teeth=(60.0, 240.0, 60.0), beard="none")
    clip = render_clip(p, track(mouth_opening=opening, lip_rounding=lip_rounding), 128)
    shut = track(mouth_opening=0.0, lip_rounding=lip_rounding)
    closed = render_clip(p, shut, 128).frames[0]
    areas = [
        inner_mouth_px(f, c) for f, c in zip(clip.frames, clip.landmarks["mouth"], strict=True)
    ]
    background = inner_mouth_px(closed, clip.landmarks["mouth"][0])
    grown = np.array(areas) - background
    assert grown[0] == 0
    assert (np.diff(grown) > 0).all(), grown
    assert grown[-1] > 0.006 * 128 * 128


@pytest.mark.parametrize("seed", range(6))
def test_upper_teeth_show_when_open_and_never_when_shut(seed: int) -> None:
    p = person(
        seed, teeth=(60.0, 240.0, 60.0), cloth=(90.0, 90.0, 90.0), background=(90.0, 90.0, 90.0)
    )
    clip = render_clip(p, track(mouth_opening=[0.0, 0.15, 0.5, 1.0]), 128)
    for k, (frame, centre) in enumerate(zip(clip.frames, clip.landmarks["mouth"], strict=True)):
        crop = around(frame, centre, 0.1, 0.14)
        green = ((crop[..., 1] > 1.25 * crop[..., 0]) & (crop[..., 1] > 1.25 * crop[..., 2])).sum()
        assert (green == 0) if k == 0 else (green > 8), (k, green)


@pytest.mark.parametrize("seed", range(8))
def test_lips_stand_out_from_the_skin(seed: int) -> None:
    p = person(seed)
    assert np.linalg.norm(np.subtract(p.lip, p.skin)) > 14
    assert p.lip[0] / max(p.lip[1], 1) > p.skin[0] / max(p.skin[1], 1)  # redder


@pytest.mark.parametrize("seed", range(6))
def test_blink_closes_the_eyes(seed: int) -> None:
    p = person(seed, glasses="none", iris=(40.0, 90.0, 255.0), fringe=0.0)
    clip = render_clip(p, track(blink=[0.0, 0.5, 1.0]), 128)
    for name in ("left_eye", "right_eye"):
        counts = []
        for frame, centre in zip(clip.frames, clip.landmarks[name], strict=True):
            crop = around(frame, centre, 0.05, 0.04)
            blue = crop[..., 2] > 1.4 * crop[..., 0]
            white = (crop.min(-1) > 175) & (np.ptp(crop, axis=-1) < 30)
            counts.append(int((blue | white).sum()))
        assert counts[0] > counts[1] > counts[2]
        assert counts[2] <= 0.02 * counts[0]


@pytest.mark.parametrize("size_px", [64, 128])
def test_landmarks_follow_shift_and_features_move_with_them(size_px: int) -> None:
    p = person(4)
    clip = render_clip(p, track(shift_x=[0.0, 0.03, 0.0], shift_y=[0.0, 0.0, 0.04]), size_px)
    moves = [clip.landmarks[name] - clip.landmarks[name][:1] for name in NAMES]
    for move in moves:  # all points move alike, along the right axis
        np.testing.assert_allclose(move, moves[0], atol=1e-6)
        assert move[1, 0] > 0.02 and abs(move[1, 1]) < 1e-6
        assert move[2, 1] > 0.03 and abs(move[2, 0]) < 1e-6


def test_turning_shifts_near_points_more_than_far_ones() -> None:
    clip = render_clip(person(5), track(yaw_rad=[-0.25, 0.0, 0.25], pitch_rad=0.0), 64)
    eye, mouth = clip.landmarks["left_eye"][:, 0], clip.landmarks["mouth"][:, 0]
    assert (np.diff(mouth) > 0.02).all() and (np.diff(eye) > 0.01).all()
    nod = render_clip(person(5), track(pitch_rad=[-0.15, 0.15]), 64)
    assert nod.landmarks["mouth"][1, 1] > nod.landmarks["mouth"][0, 1]
    tilt = render_clip(person(5), track(roll_rad=[0.15]), 64)
    assert tilt.landmarks["right_eye"][0, 1] > tilt.landmarks["left_eye"][0, 1]


@pytest.mark.parametrize("curve", sorted(FaceTrack.__dataclass_fields__))
def test_no_popping(curve: str) -> None:
    """A curve that moves evenly changes the picture evenly, without a jump anywhere along it."""
    low, high = {"scale": (0.95, 1.05), "shift_x": (-0.04, 0.04), "shift_y": (-0.04, 0.04)}.get(
        curve, (0.0, 1.0)
    )
    low, high = (-0.2, 0.2) if curve.endswith("_rad") else (low, high)
    values = np.linspace(low, high, 33)
    other = {"mouth_opening": 0.4} if curve != "mouth_opening" else {}
    frames = render_clip(person(6), track(**{curve: values}, **other), 64).frames.astype(np.float64)
    steps = np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3))
    assert steps.max() < 1.8
    assert steps.max() < 6 * np.median(steps) + 0.06


def test_too_small_frames_are_refused_in_words() -> None:
    with pytest.raises(UserError, match="expected frames of 32 pixels or more, got size_px=16"):
        render_clip(person(0), neutral_track(), 16)
