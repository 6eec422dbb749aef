"""The live page: speech in over a WebSocket, pictures and sound out; protocol in
docs/protocol.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rest_lightning.names import lazy

if TYPE_CHECKING:
    from rest_lightning.serve.client import LiveClient as LiveClient
    from rest_lightning.serve.limits import Limits as Limits
    from rest_lightning.serve.server import LiveServer as LiveServer
    from rest_lightning.serve.server import ServerOptions as ServerOptions

__all__, __getattr__ = lazy(
    __name__,
    {
        "client": ["LiveClient"],
        "limits": ["Limits"],
        "server": ["LiveServer", "ServerOptions"],
    },
)
