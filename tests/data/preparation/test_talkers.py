"""Synthetic talkers in larger, noisier frames, whose faces' true boxes are known: the static box
covers them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from videos import write_video

from rest_lightning.data import layout
from rest_lightning.data.preparation.options import PrepareOptions
from rest_lightning.data.preparation.rows import Row
from rest_lightning.data.preparation.work import prepare_video
from rest_lightning.media.video import read_frames

pytest.importorskip("skia")
pytest.importorskip("espeakng_loader")

WIDTH, HEIGHT = 640, 480


@dataclass(frozen=True)
class Scene:
    """A video of one talker.

    Attributes:
        true_box: left, top, right, bottom of the face (hairline to chin, cheek to cheek) over all
            frames.
        mouth: its centre in every frame (n, 2), in pixels.
        faces: what `videos.KnownFaces` reads, per frame.
    """

    path: Path
    true_box: np.ndarray
    mouth: np.ndarray
    faces: list[dict[str, object]]


def make_scene(path: Path, index: int, num_frames: int) -> Scene:
    from rest_lightning.data.synthetic.face import CENTRE, ZOOM
    from rest_lightning.data.synthetic.geometry import Motion
    from rest_lightning.data.synthetic.identity import sample_identity
    from rest_lightning.data.synthetic.synthesize import synthesize_clip

    rng = np.random.default_rng([6, index])
    clip = synthesize_clip(index, seed=6, size_px=256, num_frames=num_frames)
    identity = sample_identity(np.random.default_rng([6, index, 2]))  # as synthesize_clip draws it
    side = int(rng.integers(170, 400))
    left, top = int(rng.integers(0, WIDTH - side)), int(rng.integers(0, HEIGHT - side))
    p, centre = identity, np.asarray(CENTRE)
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    middle, radius = (p.hairline_y + p.chin_y) / 2, (p.chin_y - p.hairline_y) / 2
    outline = Motion(identity, clip.track).skin(
        p.face_width * np.cos(angle), middle + radius * np.sin(angle)
    )
    outline = (centre + ZOOM * (outline - centre)) * side + (left, top)
    background = rng.integers(40, 200, (HEIGHT // 16, WIDTH // 16, 3), dtype=np.uint8)
    still = np.asarray(
        Image.fromarray(background).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    ).astype(np.int16)
    frames = np.empty((num_frames, HEIGHT, WIDTH, 3), np.uint8)
    for frame, pixels in zip(frames, clip.frames, strict=True):
        scene = still.copy()
        scene[top : top + side, left : left + side] = np.asarray(
            Image.fromarray(pixels).resize((side, side))
        )
        scene += rng.normal(0, 6, (HEIGHT, WIDTH, 1)).astype(np.int16)
        frame[:] = scene.clip(0, 255)
    write_video(path, frames, [clip.audio])
    points = {
        k: np.asarray(v) * side + (left, top) for k, v in (clip.sidecar.landmarks or {}).items()
    }
    low, high = outline.min(axis=1), outline.max(axis=1)
    faces = [
        {name: value[i].tolist() for name, value in points.items()}
        | {"nose": points["mouth"][i].tolist(), "box": [*low[i], *(high[i] - low[i])]}
        for i in range(num_frames)
    ]
    return Scene(path, np.concatenate([low.min(axis=0), high.max(axis=0)]), points["mouth"], faces)


def covers(row: Row, scene: Scene, slack: float = 0.01) -> bool:
    """Whether the static box holds the whole true box, up to 1 % of its side."""
    assert row.box is not None
    x, y, side, _ = row.box
    left, top, right, bottom = scene.true_box
    spare = slack * side
    return bool(
        x <= left + spare
        and y <= top + spare
        and x + side >= right - spare
        and y + side >= bottom - spare
    )


def assert_crop_is_good(out: Path, row: Row, scene: Scene) -> None:
    """Nothing of the background moves, and the landmarks are where the renderer put them."""
    assert row.clip_id is not None and row.box is not None
    frames = read_frames(layout.clip_path(out, row.clip_id)).astype(np.float64)
    x, y, side, _ = row.box
    true_mouth = (scene.mouth - (x, y)) / side
    found = np.asarray((layout.read_sidecar(out, row.clip_id).landmarks or {})["mouth"])
    assert np.linalg.norm(found - true_mouth, axis=1).max() < 0.04
    # and the box is no larger than it must be
    assert side < 2.4 * (scene.true_box[2:] - scene.true_box[:2]).max()
    # below the cheek: shoulders and background, which hardly move
    corner = frames[:, -12:, :12].mean(axis=(1, 2))
    assert np.abs(corner - corner.mean(axis=0)).max() < 12


def test_known_landmarks_through_the_plug(tmp_path: Path) -> None:
    options = PrepareOptions(
        size_px=128, min_frames=5, detector="videos:KnownFaces", max_hands=None, max_silence=None
    )
    for index in range(3):
        scene = make_scene(tmp_path / f"{index}.mp4", index, 9)
        content = {"width": WIDTH, "frames": [[face] for face in scene.faces]}
        Path(f"{scene.path}.faces.json").write_text(json.dumps(content))
        (row,) = prepare_video(scene.path, tmp_path, tmp_path / "out", options)
        assert row.status == "kept" and row.num_frames == 9, row.reason
        assert covers(row, scene)
        assert_crop_is_good(tmp_path / "out", row, scene)


@pytest.mark.slow
def test_mediapipe_covers_the_face_in_95_percent_of_clips(tmp_path: Path) -> None:
    pytest.importorskip("mediapipe")
    options = PrepareOptions(size_px=128, min_frames=5, max_hands=None, max_silence=None)
    num_clips, covered = 20, 0
    for index in range(num_clips):
        scene = make_scene(tmp_path / f"{index}.mp4", index, 9)
        rows = [
            r
            for r in prepare_video(scene.path, tmp_path, tmp_path / "out", options)
            if r.num_frames == 9
        ]
        covered += len(rows) == 1 and covers(rows[0], scene)
        if rows:
            assert rows[0].status == "kept", rows[0].reason
            assert_crop_is_good(tmp_path / "out", rows[0], scene)
    assert covered >= 0.95 * num_clips, f"{covered} of {num_clips}"
