"""Animated portraits: the geometry, the warp, drivers, the plan, and a data set from stills."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rest_lightning.data import layout
from rest_lightning.data.animated import mesh as face_mesh
from rest_lightning.data.animated.animate import Style, animate, moved_meshes
from rest_lightning.data.animated.dataset import Plan, Source, plan_clips
from rest_lightning.data.animated.drivers import Driver, change_speed, cut, join, mirror
from rest_lightning.data.animated.portraits import Portrait, choose_framing
from rest_lightning.data.animated.warp import Layer, MeshWarp, fit_similarity, remap
from rest_lightning.errors import UserError

SIZE = 96


def flat_face(scale: float = 30.0, centre: tuple[float, float] = (48, 50)) -> np.ndarray:
    """A mesh with every point that has a meaning where a face has it; all others in a disc."""
    rng = np.random.default_rng(0)
    angles, radii = rng.uniform(0, 2 * np.pi, 478), np.sqrt(rng.uniform(0, 0.8, 478))
    points = np.stack([radii * np.cos(angles), 1.2 * radii * np.sin(angles), -0.3 * (1 - radii)], 1)
    turn = np.linspace(0, 2 * np.pi, len(face_mesh.FACE_OVAL), endpoint=False)
    points[face_mesh.FACE_OVAL] = np.stack([np.sin(turn), -1.25 * np.cos(turn), 0 * turn], 1)
    for eye, x in ((face_mesh.LEFT_EYE, -0.4), (face_mesh.RIGHT_EYE, 0.4)):
        side = np.sign(x)
        around = np.linspace(0, 2 * np.pi, 16, endpoint=False)
        ring = np.stack([side * np.cos(around), -0.4 * np.sin(around), 0 * around - 0.2], 1)
        points[eye] = ring * [0.18, 0.18, 1] + [x, -0.3, 0]
    for lips, width, height in (
        (face_mesh.OUTER_LIPS, 0.35, 0.12),
        (face_mesh.INNER_LIPS, 0.3, 0.0),
    ):
        around = np.linspace(np.pi, -np.pi, 20, endpoint=False)
        ring = np.stack([width * np.cos(around), -height * np.sin(around), 0 * around - 0.3], 1)
        points[lips] = ring + np.array([0, 0.6, 0])
    return points * scale + [*centre, 0]


def portrait(mesh: np.ndarray | None = None) -> Portrait:
    rng = np.random.default_rng(1)
    picture = rng.integers(0, 255, (12, 12, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
    colour = np.array([180.0, 140, 120])
    alpha = np.ones((SIZE, SIZE), np.float32)
    return Portrait(
        "a", picture, flat_face() if mesh is None else mesh, alpha, picture, colour, colour
    )


def driver(num_frames: int = 30, name: str = "d", opening: float = 0.2) -> Driver:
    """Lower lip and chin go down and up again; the head nods."""
    wave = np.sin(np.linspace(0, 3 * np.pi, num_frames)) ** 2
    expression = np.zeros((num_frames, 478, 3))
    expression[:, face_mesh.LOWER_INNER, 1] = opening * wave[:, None]
    mesh = np.stack([flat_face()] * num_frames)
    mesh[:, face_mesh.LOWER_INNER, 1] += 30 * opening * wave[:, None]
    rotation = np.zeros((num_frames, 3))
    rotation[:, 0] = 0.05 * wave
    rng = np.random.default_rng(num_frames)
    return Driver(
        name=name,
        identity="speaker",
        expression=expression,
        rotation=rotation,
        shift=np.zeros((num_frames, 2)),
        gap=wave,
        mesh=mesh,
        frames=rng.integers(0, 255, (num_frames, SIZE, SIZE, 3)).astype(np.uint8),
        audio=rng.normal(0, 0.1, 640 * num_frames).astype(np.float32),
        mouth_width=0.6,
        skin=np.array([180.0, 140, 120]),
        lips=np.array([180.0, 100, 100]),
    )


STILL = Style(blinks_per_min=0, gaze_px=0)


@pytest.mark.parametrize("scale", [10.0, 33.0])
@pytest.mark.parametrize("vector", [(0, 0, 0), (0.2, -0.1, 0.4), (0, 0.6, 0)])
def test_poses_are_found_again(scale: float, vector: tuple[float, float, float]) -> None:
    canonical = face_mesh.head_pose(flat_face()).invert(flat_face())
    rotation = face_mesh.rotation_matrix(np.array(vector))
    np.testing.assert_allclose(face_mesh.rotation_vector(rotation), vector, atol=1e-9)
    pose = face_mesh.HeadPose(scale, rotation, np.array([5.0, -3, 1]))
    found = face_mesh.fit_pose(canonical, pose.apply(canonical))
    assert found.scale == pytest.approx(scale)
    np.testing.assert_allclose(found.rotation, rotation, atol=1e-9)
    np.testing.assert_allclose(found.invert(pose.apply(canonical)), canonical, atol=1e-9)


def test_measures_of_lips_and_eyes() -> None:
    closed = flat_face()
    opened = closed.copy()
    opened[face_mesh.LOWER_INNER, 1] += 0.1 * face_mesh.face_height(closed)
    assert face_mesh.lip_gap(closed) == pytest.approx(0, abs=1e-9)
    assert face_mesh.lip_gap(opened) == pytest.approx(0.1)
    assert face_mesh.mouth_opening(np.stack([closed, opened])).tolist() == pytest.approx(
        [0, (0.1 - 0.004) / (face_mesh.WIDE_OPEN - 0.004)]
    )
    asleep = closed.copy()
    for upper, lower in (face_mesh.LEFT_LIDS, face_mesh.RIGHT_LIDS):
        asleep[upper] = asleep[lower]
    assert max(face_mesh.eye_opening(asleep)) < 1e-9 < 0.2 < min(face_mesh.eye_opening(closed))


@pytest.mark.parametrize(("scale", "angle", "shift"), [(1.0, 0.0, (3, -2)), (1.2, 0.3, (0, 0))])
def test_a_warp_of_one_similarity_is_that_similarity(
    scale: float, angle: float, shift: tuple[int, int]
) -> None:
    """Every triangle moves alike, so all of it is one map, known in closed form."""
    rng = np.random.default_rng(0)
    corners = np.array([(0, 0), (SIZE, 0), (0, SIZE), (SIZE, SIZE)], float)
    points = np.concatenate([rng.uniform(0, SIZE, (40, 2)), corners])
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    moved = points @ turn.T + shift
    np.testing.assert_allclose(fit_similarity(points, moved)[:, :2], turn, atol=1e-9)
    warp = MeshWarp(points, np.zeros(len(points)))
    x, y = warp.maps(moved, SIZE, SIZE)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    expected = (np.stack([columns, rows], -1) - shift) @ np.linalg.inv(turn).T
    inside = ((expected > 3) & (expected < SIZE - 4)).all(-1)
    assert inside.mean() > 0.3
    np.testing.assert_allclose(x[inside], expected[inside][:, 0], atol=1e-3)
    np.testing.assert_allclose(y[inside], expected[inside][:, 1], atol=1e-3)


def test_the_nearer_triangle_covers_the_farther_one() -> None:
    points = np.array([(0, 0), (95, 0), (0, 95), (95, 95), (30, 48), (60, 48)], float)
    moved = points.copy()
    moved[4], moved[5] = points[5] + [10, 0], points[4]  # the two cross over
    depths = [np.array([5.0, 5, 5, 5, far, -far]) for far in (20, -20)]
    left, right = (MeshWarp(points, depth).maps(moved, SIZE, SIZE) for depth in depths)
    assert not np.array_equal(left[0], right[0])


def test_a_layer_moves_as_a_whole() -> None:
    points = np.array(
        [(0, 0), (95, 0), (0, 95), (95, 95), (30, 40), (60, 40), (45, 30), (45, 50)], float
    )
    moved = points.copy()
    moved[[6, 7], 1] = 38, 42  # lids close over an eye whose corners stay
    layer = Layer(np.array([4, 6, 5, 7]), np.array([4, 5]))
    x, y = MeshWarp(points, np.zeros(8), (layer,)).maps(moved, SIZE, SIZE, np.array([[2.0, 0.0]]))
    assert (x[40, 45], y[40, 45]) == (pytest.approx(43), pytest.approx(40))


def test_a_clip_begins_with_the_still_and_speaks() -> None:
    clip = animate(portrait(), driver(), STILL, np.random.default_rng(0))
    assert np.array_equal(clip.frames[0], portrait().picture)
    assert clip.frames.shape == (30, SIZE, SIZE, 3)
    assert clip.mouth_opening[0] == 0
    assert clip.mouth_opening.max() > 0.4
    again = animate(portrait(), driver(), STILL, np.random.default_rng(0))
    assert np.array_equal(again.frames, clip.frames)


@pytest.mark.parametrize("lips", [0.5, 1.0, 1.5])
def test_lips_follow_the_driver(lips: float) -> None:
    style = replace(STILL, lips=lips)
    meshes, _ = moved_meshes(portrait(), driver(), style, np.random.default_rng(0))
    wave = np.abs(np.diff(face_mesh.lip_gap(meshes)[9:]))
    reference, _ = moved_meshes(portrait(), driver(), STILL, np.random.default_rng(0))
    assert wave.max() == pytest.approx(
        lips * np.abs(np.diff(face_mesh.lip_gap(reference)[9:])).max(), rel=0.1
    )


def test_a_smile_closes_to_speak() -> None:
    smile = flat_face()
    smile[face_mesh.LOWER_INNER, 1] += 0.05 * face_mesh.face_height(smile)
    quiet = driver(opening=0.0)
    meshes, _ = moved_meshes(portrait(smile), quiet, STILL, np.random.default_rng(0))
    gaps = face_mesh.lip_gap(meshes)
    assert gaps[0] == pytest.approx(0.05)
    assert gaps[12:].max() < 0.012


def test_blinks_close_both_eyes() -> None:
    style = replace(STILL, blinks_per_min=60)
    meshes, _ = moved_meshes(portrait(), driver(250), style, np.random.default_rng(0))
    opening = np.array([face_mesh.eye_opening(mesh) for mesh in meshes])
    closed = opening.max(axis=1) < 0.12
    assert 3 <= np.diff(closed.astype(int)).clip(min=0).sum() <= 15
    assert np.median(opening) > 0.2


@pytest.mark.parametrize("num_frames", [10, 40, 75])
def test_joined_drivers_keep_sound_and_face_together(num_frames: int) -> None:
    joined = join([driver(30, "a"), driver(25, "b"), driver(35, "c")], num_frames)
    assert joined.num_frames == len(joined.frames) == len(joined.audio) // 640 == num_frames
    assert np.array_equal(joined.audio[: 640 * 10], driver(30).audio[: 640 * 10])
    steps = np.abs(np.diff(joined.expression[:, face_mesh.LOWER_INNER[4], 1]))
    assert steps.max() < 0.08
    with pytest.raises(ValueError, match="expected 200 frames or more, got"):
        join([driver(30), driver(25)], 200)


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.25])
def test_speed_changes_sound_and_face_alike(factor: float) -> None:
    changed = change_speed(driver(), factor)
    assert changed.num_frames == int(30 / factor) == len(changed.audio) // 640
    index = np.arange(changed.num_frames) * factor
    expected = np.interp(index, np.arange(30), driver().gap)
    np.testing.assert_allclose(changed.gap, expected, atol=1e-9)
    if factor == 1.0:
        np.testing.assert_allclose(changed.audio, driver().audio, atol=1e-6)


def test_a_mirror_turns_the_head_the_other_way() -> None:
    turned = replace(driver(), rotation=np.array([[0.1, 0.2, 0.3]] * 30))
    assert mirror(turned).rotation[0].tolist() == [0.1, -0.2, -0.3]
    np.testing.assert_allclose(mirror(mirror(turned)).rotation, turned.rotation)
    assert cut(turned, 5, 10).num_frames == 10


@pytest.mark.parametrize("shape", [(400, 400), (300, 500), (900, 600)])
@pytest.mark.parametrize("height", [90, 160])
def test_framing_stays_within_the_still(shape: tuple[int, int], height: int) -> None:
    mesh = flat_face(height / 2.5, (shape[1] / 2, shape[0] * 0.55))
    framing = choose_framing(mesh, (*shape, 3))
    side = face_mesh.face_height(mesh) / framing.face
    left = mesh[[10, 152], 0].mean() - framing.x * side
    assert 0.45 <= framing.face <= 0.64
    assert left > -0.05 * side
    assert left + side < shape[1] + 0.05 * side


def sources(num: int) -> list[Source]:
    splits = ["train"] * (num - 4) + ["val"] * 2 + ["test"] * 2
    return [Source(f"{i}.jpg", f"person-{i}", split) for i, split in enumerate(splits)]


def rows(*speakers: tuple[str, str, int]) -> list[layout.ManifestRow]:
    return [
        layout.ManifestRow(f"{name}-{i}", name, split, 75, 96, "0" * 64)
        for name, split, count in speakers
        for i in range(count)
    ]


def test_a_plan_keeps_splits_apart_and_is_the_same_again() -> None:
    drivers = rows(("ann", "train", 20), ("bob", "train", 1), ("eve", "val", 2))
    plans = plan_clips(sources(12), drivers, 60, seed=3)
    assert plans == plan_clips(sources(12), drivers, 60, seed=3)
    assert plans[:20] == plan_clips(
        sources(12), drivers, 20, seed=3
    )  # more clips change no earlier one
    for plan in plans:
        wanted = (
            "val" if plan.source.split == "val" else "train"
        )  # no speaker is held back for tests
        assert {row.split for row in plan.drivers} == {wanted}
        assert len({row.identity for row in plan.drivers}) == 1
    spoken = [plan.drivers[0].identity for plan in plans if plan.source.split == "train"]
    assert spoken.count("bob") >= 3  # one clip of 21, but a voice of its own
    assert {plan.source.path for plan in plans} == {source.path for source in sources(12)}


def test_plans_without_stills_or_drivers_are_refused() -> None:
    refused = [
        Source("a.jpg", "a", "train", "open mouth"),
        Source("b.jpg", "b", "train", "profile"),
    ]
    with pytest.raises(
        UserError, match=r"expected stills to animate, got none of 2 \(open mouth 1, profile 1\)"
    ):
        plan_clips(refused, rows(("ann", "train", 2)), 4, seed=0)
    with pytest.raises(UserError, match="expected drivers in the training split, got none"):
        plan_clips(sources(8), rows(("eve", "val", 2)), 4, seed=0)


def test_a_plan_names_its_clip() -> None:
    assert Plan(7, sources(5)[0], ()).clip_id == "animated_000007"


def test_remap_reads_where_it_is_told(tmp_path: Path) -> None:
    picture = portrait().picture
    rows_, columns = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    assert np.array_equal(remap(picture, columns, rows_), picture)
