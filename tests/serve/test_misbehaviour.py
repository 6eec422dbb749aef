"""Clients that break the rules, flood, fall silent or vanish: they are told in a line, and the
others go on.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import socket
import weakref
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import aiohttp
import numpy as np
import pytest
from live import (
    collect,
    cut,
    open_session,
    pictures_of,
    said,
    serving,
    settled,
    short_head,
    sound_of,
    tone,
    until,
)

from rest_lightning.errors import UserError
from rest_lightning.serve.client import LiveClient, Received
from rest_lightning.serve.protocol import message, pack_speech
from rest_lightning.serve.server import LiveServer
from rest_lightning.serve.session import Session
from rest_lightning.talking_head import TalkingHead

CHUNK = 8 * 640
Misdeed = Callable[[LiveClient], Awaitable[None]]


@pytest.fixture(scope="module")
def head() -> TalkingHead:
    return short_head()


async def _text(client: LiveClient, text: str) -> None:
    await client.socket.send_str(text)


async def _flood(client: LiveClient) -> None:
    for _ in range(3000):
        await client.socket.send_bytes(pack_speech(0, 0, np.zeros(0, np.int16)))


async def _too_fast(client: LiveClient) -> None:
    for _ in range(12):
        await client.send(np.zeros(16_000, np.int16))


async def _back(client: LiveClient) -> None:
    await client.send(tone(0.1))
    await client.socket.send_bytes(pack_speech(0, 100, tone(0.1)))


async def _interrupt_often(client: LiveClient) -> None:
    for _ in range(30):
        await client.interrupt()


MISDEEDS: dict[str, tuple[Misdeed, str, str]] = {
    "text": (lambda client: _text(client, "hello there"), "bad_message", "expected JSON"),
    "half a header": (
        lambda client: client.socket.send_bytes(b"\1\0\0\0\0"),
        "bad_message",
        "header of 16 bytes",
    ),
    "odd bytes": (
        lambda client: client.socket.send_bytes(pack_speech(0, 0, tone(0.1))[:-1]),
        "bad_message",
        "1600 s",
    ),
    "a frame": (
        lambda client: client.socket.send_bytes(b"\2" + bytes(15)),
        "bad_message",
        "got type 2",
    ),
    "future": (
        lambda client: client.socket.send_bytes(pack_speech(2, 0, tone(0.1))),
        "epoch",
        "epoch 0 or 1, got 2",
    ),
    "future interruption": (
        lambda client: _text(client, message("interrupt", epoch=9)),
        "epoch",
        "got 9",
    ),
    "large": (
        lambda client: client.send(np.zeros(40_000, np.int16)),
        "too_long",
        "at most 65536 bytes, got 80016",
    ),
    "second hello": (
        lambda client: _text(client, message("hello", version=1)),
        "hello",
        "got a second one",
    ),
    "flood": (_flood, "flood", "at most 250 messages a second"),
    "too fast": (_too_fast, "input_rate", "1.2 x real time at most"),
    "back in time": (_back, "index", "from sample 1600 of the epoch on, got sample 100"),
    "interruptions": (_interrupt_often, "flood", "at most 4 interruptions a second"),
    "model": (
        lambda client: client.send(np.full(9000, 32767, np.int16)),
        "model",
        "the model failed in this session",
    ),
}


def test_whoever_breaks_the_rules_is_told_in_one_line_and_the_others_go_on(
    head: TalkingHead,
) -> None:
    async def misbehave(server: LiveServer, name: str) -> None:
        misdeed, code, told = MISDEEDS[name]
        async with LiveClient(server.url) as client:
            with suppress(ConnectionError):  # ended while it goes on
                await misdeed(client)
            error = await until(client, "error")
            assert error["code"] == code and told in error["message"], (name, error)
            assert "\n" not in error["message"] and "/" not in error["message"].replace("mp3/", "")
            assert (await until(client, "bye"))["reason"] == error["message"]
            assert await client.receive() is None
        await settled(server, 1)

    async def scenario() -> list[Received]:
        async with serving(head, 2) as server, LiveClient(server.url) as good:
            speech = cut(tone(60.0), 1600)
            streaming = asyncio.create_task(collect(good, speech))
            for name in MISDEEDS:
                await misbehave(server, name)
            assert not streaming.done()
            await good.end()
            text = server.service.metrics.exposition().decode()
            assert 'rest_sessions_ended_total{reason="bad_message"} 4.0' in text
            assert "rest_model_errors_total 1.0" in text
            received = await streaming
        return received

    received = asyncio.run(scenario())
    assert not said(received, "error")
    indices = [each.index for each in pictures_of(received)]
    assert indices == list(range(len(indices))) and len(indices) >= 8


FIRST_WORDS = {
    '{"type": "hello", "version": 3}': (
        "version",
        "expected version 1 or 2 of the protocol, got 3",
    ),
    '{"type": "end"}': ("hello", "expected a hello first"),
    '{"type": "hello", "version": 1, "codecs": ["vp9"]}': (
        "codec",
        "expected a codec of h264, jpeg",
    ),
    '{"type": "hello", "version": 1, "portrait": "../../etc/passwd"}': (
        "portrait",
        "expected the id of a portrait",
    ),
    "": ("hello", "expected a hello within 0.2 s, got none"),
}


def test_a_wrong_first_word_is_told(head: TalkingHead) -> None:
    async def scenario() -> None:
        async with serving(head, 1, hello_s=0.2) as server, aiohttp.ClientSession() as http:
            for words, (code, told) in FIRST_WORDS.items():
                token = (await open_session(http, server))["token"]
                async with http.ws_connect(
                    f"{server.url}/ws?token={token}", origin=server.url
                ) as connection:
                    if words:
                        await connection.send_str(words)
                    error = json.loads((await connection.receive(10)).data)
                    assert (
                        error["type"] == "error"
                        and error["code"] == code
                        and told in error["message"]
                    )
                await settled(server)

    asyncio.run(scenario())


def test_tokens_and_origins(head: TalkingHead) -> None:
    async def refused(http: aiohttp.ClientSession, url: str, **headers: str) -> int:
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            await http.ws_connect(url, headers=headers)
        return caught.value.status

    async def scenario() -> None:
        async with serving(head, 3) as server, aiohttp.ClientSession() as http:
            port = server.url.rpartition(":")[2]
            for foreign in (
                "http://example.org",
                f"http://example.org:{port}",
                "null",
                server.url + "1",
                "https" + server.url[4:],
            ):
                answer = await open_session(http, server, foreign)
                assert answer["status"] == 403 and "this server's own page" in answer["error"]
            async with http.post(f"{server.url}/api/session") as silent:
                assert silent.status == 403
            assert (await open_session(http, server, f"http://localhost:{port}"))["status"] == 200
            token = (await open_session(http, server))["token"]
            address = f"{server.url}/ws?token={token}"
            assert await refused(http, address) == 403
            assert await refused(http, address, Origin="http://example.org") == 403
            assert await refused(http, f"{server.url}/ws", Origin=server.url) == 403
            assert await refused(http, f"{server.url}/ws?token=guess", Origin=server.url) == 403
            async with http.ws_connect(address, origin=server.url) as connection:
                assert await refused(http, address, Origin=server.url) == 403
                await connection.send_str('{"type": "hello", "version": 1}')
                assert json.loads((await connection.receive(10)).data)["type"] == "hello"

    asyncio.run(scenario())


def test_fifty_sessions_are_refused_in_words_and_two_tabs_are_strangers(head: TalkingHead) -> None:
    async def scenario() -> None:
        async with serving(head, 2) as server, aiohttp.ClientSession() as http:
            low, high = tone(0.8, 0.2, 200), tone(0.8, 0.6, 700)
            async with LiveClient(server.url) as first, LiveClient(server.url) as second:
                for _ in range(50):
                    answer = await open_session(http, server)
                    assert answer["status"] == 503 and "has 2 of 2 sessions" in answer["error"]
                with pytest.raises(UserError, match="this address has 2 of 2 sessions"):
                    await LiveClient(server.url).__aenter__()
                heard = await asyncio.gather(
                    collect(first, cut(low, 320)), collect(second, cut(high, 640))
                )
            for received, samples in zip(heard, (low, high), strict=True):
                sound = sound_of(received)
                present = sound[sound != 0]
                np.testing.assert_array_equal(present, samples[samples != 0])
            await settled(server)
            assert (await open_session(http, server))["status"] == 200

    asyncio.run(scenario())


@pytest.mark.slow
def test_a_client_that_never_reads_is_given_up(head: TalkingHead) -> None:
    async def scenario() -> None:
        limits = {"unread_s": 0.3, "send_buffer_bytes": 4096}
        async with serving(head, 1, **limits) as server, aiohttp.ClientSession() as http:
            token = (await open_session(http, server))["token"]
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
            connection.setblocking(False)
            loop = asyncio.get_running_loop()
            key = "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
            head_lines = (
                f"GET /ws?token={token} HTTP/1.1\r\nHost: x\r\nOrigin: {server.url}\r\n{key}"
            )
            request = head_lines + "Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
            hello = b'{"type": "hello", "version": 1, "codecs": ["jpeg"]}'
            frame = bytes([0x81, 0x80 | len(hello), 0, 0, 0, 0]) + hello  # masked with zeros
            await loop.sock_sendall(connection, request.encode() + frame)
            await asyncio.sleep(0.1)
            await settled(server)
            assert 'reason="unread"} 1.0' in server.service.metrics.exposition().decode()
            connection.close()

    asyncio.run(scenario())


@pytest.mark.slow
def test_clients_that_vanish_leave_nothing(head: TalkingHead) -> None:
    """Whether they close or not, at several moments of a chunk."""

    left: list[weakref.ref[Session]] = []

    async def scenario() -> None:
        async with serving(head, 2) as server:
            for round_, delay_s in itertools.product(range(2), (0.0, 0.02, 0.2)):
                client = await LiveClient(server.url).__aenter__()
                await client.send(tone(1.0))
                await asyncio.sleep(delay_s)
                left.extend(map(weakref.ref, server.service.sessions))
                transport = client.socket._response.connection.transport  # type: ignore[union-attr]
                if round_:
                    transport.abort()
                await client.__aexit__()
                await settled(server)
            text = server.service.metrics.exposition().decode()
            assert (
                'rest_sessions_ended_total{reason="gone"} 6.0' in text
                and "rest_sessions 0.0" in text
            )

    asyncio.run(scenario())
    gc.collect()
    assert len(left) == 6 and all(session() is None for session in left)


@pytest.mark.parametrize(
    ("limits", "code", "told"),
    [
        ({"session_s": 0.6}, "too_long", "a session lasts 0.01 minutes"),
        ({"idle_s": 0.5}, "idle", "nothing was sent for"),
    ],
)
@pytest.mark.slow
def test_sessions_end_in_time(
    head: TalkingHead, limits: dict[str, float], code: str, told: str
) -> None:
    async def scenario() -> dict[str, Any]:
        async with serving(head, 1, **limits) as server, LiveClient(server.url) as client:
            return await until(client, "error")

    error = asyncio.run(scenario())
    assert error["code"] == code and told in error["message"]
