"""A session whose model is another process's: messages pass through as they are, in both directions."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiohttp

from rest_lightning.serve.channel import HEARTBEAT_S, AioChannel
from rest_lightning.serve.limits import Limits
from rest_lightning.serve.logs import LOG
from rest_lightning.serve.outlet import SessionOver
from rest_lightning.serve.protocol import Channel, ChannelClosed, message
from rest_lightning.serve.session import say_goodbye

ADDRESS_HEADER = "X-Rest-Address"  # the client's, told to whoever holds the token
LOST = "the machine of this session has failed: start a new one"
_LARGEST_BYTES = 2**22  # a frame, whatever its size
_CLOSE_S = 1.0


@asynccontextmanager
async def connected(url: str, token: str, address: str) -> AsyncIterator[Channel]:
    """The socket of a session at a replica; raises OSError or aiohttp.ClientError when there is none."""
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

    Nothing is read from a side before the other has taken what was read last, so that a client that does not read
    holds up its session, and nothing piles up here.

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
            ended (the replica has told the client why), gone (the client), lost (the replica), or why the session was
            stopped here.
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
                text = f"what was sent was not read for {self._limits.unread_s:g} s: reload the page"
                raise SessionOver("unread", text) from None

    async def _tell_loss(self) -> None:
        """Without a bye: a client that connects anew where a connection was cut does so here."""
        with suppress(ChannelClosed, TimeoutError):
            async with asyncio.timeout(1.0):
                await self._client.send_text(message("error", code="lost", message=LOST))
        await self._client.close()


async def _send(channel: Channel, data: bytes | str) -> None:
    await (channel.send_text(data) if isinstance(data, str) else channel.send_bytes(data))
