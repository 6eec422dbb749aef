"""Clients that send nonsense and cut their uploads: the server goes on, and nothing is left."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import aiohttp
import pytest
from live import collect, cut, open_session, serving, settled, short_head, tone
from mutations import mutated
from processes import descendants
from stills import face_png

from rest_lightning.machine import resident_memory_mb
from rest_lightning.serve.client import LiveClient
from rest_lightning.serve.metrics import LOG
from rest_lightning.serve.protocol import message, pack_speech
from rest_lightning.serve.server import LiveServer

SECONDS = float(os.environ.get("REST_HOSTILE_SECONDS", "30"))
Attack = Callable[[LiveServer, int], Awaitable[str]]


@pytest.fixture
def failures() -> Iterator[list[str]]:
    """What the server has logged as a fault of its own."""
    told: list[str] = []

    class Keeps(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    handler = Keeps(logging.ERROR)
    LOG.addHandler(handler)
    yield told
    LOG.removeHandler(handler)


def attack(count: int, one: Attack, faults: list[str], **limits: float) -> tuple[int, float]:
    """So many tries against one server, which must serve a session afterwards; what was tried, and
    by how many MB the process has grown.
    """

    async def scenario() -> tuple[int, float]:
        async with serving(short_head(), 2, **limits) as server:
            end_s, tried, before_mb = time.monotonic() + SECONDS, 0, resident_memory_mb()
            while tried < count and time.monotonic() < end_s:
                if fault := await one(server, tried):
                    faults.append(f"{tried}: {fault}")
                tried += 1
            async with asyncio.timeout(60):
                while server._num_uploads or server.admission.num_active:
                    await asyncio.sleep(0.05)
            await settled(server)
            async with LiveClient(server.url, codecs=("jpeg",)) as client:
                received = await collect(client, cut(tone(0.4), 640))
            assert received[-1] == {"type": "bye", "reason": "the session has ended"}
            return tried, resident_memory_mb() - before_mb

    return asyncio.run(scenario())


# -- messages --------------------------------------------------------------------------------------

GOOD: tuple[bytes | str, ...] = (
    message("hello", version=2, codecs=["jpeg"], portrait=None, seed=0),
    message("interrupt", epoch=1),
    message("identity", portrait="a"),
    message("stats", offset_ms=1.5),
    message("end"),
    pack_speech(0, 0, tone(0.1)),
)
NONSENSE: tuple[bytes | str, ...] = (
    *("", "null", "[]", "{", '{"type": 1}', '{"type": "hello"}', "[" * 5000, '{"a":' * 2000),
    *('{"type": "interrupt", "epoch": 1e400}', '{"type": "interrupt", "epoch": -1}'),
    *('{"type": "hello", "version": 2, "codecs": {}}', '{"type": "stats", "offset_ms": "NaN"}'),
    *(
        '{"type": "identity", "portrait": "' + "x" * 60_000 + '"}',
        "\x00\x01",
        b"",
        b"\x01",
        b"\xff" * 70,
    ),
    *(bytes(60_000), b"\x01" + b"\xff" * 15, '{"type": "hello", "seed": 1e99, "version": 2}'),
)


async def bad_message(server: LiveServer, seed: int) -> str:
    """A session that begins with, or meets, a message with faults."""
    rng = random.Random(seed)
    if seed % 3 == 0:
        bad: bytes | str = NONSENSE[seed // 3 % len(NONSENSE)]
    else:
        good = rng.choice(GOOD)
        data = mutated(good.encode() if isinstance(good, str) else good, seed)[:100_000]
        bad = data.decode("latin-1") if isinstance(good, str) else data
    async with aiohttp.ClientSession() as http:
        token = (await open_session(http, server))["token"]
        async with http.ws_connect(f"{server.url}/ws?token={token}", origin=server.url) as socket:
            if seed % 2:
                await socket.send_str(str(GOOD[0]))
                await socket.receive(20)
            with suppress(ConnectionError):
                await (socket.send_str(bad) if isinstance(bad, str) else socket.send_bytes(bad))
                await socket.send_str(message("end"))
            errors = []
            async with asyncio.timeout(30):
                while (received := await socket.receive()).type in (
                    aiohttp.WSMsgType.TEXT,
                    aiohttp.WSMsgType.BINARY,
                ):
                    said = json.loads(received.data) if isinstance(received.data, str) else {}
                    if said.get("type") == "error":
                        errors.append(said)
    for said in errors:
        if said["code"] in ("internal", "model") or "\n" in said["message"]:
            return f"{bad[:60]!r}: {said}"
    return ""


def test_bad_messages(failures: list[str], tally: Callable[..., None]) -> None:
    faults: list[str] = []
    tried, grown_mb = attack(120, bad_message, faults, hello_s=2.0)
    note = "the next session is served"
    tally("bad messages to `rest serve`", tried, faults + failures, note)
    assert grown_mb < 200


# -- uploads ---------------------------------------------------------------------------------------


async def cut_upload(server: LiveServer, seed: int) -> str:
    """A form with a portrait or sound that ends early, or has faults."""
    rng = random.Random(seed)
    kind, body = rng.choice((("portraits", face_png()), ("speech", b"RIFF" + bytes(200_000))))
    edge = "--------abc"
    form = (
        f"--{edge}\r\nContent-Disposition: form-data; name=file; filename=a.png\r\n\r\n".encode()
        + body
        + f"\r\n--{edge}--\r\n".encode()
    )
    sent = mutated(form, seed) if seed % 4 == 0 else form[: rng.randrange(len(form))]
    host, port = server.url.removeprefix("http://").split(":")
    head = (
        f"POST /api/{kind} HTTP/1.1\r\nHost: {host}:{port}\r\nOrigin: {server.url}\r\n"
        f"Content-Type: multipart/form-data; boundary={edge}\r\nContent-Length: {len(form)}\r\n\r\n"
    ).encode()
    data = head + sent
    if seed % 7 == 0:
        data = data[: rng.randrange(len(head))]
    reader, writer = await asyncio.open_connection(host, int(port))
    answer = b""
    with suppress(ConnectionError):
        writer.write(data)
        await writer.drain()
        if seed % 4 == 0 and len(sent) >= len(form):
            async with asyncio.timeout(60):
                answer = await reader.read(4096)
        if seed % 2:
            writer.transport.abort()
    writer.close()
    status = answer[9:12]
    return f"answered {answer[:200]!r}" if status[:1] == b"5" and status != b"503" else ""


def test_cut_uploads(failures: list[str], tally: Callable[..., None]) -> None:
    faults: list[str] = []
    places = Path(tempfile.gettempdir())
    before = {path.name for path in places.iterdir()}
    running = set(descendants(os.getpid()))  # of earlier tests: multiprocessing keeps a tracker
    tried, grown_mb = attack(200, cut_upload, faults, header_s=2.0)
    left = {path.name for path in places.glob("rest*")} - before
    faults += [f"left in the temporary folder: {name}" for name in sorted(left)]
    faults += [f"process {pid} is left" for pid in set(descendants(os.getpid())) - running]
    tally("cut and broken uploads", tried, faults + failures, "no file and no process is left")
    assert grown_mb < 200
