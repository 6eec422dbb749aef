"""Talk with a portrait in the browser: it listens, answers, and can be interrupted.

What it hears and says is the work of a realtime server (--realtime ws://...), such as Hugging
Face's speech-to-speech: speech recognition, a language model and speech synthesis behind OpenAI's
Realtime protocol. Its key, where it wants one, is read from REALTIME_API_KEY or OPENAI_API_KEY.
Without a server --realtime echo answers with what you said, and --realtime espeak with a sentence
of espeak-ng (extra `synthetic`).
"""

from __future__ import annotations

import argparse
import asyncio
import os
from contextlib import AsyncExitStack

from rest_lightning.commands.serve import (
    add_listening_arguments,
    add_recording_arguments,
    recording_signer,
    serve_until_stopped,
    tell_speed,
)
from rest_lightning.commands.talk import add_loading_arguments, model_options, positive
from rest_lightning.errors import run_async
from rest_lightning.extras import require
from rest_lightning.machine import spin_briefly

LOOPBACKS = ("echo", "espeak")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    realtime = (
        "address of a realtime server (ws:// or wss://), or echo or espeak for a built-in one"
    )
    parser.add_argument(
        "--realtime", required=True, type=_realtime, metavar="URL|echo|espeak", help=realtime
    )
    instructions = "what the agent is told to be (default: the realtime server's own)"
    parser.add_argument("--instructions", help=instructions)
    add_listening_arguments(parser, 8766)
    parser.add_argument(
        "--max-sessions", type=positive, default=1, help="conversations at once (default 1)"
    )
    add_recording_arguments(parser)
    add_loading_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop."""
    spin_briefly()
    if args.realtime == "espeak":
        require("synthetic", "--realtime espeak")
    from rest_lightning.serve.server import ServerOptions

    options = ServerOptions(args.host, args.port, (), args.cert, args.key)
    options.tls()  # before the model is loaded
    signer = recording_signer(args)
    model = model_options(args).load()
    run_async(_converse(args, model, options, signer))
    return 0


async def _converse(
    args: argparse.Namespace, model: object, options: object, signer: object
) -> None:
    from rest_lightning.avatar import AvatarPool
    from rest_lightning.serve.converse import ConverseServer
    from rest_lightning.serve.limits import Limits
    from rest_lightning.serve.loopback import espeak_voice, loopback_server
    from rest_lightning.serve.realtime import KEY_VARIABLES, RealtimeClient

    key = next(filter(None, map(os.environ.get, KEY_VARIABLES)), None)
    record_s = 60 * args.record_min
    limits = Limits(args.max_sessions, args.max_sessions, grace_s=0.0, record_s=record_s)
    async with AsyncExitStack() as stack:
        url, session = args.realtime, None
        if url in LOOPBACKS:
            voice = await asyncio.to_thread(espeak_voice) if url == "espeak" else None
            url, key = await stack.enter_async_context(loopback_server(voice)), None
        elif args.instructions is not None:
            session = {"type": "realtime", "instructions": args.instructions}
        async with RealtimeClient(url, key):
            pass  # a server that is absent is told before the model has warmed up
        print("warming up the model", flush=True)
        pool = AvatarPool(model, args.max_sessions)  # type: ignore[arg-type]
        await pool.start()
        tell_speed(pool.warm_up_ms, pool.chunk_frames)
        server = ConverseServer(
            pool,
            lambda: RealtimeClient(url, key, session),
            options,  # type: ignore[arg-type]
            limits,
            signer,  # type: ignore[arg-type]
        )
        stack.push_async_callback(server.aclose)
        await serve_until_stopped(server, ", press Speak and talk")


def _realtime(text: str) -> str:
    if text not in LOOPBACKS and not text.startswith(("ws://", "wss://")):
        raise argparse.ArgumentTypeError(
            f"expected ws://..., wss://..., echo or espeak, got {text}"
        )
    return text
