"""Serve the live page: choose a portrait, speak, and it speaks.

Open the printed address in a browser. The microphone needs localhost or TLS (--cert, --key). Ctrl-C
takes no new sessions and lets those that are there go on for --grace seconds; a second Ctrl-C ends
them at once.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import signal
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rest_lightning.commands.talk import (
    add_loading_arguments,
    add_sign_argument,
    model_options,
    positive,
)
from rest_lightning.constants import FPS
from rest_lightning.errors import UserError, run_async
from rest_lightning.machine import spin_briefly

if TYPE_CHECKING:
    from rest_lightning.media.provenance import Signer
    from rest_lightning.serve.limits import Limits
    from rest_lightning.serve.server import PageServer, ServerOptions
    from rest_lightning.talking_head import ModelOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_listening_arguments(parser, 8765)
    origin = (
        "a further origin whose page may open sessions, such as https://example.org; may be "
        "repeated"
    )
    parser.add_argument("--origin", action="append", type=_origin, default=[], help=origin)
    parser.add_argument(
        "--max-sessions",
        type=positive,
        default=3,
        help="sessions at once, of a replica (default 3)",
    )
    parser.add_argument("--max-per-address", type=positive, help="of one address (default: all)")
    parser.add_argument(
        "--session-min",
        type=_minutes,
        default=120.0,
        help="length of a session in minutes (default 120)",
    )
    parser.add_argument(
        "--idle-min", type=_minutes, default=5.0, help="minutes without a message (default 5)"
    )
    parser.add_argument(
        "--grace", type=float, default=30.0, help="seconds for sessions at the end (default 30)"
    )
    add_recording_arguments(parser)
    add_loading_arguments(parser)
    engine = (
        "local: this process; ray: replicas in the Ray cluster of RAY_ADDRESS, or in one on "
        "this machine"
    )
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help=engine)
    parser.add_argument(
        "--replicas", type=positive, help="of the model, with --engine ray (default: one per GPU)"
    )


def add_listening_arguments(parser: argparse.ArgumentParser, port: int) -> None:
    """Arguments of commands that serve a page: where they listen; ``port`` is the default."""
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine)"
    )
    parser.add_argument(
        "--port", type=int, default=port, help=f"port (default {port}; 0 takes any free one)"
    )
    parser.add_argument("--cert", type=Path, help="TLS certificate, PEM")
    parser.add_argument("--key", type=Path, help="its key, PEM")


def add_recording_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of commands whose page records."""
    add_sign_argument(parser, "recordings, which the server then makes itself,")
    parser.add_argument(
        "--record-min",
        type=_minutes,
        default=10.0,
        help="longest signed recording in minutes (default 10)",
    )


def recording_signer(args: argparse.Namespace) -> Signer | None:
    """Who signs recordings, tried; None leaves them to the browser."""
    if args.sign is None:
        return None
    from rest_lightning.media.provenance import load_signer
    from rest_lightning.serve.recording import try_signer

    signer = load_signer(*args.sign)
    try_signer(signer)
    return signer


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop."""
    spin_briefly()
    if args.sign is not None and args.engine == "ray":
        raise UserError(
            "expected --sign with --engine local, got ray, whose machines would all need the key: "
            "leave one of them out"
        )
    from rest_lightning.serve.limits import Limits
    from rest_lightning.serve.metrics import LOG, log_as_json
    from rest_lightning.serve.server import ServerOptions

    options = ServerOptions(args.host, args.port, tuple(args.origin), args.cert, args.key)
    options.tls()  # before the model is loaded
    signer = recording_signer(args)
    model = model_options(args)
    limits = Limits(
        max_sessions=args.max_sessions,
        max_per_address=args.max_per_address or args.max_sessions,
        session_s=60 * args.session_min,
        idle_s=60 * args.idle_min,
        grace_s=args.grace,
        record_s=60 * args.record_min,
    )
    handler = log_as_json()
    try:
        if args.engine == "local":
            _run_here(model, options, limits, signer)
        else:
            _run_on_ray(args, model, options, limits)
    finally:
        LOG.removeHandler(handler)
    return 0


def _run_here(
    model: ModelOptions, options: ServerOptions, limits: Limits, signer: Signer | None
) -> None:
    from rest_lightning.avatar import AvatarPool
    from rest_lightning.serve.server import LiveServer

    pool = AvatarPool(model.load(), limits.max_sessions)
    print("warming up the model", flush=True)
    pool.warm_up()
    tell_speed(pool.warm_up_ms, pool.chunk_frames)

    async def serve() -> None:
        server = LiveServer(pool, options, limits, signer=signer)
        try:
            await serve_until_stopped(server)
        finally:
            await server.aclose()

    run_async(serve())


def _run_on_ray(
    args: argparse.Namespace, model: ModelOptions, options: ServerOptions, limits: Limits
) -> None:
    """The same with replicas of the model; ``limits.max_sessions`` is that of each."""
    from rest_lightning.serve import ray_engine

    replicas = ray_engine.ReplicaOptions(model, args.replicas, ray_engine.default_name(args.port))
    print("starting the replicas and warming up their models", flush=True)
    with ray_engine.running(
        replicas, replace(limits, max_per_address=limits.max_sessions)
    ) as cluster:
        tell_speed(cluster.facts.warm_up_ms, cluster.facts.chunk_frames)
        most = limits.max_sessions * cluster.num_replicas
        limits = replace(limits, max_sessions=most, max_per_address=args.max_per_address or most)
        run_async(serve_until_stopped(ray_engine.RayServer(cluster, options, limits)))


def tell_speed(warm_up_ms: list[float], chunk_frames: int) -> None:
    """Warns when the machine cannot serve all sessions in real time."""
    chunk_ms = 1000 * chunk_frames // FPS
    took_ms = [round(each) for each in warm_up_ms]
    logger = logging.getLogger("rest_lightning.serve")
    logger.info("warmed up", extra={"chunk_ms": took_ms, "real_time_ms": chunk_ms})
    slow = [count for count, took in enumerate(took_ms, 1) if took > 0.9 * chunk_ms]
    if slow and slow[0] == 1:
        text = "a session takes %d ms for %d ms of video: pictures will stand still in between"
        logger.warning(text, took_ms[0], chunk_ms)
    elif slow:
        text = "%d sessions at once take %d ms for %d ms of video: set --max-sessions %d"
        logger.warning(text, slow[0], took_ms[slow[0] - 1], chunk_ms, slow[0] - 1)


async def serve_until_stopped(server: PageServer, then: str = "") -> None:
    """Listens, says where, and goes on until Ctrl-C or SIGTERM.

    Sessions may go on for the server's ``grace_s``; a second signal ends them at once.

    Args:
        server: not started yet.
        then: what a user does once the page is open, told with its address.
    """
    loop, asked = asyncio.get_running_loop(), asyncio.Event()
    forced = asyncio.Event()

    def ask() -> None:
        (forced if asked.is_set() else asked).set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ask)
    await server.start()
    print(f"open {server.url} in a browser{then}; Ctrl-C stops", flush=True)
    await asked.wait()
    if server.limits.grace_s:
        print("stopping: sessions may finish; Ctrl-C again ends them", flush=True)
    stopping = asyncio.create_task(server.stop())
    forcing = asyncio.create_task(forced.wait())
    await asyncio.wait({stopping, forcing}, return_when=asyncio.FIRST_COMPLETED)
    if not stopping.done():
        stopping.cancel()
        await server.stop(0.0)
    forcing.cancel()


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0.0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"expected minutes above 0, got {text}")
    return minutes


def _origin(text: str) -> str:
    scheme, _, host = text.partition("://")
    if scheme not in ("http", "https") or not host or "/" in host:
        raise argparse.ArgumentTypeError(f"expected an origin like https://example.org, got {text}")
    return text
