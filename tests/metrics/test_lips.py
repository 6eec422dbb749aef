"""Lip metrics on curves whose correlation, lag and silences are known."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from rest_lightning.constants import SAMPLE_RATE, SAMPLES_PER_FRAME
from rest_lightning.metrics.lips import (
    FLOOR_DB,
    by_quarter,
    lip_correlation,
    loudness_db,
    opening_in_silence,
    pearson,
    silent_frames,
    spearman,
    summary,
)


def curve(num: int, seed: int = 0) -> np.ndarray:
    """White noise, smoothed a little: its autocorrelation is largest at lag zero and nowhere
    else.
    """
    noise = np.random.default_rng(seed).normal(size=num + 2)
    return (noise[:-2] + 2 * noise[1:-1] + noise[2:]) / 4


@pytest.mark.parametrize("num", [2, 5, 100])
@pytest.mark.parametrize("scale", [0.01, -3.0])
def test_a_linear_map_correlates_perfectly(num: int, scale: float) -> None:
    a = curve(num)
    assert pearson(a, scale * a + 0.7) == pytest.approx(np.sign(scale), abs=1e-12)


@pytest.mark.parametrize("wanted", [-0.5, 0.0, 0.3, 0.9])
def test_known_correlation(wanted: float) -> None:
    a = curve(200, 1) - curve(200, 1).mean()
    b = curve(200, 2) - curve(200, 2).mean()
    a /= np.linalg.norm(a)
    b -= (a @ b) * a  # orthogonal by construction
    b /= np.linalg.norm(b)
    assert pearson(a, wanted * a + np.sqrt(1 - wanted**2) * b) == pytest.approx(wanted, abs=1e-12)


def test_rank_correlation_equals_scipy_with_ties() -> None:
    a, b = np.round(3 * curve(300, 3)), np.round(3 * (curve(300, 3) + curve(300, 4)))
    assert spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-12)


def test_rank_correlation_sees_order_only() -> None:
    a = curve(50)
    assert spearman(a, np.exp(5 * a)) == pytest.approx(1.0)


@pytest.mark.parametrize(("a", "b"), [([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]), ([1.0], [2.0]), ([], [])])
def test_undefined_correlation_is_nan(a: list[float], b: list[float]) -> None:
    assert np.isnan(pearson(a, b))
    assert np.isnan(lip_correlation(a, b).zero_lag)


def test_curves_of_two_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="expected two curves of one length, got shapes"):
        pearson([1.0, 2.0], [1.0, 2.0, 3.0])


@pytest.mark.parametrize("lag", [-6, -3, -1, 0, 1, 2, 5])
@pytest.mark.parametrize("rank", [False, True])
def test_lag_is_found_with_its_sign(lag: int, rank: bool) -> None:
    source = curve(220, 5)
    true = source[10:210]
    late = source[10 - lag : 210 - lag]  # estimate[k] = true[k - lag]
    result = lip_correlation(late, true, rank=rank)
    assert result.best_lag_frames == lag
    assert result.best == pytest.approx(1.0)
    assert result.zero_lag == pytest.approx((spearman if rank else pearson)(late, true))


def test_quarters() -> None:
    a = curve(100, 6)
    signs = np.repeat([1.0, -1.0, 1.0, -1.0], 25)
    assert by_quarter(a, a * signs) == pytest.approx([1, -1, 1, -1])


@pytest.mark.parametrize("amplitude", [1.0, 0.1, 0.01])
def test_loudness_of_a_sine(amplitude: float) -> None:
    time_s = np.arange(5 * SAMPLES_PER_FRAME) / SAMPLE_RATE
    speech = amplitude * np.sin(2 * np.pi * 100 * time_s)  # 100 Hz: four whole periods a frame
    expected = 20 * np.log10(amplitude / np.sqrt(2))
    assert loudness_db(speech) == pytest.approx(np.full(5, expected), abs=1e-9)


@pytest.mark.parametrize(
    ("num_samples", "num_frames"), [(0, 0), (1, 1), (640, 1), (641, 2), (6400, 10)]
)
def test_loudness_has_one_value_per_begun_frame(num_samples: int, num_frames: int) -> None:
    assert len(loudness_db(np.ones(num_samples))) == num_frames


def test_missing_speech_is_silence_and_more_is_left_out() -> None:
    speech = np.ones(2 * SAMPLES_PER_FRAME)
    assert loudness_db(speech, 4).tolist() == [0.0, 0.0, FLOOR_DB, FLOOR_DB]
    assert loudness_db(speech, 1).tolist() == [0.0]


def test_silences_shorter_than_the_limit_do_not_count() -> None:
    loudness = np.full(60, -20.0)
    loudness[5:12] = -70.0  # 7 frames = 0.28 s
    loudness[30:38] = -70.0  # 8 frames = 0.32 s
    assert np.flatnonzero(silent_frames(loudness)).tolist() == list(range(30, 38))
    assert np.flatnonzero(silent_frames(loudness, min_s=0.28)).tolist() == [
        *range(5, 12),
        *range(30, 38),
    ]
    opening = np.linspace(0, 1, 60)
    assert opening_in_silence(opening, loudness) == pytest.approx(opening[30:38].mean())


def test_silence_reaches_the_ends_and_the_threshold_is_relative() -> None:
    loudness = np.concatenate([np.full(10, -60.0), np.full(40, -20.0), np.full(10, -60.0)])
    assert silent_frames(loudness).sum() == 20
    assert silent_frames(loudness, threshold_db=-65.0).sum() == 0
    assert silent_frames(loudness - 15).sum() == 20


def test_no_silence_and_nothing_but_silence() -> None:
    assert np.isnan(opening_in_silence(np.ones(50), np.full(50, -20.0)))
    assert opening_in_silence(np.full(50, 0.25), np.full(50, FLOOR_DB)) == 0.25
    assert silent_frames([]).shape == (0,)


def test_summary() -> None:
    result = summary([1.0, 2.0, float("nan"), 4.0])
    assert result == {
        "mean": 2.3333,
        "sd": 1.5275,
        "min": 1.0,
        "max": 4.0,
        "num": 3,
        "num_undefined": 1,
    }
    assert summary([float("nan")])["mean"] is None
    assert summary([2.0])["sd"] == 0.0
