"""A live server with a tiny real model, for tests that talk to it over loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import numpy as np
from tiny_head import make_head
from torch import Tensor

from rest_lightning.avatar import AvatarPool
from rest_lightning.media.provenance import Signer
from rest_lightning.models.speech import LogMelEncoder
from rest_lightning.serve.client import LiveClient, Picture, Received, Sound
from rest_lightning.serve.limits import Limits
from rest_lightning.serve.protocol import Pcm
from rest_lightning.serve.server import LiveServer, ServerOptions
from rest_lightning.talking_head import TalkingHead


class FragileEncoder(LogMelEncoder):
    """Raises at samples of full scale: a model that fails in one session."""

    def features(self, audio: Tensor) -> Tensor:
        """As its parent's."""
        if float(audio.abs().max()) > 0.99:
            raise RuntimeError("the model has met samples of full scale")
        return super().features(audio)


def short_head(chunk_length: int = 1) -> TalkingHead:
    """Chunks of 0.32 s, and a model that can fail."""
    head = make_head(chunk_length)
    head.speech_encoder = FragileEncoder(lookahead_frames=head.speech_encoder.lookahead_frames)
    return head


@asynccontextmanager
async def serving(
    head: TalkingHead, num_rows: int = 2, signer: Signer | None = None, **limits: Any
) -> AsyncIterator[LiveServer]:
    """A server on a free port; afterwards every session must have given back what it held."""
    given = {"max_sessions": num_rows, "max_per_address": num_rows} | limits
    pool = AvatarPool(head, num_rows)
    await pool.start()
    server = LiveServer(pool, ServerOptions(port=0), Limits(**given), signer=signer)
    try:
        async with server:
            yield server
            await settled(server)
    finally:
        await server.aclose()


async def settled(server: LiveServer, num_active: int = 0) -> None:
    """Waits until so many sessions are left, and checks that the others have left nothing."""
    async with asyncio.timeout(20):
        while server.admission.num_active != num_active:
            await asyncio.sleep(0.01)
    pool = server.service.pool
    assert len(server.service.sessions) == num_active
    assert pool.num_free == pool.num_avatars - num_active
    # in the model's thread, behind what was asked of it before
    assert await pool._call(lambda: len(pool._batch.rows)) == num_active


def tone(seconds: float, level: float = 0.3, hz: float = 220.0) -> Pcm:
    """Speech of a kind: no two samples in a row are alike."""
    times = np.arange(round(16_000 * seconds)) / 16_000
    return (32767 * level * np.sin(2 * np.pi * hz * times + 0.1)).astype(np.int16)


def cut(samples: Pcm, size: int) -> list[Pcm]:
    """Blocks of so many samples."""
    return [samples[start : start + size] for start in range(0, len(samples), size)]


async def collect(client: LiveClient, blocks: list[Pcm]) -> list[Received]:
    """Everything that a server answers to speech, to the end."""
    async with asyncio.timeout(60):
        return [received async for received in client.stream(blocks)]


async def until(client: LiveClient, kind: str, most_s: float = 20.0) -> dict[str, Any]:
    """The next JSON message of a type; what comes before is left out."""
    async with asyncio.timeout(most_s):
        while (received := await client.receive()) is not None:
            if isinstance(received, dict) and received["type"] == kind:
                return received
    raise AssertionError(f"the session ended before a message of type {kind}")


def sound_of(received: list[Received]) -> Pcm:
    """All sound, in a row."""
    return np.concatenate([each.samples for each in received if isinstance(each, Sound)])


def pictures_of(received: list[Received]) -> list[Picture]:
    """All frames."""
    return [each for each in received if isinstance(each, Picture)]


def said(received: list[Received], kind: str) -> list[dict[str, Any]]:
    """All JSON messages of a type."""
    return [each for each in received if isinstance(each, dict) and each["type"] == kind]


async def open_session(
    http: aiohttp.ClientSession, server: LiveServer, origin: str | None = None
) -> dict[str, Any]:
    """Asks for a token; the answer, with its status."""
    async with http.post(
        f"{server.url}/api/session", headers={"Origin": origin or server.url}
    ) as answer:
        return {"status": answer.status, **(await answer.json())}
