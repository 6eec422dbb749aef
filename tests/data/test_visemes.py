"""Mouth curves and head motion."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rest_lightning.constants import FPS
from rest_lightning.data.synthetic.motion import head_motion
from rest_lightning.data.synthetic.script import sample_script
from rest_lightning.data.synthetic.visemes import (
    frame_centres_s,
    loudness,
    mouth_curves,
    visemes_of,
)
from rest_lightning.data.synthetic.voice import Phoneme, speak

LONG = 0.4


def curves_of(*sounds: str, each_s: float = LONG, num_frames: int = 75) -> Any:
    """Sounds in a row from 0.4 s on, over evenly loud noise."""
    phonemes = [
        Phoneme(ipa, 0.4 + i * each_s, 0.4 + (i + 1) * each_s) for i, ipa in enumerate(sounds)
    ]
    audio = np.random.default_rng(0).normal(size=num_frames * 640).astype(np.float32) * 0.1
    return mouth_curves(phonemes, audio, num_frames), phonemes


def at(curve: np.ndarray, phoneme: Phoneme) -> float:
    return float(curve[round((phoneme.start_s + phoneme.end_s) / 2 * FPS - 0.5)])


def test_vowels_differ_clearly() -> None:
    curves, sounds = curves_of("ˈɑː", "ˈiː", "ˈuː")
    a, i, u = sounds
    assert at(curves.opening, a) > 0.8
    assert 0.2 < at(curves.opening, i) < 0.5
    assert at(curves.width, i) > 0.8
    assert at(curves.width, u) < -0.7
    assert at(curves.rounding, u) > 0.9
    assert abs(at(curves.rounding, a)) < 0.05


@pytest.mark.parametrize("closed", ["m", "b", "p"])
@pytest.mark.parametrize("each_s", [0.05, 0.08, 0.15])
def test_closed_lips_close_between_wide_vowels(closed: str, each_s: float) -> None:
    for shift_s in np.arange(0.0, 0.04, 0.005):  # wherever the frames fall
        phonemes = [
            Phoneme("a", 0.3, 0.6 + shift_s),
            Phoneme(closed, 0.6 + shift_s, 0.6 + shift_s + each_s),
            Phoneme("a", 0.6 + shift_s + each_s, 1.2),
        ]
        audio = np.full(50 * 640, 0.1, np.float32)
        opening = mouth_curves(phonemes, audio, 50).opening
        near = np.abs(frame_centres_s(50) - (0.6 + shift_s)) < 0.09
        assert opening[near].min() < 0.05
        assert opening[10] > 0.8
        assert opening[22] > 0.8


def test_the_tongue_rises_and_the_teeth_meet_the_lip() -> None:
    curves, sounds = curves_of("a", "l", "a", "f", "a", each_s=0.2)
    assert at(curves.tongue, sounds[1]) > 0.5
    assert at(curves.opening, sounds[3]) < 0.2
    assert at(curves.opening, sounds[2]) > 0.7


@pytest.mark.parametrize("voice", ["en-us+m3", "en+f2", "it+m1"])
def test_real_speech_closes_on_every_closed_lip_sound(voice: str) -> None:
    spoken = speak("Mama and papa beat a big drum, maybe. Bob mopped a map.", voice, 150)
    num_frames = int(spoken.duration_s * FPS) + 1
    opening = mouth_curves(spoken.phonemes, spoken.audio, num_frames).opening
    count = 0
    for ipa, start_s, end_s in spoken.phonemes:
        if ipa[:1] in {"m", "b", "p"}:
            near = (frame_centres_s(num_frames) > start_s - 0.06) & (
                frame_centres_s(num_frames) < end_s + 0.02
            )
            assert opening[near].min() < 0.05, (ipa, start_s)
            count += 1
    assert count > 10
    assert opening.max() > 0.8


def test_silence_closes_the_mouth_and_opening_follows_the_sound() -> None:
    correlations = []
    for seed in range(8):
        script = sample_script(np.random.default_rng([1, seed]), 113)
        curves = mouth_curves(script.phonemes, script.speech, 113)
        times = frame_centres_s(113)
        near = [
            (times > start_s - 0.12) & (times < end_s + 0.12)
            for ipa, start_s, end_s in script.phonemes
            if ipa
        ]
        silent = ~np.any(near, axis=0) if near else np.ones(113, bool)
        assert np.all(curves.opening[silent] < 0.05)
        for curve in (curves.opening, curves.rounding, curves.tongue):
            assert curve.dtype == np.float32
            assert curve.min() >= 0.0
            assert curve.max() <= 1.0
        assert np.abs(curves.width).max() <= 1.0
        if script.speech.any():
            correlations.append(np.corrcoef(curves.opening, loudness(script.speech, 113))[0, 1])
    assert np.mean(correlations) > 0.6


def test_no_speech_is_a_closed_mouth() -> None:
    curves = mouth_curves([], np.zeros(0, np.float32), 10)
    for curve in (curves.opening, curves.width, curves.rounding, curves.tongue):
        np.testing.assert_array_equal(curve, np.zeros(10, np.float32))


def test_unknown_sounds_and_marks() -> None:
    assert visemes_of("")[0].opening == 0.0
    assert len(visemes_of("ˈaɪ")) == 2
    assert len(visemes_of("tʃ")) == 2
    assert 0.0 < visemes_of("ǂ")[0].opening < 0.5


@pytest.mark.parametrize("num_frames", [1, 9, 113, 701])
def test_head_motion_is_moderate_and_starts_neutral(num_frames: int) -> None:
    degrees = np.pi / 180.0
    limits = {
        "yaw_rad": 6.1 * degrees,
        "pitch_rad": 5.1 * degrees,
        "roll_rad": 4.1 * degrees,
        "shift_x": 0.015,
    }
    for seed in range(10):
        motion = head_motion(np.random.default_rng(seed), num_frames)
        for name, limit in limits.items():
            assert np.abs(getattr(motion, name)).max() <= limit
            assert abs(getattr(motion, name)[0]) <= 0.2 * limit
        assert motion.blink[0] == 0.0
        assert abs(motion.gaze_x[0]) < 0.05
        assert np.abs(motion.scale - 1.0).max() < 0.03
        if num_frames > 1:
            assert np.abs(np.diff(motion.yaw_rad)).max() < 1.2 * degrees
        if num_frames == 701:
            num_blinks = np.count_nonzero(np.diff((motion.blink > 0.5).astype(int)) == 1)
            assert 5 <= num_blinks <= 15
