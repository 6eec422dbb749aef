"""`rest converse --realtime echo` in a real browser, with a microphone from a file that interrupts
the answer.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from live import tone
from tiny_head import make_head

pytest.importorskip("aiohttp", reason="aiohttp (extra `converse`) serves the page")
pytest.importorskip("playwright", reason="playwright (extra `test`) drives the browser")
ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # benchmarks/ is not part of the package

browser_module: ModuleType = importlib.import_module("benchmarks._browser")
if browser_module.find_chromium() is None:
    pytest.skip("no Chromium on this machine: apt-get install chromium", allow_module_level=True)

from rest_lightning.avatar import AvatarPool  # noqa: E402
from rest_lightning.serve.converse import ConverseServer  # noqa: E402
from rest_lightning.serve.loopback import loopback_server  # noqa: E402
from rest_lightning.serve.realtime import RealtimeClient  # noqa: E402
from rest_lightning.serve.server import ServerOptions  # noqa: E402

STATE = """import('/page/app.js').then(({ app }) => {
    const session = app.session, last = session?.player.shown.at(-1);
    const numShown = session?.player.numShown;
    return session ? { epoch: session.epoch, isIdle: last?.isIdle, numShown } : null;
})"""


async def serve(started: Any, stop: asyncio.Event) -> None:
    async with loopback_server() as url, AvatarPool(make_head()) as pool:
        server = ConverseServer(pool, lambda: RealtimeClient(url), ServerOptions(port=0))
        async with server:
            started(server.url)
            await stop.wait()
        await server.aclose()


@pytest.mark.slow
def test_a_conversation_with_barge_in(tmp_path: Path) -> None:
    quiet = [np.zeros(round(16_000 * seconds), np.int16) for seconds in (1.5, 2.0, 8.0)]
    microphone = np.concatenate([quiet[0], tone(3.0), quiet[1], tone(1.0), quiet[2]])
    wav = browser_module.write_wav(tmp_path / "microphone.wav", microphone)
    loop, stop, urls = asyncio.new_event_loop(), asyncio.Event(), []  # type: ignore[var-annotated]
    ready = threading.Event()

    def started(url: str) -> None:
        urls.append(url)
        ready.set()

    thread = threading.Thread(
        target=lambda: loop.run_until_complete(serve(started, stop)), daemon=True
    )
    thread.start()
    try:
        assert ready.wait(60)
        with browser_module.browser(wav) as launched:
            page = browser_module.LivePage(launched, urls[0])
            page.page.uncheck("#echo")
            page.page.click("#speak")
            page.until(f"{STATE}.then((state) => state?.numShown > 5)", "idle pictures")
            page.until(f"{STATE}.then((state) => state.isIdle === false)", "an answer")
            page.until(
                f"{STATE}.then((state) => state.epoch === 1)", "the interruption of the answer"
            )
            page.until(f"{STATE}.then((state) => state.isIdle === false)", "the next answer")
            assert "what you said" in page.message
            assert page.problems == []
            page.close()
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        loop.close()
