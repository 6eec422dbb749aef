"""The live page's server: aiohttp on one thread, the model on another."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from aiohttp import BodyPartReader, WSCloseCode, WSMsgType, web

from rest_lightning.errors import UserError
from rest_lightning.serve.limits import Admission, Limits, Refused
from rest_lightning.serve.portraits import Portraits
from rest_lightning.serve.protocol import ChannelClosed
from rest_lightning.serve.scheduler import Scheduler
from rest_lightning.serve.session import LOG, Service, run_session
from rest_lightning.serve.uploads import Uploads

PAGE_FOLDER = Path(__file__).parent / "page"
_HEARTBEAT_S = 15.0
_LARGEST_BYTES = 2**20  # of a message: beyond the limits' own, which are told in words
_SHOWN_SIDE_PX = 256  # of uploaded portraits, where the model's frames are smaller
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class ServerOptions:
    """Where a server listens.

    Attributes:
        host, port: port 0 takes any free one.
        origins: further origins (``https://example.org``) whose pages may open sessions, such as that of a proxy.
        cert, key: files for TLS; both or none.
    """

    host: str = "127.0.0.1"
    port: int = 8765
    origins: tuple[str, ...] = ()
    cert: Path | None = None
    key: Path | None = None

    def tls(self) -> ssl.SSLContext | None:
        """Raises a UserError when the certificate or its key cannot be used."""
        if self.cert is None and self.key is None:
            return None
        if self.cert is None or self.key is None:
            raise UserError("expected --cert and --key together, got one of them: give both, or none")
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(self.cert, self.key)
        except (OSError, ssl.SSLError) as error:
            raise UserError(
                f"expected a certificate and its key in PEM files, got {self.cert} and {self.key} "
                f"({type(error).__name__}): check both files"
            ) from None
        return context


class AioChannel:
    """A WebSocket of aiohttp as a :class:`rest_lightning.serve.protocol.Channel`."""

    def __init__(self, socket: web.WebSocketResponse) -> None:
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


class LiveServer:
    """Page, sessions, uploads, health and metrics; usable as an async context manager.

    Args:
        scheduler: the model, started or not.
        options: where to listen.
        limits: for clients.

    Attributes:
        url: where the page is, once started.
    """

    def __init__(
        self, scheduler: Scheduler, options: ServerOptions | None = None, limits: Limits | None = None
    ) -> None:
        self.options, self.limits = options or ServerOptions(), limits or Limits()
        limits = self.limits
        portraits = Portraits(limits.max_portraits, limits.portrait_s)
        self.service = Service(scheduler, portraits, limits)
        self.admission = Admission(limits)
        self.uploads = Uploads(limits.num_uploads, limits.upload_s, limits.image_side_px, limits.sound_s)
        self.url, self._num_uploads = "", 0
        self._origins: frozenset[str] = frozenset()
        self._runner: web.AppRunner | None = None

    def make_app(self) -> web.Application:
        """The routes."""
        app = web.Application(middlewares=[self._guard], client_max_size=self.limits.upload_bytes + 65_536)
        app.add_routes(
            [
                web.get("/", self._page),
                web.get("/healthz", self._health),
                web.get("/metrics", self._metrics),
                web.get("/ws", self._socket),
                web.post("/api/session", self._open),
                web.get("/api/portraits", self._portraits),
                web.get(r"/api/portraits/{id}.png", self._portrait),
                web.post("/api/portraits", self._add_portrait),
                web.post("/api/speech", self._speech),
            ]
        )
        if PAGE_FOLDER.is_dir():
            app.add_routes([web.static("/page", PAGE_FOLDER)])
        return app

    async def start(self) -> None:
        """Listen.

        Raises:
            UserError: the address is taken or is none of this machine, or the certificate is no good.
        """
        tls = self.options.tls()
        self._runner = web.AppRunner(self.make_app(), access_log=None, handle_signals=False, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self.options.host, self.options.port, ssl_context=tls)
        try:
            await site.start()
        except OSError as error:
            await self._runner.cleanup()
            where = f"{self.options.host}:{self.options.port}"
            reason = (error.strerror or "").lower()
            raise UserError(f"expected to listen on {where}, got '{reason}': try another --port or --host") from None
        port = self._runner.addresses[0][1]
        scheme = "https" if tls else "http"
        self.url = f"{scheme}://{_in_url(_reachable(self.options.host))}:{port}"
        hosts = {self.options.host, "localhost", "127.0.0.1", "::1"}
        if self.options.host in ("0.0.0.0", "::"):
            hosts.add(socket.gethostname())
        ours = {f"{scheme}://{_in_url(host)}:{port}" for host in hosts}
        if port == (443 if tls else 80):
            ours |= {f"{scheme}://{_in_url(host)}" for host in hosts}
        self._origins = frozenset(ours | set(self.options.origins))

    async def stop(self, grace_s: float | None = None) -> None:
        """Take no new sessions, let those that are there go on for ``grace_s``, then end them."""
        self.admission.closing = True
        loop, grace_s = asyncio.get_running_loop(), self.limits.grace_s if grace_s is None else grace_s
        end_s = loop.time() + grace_s
        while self.service.sessions and loop.time() < end_s:
            await asyncio.sleep(0.05)
        for session in list(self.service.sessions):
            session.stop("stopping", "the server is stopping: try again in a minute")
        end_s = loop.time() + 3.0
        while self.service.sessions and loop.time() < end_s:
            await asyncio.sleep(0.05)
        if self._runner is not None:
            await self._runner.cleanup()

    async def __aenter__(self) -> LiveServer:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop(0.0)

    # -- who may ask --------------------------------------------------------------------------------------------------

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuses foreign pages, turns errors into one line, adds the headers that keep a page to itself."""
        origin = request.headers.get("Origin")
        needs_origin = request.method != "GET" or request.path == "/ws"
        try:
            if (needs_origin or origin is not None) and origin not in self._origins:
                raise Refused("origin", "expected a request of this server's own page: open its address in the browser")
            response = await handler(request)
        except Refused as error:
            self.service.metrics.refused.labels(error.code).inc()
            LOG.info("refused", extra={"reason": error.code, "address": request.remote})
            status = {"origin": 403, "token": 403}.get(error.code, 503)
            response = web.json_response({"error": str(error), "code": error.code}, status=status)
        except UserError as error:
            response = web.json_response({"error": str(error)}, status=400)
        except web.HTTPException as error:
            response = web.json_response({"error": error.reason.lower()}, status=error.status)
        except Exception:
            LOG.exception("request failed", extra={"path": request.path})
            response = web.json_response({"error": "the server failed at this request"}, status=500)
        if not response.prepared:
            response.headers.update(self._headers())
        return response

    def _headers(self) -> dict[str, str]:
        sockets = " ".join(sorted(origin.replace("http", "ws", 1) for origin in self._origins if "[" not in origin))
        policy = (
            f"default-src 'self'; connect-src 'self' {sockets}; img-src 'self' blob: data:; media-src 'self' blob:; "
            "worker-src 'self' blob:; object-src 'none'; base-uri 'none'; frame-ancestors 'none'; form-action 'none'"
        )
        return {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Permissions-Policy": "microphone=(self), camera=()",
            "Cache-Control": "no-cache",
        }

    # -- routes -------------------------------------------------------------------------------------------------------

    async def _page(self, request: web.Request) -> web.StreamResponse:
        index = PAGE_FOLDER / "index.html"
        if not index.is_file():
            return web.Response(text="the page is not installed; the protocol is served at /ws\n")
        return web.FileResponse(index)

    async def _health(self, request: web.Request) -> web.StreamResponse:
        status = "stopping" if self.admission.closing else "ok" if self.service.scheduler.is_alive else "model ended"
        body = {"status": status, "sessions": self.admission.num_active, "max_sessions": self.limits.max_sessions}
        return web.json_response(body, status=200 if status == "ok" else 503)

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        kind = {"Content-Type": "text/plain; version=0.0.4"}
        return web.Response(body=self.service.metrics.exposition(), headers=kind)

    async def _open(self, request: web.Request) -> web.StreamResponse:
        token = self.admission.grant(request.remote or "")
        return web.json_response({"token": token, "expires_s": self.limits.token_s})

    async def _socket(self, request: web.Request) -> web.StreamResponse:
        address = request.remote or ""
        self.admission.enter(request.query.get("token", ""), address)
        try:
            response = web.WebSocketResponse(
                max_msg_size=_LARGEST_BYTES, heartbeat=_HEARTBEAT_S, compress=False, timeout=1.0
            )
            await response.prepare(request)
            assert request.transport is not None
            connection = request.transport.get_extra_info("socket")
            if connection is not None:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.limits.send_buffer_bytes)
            await run_session(AioChannel(response), self.service, address)
        finally:
            self.admission.leave(address)
        return response

    async def _portraits(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(self.service.portraits.listed())

    async def _portrait(self, request: web.Request) -> web.StreamResponse:
        try:
            png = self.service.portraits.png(request.match_info["id"])
        except UserError as error:
            return web.json_response({"error": str(error)}, status=404)
        return web.Response(body=png, content_type="image/png")

    async def _add_portrait(self, request: web.Request) -> web.StreamResponse:
        size_px = max(_SHOWN_SIDE_PX, self.service.scheduler.model.size_px)
        png = await self._decoded(request, "portrait", lambda data: self.uploads.portrait(data, size_px))
        return web.json_response({"id": self.service.portraits.add(png)})

    async def _speech(self, request: web.Request) -> web.StreamResponse:
        samples = await self._decoded(request, "sound", self.uploads.sound)
        return web.Response(body=samples, content_type="application/octet-stream")

    async def _decoded(self, request: web.Request, kind: str, decode: Callable[[bytes], Awaitable[bytes]]) -> bytes:
        outcome, limits = "refused", self.limits
        if self._num_uploads >= limits.max_uploads:
            raise Refused("uploads", "too many files are being sent at once: try again in a minute")
        self._num_uploads += 1
        try:
            async with asyncio.timeout(limits.receive_s):
                data = await self._uploaded(request)
            decoded = await decode(data)
            outcome = "taken"
            return decoded
        except TimeoutError:
            raise UserError(f"expected a file within {limits.receive_s:g} s, got it slower: make it smaller") from None
        finally:
            self._num_uploads -= 1
            self.service.metrics.uploads.labels(kind, outcome).inc()

    async def _uploaded(self, request: web.Request) -> bytes:
        """The one file of a form."""
        most = self.limits.upload_bytes
        too_large = UserError(f"expected a file of at most {most / 1e6:g} MB, got a larger one: make it smaller")
        if (request.content_length or 0) > most + 65_536:
            raise too_large
        if not request.content_type.startswith("multipart/"):
            raise UserError("expected a form with one file (multipart/form-data), got something else")
        try:
            part = await (await request.multipart()).next()
            while part is not None and not (isinstance(part, BodyPartReader) and part.filename):
                part = await part.next() if not isinstance(part, BodyPartReader) else None
            data = bytearray()
            while part is not None and (block := await part.read_chunk(65_536)):
                data += block
                if len(data) > most:
                    raise too_large
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError("expected a form with one file (multipart/form-data), got a broken one") from None
        if not data:
            raise UserError("expected a form with one file, got none or an empty one: choose a file")
        return bytes(data)


def _reachable(host: str) -> str:
    """An address that this machine's browser can open."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, message, and what the call names as ``extra``."""

    _USUAL = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {"time": self.formatTime(record), "level": record.levelname.lower(), "message": record.getMessage()}
        line |= {name: value for name, value in vars(record).items() if name not in self._USUAL}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
