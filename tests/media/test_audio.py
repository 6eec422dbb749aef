from __future__ import annotations

import copy
import io
import os
import threading
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from rest_lightning.constants import SAMPLE_RATE
from rest_lightning.errors import UserError
from rest_lightning.machine import peak_memory_mb
from rest_lightning.media.audio import Resampler, open_speech


def write_sound(
    path: Path, samples: np.ndarray, rate: int, codec: str = "pcm_s16le", layout: str = "mono"
) -> Path:
    """Encodes samples (channels, n), float32, with PyAV."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        for start in range(0, samples.shape[1], rate):
            block = np.ascontiguousarray(samples[:, start : start + rate])
            frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def tone(duration_s: float, rate: int, num_channels: int = 1) -> np.ndarray:
    """A swelling 220 Hz tone (channels, n)."""
    time_s = np.arange(round(duration_s * rate)) / rate
    return np.tile(
        (0.5 * np.sin(2 * np.pi * 220 * time_s) * np.sin(np.pi * time_s) ** 2).astype(np.float32),
        (num_channels, 1),
    )


@pytest.mark.parametrize("layout", ["mono", "stereo"])
@pytest.mark.parametrize(
    ("name", "codec", "rate"),
    [
        ("a.wav", "pcm_s16le", 8000),
        ("b.wav", "pcm_s16le", 16000),
        ("c.wav", "pcm_f32le", 44100),
        ("d.wav", "pcm_s24le", 96000),
        ("e.wav", "pcm_u8", 22050),
        ("a.mp3", "libmp3lame", 44100),
        ("a.flac", "flac", 48000),
        ("a.m4a", "aac", 44100),
        ("a.mp4", "aac", 16000),
        ("a.ogg", "libopus", 48000),
        ("a.webm", "libopus", 48000),
    ],
)
def test_formats_rates_and_channels(
    tmp_path: Path, name: str, codec: str, rate: int, layout: str
) -> None:
    duration_s = 3.217
    source = tone(duration_s, rate, 1 if layout == "mono" else 2)
    speech = open_speech(write_sound(tmp_path / name, source, rate, codec, layout))
    samples = speech.read_all()
    assert speech.num_samples == len(samples) and speech.duration_s == pytest.approx(
        duration_s, abs=0.01
    )
    assert samples.dtype == np.float32
    assert (speech.sample_rate_hz, speech.num_channels) == (rate, source.shape[0])
    num = min(len(samples), round(duration_s * SAMPLE_RATE)) - 400  # coded tails may ring
    expected = tone(duration_s, SAMPLE_RATE)[0, :num]
    assert np.sqrt(np.mean((samples[:num] - expected) ** 2)) < (
        0.03 if codec in ("pcm_u8", "libmp3lame", "aac", "libopus") else 0.002
    )


@pytest.mark.parametrize("num_channels", [2, 3, 4, 6, 8, 10])
def test_many_channels_are_mixed_without_clipping(tmp_path: Path, num_channels: int) -> None:
    loud = 1.9 * tone(1.0, 16000, num_channels)
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((num_channels, 2, 16000, 0, "NONE", ""))
        file.writeframes((32767 * loud.T).astype("<i2").tobytes())
    samples = open_speech(tmp_path / "a.wav").read_all()
    assert len(samples) == 16000 and 0.05 < np.abs(samples).max() <= 0.96


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
def test_clicks_stay_where_they_are(tmp_path: Path, rate: int) -> None:
    clicks_s = [0.25, 1.0, 2.5]
    samples = np.zeros((1, 3 * rate), np.float32)
    samples[0, [round(click_s * rate) for click_s in clicks_s]] = 0.9
    found = open_speech(write_sound(tmp_path / "a.wav", samples, rate, "pcm_f32le")).read_all()
    assert sorted(np.argsort(-np.abs(found))[:3]) == [
        round(click_s * SAMPLE_RATE) for click_s in clicks_s
    ]


@pytest.mark.parametrize(
    ("name", "codec", "rate"),
    [
        ("a.m4a", "aac", 48000),
        ("a.m4a", "aac", 44100),
        ("a.mp4", "aac", 16000),
        ("a.webm", "libopus", 48000),
        ("a.ogg", "libopus", 48000),
        ("a.wav", "pcm_s16le", 48000),
    ],
)
def test_the_run_in_of_a_codec_is_left_out(
    tmp_path: Path, name: str, codec: str, rate: int
) -> None:
    """A burst at 0.5 s is heard at 0.5 s; AAC's first 1024 samples, 64 ms at 16 kHz, come before
    time 0.
    """
    source = np.zeros((1, 2 * rate), np.float32)
    source[0, rate // 2 : rate // 2 + rate // 100] = 0.5 * np.sin(
        np.arange(rate // 100) * 2 * np.pi * 1000 / rate
    )
    speech = open_speech(write_sound(tmp_path / name, source, rate, codec))
    samples = speech.read_all()
    loud = np.flatnonzero(np.abs(samples) > 0.1)
    assert abs(loud[0] / SAMPLE_RATE - 0.5) < 0.003 and abs(loud[-1] / SAMPLE_RATE - 0.51) < 0.003
    assert len(samples) == speech.num_samples


@pytest.mark.parametrize("block_samples", [1, 640, 1000, 4000, 100_000])
def test_blocks_join_to_the_whole(tmp_path: Path, block_samples: int) -> None:
    path = write_sound(tmp_path / "a.wav", tone(0.5, 44100), 44100)
    whole = open_speech(path).read_all()
    blocks = list(open_speech(path, block_samples=block_samples))
    assert all(len(block) == block_samples for block in blocks[:-1]) and len(blocks[-1]) > 0
    np.testing.assert_array_equal(np.concatenate(blocks), whole)


def test_a_source_can_be_read_again(tmp_path: Path) -> None:
    speech = open_speech(write_sound(tmp_path / "a.wav", tone(0.5, 16000), 16000))
    np.testing.assert_array_equal(speech.read_all(), speech.read_all())


@pytest.mark.parametrize("num_bytes", [2, 640, 12_345, 32_000])
def test_raw_samples_from_a_pipe(num_bytes: int) -> None:
    data = (
        np.random.default_rng(0).integers(-32768, 32768, 16_000, dtype="<i2").tobytes()[:num_bytes]
    )
    speech = open_speech("-", stdin=io.BytesIO(data))
    assert speech.duration_s is None
    np.testing.assert_array_equal(
        speech.read_all(), np.frombuffer(data[: num_bytes // 2 * 2], "<i2") / np.float32(32768)
    )


@pytest.mark.parametrize("num_bytes", [1, 3, 7, 5001])
def test_samples_are_handed_on_as_they_arrive(num_bytes: int) -> None:
    """Writes of odd lengths: every whole sample comes out before the next write, none is torn
    apart.
    """
    data = (
        np.random.default_rng(0)
        .integers(-32768, 32768, 8 * num_bytes, dtype="<i2")
        .tobytes()[: 12 * num_bytes]
    )
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        blocks = iter(open_speech("-", stdin=pipe))
        got: list[np.ndarray] = []
        for start in range(0, len(data), num_bytes):
            os.write(writing, data[start : start + num_bytes])
            there = (start + num_bytes) // 2
            while start + num_bytes >= 4 and sum(map(len, got)) < there:
                got.append(next(blocks))
            assert sum(map(len, got)) in (there, 0)
        os.close(writing)
        got += list(blocks)
    np.testing.assert_array_equal(
        np.concatenate(got), np.frombuffer(data, "<i2") / np.float32(32768)
    )


def test_named_pipe(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "a.wav", tone(2.0, 16000), 16000)
    os.mkfifo(tmp_path / "pipe")

    threading.Thread(
        target=(tmp_path / "pipe").write_bytes, args=[path.read_bytes()], daemon=True
    ).start()
    speech = open_speech(tmp_path / "pipe")
    assert speech.num_samples is None and len(speech.read_all()) == 32_000


def test_pure_silence(tmp_path: Path) -> None:
    speech = open_speech(write_sound(tmp_path / "a.wav", np.zeros((1, 16000), np.float32), 16000))
    assert not speech.read_all().any() and speech.duration_s == 1.0


def test_an_hour_in_bounded_memory(tmp_path: Path) -> None:
    """8-bit samples: read to the end, and the process hardly grows (all of it would be 230 MB)."""
    num_samples = 3600 * SAMPLE_RATE
    form = b"".join(
        value.to_bytes(size, "little")
        for value, size in zip((1, 1, 16000, 16000, 1, 8), (2, 2, 4, 4, 2, 2), strict=True)
    )
    with (tmp_path / "a.wav").open("wb") as file:
        file.write(
            b"RIFF"
            + (36 + num_samples).to_bytes(4, "little")
            + b"WAVEfmt "
            + (16).to_bytes(4, "little")
            + form
        )
        file.write(b"data" + num_samples.to_bytes(4, "little"))
        file.truncate(44 + num_samples)  # a sparse file
    before_mb = peak_memory_mb()
    speech = open_speech(tmp_path / "a.wav", block_samples=SAMPLE_RATE)
    assert speech.duration_s == 3600.0
    assert sum(len(block) for block in speech) == num_samples
    assert peak_memory_mb() - before_mb < 50


@pytest.mark.parametrize(("name", "codec"), [("a.wav", "pcm_s16le"), ("a.flac", "flac")])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_of_a_truncated_file_what_is_there_is_read(
    tmp_path: Path, name: str, codec: str, share: float
) -> None:
    path = write_sound(tmp_path / name, tone(6.0, 44100), 44100, codec)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    speech = open_speech(path)
    assert speech.duration_s is not None and 0.2 * 6 < speech.duration_s < 5.7
    assert len(speech.read_all()) == speech.num_samples
    assert any("6.0 s" in note and "missing" in note for note in speech.notes)


@pytest.mark.parametrize(
    ("name", "codec", "share"),
    [
        ("a.wav", "pcm_s16le", 0.0),
        ("a.mp3", "libmp3lame", 0.001),
        ("a.flac", "flac", 0.001),
        ("a.m4a", "aac", 0.9),
    ],
)
def test_files_without_anything_to_decode_are_refused(
    tmp_path: Path, name: str, codec: str, share: float
) -> None:
    path = write_sound(tmp_path / name, tone(6.0, 44100), 44100, codec)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match=r"truncated|damaged|empty file|no samples") as info:
        open_speech(path)
    assert str(path) in str(info.value) and "\n" not in str(info.value)


def test_streamed_wav_without_a_length_is_read(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "a.wav", tone(1.0, 16000), 16000)
    data = bytearray(path.read_bytes())
    at = data.index(b"data") + 4
    data[at : at + 4] = data[4:8] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    assert open_speech(path).num_samples == 16_000


@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, "NaN or infinite"), (np.inf, "NaN or infinite"), (20_000.0, "divide by")],
)
@pytest.mark.parametrize("num_channels", [1, 2])
def test_bad_numbers_name_their_position(
    tmp_path: Path, value: float, message: str, num_channels: int
) -> None:
    samples = tone(1.0, 16000, num_channels)
    samples[-1, 8000] = value
    path = write_sound(
        tmp_path / "a.wav", samples, 16000, "pcm_f32le", "mono" if num_channels == 1 else "stereo"
    )
    with pytest.raises(UserError, match=message) as info:
        open_speech(path)
    assert "at sample 8000 (0.500 s)" in str(info.value)


def test_no_audio_track(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = 32
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))))
        container.mux(stream.encode(None))
    with pytest.raises(UserError, match="has video tracks only: choose a file with sound"):
        open_speech(tmp_path / "a.mp4")


def test_no_samples(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
    with pytest.raises(UserError, match="has no samples"):
        open_speech(tmp_path / "a.wav")


def test_not_speech(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("hello " * 1000)
    (tmp_path / "noise.mp3").write_bytes(np.random.default_rng(0).bytes(200_000))
    for path in (tmp_path / "text.wav", tmp_path / "noise.mp3"):
        with pytest.raises(UserError, match=r"cannot be (read|decoded)"):
            open_speech(path)
    with pytest.raises(UserError, match="does not exist"):
        open_speech(tmp_path / "missing.wav")
    with pytest.raises(UserError, match="got the folder"):
        open_speech(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"", "got none"), (b"\0", "got none"), (b"RIFF....WAVE", "whole sound file")],
)
def test_bad_pipes(data: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_speech("-", stdin=io.BytesIO(data)).read_all()


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 24000, 44100, 48000, 96000])
def test_resampled_blocks_are_the_resampled_whole(rate: int) -> None:
    """Bit by bit, also from a copy in between; and the tones are what they were."""

    def tones(rate: int) -> np.ndarray:
        time_s = np.arange(rate) / rate
        both = 0.5 * np.sin(2 * np.pi * 440 * time_s) + 0.2 * np.sin(2 * np.pi * 2500 * time_s)
        return both.astype(np.float32)

    samples, rng = tones(rate), np.random.default_rng(0)
    resampler = Resampler(rate)
    whole = np.concatenate([resampler.push(samples), resampler.flush()])
    assert len(whole) == 16_000
    assert np.abs(whole - tones(16_000))[200:-200].max() < 1e-4
    resampler, pieces, start = Resampler(rate), [], 0
    while start < rate:
        count = int(rng.integers(0, 3000))
        pieces.append(resampler.push(samples[start : start + count]))
        start += count
        resampler = copy.copy(resampler)
    assert np.array_equal(np.concatenate([*pieces, resampler.flush()]), whole)


def test_resampling_folds_nothing_back() -> None:
    time_s = np.arange(48_000) / 48_000
    resampler = Resampler(48_000)
    made = resampler.push(np.sin(2 * np.pi * 12_000 * time_s).astype(np.float32))
    assert np.abs(made[200:-200]).max() < 1e-3
    for rate in (0, -1, 10**9):
        with pytest.raises(UserError, match="expected a sample_rate of 4000 to 384000 Hz, got"):
            Resampler(rate)
