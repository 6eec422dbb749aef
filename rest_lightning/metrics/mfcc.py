"""MFCC as SyncNet's authors compute them: equal to ``python_speech_features.mfcc`` with its defaults.

25 ms windows without a window function, every 10 ms, a 512-point DFT, 26 triangular filters with corners on whole bins
(HTK mel scale), an orthonormal DCT-II, a lifter of 22, and the log energy as the first of 13 coefficients.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rest_lightning.constants import SAMPLE_RATE
from rest_lightning.errors import UserError

NUM_CEPSTRA = 13
_WINDOW, _HOP, _NUM_FFT, _NUM_FILTERS, _LIFTER, _PREEMPHASIS = 400, 160, 512, 26, 22, 0.97
_EPS = float(np.finfo(np.float64).eps)


def to_int16(audio: ArrayLike) -> NDArray[np.int16]:
    """Samples in [-1, 1] to 16 bits, as a 16-bit wav file holds them; louder ones are clipped."""
    return np.clip(np.rint(np.asarray(audio, dtype=np.float64) * 32768.0), -32768, 32767).astype(np.int16)


def mfcc(samples: ArrayLike) -> NDArray[np.float64]:
    """Coefficients (steps, 13), 100 a second, of 16 kHz mono samples (n,); the last window is padded with zeros.

    Args:
        samples: at the scale of 16-bit integers (what SyncNet was trained on), see :func:`to_int16`.

    Raises:
        UserError: no samples, or samples that are not numbers.
    """
    signal = np.asarray(samples, dtype=np.float64)
    if signal.ndim != 1 or not len(signal):
        raise UserError(f"expected mono speech of at least one sample, got shape {signal.shape}: give the clip's audio")
    if not np.isfinite(signal).all():
        raise UserError("expected numbers as samples, got NaN or infinity: export the audio again")
    emphasised = np.concatenate([signal[:1], signal[1:] - _PREEMPHASIS * signal[:-1]])
    num_steps = 1 + max(0, -(-(len(signal) - _WINDOW) // _HOP))
    padded = np.zeros((num_steps - 1) * _HOP + _WINDOW)
    padded[: len(signal)] = emphasised
    windows = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::_HOP]
    power = np.square(np.abs(np.fft.rfft(windows, _NUM_FFT))) / _NUM_FFT
    energy, bands = power.sum(axis=1), power @ _filters().T
    energy[energy == 0] = _EPS
    bands[bands == 0] = _EPS
    cepstra = np.log(bands) @ _transform()
    cepstra[:, 0] = np.log(energy)
    return cepstra


@cache
def _filters() -> NDArray[np.float64]:
    """Triangles (26, 257) between whole bins, equally far apart on the HTK mel scale from 0 to 8000 Hz."""
    mels = np.linspace(0.0, 2595.0 * np.log10(1.0 + SAMPLE_RATE / 2 / 700.0), _NUM_FILTERS + 2)
    corners = np.floor((_NUM_FFT + 1) * 700.0 * (10.0 ** (mels / 2595.0) - 1.0) / SAMPLE_RATE)
    low, peak, high = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    bins = np.arange(_NUM_FFT // 2 + 1)
    rising = np.where((bins >= low) & (bins < peak), (bins - low) / np.maximum(peak - low, 1.0), 0.0)
    falling = np.where((bins >= peak) & (bins < high), (high - bins) / np.maximum(high - peak, 1.0), 0.0)
    return np.asarray(rising + falling)


@cache
def _transform() -> NDArray[np.float64]:
    """Orthonormal DCT-II of 26 values, its first 13 rows, times the lifter: (26, 13)."""
    n, k = np.arange(_NUM_FILTERS)[:, None], np.arange(NUM_CEPSTRA)[None, :]
    basis = np.cos(np.pi * k * (2 * n + 1) / (2 * _NUM_FILTERS)) * np.sqrt(2.0 / _NUM_FILTERS)
    basis[:, 0] /= np.sqrt(2.0)
    return np.asarray(basis * (1.0 + _LIFTER / 2.0 * np.sin(np.pi * k / _LIFTER)))
