"""Faces of frames become tracks; a track's square stands still and holds the face; cuts end
tracks.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from videos import levels, speech_like, write_video

from rest_lightning.data.preparation.options import PrepareOptions
from rest_lightning.data.preparation.scenes import scene_cuts
from rest_lightning.data.preparation.tracks import FIELDS, Seen, Track, link_tracks, static_box
from rest_lightning.data.preparation.work import prepare_video

OPTIONS = PrepareOptions(min_frames=9, max_frames=40, max_gap_frames=3)


def face(x: float, y: float = 50, side: float = 100) -> np.ndarray:
    spots = [0.3, 0.4, 0.7, 0.4, 0.5, 0.75, 0.5, 0.55]
    points = [(x, y)[i % 2] + v * side for i, v in enumerate(spots)]
    return np.array([x, y, side, side, x, y, x + side, y + side, *points], np.float32)


def seen_of(faces: list[tuple[int, np.ndarray]]) -> Seen:
    faces = sorted(faces, key=lambda pair: pair[0])
    values = np.array([v for _, v in faces], np.float32).reshape(-1, len(FIELDS))
    return Seen(np.array([n for n, _ in faces], np.int64), values)


def test_two_people_are_two_tracks_whatever_their_order() -> None:
    rng = np.random.default_rng(0)
    faces = []
    for number in range(30):
        both = [(number, face(100 + number)), (number, face(300 - 2 * number))]
        faces += both if rng.random() < 0.5 else both[::-1]
    tracks = link_tracks(seen_of(faces), [], OPTIONS)
    assert [(t.start, t.num_frames) for t in tracks] == [(0, 30), (0, 30)]
    np.testing.assert_allclose(tracks[0].values[:, 0], 100 + np.arange(30))
    np.testing.assert_allclose(tracks[1].values[:, 0], 300 - 2 * np.arange(30))


def test_gaps_are_bridged_cuts_and_jumps_are_not() -> None:
    numbers = [*range(10), *range(13, 20), *range(24, 30)]  # gaps of 3 and 4
    tracks = link_tracks(seen_of([(n, face(100 + n)) for n in numbers]), [], OPTIONS)
    assert [(t.start, t.num_frames) for t in tracks] == [(0, 20), (24, 6)]
    np.testing.assert_allclose(tracks[0].values[:, 0], 100 + np.arange(20), atol=1e-4)
    tracks = link_tracks(seen_of([(n, face(100)) for n in range(20)]), [7, 15], OPTIONS)
    assert [(t.start, t.end) for t in tracks] == [(0, 7), (7, 15), (15, 20)]
    tracks = link_tracks(
        seen_of([(n, face(100 if n < 9 else 180)) for n in range(20)]), [], OPTIONS
    )
    assert [(t.start, t.end) for t in tracks] == [(0, 9), (9, 20)]


@pytest.mark.parametrize(("num_frames", "parts"), [(40, [40]), (41, [20, 21]), (100, [33, 34, 33])])
def test_long_tracks_are_cut_into_equal_parts(num_frames: int, parts: list[int]) -> None:
    tracks = link_tracks(seen_of([(n, face(100)) for n in range(num_frames)]), [], OPTIONS)
    assert sorted(t.num_frames for t in tracks) == sorted(parts)
    assert [t.start for t in tracks] == [0, *(t.end for t in tracks[:-1])]


def test_nobody_is_no_track(tmp_path: Path) -> None:
    assert link_tracks(seen_of([]), [], OPTIONS) == []
    video = write_video(tmp_path / "a.mp4", levels(10), [speech_like(0.4)])
    options = PrepareOptions(size_px=128, detector="videos:NoFace", max_hands=None)
    (row,) = prepare_video(video, tmp_path, tmp_path / "out", options)
    assert (row.status, row.stage) == ("failed", "face")
    assert row.reason == "expected a face, found none in 10 frames"


@pytest.mark.parametrize("seed", range(40))
def test_the_square_holds_the_face_inside_the_picture(seed: int) -> None:
    rng = np.random.default_rng(seed)
    width, height = rng.integers(150, 2000, 2).tolist()
    side = rng.uniform(0.1, 0.8) * min(width, height)
    x, y = rng.uniform(0, width - side), rng.uniform(0, height - side)
    steps = np.cumsum(rng.normal(0, 0.01 * side, (30, 2)), axis=0)
    steps = np.clip(steps, (-x, -y), (width - side - x, height - side - y))
    track = Track(0, np.stack([face(x + dx, y + dy, side) for dx, dy in steps]))
    left, top, right, bottom = track.extremes
    bx, by, box_side, other = static_box(track, width, height, OPTIONS)
    assert box_side == other == int(box_side) and (bx, by) == (int(bx), int(by))
    assert (
        bx <= left + 1
        and by <= top + 1
        and bx + box_side >= right - 1
        and by + box_side >= bottom - 1
    )
    if box_side <= min(width, height):
        assert bx >= 0 and by >= 0 and bx + box_side <= width and by + box_side <= height


def test_one_wild_landmark_widens_no_square() -> None:
    values = np.stack([face(500, 400)] * 30)
    calm = static_box(Track(0, values.copy()), 1920, 1080, OPTIONS)
    values[12, 4] = -300.0
    assert static_box(Track(0, values), 1920, 1080, OPTIONS) == calm
    np.testing.assert_allclose(calm, (472, 365, 155, 155), atol=1)  # 0.35 above, 0.2 below, centred


def test_cuts_are_spikes_and_movement_is_not() -> None:
    differences = np.full(50, 2.0, np.float32)
    differences[[20, 35]] = 60.0
    assert scene_cuts(differences, 18, 3).tolist() == [20, 35]
    assert scene_cuts(np.full(50, 60.0, np.float32), 18, 3).tolist() == []  # a camera that whirls
    assert scene_cuts(np.full(50, 2.0, np.float32), 18, 3).tolist() == []
    differences[0] = 99.0
    assert 0 not in scene_cuts(differences, 18, 3)
    assert scene_cuts(np.empty(0, np.float32), 18, 3).tolist() == []


def test_a_cut_in_a_video_ends_the_clip(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scenes = [
        rng.integers(20, 230, (8, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1) for _ in range(3)
    ]
    frames = np.concatenate(
        [np.tile(scene, (n, 1, 1, 1)) for scene, n in zip(scenes, (12, 20, 9), strict=True)]
    )
    video = write_video(tmp_path / "a.mp4", frames, [speech_like(41 / 25)])
    options = PrepareOptions(
        size_px=128, detector="videos:OneFace", max_hands=None, min_face_px=None
    )
    rows = prepare_video(video, tmp_path, tmp_path / "out", options)
    assert [(row.start_s, row.num_frames) for row in rows] == [(0.0, 12), (0.48, 20), (1.28, 9)]
    assert {row.filter for row in rows} == {"short"}
