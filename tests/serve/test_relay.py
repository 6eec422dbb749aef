"""A relay passes messages on as they are, and tells a replica that has died from one that has
finished.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest
from aiohttp import WSMsgType, web

from rest_lightning.serve.limits import Limits
from rest_lightning.serve.protocol import ChannelClosed

pytest.importorskip("ray.serve", reason="the extra `ray` serves replicas")

from rest_lightning.serve.ray_engine import LOST, Relay

Replica = Callable[[web.Request, web.WebSocketResponse], Awaitable[None]]


class Wire:
    """A channel of queues; with ``room``, its client takes so many messages and then reads no
    more.
    """

    def __init__(self, room: int = 0) -> None:
        self.to_server: asyncio.Queue[bytes | str | None] = asyncio.Queue()
        self.to_client: asyncio.Queue[bytes | str] = asyncio.Queue(room)
        self.is_closed = False

    async def receive(self) -> bytes | str:
        if (data := await self.to_server.get()) is None:
            raise ChannelClosed
        return data

    async def send_bytes(self, data: bytes) -> None:
        await self.to_client.put(data)

    async def send_text(self, text: str) -> None:
        await self.to_client.put(text)

    async def close(self) -> None:
        self.is_closed = True

    def sent(self) -> list[bytes | str]:
        return [self.to_client.get_nowait() for _ in range(self.to_client.qsize())]


@asynccontextmanager
async def replica_at(behave: Replica, seen: list[object]) -> AsyncIterator[str]:
    """A WebSocket server in the place of a replica; yields its address."""

    async def handle(request: web.Request) -> web.WebSocketResponse:
        seen.append(
            (request.query["token"], request.headers["Origin"], request.headers["X-Rest-Address"])
        )
        response = web.WebSocketResponse()
        await response.prepare(request)
        await behave(request, response)
        return response

    app = web.Application()
    app.add_routes([web.get("/ws", handle)])
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def echo_three(request: web.Request, response: web.WebSocketResponse) -> None:
    for _ in range(3):
        received = await response.receive()
        send = response.send_bytes if received.type == WSMsgType.BINARY else response.send_str
        await send(received.data)
    await response.send_str('{"type": "bye", "reason": "enough"}')


def test_messages_pass_unchanged_to_the_last() -> None:
    sent: list[bytes | str] = [
        ('{"type": "hello", "later": "\\u00e9"}'),
        bytes(range(256)) * 300,
        '{"type": "end"}',
    ]

    async def scenario() -> tuple[str, Wire, list[object], str]:
        wire, seen = Wire(), list[object]()
        for each in sent:
            wire.to_server.put_nowait(each)
        async with replica_at(echo_three, seen) as url, asyncio.timeout(10):
            return await Relay(wire, Limits()).run(url, "t0ken", "192.0.2.7"), wire, seen, url

    reason, wire, seen, url = asyncio.run(scenario())
    assert reason == "ended" and wire.is_closed
    assert wire.sent() == [*sent, '{"type": "bye", "reason": "enough"}']
    assert seen == [("t0ken", url, "192.0.2.7")]


async def cut_off(request: web.Request, response: web.WebSocketResponse) -> None:
    await response.send_bytes(b"a frame")
    assert request.transport is not None
    request.transport.abort()


async def close_without_a_word(request: web.Request, response: web.WebSocketResponse) -> None:
    await response.send_bytes(b"a frame")
    await response.close()


@pytest.mark.parametrize("behave", [cut_off, close_without_a_word])
def test_a_replica_that_dies_is_told_without_a_bye(behave: Replica) -> None:
    async def scenario() -> tuple[str, Wire]:
        wire = Wire()
        async with replica_at(behave, []) as url, asyncio.timeout(10):
            return await Relay(wire, Limits()).run(url, "t", ""), wire

    reason, wire = asyncio.run(scenario())
    assert reason == "lost" and wire.is_closed
    assert wire.sent()[-1] == json.dumps({"type": "error", "code": "lost", "message": LOST})


def test_a_replica_that_cannot_be_reached_is_lost() -> None:
    with socket.socket() as taken:  # bound and not listening
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"

        async def scenario() -> tuple[str, Wire]:
            wire = Wire()
            return await Relay(wire, Limits()).run(url, "t", ""), wire

        reason, wire = asyncio.run(scenario())
    assert reason == "lost" and "failed" in str(wire.sent()[-1])


async def send_on(request: web.Request, response: web.WebSocketResponse) -> None:
    """Never reads, so that it does not learn that the other side closes."""
    with suppress(ConnectionError):
        while True:
            await response.send_bytes(bytes(1000))
            await asyncio.sleep(0.001)


async def listen(request: web.Request, response: web.WebSocketResponse) -> None:
    async for _ in response:
        pass


def test_a_client_that_goes_leaves_its_replica() -> None:
    left = asyncio.Event()

    async def note_the_end(request: web.Request, response: web.WebSocketResponse) -> None:
        await listen(request, response)
        left.set()

    async def scenario() -> str:
        wire = Wire()
        async with replica_at(note_the_end, []) as url, asyncio.timeout(10):
            relaying = asyncio.create_task(Relay(wire, Limits()).run(url, "t", ""))
            wire.to_server.put_nowait(None)
            await left.wait()
            return await relaying

    assert asyncio.run(scenario()) == "gone"


def test_a_client_that_does_not_read_is_given_up() -> None:
    async def scenario() -> tuple[str, Wire]:
        wire = Wire(room=5)
        async with replica_at(send_on, []) as url, asyncio.timeout(10):
            return await Relay(wire, Limits(unread_s=0.3)).run(url, "t", ""), wire

    reason, wire = asyncio.run(scenario())
    assert reason == "unread" and wire.is_closed and wire.sent() == [bytes(1000)] * 5


def test_stopping_is_told() -> None:
    async def scenario() -> tuple[str, Wire]:
        wire = Wire()
        relay = Relay(wire, Limits())
        async with replica_at(listen, []) as url, asyncio.timeout(10):
            asyncio.get_running_loop().call_later(
                0.1, relay.stop, "stopping", "the server is stopping"
            )
            return await relay.run(url, "t", ""), wire

    reason, wire = asyncio.run(scenario())
    told = [json.loads(each) for each in wire.sent()]
    assert reason == "stopping"
    assert told == [
        {"type": "error", "code": "stopping", "message": "the server is stopping"},
        {"type": "bye", "reason": "the server is stopping"},
    ]
