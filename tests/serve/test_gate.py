"""Connections that never ask, requests that are none, paths and forms of nobody's making: a limit
for each, an answer in one line, and nothing that was sent in the log.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import aiohttp
import pytest
from live import serving, short_head

from rest_lightning.serve.gate import Gate, Sparing
from rest_lightning.serve.limits import Admission, Limits, Refused
from rest_lightning.serve.metrics import LOG, log_as_json
from rest_lightning.serve.server import LiveServer
from rest_lightning.serve.uploads import Portraits, remove_stale_folders
from rest_lightning.talking_head import TalkingHead

SECRET = "do-not-log-me-7f3a"


@pytest.fixture(scope="module")
def head() -> TalkingHead:
    return short_head()


async def dial(server: LiveServer) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = server.url.removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port))


async def answer(server: LiveServer, request: bytes) -> bytes:
    reader, writer = await dial(server)
    writer.write(request)
    async with asyncio.timeout(20):
        data = await reader.read()
    writer.close()
    return data


@pytest.mark.parametrize(
    "sent", [b"", b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ", b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET"]
)
def test_a_head_that_does_not_come_ends_the_connection(head: TalkingHead, sent: bytes) -> None:
    """From the start, in the middle, and after an answer."""

    async def scenario() -> None:
        async with serving(head, 1, header_s=0.5) as server:
            reader, writer = await dial(server)
            writer.write(sent)
            async with asyncio.timeout(10):
                with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                    await reader.readexactly(10**9)

    asyncio.run(scenario())


def test_idle_connections_leave_room_for_others(head: TalkingHead) -> None:
    async def scenario() -> None:
        async with serving(head, 1, max_connections=20, header_s=1.0) as server:
            idle = [await dial(server) for _ in range(60)]
            await asyncio.sleep(2.0)
            async with aiohttp.ClientSession() as http, http.get(f"{server.url}/healthz") as told:
                assert told.status == 200
            for _, writer in idle:
                writer.close()

    asyncio.run(scenario())


def test_one_address_does_not_take_all_connections() -> None:
    gate = Gate(None, Limits(max_connections=10, connections_per_address=4), print)  # type: ignore[arg-type]
    assert [gate.enter("192.0.2.1") for _ in range(5)] == [None] * 4 + ["address_connections"]
    assert [gate.enter("192.0.2.2") for _ in range(2)] == [None] * 2
    assert [gate.enter("127.0.0.1") for _ in range(5)] == [None] * 4 + ["connections"]
    gate.leave("192.0.2.1")
    assert gate.enter("192.0.2.1") is None


PATHS = [
    *("/page/" + "a" * 5000, "/page/%00", "/page/../../etc/passwd", "/page/%2e%2e/server.py"),
    *("/" + "x" * 9000, "/%ff%fe", "/api/portraits/" + "y" * 3000 + ".png", "/ws?token=" + SECRET),
    *("/page/\x01", "//", "/page/..%5c..", "/ws?token=%zz" + SECRET),
]
HEADS = [
    b"\x16\x03\x01\x02\x00" + SECRET.encode(),
    b"GET /" + SECRET.encode() + b" HTTP/9.9\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    b"GET / HTTP/1.1\r\nBad Header " + SECRET.encode() + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 500 + b"\r\n",
    b"POST /api/session HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
]
FORMS = [
    (b"", "multipart/form-data"),
    (b"", "multipart/form-data; boundary="),
    (SECRET.encode() * 100, "multipart/form-data; boundary=x"),
    (b"--x\r\n" + SECRET.encode(), "multipart/form-data; boundary=x"),
    (b"--x\r\nContent-Disposition: form-data\r\n\r\n\r\n--x--", "multipart/form-data; boundary=x"),
    (
        b'--x\r\nContent-Disposition: form-data; filename="a"\r\nContent-Transfer-Encoding: '
        b"nonsense\r\n\r\n" + SECRET.encode() + b"\r\n--x--",
        "multipart/form-data; boundary=x",
    ),
    (
        b'--x\r\nContent-Disposition: form-data; filename="a"\r\nContent-Encoding: gzip\r\n\r\n'
        + SECRET.encode()
        + b"\r\n--x--",
        "multipart/form-data; boundary=x",
    ),
    (b"--x\r\n" + b"H: " + b"v" * 20_000 + b"\r\n\r\n", "multipart/form-data; boundary=x"),
    (b"--x--\r\n", "multipart/form-data; boundary=" + "b" * 200),
]


def test_what_is_no_request_is_no_500_and_no_line_of_its_own(head: TalkingHead) -> None:
    written = io.StringIO()

    async def scenario() -> None:
        async with serving(head, 1) as server:
            origin = f"Origin: {server.url}\r\n".encode()
            for path in PATHS:
                line = f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
                told = await answer(server, line.encode("latin-1"))
                assert told.split(b" ", 2)[1] in (b"400", b"403", b"404", b"414"), (
                    path,
                    told[:200],
                )
            for request in HEADS:
                told = await answer(server, request)
                assert told.startswith(b"HTTP/1.") and told.split(b" ", 2)[1].startswith(b"4")
            for body, kind in FORMS:
                request = (
                    b"POST /api/portraits HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                    + origin
                    + f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
                )
                told = await answer(server, request + body)
                assert told.split(b" ", 2)[1] == b"400", (body[:40], told[:200])
                assert SECRET.encode() not in told

    handler = log_as_json()
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(written)
    try:
        asyncio.run(scenario())
    finally:
        LOG.removeHandler(handler)
    lines = written.getvalue().splitlines()
    assert all(json.loads(line) for line in lines)
    assert SECRET not in written.getvalue() and "request failed" not in written.getvalue()


def test_headers_on_every_answer(head: TalkingHead) -> None:
    async def scenario() -> None:
        async with serving(head, 1) as server, aiohttp.ClientSession() as http:
            for path in ("/", "/healthz", "/nothing", "/ws", "/page/app.js"):
                async with http.get(server.url + path) as told:
                    assert told.headers["Server"] == "rest"
                    assert told.headers["X-Content-Type-Options"] == "nosniff"
                    assert "Strict-Transport-Security" not in told.headers  # no TLS here

    asyncio.run(scenario())


def test_the_log_is_sparing_and_says_so() -> None:
    written = io.StringIO()
    handler = log_as_json()
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(written)
    handler.filters = [Sparing(rate=1.0, burst=20.0)]
    try:
        for _ in range(10_000):
            LOG.info("again")
    finally:
        LOG.removeHandler(handler)
    assert 20 <= len(written.getvalue().splitlines()) < 100


def test_unused_tokens_of_one_address_do_not_lock_others_out() -> None:
    admission = Admission(Limits(max_sessions=3, max_per_address=3))
    tokens = [admission.grant("192.0.2.1") for _ in range(3)]
    ours = admission.grant("192.0.2.2")
    admission.enter(ours, "192.0.2.2")
    with pytest.raises(Refused, match="unknown, used or too old"):
        admission.enter(tokens[0], "192.0.2.1")
    for token in tokens[1:]:
        admission.enter(token, "192.0.2.1")
    with pytest.raises(Refused, match="full"):
        admission.grant("192.0.2.3")  # sessions that run are never taken


def test_portraits_of_one_address_push_out_its_own_only() -> None:
    portraits = Portraits(max_uploaded=16)
    mine = portraits.add(b"mine", "192.0.2.9")
    theirs = [portraits.add(b"theirs", "192.0.2.1") for _ in range(100)]
    assert portraits.png(mine) == b"mine" and portraits.png(theirs[-1]) == b"theirs"
    assert len(portraits._uploaded) == 1 + 4


def test_the_next_start_removes_what_a_killed_server_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    stale = [tmp_path / f"rest_{kind}_{ended.pid}_abc" for kind in ("upload", "recording")]
    alive = tmp_path / f"rest_upload_{os.getpid()}_abc"
    other = tmp_path / "rest_upload_x"
    for folder in (*stale, alive, other):
        folder.mkdir()
        (folder / "upload").write_bytes(b"somebody's")
    assert remove_stale_folders() == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([alive.name, other.name])
