"""The means that a result row is made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rest_lightning.constants import SAMPLES_PER_FRAME
from rest_lightning.errors import UserError
from rest_lightning.metrics import video
from rest_lightning.metrics.drift import DriftTracker
from rest_lightning.metrics.lips import motion_in_silence_per_s
from rest_lightning.metrics.mouth import MouthOpeningEstimator
from rest_lightning.metrics.reconstruction import ReconstructionScores
from rest_lightning.metrics.sums import MeanMetric
from rest_lightning.metrics.video import TalkingScores, VideoScores


def clip(num_frames: int, seed: int = 0, side: int = 32) -> np.ndarray:
    rng = np.random.default_rng(seed)
    base = rng.integers(40, 200, (1, side, side, 3))
    return np.clip(base + rng.integers(-20, 20, (num_frames, side, side, 3)), 0, 255).astype(
        np.uint8
    )


def test_means_leave_out_what_is_not_defined_and_say_so() -> None:
    metric = MeanMetric(("a", "b", "c"))
    with pytest.raises(UserError, match="at least 1 clip for a, got none"):
        metric.compute()
    metric.update({"a": 1.0, "b": 2.0, "other": 9.0})
    metric.update({"a": 4.0, "b": float("nan")})
    result = metric.compute()
    assert float(result["a"]) == 2.5 and float(result["b"]) == 2.0 and bool(result["c"].isnan())
    assert metric.notes() == ["b: mean over 1 of 2 clips"] and set(result) == {"a", "b", "c"}


@pytest.mark.parametrize("chunk_frames", [8, 24])
def test_talking_scores_are_means_of_video_scores(chunk_frames: int) -> None:
    estimator = MouthOpeningEstimator((2, 2, 2, 2, 2), 4).eval()
    metric = TalkingScores(chunk_frames=chunk_frames, estimator=estimator)
    singles = []
    for seed in range(2):
        frames = clip(60, seed)
        audio = np.random.default_rng(seed).normal(0, 0.1, 60 * SAMPLES_PER_FRAME)
        audio[: 30 * SAMPLES_PER_FRAME] = 0
        truth = np.random.default_rng(seed).random(60)
        scores = VideoScores(chunk_frames=chunk_frames, estimator=estimator)
        scores.update(frames)
        singles.append(scores.compute(audio, truth))
        metric.update(torch.from_numpy(frames), torch.from_numpy(audio), truth)
        with pytest.raises(UserError, match="true opening for each of the 60 frames, got 59"):
            metric.update(frames, audio, truth[:59])
    result = metric.compute()
    assert set(result) == set(video.KEYS) and int(metric.num_clips) == 2
    for key, value in result.items():
        name = "jump_ratio_chunk" if key == "seam_ratio" else key
        assert float(value) == pytest.approx(
            np.mean([single[name] for single in singles]), nan_ok=True
        ), key
    assert not result["opening_error"].isnan() and not result["lip_motion_in_silence_per_s"].isnan()


def test_lip_motion_counts_in_silence_alone() -> None:
    loudness = np.full(40, -20.0)
    loudness[10:30] = -75.0
    opening = np.zeros(40)
    opening[::2] = 1.0  # every step is 1
    opening[12:28] = 0.25
    silent_steps = np.abs(np.diff(opening[10:30]))
    assert motion_in_silence_per_s(opening, loudness) == pytest.approx(silent_steps.mean() * 25)
    assert motion_in_silence_per_s(np.zeros(40), loudness) == 0.0
    assert np.isnan(motion_in_silence_per_s(opening, np.full(40, -20.0)))


def test_minutes_of_a_long_video_drift() -> None:
    """Two minutes and a half: red grows from minute to minute, and the picture blurs."""
    tracker = DriftTracker()
    for second in range(150):
        level = 100 + (0 if second < 60 else 20 if second < 120 else 40)
        frames = np.full((25, 4, 4, 3), 100, np.uint8)
        frames[..., 0] = level
        tracker.update(frames)
    tracker.compute()
    minutes = tracker.colour_lab_by_minute()
    assert (
        len(minutes) == 3
        and minutes[0] == pytest.approx(0, abs=1e-9)
        and 5 < minutes[1] < minutes[2]
    )
    scores = VideoScores(estimator=MouthOpeningEstimator((2, 2, 2, 2, 2), 4).eval())
    sharp, flat = clip(100, side=16), np.full((100, 16, 16, 3), 90, np.uint8)
    for piece in (sharp, flat):
        scores.update(piece)
    numbers = scores.compute()
    assert numbers["sharpness_change_per_minute"] < 0 and len(scores.by_minute()["sharpness"]) == 1
    short = VideoScores(estimator=scores.estimator)
    short.update(sharp[:49])
    assert np.isnan(short.compute()["sharpness_change_per_minute"])


def test_reconstruction_equals_torchmetrics() -> None:
    from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

    scores, psnr, ssim = ReconstructionScores(), [], []
    for seed in range(2):
        truth = torch.from_numpy(clip(18, seed))
        noisy = (
            (truth.float() + torch.randn(truth.shape) * (5 + seed))
            .round()
            .clamp(0, 255)
            .to(torch.uint8)
        )
        scores.update(noisy, truth)
        images = [x.permute(0, 3, 1, 2).double() for x in (noisy, truth)]
        psnr.append(float(PeakSignalNoiseRatio(data_range=255.0)(*images)))
        ssim.append(float(StructuralSimilarityIndexMeasure(data_range=255.0)(*images)))
    result = scores.compute()
    assert set(result) == {"psnr_db", "ssim"}
    assert float(result["psnr_db"]) == pytest.approx(np.mean(psnr), rel=1e-5)
    assert float(result["ssim"]) == pytest.approx(np.mean(ssim), rel=1e-4)
    with pytest.raises(UserError, match="two videos of one shape"):
        scores.update(truth, truth[:3])
    with pytest.raises(UserError, match="at least 11 pixels"):
        scores.update(truth[:, :8], truth[:, :8])


def test_lpips_is_a_mean_over_frames() -> None:
    class Difference(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            assert float(a.min()) >= -1 and float(a.max()) <= 1
            return (a - b).abs().mean(dim=(1, 2, 3), keepdim=True)

    frames, truth = clip(20), clip(20, 1)
    scores = ReconstructionScores(Difference())
    scores.update(frames, truth)
    expected = np.abs(frames.astype(float) - truth.astype(float)).mean() / 127.5
    assert float(scores.compute()["lpips"]) == pytest.approx(expected, rel=1e-5)
