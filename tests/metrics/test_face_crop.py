"""Crops along a face track, against coordinates worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rest_lightning.errors import UserError
from rest_lightning.metrics.face_crop import face_crops


def ramps(num_frames: int, height: int, width: int) -> torch.Tensor:
    """Red tells the column, green the row, blue the frame."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    frames = torch.stack([x, y, torch.zeros_like(x)], dim=-1).to(torch.uint8).expand(num_frames, -1, -1, -1).clone()
    frames[..., 2] = torch.arange(num_frames)[:, None, None]
    return frames


@pytest.mark.parametrize("box", [(80, 70, 140, 130), (90, 60, 150, 140)])
def test_crop_covers_what_the_reference_covers(box: tuple[int, int, int, int]) -> None:
    """Half side s around the centre; s up, 1.8 s down, 1.4 s to both sides, resized to 224."""
    frames = ramps(30, 240, 250)
    crops = face_crops(frames, np.tile(box, (30, 1)), min_track_frames=20).float()
    assert crops.shape == (30, 224, 224, 3)
    side = max(box[2] - box[0], box[3] - box[1]) / 2
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    left, right = int(x - 1.4 * side), int(x + 1.4 * side)
    top, bottom = int(y - side), int(y + 1.8 * side)
    middle = crops[15]
    at = (np.arange(224) + 0.5) / 224
    columns = np.clip(left + at * (right - left) - 0.5, left, right - 1)
    rows = np.clip(top + at * (bottom - top) - 0.5, top, bottom - 1)
    np.testing.assert_allclose(middle[100, :, 0].numpy(), columns, atol=1.01)
    np.testing.assert_allclose(middle[:, 100, 1].numpy(), rows, atol=1.01)
    assert crops[:, 0, 0, 2].tolist() == list(range(30))


def test_one_wrong_detection_does_not_move_the_crop_and_outside_is_grey() -> None:
    frames = ramps(40, 100, 100)
    boxes = np.tile((2.0, 2.0, 42.0, 42.0), (40, 1))
    steady = face_crops(frames, boxes, min_track_frames=20)
    boxes[20] = (50, 50, 99, 99)
    torch.testing.assert_close(face_crops(frames, boxes, min_track_frames=20), steady)
    assert steady[20, 100, 0].tolist() == [110, 110, 110]  # 22 - 1.4 * 20 is left of the image


def test_bad_tracks_are_named() -> None:
    frames = ramps(97, 32, 32)
    boxes = np.tile((4.0, 4.0, 20.0, 20.0), (97, 1))
    with pytest.raises(UserError, match="at least 101 frames, got 97"):
        face_crops(frames, boxes)
    with pytest.raises(UserError, match=r"each of 97 frames, got \(96, 4\)"):
        face_crops(frames, boxes[1:])
    boxes[5] = 3.0
    with pytest.raises(UserError, match="an empty one in frame 5"):
        face_crops(frames, boxes, min_track_frames=50)
    with pytest.raises(UserError, match="at least 13 frames, got 4"):
        face_crops(frames[:4], np.tile((4.0, 4.0, 20.0, 20.0), (4, 1)), min_track_frames=1)
