"""Frames go back into the photograph without an edge."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from rest_lightning.media.photo import PhotoFrames
from rest_lightning.media.portrait import Portrait


def photograph(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = 127 + 60 * np.sin(9 * x) + 60 * np.cos(7 * y)
    return Image.fromarray(np.stack([waves, 255 * x, 255 * y], -1).astype(np.uint8))


@pytest.mark.parametrize("size", [(300, 400), (401, 301), (1500, 2200)])
@pytest.mark.parametrize("box", [(0.2, 0.1, 0.5), (0.0, 0.0, 0.6), (-0.1, 0.2, 0.7)])
def test_the_squares_own_pixels_give_the_photograph_again(
    size: tuple[int, int], box: tuple[float, float, float]
) -> None:
    side = box[2] * min(size)
    portrait = Portrait(photograph(*size), (box[0] * size[0], box[1] * size[1], side, side))
    compose = PhotoFrames(portrait)
    whole = compose(np.stack([portrait.square(256)] * 2))
    assert whole.shape == (2, compose.height, compose.width, 3)
    assert compose.height <= 1080 and compose.height % 2 == compose.width % 2 == 0
    expected = np.asarray(
        portrait.picture.resize((compose.width, compose.height), Image.Resampling.LANCZOS)
    )
    assert np.abs(whole[1].astype(int) - expected).max() <= 6
    assert np.abs(whole[1].astype(int) - expected).mean() < 0.5


def test_a_frame_is_seen_inside_and_the_photograph_outside() -> None:
    portrait = Portrait(photograph(400, 600), (100.0, 150.0, 200.0, 200.0))
    black = np.zeros((1, 64, 64, 3), np.uint8)
    whole = PhotoFrames(portrait)(black)[0]
    photo = np.asarray(portrait.picture)
    assert whole[200:300, 150:250].max() == 0
    outside = np.ones((600, 400), bool)
    outside[150:350, 100:300] = False
    assert np.array_equal(whole[outside], photo[outside])
    # No step is larger than a smooth transition over 24 pixels makes: at most 1.5 / 24 of it.
    row = whole[250, 90:130, 2].astype(float)
    assert np.abs(np.diff(row)).max() <= 255 * 1.6 / 24


def test_at_the_edge_of_the_photograph_the_frame_goes_on() -> None:
    portrait = Portrait(photograph(400, 400), (0.0, 0.0, 400.0, 400.0))
    white = np.full((1, 64, 64, 3), 255, np.uint8)
    assert PhotoFrames(portrait)(white).min() == 255
