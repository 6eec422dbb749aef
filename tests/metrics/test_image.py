"""PSNR, mouth boxes and sharpness against independent computations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from rest_lightning.metrics import image
from rest_lightning.tasks import regions


def noise(num: int = 3, height: int = 32, width: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("offset", [1, 4, 20])
def test_psnr_of_a_known_error(offset: int) -> None:
    truth = np.full((2, 8, 8, 3), 100, dtype=np.uint8)
    assert image.video_psnr_db(truth + np.uint8(offset), truth) == pytest.approx(
        20 * np.log10(255 / offset)
    )
    error = torch.tensor((2 * offset / 255) ** 2)
    assert float(image.psnr_db(error)) == pytest.approx(20 * np.log10(255 / offset), abs=1e-4)


def test_psnr_pools_the_squared_error_of_all_frames() -> None:
    a, b = noise(seed=1), noise(seed=2)
    expected = 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))
    assert image.video_psnr_db(a, b) == pytest.approx(expected, abs=1e-5)


def test_equal_videos_have_a_finite_psnr() -> None:
    assert image.video_psnr_db(noise(), noise()) == pytest.approx(106.02, abs=0.01)


def test_two_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="expected two videos of one shape"):
        image.video_psnr_db(noise(3), noise(2))


def test_boxes_equal_those_of_the_training() -> None:
    assert regions.MOUTH_BOX == image.MOUTH_BOX
    assert regions.EYE_BOX == image.EYE_BOX
    mouth = torch.tensor([[0.5, 0.7], [0.1, 0.95], [float("nan"), 0.5]])
    landmarks = torch.full((1, 3, 3, 2), float("nan"))
    landmarks[0, :, 0] = mouth
    weights = regions.region_weights(landmarks, (32, 64), 2.0, 1.0)[0, 0]
    assert torch.equal(image.box_mask(mouth.numpy(), (32, 64)), weights == 2.0)


def test_psnr_of_a_box_sees_the_box_alone() -> None:
    truth = np.full((2, 64, 64, 3), 100, dtype=np.uint8)
    frames = truth.copy()
    mask = image.box_mask([[0.5, 0.7], [0.4, 0.6]], (64, 64))
    frames[~mask.numpy()] = 0
    frames[mask.numpy()] += 5
    assert image.video_psnr_db(frames, truth, mask) == pytest.approx(20 * np.log10(255 / 5))


def test_sharpness_of_a_point_and_of_nothing() -> None:
    frame = np.zeros((1, 7, 7, 3), dtype=np.uint8)
    assert image.sharpness(frame) == 0
    frame[0, 3, 3] = 10
    assert image.sharpness(frame) == pytest.approx(np.sqrt((40**2 + 4 * 10**2) / 25), rel=1e-5)


def test_sharpness_falls_with_blur_and_in_the_mask_alone() -> None:
    sharp = noise(1, 64, 64)
    blurred = [
        np.array(Image.fromarray(sharp[0]).filter(ImageFilter.GaussianBlur(radius)))
        for radius in (0.0, 0.5, 1.0, 2.0)
    ]
    values = [image.sharpness(each[None]) for each in blurred]
    assert values == sorted(values, reverse=True)
    half = sharp.copy()
    half[:, :, 32:] = 128
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[:, :, 40:] = True
    assert image.sharpness(half, mask) == 0
