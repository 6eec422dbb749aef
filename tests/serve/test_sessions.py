"""Sessions over a real WebSocket: what is heard and seen, how they begin and end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import av
import numpy as np
import pytest
from live import (
    collect,
    cut,
    open_session,
    pictures_of,
    said,
    serving,
    short_head,
    sound_of,
    tone,
    until,
)

from rest_lightning.serve.client import LiveClient, Picture, Received, Sound
from rest_lightning.serve.protocol import SOUND, ChannelClosed, message, pack_speech
from rest_lightning.serve.session import run_session
from rest_lightning.talking_head import TalkingHead

CHUNK = 8 * 640
Misdeed = Callable[[LiveClient], Awaitable[None]]


@pytest.fixture(scope="module")
def head() -> TalkingHead:
    return short_head()


def coarse(frames: np.ndarray) -> np.ndarray:
    """Grey levels of blocks of 8 x 8 pixels: random networks draw noise, of which an encoder keeps
    no more.
    """
    return frames.astype(float).reshape(len(frames), 8, 8, 8, 8, 3).mean(axis=(2, 4, 5))


@pytest.mark.parametrize("codec", ["h264", "jpeg"])
def test_speech_comes_back_whole_with_a_picture_for_every_40_ms(
    head: TalkingHead, codec: str
) -> None:
    speech = tone(0.9)

    async def scenario() -> tuple[dict[str, Any], list[Received]]:
        async with serving(head, 1) as server, LiveClient(server.url, codecs=(codec,)) as client:
            return client.hello, await collect(client, cut(speech, 320))

    hello, received = asyncio.run(scenario())
    assert (hello["codec"], hello["size_px"], hello["chunk_frames"], hello["fps"]) == (
        codec,
        64,
        8,
        25,
    )
    sound, pictures = sound_of(received), pictures_of(received)
    # its first sample is no zero, but what rounds to one might be
    start = int(np.flatnonzero(sound)[0]) - 1
    start += int(np.flatnonzero(sound[start:] == speech[0])[0])
    np.testing.assert_array_equal(sound[start : start + len(speech)], speech)
    assert len(sound) - start - len(speech) < 640
    assert [each.index for each in pictures] == list(range(len(sound) // 640))
    assert pictures[0].is_keyframe and all(each.is_h264 == (codec == "h264") for each in pictures)
    order = [each.index for each in received if isinstance(each, Sound | Picture)]
    assert order == sorted(order), "sound of a chunk comes before its frames, chunks in their order"
    chunks = said(received, "chunk")
    starts = np.cumsum([0, *(each["frames"] for each in chunks)])
    assert [each["index"] for each in chunks] == list(starts[:-1]) and starts[-1] == len(pictures)
    assert chunks[-1]["input_sample"] == len(speech) - 1
    spoken = [each for each in chunks if each["input_sample"] is not None]
    assert all(each["compute_ms"] > 0 and each["rows"] == 1 for each in spoken)
    assert received[-1] == {"type": "bye", "reason": "the session has ended"}


def test_pictures_are_those_of_a_stream_alone(head: TalkingHead) -> None:
    from rest_lightning.serve.uploads import Portraits

    async def scenario() -> list[Received]:
        async with serving(head, 1) as server, LiveClient(server.url, seed=3) as client:
            assert client.hello["codec_string"].startswith("avc1.42C0")
            return await collect(client, cut(tone(0.7), 320))

    received = asyncio.run(scenario())
    decoder = av.CodecContext.create("h264", "r")
    frames = [
        frame.to_ndarray(format="rgb24")
        for each in pictures_of(received)
        for frame in decoder.decode(av.Packet(each.data))  # type: ignore[attr-defined]
    ]
    frames += [frame.to_ndarray(format="rgb24") for frame in decoder.decode(None)]  # type: ignore[attr-defined]
    alone = head.open(Portraits().load(None, 64), seed=3)
    expected = np.concatenate([alone.push(sound_of(received)), alone.flush()])
    assert len(frames) == len(expected)
    shown, wanted = (coarse(np.stack(each)) for each in (frames, list(expected)))
    right, others = np.abs(shown - wanted).mean(axis=(1, 2)), np.abs(shown - wanted[::-1]).mean()
    assert right.max() < 0.6 * others, "every frame is the one of its time"


def test_without_speech_the_face_idles_by_the_clock(head: TalkingHead) -> None:
    async def scenario() -> tuple[list[Received], float]:
        async with serving(head, 1) as server, LiveClient(server.url) as client:
            loop = asyncio.get_running_loop()
            received: list[Received] = []
            start_s = loop.time()
            while len(pictures_of(received)) < 40:
                each = await client.receive()
                assert each is not None
                received.append(each)
            return received, loop.time() - start_s

    received, took_s = asyncio.run(scenario())
    assert all(
        each.is_idle and not each.samples.any() for each in received if isinstance(each, Sound)
    )
    assert took_s > 4 * 0.32 - 0.15, "idle chunks are not ahead of the clock"


def test_an_interruption_voids_what_was_said(head: TalkingHead) -> None:
    async def scenario() -> list[Received]:
        received: list[Received] = []
        async with serving(head, 1) as server, LiveClient(server.url) as client:
            await client.send(tone(0.9, hz=200))
            await until(client, "chunk")
            await client.interrupt()
            # of the old epoch, still on its way
            await client.socket.send_bytes(pack_speech(0, 20_000, tone(0.2)))
            await until(client, "interrupted")
            await client.send(tone(0.5, 0.9, hz=900))
            await client.end()
            while (each := await client.receive()) is not None:
                received.append(each)
        return received

    received = asyncio.run(scenario())
    pictures = pictures_of(received)
    assert {each.epoch for each in received if isinstance(each, Sound | Picture)} == {1}
    assert pictures[0].is_keyframe
    loud = sound_of(received)
    assert np.abs(loud).max() > 0.85 * 32767
    np.testing.assert_array_equal(
        loud[np.flatnonzero(loud)[0] :][:8000], tone(0.5, 0.9, hz=900)[:8000]
    )
    assert said(received, "chunk")[-1]["input_sample"] == 7999


def test_another_identity_without_a_restart(head: TalkingHead) -> None:
    async def scenario() -> tuple[list[Received], list[dict[str, str]]]:
        received: list[Received] = []
        async with serving(head, 1) as server, LiveClient(server.url) as client:
            async with (
                aiohttp.ClientSession() as http,
                http.get(f"{server.url}/api/portraits") as answer,
            ):
                listed = await answer.json()
            await until(client, "chunk")
            await client.switch_identity("nobody")
            error = await until(client, "error")
            assert error["code"] == "portrait" and "id of a portrait" in error["message"]
            await client.switch_identity(listed[-1]["id"])
            received.append(await until(client, "identity"))
            await client.end()
            while (each := await client.receive()) is not None:
                received.append(each)
        return received, listed

    received, listed = asyncio.run(scenario())
    assert received[0]["portrait"] == listed[-1]["id"]  # type: ignore[index]
    pictures = pictures_of(received)
    assert not pictures or (pictures[0].index == received[0]["frame"] and pictures[0].is_keyframe)  # type: ignore[index]


def test_a_server_that_stops_lets_sessions_finish(head: TalkingHead) -> None:
    async def scenario() -> None:
        async with (
            serving(head, 2) as server,
            aiohttp.ClientSession() as http,
            LiveClient(server.url) as short,
            LiveClient(server.url) as endless,
        ):
            finishing = asyncio.create_task(collect(short, cut(tone(0.5), 320)))
            stopping = asyncio.create_task(server.stop(60.0))
            await asyncio.sleep(0.05)
            answer = await open_session(http, server)
            assert answer["status"] == 503 and "stopping" in answer["error"]
            async with http.get(f"{server.url}/healthz") as health:
                assert health.status == 503 and (await health.json())["status"] == "stopping"
            assert (await finishing)[-1] == {"type": "bye", "reason": "the session has ended"}
            assert not stopping.done()
            stopping.cancel()  # as a second Ctrl-C does
            ended = asyncio.create_task(server.stop(0.0))
            assert (await until(endless, "error"))["code"] == "stopping"
            await ended

    asyncio.run(scenario())


class Pipe:
    """A channel without a network: what the other side of any other transport would be."""

    def __init__(self) -> None:
        self.incoming: asyncio.Queue[bytes | str | None] = asyncio.Queue()
        self.sent: list[bytes | str] = []
        self.closed = False

    async def receive(self) -> bytes | str:
        received = await self.incoming.get()
        if received is None:
            raise ChannelClosed
        return received

    async def send_bytes(self, data: bytes) -> None:
        self.sent.append(data)

    async def send_text(self, text: str) -> None:
        self.sent.append(text)

    async def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("vanishes", [False, True])
def test_any_transport_will_do(head: TalkingHead, vanishes: bool) -> None:
    async def scenario() -> None:
        async with serving(head, 1) as server:
            pipe = Pipe()
            for said_first in (
                message("hello", version=1),
                pack_speech(0, 0, tone(0.2)),
                message("end"),
            ):
                pipe.incoming.put_nowait(said_first)
            if vanishes:
                pipe.incoming.put_nowait(None)
            second = Pipe()
            async with asyncio.timeout(20):
                first = asyncio.create_task(run_session(pipe, server.service))
                await asyncio.sleep(0)
                assert await run_session(second, server.service) == "full"
                assert await first == ("gone" if vanishes else "ended")
            assert pipe.closed and second.closed
            assert [json.loads(text)["type"] for text in second.sent] == ["error", "bye"]
            if not vanishes:
                assert (
                    json.loads(pipe.sent[0])["type"] == "hello"
                    and json.loads(pipe.sent[-1])["type"] == "bye"
                )
                sounds = [
                    each[16:] for each in pipe.sent if isinstance(each, bytes) and each[0] == SOUND
                ]
                heard = np.frombuffer(b"".join(sounds), "<i2")
                np.testing.assert_array_equal(heard[heard != 0], tone(0.2)[tone(0.2) != 0])
            assert server.service.pool.num_free == 1

    asyncio.run(scenario())
