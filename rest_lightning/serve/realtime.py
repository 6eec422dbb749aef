"""A client of OpenAI-Realtime-compatible servers: speech goes up, speech comes down, and who
interrupts whom.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, Self

import aiohttp
import numpy as np

from rest_lightning.errors import UserError
from rest_lightning.serve.protocol import Pcm

RATE_HZ = 24_000  # of the protocol's pcm16
KEY_VARIABLES = ("REALTIME_API_KEY", "OPENAI_API_KEY")
_CONNECT_S = 10.0
_RETRY_S = (0.5, 1.0, 2.0, 4.0)
_MAX_MESSAGE_BYTES = 2**24


@dataclass(frozen=True)
class SpeechStarted:
    """The user has begun to speak: whoever speaks falls silent."""


@dataclass(frozen=True)
class Answer:
    """Speech of the agent, mono, 24 kHz; ``item`` is what it belongs to."""

    item: str
    samples: Pcm


@dataclass(frozen=True)
class AnswerDone:
    """The speech of an item has been sent."""

    item: str


@dataclass(frozen=True)
class Caption:
    """What was said, as text."""

    who: Literal["user", "agent"]
    text: str


@dataclass(frozen=True)
class Trouble:
    """Something went wrong; one line for people. The conversation goes on if it can."""

    text: str


Event = SpeechStarted | Answer | AnswerDone | Caption | Trouble


class RealtimeClient:
    """One conversation. Usable as an asynchronous context manager.

    The server decides who speaks (its voice activity detection); when it says that the user has
    begun, answers that it had begun are forgotten here. A connection that is lost is made again,
    with growing pauses.

    Args:
        url: ``ws://`` or ``wss://``, with the model in its query where the server wants one.
        key: sent as a bearer token; None sends none.
        session: for ``session.update``; None keeps the server's own instructions and voice.

    Raises:
        UserError: an address that is none.
    """

    def __init__(
        self, url: str, key: str | None = None, session: dict[str, Any] | None = None
    ) -> None:
        if not url.startswith(("ws://", "wss://")):
            raise UserError(f"expected a ws:// or wss:// address of a realtime server, got {url!r}")
        self.url = url
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._session = session
        self._http: aiohttp.ClientSession | None = None
        self._socket: aiohttp.ClientWebSocketResponse | None = None
        self._void: set[str] = set()  # responses that were interrupted
        self._response = ""
        self._is_closed = False

    async def __aenter__(self) -> Self:
        """Connect.

        Raises:
            UserError: nobody there, or one that refuses.
        """
        self._http = aiohttp.ClientSession(headers=self._headers)
        try:
            await self._connect()
        except BaseException:
            await self._http.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._is_closed = True
        if self._socket is not None:
            await self._socket.close()
        if self._http is not None:
            await self._http.close()

    async def _connect(self) -> None:
        assert self._http is not None, "enter the client first"
        try:
            async with asyncio.timeout(_CONNECT_S):
                self._socket = await self._http.ws_connect(
                    self.url, max_msg_size=_MAX_MESSAGE_BYTES, heartbeat=20.0
                )
        except aiohttp.WSServerHandshakeError as error:
            hint = (
                f"set {KEY_VARIABLES[0]} to its key"
                if error.status in (401, 403)
                else "check the address"
            )
            raise UserError(
                f"expected a realtime server at {self.url}, got status {error.status}: {hint}"
            ) from None
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            reason = " ".join(str(error).split()) or "no answer in time"
            raise UserError(
                f"expected a realtime server at {self.url}, got none ({reason}): start it, or use "
                f"--realtime echo"
            ) from None
        if self._session is not None:
            await self._send({"type": "session.update", "session": self._session})

    async def send_speech(self, samples: Pcm) -> None:
        """Speech of the user, mono, 24 kHz; lost while there is no connection."""
        audio = base64.b64encode(samples.astype("<i2", copy=False).tobytes()).decode()
        await self._send({"type": "input_audio_buffer.append", "audio": audio})

    async def cancel(self, item: str | None = None, heard_ms: int = 0) -> None:
        """The agent was interrupted by us.

        Args:
            item: what it was saying, if anything.
            heard_ms: how much of it was heard: the server keeps no more of it in the conversation.
        """
        if self._response:
            self._void.add(self._response)
            await self._send({"type": "response.cancel"})
        if item is not None:
            await self.truncate(item, heard_ms)

    async def truncate(self, item: str, heard_ms: int) -> None:
        """Tell how much of an item was heard."""
        await self._send(
            {
                "type": "conversation.item.truncate",
                "item_id": item,
                "content_index": 0,
                "audio_end_ms": heard_ms,
            }
        )

    async def events(self) -> AsyncIterator[Event]:
        """What the server tells, until the client is closed, or until it stays away."""
        while not self._is_closed:
            assert self._socket is not None, "enter the client first"
            async for message in self._socket:
                if message.type == aiohttp.WSMsgType.TEXT:
                    event = self._read(message.data)
                    if event is not None:
                        yield event
                elif message.type == aiohttp.WSMsgType.BINARY:
                    yield Trouble(
                        "expected text of the realtime server, got binary data: it is left out"
                    )
            if self._is_closed:
                return
            self._response = ""
            yield Trouble("the realtime server has closed the connection: trying again")
            if not await self._reconnect():
                yield Trouble(
                    f"the realtime server at {self.url} stays away: start it, then reload the page"
                )
                return

    async def _reconnect(self) -> bool:
        for wait_s in _RETRY_S:
            await asyncio.sleep(wait_s)
            try:
                await self._connect()
                return True
            except UserError:
                continue
        return False

    async def _send(self, message: dict[str, Any]) -> None:
        if self._socket is None or self._socket.closed:
            return
        with suppress(ConnectionError, aiohttp.ClientError):  # events() makes a new connection
            await self._socket.send_str(json.dumps(message))

    def _read(self, text: str) -> Event | None:
        try:
            message = json.loads(text)
            kind = message["type"]
            return self._event(kind, message) if isinstance(kind, str) else None
        except (ValueError, KeyError, TypeError, AttributeError, binascii.Error):
            short = text if len(text) <= 60 else text[:57] + "..."
            return Trouble(
                f"expected an event of the realtime server, got {short!r}: it is left out"
            )

    def _event(self, kind: str, message: dict[str, Any]) -> Event | None:
        """The names are those of the API since 2025-08 and of its preview."""
        match kind.replace("output_audio", "audio"):
            case "response.created":
                self._response = str(message["response"]["id"])
            case "response.done":
                self._response = ""
            case "input_audio_buffer.speech_started":
                if self._response:
                    self._void.add(self._response)
                return SpeechStarted()
            case "response.audio.delta" if message.get("response_id") not in self._void:
                data = base64.b64decode(message["delta"], validate=True)
                return Answer(str(message["item_id"]), np.frombuffer(data, "<i2").astype(np.int16))
            case "response.audio.done" if message.get("response_id") not in self._void:
                return AnswerDone(str(message["item_id"]))
            case "response.audio_transcript.done" if message.get("response_id") not in self._void:
                return Caption("agent", str(message["transcript"]))
            case "conversation.item.input_audio_transcription.completed":
                return Caption("user", str(message["transcript"]))
            case "error":
                said = " ".join(str(message["error"].get("message", "no reason")).split())
                return Trouble(f"the realtime server says: {said}")
        return None
