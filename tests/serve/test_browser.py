"""The page in a real browser: a fake microphone speaks beeps, and a model writes frame number and
beep into its pixels.

Bounds on times are those of a busy machine; `python -m benchmarks.live` measures them on a quiet
one.
"""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import ImageEnhance
from stills import face

pytest.importorskip("aiohttp", reason="aiohttp (extra `serve`) serves the page")
pytest.importorskip("playwright", reason="playwright (extra `test`) drives the browser")
ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # benchmarks/ is not part of the package

browser_module: ModuleType = importlib.import_module("benchmarks._browser")
if browser_module.find_chromium() is None:
    pytest.skip("no Chromium on this machine: apt-get install chromium", allow_module_level=True)

from rest_lightning.constants import FPS, SAMPLE_RATE  # noqa: E402
from rest_lightning.serve.limits import Limits  # noqa: E402
from rest_lightning.serve.protocol import IDLE, KEYFRAME, SOUND, pack, parse_speech  # noqa: E402

CHUNK_FRAMES = 24
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    live_server = importlib.import_module("benchmarks._live_server")
    marked = importlib.import_module("benchmarks._marked_model")
    with live_server.serving(
        marked.MarkedModel(64, chunk_s=0.05), Limits(max_sessions=2)
    ) as server:
        yield server


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    wav = browser_module.write_wav(
        tmp_path_factory.mktemp("microphone") / "beeps.wav", browser_module.beeps(19.0)
    )
    with browser_module.browser(wav) as launched:
        yield launched


@pytest.fixture
def open_page(server: Any, chromium: Any) -> Iterator[Open]:
    pages: list[Any] = []

    def opened(**options: Any) -> Any:
        pages.append(browser_module.LivePage(chromium, server.url, **options))
        return pages[-1]

    yield opened
    for page in pages:
        page.close()


@pytest.fixture(scope="module")
def still_page(server: Any, chromium: Any) -> Any:
    """A page without a session, for what changes nothing."""
    return browser_module.LivePage(chromium, server.url)


def with_module(page: Any, name: str, body: str, argument: Any = None) -> Any:
    """The value of ``body``, in which ``all`` is a module of the page."""
    return page.page.evaluate(
        (f"async (given) => {{ const all = await import('/page/{name}'); {body} }}"), argument
    )


# -- without a session -----------------------------------------------------------------------------


def test_page_is_whole_offline_and_fits_narrow_screens(still_page: Any, server: Any) -> None:
    page = still_page
    assert page.problems == []  # nothing that the content policy refused, no script error
    assert len(page.requests) > 10
    assert {url for url in page.requests if not url.startswith(f"{server.url}/")} == set()
    for width in (320, 390, 768, 1280):
        page.page.set_viewport_size({"width": width, "height": 844})
        assert page.page.evaluate("document.documentElement.scrollWidth") <= width
    nameless = """[...document.querySelectorAll('button, input, canvas')].filter(
        (el) => !(el.innerText?.trim() || el.ariaLabel || el.labels?.[0]?.innerText.trim())
    ).map((el) => el.outerHTML)"""
    assert page.page.evaluate(nameless) == []
    assert "Synthetic." in page.page.inner_text("figcaption")


def test_messages_are_those_of_the_server(still_page: Any) -> None:
    page = still_page
    samples = [0, 1, -1, 32767, -32768, 258]
    packed = with_module(
        page,
        "protocol.js",
        ("return [...new Uint8Array(all.packSpeech(3, 70000, Int16Array.from(given)))]"),
        samples,
    )
    speech = parse_speech(bytes(packed))
    assert (speech.epoch, speech.index, speech.samples.tolist()) == (3, 70000, samples)
    sent = pack(
        SOUND, IDLE | KEYFRAME, 2**32 - 2, 90000, 3, np.array([-32768, 0, 16384], "<i2").tobytes()
    )
    body = """const { data, ...rest } = all.unpack(Uint8Array.from(given).buffer);
        return { ...rest, floats: [...all.toFloats(data)] };"""
    assert with_module(page, "protocol.js", body, list(sent)) == {
        "type": SOUND,
        "isKey": True,
        "isIdle": True,
        "epoch": 2**32 - 2,
        "index": 90000,
        "count": 3,
        "floats": [-1, 0, 0.5],
    }
    assert with_module(page, "protocol.js", "return all.unpack(new ArrayBuffer(15))") is None


RATES = [(48_000, 16_000), (44_100, 16_000), (16_000, 48_000), (16_000, 44_100)]


@pytest.mark.parametrize(("from_hz", "to_hz"), RATES)
def test_resampler_keeps_tones_in_place_and_removes_what_does_not_fit(
    still_page: Any, from_hz: int, to_hz: int
) -> None:
    page = still_page
    body = """const [from, to, tone, cuts] = given, one = new all.Resampler(from, to);
        const wave = (_, i) => Math.sin((2 * Math.PI * tone * i) / from);
        const input = Float32Array.from({ length: from / 2 }, wave);
        const parts = [];
        for (let at = 0, k = 0; at < input.length; k++) {
            const count = cuts[k % cuts.length];
            parts.push(...one.push(input.subarray(at, at + count)));
            at += count;
        }
        return parts;"""
    found = {
        (tone, len(cuts)): np.array(
            with_module(page, "resample.js", body, [from_hz, to_hz, tone, cuts])
        )
        for tone, cuts in ((1000, [128]), (1000, [1, 999, 7]), (6000, [128]), (11_000, [128]))
    }
    np.testing.assert_array_equal(found[1000, 1], found[1000, 3])  # however the stream is cut
    assert abs(len(found[1000, 1]) - to_hz / 2) < 0.005 * to_hz
    for tone in (1000, 6000):
        time_s = np.arange(len(found[tone, 1])) / to_hz
        middle = slice(to_hz // 50, None)  # the filter begins in silence
        np.testing.assert_allclose(
            found[tone, 1][middle], np.sin(2 * np.pi * tone * time_s)[middle], atol=2e-3
        )
    if from_hz > to_hz:  # 11 kHz would come back as 5 kHz
        assert np.abs(found[11_000, 1][to_hz // 50 :]).max() < 1e-3


def test_timeline_rebases_once_and_tells_what_may_be_won_back(still_page: Any) -> None:
    body = """const line = new all.Timeline(0.08);
        const chunk = (k) => ({ index: 24 * k, count: 24, epoch: 0, isIdle: false });
        const starts = given.map((now, k) => line.place(chunk(k), now)?.start);
        const at = (time) => line.frameAt(time)?.index ?? null;
        const { numUnderruns, cushion } = line, spare = line.takeSpare();
        return { starts, numUnderruns, cushion, spare, again: line.takeSpare(), last: line.end,
                 frames: [at(starts[0] - 0.001), at(starts[1] + 0.041),
                          at(starts[2] - 0.001), at(line.end + 9)] };"""
    page = still_page
    chunk_s = CHUNK_FRAMES / FPS
    calm = with_module(page, "timeline.js", body, [1 + chunk_s * k for k in range(5)])
    assert calm["starts"] == pytest.approx([1.08 + chunk_s * k for k in range(5)])
    assert (calm["numUnderruns"], calm["spare"], calm["cushion"]) == (0, 0, 0.08)
    assert calm["frames"] == [None, 25, 47, 119]
    # The third chunk is 0.5 s late; from then on all come in time again, 0.5 s earlier than they
    # are needed.
    late = with_module(page, "timeline.js", body, [1, 1.96, 3.42, 3.88, 4.84, 5.8, 6.76])
    assert late["numUnderruns"] == 1
    assert late["cushion"] == pytest.approx(0.18)
    assert np.diff(late["starts"][2:]) == pytest.approx(chunk_s)
    assert late["starts"][2] == pytest.approx(3.42 + 0.18)
    assert late["spare"] == pytest.approx(3.6 + chunk_s - 3.88 - 0.18)
    assert late["again"] == 0


# -- sessions --------------------------------------------------------------------------------------


def check_pictures(frames: list[dict[str, Any]]) -> None:
    """In order, none twice, and the pixels say what the protocol says."""
    numbers = [frame["index"] for frame in frames]
    assert (np.diff(numbers) > 0).all()
    assert all(frame["marks"] is not None for frame in frames)
    assert [frame["marks"]["number"] for frame in frames] == numbers


def expect_pace(figures: dict[str, Any]) -> None:
    """What comes after this are bounds on times: they say nothing where the browser gets no
    processor.
    """
    if (figures["fps"] or 0) < 20:
        pytest.skip(
            "this machine is too busy to show 25 frames a second (it shows "
            f"{figures['fps'] or 0:.1f})"
        )


class Beep(NamedTuple):
    """A beep that was seen and heard: picture after sound, the same by the player's account,
    microphone to picture.
    """

    offset_ms: float
    late_ms: float
    latency_s: float


def beeps_seen(measured: dict[str, Any]) -> list[Beep]:
    """In their order."""
    found = []
    for frame in measured["frames"]:
        if (onset := frame["marks"]["onset"]) is None:
            continue
        # When the 40 ms of sound that the frame belongs to began to be heard, if this is its beep.
        near = [heard["leaves"] - 1000 * onset / SAMPLE_RATE for heard in measured["heard"]]
        nearest = min(near, key=lambda each: abs(frame["drawn"] - each), default=None)
        if nearest is None or abs(frame["drawn"] - nearest) > 500:
            continue
        spoken = [
            frame["time"] - said["time"]
            for said in measured["spoken"]
            if 0.5 < frame["time"] - said["time"] < 6
        ]
        found.append(Beep(frame["drawn"] - nearest, frame["late"], min(spoken, default=np.nan)))
    return found


def test_session_keeps_sound_and_picture_together(open_page: Open) -> None:
    page = open_page()
    page.speak()
    for _ in range(30):
        page.wait(0.5)
        measured = page.measured()
        if beeps := beeps_seen(measured):
            break
    frames, figures = measured["frames"], measured["figures"]
    check_pictures(frames)
    assert len(frames) > 20
    assert any(not frame["isIdle"] for frame in frames)
    # The server's account and the pixels agree on where a beep is; two samples: the microphone's
    # path is not bit-exact.
    said = {beep["index"]: beep["onset"] for beep in measured["sent"]}
    seen = {
        frame["index"]: frame["marks"]["onset"]
        for frame in frames
        if frame["marks"]["onset"] is not None
    }
    assert seen
    assert all(abs(onset - said[index]) <= 12 for index, onset in seen.items())
    assert beeps
    assert page.page.inner_text("#state") == "Listening"
    assert page.problems == []
    assert min(frame["late"] for frame in frames) > -1  # never before its sound
    expect_pace(figures)
    # A frame is drawn as late after its own sound as the player says.
    assert [beep.offset_ms for beep in beeps] == pytest.approx(
        [beep.late_ms for beep in beeps], abs=25
    )
    assert all(beep.offset_ms <= 100 for beep in beeps)
    latencies = [frame["latency"] for frame in frames if frame["latency"] is not None]
    # What the panel shows is what the beep itself took, within a frame, and what the machine adds
    # to a chunk.
    assert np.median(latencies) == pytest.approx(
        np.nanmedian([beep.latency_s for beep in beeps]), abs=0.1
    )
    assert 0.96 < np.median(latencies) < 3
    assert figures["latencyMs"] / 1000 == pytest.approx(np.median(latencies), abs=0.5)


@pytest.mark.slow
def test_interruption_silences_at_once_and_begins_anew(open_page: Open, tmp_path: Path) -> None:
    tone = np.round(
        16_000 * np.sin(2 * np.pi * 440 * np.arange(20 * SAMPLE_RATE) / SAMPLE_RATE)
    ).astype(np.int16)
    page = open_page()
    page.page.set_input_files("#speech", browser_module.write_wav(tmp_path / "tone.wav", tone))
    page.watch()
    page.until("document.getElementById('message').textContent.startsWith('Speaking')", "the file")
    page.wait(2.5)
    assert page.message == "Speaking tone.wav (20 s)."
    result = page.interrupt()
    page.wait(2)
    measured = page.measured()
    epochs = [frame["epoch"] for frame in measured["frames"]]
    assert epochs == sorted(epochs)
    assert {0, 1} == set(epochs)
    # the file was forgotten
    assert all(frame["isIdle"] for frame in measured["frames"] if frame["epoch"] == 1)
    assert page.page.inner_text("#state") == "Idle"
    assert result["fresh"] is not None
    expect_pace(measured["figures"])
    assert result["wasLoud"]
    assert result["silent"] <= 150
    assert result["gone"] <= 500


@pytest.mark.slow
def test_identity_changes_without_a_restart(open_page: Open) -> None:
    page = open_page()
    page.speak()
    page.wait(1)
    image = io.BytesIO()
    ImageEnhance.Brightness(face(256, 256)).enhance(0.2).save(image, "PNG")
    page.page.set_input_files(
        "#image", {"name": "dark.png", "mimeType": "image/png", "buffer": image.getvalue()}
    )
    page.until("probe.readMarks()?.bright === false", "the new portrait")
    measured = page.measured()
    check_pictures(measured["frames"])
    bright = [frame["marks"]["bright"] for frame in measured["frames"]]
    assert bright[0]
    assert not bright[-1]
    assert bright == sorted(bright, reverse=True)  # it changed once
    changed = measured["frames"][bright.index(False)]["index"]
    # at a chunk's border
    assert changed - changed % CHUNK_FRAMES <= changed <= changed - changed % CHUNK_FRAMES + 12
    assert page.page.get_attribute(".portrait input:checked", "aria-label") == "dark.png"


@pytest.mark.slow
def test_jpeg_where_there_is_no_video_decoder(open_page: Open) -> None:
    page = open_page(scripts=("delete globalThis.VideoDecoder",))
    page.speak()
    page.wait(3)
    frames = page.measured()["frames"]
    check_pictures(frames)
    assert len(frames) > 30
    hello = "import('/page/app.js').then(({ app }) => app.session.hello.codec)"
    assert page.page.evaluate(hello) == "jpeg"


@pytest.mark.slow
def test_recording_is_a_video_that_says_that_it_is_synthetic(
    open_page: Open, tmp_path: Path
) -> None:
    import av

    marked = importlib.import_module("benchmarks._marked_model")
    page = open_page()
    page.speak()
    page.wait(1.2)
    page.page.click("#record")
    page.wait(4)
    figures = page.measured()["figures"]
    with page.page.expect_download() as download:
        page.page.click("#record")
    file = tmp_path / download.value.suggested_filename
    download.value.save_as(file)
    assert file.suffix == ".mp4"
    assert page.message == f"Saved {file.name}."
    with av.open(str(file)) as video:
        assert "ynthetic" in video.metadata["comment"]
        pictures = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    with av.open(str(file)) as video:
        sound = np.concatenate([frame.to_ndarray().mean(axis=0) for frame in video.decode(audio=0)])
        rate = video.streams.audio[0].rate
    numbers = [said["number"] for said in map(marked.read, pictures) if said is not None]
    assert len(set(numbers)) > 5
    assert numbers == sorted(numbers)
    expect_pace(figures)
    assert len(set(numbers)) > 40
    assert 3 < len(sound) / rate < 7
    assert np.abs(sound).max() > 0.1  # at least one beep in four seconds


@pytest.mark.slow
def test_a_server_with_a_certificate_records_and_signs(chromium: Any, tmp_path: Path) -> None:
    """The page fetches what the user ends, and what the server ends, and tells of a loss."""
    pytest.importorskip("c2pa", reason="c2pa-python (extra `provenance`) signs manifests")
    import av

    provenance = importlib.import_module("rest_lightning.media.provenance")
    live_server = importlib.import_module("benchmarks._live_server")
    marked = importlib.import_module("benchmarks._marked_model")
    files = importlib.import_module("certificates").make_files(tmp_path / "signer")
    signer = provenance.load_signer(files.certificate, files.key)
    limits = Limits(max_sessions=1, record_s=3.0)
    with live_server.serving(marked.MarkedModel(64, chunk_s=0.05), limits, signer) as server:
        page = browser_module.LivePage(chromium, server.url)
        page.speak()
        chunks = "import('/page/app.js').then(({ app }) => app.session.chunks.length)"
        for ends in ("by the user", "by the server"):
            with page.page.expect_download() as download:
                num_chunks = page.page.evaluate(chunks)
                page.page.click("#record")
                if ends == "by the user":
                    page.until(f"{chunks}.then((count) => count >= {num_chunks + 3})", "chunks")
                    page.page.click("#record")
            file = tmp_path / download.value.suggested_filename
            download.value.save_as(file)
            why = (
                "." if ends == "by the user" else ": a recording lasts 0.05 minutes: record again."
            )
            assert page.message == f"Saved {file.name}{why}"
            assert page.page.inner_text("#record-label") == "Record"
            assert provenance.read_provenance(file).is_intact
            with av.open(str(file)) as video:
                pictures = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
            numbers = [said["number"] for said in map(marked.read, pictures) if said is not None]
            assert len(numbers) == len(pictures) > 20
            assert (np.diff(numbers) == 1).all()
        page.page.click("#record")
        page.wait(0.5)
        for session in list(server.sessions):
            session.stop("stopping", "the server is stopping")
        page.until("document.getElementById('message').textContent.includes('has gone')", "the end")
        assert page.message == "the server is stopping. The recording has gone with the session."
        assert page.problems == []
        page.close()


@pytest.mark.slow
def test_full_server_mute_and_keyboard(open_page: Open, server: Any) -> None:
    pages = [open_page() for _ in range(3)]
    for page in pages[:2]:
        page.page.focus("#speak")
        page.page.keyboard.press("Enter")
        page.watch()
    pages[2].page.click("#speak")
    pages[2].page.wait_for_selector("#message[data-kind=error]")
    assert "full" in pages[2].message
    assert pages[2].page.inner_text("#state") == "Ready"
    first = pages[0]
    first.page.click("#mute")
    assert first.page.get_attribute("#mute", "aria-pressed") == "true"
    first.wait(0.3)
    volume = "import('/page/app.js').then(({ app }) => app.session.player.volume.gain.value)"
    assert first.page.evaluate(volume) < 1e-3
    first.page.keyboard.press("Escape")
    assert first.message == "Interrupted."
    first.page.click("#end")
    assert first.message == "The session has ended."
    # The place is free again, and the page that was refused takes it.
    for _ in range(50):
        if server.admission.num_active < 2:
            break
        pages[2].wait(0.1)
    pages[2].page.click("#speak")
    pages[2].watch()
    assert pages[2].page.inner_text("#state") == "Listening"


@pytest.mark.slow
def test_a_lost_connection_is_told_and_taken_up_again(open_page: Open) -> None:
    page = open_page()
    page.speak()
    # As when a device wakes up: the socket is gone, and nobody said goodbye.
    page.page.evaluate(
        "import('/page/app.js').then(({ app }) => app.session.connection.socket.close(4000))"
    )
    page.until(
        ("document.getElementById('message').textContent.startsWith('Connected again')"),
        "a new session",
    )
    page.watch()
    page.wait(1.5)
    check_pictures(page.measured()["frames"])
