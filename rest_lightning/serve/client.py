"""A client without a browser: pushes speech (of a TTS, an agent, a file) and gets pictures and
sound.

    async with LiveClient("http://127.0.0.1:8765") as client:
        async for received in client.stream(blocks):  # blocks of int16 samples, 16 kHz mono
            ...  # Picture, Sound, or a dict with the server's JSON

``python -m rest_lightning.serve.client speech.wav out.mp4 --url ...`` records what a server
answers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import aiohttp
import av
import numpy as np

from rest_lightning.constants import SAMPLE_RATE
from rest_lightning.errors import UserError, exit_code
from rest_lightning.media.files import whole_file
from rest_lightning.serve.protocol import (
    H264,
    HEADER,
    IDLE,
    KEYFRAME,
    SOUND,
    VERSION,
    Pcm,
    message,
    pack_speech,
)


@dataclass(frozen=True)
class Picture:
    """A frame, encoded; ``index`` counts frames from the session's beginning."""

    epoch: int
    index: int
    data: bytes
    is_keyframe: bool
    is_h264: bool


@dataclass(frozen=True)
class Sound:
    """What is heard from frame ``index`` on; ``is_idle``: silence that the server put in."""

    epoch: int
    index: int
    samples: Pcm
    is_idle: bool


Received = Picture | Sound | dict[str, Any]


class LiveClient:
    """One session with a server.

    Args:
        url: of the page.
        portrait: id; None takes the server's first.
        codecs: those that you can decode, best first.
        seed: of the noise.
        live: whether the speech is a microphone's, whose pauses may be left out; False for an
            agent's, which is heard as it was sent.

    Attributes:
        hello: the server's first message, once entered.
    """

    def __init__(
        self,
        url: str,
        portrait: str | None = None,
        codecs: tuple[str, ...] = ("h264", "jpeg"),
        seed: int = 0,
        live: bool = True,
    ) -> None:
        self.url, self._headers = url.rstrip("/"), {"Origin": url.rstrip("/")}
        self._hello = {
            "version": VERSION,
            "codecs": list(codecs),
            "portrait": portrait,
            "seed": seed,
            "live": live,
        }
        self.hello: dict[str, Any] = {}
        self.epoch = self._index = 0
        self._source_error: Exception | None = None
        self._http: aiohttp.ClientSession
        self.socket: aiohttp.ClientWebSocketResponse

    async def __aenter__(self) -> Self:
        self._http = aiohttp.ClientSession(headers=self._headers)
        try:
            async with self._http.post(f"{self.url}/api/session") as response:
                answer = await response.json()
            if "token" not in answer:
                raise UserError(
                    f"expected a session at {self.url}, got: {answer.get('error', response.status)}"
                )
            # A server may send up to a chunk of JPEG frames at once, but every frame is a message
            # of its own.
            self.socket = await self._http.ws_connect(
                f"{self.url}/ws?token={answer['token']}", max_msg_size=2**22
            )
            await self.socket.send_str(message("hello", **self._hello))
            received = await self.receive()
            if not isinstance(received, dict) or received["type"] != "hello":
                raise UserError(f"expected a hello of {self.url}, got: {received}")
            self.hello = received
        except BaseException:
            await self._http.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.socket.close()
        await self._http.close()

    async def send(self, samples: Pcm) -> None:
        """Speech, int16, mono 16 kHz unless :meth:`send_format` said otherwise; not faster than it
        plays, but for a chunk or two.
        """
        await self.socket.send_bytes(pack_speech(self.epoch, self._index, samples))
        self._index += len(samples)

    async def flush(self) -> None:
        """The end of an utterance."""
        await self.socket.send_str(message("flush"))

    async def send_format(self, sample_rate_hz: int, channels: int = 1) -> None:
        """Of the speech that follows: samples are (n,) or (n, channels). The server tells with
        ``format`` when its sound changes to it.
        """
        fields = {"sample_rate_hz": sample_rate_hz, "channels": channels}
        await self.socket.send_str(message("format", **fields))

    async def interrupt(self) -> None:
        """What was sent so far is void."""
        self.epoch, self._index = self.epoch + 1, 0
        await self.socket.send_str(message("interrupt", epoch=self.epoch))

    async def switch_identity(self, portrait: str) -> None:
        """Go on with another portrait."""
        await self.socket.send_str(message("identity", portrait=portrait))

    async def record(self, on: bool = True) -> None:
        """Begin a signed recording of what is sent, or end it: see docs/protocol.md. The server
        records where its hello has ``limits.record_s``, and tells the end with ``recorded``.
        """
        await self.socket.send_str(message("record", on=on))

    async def download(self, url: str, path: Path) -> None:
        """Fetches a recording by the ``url`` of ``recorded``, which is good once.

        Raises:
            UserError: the server refuses, or the file cannot be written.
        """
        async with self._http.get(f"{self.url}/{url}") as response:
            if response.status != 200:
                said = (await response.json()).get("error", response.status)
                raise UserError(f"expected a recording of {self.url}, got: {said}")
            with whole_file(path) as temporary, temporary.open("wb") as file:
                async for block in response.content.iter_chunked(262_144):
                    await asyncio.to_thread(file.write, block)

    async def end(self) -> None:
        """Nothing follows."""
        await self.socket.send_str(message("end"))

    async def receive(self) -> Received | None:
        """The next thing that the server sends; None after the last."""
        received = await self.socket.receive()
        if received.type == aiohttp.WSMsgType.TEXT:
            answer: dict[str, Any] = json.loads(received.data)
            return answer
        if received.type != aiohttp.WSMsgType.BINARY:
            return None
        kind, flags, _, epoch, index, _ = HEADER.unpack_from(received.data)
        payload = received.data[HEADER.size :]
        if kind == SOUND:
            return Sound(epoch, index, np.frombuffer(payload, "<i2"), bool(flags & IDLE))
        return Picture(epoch, index, payload, bool(flags & KEYFRAME), kind == H264)

    async def stream(self, blocks: Iterable[Pcm]) -> AsyncIterator[Received]:
        """Sends blocks at the pace of their sound, then ends; meanwhile gives what the server
        sends.

        Raises:
            Exception: whatever the blocks raise.
        """
        sending = asyncio.create_task(self._send_all(blocks))
        try:
            while (received := await self.receive()) is not None:
                yield received
            if self._source_error is not None:
                raise self._source_error
        finally:
            sending.cancel()

    async def _send_all(self, blocks: Iterable[Pcm]) -> None:
        loop = asyncio.get_running_loop()
        due_s = loop.time()
        try:
            for block in blocks:
                await self.send(block)
                due_s += len(block) / SAMPLE_RATE
                await asyncio.sleep(due_s - loop.time())
            await self.end()
        except ConnectionError:
            pass  # the server has ended the session, and told why
        except Exception as error:
            self._source_error = error
            await self.socket.close()  # whoever waits for pictures learns of it


async def record(url: str, blocks: Iterable[Pcm], out: Path, portrait: str | None = None) -> None:
    """Stream speech through a server into an mp4, with its sound.

    Raises:
        UserError: the server refuses, or ends the session with an error.
    """
    from rest_lightning.media.writer import Mp4Writer

    async with LiveClient(url, portrait, codecs=("h264",)) as client:
        decoder = av.CodecContext.create("h264", "r")
        with Mp4Writer(out, client.hello["size_px"], overwrite=True) as writer:
            async for received in client.stream(blocks):
                if isinstance(received, Sound):
                    await asyncio.to_thread(
                        writer.write_audio, received.samples.astype(np.float32) / 32768.0
                    )
                elif isinstance(received, Picture):
                    for frame in decoder.decode(av.Packet(received.data)):  # type: ignore[attr-defined]
                        await asyncio.to_thread(writer.write, frame.to_ndarray(format="rgb24"))
                elif received["type"] == "error":
                    raise UserError(f"expected the session to go on, got: {received['message']}")


def main() -> int:
    """``python -m rest_lightning.serve.client``."""
    from rest_lightning.media.audio import open_speech

    parser = argparse.ArgumentParser(description="Record what a live server answers to speech.")
    parser.add_argument(
        "speech", help=('sound file, or "-" for raw 16 kHz mono s16le samples from a pipe')
    )
    parser.add_argument("out", type=Path, help="the mp4 to write")
    parser.add_argument("--url", default="http://127.0.0.1:8765", help="of the server")
    parser.add_argument("--portrait", help="id of a portrait (default: the server's first)")
    args = parser.parse_args()
    speech = open_speech(args.speech, block_samples=SAMPLE_RATE // 50)
    blocks = ((np.clip(block, -1, 1) * 32767).astype(np.int16) for block in speech)
    asyncio.run(record(args.url, blocks, args.out, args.portrait))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
