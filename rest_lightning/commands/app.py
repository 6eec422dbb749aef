"""Open a page for a portrait and a sound file: the video plays while it is made.

A Gradio app, the same that examples/space shows as a Space. Needs the extra `app`; rest doctor says
how to install it. Uploads and videos are deleted after an hour.
"""

from __future__ import annotations

import argparse

from rest_lightning.commands.talk import (
    add_loading_arguments,
    add_sign_argument,
    model_options,
    positive,
)
from rest_lightning.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine)"
    )
    parser.add_argument(
        "--port", type=int, default=7860, help="port (default 7860; 0 takes any free one)"
    )
    parser.add_argument(
        "--max-s", type=positive, default=120, help="longest speech in seconds (default 120)"
    )
    add_sign_argument(parser)
    add_loading_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serve the app until Ctrl-C."""
    if not 0 <= args.port <= 65535:
        raise UserError(f"expected a port from 0 to 65535, got {args.port}: 7860 is the default")
    from rest_lightning.integrations.gradio import build, listen, serve

    signer = None
    if args.sign is not None:
        from rest_lightning.media.provenance import load_signer

        signer = load_signer(*args.sign)
    with listen(args.host, args.port) as listening:  # before the model is loaded
        app = build(model_options(args).load(), max_s=args.max_s, signer=signer)
        host, port = listening.getsockname()[:2]
        print(f"open http://{host}:{port} in a browser; Ctrl-C stops", flush=True)
        serve(app, listening)
    return 0
