"""Connections before they are requests: how many there may be, and how long one may take to ask.

aiohttp has no limit on connections and no time limit for headers: a thousand silent connections
would take all files of a process. Here every connection has to bring a whole request head within
``Limits.header_s``, again after each answer; a server takes ``max_connections``, and
``connections_per_address`` of one address (a proxy on this machine may have them all).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from aiohttp import web

from rest_lightning.serve.limits import Bucket, Limits

_QUIET = logging.getLogger("rest_lightning.serve.quiet")
"""What aiohttp says about requests that it cannot read: it would repeat what the client sent."""
_QUIET.addHandler(logging.NullHandler())
_QUIET.propagate = False
LOOPBACK = ("127.0.0.1", "::1", "")


class Gate:
    """Makes the protocol of every connection, for ``loop.create_server``.

    Args:
        server: aiohttp's, of a runner that is set up.
        limits: of connections.
        refused: told a word for each connection that is closed unasked.
    """

    def __init__(self, server: Any, limits: Limits, refused: Callable[[str], object]) -> None:
        self.server, self.limits, self.refused = server, limits, refused
        self._connections: Counter[str] = Counter()

    def __call__(self) -> asyncio.Protocol:
        """The protocol of one connection."""
        return _Connection(self)

    def enter(self, address: str) -> str | None:
        """Count a connection; the word for why it may not be, or None."""
        if self._connections.total() >= self.limits.max_connections:
            return "connections"
        share = self.limits.connections_per_address
        if address not in LOOPBACK and self._connections[address] >= share:
            return "address_connections"
        self._connections[address] += 1
        return None

    def leave(self, address: str) -> None:
        """A counted connection has ended."""
        self._connections[address] -= 1
        if self._connections[address] <= 0:
            del self._connections[address]


class _Connection(web.RequestHandler):
    """aiohttp's protocol, with a clock for request heads."""

    __slots__ = ("_address", "_clock", "_gate")

    def __init__(self, gate: Gate) -> None:
        super().__init__(
            gate.server,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=gate.limits.header_s,
            access_log=None,  # type: ignore[arg-type]  # aiohttp takes None for no log
            logger=_QUIET,
        )
        self._gate = gate
        self._address: str | None = None
        self._clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        peer = transport.get_extra_info("peername")
        address = str(peer[0]) if peer else ""
        why = self._gate.enter(address)
        if why is not None:
            self._gate.refused(why)
            transport.abort()  # type: ignore[attr-defined]
            return
        self._address = address
        self.expect_head()

    def connection_lost(self, exc: BaseException | None) -> None:
        self.head_came()
        if self._address is not None:
            self._gate.leave(self._address)
            self._address = None
        super().connection_lost(exc)

    def expect_head(self) -> None:
        """From now on a whole request head must come in time."""
        self.head_came()
        loop = asyncio.get_running_loop()
        self._clock = loop.call_later(self._gate.limits.header_s, self._too_slow)

    def head_came(self) -> None:
        """The clock stands still while a request is answered."""
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _too_slow(self) -> None:
        self._gate.refused("slow_head")
        if self.transport is not None:
            self.transport.abort()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What cannot be read as HTTP: one line without anything that was sent."""
        self._gate.refused("not_http")
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun already")
        response = web.json_response(
            {"error": "expected an HTTP request, got something else"}, status=min(status, 400)
        )
        response.headers["Server"] = "rest"  # aiohttp's own says its version, and Python's
        response.force_close()
        return response


def head_came(request: web.BaseRequest) -> None:
    """A request's head is whole; see `Gate`."""
    if isinstance(request.protocol, _Connection):
        request.protocol.head_came()


def expect_head(request: web.BaseRequest) -> None:
    """A request is answered: the connection's next one must come in time; see `Gate`."""
    protocol = request.protocol
    if isinstance(protocol, _Connection) and protocol.transport is not None:
        protocol.expect_head()


class Sparing(logging.Filter):
    """Lets ``rate`` lines a second through in the long run, and says how many it has left out."""

    def __init__(self, rate: float = 10.0, burst: float = 200.0) -> None:
        super().__init__()
        self._bucket = Bucket(rate, burst, time.monotonic())
        self._num_left_out = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is written."""
        if not self._bucket.take(1.0, time.monotonic()):
            self._num_left_out += 1
            self._bucket.give(1.0)
            return False
        if self._num_left_out:
            record.left_out_before = self._num_left_out
            self._num_left_out = 0
        return True


def tell_loop_errors_once(loop: asyncio.AbstractEventLoop, log: logging.Logger) -> None:
    """What the loop itself meets (files that ran out, connections that broke) is a line without a
    traceback.
    """

    def told(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        kind = type(error).__name__ if error is not None else "none"
        number = getattr(error, "errno", None)
        log.error("the event loop met an error", extra={"error": kind, "errno": number})

    loop.set_exception_handler(told)
