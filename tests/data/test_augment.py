from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rest_lightning.constants import SAMPLE_RATE
from rest_lightning.data import augment
from rest_lightning.data.augment import SpeechAugmentation

NUM_SAMPLES = 4 * SAMPLE_RATE


def lag(after: np.ndarray, before: np.ndarray) -> int:
    length = 2 * len(before)
    peak = int(
        np.fft.irfft(np.fft.rfft(after, length) * np.conj(np.fft.rfft(before, length))).argmax()
    )
    return peak if peak < len(before) else peak - length


def rms(audio: np.ndarray) -> float:
    return float(np.sqrt(np.mean(audio.astype(np.float64) ** 2)))


@pytest.mark.parametrize("seed", range(25))
def test_alignment_is_kept(make: Any, seed: int) -> None:
    audio = make.speech(NUM_SAMPLES, seed=seed)
    before = audio.copy()
    voices: Callable[[np.random.Generator], np.ndarray] = lambda rng: make.speech(9_000, seed=100)  # noqa: E731
    out = SpeechAugmentation(clean_probability=0)(audio, np.random.default_rng(seed), voices)
    assert out.dtype == np.float32
    assert out.shape == audio.shape
    assert np.abs(out).max() <= 1
    assert np.isfinite(out).all()
    assert lag(out, audio) == 0
    np.testing.assert_array_equal(audio, before)


@pytest.mark.parametrize(
    "only",
    [
        "noise_probability",
        "equaliser_probability",
        "telephone_probability",
        "reverb_probability",
        "compress_probability",
    ],
)
def test_every_effect_alone_acts_and_keeps_an_impulse_in_place(only: str) -> None:
    names = [name for name in vars(SpeechAugmentation()) if name.endswith("_probability")]
    settings: dict[str, Any] = dict.fromkeys(names, 0.0) | {only: 1.0}
    effect = SpeechAugmentation(**settings, gain_db=(0.0, 0.0), snr_db=(30.0, 30.0))
    audio = np.zeros(NUM_SAMPLES, np.float32)
    audio[30_000], audio[30_500] = 0.9, 0.3
    for seed in range(8):
        out = effect(audio, np.random.default_rng(seed))
        assert int(np.abs(out).argmax()) == 30_000
        assert not np.array_equal(out, audio)


def test_seed_decides(make: Any) -> None:
    audio = make.speech(NUM_SAMPLES)
    effect = SpeechAugmentation()
    one, same, other = (effect(audio, np.random.default_rng(seed)) for seed in (7, 7, 8))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    clean = SpeechAugmentation(clean_probability=1)(audio, np.random.default_rng(0))
    np.testing.assert_array_equal(clean, audio)
    assert clean is not audio


@pytest.mark.parametrize("snr_db", [5.0, 20.0, 40.0])
def test_noise_level(make: Any, snr_db: float) -> None:
    audio = make.speech(NUM_SAMPLES)
    for seed in range(6):
        noise = augment.make_noise(
            NUM_SAMPLES, np.random.default_rng(seed), lambda rng: make.speech(5_000, seed=3)
        )
        added = augment.add_noise(audio, noise, snr_db) - audio
        assert 20 * np.log10(rms(audio) / rms(added)) == pytest.approx(snr_db, abs=0.1)
    silent = np.zeros(NUM_SAMPLES, np.float32)
    assert 20 * np.log10(rms(augment.add_noise(silent, noise, snr_db))) == pytest.approx(
        -26 - snr_db, abs=0.1
    )


def test_pink_noise_falls_by_three_db_an_octave() -> None:
    augmented = [augment.make_noise(2**17, np.random.default_rng(seed)) for seed in range(8)]
    slopes = []
    for noise in augmented:
        power = np.abs(np.fft.rfft(noise)) ** 2
        hz = np.fft.rfftfreq(len(noise), 1 / SAMPLE_RATE)
        bands = [power[(hz >= low) & (hz < 2 * low)].mean() for low in (250, 500, 1000, 2000)]
        slopes.append(np.diff(10 * np.log10(bands)).mean())
    assert {round(float(slope)) for slope in slopes} == {0, -3}


def test_room_decays_as_asked() -> None:
    impulse = augment.room_impulse(np.random.default_rng(0), 0.4, 6.0)
    assert impulse[0] == 1
    assert 10 * np.log10(1 / np.sum(impulse[1:] ** 2)) == pytest.approx(6.0, abs=0.1)
    early, late = (rms(impulse[int(s * SAMPLE_RATE) :][:800]) for s in (0.1, 0.3))
    assert 20 * np.log10(early / late) == pytest.approx(30, abs=2)  # half of 0.4 s is half of 60 dB


@pytest.mark.parametrize("num_samples", [1, 2, 7, 640, 69_760, 100_001])
def test_fft_length(num_samples: int) -> None:
    length = augment.fft_length(num_samples)
    assert num_samples <= length <= max(2, 2 * num_samples)
    assert length % 2 == 0
    for factor in (2, 3, 5):
        while length % factor == 0:
            length //= factor
    assert length == 1


@pytest.mark.parametrize("num_samples", [0, 1, 640])
def test_short_and_silent_audio(num_samples: int) -> None:
    for seed in range(20):
        out = SpeechAugmentation()(np.zeros(num_samples, np.float32), np.random.default_rng(seed))
        assert out.shape == (num_samples,)
        assert np.isfinite(out).all()


def test_it_is_cheap(make: Any) -> None:
    audio, effect = make.speech(NUM_SAMPLES), SpeechAugmentation()
    start = time.process_time()
    for seed in range(20):
        effect(audio, np.random.default_rng(seed))
    # 3 ms alone; the bound leaves room for a busy machine
    assert (time.process_time() - start) / 20 < 0.02
