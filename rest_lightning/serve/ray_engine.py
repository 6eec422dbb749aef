"""``rest serve --engine ray``: the same sessions, served by replicas of the model that Ray Serve
looks after.

The front is the process of ``rest serve``: it has the page, the limits, the tokens and the uploads,
and one WebSocket for each client. The model and its sessions are in replicas, one per GPU. See
docs/serve.md.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import aiohttp
from aiohttp import web
from prometheus_client import Gauge, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from rest_lightning import ray_cluster
from rest_lightning.avatar import AvatarPool
from rest_lightning.errors import UserError
from rest_lightning.serve.limits import Limits, Refused
from rest_lightning.serve.metrics import LOG, Metrics, log_as_json
from rest_lightning.serve.protocol import HEARTBEAT_S, AioChannel, Channel, ChannelClosed, message
from rest_lightning.serve.server import LiveServer, PageServer, ServerOptions
from rest_lightning.serve.session import SessionOver, say_goodbye
from rest_lightning.serve.uploads import Portraits
from rest_lightning.talking_head import ModelOptions

os.environ.update(ray_cluster.environment())

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

_DEPLOYMENT = "Replica"
# sessions have log lines of their own
_QUIET = {"log_level": "WARNING", "enable_access_log": False}
_PLACE_S = 5.0  # for finding a replica that has a place
_AGAIN_S = 0.2
_SCRAPE_S = 2.0
_OBJECT_STORE_BYTES = 100_000_000  # portraits pass through it, nothing else


# -- replicas --------------------------------------------------------------------------------------


class SharedPortraits(Portraits):
    """Uploaded portraits are where all replicas find them: in one actor, made of
    :class:`Portraits`.

    Its calls wait for that actor; make them in threads that may wait.
    """

    def __init__(self, book: Any, files: Sequence[Path]) -> None:
        super().__init__(files=files)
        self._book = book

    def add(self, png: bytes, owner: str = "") -> str:
        """Keep an uploaded portrait; returns its id."""
        name: str = ray.get(self._book.add.remote(png, owner))
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
    """A session's place at a replica, which is the process ``pid`` of its machine; the token is
    good once.
    """

    replica: str
    pid: int
    url: str
    token: str


class ReplicaServer(LiveServer):
    """Sessions for the front, which alone gets tokens; without page, uploads and other people's
    requests.
    """

    def __init__(
        self, pool: AvatarPool, options: ServerOptions, limits: Limits, portraits: Portraits
    ) -> None:
        super().__init__(pool, options, limits, portraits)
        self._leases: dict[str, tuple[asyncio.Event, asyncio.Event]] = {}

    def make_app(self) -> web.Application:
        """The routes."""
        app = web.Application(middlewares=[self._guard])
        app.on_response_prepare.append(self._add_headers)
        app.add_routes(self.inner_routes())
        return app

    def address_of(self, request: web.Request) -> str:
        """The client's address, as the front tells it."""
        return request.headers.get(ADDRESS_HEADER, "")

    async def lease(self, address: str) -> AsyncIterator[str]:
        """A token, and then nothing until its session has ended, or did not begin in time. Raises
        Refused.
        """
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

    def __init__(self, model: ModelOptions, limits: Limits, book: Any, host: str | None) -> None:
        log_as_json()
        if host is not None:
            _listen_on(host)
        pool = AvatarPool(model.load(), limits.max_sessions)
        pool.warm_up()  # before Ray Serve counts on this replica
        options = ServerOptions(host or ray.util.get_node_ip_address(), port=0)
        self._server = ReplicaServer(
            pool, options, limits, SharedPortraits(book, pool.model.portraits)
        )
        self._starting = asyncio.Lock()
        self._name = str(ray.get_runtime_context().get_actor_id())

    async def facts(self) -> ModelFacts:
        """See :class:`ModelFacts`."""
        pool = self._server.service.pool
        return ModelFacts(pool.model.size_px, pool.chunk_frames, pool.warm_up_ms)

    async def lease(self, address: str) -> AsyncIterator[Place]:
        """A place for a session of ``address``; this call lasts as long as the session.

        So Ray Serve counts sessions where it counts requests: its router passes over a replica that
        has ``max_ongoing_requests`` of them, prefers the one that has fewest, and an update waits
        for them. Gives no place when this replica is full all the same, as it is for a moment after
        sessions of a front that has died.
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
        if self._server.service.pool.is_closed:
            raise RuntimeError("the model's thread has ended")

    async def __del__(self) -> None:
        """Called by Ray Serve when no call is left, or their time is over."""
        if hasattr(self, "_server"):
            await self._server.stop(0.0)
            await self._server.aclose()


# -- the way to a replica --------------------------------------------------------------------------

ADDRESS_HEADER = "X-Rest-Address"  # the client's, told to whoever holds the token
LOST = "the machine of this session has failed: start a new one"
_LARGEST_BYTES = 2**22  # a frame, whatever its size
_CLOSE_S = 1.0


@asynccontextmanager
async def connected(url: str, token: str, address: str) -> AsyncIterator[Channel]:
    """The socket of a session at a replica; raises OSError or aiohttp.ClientError when there is
    none.
    """
    headers = {"Origin": url, ADDRESS_HEADER: address}
    async with aiohttp.ClientSession(headers=headers) as http:
        where = f"{url}/ws?token={token}"
        socket = await http.ws_connect(where, max_msg_size=_LARGEST_BYTES, heartbeat=HEARTBEAT_S)
        try:
            yield AioChannel(socket)
        finally:
            with suppress(TimeoutError):  # what hangs is cut off, with its connection
                async with asyncio.timeout(_CLOSE_S):
                    await socket.close()


class Relay:
    """One client's messages to a replica, and the replica's to the client.

    Nothing is read from a side before the other has taken what was read last, so that a client that
    does not read holds up its session, and nothing piles up here.

    Args:
        client: the connection.
        limits: ``unread_s`` holds here too.
    """

    def __init__(self, client: Channel, limits: Limits) -> None:
        self._client, self._limits = client, limits
        self._stop: asyncio.Future[SessionOver] = asyncio.get_running_loop().create_future()
        self._said_bye = False

    def stop(self, code: str, said: str) -> None:
        """End the session."""
        if not self._stop.done():
            self._stop.set_result(SessionOver(code, said))

    async def run(self, url: str, token: str, address: str) -> str:
        """To the end; the client's channel is closed then.

        Args:
            url, token: of the replica and its session.
            address: of the client, for the replica's log.

        Returns:
            ended (the replica has told the client why), gone (the client), lost (the replica), or
            why the session was stopped here.
        """
        reason, said = "lost", LOST
        try:
            async with connected(url, token, address) as replica:
                reason = await self._pass_on(replica)
        except SessionOver as error:
            reason, said = error.code, str(error)
        except (OSError, aiohttp.ClientError) as error:
            LOG.warning("a replica cannot be reached", extra={"replica": url, "error": str(error)})
        if reason in ("ended", "gone"):
            await self._client.close()
        elif reason == "lost":
            await self._tell_loss()
        else:
            await say_goodbye(self._client, reason, said)
        return reason

    async def _pass_on(self, replica: Channel) -> str:
        up, down = asyncio.create_task(self._up(replica)), asyncio.create_task(self._down(replica))
        try:
            first: set[asyncio.Future[Any]] = {up, down, self._stop}
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            if self._stop.done():
                raise self._stop.result()
            return down.result() if down.done() else up.result()
        finally:
            for task in (up, down):
                task.cancel()
            await asyncio.gather(up, down, return_exceptions=True)

    async def _up(self, replica: Channel) -> str:
        while True:
            try:
                data = await self._client.receive()
            except ChannelClosed:
                return "gone"
            with suppress(ChannelClosed):  # the other direction still has the replica's last words
                await _send(replica, data)

    async def _down(self, replica: Channel) -> str:
        while True:
            try:
                data = await replica.receive()
            except ChannelClosed:
                return "ended" if self._said_bye else "lost"
            if isinstance(data, str):
                self._said_bye = json.loads(data)["type"] == "bye"
            try:
                async with asyncio.timeout(self._limits.unread_s):
                    await _send(self._client, data)
            except ChannelClosed:
                return "gone"
            except TimeoutError:
                text = (
                    f"what was sent was not read for {self._limits.unread_s:g} s: reload the page"
                )
                raise SessionOver("unread", text) from None

    async def _tell_loss(self) -> None:
        """Without a bye: a client that connects anew where a connection was cut does so here."""
        with suppress(ChannelClosed, TimeoutError):
            async with asyncio.timeout(1.0):
                await self._client.send_text(message("error", code="lost", message=LOST))
        await self._client.close()


async def _send(channel: Channel, data: bytes | str) -> None:
    await (channel.send_text(data) if isinstance(data, str) else channel.send_bytes(data))


def _listen_on(host: str) -> None:
    """Lets Ray Serve's own port of this replica, which it opens next, listen on ``host`` alone.

    Ray Serve 2.60 has no setting for it: it listens on all addresses.
    """
    from ray.serve._private import replica

    add_port = replica.add_port_to_grpc_server

    def add_local_port(server: Any, address: str) -> int:
        return int(add_port(server, address.replace("[::]", host)))

    replica.add_port_to_grpc_server = add_local_port


# -- the front -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReplicaOptions:
    """What is copied, and how often.

    Attributes:
        model: what each replica loads.
        num_replicas: None: one per GPU of the cluster; one where there is none.
        name: of the application: a second one of this name replaces the first.
    """

    model: ModelOptions
    num_replicas: int | None = None
    name: str = "rest-serve"


@dataclass(frozen=True)
class Lease:
    """A place that is kept; ``call`` goes on at the replica until the session has ended."""

    place: Place
    call: DeploymentResponseGenerator[Place]
    until_s: float


class Cluster:
    """Replicas that run; made by :func:`running`.

    Attributes:
        num_replicas: as many as should run.
        facts: of the model.
        portraits: of all replicas.
    """

    def __init__(
        self,
        name: str,
        num_replicas: int,
        handle: DeploymentHandle,
        facts: ModelFacts,
        portraits: Portraits,
    ) -> None:
        self.num_replicas, self.facts, self.portraits = num_replicas, facts, portraits
        self._name, self._handle = name, handle.options(stream=True, method_name="lease")

    async def lease(self, address: str, token_s: float) -> Lease | None:
        """A place at the replica that has most; None when none was found.

        Ray Serve's router asks two replicas how many calls they have, and a replica that has as
        many as it may refuses; then it asks others. Here is only tried again what fails because a
        replica has just died.
        """
        loop = asyncio.get_running_loop()
        end_s = loop.time() + _PLACE_S
        while (left_s := end_s - loop.time()) > 0:
            call = cast(DeploymentResponseGenerator[Place], self._handle.remote(address))
            try:
                async with asyncio.timeout(left_s):
                    return Lease(await anext(call), call, time.monotonic() + token_s)
            except (TimeoutError, asyncio.CancelledError) as error:
                call.cancel()
                if isinstance(error, asyncio.CancelledError):
                    raise
            except (
                StopAsyncIteration,
                ray.exceptions.RayError,
                ray.serve.exceptions.RayServeException,
            ) as error:
                LOG.warning("a replica gave no place", extra={"error": type(error).__name__})
                await asyncio.sleep(_AGAIN_S)
        return None

    async def num_running(self) -> int:
        """Replicas that Ray Serve takes for healthy."""
        status = (await asyncio.to_thread(serve.status)).applications.get(self._name)
        states = (
            status.deployments[_DEPLOYMENT].replica_states if status and status.deployments else {}
        )
        return sum(count for state, count in states.items() if state == "RUNNING")


class RayServer(PageServer):
    """The front: what :class:`rest_lightning.serve.server.LiveServer` is, with the sessions in
    replicas.

    Args:
        cluster: the replicas.
        options: where to listen.
        limits: for clients; ``max_sessions`` counts those of all replicas.
    """

    def __init__(self, cluster: Cluster, options: ServerOptions, limits: Limits) -> None:
        self._relays: set[Relay] = set()
        super().__init__(
            options, limits, cluster.portraits, Metrics(), self._relays, cluster.facts.size_px
        )
        self._cluster = cluster
        self._num_running = Gauge(
            "rest_replicas", "Replicas that work", registry=self.metrics.registry
        )
        self._leases: dict[str, Lease] = {}
        self._replicas: dict[str, str] = {}

    async def admit(self, address: str) -> str:
        """A token, and a place at a replica that goes with it. Raises Refused."""
        token = self.admission.grant(address)
        self._leases = {
            name: lease for name, lease in self._leases.items() if lease.until_s > time.monotonic()
        }
        lease = None
        try:
            lease = await self._cluster.lease(address, self.limits.token_s)
        finally:
            if lease is None:
                self.admission.revoke(token)
        if lease is None:
            raise Refused("full", "all machines that work are full: try again later")
        self._leases[token] = lease
        self._replicas[lease.place.replica] = lease.place.url
        return token

    async def run_session(self, channel: Channel, token: str, address: str) -> None:
        """Pass one client's messages on."""
        place = (lease := self._leases.pop(token)).place
        relay = Relay(channel, self.limits)
        self._relays.add(relay)
        reason = "cancelled"
        told = {"replica": place.replica, "pid": place.pid, "address": address}
        LOG.info("session begins", extra=told)
        try:
            reason = await relay.run(place.url, place.token, address)
        finally:
            self._relays.discard(relay)
            if reason == "lost":  # the others are counted where they were served
                self.metrics.ended.labels(reason).inc()
            LOG.info("session ended", extra=told | {"reason": reason})
            # the call is over by now, or ends as soon as the replica learns that its client has
            # gone
            del lease

    async def stop(self, grace_s: float | None = None) -> None:
        """Take no new sessions, let those that are there go on for ``grace_s``, then end them."""
        await super().stop(grace_s)
        # places that nobody came for would hold up the replicas' end
        for lease in self._leases.values():
            lease.call.cancel()

    async def is_alive(self) -> bool:
        """Whether there is a replica that works."""
        return await self._cluster.num_running() > 0

    async def exposition(self) -> bytes:
        """The front's figures and those of the replicas that have had sessions, told apart by the
        label replica.
        """
        self._num_running.set(await self._cluster.num_running())
        texts = {"front": self.metrics.exposition().decode()}
        timeout = aiohttp.ClientTimeout(total=_SCRAPE_S)
        async with aiohttp.ClientSession(timeout=timeout) as http:
            for replica, url in list(self._replicas.items()):
                try:
                    async with http.get(f"{url}/metrics") as response:
                        texts[replica] = await response.text()
                except (OSError, aiohttp.ClientError):
                    self._replicas.pop(replica, None)  # it has died; a later session brings it back
        return merged(texts)


def merged(texts: Mapping[str, str]) -> bytes:
    """Expositions in Prometheus format as one, each sample with the label ``replica``, the key of
    its text.
    """
    families: dict[str, Metric] = {}
    for name, text in texts.items():
        for family in text_string_to_metric_families(text):
            kept = families.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            kept.samples += [
                each._replace(labels={**each.labels, "replica": name}) for each in family.samples
            ]
    return generate_latest(_Families(list(families.values())))


class _Families:
    """What generate_latest reads of a registry."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


@contextmanager
def running(options: ReplicaOptions, limits: Limits) -> Iterator[Cluster]:
    """Replicas in the cluster that RAY_ADDRESS names, or in one on this machine, for as long as the
    block takes.

    Args:
        options: what is copied.
        limits: of each replica.

    Raises:
        UserError: no cluster, or replicas that do not start.
    """
    with ExitStack() as stack:
        settings = {"logging_level": logging.WARNING, "namespace": "rest_lightning"}
        is_local = stack.enter_context(
            ray_cluster.joined(settings, {"object_store_memory": _OBJECT_STORE_BYTES})
        )
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        model, num_replicas, resources = share(ray.cluster_resources(), options)
        book = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Portraits).remote(
            limits.max_portraits, limits.portrait_s
        )
        serve.start(proxy_location="Disabled", logging_config=_QUIET)
        stack.callback(serve.shutdown if is_local else lambda: serve.delete(options.name))
        deployment = serve.deployment(
            name=_DEPLOYMENT,
            num_replicas=num_replicas,
            max_ongoing_requests=limits.max_sessions,
            ray_actor_options=resources,
            graceful_shutdown_timeout_s=limits.grace_s + 5.0,
            graceful_shutdown_wait_loop_s=0.5,
            health_check_timeout_s=60.0,
            max_constructor_retry_count=3,
        )(Replica)
        application = deployment.bind(model, limits, book, "127.0.0.1" if is_local else None)
        try:
            handle = serve.run(
                application, name=options.name, route_prefix=None, logging_config=_QUIET
            )
        except RuntimeError as error:
            raise why(_told_by_replicas(options.name) or str(error)) from None
        facts = handle.facts.remote().result(timeout_s=60.0)
        yield Cluster(
            options.name, num_replicas, handle, facts, SharedPortraits(book, model.portraits())
        )


def _told_by_replicas(name: str) -> str:
    application = serve.status().applications.get(name)
    return (
        "\n".join(each.message for each in application.deployments.values()) if application else ""
    )


def why(told: str) -> UserError:
    """The one line of a traceback that a user can do something about."""
    lines = [
        line.partition("UserError: ")[2] for line in told.splitlines() if "UserError: " in line
    ]
    text = " ".join(told.split())[-300:]
    return UserError(
        lines[-1] if lines else (f"expected replicas that start, got '{text}': see their log")
    )


def share(
    cluster: Mapping[str, float], options: ReplicaOptions
) -> tuple[ModelOptions, int, dict[str, float]]:
    """How a cluster is divided: what a replica loads, how many there are, and what Ray keeps free
    for each.

    Args:
        cluster: resources, in Ray's names: CPU, GPU.
        options: ``model.device`` cpu leaves GPUs alone.

    Raises:
        UserError: more replicas than GPUs, or CUDA is wanted where there is none.
    """
    model, num_gpus = options.model, int(cluster.get("GPU", 0))
    if num_gpus == 0 and model.device.startswith("cuda"):
        raise UserError(
            f"expected GPUs for --device {model.device}, got a cluster without: use --device cpu"
        )
    if num_gpus and model.device != "cpu":
        num_replicas = options.num_replicas or num_gpus
        if num_replicas > num_gpus:
            raise UserError(
                f"expected at most {num_gpus} replicas, one per GPU, got {num_replicas}: use fewer"
            )
        return replace(model, device="cuda"), num_replicas, {"num_gpus": 1.0, "num_cpus": 1.0}
    num_replicas = options.num_replicas or 1
    share_of_cpus = cluster.get("CPU", 1.0) / num_replicas
    num_threads = model.num_threads or max(1, int(share_of_cpus))
    num_cpus = min(float(num_threads), share_of_cpus)
    return (
        replace(model, device="cpu", num_threads=num_threads),
        num_replicas,
        {"num_cpus": num_cpus},
    )


def default_name(port: int) -> str:
    """Of the application: the same at the next start, so that what a killed front has left behind
    is replaced.
    """
    return f"rest-serve-{socket.gethostname()}-{port}"
