"""Do the lips follow the speech? Correlations of mouth opening with its truth and with loudness.

Pure functions over numpy arrays; :class:`rest_lightning.metrics.video.TalkingScores` is the
torchmetrics class.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rest_lightning.constants import FPS, SAMPLES_PER_FRAME

FLOOR_DB = -80.0  # of loudness: digital silence is not minus infinity
SILENCE_BELOW_PEAK_DB = 35.0
MIN_SILENCE_S = 0.3
MAX_LAG_FRAMES = 6


@dataclass(frozen=True)
class LaggedCorrelation:
    """Correlation of two curves.

    Attributes:
        zero_lag: as they are: the number to report.
        best: the largest over all lags, never to be reported alone.
        best_lag_frames: its lag; positive when the estimate comes late.
    """

    zero_lag: float
    best: float
    best_lag_frames: int


def pearson(a: ArrayLike, b: ArrayLike) -> float:
    """Returns the Pearson correlation of two curves (n,).

    NaN when one of them is constant or has fewer than two values.

    Raises:
        ValueError: curves of different lengths.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(
            f"expected two curves of one length, got shapes {x.shape} and {y.shape}: "
            "cut the longer one"
        )
    if len(x) < 2:
        return float("nan")
    x, y = x - x.mean(), y - y.mean()
    norm = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum() / norm) if norm > 1e-12 else float("nan")


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Returns the rank correlation of two curves (n,).

    Equal values share their mean rank. NaN as in :func:`pearson`.
    """
    from scipy.stats import rankdata

    return pearson(rankdata(np.asarray(a)), rankdata(np.asarray(b)))


def lip_correlation(estimated: ArrayLike, true: ArrayLike, rank: bool = False) -> LaggedCorrelation:
    """Returns the correlation of two curves (n,) of one clip at lag zero, and the best one over
    lags of up to 6 frames both ways.

    Args:
        estimated: for example the mouth opening read from generated frames.
        true: for example the true opening, or the loudness of the speech.
        rank: rank correlation instead of Pearson's.
    """
    correlate = spearman if rank else pearson
    a, b = np.asarray(estimated, dtype=np.float64), np.asarray(true, dtype=np.float64)
    zero = correlate(a, b)
    best, best_lag = zero, 0
    for lag in range(-MAX_LAG_FRAMES, MAX_LAG_FRAMES + 1):
        if lag == 0 or len(a) - abs(lag) < 2:
            continue
        value = correlate(a[lag:], b[:-lag]) if lag > 0 else correlate(a[:lag], b[-lag:])
        if not np.isnan(value) and (np.isnan(best) or value > best):
            best, best_lag = value, lag
    return LaggedCorrelation(zero, best, best_lag)


def by_quarter(estimated: ArrayLike, true: ArrayLike) -> list[float]:
    """Returns the Pearson correlation in each quarter of a clip: does it hold to the end?"""
    a, b = np.asarray(estimated), np.asarray(true)
    edges = np.linspace(0, len(a), 5).round().astype(int)
    return [pearson(a[low:high], b[low:high]) for low, high in pairwise(edges)]


def loudness_db(samples: ArrayLike, num_frames: int | None = None) -> NDArray[np.float64]:
    """Root mean square of the speech of each video frame, in dB of full scale, -80 at least.

    Args:
        samples: (n,) 16 kHz mono in [-1, 1]; frame k hears samples [640k, 640(k+1)).
        num_frames: length of the result; None takes every frame that has begun. Missing speech is
            silence.
    """
    speech = np.asarray(samples, dtype=np.float64)
    count = -(-len(speech) // SAMPLES_PER_FRAME) if num_frames is None else num_frames
    padded = np.zeros(count * SAMPLES_PER_FRAME)
    length = min(len(speech), len(padded))
    padded[:length] = speech[:length]
    power = np.square(padded).reshape(count, SAMPLES_PER_FRAME).mean(axis=1)
    return 10.0 * np.log10(np.maximum(power, 10.0 ** (FLOOR_DB / 10.0)))


def silent_frames(
    loudness: ArrayLike, threshold_db: float | None = None, min_s: float = MIN_SILENCE_S
) -> NDArray[np.bool_]:
    """Frames (n,) within a silence of at least ``min_s`` seconds.

    Args:
        loudness: (n,) dB per frame, see :func:`loudness_db`.
        threshold_db: quieter is silent; None takes 35 dB below the loud frames (their 95th
            percentile).
        min_s: shorter pauses, such as those before a plosive, are no silences.
    """
    level = np.asarray(loudness, dtype=np.float64)
    mask = np.zeros(len(level), dtype=bool)
    if not len(level):
        return mask
    if threshold_db is None:
        threshold_db = float(np.percentile(level, 95)) - SILENCE_BELOW_PEAK_DB
    # Speech that is digital silence throughout has no loud frames: all of it is silent.
    quiet = (level < threshold_db) | (level <= FLOOR_DB)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], quiet, [False])).astype(np.int8)))
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        if end - start >= min_s * FPS - 1e-9:
            mask[start:end] = True
    return mask


def opening_in_silence(opening: ArrayLike, loudness: ArrayLike) -> float:
    """Returns the mean opening within silences (see :func:`silent_frames`), NaN without any."""
    mask = silent_frames(loudness)
    return float(np.asarray(opening)[mask].mean()) if mask.any() else float("nan")


def motion_in_silence_per_s(opening: ArrayLike, loudness: ArrayLike) -> float:
    """Returns how far the lips travel in a second of silence (see :func:`silent_frames`).

    0 is still; NaN without any silence.

    Args:
        opening: (n,) in [0, 1]; a step counts when both of its frames are silent.
        loudness: (n,) dB per frame.
    """
    mask = silent_frames(loudness)
    steps = np.abs(np.diff(np.asarray(opening, dtype=np.float64)))[mask[1:] & mask[:-1]]
    return float(steps.mean() * FPS) if len(steps) else float("nan")


def summary(values: Iterable[float]) -> dict[str, float | int | None]:
    """Mean, sd (n - 1), min and max over clips, ``num`` of them; NaN values are left out and
    counted.
    """
    given = np.array(list(values), dtype=np.float64)
    known = given[~np.isnan(given)]
    result: dict[str, float | int | None] = dict.fromkeys(("mean", "sd", "min", "max"))
    if len(known):
        sd = float(known.std(ddof=1)) if len(known) > 1 else 0.0
        result = {
            "mean": float(known.mean()),
            "sd": sd,
            "min": float(known.min()),
            "max": float(known.max()),
        }
        result = {key: round(float(value), 4) for key, value in result.items() if value is not None}
    return {**result, "num": len(known), "num_undefined": len(given) - len(known)}
