"""`rest app` in a real browser: an example, a video that plays while it is made, its download, and
a mistake.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny_head import make_head

pytestmark = pytest.mark.slow
pytest.importorskip("gradio", reason="gradio (extra `app`) shows the page")
pytest.importorskip("playwright", reason="playwright (extra `test`) drives the browser")
ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # benchmarks/ is not part of the package

browser_module: ModuleType = importlib.import_module("benchmarks._browser")
if browser_module.find_chromium() is None:
    pytest.skip("no Chromium on this machine: apt-get install chromium", allow_module_level=True)

import uvicorn  # noqa: E402

from rest_lightning.errors import UserError  # noqa: E402
from rest_lightning.integrations.gradio import build, listen  # noqa: E402
from rest_lightning.media.audio import open_speech  # noqa: E402
from rest_lightning.media.video import VideoFile  # noqa: E402

PLAYED = "(() => { const v = document.querySelector('video'); return !!v && v.currentTime > 0 })()"
ENDED = "document.querySelector('video').ended"
RATE = "document.querySelector('video').playbackRate = 8"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with listen("127.0.0.1", 0) as listening:
        app = build(make_head(), max_s=60)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser_module.browser() as launched:
        yield launched


@pytest.fixture
def page(chromium: Any, url: str) -> Iterator[Any]:
    context = chromium.new_context(accept_downloads=True)
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    page.wait_for_selector("button:has-text('Talk')", timeout=60_000)
    yield page
    context.close()
    # a page that works without the network
    assert [one for one in asked if not one.startswith((url, "data:", "blob:"))] == []


def test_an_example_plays_to_its_end_and_is_downloaded(page: Any, tmp_path: Path) -> None:
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.click("table tbody tr >> nth=0")
    page.wait_for_selector("button[aria-label='Remove Image']", timeout=20_000)
    page.wait_for_selector("button[aria-label='Play']", timeout=20_000)
    page.click("button:has-text('Talk')")
    page.wait_for_function(PLAYED, timeout=60_000)
    page.evaluate(RATE)
    page.wait_for_function(ENDED, timeout=120_000)
    assert "367 of 367 frames" in page.inner_text("#report")
    assert problems == []
    with page.expect_download(timeout=20_000) as download:
        page.click("a[download='video-stream.mp4']")
    path = tmp_path / "video.mp4"
    download.value.save_as(path)
    assert VideoFile(path).num_frames == 367
    assert abs(open_speech(path).num_samples - 367 * 640) < 2 * 1024


def test_a_mistake_is_told_in_the_page(page: Any) -> None:
    page.click("button:has-text('Talk')")
    page.wait_for_selector("text=expected a portrait and speech, got no portrait", timeout=20_000)


def test_a_port_that_is_taken_is_told_in_one_line() -> None:
    with listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(UserError, match=rf"got 127.0.0.1:{port} .*choose another --port"):
            listen("127.0.0.1", port)
