"""Messages: bytes as documented, and one line for each that is wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rest_lightning.serve.protocol import (
    H264,
    IDLE,
    KEYFRAME,
    End,
    Flush,
    Format,
    Hello,
    Identity,
    Interrupt,
    ProtocolError,
    Stats,
    pack,
    pack_speech,
    parse_speech,
    parse_text,
)


def test_speech_is_laid_out_as_documented() -> None:
    data = pack_speech(3, 258, np.array([1, -2, 32767], np.int16))
    assert data == bytes.fromhex("01 00 0000 03000000 02010000 03000000 0100 feff ff7f")
    speech = parse_speech(data)
    assert (speech.epoch, speech.index) == (3, 258)
    np.testing.assert_array_equal(speech.samples, [1, -2, 32767])
    stereo = np.array([[1, 2], [3, 4]], np.int16)
    np.testing.assert_array_equal(parse_speech(pack_speech(0, 0, stereo), 2).samples, stereo)
    with pytest.raises(ProtocolError, match="expected 2 samples in 4 bytes, got 8 bytes"):
        parse_speech(pack_speech(0, 0, stereo))


def test_frames_are_laid_out_as_documented() -> None:
    data = pack(H264, KEYFRAME | IDLE, 1, 2**31, 1, b"\0\0\0\1")
    assert data == bytes.fromhex("02 03 0000 01000000 00000080 01000000 00000001")


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "expected a header of 16 bytes, got 0 bytes"),
        (
            pack_speech(0, 0, np.zeros(2, np.int16))[:9],
            "expected a header of 16 bytes, got 9 bytes",
        ),
        (
            pack_speech(0, 0, np.zeros(2, np.int16))[:-1],
            "expected 2 samples in 4 bytes, got 3 bytes",
        ),
        (pack_speech(0, 0, np.zeros(2, np.int16)) + b"\0", "got 5 bytes"),
        (pack(4, 0, 0, 0, 0, b""), "got type 4"),
        (pack(1, 1, 0, 0, 0, b""), "no flags"),
        (b'{"type": "hello", "version": 1}', "got type 123"),
    ],
)
def test_bad_speech_is_told(data: bytes, told: str) -> None:
    with pytest.raises(ProtocolError, match=told):
        parse_speech(data)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"type": "hello", "version": 1}, Hello(("h264", "jpeg"), None, 0, 1)),
        ({"type": "hello", "version": 2}, Hello(("h264", "jpeg"), None, 0, 2)),
        (
            {
                "type": "hello",
                "version": 1,
                "codecs": ["jpeg"],
                "portrait": "p",
                "seed": 7,
                "later": True,
            },
            Hello(("jpeg",), "p", 7),
        ),
        ({"type": "hello", "version": 2, "live": False}, Hello(version=2, live=False)),
        ({"type": "hello", "version": 1, "live": False}, Hello(version=1, live=True)),
        ({"type": "flush"}, Flush()),
        ({"type": "format", "sample_rate_hz": 44_100, "channels": 2}, Format(44_100, 2)),
        ({"type": "interrupt", "epoch": 5}, Interrupt(5)),
        ({"type": "identity", "portrait": "p"}, Identity("p")),
        ({"type": "end"}, End()),
        (
            {"type": "stats", "slack_ms": 120, "offset_ms": "?", "latency_ms": True},
            Stats(120.0, None, None),
        ),
        ({"type": "stats", "slack_ms": float("nan"), "offset_ms": -1e300}, Stats()),
    ],
)
def test_text_is_read(fields: dict[str, object], expected: object) -> None:
    assert parse_text(json.dumps(fields)) == expected


@pytest.mark.parametrize(
    ("text", "code", "told"),
    [
        ("", "bad_message", "expected JSON"),
        ("[" * 4000, "bad_message", "expected JSON"),
        ("[1]", "bad_message", "expected a message of type hello, .* got None"),
        ('{"type": ["hello"]}', "bad_message", "got \\['hello'\\]"),
        ('{"type": "shout"}', "bad_message", "got 'shout'"),
        ('{"type": "hello"}', "version", "expected version 1 or 2 of the protocol, got None"),
        ('{"type": "hello", "version": true}', "version", "got True"),
        ('{"type": "hello", "version": 1, "codecs": "h264"}', "bad_message", "codecs as a list"),
        (
            '{"type": "hello", "version": 1, "portrait": 3}',
            "bad_message",
            "id of a portrait, got 3",
        ),
        ('{"type": "hello", "version": 1, "seed": -1}', "bad_message", "seed as an integer"),
        ('{"type": "hello", "version": 2, "live": 1}', "bad_message", "live as true or false"),
        ('{"type": "format"}', "bad_message", "sample_rate_hz as an integer"),
        ('{"type": "format", "sample_rate_hz": 100}', "bad_message", "4000 to 192000 Hz"),
        ('{"type": "interrupt"}', "bad_message", "epoch as an integer of at least 0, got None"),
        ('{"type": "interrupt", "epoch": 4294967296}', "bad_message", "got 4294967296"),
        ('{"type": "identity"}', "bad_message", "id of a portrait"),
        ('{"type": "end", "why": "' + "x" * 5000 + '"}', "too_long", "at most 4096 characters"),
    ],
)
def test_bad_text_is_told_in_one_line(text: str, code: str, told: str) -> None:
    with pytest.raises(ProtocolError, match=told) as caught:
        parse_text(text)
    assert caught.value.code == code
    assert len(str(caught.value)) < 160 and "\n" not in str(caught.value)
