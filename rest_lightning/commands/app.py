"""Open a page for a portrait and a sound file: the video plays while it is made.

A Gradio app, the same that examples/space shows as a Space. It needs the extra `app`: pip install
'rest-lightning[app]'. Uploads and videos are deleted after an hour.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rest_lightning.commands.talk import MODEL_HELP, add_sign_argument, positive
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
    parser.add_argument("--model", type=Path, help=MODEL_HELP)
    parser.add_argument(
        "--threads",
        dest="num_threads",
        type=positive,
        help="threads of torch (default: its choice)",
    )
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the model"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")


def run(args: argparse.Namespace) -> int:
    """Serve the app until Ctrl-C."""
    if not 0 <= args.port <= 65535:
        raise UserError(f"expected a port from 0 to 65535, got {args.port}: 7860 is the default")
    from rest_lightning.integrations.gradio import build, listen, serve
    from rest_lightning.talking_head import ModelOptions

    signer = None
    if args.sign is not None:
        from rest_lightning.media.provenance import load_signer

        signer = load_signer(*args.sign)
    with listen(args.host, args.port) as listening:  # before the model is loaded
        model = ModelOptions(
            args.model, num_threads=args.num_threads, dtype=args.dtype, device=args.device
        ).load()
        app = build(model, max_s=args.max_s, signer=signer)
        host, port = listening.getsockname()[:2]
        print(f"open http://{host}:{port} in a browser; Ctrl-C stops", flush=True)
        serve(app, listening)
    return 0
