"""What a head does beside speaking: drift, nods, blinks, glances and brows (all numbers decided
here).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rest_lightning.constants import FPS
from rest_lightning.data.synthetic.track import Curve
from rest_lightning.data.synthetic.visemes import frame_centres_s
from rest_lightning.data.synthetic.voice import Phoneme

_SETTLE_S = 1.2  # a clip begins near the neutral pose and leaves it within about this time


@dataclass(frozen=True)
class HeadMotion:
    """Everything of a FaceTrack but the mouth; float32 arrays (F,) under FaceTrack's names."""

    blink: Curve
    gaze_x: Curve
    gaze_y: Curve
    brow_raise: Curve
    yaw_rad: Curve
    pitch_rad: Curve
    roll_rad: Curve
    shift_x: Curve
    shift_y: Curve
    scale: Curve


def head_motion(
    rng: np.random.Generator, num_frames: int, phonemes: Sequence[Phoneme] = ()
) -> HeadMotion:
    """Draw the motion of one clip.

    Yaw stays within about 6 degrees, pitch and roll within 4, shifts within 1.5 % of the image.
    Frame 0, which serves as the reference image, is near the neutral pose with open eyes. Stressed
    phonemes nod and lift the brows a little.
    """
    liveliness = rng.uniform(0.4, 1.0)
    stress = _stress(rng, num_frames, phonemes)

    def drift(amplitude: float, highest_hz: float = 0.7) -> NDArray[np.float64]:
        return liveliness * amplitude * _noise(rng, num_frames, highest_hz)

    degrees = np.pi / 180.0
    gaze_x, gaze_y = _gaze(rng, num_frames)
    curves = {
        "blink": _blinks(rng, num_frames),
        "gaze_x": gaze_x,
        "gaze_y": gaze_y,
        "brow_raise": np.clip(drift(0.25, 0.4) + 0.6 * liveliness * stress, -1.0, 1.0),
        "yaw_rad": drift(6.0 * degrees),
        "pitch_rad": drift(3.5 * degrees) + liveliness * 1.5 * degrees * stress,
        "roll_rad": drift(3.5 * degrees),
        "shift_x": drift(0.014),
        "shift_y": drift(0.010),
        "scale": 1.0 + drift(0.02, 0.3),
    }
    return HeadMotion(**{name: curve.astype(np.float32) for name, curve in curves.items()})


def _noise(rng: np.random.Generator, num_frames: int, highest_hz: float) -> NDArray[np.float64]:
    """Band-limited noise (F,) in [-1, 1]: random sines with amplitude falling as 1/frequency, near
    0 at frame 0.
    """
    times = frame_centres_s(num_frames)
    frequencies = np.exp(rng.uniform(np.log(0.06), np.log(highest_hz), size=6))
    amplitudes = rng.uniform(0.3, 1.0, size=6) / np.sqrt(frequencies)
    phases = rng.uniform(0.0, 2.0 * np.pi, size=6)
    curve = np.sin(2.0 * np.pi * frequencies * times[:, None] + phases) @ (
        amplitudes / amplitudes.sum()
    )
    curve = 1.6 * (curve - 0.9 * curve[0] * np.exp(-times / _SETTLE_S))
    return np.tanh(curve)


def _blinks(rng: np.random.Generator, num_frames: int) -> NDArray[np.float64]:
    """A blink of 0.2 to 0.3 s every 2 to 5 s: fast shut, slower open. Never in the first 0.3 s."""
    times = frame_centres_s(num_frames)
    curve = np.zeros(num_frames)
    peak = 0.45 + rng.uniform(0.0, 3.0)
    while peak < times[-1] + 0.2:
        duration = rng.uniform(0.2, 0.3)
        phase = np.where(
            times < peak, (times - peak) / (0.4 * duration), (times - peak) / (0.6 * duration)
        )
        curve = np.maximum(curve, np.clip(1.35 * (1.0 - phase**2), 0.0, 1.0))
        peak += rng.uniform(2.0, 5.0)
    return curve


def _gaze(
    rng: np.random.Generator, num_frames: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Glances: the eyes rest at a point for 0.8 to 3 s and jump in about two frames, mostly back to
    the viewer.
    """
    x, y = np.zeros(num_frames), np.zeros(num_frames)
    frame = int(rng.uniform(0.6, 2.5) * FPS)
    while frame < num_frames:
        away = rng.random() < 0.5
        x[frame:] = rng.uniform(-0.6, 0.6) if away else rng.normal(0.0, 0.05)
        y[frame:] = rng.uniform(-0.35, 0.35) if away else rng.normal(0.0, 0.05)
        frame += int(rng.uniform(0.5, 1.2) * FPS) if away else int(rng.uniform(0.8, 3.0) * FPS)
    kernel = np.array([0.2, 0.6, 0.2])
    return tuple(np.convolve(np.pad(c, 1, mode="edge"), kernel, mode="valid") for c in (x, y))  # type: ignore[return-value]


def _stress(
    rng: np.random.Generator, num_frames: int, phonemes: Sequence[Phoneme]
) -> NDArray[np.float64]:
    """Bumps (F,) in [0, 1] of 0.4 s on about a third of the stressed phonemes; none at frame 0."""
    times = frame_centres_s(num_frames)
    curve = np.zeros(num_frames)
    for phoneme in phonemes:
        if "ˈ" in phoneme.ipa and rng.random() < 0.35 and phoneme.start_s > 0.4:
            bump = np.exp(-0.5 * ((times - phoneme.start_s - 0.05) / 0.12) ** 2)
            curve = np.maximum(curve, rng.uniform(0.3, 1.0) * bump)
    return curve
