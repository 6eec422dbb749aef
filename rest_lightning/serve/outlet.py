"""What a session sends: a chunk's sound, then its frames while they are encoded, and never more than is read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from functools import partial
from typing import TypeVar

from rest_lightning.serve.encoder import FrameEncoder
from rest_lightning.serve.protocol import IDLE, KEYFRAME, SOUND, Channel, Pcm, message, pack
from rest_lightning.streaming.overlap import Frames

_FIRST_FRAMES = 4  # sent while the others are being encoded
_Result = TypeVar("_Result")


class SessionOver(Exception):
    """The server ends a session; ``code`` is for programs, the message is one line for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Outlet:
    """The way to a client.

    Args:
        channel: the connection.
        encoding: threads for what would keep the network waiting.
        unread_s: a client that lets a message wait for longer is given up (SessionOver).

    Attributes:
        encoder: of the frames; to be set before the first chunk.
    """

    encoder: FrameEncoder

    def __init__(self, channel: Channel, encoding: Executor, unread_s: float) -> None:
        self._channel, self._encoding, self._unread_s = channel, encoding, unread_s

    async def say(self, kind: str, **fields: object) -> None:
        """Sends a text message."""
        await self._patiently(self._channel.send_text(message(kind, **fields)))

    async def send_chunk(
        self,
        sound: Pcm,
        frames: Frames,
        epoch: int,
        first: int,
        *,
        idle: bool,
        keyframe: bool,
        wanted: Callable[[], bool],
    ) -> float | None:
        """Sends sound (640 n,) and frames (n, H, W, 3) that belong to it.

        Args:
            sound, frames, epoch: what is sent.
            first: index of the first frame.
            idle: whether the sound is the server's silence.
            keyframe: whether the first frame must be one.
            wanted: asked before every frame; the rest is kept back when it says no.

        Returns:
            Seconds spent encoding; None when not everything was sent.
        """
        flags = IDLE if idle else 0
        if len(sound):
            data = sound.astype("<i2", copy=False).tobytes()
            await self._patiently(self._channel.send_bytes(pack(SOUND, flags, epoch, first, len(sound), data)))
        encode_s = 0.0
        for start, stop in ((0, _FIRST_FRAMES), (_FIRST_FRAMES, len(frames))):
            begin_s = time.perf_counter()
            encoded = await self.in_thread(partial(self._encode, frames[start:stop], keyframe))
            keyframe = False
            encode_s += time.perf_counter() - begin_s
            for index, (data, is_key) in enumerate(encoded, first + start):
                if not wanted():
                    return None
                kind, mark = self.encoder.kind, flags | (KEYFRAME if is_key else 0)
                await self._patiently(self._channel.send_bytes(pack(kind, mark, epoch, index, 1, data)))
        return encode_s

    def _encode(self, frames: Frames, keyframe: bool) -> list[tuple[bytes, bool]]:
        return [self.encoder.encode(pixels, keyframe and place == 0) for place, pixels in enumerate(frames)]

    async def in_thread(self, call: Callable[[], _Result]) -> _Result:
        """Runs what would keep the network waiting."""
        return await asyncio.get_running_loop().run_in_executor(self._encoding, call)

    async def _patiently(self, sending: Coroutine[None, None, None]) -> None:
        try:
            async with asyncio.timeout(self._unread_s):
                await sending
        except TimeoutError:
            text = f"what was sent was not read for {self._unread_s:g} s: reload the page"
            raise SessionOver("unread", text) from None
