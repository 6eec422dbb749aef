"""Signed recordings: the server writes down what it sends, and gives it to its session once."""

from __future__ import annotations

import asyncio
import io
import logging
import resource
import tempfile
import time
from pathlib import Path

import aiohttp
import av
import numpy as np
import pytest
from live import cut, pictures_of, serving, short_head, sound_of, tone, until
from PIL import Image

pytest.importorskip("c2pa", reason="c2pa-python (extra `provenance`) signs and reads manifests")

from certificates import Files, make_files

from rest_lightning.cli import main
from rest_lightning.errors import UserError
from rest_lightning.media.provenance import Signer, load_signer, read_provenance
from rest_lightning.serve.client import LiveClient, Received, Sound
from rest_lightning.serve.recording import RATE_HZ, Recording, try_signer
from rest_lightning.talking_head import TalkingHead


@pytest.fixture(scope="module")
def head() -> TalkingHead:
    return short_head()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_files(tmp_path_factory.mktemp("signer") / "good")


@pytest.fixture
def signer(files: Files) -> Signer:
    return load_signer(files.certificate, files.key)


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a server puts its recordings."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


async def pictures(client: LiveClient, count: int) -> list[Received]:
    """What comes up to so many pictures."""
    received: list[Received] = []
    async with asyncio.timeout(20):
        while len(pictures_of(received)) < count:
            each = await client.receive()
            assert each is not None, received[-2:]
            received.append(each)
    return received


async def recorded(client: LiveClient) -> tuple[dict[str, object], list[Received]]:
    """The next `recorded`, and what comes before it."""
    received: list[Received] = []
    async with asyncio.timeout(20):
        while (each := await client.receive()) is not None:
            if isinstance(each, dict) and each["type"] == "recorded":
                return each, received
            received.append(each)
    raise AssertionError("the session ended before the recording")


def test_what_was_sent_comes_back_signed(
    head: TalkingHead,
    signer: Signer,
    temporary: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two recordings in a session, each fetched once, by its session's token alone."""
    out = tmp_path / "out.mp4"

    async def scenario() -> tuple[dict[str, object], list[Received]]:
        async with (
            serving(head, 2, signer=signer) as server,
            LiveClient(server.url, codecs=("jpeg",)) as client,
            LiveClient(server.url) as other,
        ):
            assert client.hello["limits"]["record_s"] == 600
            await client.record()
            for block in cut(tone(1.0), 320):
                await client.send(block)
            received = await pictures(client, 50)
            await client.record(False)
            told, more = await recorded(client)
            await other.record()
            await until(other, "recording")
            await until(other, "chunk")
            await other.record(False)
            other_told, _ = await recorded(other)
            assert len(list(temporary.iterdir())) == 2
            for url in (f"{other_told['url']}x", "api/recordings/stranger", "api/recordings/"):
                with pytest.raises(UserError, match="expected a recording of http"):
                    await client.download(url, tmp_path / "stolen.mp4")
            await client.download(str(told["url"]), out)
            with pytest.raises(UserError, match="fetched already, or its session has ended"):
                await client.download(str(told["url"]), tmp_path / "again.mp4")
            assert len(list(temporary.iterdir())) == 1, "one of the two was fetched"
            left = f"{server.url}/{other_told['url']}"
            await other.socket.close()
            while server.admission.num_active > 1:
                await asyncio.sleep(0.01)
            assert not list(temporary.iterdir()), "the other went with its session"
            async with aiohttp.ClientSession() as http, http.get(left) as answer:
                assert answer.status == 403
            return told, [*received, *more]

    told, received = asyncio.run(scenario())
    assert main(["verify", str(out)]) == 0
    assert "signature  intact" in capsys.readouterr().out
    found = read_provenance(out)
    assert found.is_marked
    assert found.actions == [{"action": "c2pa.created", "source": "trainedAlgorithmicMedia"}]
    assert found.manifest is not None
    assert found.manifest["title"] == told["name"]
    sent = {each.index: each for each in pictures_of(received)}
    first, count = int(str(told["frame"])), int(str(told["frames"]))
    assert told["why"] is None
    assert count > 25
    with av.open(str(out)) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == count
    shown = [
        np.asarray(Image.open(io.BytesIO(sent[index].data)))
        for index in range(first, first + count)
    ]
    near = np.abs(np.stack(frames).astype(int) - np.stack(shown))
    far = np.abs(np.stack(frames).astype(int) - np.stack(shown)[::-1])
    assert near.mean() < 0.6 * far.mean(), "every picture is the one that was sent"
    with av.open(str(out)) as video:
        pieces = [frame.to_ndarray()[0] for frame in video.decode(audio=0)]
        assert video.streams.audio[0].rate == RATE_HZ
    heard = np.concatenate(pieces)[:: RATE_HZ // 16_000]
    assert len(heard) == pytest.approx(count * 640, abs=1024)
    start = 640 * (first - next(each.index for each in received if isinstance(each, Sound)))
    said = sound_of(received)[start:][: count * 640] / 32768
    assert np.abs(said).max() > 0.2
    assert np.corrcoef(heard[: len(said)], said)[0, 1] > 0.98, "the sound is that of the pictures"


def test_an_agents_sound_stays_with_its_pictures(
    head: TalkingHead, signer: Signer, tmp_path: Path
) -> None:
    """Stereo at 44.1 kHz behind silence at 16 kHz, and an interruption in it."""
    out = tmp_path / "out.mp4"
    loud = np.stack([tone(3.0)[:44_100]] * 2, axis=1)

    async def scenario() -> tuple[dict[str, object], list[Received]]:
        async with (
            serving(head, 1, signer=signer) as server,
            LiveClient(server.url, live=False) as client,
        ):
            await client.record()
            await client.send_format(44_100, 2)
            received = await pictures(client, 10)
            for block in cut(loud, 4410):
                await client.send(block)
            received += await pictures(client, 20)
            await client.interrupt()
            received.append(await until(client, "interrupted"))
            await until(client, "chunk")
            await client.record(False)
            told, _ = await recorded(client)
            await client.download(str(told["url"]), out)
            return told, received

    told, received = asyncio.run(scenario())
    first = int(str(told["frame"]))
    with av.open(str(out)) as video:
        assert sum(1 for _ in video.decode(video=0)) == told["frames"]
    with av.open(str(out)) as video:
        heard = np.abs(np.concatenate([frame.to_ndarray()[0] for frame in video.decode(audio=0)]))
    assert len(heard) == pytest.approx(int(str(told["frames"])) * RATE_HZ / 25, abs=2048)
    begins = [each.index for each in received if isinstance(each, Sound) and each.samples.any()]
    start = int(np.flatnonzero(heard > 0.1)[0]) / RATE_HZ
    assert start == pytest.approx((begins[0] - first) / 25, abs=0.03)


def test_a_recording_ends_by_itself_and_says_why(head: TalkingHead, signer: Signer) -> None:
    async def scenario() -> None:
        async with (
            serving(head, 1, signer=signer, record_s=0.4) as server,
            LiveClient(server.url) as client,
        ):
            await client.record()
            told, _ = await recorded(client)
            assert told["frames"] == 10
            assert str(told["why"]).startswith("a recording lasts")
            await client.record(False)  # on its way when the recording ended
            await until(client, "chunk")
            await client.record()
            await client.record()
            error = await until(client, "error")
            assert error["code"] == "recording"
            assert error["message"] == (
                "expected one recording at a time, got a second one: end the first"
            )

    asyncio.run(scenario())


def test_a_full_disk_ends_the_recording_and_not_the_session(
    head: TalkingHead, signer: Signer, temporary: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with serving(head, 1, signer=signer) as server, LiveClient(server.url) as client:
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # as a quota has it
            try:
                await client.record()
                error = await until(client, "error")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert error["code"] == "record"
            assert error["message"] == (
                "expected room for the recording, but the server's disk is full"
            )
            await until(client, "chunk")
            assert not list(temporary.iterdir())

    with caplog.at_level(logging.WARNING):
        asyncio.run(scenario())
    assert [each.message for each in caplog.records] == ["a recording failed"]


def test_a_slow_disk_ends_the_recording_and_never_waits(signer: Signer) -> None:
    recording = Recording(signer, 256, longest_s=600)
    recording.open()
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    took_s, why = [], None
    while why is None:  # faster than any encoder
        start_s = time.perf_counter()
        why = recording.add(noise, np.zeros(640, np.int16), 16_000)
        took_s.append(time.perf_counter() - start_s)
    assert why == "the server is too busy to record on: what came before is kept"
    assert np.median(took_s) < 0.01
    recording.finish()
    with recording.hand_over() as file, av.open(file) as video:
        num_frames = len(list(video.decode(video=0)))
    assert num_frames == recording.num_frames > 100


@pytest.mark.parametrize("end", ["while it begins", "while it records", "while it is signed"])
def test_a_client_that_leaves_takes_its_recording_along(
    head: TalkingHead, signer: Signer, temporary: Path, end: str
) -> None:
    async def scenario() -> None:
        async with serving(head, 1, signer=signer) as server, LiveClient(server.url) as client:
            await client.record()
            if end != "while it begins":
                await until(client, "recording")
                assert len(list(temporary.iterdir())) == 1
            if end == "while it is signed":
                await until(client, "chunk")
                await client.record(False)

    asyncio.run(scenario())
    assert not list(temporary.iterdir())


def test_a_server_without_a_certificate_leaves_it_to_the_browser(head: TalkingHead) -> None:
    async def scenario() -> None:
        async with serving(head, 1) as server, LiveClient(server.url) as client:
            assert "record_s" not in client.hello["limits"]
            await client.record()
            error = await until(client, "error")
            assert error["message"] == (
                "expected a server that records (--sign), got one that does not"
            )
            where = f"{server.url}/api/recordings/x"
            async with aiohttp.ClientSession() as http, http.get(where) as answer:
                assert answer.status == 404

    asyncio.run(scenario())


def test_a_certificate_that_cannot_sign_is_told_before_the_model_loads(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = make_files(tmp_path / "wrong", for_signing=False)
    assert main(["serve", "--model", "missing", *wrong.words]) == 2
    assert "expected a certificate that may sign" in capsys.readouterr().err
    assert main(["serve", "--engine", "ray", *files.words]) == 2
    assert "expected --sign with --engine local, got ray" in capsys.readouterr().err
    try_signer(load_signer(files.certificate, files.key))
