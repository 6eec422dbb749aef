"""Mouth curves from timed phonemes: viseme targets blended by co-articulation, sampled at the video
frames.

Each phoneme has a target shape; the shape at time t is the average of the targets, weighted by a
Gaussian around t integrated over each phoneme's interval (co-articulation; sigma 35 ms, decided
here). A closed-lip sound (m, b, p) additionally presses the lips together completely, since a blend
alone never reaches zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rest_lightning.constants import FPS, SAMPLES_PER_FRAME
from rest_lightning.data.synthetic.track import Curve
from rest_lightning.data.synthetic.voice import Phoneme

SIGMA_S = 0.035
"""Reach of co-articulation: standard deviation of the Gaussian over phoneme times."""

_RAMP_S = 0.045  # time in which lips part after a closure or meet before one
_MIN_CLOSURE_S = 0.044  # a little over one frame, so that some frame centre lies in every closure
_CLOSED_LIPS = frozenset("mbpɱ")


class Viseme(NamedTuple):
    """Target shape of one sound, in the ranges of FaceTrack, and its weight in the blend."""

    opening: float
    width: float
    rounding: float
    tongue: float
    weight: float


_SILENCE = Viseme(0.0, 0.0, 0.0, 0.0, 1.0)
_CLOSED = Viseme(0.0, 0.0, 0.0, 0.0, 4.0)
_LIP_TEETH = Viseme(0.06, 0.15, 0.0, 0.0, 1.6)
_TONGUE_TIP = Viseme(0.26, 0.15, 0.0, 0.9, 0.6)
_BACK_STOP = Viseme(0.30, 0.05, 0.0, 0.1, 0.5)

_VISEMES: dict[str, Viseme] = {
    **dict.fromkeys(_CLOSED_LIPS, _CLOSED),
    **dict.fromkeys("fvʋ", _LIP_TEETH),
    "β": Viseme(0.10, 0.0, 0.1, 0.0, 1.5),
    **dict.fromkeys("θð", Viseme(0.26, 0.15, 0.0, 1.0, 0.8)),
    **dict.fromkeys("tdnlɫɾɬ", _TONGUE_TIP),
    **dict.fromkeys("szɕʑ", Viseme(0.14, 0.45, 0.0, 0.6, 0.8)),
    **dict.fromkeys("ʃʒʂʐ", Viseme(0.22, -0.35, 0.65, 0.4, 0.9)),
    **dict.fromkeys("kɡgŋxɣχhɦʔqcɟç", _BACK_STOP),
    **dict.fromkeys("ɹrʁʀɻ", Viseme(0.28, -0.25, 0.45, 0.3, 0.7)),
    **dict.fromkeys("wʍɥ", Viseme(0.14, -0.75, 1.0, 0.0, 1.2)),
    **dict.fromkeys("jʝʎɲ", Viseme(0.28, 0.6, 0.0, 0.3, 0.7)),
    **dict.fromkeys("aɑ", Viseme(1.0, 0.1, 0.0, 0.0, 1.0)),
    **dict.fromkeys("æ", Viseme(0.92, 0.45, 0.0, 0.0, 1.0)),
    **dict.fromkeys("ʌɐ", Viseme(0.75, 0.05, 0.0, 0.0, 1.0)),
    **dict.fromkeys("ɛ", Viseme(0.68, 0.5, 0.0, 0.0, 1.0)),
    **dict.fromkeys("e", Viseme(0.52, 0.65, 0.0, 0.05, 1.0)),
    **dict.fromkeys("i", Viseme(0.34, 1.0, 0.0, 0.15, 1.0)),
    **dict.fromkeys("ɪɨ", Viseme(0.42, 0.7, 0.0, 0.1, 1.0)),
    **dict.fromkeys("əɚɘᵻ", Viseme(0.45, 0.0, 0.0, 0.0, 0.9)),
    **dict.fromkeys("ɜɝ", Viseme(0.50, -0.1, 0.25, 0.0, 1.0)),
    **dict.fromkeys("ɔɒ", Viseme(0.78, -0.35, 0.6, 0.0, 1.0)),
    **dict.fromkeys("o", Viseme(0.55, -0.6, 0.85, 0.0, 1.0)),
    **dict.fromkeys("uʊ", Viseme(0.28, -0.9, 1.0, 0.0, 1.0)),
    **dict.fromkeys("yʏøœ", Viseme(0.32, -0.6, 0.95, 0.05, 1.0)),
}
_VOWELS = frozenset("aɑæʌɐɛeiɪɨəɚɘᵻɜɝɔɒouʊyʏøœ")
_UNKNOWN = Viseme(0.30, 0.0, 0.0, 0.1, 0.5)  # a sound of a language that the table does not know


@dataclass(frozen=True)
class MouthCurves:
    """Mouth part of a FaceTrack; every array is float32 (F,) in the ranges that FaceTrack
    states.
    """

    opening: Curve
    width: Curve
    rounding: Curve
    tongue: Curve


def frame_centres_s(num_frames: int) -> NDArray[np.float64]:
    """Middle of each frame's 40 ms of audio, in seconds."""
    return (np.arange(num_frames) + 0.5) / FPS


def visemes_of(ipa: str) -> list[Viseme]:
    """Targets of one phoneme in order: one, or two and more for diphthongs and affricates. "" is
    silence.

    A stressed vowel (ˈ) opens 10 % wider, at most 1.
    """
    symbols = [symbol for symbol in ipa if symbol in _VISEMES]
    if not symbols:
        return [_UNKNOWN if any(symbol.isalpha() for symbol in ipa) else _SILENCE]
    gain = 1.1 if "ˈ" in ipa else 1.0
    return [
        _VISEMES[s]._replace(opening=min(1.0, gain * _VISEMES[s].opening))
        if s in _VOWELS
        else _VISEMES[s]
        for s in symbols
    ]


def lip_closures_s(phonemes: Sequence[Phoneme]) -> list[tuple[float, float]]:
    """Intervals (start, end) in seconds in which the lips touch because of m, b or p.

    The lips are shut while an m hums and before a p bursts: espeak-ng puts the mark of a stop at
    its burst and leaves the silence of the closure to the sound before it, except for a long b,
    which begins with its murmur.
    """
    closures = []
    for phoneme in phonemes:
        first = next((symbol for symbol in phoneme.ipa if symbol.isalpha()), "")
        if first not in _CLOSED_LIPS:
            continue
        start, end = phoneme.start_s, phoneme.end_s
        if first in "mɱ":
            interval = (start, max(end - 0.015, start))
        elif first == "b" and end - start > 0.05:
            interval = (start - 0.005, end - 0.025)
        else:
            interval = (start - 0.04, start + 0.012)
        missing = max(0.0, _MIN_CLOSURE_S - (interval[1] - interval[0]))
        closures.append((interval[0] - missing / 2, interval[1] + missing / 2))
    return closures


def mouth_curves(
    phonemes: Sequence[Phoneme], audio: NDArray[np.float32], num_frames: int
) -> MouthCurves:
    """Mouth shape at each frame centre.

    Args:
        phonemes: timed phonemes; time not covered by any is silence.
        audio: the speech (16 kHz); loud sounds open up to 10 % wider and soft ones up to 20 % less.
            Times beyond its end count as silent.
        num_frames: F.

    Returns:
        Curves (F,): opening is exactly 0 in every closure of m, b and p and in silence longer than
            about 0.2 s.
    """
    times = frame_centres_s(num_frames)
    shape, share = _blend(times, phonemes)
    opening, width, rounding, tongue = shape.T
    opening = opening * (0.8 + 0.3 * loudness(audio, num_frames))
    # A tail of the Gaussian must not keep the lips apart in silence.
    opening = np.clip(opening * np.clip((share - 0.03) / 0.3, 0.0, 1.0), 0.0, 1.0)
    for start, end in lip_closures_s(phonemes):
        distance = np.maximum(np.maximum(start - times, times - end), 0.0)
        part = np.clip(distance / _RAMP_S, 0.0, 1.0)
        opening = opening * part * part * (3.0 - 2.0 * part)
    return MouthCurves(*(curve.astype(np.float32) for curve in (opening, width, rounding, tongue)))


def loudness(audio: NDArray[np.float32], num_frames: int) -> NDArray[np.float64]:
    """Loudness of each frame in [0, 1]: smoothed level relative to the loudest 5 % of the clip; 0
    where silent.
    """
    padded = np.zeros(num_frames * SAMPLES_PER_FRAME)
    padded[: min(len(audio), len(padded))] = audio[: len(padded)]
    level = np.sqrt(np.mean(padded.reshape(num_frames, SAMPLES_PER_FRAME) ** 2, axis=1))
    level = np.convolve(np.pad(level, 1, mode="edge"), (0.25, 0.5, 0.25), mode="valid")
    top = float(np.percentile(level, 95))
    return np.sqrt(np.clip(level / top, 0.0, 1.0)) if top > 1e-5 else np.zeros(num_frames)


def _blend(
    times: NDArray[np.float64], phonemes: Sequence[Phoneme]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weighted targets (F, 4) at the times, and the share (F,) of sound, not silence, under the
    Gaussian.
    """
    from scipy.special import ndtr

    starts, ends, targets, weights = [], [], [], []
    for phoneme in phonemes:
        shapes = visemes_of(phoneme.ipa)
        if shapes[0] is _SILENCE:
            continue
        # The first part of a diphthong lasts a little longer than the glide.
        cuts = np.linspace(0.0, 1.0, len(shapes) + 1) ** (0.8 if len(shapes) > 1 else 1.0)
        edges = phoneme.start_s + cuts * (phoneme.end_s - phoneme.start_s)
        for shape, start, end in zip(shapes, edges[:-1], edges[1:], strict=True):
            starts.append(start)
            ends.append(end)
            targets.append(shape[:4])
            weights.append(shape.weight)
    if not starts:
        return np.zeros((len(times), 4)), np.zeros(len(times))
    upper = ndtr((np.array(ends)[None] - times[:, None]) / SIGMA_S)
    mass = upper - ndtr((np.array(starts)[None] - times[:, None]) / SIGMA_S)  # (F, phonemes)
    share = np.minimum(mass.sum(axis=1), 1.0)
    weighted = mass * np.array(weights)[None]
    total = weighted.sum(axis=1) + (1.0 - share) * _SILENCE.weight
    return weighted @ np.array(targets) / np.maximum(total, 1e-9)[:, None], share
