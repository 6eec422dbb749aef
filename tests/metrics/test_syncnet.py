"""MFCC against python_speech_features, and against its formula written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rest_lightning.errors import UserError
from rest_lightning.metrics.syncnet import face_crops, mfcc, to_int16


def speech(num_samples: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    t = np.arange(num_samples) / 16000
    tone = np.sin(2 * np.pi * (200 + 50 * np.sin(3 * t)) * t) * np.clip(np.sin(5 * t), 0, 1)
    return to_int16(0.4 * tone + 0.02 * rng.standard_normal(num_samples))


@pytest.mark.parametrize("num_samples", [1, 399, 400, 401, 560, 561, 640 * 25, 640 * 25 + 77])
def test_equals_python_speech_features(num_samples: int) -> None:
    reference = pytest.importorskip(
        "python_speech_features", reason=("extra `test` has the reference MFCC")
    )
    samples = speech(num_samples)
    expected = reference.mfcc(samples, 16000)
    np.testing.assert_allclose(mfcc(samples), expected, rtol=1e-9, atol=1e-9)


def test_equals_python_speech_features_in_silence() -> None:
    reference = pytest.importorskip(
        "python_speech_features", reason=("extra `test` has the reference MFCC")
    )
    samples = np.concatenate([np.zeros(4000, np.int16), speech(4000), np.zeros(3000, np.int16)])
    np.testing.assert_allclose(mfcc(samples), reference.mfcc(samples, 16000), rtol=1e-9, atol=1e-9)


def test_one_window_from_the_formula() -> None:
    """A slow DFT, triangles, DCT and lifter of one window, without numpy's FFT or any table of
    ours.
    """
    samples = speech(400).astype(np.float64)
    x = samples.copy()
    x[1:] -= 0.97 * samples[:-1]
    k, n = np.arange(257)[:, None], np.arange(400)[None]
    power = np.abs((x * np.exp(-2j * np.pi * k * n / 512)).sum(axis=1)) ** 2 / 512
    mel = np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 28)
    corner = [int(513 * (700 * (10 ** (m / 2595) - 1)) / 16000) for m in mel]
    bands = []
    for low, peak, high in zip(corner, corner[1:], corner[2:], strict=False):
        up = sum(power[i] * (i - low) / (peak - low) for i in range(low, peak))
        bands.append(up + sum(power[i] * (high - i) / (high - peak) for i in range(peak, high)))
    logs = np.log(bands)
    for c in range(1, 13):
        dct = sum(logs[j] * np.cos(np.pi * c * (j + 0.5) / 26) for j in range(26)) * np.sqrt(2 / 26)
        assert mfcc(samples)[0, c] == pytest.approx(
            dct * (1 + 11 * np.sin(np.pi * c / 22)), rel=1e-9
        )
    assert mfcc(samples)[0, 0] == pytest.approx(np.log(power.sum()), rel=1e-12)


def test_sixteen_bits() -> None:
    assert to_int16([0.0, 0.5, -1.0, 1.0, 3.0, -3.0, 1 / 32768]).tolist() == [
        0,
        16384,
        -32768,
        32767,
        32767,
        -32768,
        1,
    ]


def test_bad_samples_are_named() -> None:
    with pytest.raises(UserError, match="got shape \\(0,\\)"):
        mfcc([])
    with pytest.raises(UserError, match="got shape \\(2, 5\\)"):
        mfcc(np.zeros((2, 5)))
    with pytest.raises(UserError, match="got NaN or infinity"):
        mfcc([0.0, np.nan])


def ramps(num_frames: int, height: int, width: int) -> torch.Tensor:
    """Red tells the column, green the row, blue the frame."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    frames = (
        torch.stack([x, y, torch.zeros_like(x)], dim=-1)
        .to(torch.uint8)
        .expand(num_frames, -1, -1, -1)
        .clone()
    )
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
