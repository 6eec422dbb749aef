"""Conversations over loopback: who answers, who interrupts, both versions of the protocol, servers
that misbehave.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

pytest.importorskip("aiohttp", reason="aiohttp (extra `converse`) serves the page")

from aiohttp import web
from live import tone

from rest_lightning.avatar import AvatarPool
from rest_lightning.avatar.simulation import TracedModel
from rest_lightning.commands import converse as command
from rest_lightning.errors import UserError
from rest_lightning.serve.client import LiveClient, Received, Sound
from rest_lightning.serve.converse import ConverseServer
from rest_lightning.serve.limits import Limits
from rest_lightning.serve.loopback import loopback_server
from rest_lightning.serve.realtime import RealtimeClient, Trouble
from rest_lightning.serve.server import ServerOptions


@asynccontextmanager
async def conversing(url: str) -> AsyncIterator[ConverseServer]:
    """A server of conversations with a realtime server; afterwards nothing is left."""
    pool = AvatarPool(TracedModel(compute_s=0.05), 1)  # type: ignore[arg-type]
    await pool.start()
    limits = Limits(max_sessions=1, max_per_address=1)
    server = ConverseServer(pool, lambda: RealtimeClient(url), ServerOptions(port=0), limits)
    try:
        async with server:
            yield server
            async with asyncio.timeout(10):
                while server.service.sessions or pool.num_free < 1:
                    await asyncio.sleep(0.01)
    finally:
        await server.aclose()


class Talker:
    """A client that sends its microphone in real time, and keeps what comes."""

    def __init__(self, client: LiveClient) -> None:
        self.client = client
        self.received: list[tuple[float, Received]] = []
        self.speech = np.zeros(0, np.int16)
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Talker:
        self._tasks = [asyncio.create_task(each) for each in (self._send(), self._receive())]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _send(self) -> None:
        loop = asyncio.get_running_loop()
        due_s = loop.time()
        while True:
            block, self.speech = self.speech[:320], self.speech[320:]
            await self.client.send(np.pad(block, (0, 320 - len(block))))
            due_s += 0.02
            await asyncio.sleep(due_s - loop.time())

    async def _receive(self) -> None:
        while (received := await self.client.receive()) is not None:
            self.received.append((asyncio.get_running_loop().time(), received))

    def heard(self, after_s: float = 0.0) -> np.ndarray:
        sounds = [
            each.samples
            for at_s, each in self.received
            if isinstance(each, Sound) and at_s > after_s
        ]
        return np.concatenate([np.zeros(0, np.int16), *sounds])

    def said(self, kind: str) -> list[dict[str, Any]]:
        return [
            each for _, each in self.received if isinstance(each, dict) and each["type"] == kind
        ]

    async def wait(self, condition: Callable[[], bool], seconds: float = 10.0) -> float:
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.01)
        return asyncio.get_running_loop().time()


def loudness(sound: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(sound / 32768.0)))) if len(sound) else 0.0


def test_the_loopback_repeats_what_was_said_and_can_be_interrupted() -> None:
    """Two conversations at a time, one in each version of the protocol."""

    async def talk(version: int) -> None:
        async with loopback_server() as url, conversing(url) as server:
            client = LiveClient(server.url, codecs=("jpeg",))
            client._hello["version"] = version
            async with client, Talker(client) as talker:
                rate = 24_000 if version == 2 else 16_000
                assert (client.hello["version"], client.hello["sample_rate_hz"]) == (version, rate)
                talker.speech = tone(1.2)
                await talker.wait(lambda: loudness(talker.heard()[-rate // 4 :]) > 0.15)
                await talker.wait(lambda: loudness(talker.heard()[-rate // 4 :]) < 0.01)
                loud = np.abs(talker.heard().astype(int)) > 3000
                assert 0.7 * 1.2 * rate * 0.7 < loud.sum() < 1.3 * 1.2 * rate
                talker.speech = tone(2.5)
                await talker.wait(lambda: loudness(talker.heard()[-rate // 4 :]) > 0.15)
                talker.speech = tone(0.5, hz=330)
                at_s = await talker.wait(
                    lambda: loudness(talker.heard()[-rate // 10 :]) < 0.01, 1.5
                )
                assert bool(talker.said("interrupt")) is (version == 2)
                assert bool(talker.said("caption")) is (version == 2)
                await talker.wait(
                    lambda: loudness(talker.heard(at_s)[-rate // 4 :]) > 0.1
                )  # the next answer
                kinds = {type(each).__name__ for _, each in talker.received}
                assert kinds >= {"Picture", "Sound"}

    async def both() -> None:
        async with asyncio.TaskGroup() as group:
            for version in (1, 2):
                group.create_task(talk(version))

    asyncio.run(both())


def test_a_client_interrupts_and_changes_the_portrait() -> None:
    async def talk() -> None:
        async with (
            loopback_server() as url,
            conversing(url) as server,
            LiveClient(server.url, codecs=("jpeg",)) as client,
            Talker(client) as talker,
        ):
            talker.speech = tone(2.0)
            await talker.wait(lambda: loudness(talker.heard()[-6000:]) > 0.15)
            await client.interrupt()
            at_s = await talker.wait(lambda: bool(talker.said("interrupted")), 1.0)
            await asyncio.sleep(0.5)
            assert loudness(talker.heard(at_s)) == 0.0
            await client.switch_identity("nobody")
            await talker.wait(
                lambda: any(each["code"] == "portrait" for each in talker.said("error"))
            )
            await client.switch_identity(server.portraits.listed()[-1]["id"])
            await talker.wait(lambda: bool(talker.said("identity")))
            await client.end()
            await talker.wait(lambda: bool(talker.said("bye")))

    asyncio.run(talk())


@asynccontextmanager
async def stub(answer: Callable[[web.WebSocketResponse], Awaitable[None]]) -> AsyncIterator[str]:
    """A server that does one thing with whoever connects."""

    async def handle(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await answer(socket)
        return socket

    app = web.Application()
    app.router.add_get("/", handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"ws://127.0.0.1:{runner.addresses[0][1]}/"
    finally:
        await runner.cleanup()


def test_garbage_of_a_realtime_server_is_one_line_each_and_the_rest_goes_on() -> None:
    audio = {
        "type": "response.audio.delta",
        "response_id": "r",
        "item_id": "i",
        "delta": "AAAAAA==",
    }
    garbage = [
        "no json",
        "[1, 2]",
        '{"type": 3}',
        json.dumps({**audio, "delta": "?"}),
        json.dumps({"type": "response.created"}),
    ]

    async def answer(socket: web.WebSocketResponse) -> None:
        for text in garbage:
            await socket.send_str(text)
        await socket.send_bytes(b"\x00")
        await socket.send_str(json.dumps({"type": "error", "error": {"message": "too\nmany"}}))
        await socket.send_str(json.dumps(audio))
        await socket.receive()

    async def talk() -> list[Any]:
        events = []
        async with stub(answer) as url, RealtimeClient(url) as client:
            async for event in client.events():
                events.append(event)
                if len(events) == 7:
                    return events
        raise AssertionError("the events have ended")

    events = asyncio.run(asyncio.wait_for(talk(), 10))
    troubles = [event.text for event in events if isinstance(event, Trouble)]
    assert len(troubles) == 6 and not any("\n" in text for text in troubles)
    assert troubles[-1] == "the realtime server says: too many"
    assert (
        sum(text.startswith("expected an event of the realtime server, got") for text in troubles)
        == 4
    )
    assert type(events[-1]).__name__ == "Answer"


def test_a_realtime_server_that_drops_is_called_again() -> None:
    num_calls = 0

    async def answer(socket: web.WebSocketResponse) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls > 1:
            await socket.send_str(json.dumps({"type": "input_audio_buffer.speech_started"}))
            await socket.receive()

    async def talk() -> list[str]:
        names: list[str] = []
        async with stub(answer) as url, RealtimeClient(url) as client:
            async for event in client.events():
                names.append(type(event).__name__)
                if len(names) == 2:
                    return names
        return names

    assert asyncio.run(asyncio.wait_for(talk(), 10)) == ["Trouble", "SpeechStarted"]


def test_a_realtime_server_that_is_absent_is_one_line() -> None:
    async def talk() -> dict[str, Any]:
        async with conversing("ws://127.0.0.1:9/") as server:
            with pytest.raises(
                UserError, match=r"expected a realtime server at ws://127\.0\.0\.1:9/, got none"
            ):
                async with LiveClient(server.url):
                    pass
        return {}

    asyncio.run(talk())
    with pytest.raises(
        UserError, match="expected a ws:// or wss:// address of a realtime server, got 'http://x'"
    ):
        RealtimeClient("http://x")
    from rest_lightning.cli import main

    assert main(["converse", "--realtime", "http://x"]) == 2
    assert main(["converse", "--realtime", "ws://127.0.0.1:9/", "--model", "none"]) == 2
    assert command.LOOPBACKS == ("echo", "espeak")
