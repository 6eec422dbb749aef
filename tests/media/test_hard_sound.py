"""Sound as strangers write it: headers that promise what is not there, joined files, inverted and
silent channels, quiet speech, many channels. What is there is read, and what is odd is told.
"""

from __future__ import annotations

import struct
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from rest_lightning.constants import SAMPLE_RATE
from rest_lightning.errors import UserError
from rest_lightning.media.audio import open_speech
from rest_lightning.media.level import LevelMeter


def voice(duration_s: float = 2.0, rate: int = SAMPLE_RATE, seed: int = 0) -> np.ndarray:
    """Syllables of a low tone with pauses between them, float32 (n,), peak 0.5."""
    time_s = np.arange(round(duration_s * rate)) / rate
    swell = np.maximum(0.0, np.sin(2 * np.pi * 2.5 * time_s + seed)) ** 2
    return (0.5 * swell * np.sin(2 * np.pi * (180 + 40 * seed) * time_s)).astype(np.float32)


def write_wav(path: Path, channels: np.ndarray, rate: int = SAMPLE_RATE) -> Path:
    """16-bit samples of channels (c, n)."""
    with wave.open(str(path), "wb") as file:
        file.setparams((len(channels), 2, rate, 0, "NONE", ""))
        file.writeframes(np.round(32767 * channels.T).astype("<i2").tobytes())
    return path


def write_tracks(path: Path, codec: str, tracks: list[np.ndarray], default: int = 0) -> Path:
    """Encoded tracks at 48 kHz, mono."""
    rate = 48_000
    with av.open(str(path), "w") as container:
        streams = [container.add_stream(codec, rate=rate, layout="mono") for _ in tracks]
        for number, stream in enumerate(streams):
            stream.disposition = (
                av.stream.Disposition.default if number == default else av.stream.Disposition(0)
            )
        for stream, samples in zip(streams, tracks, strict=True):
            frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return path


PLACEHOLDERS = [0, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFF000, 0x7FFFFF00 - 36, 0xFFFFFFFF - 36]


@pytest.mark.parametrize("size", [*PLACEHOLDERS, 0x60000000, 0x80000000])
@pytest.mark.parametrize("bits", [8, 16, 24])
def test_placeholder_sizes_of_a_wav_are_no_promises(tmp_path: Path, size: int, bits: int) -> None:
    width = bits // 8
    form = struct.pack("<HHIIHH", 1, 1, 16_000, 16_000 * width, width, bits)
    riff = b"RIFF" + struct.pack("<I", min(size + 36, 0xFFFFFFFF)) + b"WAVEfmt " + b"\x10\0\0\0"
    data = b"data" + struct.pack("<I", size) + bytes([128 if bits == 8 else 0]) * (16_000 * width)
    (tmp_path / "a.wav").write_bytes(riff + form + data)
    speech = open_speech(tmp_path / "a.wav")
    assert speech.num_samples == 16_000 == len(speech.read_all())
    assert not any("missing" in note for note in speech.notes)


@pytest.mark.parametrize("byte_rate", [0, 1, 16_000, 64_000, 0xFFFFFFFF])
def test_the_byte_rate_of_a_wav_decides_nothing(tmp_path: Path, byte_rate: int) -> None:
    path = write_wav(tmp_path / "a.wav", voice()[None])
    data = bytearray(path.read_bytes())
    data[28:32] = struct.pack("<I", byte_rate)
    path.write_bytes(data)
    assert open_speech(path).num_samples == 32_000


@pytest.mark.parametrize(
    ("promised_s", "is_told"), [(1.9, False), (2.1, False), (3, True), (20, True)]
)
def test_a_promise_that_is_not_kept_is_a_note(
    tmp_path: Path, promised_s: float, is_told: bool
) -> None:
    path = write_wav(tmp_path / "a.wav", voice()[None])
    data = bytearray(path.read_bytes())
    data[40:44] = struct.pack("<I", round(promised_s * 32_000))
    path.write_bytes(data)
    notes = open_speech(path).notes
    assert any("missing" in note for note in notes) == is_told


@pytest.mark.parametrize("num_parts", [2, 3, 6])
@pytest.mark.parametrize(
    ("codec", "ending"),
    [("libmp3lame", "mp3"), ("libopus", "opus"), ("aac", "aac"), ("flac", "flac")],
)
def test_files_joined_byte_by_byte_are_read_to_the_end(
    tmp_path: Path, codec: str, ending: str, num_parts: int
) -> None:
    parts = [
        write_tracks(tmp_path / f"{k}.{ending}", codec, [voice(1.2, 48_000, seed=k)]).read_bytes()
        for k in range(num_parts)
    ]
    (tmp_path / f"all.{ending}").write_bytes(b"".join(parts))
    speech = open_speech(tmp_path / f"all.{ending}")
    samples = speech.read_all()
    assert speech.duration_s == pytest.approx(1.2 * num_parts, abs=0.08 * num_parts)
    assert np.abs(samples[-SAMPLE_RATE:]).max() > 0.3
    assert not speech.notes


@pytest.mark.parametrize("num_bytes", [500, 3000])
@pytest.mark.parametrize("codec", ["libmp3lame", "aac"])
def test_a_damaged_stretch_is_left_out_and_the_rest_is_read(
    tmp_path: Path, codec: str, num_bytes: int
) -> None:
    ending = "mp3" if codec == "libmp3lame" else "aac"
    path = write_tracks(tmp_path / f"a.{ending}", codec, [voice(6.0, 48_000)])
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + num_bytes] = bytes(num_bytes)
    path.write_bytes(data)
    speech = open_speech(path)
    assert speech.duration_s is not None and 5.0 < speech.duration_s < 6.2
    assert len(speech.read_all()) == speech.num_samples


@pytest.mark.parametrize("gap_s", [0.1, 1.5, 100.0])
@pytest.mark.parametrize("ending", ["webm", "mka"])
def test_gaps_in_the_time_stamps_are_no_missing_sound(
    tmp_path: Path, ending: str, gap_s: float
) -> None:
    rate, path = 48_000, tmp_path / f"a.{ending}"
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("libopus", rate=rate, layout="mono")
        for number, part in enumerate((voice(1.0, rate), voice(1.5, rate))):
            frame = av.AudioFrame.from_ndarray(part[None], format="fltp", layout="mono")
            frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
            frame.pts = number * round((1.0 + gap_s) * rate)
            for packet in stream.encode(frame):
                container.mux(packet)
        container.mux(stream.encode(None))
    speech = open_speech(path)
    assert speech.duration_s == pytest.approx(2.5, abs=0.1) and not speech.notes


@pytest.mark.parametrize("default", [0, 1, 2])
def test_the_default_track_is_heard(tmp_path: Path, default: int) -> None:
    tracks = [np.zeros(96_000, np.float32) for _ in range(3)]
    tracks[default] = voice(2.0, 48_000)
    speech = open_speech(write_tracks(tmp_path / "a.mkv", "aac", tracks, default))
    assert np.abs(speech.read_all()).max() > 0.3


@pytest.mark.parametrize("num_channels", [2, 4, 6, 64])
@pytest.mark.parametrize("share", [0.0, 0.05])
def test_channels_that_cancel_leave_one_of_them(
    tmp_path: Path, num_channels: int, share: float
) -> None:
    """Half of the channels are inverted; ``share`` of the sound they do not have in common."""
    signs = np.where(np.arange(num_channels) % 2, -1.0, 1.0)[:, None]
    noise = share * np.random.default_rng(0).uniform(-0.5, 0.5, (num_channels, 32_000))
    speech = open_speech(write_wav(tmp_path / "a.wav", signs * voice()[None] + noise))
    assert np.corrcoef(speech.read_all(), voice())[0, 1] ** 2 > 0.9
    assert any("cancel" in note for note in speech.notes)


@pytest.mark.parametrize("num_channels", [1, 2, 5, 6, 8, 16, 63, 65])
@pytest.mark.parametrize("speaking", ["all", "first"])
def test_any_number_of_channels(tmp_path: Path, num_channels: int, speaking: str) -> None:
    channels = np.zeros((num_channels, 16_000), np.float32)
    channels[slice(None) if speaking == "all" else 0] = voice(1.0)
    speech = open_speech(write_wav(tmp_path / "a.wav", channels))
    assert speech.num_channels == num_channels and speech.num_samples == 16_000
    assert np.corrcoef(speech.read_all(), voice(1.0))[0, 1] > 0.99
    assert not any("cancel" in note for note in speech.notes)


@pytest.mark.parametrize("level_db", [-70, -60, -50, -40, -30, -20, -10, 0])
def test_quiet_speech_is_raised_and_told(tmp_path: Path, level_db: int) -> None:
    path = write_wav(tmp_path / "a.wav", (10 ** (level_db / 20) * voice())[None])
    speech, plain = open_speech(path), open_speech(path, level=False)
    gain = 20 * np.log10(speech.gain)
    assert 0 <= gain <= 40.0 and plain.gain == 1.0
    assert (gain > 0) == (level_db < -32) == bool(speech.notes)
    if -62 < level_db < -32:
        assert -30 < _loud_db(speech.read_all()) < -20
    np.testing.assert_allclose(speech.read_all(), plain.read_all() * np.float32(speech.gain))


def _loud_db(samples: np.ndarray) -> float:
    meter = LevelMeter()
    meter.add(samples)
    return meter.loud_db


def test_hiss_is_not_raised_but_told(tmp_path: Path) -> None:
    hiss = np.random.default_rng(0).normal(0, 0.001, (1, 32_000))
    speech = open_speech(write_wav(tmp_path / "a.wav", hiss))
    assert speech.gain == 1.0 and any("quiet" in note for note in speech.notes)


@pytest.mark.parametrize(
    ("channels", "word"),
    [
        (np.zeros((1, 32_000)), "silent"),
        (np.clip(4 * voice(), -1, 1)[None], "clipped"),
        (voice()[None], ""),
    ],
)
def test_what_is_odd_is_told(tmp_path: Path, channels: np.ndarray, word: str) -> None:
    notes = open_speech(write_wav(tmp_path / "a.wav", channels)).notes
    assert [word in note for note in notes] == ([True] if word else [])


@pytest.mark.parametrize("cuts", [1, 7, 640, 1000, 16_000])
def test_the_meter_does_not_depend_on_how_sound_was_cut(cuts: int) -> None:
    samples = voice(1.0, seed=1)
    whole, pieces = LevelMeter(), LevelMeter()
    whole.add(samples)
    for start in range(0, len(samples), cuts):
        pieces.add(samples[start : start + cuts])
    for name in ("peak", "num_samples", "num_clipped", "loud_db", "gain_db"):
        assert getattr(whole, name) == getattr(pieces, name)


@pytest.mark.parametrize(
    "name", ["2024-08-20T13:28:35Z.wav", "http:x.wav", "pipe:0.wav", "a%03d.wav"]
)
def test_names_are_names_and_no_addresses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_wav(Path(name), voice()[None])
    assert open_speech(name).num_samples == 32_000


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{}\n#EXT-X-ENDLIST\n"),
        ("a.wav", "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{}\n#EXT-X-ENDLIST\n"),
        ("a.ffconcat", "ffconcat version 1.0\nfile {}\n"),
        (
            "a.sdp",
            "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=audio 5004 RTP/AVP 0\n",
        ),
    ],
)
def test_a_file_cannot_name_other_files(tmp_path: Path, name: str, text: str) -> None:
    write_wav(tmp_path / "secret.wav", voice()[None])
    (tmp_path / name).write_text(text.format("secret.wav"))
    with pytest.raises(UserError, match="cannot be read"):
        open_speech(tmp_path / name)


@pytest.mark.parametrize("name", ["a.raw", "a.pcm", "a.ulaw", "a.s16le", "a.bin", "a"])
def test_headerless_sound_is_told_the_way(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(np.round(32767 * voice()).astype("<i2").tobytes())
    with pytest.raises(UserError, match=r"rest talk portrait.png - .*ffmpeg -f s16le") as info:
        open_speech(tmp_path / name)
    assert "\n" not in str(info.value)


def test_a_name_that_promises_a_header_gets_no_such_advice(tmp_path: Path) -> None:
    (tmp_path / "a.mp3").write_text("no sound")
    with pytest.raises(UserError, match=r"export it again$"):
        open_speech(tmp_path / "a.mp3")


READABLE = [(1, 1), (1, 3), (1, 7)]  # FFmpeg rounds their width up to 8 bits


@pytest.mark.parametrize("bits", [0, 1, 3, 7, 33, 255])
@pytest.mark.parametrize("tag", [0, 1, 3, 0x55, 0xABCD])
def test_unknown_codecs_are_one_line(tmp_path: Path, tag: int, bits: int) -> None:
    form = struct.pack("<HHIIHH", tag, 1, 16_000, 32_000, 2, bits)
    body = (
        b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", 400) + bytes(400)
    )
    (tmp_path / "a.wav").write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    if (tag, bits) in READABLE:
        assert open_speech(tmp_path / "a.wav").num_samples
        return
    with pytest.raises(UserError, match=r"a\.wav") as info:
        open_speech(tmp_path / "a.wav")
    assert "\n" not in str(info.value)
