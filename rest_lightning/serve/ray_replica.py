"""What Ray Serve copies: a model, and the sessions that it serves to the front at an address of its own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import ray
from aiohttp import web

from rest_lightning.commands.talk import TalkOptions, load_model
from rest_lightning.serve.limits import Limits, Refused
from rest_lightning.serve.logs import log_as_json
from rest_lightning.serve.portraits import Portraits
from rest_lightning.serve.protocol import Channel
from rest_lightning.serve.relay import ADDRESS_HEADER
from rest_lightning.serve.scheduler import Scheduler
from rest_lightning.serve.server import LiveServer, ServerOptions


class SharedPortraits(Portraits):
    """Uploaded portraits are where all replicas find them: in one actor, made of :class:`Portraits`.

    Its calls wait for that actor; make them in threads that may wait.
    """

    def __init__(self, book: Any) -> None:
        super().__init__()
        self._book = book

    def add(self, png: bytes) -> str:
        """Keep an uploaded portrait; returns its id."""
        name: str = ray.get(self._book.add.remote(png))
        return name

    def png(self, name: str) -> bytes:
        """The image of an id."""
        if name in self._bundled:
            return self._bundled[name]
        try:
            png: bytes = ray.get(self._book.png.remote(name))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        return png


@dataclass(frozen=True)
class ModelFacts:
    """What the front must know of the model, which it does not load."""

    size_px: int
    chunk_frames: int
    warm_up_ms: list[float]


@dataclass(frozen=True)
class Place:
    """A session's place at a replica, which is the process ``pid`` of its machine; the token is good once."""

    replica: str
    pid: int
    url: str
    token: str


class ReplicaServer(LiveServer):
    """Sessions for the front, which alone gets tokens; without page, uploads and other people's requests."""

    def __init__(self, scheduler: Scheduler, options: ServerOptions, limits: Limits, portraits: Portraits) -> None:
        super().__init__(scheduler, options, limits, portraits)
        self._leases: dict[str, tuple[asyncio.Event, asyncio.Event]] = {}

    def make_app(self) -> web.Application:
        """The routes."""
        app = web.Application(middlewares=[self._guard])
        app.add_routes(self.inner_routes())
        return app

    def address_of(self, request: web.Request) -> str:
        """The client's address, as the front tells it."""
        return request.headers.get(ADDRESS_HEADER, "")

    async def lease(self, address: str) -> AsyncIterator[str]:
        """A token, and then nothing until its session has ended, or did not begin in time. Raises Refused."""
        token = self.admission.grant(address)
        begun, ended = self._leases[token] = asyncio.Event(), asyncio.Event()
        try:
            yield token
            async with asyncio.timeout(self.limits.token_s):
                await begun.wait()
            await ended.wait()
        except TimeoutError:
            pass
        finally:
            self.admission.revoke(token)
            del self._leases[token]

    async def run_session(self, channel: Channel, token: str, address: str) -> None:
        """Serve one client."""
        begun, ended = self._leases.get(token, (asyncio.Event(), asyncio.Event()))
        begun.set()
        try:
            await super().run_session(channel, token, address)
        finally:
            ended.set()


class Replica:
    """The deployment's class: one model on one GPU, or on some cores.

    Args:
        model: what to load, and how.
        limits: ``max_sessions`` is this replica's.
        book: actor of :class:`Portraits`.
        host: address to listen on; None: that of this machine in the cluster.
    """

    def __init__(self, model: TalkOptions, limits: Limits, book: Any, host: str | None) -> None:
        log_as_json()
        scheduler = Scheduler(load_model(model), limits.max_sessions)
        scheduler.start()
        options = ServerOptions(host or ray.util.get_node_ip_address(), port=0)
        self._server = ReplicaServer(scheduler, options, limits, SharedPortraits(book))
        self._starting = asyncio.Lock()
        self._name = str(ray.get_runtime_context().get_actor_id())

    async def facts(self) -> ModelFacts:
        """See :class:`ModelFacts`."""
        scheduler = self._server.service.scheduler
        return ModelFacts(scheduler.model.size_px, scheduler.chunk_frames, scheduler.warm_up_ms)

    async def lease(self, address: str) -> AsyncIterator[Place]:
        """A place for a session of ``address``; this call lasts as long as the session.

        So Ray Serve counts sessions where it counts requests: its router passes over a replica that has
        ``max_ongoing_requests`` of them, prefers the one that has fewest, and an update waits for them. Gives no place
        when this replica is full all the same, as it is for a moment after sessions of a front that has died.
        """
        async with self._starting:  # the network belongs to the loop that runs these calls
            if not self._server.url:
                await self._server.start()
        try:
            async for token in self._server.lease(address):
                yield Place(self._name, os.getpid(), self._server.url, token)
        except Refused:
            return

    def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica that raises."""
        if not self._server.service.scheduler.is_alive:
            raise RuntimeError("the model's thread has ended")

    async def __del__(self) -> None:
        """Called by Ray Serve when no call is left, or their time is over."""
        if hasattr(self, "_server"):
            await self._server.stop(0.0)
            self._server.service.close()
