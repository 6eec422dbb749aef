"""Means over clips of what :class:`rest_lightning.metrics.video.VideoScores` measures of one."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from rest_lightning.errors import UserError
from rest_lightning.metrics.mouth import MouthOpeningEstimator, shipped_estimator
from rest_lightning.metrics.sums import Frames, MeanMetric, check_clip
from rest_lightning.metrics.video import CHUNK_FRAMES, VideoScores

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
        first_frame: internal number of the first frame: 1 for what a session emits, 0 for whole clips.
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
            audio: (samples,) 16 kHz mono in [-1, 1]; adds what needs loudness. Missing speech is silence.
            true_opening: (n,) or longer; adds what needs the truth.

        Raises:
            UserError: no such frames, or fewer true openings than frames.
        """
        clip = check_clip(frames).cpu().numpy()
        speech = None if audio is None else _array(audio)
        truth = None if true_opening is None else _array(true_opening)
        if truth is not None and len(truth) < len(clip):
            raise UserError(
                f"expected a true opening for each of the {len(clip)} frames, got {len(truth)}: cut the video"
            )
        scores = VideoScores(self.first_frame, self.chunk_frames, self.extractor)
        scores.update(clip)
        self.add(row_scores(scores, speech, truth))


def row_scores(scores: VideoScores, audio: np.ndarray | None, true_opening: np.ndarray | None) -> dict[str, float]:
    """The numbers of one clip under their keys in a result row; arguments as those of :meth:`VideoScores.compute`."""
    numbers = scores.compute(audio, true_opening)
    return {**numbers, _SEAM: numbers["jump_ratio_chunk"]}


def _array(values: Any) -> np.ndarray:
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
