"""All measures of one video: pieces equal the whole."""

from __future__ import annotations

import numpy as np
import pytest

from rest_lightning.constants import SAMPLES_PER_FRAME
from rest_lightning.metrics.drift import background_drift
from rest_lightning.metrics.lips import loudness_db, opening_in_silence, pearson, spearman
from rest_lightning.metrics.mouth import MouthOpeningEstimator, mouth_opening
from rest_lightning.metrics.video import VideoScores, loudness_scores


def video(num: int = 120) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num, 64, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize("pieces", [[120], [24] * 5, [1, 7, 40, 72]])
def test_pieces_equal_the_whole(pieces: list[int]) -> None:
    model, frames = MouthOpeningEstimator((4, 4, 8, 8, 8), hidden=8).eval(), video()
    speech = np.random.default_rng(1).normal(size=120 * SAMPLES_PER_FRAME) * 0.1
    speech[40 * SAMPLES_PER_FRAME : 60 * SAMPLES_PER_FRAME] = 0
    true = np.random.default_rng(2).random(130)
    scores = VideoScores(estimator=model)
    for piece in np.split(frames, np.cumsum(pieces)[:-1]):
        scores.update(piece)
    result = scores.compute(speech, true)
    opening = mouth_opening(frames, model)
    loudness = loudness_db(speech)
    assert result["lip_correlation"] == pytest.approx(pearson(opening, true[:120]), abs=1e-5)
    assert result["lip_correlation_q3"] == pytest.approx(
        pearson(opening[60:90], true[60:90]), abs=1e-5
    )
    assert result["loudness_rank_correlation"] == pytest.approx(
        spearman(opening, loudness), abs=0.02
    )
    assert result["opening_in_silence"] == pytest.approx(
        opening_in_silence(opening, loudness), abs=1e-5
    )
    assert result["silent_share"] == pytest.approx(20 / 120)
    assert result["background_drift"] == pytest.approx(
        background_drift(frames[0], frames[100:]), abs=1e-6
    )
    whole = VideoScores(estimator=model)
    whole.update(frames)
    assert result == pytest.approx(whole.compute(speech, true), abs=1e-4)


def test_without_speech_and_truth_their_numbers_are_absent() -> None:
    scores = VideoScores(estimator=MouthOpeningEstimator((4, 4, 8, 8, 8), hidden=8).eval())
    scores.update(video(30))
    assert not [name for name in scores.compute() if "lip" in name or "loud" in name]


def test_no_frames_at_all() -> None:
    scores = VideoScores()
    scores.update(video(0))
    assert all(np.isnan(value) for value in scores.compute().values())


def test_a_mouth_that_follows_loudness() -> None:
    loudness = np.concatenate([np.full(20, -70.0), np.linspace(-40, -15, 60)])
    opening = np.clip((loudness + 45) / 30, 0, 1)
    result = loudness_scores(opening, loudness)
    assert result["loudness_rank_correlation"] == pytest.approx(1.0)
    assert result["opening_in_silence"] == 0
    assert result["opening_in_speech"] > 0.4
    assert result["silent_share"] == 0.25
