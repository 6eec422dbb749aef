"""The Python client: a recording with sound and provenance; TLS; a source that fails; a server that
refuses.
"""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import av
import numpy as np
import pytest
from live import cut, serving, short_head, tone

from rest_lightning.avatar import AvatarPool
from rest_lightning.errors import UserError
from rest_lightning.media.video import VideoFile
from rest_lightning.serve.client import LiveClient, record
from rest_lightning.serve.limits import Limits
from rest_lightning.serve.protocol import Pcm
from rest_lightning.serve.server import LiveServer, ServerOptions
from rest_lightning.talking_head import TalkingHead


@pytest.fixture(scope="module")
def head() -> TalkingHead:
    return short_head()


def test_a_recording_has_all_frames_the_sound_and_says_that_it_is_synthetic(
    head: TalkingHead, tmp_path: Path
) -> None:
    out = tmp_path / "out.mp4"

    async def scenario() -> None:
        async with serving(head, 1) as server:
            await record(server.url, cut(tone(0.7), 320), out)

    asyncio.run(scenario())
    with av.open(str(out)) as container:
        assert "trainedAlgorithmicMedia" in container.metadata["comment"]
        assert "Synthetic" in container.metadata["comment"]
        num_samples = sum(frame.samples for frame in container.decode(audio=0))
    with VideoFile(out) as video:
        num_frames = len(video.read())
    assert num_frames >= 0.7 * 25 and abs(num_samples / 16_000 - num_frames / 25) < 0.2


def test_a_source_that_fails_ends_the_stream(head: TalkingHead) -> None:
    def broken() -> Iterator[Pcm]:
        yield tone(0.1)
        raise OSError("the microphone was pulled out")

    async def scenario() -> None:
        async with serving(head, 1) as server, LiveClient(server.url) as client:
            with pytest.raises(OSError, match="pulled out"):
                [received async for received in client.stream(broken())]

    asyncio.run(scenario())


def test_a_refusal_is_one_line(head: TalkingHead) -> None:
    async def scenario() -> None:
        async with serving(head, 1) as server:
            with pytest.raises(UserError, match=r"expected a hello of .*id of a portrait"):
                await LiveClient(server.url, "nobody").__aenter__()

    asyncio.run(scenario())


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
def test_tls(head: TalkingHead, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*made, *names, "-keyout", key, "-out", cert], check=True, capture_output=True)

    async def scenario() -> None:
        pool = AvatarPool(head, 1)
        async with LiveServer(pool, ServerOptions(port=0, cert=cert, key=key), Limits()) as server:
            assert server.url.startswith("https://127.0.0.1:")
            trusted = ssl.create_default_context(cafile=cert)
            async with aiohttp.ClientSession() as http:
                headers = {"Origin": server.url}
                async with http.post(
                    f"{server.url}/api/session", headers=headers, ssl=trusted
                ) as answer:
                    assert answer.status == 200
                plain = {"Origin": server.url.replace("https", "http")}
                async with http.post(
                    f"{server.url}/api/session", headers=plain, ssl=trusted
                ) as answer:
                    assert answer.status == 403
        await pool.aclose()

    asyncio.run(scenario())


def test_samples_of_a_file_are_sent_as_they_are(head: TalkingHead) -> None:
    """Blocks of any size, one sample and a second among them, arrive as one stream."""
    speech = tone(1.2)
    sizes = [1, 5000, 320, 16_000]

    async def scenario() -> np.ndarray:
        blocks, start = [], 0
        for size in sizes:
            blocks.append(speech[start : start + size])
            start += size
        async with serving(head, 1) as server, LiveClient(server.url) as client:
            sounds = [
                each.samples async for each in client.stream(blocks) if hasattr(each, "samples")
            ]
        return np.concatenate(sounds)

    heard = asyncio.run(scenario())
    np.testing.assert_array_equal(heard[heard != 0], speech[speech != 0])
