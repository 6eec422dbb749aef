"""Drift of videos that drift as told."""

from __future__ import annotations

import numpy as np
import pytest

from rest_lightning.metrics.drift import (
    DriftTracker,
    background_drift,
    background_mask,
    mean_lab,
    srgb_to_lab,
)


def flat(level: int, num: int = 1, side: int = 32) -> np.ndarray:
    return np.full((num, side, side, 3), level, dtype=np.uint8)


@pytest.mark.parametrize("size", [(64, 64), (128, 128), (96, 128)])
def test_mask_is_symmetric_and_spares_the_head(size: tuple[int, int]) -> None:
    mask = background_mask(*size)
    assert (mask == mask[:, ::-1]).all()
    assert 0.05 < mask.mean() < 0.25
    middle = slice(int(0.2 * size[1]), int(0.8 * size[1]))
    assert not mask[:, middle].any()
    assert not mask[size[0] // 2 + 1 :].any()
    assert mask[0, 0] and mask[0, -1]


@pytest.mark.parametrize("offset", [0, 1, 5, -7])
def test_background_drift_in_grey_levels(offset: int) -> None:
    assert background_drift(flat(100)[0], flat(100 + offset, 3)) == abs(offset)


def test_the_head_may_move() -> None:
    now = flat(100, 2)
    now[:, ~background_mask(32, 32)] = 255
    assert background_drift(flat(100)[0], now) == 0


def test_flicker_counts() -> None:
    now = flat(100, 4)
    now[::2] += 4
    now[1::2] -= 4
    assert background_drift(flat(100)[0], now) == 4


# L*a*b* of the sRGB primaries, D65, 2 degrees, as colour tables print them.
@pytest.mark.parametrize(
    ("rgb", "lab"),
    [
        ((255, 255, 255), (100.0, 0.0, 0.0)),
        ((0, 0, 0), (0.0, 0.0, 0.0)),
        ((119, 119, 119), (50.03, 0.0, 0.0)),
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 255, 0), (87.73, -86.18, 83.18)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
    ],
)
def test_lab_of_known_colours(rgb: tuple[int, ...], lab: tuple[float, ...]) -> None:
    assert srgb_to_lab(np.array(rgb, dtype=np.uint8)) == pytest.approx(lab, abs=0.02)
    assert mean_lab(np.full((2, 4, 4, 3), rgb, dtype=np.uint8)) == pytest.approx(lab, abs=0.02)


@pytest.mark.parametrize("pieces", [[750], [24] * 31 + [6], [1, 299, 450]])
def test_tracker_over_half_a_minute(pieces: list[int]) -> None:
    """Every second one grey level more: the last one is 29 above the start."""
    frames = np.concatenate([flat(100 + second, 25, 8) for second in range(30)])
    tracker = DriftTracker()
    for piece in np.split(frames, np.cumsum(pieces)[:-1]):
        tracker.update(piece)
    drift = tracker.compute()
    assert drift.background == 29
    assert drift.background_by_second == list(range(30))
    windows = (range(10), range(20, 30))
    first, last = (
        np.mean([mean_lab(flat(100 + second)) for second in window], axis=0) for window in windows
    )
    assert drift.colour_lab_per_minute == pytest.approx(np.linalg.norm(last - first) * 3)


def test_tracker_compares_with_a_given_start() -> None:
    tracker = DriftTracker(start=flat(90, side=8)[0])
    tracker.update(flat(100, 25, 8))
    assert tracker.compute().background == 10


@pytest.mark.parametrize(
    ("num_frames", "num_seconds"), [(0, 0), (3, 1), (25, 1), (30, 1), (38, 2), (50, 2)]
)
def test_seconds_that_count(num_frames: int, num_seconds: int) -> None:
    tracker = DriftTracker()
    tracker.update(flat(7, num_frames, 8))
    drift = tracker.compute()
    assert len(drift.background_by_second) == num_seconds
    assert np.isnan(drift.background) == (num_seconds == 0)
    assert np.isnan(drift.colour_lab_per_minute) == (num_seconds < 2)
