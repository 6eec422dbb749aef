"""The live server with a marked model, for measurements: ``python -m benchmarks._live_server
--size-px 256``.

Prints its address as `rest serve` does; ends with its standard input.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks._marked_model import MarkedModel
from rest_lightning.avatar import AvatarPool
from rest_lightning.media.provenance import Signer
from rest_lightning.serve.limits import Limits
from rest_lightning.serve.server import LiveServer, ServerOptions


@contextmanager
def serving(
    model: Any, limits: Limits | None = None, signer: Signer | None = None
) -> Iterator[LiveServer]:
    """A server on a free port of this process, its network on a thread of its own."""
    limits = limits or Limits()
    pool = AvatarPool(model, limits.max_sessions)
    pool.warm_up()
    server = LiveServer(pool, ServerOptions(port=0), limits, signer=signer)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="network", daemon=True)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(30)
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(0.0), loop).result(30)
        asyncio.run_coroutine_threadsafe(server.aclose(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def main() -> int:
    """Serve until standard input ends."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size-px", type=int, default=256)
    parser.add_argument(
        "--chunk-s", type=float, default=0.0, help=("time that the model takes for a chunk")
    )
    parser.add_argument("--max-sessions", type=int, default=3)
    args = parser.parse_args()
    limits = Limits(max_sessions=args.max_sessions, max_per_address=args.max_sessions)
    with serving(MarkedModel(args.size_px, args.chunk_s), limits) as server:
        print(f"open {server.url} in a browser", flush=True)
        sys.stdin.read()
    return 0


if __name__ == "__main__":
    sys.exit(main())
