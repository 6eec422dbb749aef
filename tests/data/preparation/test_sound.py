"""Sound of every kind becomes 16 kHz mono on the frames' clock."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from videos import levels, speech_like, write_video

from rest_lightning.data.preparation.frames import FrameStream, probe
from rest_lightning.data.preparation.sound import decode_sound, read_sound, silent_share


def decoded(path: Path, num_frames: int = 50) -> np.ndarray:
    target = path.with_suffix(".raw")
    stream = FrameStream(path, probe(path))
    assert list(stream)
    assert decode_sound(path, target, 640 * num_frames, stream.origins_s) is None
    assert target.stat().st_size == 2 * 640 * num_frames
    return read_sound(target, 0, num_frames)


def shift_of(heard: np.ndarray, true: np.ndarray) -> int:
    """Samples by which ``heard`` is late against ``true``."""
    product = np.fft.irfft(
        np.fft.rfft(heard, 2 * len(heard)) * np.conj(np.fft.rfft(true, 2 * len(heard)))
    )
    best = int(product.argmax())
    return best - 2 * len(heard) if best > len(heard) else best


@pytest.mark.parametrize(
    ("rate", "layout", "codec"),
    [
        (8_000, "mono", "aac"),
        (16_000, "mono", "aac"),
        (44_100, "stereo", "aac"),
        (48_000, "5.1", "aac"),
        (48_000, "stereo", "libopus"),
    ],
)
def test_rates_and_channels(tmp_path: Path, rate: int, layout: str, codec: str) -> None:
    num_channels = {"mono": 1, "stereo": 2, "5.1": 6}[layout]
    voice = speech_like(2.0, rate)
    sound = np.zeros((num_channels, len(voice)), np.float32)
    sound[2 if num_channels == 6 else slice(None)] = voice  # the centre is where people speak
    path = write_video(
        tmp_path / "a.mkv", levels(50), [sound], rate=rate, layout=layout, audio_codec=codec
    )
    heard, true = decoded(path), speech_like(2.0)
    assert abs(shift_of(heard, true)) <= 8  # half a millisecond
    assert np.corrcoef(heard, true)[0, 1] > 0.9


@pytest.mark.parametrize(
    ("audio_start_s", "video_start_s"), [(0.0, 0.0), (0.6, 0.0), (0.0, 0.6), (1.3, 0.5)]
)
def test_starts_are_aligned(tmp_path: Path, audio_start_s: float, video_start_s: float) -> None:
    """A click and a flash at the same moment of the file stay together."""
    moment_s = 1.8
    times = np.arange(50) / 25 + video_start_s
    frames = np.full((50, 64, 64, 3), 30, np.uint8)
    frames[np.abs(times - moment_s).argmin()] = 220
    sound = np.zeros(2 * 16_000, np.float32)
    sound[round((moment_s - audio_start_s) * 16_000) :][:80] = 0.5
    path = write_video(
        tmp_path / "a.mp4", frames, [sound], times_s=times.tolist(), audio_start_s=audio_start_s
    )
    heard = decoded(path)
    click_frame = np.abs(heard).argmax() / 640
    flash_frame = (moment_s - video_start_s) * 25
    assert abs(click_frame - flash_frame) < 0.5


def test_a_gap_in_the_sound_is_silence(tmp_path: Path) -> None:
    voice = speech_like(2.0)
    path = write_video(tmp_path / "a.mp4", levels(100), [voice], audio_start_s=1.0)
    heard = decoded(path, 100)
    assert (
        np.abs(heard[: 16_000 - 1200]).max() < 0.01 and np.abs(heard[48_000 + 1200 :]).max() < 0.01
    )
    assert abs(shift_of(heard, np.pad(voice, (16_000, 16_000)))) <= 8


@pytest.mark.parametrize("default", [0, 1])
def test_of_two_tracks_the_default_one_is_heard(tmp_path: Path, default: int) -> None:
    sounds = [speech_like(2.0, seed=1), speech_like(2.0, seed=2)]
    heard = decoded(write_video(tmp_path / "a.mkv", levels(50), sounds, default_track=default))
    alike = [abs(float(np.corrcoef(heard, sound)[0, 1])) for sound in sounds]
    assert alike[default] > 0.9 > 0.3 > alike[1 - default]


def test_no_sound_is_told(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", levels(5))
    assert decode_sound(path, tmp_path / "raw", 3200, [Fraction(0)]) == (
        "expected an audio track, but a.mp4 has video tracks only: choose a file with sound"
    )


def test_silence_is_counted_by_frame() -> None:
    samples = np.zeros(6400, np.float32)
    samples[640 * 3 : 640 * 7] = 0.1
    samples[640 * 8 : 640 * 9] = 0.001  # -60 dB
    assert silent_share(samples, -50.0) == pytest.approx(0.6)
    assert silent_share(samples, -70.0) == pytest.approx(0.5)
