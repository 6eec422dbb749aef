"""Nothing of a session is left when it has ended, without a collection of garbage."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator

import pytest
from live import collect, cut, serving, settled, short_head, tone, until

from rest_lightning.serve import encoder, session
from rest_lightning.serve.client import LiveClient
from rest_lightning.serve.server import LiveServer

ENDS = ("finish", "leave", "nonsense", "stop")


@pytest.fixture
def without_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_collection")
@pytest.mark.parametrize("codec", ["h264", "jpeg"])
@pytest.mark.parametrize("end", ENDS)
def test_encoder_and_session_go_with_the_client(
    monkeypatch: pytest.MonkeyPatch, codec: str, end: str
) -> None:
    alive: weakref.WeakSet[object] = weakref.WeakSet()
    for module, name in ((encoder, "H264Encoder"), (encoder, "JpegEncoder"), (session, "Session")):
        made = getattr(module, name)

        def watched(*args: object, made: type = made) -> object:
            alive.add(one := made(*args))
            return one

        monkeypatch.setattr(module, name, watched)

    async def scenario() -> None:
        async with serving(short_head(), 1) as server:
            for _ in range(2):
                await one_session(server, codec, end)
                await settled(server)
                async with asyncio.timeout(20):  # the connection has a last turn of its own
                    while alive:
                        await asyncio.sleep(0.02)

    asyncio.run(scenario())


async def one_session(server: LiveServer, codec: str, end: str) -> None:
    async with LiveClient(server.url, codecs=(codec,)) as client:
        if end == "finish":
            await collect(client, cut(tone(0.5), 640))
            return
        await client.send(tone(0.5))
        await until(client, "chunk")
        if end == "nonsense":
            await client.socket.send_str("nonsense")
        elif end == "stop":
            for each in list(server.service.sessions):
                each.stop("stopping", "the server stops")
        else:
            return
        while await client.receive() is not None:
            pass
