"""Files of strangers: what is good comes through, what is not is told in a line, and nothing runs
away.
"""

from __future__ import annotations

import asyncio
import io
import json
import wave
import zlib
from collections.abc import Callable

import aiohttp
import numpy as np
import pytest
from live import serving, short_head
from PIL import Image
from stills import face_png

from rest_lightning.avatar import AvatarPool
from rest_lightning.errors import UserError
from rest_lightning.media.portrait import find_portrait
from rest_lightning.serve.limits import Limits
from rest_lightning.serve.server import LiveServer, ServerOptions
from rest_lightning.serve.uploads import Portraits, Uploads


def png(width: int, height: int, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    if mode == "RGB":
        y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
        Image.fromarray(np.stack([255 * x, 255 * y, 90 + 0 * x], axis=-1).astype(np.uint8)).save(
            file, "PNG"
        )
    else:
        Image.new(mode, (width, height)).save(file, "PNG")
    return file.getvalue()


def claiming(data: bytes, side_px: int) -> bytes:
    """A PNG whose header says that it is larger."""
    header = b"IHDR" + side_px.to_bytes(4, "big") * 2 + data[24:29]
    return data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:]


def wav(samples: np.ndarray, rate_hz: int = 16_000) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(samples.dtype.itemsize)
        out.setframerate(rate_hz)
        out.writeframes(samples.tobytes())
    return file.getvalue()


def float_wav(samples: np.ndarray) -> bytes:
    """IEEE floats, which the standard library does not write."""
    data = samples.astype("<f4").tobytes()
    form = (
        b"fmt "
        + (16).to_bytes(4, "little")
        + bytes.fromhex("0300 0100 803e0000 00fa0000 0400 2000")
    )
    body = b"WAVE" + form + b"data" + len(data).to_bytes(4, "little") + data
    return b"RIFF" + len(body).to_bytes(4, "little") + body


SAMPLES = (8000 * np.sin(np.arange(8000) / 7)).astype(np.int16)
BAD = np.where(np.arange(1600) == 700, np.nan, 0.1)
LONG = np.full(8000 * 301, 128, np.uint8)


def test_a_portrait_comes_back_as_the_head_in_it() -> None:
    data = face_png(400, 300)
    decoded = asyncio.run(Uploads().portrait(data, 48))
    with Image.open(io.BytesIO(data)) as image, Image.open(io.BytesIO(decoded)) as shown:
        np.testing.assert_array_equal(np.asarray(shown), find_portrait(image).square(48))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "make", "told"),
    [
        ("portrait", lambda: claiming(png(40, 40), 30_000), "at most 100 megapixels"),
        ("portrait", lambda: png(9000, 40, "L"), "at most 8192 x 8192 pixels, got 9000 x 40"),
        ("portrait", lambda: png(90, 70)[: len(png(90, 70)) // 2], "truncated or damaged"),
        ("portrait", lambda: png(20, 20), "at least 32x32 pixels"),
        ("portrait", lambda: png(90, 70), "expected the face of a person in the file, found none"),
        ("portrait", lambda: face_png(50, 50), "a face of at least 40 pixels in the file"),
        ("portrait", lambda: b"<svg/>", "not one that can be read"),
        ("sound", lambda: b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n", "expected a sound file"),
        ("sound", lambda: b"RIFF" + bytes(300), "cannot be read"),
        ("sound", lambda: float_wav(BAD), "NaN or infinite samples at sample 700"),
        ("sound", lambda: wav(LONG, 8000), "at most 300 s of sound, got more"),
        ("sound", lambda: wav(SAMPLES[:0]), "no samples"),
    ],
)
def test_a_bad_file_is_told_without_a_path(kind: str, make: Callable[[], bytes], told: str) -> None:
    uploads = Uploads()
    with pytest.raises(UserError, match=told) as caught:
        asyncio.run(uploads.portrait(make(), 64) if kind == "portrait" else uploads.sound(make()))
    assert (
        "\n" not in str(caught.value)
        and "/tmp" not in str(caught.value)
        and "upload" not in str(caught.value)
    )


def test_a_decoder_that_takes_too_long_is_killed() -> None:
    async def scenario() -> None:
        before = set(asyncio.all_tasks())
        with pytest.raises(UserError, match=r"decoded within 0.05 s"):
            await Uploads(timeout_s=0.05).portrait(png(90, 70), 64)
        assert set(asyncio.all_tasks()) == before

    asyncio.run(scenario())


def form(data: bytes, name: str = "file") -> aiohttp.FormData:
    made = aiohttp.FormData()
    made.add_field(name, data, filename="x", content_type="application/octet-stream")
    return made


@pytest.mark.slow
def test_uploads_over_http() -> None:
    """A dropped portrait is known to who dropped it alone; sound comes back as samples; everything
    has its limit.
    """

    async def scenario() -> None:
        async with serving(short_head(), 1, upload_bytes=50_000) as server:
            headers = {"Origin": server.url}
            async with aiohttp.ClientSession(headers=headers) as http:
                async with http.post(
                    f"{server.url}/api/portraits", data=form(face_png())
                ) as answer:
                    assert answer.status == 200
                    name = (await answer.json())["id"]
                async with http.get(f"{server.url}/api/portraits/{name}.png") as answer:
                    shown = await answer.read()
                    assert Image.open(io.BytesIO(shown)).size == (256, 256)
                async with http.get(f"{server.url}/api/portraits") as answer:
                    listed = await answer.json()
                assert name not in json.dumps(listed) and {"ada", "hugo"} == {
                    each["id"] for each in listed
                }
                async with http.post(f"{server.url}/api/speech", data=form(wav(SAMPLES))) as answer:
                    assert answer.content_type == "application/octet-stream"
                    np.testing.assert_allclose(
                        np.frombuffer(await answer.read(), "<i2"), SAMPLES, atol=1
                    )
                for data, told in (
                    (form(bytes(50_001)), "at most 0.05 MB"),
                    (form(bytes(300_000)), "at most 0.05 MB"),
                    (form(b""), "got none or an empty one"),
                    (b"raw", "expected a form with one file"),
                ):
                    async with http.post(f"{server.url}/api/portraits", data=data) as answer:
                        assert answer.status == 400 and told in (await answer.json())["error"]
                broken = {"Content-Type": "multipart/form-data; boundary=x"}
                async with http.post(
                    f"{server.url}/api/speech", data=b"--y\r\n", headers=broken
                ) as answer:
                    assert answer.status == 400 and "\n" not in (await answer.json())["error"]
                async with http.get(
                    f"{server.url}/api/portraits/..%2F..%2Fetc%2Fpasswd.png"
                ) as answer:
                    assert answer.status == 404 and "passwd" not in await answer.text()
                async with http.get(f"{server.url}/nothing") as answer:
                    assert answer.status == 404 and await answer.json() == {"error": "not found"}
                async with http.get(f"{server.url}/") as answer:
                    policy = answer.headers["Content-Security-Policy"]
                    assert policy.startswith("default-src 'self';") and "*" not in policy
            async with (
                aiohttp.ClientSession() as stranger,
                stranger.post(f"{server.url}/api/portraits", data=form(face_png())) as answer,
            ):
                assert answer.status == 403

    asyncio.run(scenario())


def test_portraits_are_forgotten() -> None:
    portraits = Portraits(max_uploaded=2, keep_s=100.0)
    names = [portraits.add(png(40, 40)) for _ in range(2)]
    portraits.png(names[0])  # used after the second
    portraits.add(png(40, 40))
    with pytest.raises(UserError, match="unknown or was forgotten"):
        portraits.png(names[1])
    assert portraits.load(names[0], 32).shape == (3, 32, 32)
    forgetful = Portraits(keep_s=-1.0)
    with pytest.raises(UserError, match="drop it again"):
        forgetful.png(forgetful.add(png(40, 40)))


def test_what_cannot_be_listened_on_is_told(tmp_path_factory: pytest.TempPathFactory) -> None:
    cert = tmp_path_factory.mktemp("tls") / "cert.pem"
    cert.write_text("no certificate")
    with pytest.raises(UserError, match="--cert and --key together"):
        ServerOptions(cert=cert).tls()
    with pytest.raises(UserError, match="certificate and its key in PEM files"):
        ServerOptions(cert=cert, key=cert).tls()
    pool = AvatarPool(short_head(), 1)

    async def scenario() -> None:
        async with LiveServer(pool, ServerOptions(port=0), Limits()) as server:
            port = int(server.url.rpartition(":")[2])
            with pytest.raises(
                UserError,
                match=f"expected to listen on 127.0.0.1:{port}, got .*in use.*try another",
            ):
                await LiveServer(pool, ServerOptions(port=port), Limits()).start()

    asyncio.run(scenario())
