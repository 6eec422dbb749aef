"""Face boxes and SyncNet's crops, against the reference pipeline's arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

from rest_lightning.errors import UserError
from rest_lightning.evaluation.faces import MediapipeFaces, SidecarFaces, bridge, face_crops
from rest_lightning.evaluation.protocol import Protocol


def reference_crop(frame: np.ndarray, x: float, y: float, half: float) -> np.ndarray:
    """syncnet_python, run_pipeline.py, crop_video: the slice before the resize."""
    scale = 0.4
    pad = int(half * (1 + 2 * scale))
    padded = np.pad(frame, ((pad, pad), (pad, pad), (0, 0)), constant_values=110)
    my, mx = y + pad, x + pad
    rows = slice(int(my - half), int(my + half * (1 + 2 * scale)))
    return padded[rows, int(mx - half * (1 + scale)) : int(mx + half * (1 + scale))]


@pytest.mark.parametrize(("x", "y", "half"), [(50, 40, 10), (60, 70, 20), (5, 8, 15), (92, 95, 30)])
def test_crops_are_the_references(x: int, y: int, half: int) -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (20, 100, 100, 3), dtype=np.uint8)
    size = round(2.8 * half)
    crops = face_crops(frames, np.tile([x, y, 2.0 * half], (20, 1)), size)
    for frame, crop in zip(frames, crops, strict=True):
        assert np.array_equal(crop, reference_crop(frame, x, y, half))


def test_boxes_are_smoothed_by_a_median_and_ends_stay() -> None:
    frames = np.zeros((40, 100, 100, 3), np.uint8)
    frames[:, 50:, :, 0] = 200
    boxes = np.tile([50.0, 50.0, 20.0], (40, 1))
    steady = face_crops(frames, boxes)
    boxes[[3, 20, 21]] = (10.0, 10.0, 5.0)  # three wrong detections
    assert np.array_equal(face_crops(frames, boxes), steady)
    assert (steady == steady[0]).all(), "a filter that pads with zeros would pull the ends to a corner"


@pytest.mark.parametrize("num_frames", [1, 2, 5, 13])
def test_short_clips_have_crops(num_frames: int) -> None:
    frames = np.full((num_frames, 64, 64, 3), 77, np.uint8)
    crops = face_crops(frames, np.tile([32.0, 32.0, 16.0], (num_frames, 1)))
    assert crops.shape == (num_frames, 224, 224, 3)
    assert (crops[num_frames // 2] == 77).all()


def test_gaps_are_bridged_up_to_a_second() -> None:
    boxes = np.full((60, 3), np.nan)
    boxes[2], boxes[12], boxes[37], boxes[55] = (0, 0, 10), (10, 20, 20), (10, 20, 20), (0, 0, 10)
    filled = bridge(boxes)
    assert filled[7].tolist() == [5, 10, 15] and filled[0].tolist() == [0, 0, 10] and filled[59].tolist() == [0, 0, 10]
    boxes[37] = np.nan
    with pytest.raises(UserError, match="found none for 42 frames from frame 13"):
        bridge(boxes)
    with pytest.raises(UserError, match="found none in 60 frames"):
        bridge(np.full((60, 3), np.nan))


def test_sidecar_landmarks_become_boxes() -> None:
    landmarks = {"left_eye": [[0.4, 0.4]] * 5, "right_eye": [[0.6, 0.4]] * 5, "mouth": [[0.5, 0.58]] * 5}
    boxes = SidecarFaces(landmarks).boxes(np.zeros((4, 200, 200, 3), np.uint8))
    np.testing.assert_allclose(boxes, np.tile([100.0, 98.0, 100.0], (4, 1)))
    with pytest.raises(UserError, match="expected landmarks of 6 frames, got 5"):
        SidecarFaces(landmarks).boxes(np.zeros((6, 200, 200, 3), np.uint8))
    with pytest.raises(UserError, match="expected landmarks in the true clip's sidecar"):
        SidecarFaces(None)


def test_mediapipe_finds_no_face_in_noise_or_says_how_to_get_it() -> None:
    with pytest.raises(
        UserError, match=r"expected a face, found none in 3 frames|pip install 'rest_lightning\[prepare\]'"
    ):
        MediapipeFaces().boxes(np.zeros((3, 64, 64, 3), np.uint8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"measures": ["fid", "beauty"]}, "got 'beauty'"),
        ({"measures": []}, "got 'none'"),
        ({"faces": "s3fd"}, "expected faces of prepared, sidecar, mediapipe"),
        ({"num_clips": 0}, "expected num_clips of at least 1"),
        ({"num_frames": 90_000}, "at most 3000 frames with fvd, sync"),
    ],
)
def test_wrong_protocols_are_told(changes: dict[str, object], message: str) -> None:
    options: dict[str, object] = {"name": "p", "version": 1, "num_clips": 2, "num_frames": 96, "size_px": 64}
    assert Protocol(**options).fps == 25
    assert Protocol(**options | {"num_frames": 90_000, "measures": ["fid", "talking"]}).num_frames == 90_000
    with pytest.raises(UserError, match=message):
        Protocol(**options | changes)
