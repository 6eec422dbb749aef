from __future__ import annotations

import hashlib
import importlib.util
import json
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from safetensors import safe_open

from rest_lightning.media import face_models
from rest_lightning.media.face_models import (
    INNER_LIPS,
    LEFT_EYE,
    OUTER_LIPS,
    RIGHT_EYE,
    WEIGHTS,
    Face,
    FaceFinder,
    FaceMesh,
    Landmarks,
    Picture,
    overlap,
    suppress,
)

STILLS = sorted((Path(__file__).parent / "stills").glob("*.jpg"))
NAMES = [path.stem for path in STILLS]
SMILES = {"interfaces_009", "interfaces_010"}  # teeth show


@cache
def still(index: int) -> Picture:
    return np.asarray(Image.open(STILLS[index]).convert("RGB"))


@pytest.fixture(scope="module")
def finder() -> FaceFinder:
    return FaceFinder.load()


@pytest.fixture(scope="module")
def mesh() -> FaceMesh:
    return FaceMesh.load()


@pytest.fixture(params=range(len(STILLS)), ids=NAMES)
def picture(request: pytest.FixtureRequest) -> Picture:
    return still(request.param)


@cache
def clouds(seed: int, height: int, width: int, falloff: float = 0.8) -> Picture:
    """Noise of all scales: what walls, woods and skies have in common."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for level in range(1, 9):
        coarse = rng.normal(size=(2**level + 1, 2**level + 1, 3)).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(coarse[..., channel]).resize(
                (width, height), Image.Resampling.BICUBIC
            )
            total[..., channel] += np.asarray(layer) / 2 ** (level * falloff)
    total -= total.min()
    return (255 * total / total.max()).astype(np.uint8)


def pasted(
    background: Picture, index: int, face_px: float, at: tuple[int, int]
) -> tuple[Picture, Face]:
    """A still on a background, scaled until its face has this size; and the face that is to be
    found."""
    (face,) = FaceFinder.load().find(still(index))
    scale = face_px / max(face.box[2:])
    image = Image.fromarray(still(index))
    small = image.resize([round(n * scale) for n in image.size], Image.Resampling.LANCZOS)
    canvas = Image.fromarray(background)
    canvas.paste(small, at)
    x, y, width, height = (scale * value for value in face.box)
    expected = Face((x + at[0], y + at[1], width, height), face.keypoints * scale + at, face.score)
    return np.asarray(canvas), expected


def test_one_face_in_every_still(finder: FaceFinder, mesh: FaceMesh, picture: Picture) -> None:
    (face,) = finder.find(picture)
    assert face.score > 0.7
    landmarks = mesh.landmarks(picture, face)
    assert landmarks.score > 0.99
    assert landmarks.points.shape == (468, 3) and landmarks.points.dtype == np.float32
    # Two networks agree on where eyes, nose and mouth are.
    points = landmarks.points[:, :2]
    middles = [points[list(RIGHT_EYE)].mean(0), points[list(LEFT_EYE)].mean(0), points[1]]
    middles.append(points[list(OUTER_LIPS)].mean(0))
    distances = np.linalg.norm(face.keypoints[:4] - middles, axis=1) / landmarks.size_px()
    assert distances.max() < 0.08
    assert face.keypoints[0, 0] < face.keypoints[1, 0]


@pytest.mark.parametrize("side", [0.7, 0.85, 1.0])
def test_face_that_fills_the_picture(
    finder: FaceFinder, mesh: FaceMesh, picture: Picture, side: float
) -> None:
    (face,) = finder.find(picture)
    x, y, width, height = mesh.landmarks(picture, face).box
    half = side * max(width, height) / 2
    left, top = int(x + width / 2 - half), int(y + height / 2 - half)
    crop = np.ascontiguousarray(picture[top : top + int(2 * half), left : left + int(2 * half)])
    (found,) = finder.find(crop)
    x, y, width, height = found.box
    assert overlap((x + left, y + top, width, height), face.box) > 0.5


@pytest.mark.parametrize(
    ("face_px", "size"), [(28, (1500, 2000)), (40, (1100, 800)), (80, (1500, 2000))]
)
def test_small_face_in_a_large_picture(
    finder: FaceFinder, face_px: float, size: tuple[int, int]
) -> None:
    index = face_px % len(STILLS)
    at = (size[1] - 400, size[0] // 3)
    picture, expected = pasted(clouds(0, *size), index, face_px, at)
    (found,) = finder.find(picture)
    assert overlap(found.box, expected.box) > 0.5
    assert np.abs(found.keypoints - expected.keypoints).max() < 0.15 * face_px


def test_face_between_two_tiles(finder: FaceFinder) -> None:
    """Large pictures are looked at in parts; a face where they meet is found once."""
    background = clouds(0, 1500, 2000)
    for at in ((710, 700), (1450, 740)):
        picture, expected = pasted(background, 4, 34, at)
        (found,) = finder.find(picture)
        assert overlap(found.box, expected.box) > 0.5


@pytest.mark.parametrize("ratio", [1.0, 0.7, 0.5])
def test_two_faces(finder: FaceFinder, ratio: float) -> None:
    for face_px in (250, 60):
        picture, first = pasted(clouds(1, 900, 1400), 3, face_px, (100, 100))
        picture, second = pasted(picture, 1, face_px * ratio, (800, 200))
        found = finder.find(picture)
        assert len(found) == 2
        for face in (first, second):
            assert max(overlap(face.box, each.box) for each in found) > 0.5
        areas = [face.box[2] * face.box[3] for face in found]
        assert areas == sorted(areas, reverse=True)


@pytest.mark.parametrize("angle", [-30, -15, 15, 30])
def test_tilted_head(finder: FaceFinder, mesh: FaceMesh, angle: float) -> None:
    tilted = np.asarray(Image.fromarray(still(4)).rotate(-angle, Image.Resampling.BICUBIC))
    (face,) = finder.find(tilted)
    (upright,) = finder.find(still(4))
    before, after = mesh.landmarks(still(4), upright), mesh.landmarks(tilted, face)
    assert after.pose().roll_deg - before.pose().roll_deg == pytest.approx(angle, abs=2)
    assert after.pose().yaw_deg - before.pose().yaw_deg == pytest.approx(0, abs=4)


def written(seed: int) -> Picture:
    rng = np.random.default_rng(seed)
    words = Path(face_models.__file__).read_text().split()
    image = Image.new("RGB", (1000, 700), (250, 250, 245) if seed % 2 else (30, 30, 40))
    draw = ImageDraw.Draw(image)
    top = 5
    while top < 690:
        size = int(rng.integers(12, 60))
        text = " ".join(rng.choice(words, 30))
        fill = (0, 0, 0) if seed % 2 else (230, 230, 210)
        draw.text((5, top), text, fill=fill, font=ImageFont.load_default(size))
        top += round(1.2 * size)
    return np.asarray(image)


def landscape(seed: int) -> Picture:
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (900, 700))
    draw = ImageDraw.Draw(image)
    for y in range(700):
        draw.line((0, y, 900, y), fill=(80 + y // 10, 120 + y // 10, 200 - y // 20))
    for i in range(25):
        x, y, radius = int(rng.integers(900)), int(rng.integers(700)), int(rng.integers(5, 120))
        shape = draw.ellipse if i % 3 else draw.rectangle
        fill = tuple(int(value) for value in rng.integers(0, 256, 3))
        shape((x - radius, y - radius, x + radius, y + radius), fill=fill, outline=(0, 0, 0))
    hills = [(x, int(400 + 100 * np.sin(x / 70 + seed))) for x in range(0, 901, 20)]
    draw.polygon([*hills, (900, 700), (0, 700)], fill=(40, 100, 40))
    return np.asarray(image)


def noise(seed: int) -> Picture:
    return np.random.default_rng(seed).integers(0, 256, (600, 800, 3), dtype=np.uint8)


def plain(seed: int) -> Picture:
    return np.full((300 + 50 * seed, 500, 3), 40 * seed, np.uint8)


def cloudy(seed: int) -> Picture:
    return clouds(seed, 700, 900, (0.3, 0.6, 0.9, 1.3)[seed % 4])


@pytest.mark.parametrize("draw", [noise, cloudy, written, landscape, plain])
def test_no_face_where_there_is_none(finder: FaceFinder, draw: Callable[[int], Picture]) -> None:
    for seed in range(4):
        assert finder.find(draw(seed)) == [], f"{draw.__name__}({seed})"


def test_no_face_in_the_backgrounds_of_stills(
    finder: FaceFinder, mesh: FaceMesh, picture: Picture
) -> None:
    x, _, width, _ = mesh.landmarks(picture, finder.find(picture)[0]).box
    for part in (picture[:, : int(x - 0.2 * width)], picture[:, int(x + 1.2 * width) :]):
        if part.shape[1] > 40:
            assert finder.find(np.ascontiguousarray(part)) == []


def test_the_detector_alone_sees_faces_in_noise() -> None:
    """Why the mesh confirms: without it some of these pictures have faces."""
    finder = FaceFinder.load()
    finder.mesh = None
    assert any(finder.find(draw(seed)) for draw in (noise, cloudy) for seed in range(12))


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (700, 1), (33, 31), (4000, 40)])
def test_any_size_of_picture(finder: FaceFinder, size: tuple[int, int]) -> None:
    assert finder.find(np.full((*size, 3), 127, np.uint8)) == []


def test_mirrored_picture_has_mirrored_landmarks(
    finder: FaceFinder, mesh: FaceMesh, picture: Picture
) -> None:
    mirrored = np.ascontiguousarray(picture[:, ::-1])
    before = mesh.landmarks(picture, finder.find(picture)[0])
    after = mesh.landmarks(mirrored, finder.find(mirrored)[0])
    middle = [0, 1, 2, 4, 5, 6, 10, 13, 14, 17, 152, 168]
    x = picture.shape[1] - after.points[middle, 0]
    assert np.abs(x - before.points[middle, 0]).mean() < 0.02 * before.size_px()
    assert after.pose().yaw_deg == pytest.approx(-before.pose().yaw_deg, abs=3)
    assert after.eye_opening()[::-1] == pytest.approx(before.eye_opening(), abs=0.05)
    assert after.mouth_opening() == pytest.approx(before.mouth_opening(), abs=0.015)


@pytest.mark.parametrize("scale", [0.25, 0.6, 2.0, 4.0])
def test_landmarks_do_not_depend_on_the_size_of_the_picture(
    finder: FaceFinder, mesh: FaceMesh, scale: float
) -> None:
    image = Image.fromarray(still(5))
    scaled = np.asarray(
        image.resize([round(n * scale) for n in image.size], Image.Resampling.LANCZOS)
    )
    before = mesh.landmarks(still(5), finder.find(still(5))[0])
    after = mesh.landmarks(scaled, finder.find(scaled)[0])
    distances = np.linalg.norm(after.points[:, :2] / scale - before.points[:, :2], axis=1)
    assert distances.mean() < 0.012 * before.size_px()


def test_mouth_and_eyes(finder: FaceFinder, mesh: FaceMesh) -> None:
    for index, name in enumerate(NAMES):
        landmarks = mesh.landmarks(still(index), finder.find(still(index))[0])
        assert (landmarks.mouth_opening() > 0.05) == (name in SMILES), name
        assert min(landmarks.eye_opening()) > 0.2, name


def test_painted_lids_close_the_eyes(finder: FaceFinder, mesh: FaceMesh) -> None:
    picture = still(5)
    before = mesh.landmarks(picture, finder.find(picture)[0])
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    for eye in (RIGHT_EYE, LEFT_EYE):
        points = before.points[list(eye), :2]
        skin = tuple(
            int(v) for v in picture[int(points[:, 1].max() + 12), int(points[:, 0].mean())]
        )
        middle, reach = points.mean(axis=0), np.ptp(points, axis=0) / 2 + (2, 6)
        draw.ellipse((*(middle - reach), *(middle + reach)), fill=skin)
        draw.arc((*(middle - reach), *(middle + reach)), 20, 160, fill=(60, 40, 40), width=3)
    after = mesh.landmarks(np.asarray(image), before_face := finder.find(np.asarray(image))[0])
    assert before_face.score > 0.5
    assert max(after.eye_opening()) < 0.7 * min(before.eye_opening())


def test_batches_equal_single_pictures(finder: FaceFinder, mesh: FaceMesh) -> None:
    pictures = [still(i) for i in range(4)]
    faces = [finder.find(each)[0] for each in pictures]
    for together, picture, face in zip(
        mesh.landmarks_of(pictures, faces), pictures, faces, strict=True
    ):
        alone = mesh.landmarks(picture, face)
        np.testing.assert_allclose(together.points, alone.points, atol=1e-2)
    assert mesh.landmarks_of([], []) == []


def test_track_follows_loses_and_finds_again(finder: FaceFinder, mesh: FaceMesh) -> None:
    wide = np.pad(still(4), ((200, 200), (300, 300), (0, 0)), mode="edge")
    empty = clouds(0, 512, 512)
    frames: list[Any] = [wide[200 : 200 + 512, x : x + 512] for x in range(150, 450, 25)]
    frames = [np.ascontiguousarray(frame) for frame in frames]
    num_found = 0

    class Counting(FaceFinder):
        def find(self, picture: Picture) -> list[Face]:
            nonlocal num_found
            num_found += 1
            return super().find(picture)

    counting = Counting(finder.net, finder.mesh)
    tracked = list(mesh.track([*frames, empty, empty, *frames[:2]], counting))
    assert [landmarks is None for landmarks in tracked] == [False] * 12 + [True] * 2 + [False] * 2
    assert num_found == 4  # the first picture, two empty ones, and the first with the face again
    steps = np.diff([landmarks.points[1, 0] for landmarks in tracked[:12] if landmarks is not None])
    np.testing.assert_allclose(steps, -25, atol=3)


def test_suppression_weighs_by_score() -> None:
    zeros = np.zeros((6, 2), np.float32)
    faces = [
        Face((0, 0, 10, 10), zeros, 0.6),
        Face((2, 0, 10, 10), zeros + 4, 0.9),
        Face((50, 50, 10, 10), zeros, 0.7),
    ]
    kept = suppress(faces)
    assert [face.score for face in kept] == [0.9, 0.7]
    assert kept[0].box == pytest.approx((1.2, 0, 10, 10))
    assert kept[0].keypoints == pytest.approx(2.4)
    assert suppress([]) == []


def test_overlap() -> None:
    assert overlap((0, 0, 2, 2), (1, 0, 2, 2)) == pytest.approx(1 / 3)
    assert overlap((0, 0, 2, 2), (2, 2, 2, 2)) == 0
    assert overlap((0, 0, 0, 0), (0, 0, 0, 0)) == 0


def test_pose_of_a_turned_mesh(finder: FaceFinder, mesh: FaceMesh) -> None:
    landmarks = mesh.landmarks(still(5), finder.find(still(5))[0])
    rest = landmarks.pose()
    for angle in (-40, 25):
        cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
        about_y = np.array([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]])
        about_x = np.array([[1, 0, 0], [0, cos, sin], [0, -sin, cos]])
        turned = Landmarks(landmarks.points @ about_y.T, 1.0).pose()
        assert turned.yaw_deg - rest.yaw_deg == pytest.approx(angle, abs=1)
        raised = Landmarks(landmarks.points @ about_x.T, 1.0).pose()
        assert raised.pitch_deg - rest.pitch_deg == pytest.approx(angle, abs=1)


def source() -> dict[str, Any]:
    with safe_open(WEIGHTS, "np") as file:
        named: dict[str, Any] = json.loads(file.metadata()["source"])
    return named


def test_weights_name_their_source() -> None:
    named = source()
    assert named["licence"] == "Apache-2.0" and named["package"] == "mediapipe 0.10.14"
    card = (WEIGHTS.parent / "README.md").read_text()
    for part in ("detector", "mesh"):
        assert named[part]["file"] in card and named[part]["sha256"] in card
    assert WEIGHTS.stat().st_size < 5_000_000


# What follows compares with mediapipe itself, where it is installed.


@pytest.fixture(scope="module")
def solutions() -> Any:
    pytest.importorskip("mediapipe", reason="mediapipe has no wheel for this Python")
    from rest_lightning.media.faces import mediapipe_solutions

    return mediapipe_solutions()


def test_detections_equal_mediapipe(solutions: Any, finder: FaceFinder, picture: Picture) -> None:
    """At the size of the network's input neither scales the picture, so that only the networks are
    compared."""
    small = np.asarray(Image.fromarray(picture).resize((192, 192), Image.Resampling.LANCZOS))
    detection = solutions.face_detection
    with detection.FaceDetection(model_selection=1, min_detection_confidence=0.5) as reference:
        (expected,) = reference.process(small).detections
    (found,) = finder.detect(small, 1.0)
    box = expected.location_data.relative_bounding_box
    values = 192 * np.array([box.xmin, box.ymin, box.width, box.height])
    # Both average all detections above a half; one whose score is a half may fall on either side.
    assert overlap(found.box, tuple(values)) > 0.93
    keypoints = [(192 * k.x, 192 * k.y) for k in expected.location_data.relative_keypoints]
    np.testing.assert_allclose(found.keypoints, keypoints, atol=2)
    assert found.score == pytest.approx(expected.score[0], abs=0.02)


def test_mesh_equals_mediapipe(
    solutions: Any, finder: FaceFinder, mesh: FaceMesh, picture: Picture
) -> None:
    height, width = picture.shape[:2]
    with solutions.face_mesh.FaceMesh(max_num_faces=1) as reference:
        for _ in range(4):  # the same picture again: its region comes from its own points
            (expected,) = reference.process(picture).multi_face_landmarks
    points = np.array([(p.x * width, p.y * height, p.z * width) for p in expected.landmark])
    *_, landmarks = mesh.track([picture] * 4, finder)
    assert landmarks is not None
    distances = np.linalg.norm(landmarks.points - points, axis=1) / landmarks.size_px()
    assert distances.mean() < 0.005
    assert distances.max() < 0.03


def test_contours_are_mediapipes(solutions: Any) -> None:
    names = solutions.face_mesh_connections
    for contour, connections in (
        ({*OUTER_LIPS, *INNER_LIPS}, names.FACEMESH_LIPS),
        ({*RIGHT_EYE}, names.FACEMESH_RIGHT_EYE),
        ({*LEFT_EYE}, names.FACEMESH_LEFT_EYE),
    ):
        assert contour == {point for pair in connections for point in pair}


def test_sources_are_the_installed_ones(solutions: Any) -> None:
    import mediapipe

    for part in ("detector", "mesh"):
        content = (Path(mediapipe.__file__).parent / source()[part]["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == source()[part]["sha256"]


def test_conversion_again_gives_the_same_weights(solutions: Any, tmp_path: Path) -> None:
    pytest.importorskip("tflite", reason="only the conversion needs it")
    script = Path(__file__).parents[2] / "tools" / "face_models.py"
    spec = importlib.util.spec_from_file_location("convert_face_models", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.convert(module.source_folder(None), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == WEIGHTS.read_bytes()


@pytest.mark.slow
def test_speed_on_one_thread(finder: FaceFinder, mesh: FaceMesh) -> None:
    """Processor time, not wall time: other processes share the machine."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        (face,) = finder.find(still(0))

        def least_ms(call: Callable[[], Any]) -> float:
            times = []
            for _ in range(15):
                start = time.process_time()
                call()
                times.append(time.process_time() - start)
            return 1000 * min(times)

        assert least_ms(lambda: finder.find(still(0))) < 60
        assert least_ms(lambda: mesh.score(still(0), face)) < 16
    finally:
        torch.set_num_threads(num_threads)
