"""A WebSocket as the channel of a session."""

from __future__ import annotations

from aiohttp import ClientWebSocketResponse, WSCloseCode, WSMsgType, web

from rest_lightning.serve.protocol import ChannelClosed

HEARTBEAT_S = 15.0  # a side that does not answer for so long has gone


class AioChannel:
    """A WebSocket of aiohttp as a :class:`rest_lightning.serve.protocol.Channel`."""

    def __init__(self, socket: web.WebSocketResponse | ClientWebSocketResponse) -> None:
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
