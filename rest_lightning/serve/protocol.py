"""Messages of the live page, version 2: a binary header of 16 bytes, and JSON. docs/protocol.md
describes them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from aiohttp import ClientWebSocketResponse, WSCloseCode, WSMsgType, web
from numpy.typing import NDArray

from rest_lightning.avatar.speech import MAX_CHANNELS, MAX_RATE_HZ, MIN_RATE_HZ

VERSION = 2
VERSIONS = (1, 2)  # that are understood; 1 is that of release 0.1
HEADER = struct.Struct("<BBHIII")  # type, flags, zero, epoch, index, count
SPEECH, H264, JPEG, SOUND = 1, 2, 3, 4
KEYFRAME, IDLE = 1, 2
MAX_TEXT_CHARS = 4096
MAX_EPOCH = 2**32 - 1
Codec = Literal["h264", "jpeg"]
Pcm = NDArray[np.int16]


class ProtocolError(Exception):
    """What a client may not send; ``code`` is for programs, the message is one line for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class ChannelClosed(Exception):
    """The other side has gone."""


class Channel(Protocol):
    """A two-way connection that carries whole messages, such as a WebSocket. All methods raise
    ChannelClosed.
    """

    async def receive(self) -> bytes | str:
        """The next message."""

    async def send_bytes(self, data: bytes) -> None:
        """Sends a binary message; waits while the other side does not read."""

    async def send_text(self, text: str) -> None:
        """Sends a text message."""

    async def close(self) -> None:
        """Closes; may be called twice."""


@dataclass(frozen=True)
class Speech:
    """Samples of a client, int16 (n,) or (n, channels); ``index`` is that of the first one within
    the epoch.
    """

    epoch: int
    index: int
    samples: Pcm


@dataclass(frozen=True)
class Hello:
    """A client's first message. ``portrait`` None: the first of the server's list. ``live``:
    whether the speech is a microphone's, or the like: see
    :class:`rest_lightning.avatar.AvatarSettings`.
    """

    codecs: tuple[str, ...] = ("h264", "jpeg")
    portrait: str | None = None
    seed: int = 0
    version: int = 1
    live: bool = True


@dataclass(frozen=True)
class Flush:
    """The end of an utterance."""


@dataclass(frozen=True)
class Format:
    """Of the speech that follows; whoever says nothing sends 16 kHz mono."""

    sample_rate_hz: int
    channels: int


@dataclass(frozen=True)
class Interrupt:
    """Everything of older epochs is void."""

    epoch: int


@dataclass(frozen=True)
class Identity:
    """Go on with another portrait."""

    portrait: str


@dataclass(frozen=True)
class Record:
    """Begin a recording of what is sent, or end it."""

    on: bool


@dataclass(frozen=True)
class End:
    """Nothing follows: the server shows what it has, and closes."""


@dataclass(frozen=True)
class Stats:
    """What a client measures, in ms. ``slack_ms``: how long chunks lie there before they are
    played, its cushion not counted; the server leaves out that much silence.
    """

    slack_ms: float | None = None
    offset_ms: float | None = None
    latency_ms: float | None = None


ClientMessage = Hello | Interrupt | Identity | Flush | Format | Record | End | Stats


def parse_speech(data: bytes, channels: int = 1) -> Speech:
    """A binary message of a client.

    Args:
        data: the message.
        channels: of the speech, whose samples take turns.

    Raises:
        ProtocolError: half a header, another type, set flags, or a length that is not that of
            ``count`` samples.
    """
    if len(data) < HEADER.size:
        raise ProtocolError(
            "bad_message", f"expected a header of {HEADER.size} bytes, got {len(data)} bytes"
        )
    kind, flags, zero, epoch, index, count = HEADER.unpack_from(data)
    if kind != SPEECH or flags or zero:
        raise ProtocolError(
            "bad_message", f"expected speech (type {SPEECH}, no flags), got type {kind}"
        )
    num_bytes = 2 * count * channels
    if len(data) != HEADER.size + num_bytes:
        got = len(data) - HEADER.size
        raise ProtocolError(
            "bad_message", f"expected {count} samples in {num_bytes} bytes, got {got} bytes"
        )
    samples = np.frombuffer(data, "<i2", offset=HEADER.size).astype(np.int16, copy=False)
    return Speech(epoch, index, samples if channels == 1 else samples.reshape(count, channels))


def pack(kind: int, flags: int, epoch: int, index: int, count: int, payload: bytes) -> bytes:
    """A binary message."""
    return HEADER.pack(kind, flags, 0, epoch, index, count) + payload


def pack_speech(epoch: int, index: int, samples: Pcm) -> bytes:
    """A client's binary message."""
    return pack(SPEECH, 0, epoch, index, len(samples), samples.astype("<i2", copy=False).tobytes())


def message(kind: str, **fields: Any) -> str:
    """A text message."""
    return json.dumps({"type": kind, **fields}, allow_nan=False)


def parse_text(text: str) -> ClientMessage:
    """A text message of a client.

    Raises:
        ProtocolError: too long, not a JSON object, an unknown type, or a field that is missing or
            of another kind.
    """
    if len(text) > MAX_TEXT_CHARS:
        raise ProtocolError(
            "too_long", f"expected at most {MAX_TEXT_CHARS} characters of text, got {len(text)}"
        )
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        raise ProtocolError(
            "bad_message", "expected JSON in a text message, got something else"
        ) from None
    kind = fields.get("type") if isinstance(fields, dict) else None
    reader = _READERS.get(kind) if isinstance(kind, str) else None
    if reader is None:
        known = ", ".join(_READERS)
        raise ProtocolError(
            "bad_message", f"expected a message of type {known}, got {_short(kind)}"
        )
    return reader(fields)


def _hello(fields: dict[str, Any]) -> Hello:
    version = fields.get("version")
    if isinstance(version, bool) or version not in VERSIONS:
        known = " or ".join(map(str, VERSIONS))
        raise ProtocolError(
            "version", f"expected version {known} of the protocol, got {_short(version)}"
        )
    codecs = fields.get("codecs", list(Hello.codecs))
    if not isinstance(codecs, list) or not all(isinstance(codec, str) for codec in codecs):
        raise ProtocolError(
            "bad_message", f"expected codecs as a list of names, got {_short(codecs)}"
        )
    portrait = fields.get("portrait")
    if portrait is not None and not isinstance(portrait, str):
        raise ProtocolError("bad_message", f"expected the id of a portrait, got {_short(portrait)}")
    live = fields.get("live", True) if version > 1 else True
    if not isinstance(live, bool):
        raise ProtocolError("bad_message", f"expected live as true or false, got {_short(live)}")
    seed = _integer(fields, "seed", 2**63 - 1, default=0)
    return Hello(tuple(codecs), portrait, seed, version, live)


def _format(fields: dict[str, Any]) -> Format:
    rate_hz = _integer(fields, "sample_rate_hz", MAX_RATE_HZ)
    channels = _integer(fields, "channels", MAX_CHANNELS, default=1)
    if rate_hz < MIN_RATE_HZ or not channels:
        raise ProtocolError(
            "bad_message",
            f"expected speech of {MIN_RATE_HZ} to {MAX_RATE_HZ} Hz with 1 to {MAX_CHANNELS} "
            f"channels, got {rate_hz} Hz with {channels}",
        )
    return Format(rate_hz, channels)


def _identity(fields: dict[str, Any]) -> Identity:
    portrait = fields.get("portrait")
    if not isinstance(portrait, str):
        raise ProtocolError("bad_message", f"expected the id of a portrait, got {_short(portrait)}")
    return Identity(portrait)


def _record(fields: dict[str, Any]) -> Record:
    on = fields.get("on")
    if not isinstance(on, bool):
        raise ProtocolError("bad_message", f"expected on as true or false, got {_short(on)}")
    return Record(on)


def _stats(fields: dict[str, Any]) -> Stats:
    return Stats(*(_number(fields.get(name)) for name in ("slack_ms", "offset_ms", "latency_ms")))


def _number(value: Any) -> float | None:
    """A finite number, else None: what a client measures may be missing."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9
    return float(value) if good else None


def _integer(fields: dict[str, Any], name: str, largest: int, default: int | None = None) -> int:
    value = fields.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= largest:
        raise ProtocolError(
            "bad_message", f"expected {name} as an integer of at least 0, got {_short(value)}"
        )
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


_READERS: dict[str, Callable[[dict[str, Any]], ClientMessage]] = {
    "hello": _hello,
    "interrupt": lambda fields: Interrupt(_integer(fields, "epoch", MAX_EPOCH)),
    "identity": _identity,
    "flush": lambda fields: Flush(),
    "format": _format,
    "record": _record,
    "end": lambda fields: End(),
    "stats": _stats,
}


HEARTBEAT_S = 15.0  # a side that does not answer for so long has gone


class AioChannel:
    """A WebSocket of aiohttp as a :class:`rest_lightning.serve.protocol.Channel`."""

    def __init__(self, socket: web.WebSocketResponse | ClientWebSocketResponse) -> None:
        self._socket = socket

    async def receive(self) -> bytes | str:
        """The next message."""
        received = await self._socket.receive()
        if received.type in (WSMsgType.BINARY, WSMsgType.TEXT):
            data: bytes | str = received.data
            return data
        raise ChannelClosed

    async def send_bytes(self, data: bytes) -> None:
        """Sends a binary message."""
        try:
            await self._socket.send_bytes(data)
        except (ConnectionError, RuntimeError):
            raise ChannelClosed from None

    async def send_text(self, text: str) -> None:
        """Sends a text message."""
        try:
            await self._socket.send_str(text)
        except (ConnectionError, RuntimeError):
            raise ChannelClosed from None

    async def close(self) -> None:
        """Closes."""
        await self._socket.close(code=WSCloseCode.OK)
