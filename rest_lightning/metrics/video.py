"""Every measure of one talking video that arrives piece by piece, in bounded memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rest_lightning.constants import FPS, TEMPORAL_RATIO
from rest_lightning.errors import UserError
from rest_lightning.metrics.drift import DriftTracker
from rest_lightning.metrics.image import BorderJumps, sharpness
from rest_lightning.metrics.lips import (
    by_quarter,
    lip_correlation,
    loudness_db,
    motion_in_silence_per_s,
    opening_in_silence,
    silent_frames,
    spearman,
)
from rest_lightning.metrics.mouth import MouthOpeningEstimator, mouth_opening, shipped_estimator
from rest_lightning.metrics.sums import Frames, MeanMetric, check_clip

CHUNK_FRAMES = 3 * TEMPORAL_RATIO
_SHARPNESS_EVERY = 12  # frames; half a second apart is plenty for a mean


class VideoScores:
    """Takes in frames, gives numbers by name. What a name means stands in benchmarks/README.md.

    Args:
        first_frame: internal number of the first frame: 1 for what a session emits, 0 for clips and
            reconstructions.
        chunk_frames: period of chunk borders.
        estimator: of the mouth's opening; None takes the one that ships with the package.
    """

    def __init__(
        self,
        first_frame: int = 1,
        chunk_frames: int = CHUNK_FRAMES,
        estimator: MouthOpeningEstimator | None = None,
    ) -> None:
        self.chunk_frames, self.estimator = chunk_frames, estimator
        self._jumps = BorderJumps(first_frame)
        self._drift = DriftTracker()
        self._openings: list[NDArray[np.float32]] = []
        self._sharpness: list[float] = []
        self._num_frames = 0

    @property
    def opening(self) -> NDArray[np.float32]:
        """Mouth opening read from every frame so far, (n,) in [0, 1]."""
        return np.concatenate([np.zeros(0, np.float32), *self._openings])

    def update(self, frames: NDArray[np.uint8]) -> None:
        """Take in the next frames, uint8 (n, H, W, 3)."""
        if not len(frames):
            return
        self._openings.append(mouth_opening(frames, self.estimator))
        self._jumps.update(frames)
        self._drift.update(frames)
        chosen = frames[-self._num_frames % _SHARPNESS_EVERY :: _SHARPNESS_EVERY]
        self._sharpness += [sharpness(frame[None]) for frame in chosen]
        self._num_frames += len(frames)

    def compute(
        self, speech: ArrayLike | None = None, true_opening: ArrayLike | None = None
    ) -> dict[str, float]:
        """All numbers; NaN where one is not defined. Call it once, when the video is complete.

        Args:
            speech: (samples,) 16 kHz mono that the video speaks; adds what needs loudness.
            true_opening: (n,) of the renderer; adds what needs the truth. Longer curves than the
                video are cut.
        """
        opening, drift = self.opening, self._drift.compute()
        scores = {
            "jump_ratio_latent": self._jumps.compute(TEMPORAL_RATIO),
            "jump_ratio_chunk": self._jumps.compute(self.chunk_frames),
            "jump_ratio_chunk_inner": self._jumps.compute(self.chunk_frames, TEMPORAL_RATIO),
            "background_drift": drift.background,
            "colour_drift_lab_per_minute": drift.colour_lab_per_minute,
            "sharpness": float(np.mean(self._sharpness)) if self._sharpness else float("nan"),
            "sharpness_change_per_minute": self._sharpness_change(),
            "opening_mean": float(opening.mean()) if len(opening) else float("nan"),
            "opening_sd": float(opening.std()) if len(opening) else float("nan"),
        }
        if true_opening is not None:
            true = np.asarray(true_opening, dtype=np.float64)[: len(opening)]
            lips = lip_correlation(opening, true)
            scores |= {
                "lip_correlation": lips.zero_lag,
                "lip_correlation_best": lips.best,
                "lip_best_lag_frames": float(lips.best_lag_frames),
                "opening_error": float(np.abs(opening - true).mean()),
            }
            scores |= {
                f"lip_correlation_q{i + 1}": value
                for i, value in enumerate(by_quarter(opening, true))
            }
        if speech is not None:
            scores |= loudness_scores(opening, loudness_db(speech, len(opening)))
        return scores

    def by_minute(self) -> dict[str, list[float]]:
        """What drifts, minute by minute, after :meth:`compute`: L*a*b* distance to the first 10 s,
        and sharpness.
        """
        per_minute = 60 * FPS // _SHARPNESS_EVERY
        starts = range(0, len(self._sharpness), per_minute)
        sharp = [float(np.mean(self._sharpness[start : start + per_minute])) for start in starts]
        return {"colour_lab": self._drift.colour_lab_by_minute(), "sharpness": sharp}

    def _sharpness_change(self) -> float:
        """Slope of a line through the sharpness of all frames looked at; NaN below two seconds."""
        if self._num_frames < 2 * FPS:
            return float("nan")
        minutes = np.arange(len(self._sharpness)) * _SHARPNESS_EVERY / (60.0 * FPS)
        return float(np.polyfit(minutes, self._sharpness, 1)[0])

    @property
    def background_by_second(self) -> list[float]:
        """Background drift of every second, after :meth:`compute`."""
        return self._drift.compute().background_by_second


def loudness_scores(
    opening: NDArray[np.floating], loudness: NDArray[np.float64]
) -> dict[str, float]:
    """How opening follows loudness, for speech whose true mouth nobody knows.

    Args:
        opening: (n,) in [0, 1].
        loudness: (n,) dB per frame.
    """
    silent = silent_frames(loudness)
    lagged = lip_correlation(opening, loudness, rank=True)
    quarters = [np.asarray(part) for part in np.array_split(np.arange(len(opening)), 4)]
    scores = {
        "loudness_rank_correlation": lagged.zero_lag,
        "loudness_best_lag_frames": float(lagged.best_lag_frames),
        "opening_in_silence": opening_in_silence(opening, loudness),
        "lip_motion_in_silence_per_s": motion_in_silence_per_s(opening, loudness),
        "opening_in_speech": float(opening[~silent].mean()) if (~silent).any() else float("nan"),
        "silent_share": float(silent.mean()) if len(silent) else float("nan"),
    }
    for i, part in enumerate(quarters):
        scores[f"loudness_rank_correlation_q{i + 1}"] = spearman(opening[part], loudness[part])
    return scores


# -- scores of talking -----------------------------------------------------------------------------
# Means over clips of what :class:`rest_lightning.metrics.video.VideoScores` measures of one.

_SEAM = "seam_ratio"  # a row's name for VideoScores' jump_ratio_chunk
KEYS = (
    "jump_ratio_latent",
    _SEAM,
    "background_drift",
    "colour_drift_lab_per_minute",
    "sharpness",
    "sharpness_change_per_minute",
    "opening_mean",
    "opening_sd",
    "opening_in_silence",
    "lip_motion_in_silence_per_s",
    "loudness_rank_correlation",
    "opening_error",
    "lip_correlation",
    "lip_best_lag_frames",
)


class TalkingScores(MeanMetric):
    """Seams, drift, sharpness, lips in silence, and on synthetic talkers the true lip error.

    Args:
        first_frame: internal number of the first frame: 1 for what a session emits, 0 for whole
            clips.
        chunk_frames: period of chunk borders.
        estimator: of the mouth's opening; None takes the one that ships with the package.
    """

    def __init__(
        self,
        first_frame: int = 1,
        chunk_frames: int = CHUNK_FRAMES,
        estimator: MouthOpeningEstimator | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(KEYS, shipped_estimator() if estimator is None else estimator, **kwargs)
        self.first_frame, self.chunk_frames = first_frame, chunk_frames

    def update(  # type: ignore[override]
        self, frames: Frames, audio: ArrayLike | None = None, true_opening: ArrayLike | None = None
    ) -> None:
        """One clip.

        Args:
            frames: uint8 (n, H, W, 3).
            audio: (samples,) 16 kHz mono in [-1, 1]; adds what needs loudness. Missing speech is
                silence.
            true_opening: (n,) or longer; adds what needs the truth.

        Raises:
            UserError: no such frames, or fewer true openings than frames.
        """
        clip = check_clip(frames).cpu().numpy()
        speech = None if audio is None else _array(audio)
        truth = None if true_opening is None else _array(true_opening)
        if truth is not None and len(truth) < len(clip):
            raise UserError(
                f"expected a true opening for each of the {len(clip)} frames, got {len(truth)}: "
                "cut the video"
            )
        scores = VideoScores(self.first_frame, self.chunk_frames, self.extractor)
        scores.update(clip)
        self.add(row_scores(scores, speech, truth))


def row_scores(
    scores: VideoScores, audio: np.ndarray | None, true_opening: np.ndarray | None
) -> dict[str, float]:
    """The numbers of one clip under their keys in a result row; arguments as those of
    :meth:`VideoScores.compute`.
    """
    numbers = scores.compute(audio, true_opening)
    return {**numbers, _SEAM: numbers["jump_ratio_chunk"]}


def _array(values: Any) -> np.ndarray:
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
