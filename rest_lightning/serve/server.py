"""The live page's server: aiohttp on one thread, the model on another."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

from aiohttp import BodyPartReader, web

from rest_lightning.avatar import AvatarPool
from rest_lightning.errors import UserError
from rest_lightning.serve.gate import LOOPBACK, Gate, expect_head, head_came, tell_loop_errors_once
from rest_lightning.serve.limits import Admission, Limits, Refused
from rest_lightning.serve.metrics import LOG, Metrics
from rest_lightning.serve.protocol import HEARTBEAT_S, AioChannel, Channel
from rest_lightning.serve.recording import Recordings
from rest_lightning.serve.session import NewSession, Service, Session, run_session
from rest_lightning.serve.uploads import Portraits, Uploads, remove_stale_folders

if TYPE_CHECKING:
    from rest_lightning.media.provenance import Signer

PAGE_FOLDER = Path(__file__).parent / "page"
_LARGEST_BYTES = 2**20  # of a message: beyond the limits' own, which are told in words
_SHOWN_SIDE_PX = 256  # of uploaded portraits, where the model's frames are smaller
_BLOCK_BYTES = 262_144  # of what is downloaded
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class ServerOptions:
    """Where a server listens.

    Attributes:
        host, port: port 0 takes any free one.
        origins: further origins (``https://example.org``) whose pages may open sessions, such as
            that of a proxy.
        cert, key: files for TLS; both or none.

    Raises:
        UserError: a port that there is not.
    """

    host: str = "127.0.0.1"
    port: int = 8765
    origins: tuple[str, ...] = ()
    cert: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UserError(
                f"expected a port from 0 to 65535, got {self.port}: leave --port out for the "
                "default"
            )

    def tls(self) -> ssl.SSLContext | None:
        """Raises a UserError when the certificate or its key cannot be used."""
        if self.cert is None and self.key is None:
            return None
        if self.cert is None or self.key is None:
            raise UserError(
                "expected --cert and --key together, got one of them: give both, or none"
            )
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(self.cert, self.key)
        except (OSError, ssl.SSLError) as error:
            raise UserError(
                f"expected a certificate and its key in PEM files, got {self.cert} and {self.key} "
                f"({type(error).__name__}): check both files"
            ) from None
        return context


class Stoppable(Protocol):
    """A session, as far as the network is concerned."""

    def stop(self, code: str, said: str) -> None:
        """End it soon, with a code for programs and a line for people."""


class PageServer(ABC):
    """Page, tokens, uploads, health and metrics; where the sessions run is for subclasses to say.

    Usable as an async context manager.

    Args:
        options: where to listen.
        limits: for clients.
        portraits, metrics: of the sessions.
        sessions: those that run now.
        size_px: side of the model's frames.

    Attributes:
        url: where the page is, once started.
    """

    def __init__(
        self,
        options: ServerOptions,
        limits: Limits,
        portraits: Portraits,
        metrics: Metrics,
        sessions: Collection[Stoppable],
        size_px: int,
    ) -> None:
        self.options, self.limits = options, limits
        self.portraits, self.metrics, self.sessions = portraits, metrics, sessions
        self.admission = Admission(limits)
        self.uploads = Uploads(
            limits.num_uploads, limits.upload_s, limits.image_side_px, limits.sound_s
        )
        self.url, self._num_uploads, self._size_px = "", 0, size_px
        self._origins: frozenset[str] = frozenset()
        self._runner: web.AppRunner | None = None
        self._listener: asyncio.Server | None = None
        self._sending: Counter[str] = Counter()

    @abstractmethod
    async def run_session(self, channel: Channel, token: str, address: str) -> None:
        """Serve one client, whose token was good, to the end."""

    @abstractmethod
    async def is_alive(self) -> bool:
        """Whether there is a model that works."""

    async def admit(self, address: str) -> str:
        """A token for a session. Raises Refused."""
        return self.admission.grant(address)

    async def exposition(self) -> bytes:
        """What Prometheus reads."""
        return self.metrics.exposition()

    def address_of(self, request: web.Request) -> str:
        """The client's address."""
        return request.remote or ""

    def _owner_of(self, request: web.Request) -> str:
        """Who has a share of uploads: the client's address; nobody for this machine's own, where a
        proxy speaks for many.
        """
        address = self.address_of(request)
        return "" if address in LOOPBACK else address

    def inner_routes(self) -> list[web.RouteDef]:
        """The socket of sessions, and what watches over them."""
        return [
            web.get("/healthz", self._health),
            web.get("/metrics", self._metrics),
            web.get("/ws", self._socket),
        ]

    def make_app(self) -> web.Application:
        """The routes."""
        app = web.Application(
            middlewares=[self._guard], client_max_size=self.limits.upload_bytes + 65_536
        )
        app.on_response_prepare.append(self._add_headers)
        app.add_routes(
            [
                web.get("/", self._page),
                *self.inner_routes(),
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
            UserError: the address is taken or is none of this machine, or the certificate is no
                good.
        """
        tls = self.options.tls()
        self._runner = web.AppRunner(
            self.make_app(), access_log=None, handle_signals=False, shutdown_timeout=1.0
        )
        await self._runner.setup()
        remove_stale_folders()
        loop = asyncio.get_running_loop()
        tell_loop_errors_once(loop, LOG)
        assert self._runner.server is not None
        gate = Gate(
            self._runner.server,
            self.limits,
            lambda why: self.metrics.refused.labels(why).inc(),
        )
        try:
            self._listener = await loop.create_server(
                gate, self.options.host, self.options.port, ssl=tls
            )
        except OSError as error:
            await self._runner.cleanup()
            where = f"{self.options.host}:{self.options.port}"
            reason = (error.strerror or "").lower()
            raise UserError(
                f"expected to listen on {where}, got '{reason}': try another --port or --host"
            ) from None
        port = self._listener.sockets[0].getsockname()[1]
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
        loop, grace_s = (
            asyncio.get_running_loop(),
            self.limits.grace_s if grace_s is None else grace_s,
        )
        end_s = loop.time() + grace_s
        while self.sessions and loop.time() < end_s:
            await asyncio.sleep(0.05)
        for session in list(self.sessions):
            session.stop("stopping", "the server is stopping: try again in a minute")
        end_s = loop.time() + 3.0
        while self.sessions and loop.time() < end_s:
            await asyncio.sleep(0.05)
        if self._listener is not None:
            self._listener.close()
        if self._runner is not None:
            await self._runner.cleanup()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop(0.0)

    # -- who may ask -------------------------------------------------------------------------------

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuses foreign pages, turns errors into one line, adds the headers that keep a page to
        itself.
        """
        head_came(request)
        try:
            return await self._answer(request, handler)
        finally:
            expect_head(request)

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        origin = request.headers.get("Origin")
        needs_origin = request.method != "GET" or request.path == "/ws"
        try:
            if (needs_origin or origin is not None) and origin not in self._origins:
                raise Refused(
                    "origin",
                    (
                        "expected a request of this server's own page: open its "
                        "address in the browser"
                    ),
                )
            response = await handler(request)
        except Refused as error:
            self.metrics.refused.labels(error.code).inc()
            LOG.info("refused", extra={"reason": error.code, "address": request.remote})
            status = {"origin": 403, "token": 403}.get(error.code, 503)
            response = web.json_response({"error": str(error), "code": error.code}, status=status)
        except UserError as error:
            response = web.json_response({"error": str(error)}, status=400)
        except web.HTTPException as error:
            response = web.json_response({"error": error.reason.lower()}, status=error.status)
        except ConnectionError:  # the client has gone in the middle: nobody is there to be answered
            response = web.json_response({"error": "the connection was lost"}, status=400)
        except Exception as error:
            if isinstance(error, OSError | ValueError) and request.path.startswith("/page/"):
                # a name that no file can have
                return web.json_response({"error": "not found"}, status=404)
            LOG.exception("request failed", extra={"route": _route_of(request)})
            response = web.json_response({"error": "the server failed at this request"}, status=500)
        return response

    async def _add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(self._headers())

    def _headers(self) -> dict[str, str]:
        sockets = " ".join(
            sorted(origin.replace("http", "ws", 1) for origin in self._origins if "[" not in origin)
        )
        policy = (
            f"default-src 'self'; connect-src 'self' {sockets}; img-src 'self' blob: data:; "
            "media-src 'self' blob:; "
            "worker-src 'self' blob:; object-src 'none'; base-uri 'none'; frame-ancestors 'none'; "
            "form-action 'none'"
        )
        tls = {"Strict-Transport-Security": "max-age=31536000"} if self.options.cert else {}
        return {
            **tls,
            "Server": "rest",  # without versions
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Permissions-Policy": "microphone=(self), camera=()",
            "Cache-Control": "no-cache",
        }

    # -- routes ------------------------------------------------------------------------------------

    async def _page(self, request: web.Request) -> web.StreamResponse:
        index = PAGE_FOLDER / "index.html"
        if not index.is_file():
            return web.Response(text="the page is not installed; the protocol is served at /ws\n")
        return web.FileResponse(index)

    async def _health(self, request: web.Request) -> web.StreamResponse:
        status = (
            "stopping"
            if self.admission.closing
            else "ok"
            if await self.is_alive()
            else "model ended"
        )
        body = {
            "status": status,
            "sessions": self.admission.num_active,
            "max_sessions": self.limits.max_sessions,
        }
        return web.json_response(body, status=200 if status == "ok" else 503)

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        kind = {"Content-Type": "text/plain; version=0.0.4"}
        return web.Response(body=await self.exposition(), headers=kind)

    async def _open(self, request: web.Request) -> web.StreamResponse:
        token = await self.admit(self.address_of(request))
        return web.json_response({"token": token, "expires_s": self.limits.token_s})

    async def _socket(self, request: web.Request) -> web.StreamResponse:
        address, token = self.address_of(request), request.query.get("token", "")
        self.admission.enter(token, address)
        try:
            response = web.WebSocketResponse(
                max_msg_size=_LARGEST_BYTES, heartbeat=HEARTBEAT_S, compress=False, timeout=1.0
            )
            await response.prepare(request)
            assert request.transport is not None
            connection = request.transport.get_extra_info("socket")
            if connection is not None:
                connection.setsockopt(
                    socket.SOL_SOCKET, socket.SO_SNDBUF, self.limits.send_buffer_bytes
                )
            await self.run_session(AioChannel(response), token, address)
        finally:
            self.admission.leave(address)
        return response

    async def _portraits(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(self.portraits.listed())

    async def _portrait(self, request: web.Request) -> web.StreamResponse:
        try:
            png = await asyncio.to_thread(self.portraits.png, request.match_info["id"])
        except UserError as error:
            return web.json_response({"error": str(error)}, status=404)
        return web.Response(body=png, content_type="image/png")

    async def _add_portrait(self, request: web.Request) -> web.StreamResponse:
        size_px = max(_SHOWN_SIDE_PX, self._size_px)
        png = await self._decoded(
            request, "portrait", lambda data: self.uploads.portrait(data, size_px)
        )
        owner = self._owner_of(request)
        return web.json_response({"id": await asyncio.to_thread(self.portraits.add, png, owner)})

    async def _speech(self, request: web.Request) -> web.StreamResponse:
        samples = await self._decoded(request, "sound", self.uploads.sound)
        return web.Response(body=samples, content_type="application/octet-stream")

    async def _decoded(
        self, request: web.Request, kind: str, decode: Callable[[bytes], Awaitable[bytes]]
    ) -> bytes:
        outcome, limits = "refused", self.limits
        if self._num_uploads >= limits.max_uploads:
            raise Refused("uploads", "too many files are being sent at once: try again in a minute")
        address = self._owner_of(request)
        if address and self._sending[address] >= limits.uploads_per_address:
            raise Refused("uploads", "this address is sending files already: wait for them")
        self._num_uploads += 1
        self._sending[address] += 1
        try:
            async with asyncio.timeout(limits.receive_s):
                data = await self._uploaded(request)
            decoded = await decode(data)
            outcome = "taken"
            return decoded
        except TimeoutError:
            raise UserError(
                f"expected a file within {limits.receive_s:g} s, got it slower: make it smaller"
            ) from None
        finally:
            self._num_uploads -= 1
            self._sending[address] -= 1
            self._sending += Counter()  # forgets addresses that send nothing
            self.metrics.uploads.labels(kind, outcome).inc()

    async def _uploaded(self, request: web.Request) -> bytes:
        """The one file of a form."""
        most = self.limits.upload_bytes
        too_large = UserError(
            f"expected a file of at most {most / 1e6:g} MB, got a larger one: make it smaller"
        )
        if (request.content_length or 0) > most + 65_536:
            raise too_large
        if not request.content_type.startswith("multipart/"):
            raise UserError(
                "expected a form with one file (multipart/form-data), got something else"
            )
        try:
            part = await (await request.multipart()).next()
            while part is not None and not (isinstance(part, BodyPartReader) and part.filename):
                part = await part.next() if not isinstance(part, BodyPartReader) else None
            data = bytearray()
            while part is not None and (block := await part.read_chunk(65_536)):
                data += block
                if len(data) > most:
                    raise too_large
        except (UserError, TimeoutError, ConnectionError):
            raise
        except Exception:  # aiohttp's reader of forms raises all kinds on broken ones
            raise UserError(
                "expected a form with one file (multipart/form-data), got a broken one"
            ) from None
        if not data:
            raise UserError(
                "expected a form with one file, got none or an empty one: choose a file"
            )
        return bytes(data)


class LiveServer(PageServer):
    """Sessions in this process.

    Args:
        pool: of avatars, started; as many as sessions.
        options: where to listen.
        limits: for clients.
        portraits: to choose from; None keeps uploaded ones in this process.
        new_session: makes the sessions; None lets avatars say what clients send.
        signer: of recordings, which the server then makes itself when a client asks for one; None:
            it makes none.
    """

    def __init__(
        self,
        pool: AvatarPool,
        options: ServerOptions | None = None,
        limits: Limits | None = None,
        portraits: Portraits | None = None,
        new_session: NewSession | None = None,
        signer: Signer | None = None,
    ) -> None:
        limits = limits or Limits()
        portraits = portraits or Portraits(
            limits.max_portraits, limits.portrait_s, pool.model.portraits
        )
        self.service = service = Service(
            pool, portraits, limits, new_session=new_session or Session
        )
        if signer is not None:
            service.recordings = Recordings(signer, limits.record_s)
        super().__init__(
            options or ServerOptions(),
            limits,
            portraits,
            service.metrics,
            service.sessions,
            pool.model.size_px,
        )

    def make_app(self) -> web.Application:
        """The routes."""
        app = super().make_app()
        if self.service.recordings is not None:
            # a HEAD would use the token up
            route = web.get("/api/recordings/{token}", self._fetch_recording, allow_head=False)
            app.add_routes([route])
        return app

    async def _fetch_recording(self, request: web.Request) -> web.StreamResponse:
        assert self.service.recordings is not None
        recording = self.service.recordings.take(request.match_info["token"])
        response = web.StreamResponse()
        response.content_type = "video/mp4"
        response.headers["Content-Disposition"] = f'attachment; filename="{recording.name}"'
        with await asyncio.to_thread(recording.hand_over) as file:
            response.content_length = os.fstat(file.fileno()).st_size
            await response.prepare(request)
            while block := await asyncio.to_thread(file.read, _BLOCK_BYTES):
                try:
                    async with asyncio.timeout(self.limits.unread_s):
                        await response.write(block)
                except TimeoutError:
                    if request.transport is not None:
                        request.transport.abort()
                    break
        return response

    async def aclose(self) -> None:
        """End the threads, after :meth:`stop`."""
        await self.service.aclose()

    async def run_session(self, channel: Channel, token: str, address: str) -> None:
        """Serve one client."""
        await run_session(channel, self.service, address)

    async def is_alive(self) -> bool:
        """Whether the model works for whoever asks."""
        return not self.service.pool.is_closed


def _route_of(request: web.Request) -> str:
    """The route that a request took: nothing that a client has written."""
    resource = request.match_info.route.resource
    return "unknown" if resource is None else resource.canonical


def _reachable(host: str) -> str:
    """An address that this machine's browser can open."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
