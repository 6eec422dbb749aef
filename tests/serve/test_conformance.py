"""The live server is a way to an avatar like any other: the suite runs through its protocol."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest

pytest.importorskip("aiohttp", reason="aiohttp (extra `serve`) serves the page")

from rest_lightning.avatar import AvatarPool, conformance
from rest_lightning.avatar.conformance import Piece, Subject
from rest_lightning.avatar.simulation import TracedModel
from rest_lightning.serve import session as session_module
from rest_lightning.serve.limits import Limits
from rest_lightning.serve.protocol import (
    HEADER,
    IDLE,
    JPEG,
    SOUND,
    ChannelClosed,
    message,
    pack_speech,
)
from rest_lightning.serve.session import Service, run_session
from rest_lightning.serve.uploads import Portraits

LIMITS = Limits(
    session_s=1e6,
    idle_s=1e6,
    input_rate=1e3,
    input_burst_s=1e3,
    messages_per_s=1e6,
    message_burst=1e6,
    unread_s=1e3,
)
SLOW = [
    conformance.utterances_of_any_length,
    conformance.ten_minutes_faster_than_real_time,
    conformance.rates_and_channels,
    conformance.interruption_at_every_phase,
    conformance.hours_of_idling,
]
QUICK = [case for case in conformance.CASES if case not in SLOW]


class RawEncoder:
    """Pictures as they are: those of the traced model would not survive a codec."""

    kind, codec, codec_string = JPEG, "jpeg", "raw"

    def encode(self, pixels: np.ndarray, keyframe: bool = False) -> tuple[bytes, bool]:
        return pixels.tobytes(), keyframe


@pytest.fixture(autouse=True)
def raw_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "open_encoder", lambda codecs, size_px: RawEncoder())


class Pipe:
    """A channel without a network, that holds a few messages."""

    def __init__(self) -> None:
        self.up: asyncio.Queue[bytes | str | None] = asyncio.Queue(4)
        self.down: asyncio.Queue[bytes | str] = asyncio.Queue(4)

    async def receive(self) -> bytes | str:
        received = await self.up.get()
        if received is None:
            raise ChannelClosed
        return received

    async def send_bytes(self, data: bytes) -> None:
        await self.down.put(data)

    async def send_text(self, text: str) -> None:
        await self.down.put(text)

    async def close(self) -> None:
        pass


class Client:
    """A client of version 2 that sends what an agent says."""

    def __init__(self, pipe: Pipe) -> None:
        self.pipe = pipe
        self.epoch = self.index = 0
        self.format = (16_000, 1)

    async def push(self, samples: np.ndarray, sample_rate: int) -> None:
        given = (sample_rate, 1 if samples.ndim == 1 else samples.shape[1])
        if given != self.format:
            self.format = given
            await self.pipe.up.put(message("format", sample_rate_hz=given[0], channels=given[1]))
        await self.pipe.up.put(pack_speech(self.epoch, self.index, samples))
        self.index += len(samples)

    async def flush(self) -> None:
        await self.pipe.up.put(message("flush"))

    async def interrupt(self) -> None:
        self.epoch, self.index = self.epoch + 1, 0
        await self.pipe.up.put(message("interrupt", epoch=self.epoch))

    async def pieces(self) -> AsyncIterator[Piece]:
        """A picture with what is said of it: its account comes last."""
        rate, channels, size = 16_000, 1, 16
        picture = samples = None
        ends = False
        while True:
            received = await self.pipe.down.get()
            if isinstance(received, str):
                told = json.loads(received)
                if told["type"] == "format":
                    rate, channels = told["sample_rate_hz"], told["channels"]
                elif told["type"] == "flushed":
                    ends = True
                elif told["type"] == "chunk" and picture is not None:
                    is_void = told["epoch"] < self.epoch
                    yield Piece(picture, None if is_void else samples, rate, ends and not is_void)
                    picture = samples = None
                    ends = False
                assert told["type"] not in ("error", "bye"), told
                continue
            kind, flags, *_ = HEADER.unpack_from(received)
            payload = np.frombuffer(received, np.uint8, offset=HEADER.size)
            if kind != SOUND:
                picture = payload.reshape(size, size, 3)
            elif not flags & IDLE:
                samples = payload.view("<i2")
                samples = samples if channels == 1 else samples.reshape(-1, channels)


@asynccontextmanager
async def open_live(model: TracedModel) -> AsyncIterator[Subject]:
    pipe = Pipe()
    service = Service(AvatarPool(model, 1), Portraits(), LIMITS)  # type: ignore[arg-type]
    await service.pool.start()
    serving = asyncio.create_task(run_session(pipe, service))
    await pipe.up.put(message("hello", version=2, live=False))
    try:
        yield Client(pipe)
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await service.aclose()


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.__name__)
def test_the_live_server_conforms(case: conformance.Case) -> None:
    conformance.check(case, open_live)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=lambda case: case.__name__)
def test_the_live_server_conforms_for_long(case: conformance.Case) -> None:
    conformance.check(case, open_live)
