"""Face boxes of every frame, bridged where a detector lost the face; protocols that cannot be."""

from __future__ import annotations

import drawn
import numpy as np
import pytest
from PIL import Image

from rest_lightning.errors import UserError
from rest_lightning.evaluation.faces import MediapipeFaces, SidecarFaces, bridge, follow
from rest_lightning.evaluation.protocol import Protocol


def test_gaps_are_bridged_up_to_a_second() -> None:
    boxes = np.full((60, 4), np.nan)
    boxes[2], boxes[12], boxes[37], boxes[55] = (
        (0, 0, 10, 10),
        (10, 20, 20, 30),
        (10, 20, 20, 30),
        (0, 0, 10, 10),
    )
    filled = bridge(boxes)
    assert filled[7].tolist() == [5, 10, 15, 20]
    assert filled[0].tolist() == filled[59].tolist() == [0, 0, 10, 10]
    boxes[37] = np.nan
    with pytest.raises(UserError, match="found none for 42 frames from frame 13"):
        bridge(boxes)
    with pytest.raises(UserError, match="found none in 60 frames"):
        bridge(np.full((60, 4), np.nan))


def test_sidecar_landmarks_become_boxes() -> None:
    landmarks = {
        "left_eye": [[0.4, 0.4]] * 5,
        "right_eye": [[0.6, 0.4]] * 5,
        "mouth": [[0.5, 0.58]] * 5,
    }
    boxes = SidecarFaces(landmarks).boxes(np.zeros((4, 200, 200, 3), np.uint8))
    np.testing.assert_allclose(boxes, np.tile([50.0, 48.0, 150.0, 148.0], (4, 1)))
    with pytest.raises(UserError, match="expected landmarks of 6 frames, got 5"):
        SidecarFaces(landmarks).boxes(np.zeros((6, 200, 200, 3), np.uint8))
    with pytest.raises(UserError, match="expected landmarks in the true clip's sidecar"):
        SidecarFaces(None)


@pytest.mark.parametrize(
    ("boxes", "expected"),
    [
        ([], None),
        ([(52, 50, 152, 150), (0, 0, 40, 40)], 0),
        ([(200, 50, 400, 250), (60, 55, 160, 155)], 1),  # a larger one elsewhere
        ([(200, 50, 400, 250)], None),  # the face is lost, and somebody else is there
        ([(100, 50, 200, 150)], None),  # a third in common
    ],
)
def test_a_track_stays_with_its_face(boxes: list[tuple[int, ...]], expected: int | None) -> None:
    found = [np.array(box, float) for box in boxes]
    box = follow(found, np.array([50.0, 50.0, 150.0, 150.0]))
    assert box is (None if expected is None else found[expected])
    largest = max(found, key=lambda b: b[2] - b[0], default=None)
    assert follow(found, None) is largest


def test_mediapipe_follows_a_face_and_bridges_where_there_is_none() -> None:
    pytest.importorskip("mediapipe", reason="extra `prepare` finds faces")
    picture = np.array(Image.open(drawn.PORTRAITS[0]).convert("RGB").resize((192, 192)))
    canvas = np.full((12, 256, 320, 3), 120, np.uint8)
    for i, frame in enumerate(canvas):
        if i not in (5, 6):
            frame[32:224, 10 * i : 10 * i + 192] = picture
    boxes = MediapipeFaces().boxes(canvas)
    centres = (boxes[:, 0] + boxes[:, 2]) / 2
    np.testing.assert_allclose(np.diff(centres), 10, atol=5)
    assert abs(centres[0] - 96) < 20 and 90 < np.mean(boxes[:, 3] - boxes[:, 1]) < 192


def test_mediapipe_finds_no_face_in_noise_or_says_how_to_get_it() -> None:
    with pytest.raises(
        UserError,
        match=r"expected a face, found none in 3 frames|pip install .*\[prepare\]",
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
    options: dict[str, object] = {
        "name": "p",
        "version": 1,
        "num_clips": 2,
        "num_frames": 96,
        "size_px": 64,
    }
    assert Protocol(**options).fps == 25
    assert (
        Protocol(**options | {"num_frames": 90_000, "measures": ["fid", "talking"]}).num_frames
        == 90_000
    )
    with pytest.raises(UserError, match=message):
        Protocol(**options | changes)
