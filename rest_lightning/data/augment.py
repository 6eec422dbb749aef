"""Speech augmentation for training: recordings differ from synthesised speech in level, noise,
colour and room.

Every effect keeps the time alignment of sound and picture exactly: filters have zero phase, rooms
start with the direct path, and rate and pitch are left to the speech synthesiser. All functions are
pure and take a generator, so that a sample's sound depends on its seed alone. About 3 ms for 4 s of
audio on one core. REST augments no speech: the ranges are this project's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rest_lightning.constants import SAMPLE_RATE

Samples = NDArray[np.float32]
Voices = Callable[[np.random.Generator], Samples]

_SILENCE_RMS = 1e-4  # -80 dBFS: below it a clip has no level to relate noise to
_NOMINAL_RMS = 0.05  # -26 dBFS, the level that noise is related to in a silent clip


@dataclass(frozen=True)
class SpeechAugmentation:
    """Random augmentation of one speech signal; call it with float32 samples and a generator.

    Args:
        clean_probability: chance that a clip stays as it is (streams start from clean synthetic
            speech, too).
        gain_db: range of the level change.
        noise_probability, snr_db: additive white, pink or babble noise and its level below the
            speech.
        equaliser_probability, tilt_db, band_db: spectral tilt from 100 Hz to 8 kHz, and up to three
            bands raised or lowered.
        telephone_probability: band-limiting to about 300-3400 Hz.
        reverb_probability, rt60_s, direct_db: decay time of a small room, and how far the direct
            sound is above it.
        compress_probability: soft saturation or hard clipping of peaks.
    """

    clean_probability: float = 0.1
    gain_db: tuple[float, float] = (-18.0, 6.0)
    noise_probability: float = 0.6
    snr_db: tuple[float, float] = (5.0, 40.0)
    equaliser_probability: float = 0.6
    tilt_db: float = 9.0
    band_db: float = 9.0
    telephone_probability: float = 0.1
    reverb_probability: float = 0.3
    rt60_s: tuple[float, float] = (0.1, 0.5)
    direct_db: tuple[float, float] = (0.0, 15.0)
    compress_probability: float = 0.2

    def __call__(
        self, audio: Samples, rng: np.random.Generator, voices: Voices | None = None
    ) -> Samples:
        """Augment ``audio`` (n,) float32 in [-1, 1] at 16 kHz; same length, same timing, within
        [-1, 1].

        Args:
            audio: the clip; left unchanged.
            rng: decides everything.
            voices: gives speech of another clip for babble; None leaves babble out.
        """
        if rng.random() < self.clean_probability:
            return audio.copy()
        if rng.random() < self.compress_probability:
            audio = saturate(audio, rng.uniform(1.0, 6.0), hard=rng.random() < 0.3)
        equalise, telephone, room = rng.random(3) < (
            self.equaliser_probability,
            self.telephone_probability,
            self.reverb_probability,
        )
        if equalise or telephone or room:
            length = fft_length(len(audio) + (int(self.rt60_s[1] * SAMPLE_RATE) if room else 0))
            response = np.ones(length // 2 + 1, np.complex64)
            if equalise:
                response *= equaliser(length, rng, self.tilt_db, self.band_db)
            if telephone:
                response *= band_limit(length, rng.uniform(200, 400), rng.uniform(3000, 3800))
            if room:
                impulse = room_impulse(rng, rng.uniform(*self.rt60_s), rng.uniform(*self.direct_db))
                response *= np.fft.rfft(impulse, length)
            audio = np.fft.irfft(np.fft.rfft(audio, length) * response, length)[
                : len(audio)
            ].astype(np.float32)
        if rng.random() < self.noise_probability:
            audio = add_noise(audio, make_noise(len(audio), rng, voices), rng.uniform(*self.snr_db))
        gain = 10 ** (rng.uniform(*self.gain_db) / 20)
        return np.clip(audio * np.float32(gain), -1, 1)


def fft_length(num_samples: int) -> int:
    """The smallest even 2^a 3^b 5^c that is at least ``num_samples``: lengths that an FFT does
    quickly.
    """
    best = 1 << max(1, (num_samples - 1).bit_length())
    for fives in range(8):
        for threes in range(8):
            odd = 5**fives * 3**threes
            twos = max(1, (-(-num_samples // odd) - 1).bit_length())
            best = min(best, odd << twos)
    return best


def equaliser(length: int, rng: np.random.Generator, tilt_db: float, band_db: float) -> Samples:
    """Zero-phase gain per frequency of an FFT of ``length``, (length // 2 + 1,): random tilt and up
    to three bands.
    """
    hz = np.fft.rfftfreq(length, 1 / SAMPLE_RATE).astype(np.float32)
    # 900 Hz: the middle of 100 Hz .. 8 kHz in octaves
    octaves = np.log2(np.maximum(hz, 50.0) / 900.0)
    gain_db = rng.uniform(-tilt_db, tilt_db) * octaves / 6.3  # 6.3 octaves from 100 Hz to 8 kHz
    for _ in range(rng.integers(0, 4)):
        centre, width = rng.uniform(-3.0, 3.1), rng.uniform(0.4, 1.5)
        gain_db += rng.uniform(-band_db, band_db) * np.exp(-0.5 * ((octaves - centre) / width) ** 2)
    return (10 ** (gain_db / 20)).astype(np.float32)


def band_limit(length: int, low_hz: float, high_hz: float) -> Samples:
    """Zero-phase band-pass gain with smooth edges of a quarter octave, (length // 2 + 1,)."""
    hz = np.maximum(np.fft.rfftfreq(length, 1 / SAMPLE_RATE), 1.0)
    low, high = (
        1 / (1 + np.exp(np.clip(-16 * np.log2(hz / edge), -50, 50))) for edge in (low_hz, high_hz)
    )
    return (low * (1 - high)).astype(np.float32)


def room_impulse(rng: np.random.Generator, rt60_s: float, direct_db: float) -> Samples:
    """Impulse response of a small room: direct path 1 at sample 0, then decaying noise after 1-5
    ms.

    Args:
        rng: draws the reflections.
        rt60_s: time in which the reverberation falls by 60 dB.
        direct_db: energy of the direct path over that of the reverberation.
    """
    time_s = np.arange(max(2, int(rt60_s * SAMPLE_RATE)), dtype=np.float32) / SAMPLE_RATE
    tail = rng.standard_normal(len(time_s), np.float32) * np.exp(-6.908 * time_s / rt60_s).astype(
        np.float32
    )
    tail[: int(rng.uniform(0.001, 0.005) * SAMPLE_RATE)] = 0
    tail *= np.float32(10 ** (-direct_db / 20) / (np.sqrt(np.sum(tail**2)) + 1e-9))
    tail[0] = 1
    return tail


def make_noise(num_samples: int, rng: np.random.Generator, voices: Voices | None = None) -> Samples:
    """White, pink or babble noise (one to three other voices), (num_samples,), of any level."""
    kind = rng.choice(("white", "pink", "babble") if voices is not None else ("white", "pink"))
    if kind == "babble" and voices is not None:
        babble = np.zeros(num_samples, np.float32)
        for _ in range(rng.integers(1, 4)):
            voice = voices(rng)
            if len(voice):
                babble += np.resize(np.roll(voice, rng.integers(len(voice))), num_samples) / (
                    _rms(voice) + 1e-6
                )
        return babble
    if kind == "white":
        return rng.standard_normal(num_samples, np.float32)
    length = fft_length(num_samples)
    count = length // 2 + 1
    spectrum = rng.standard_normal(2 * count, np.float32).view(np.complex64)
    # flat below 50 Hz
    spectrum /= np.sqrt(np.maximum(np.arange(count, dtype=np.float32), 50 * length / SAMPLE_RATE))
    return np.fft.irfft(spectrum, length)[:num_samples].astype(np.float32)


def add_noise(audio: Samples, noise: Samples, snr_db: float) -> Samples:
    """``audio`` plus ``noise`` scaled to ``snr_db`` below the speech's level (below -26 dBFS where
    there is none).
    """
    level, noise_level = _rms(audio), _rms(noise)
    if noise_level < 1e-9:
        return audio
    level = level if level > _SILENCE_RMS else _NOMINAL_RMS
    return audio + noise * np.float32(level / noise_level * 10 ** (-snr_db / 20))


def saturate(audio: Samples, drive: float, hard: bool) -> Samples:
    """Memoryless overload that keeps the peak: clipping at ``1 / drive`` of the peak, or tanh with
    that drive.
    """
    peak = float(np.abs(audio).max(initial=0.0))
    if peak < 1e-6:
        return audio
    if hard:
        return np.clip(audio, -peak / np.float32(drive), peak / np.float32(drive))
    return np.tanh(audio * np.float32(drive / peak)) * np.float32(peak / np.tanh(drive))


def _rms(audio: Samples) -> float:
    return float(np.sqrt(np.mean(np.square(audio)))) if len(audio) else 0.0
