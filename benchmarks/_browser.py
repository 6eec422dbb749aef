"""A real browser with a fake microphone on the live page, driven by Playwright, and what is
measured inside it.
"""

from __future__ import annotations

import shutil
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rest_lightning.constants import SAMPLE_RATE
from rest_lightning.errors import UserError

PROBE = Path(__file__).with_name("_live_probe.js")
WIDE, NARROW = (1280, 800), (390, 844)
_NAMES = ("chromium", "chromium-browser", "google-chrome")
_ARGUMENTS = (
    "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream",
    "--autoplay-policy=no-user-gesture-required",
    "--no-sandbox",
    "--disable-background-timer-throttling",
    "--disable-backgrounding-occluded-windows",
    "--disable-renderer-backgrounding",
)


def find_chromium() -> str | None:
    """The system's Chromium: Playwright's own has no H.264."""
    return next(filter(None, map(shutil.which, _NAMES)), None)


def beeps(
    seconds: float, period_s: float = 1.9, beep_s: float = 0.12, first_s: float = 0.7
) -> NDArray[np.int16]:
    """Beeps of 1 kHz in silence. The period is no multiple of a frame or a chunk: every phase comes
    up.
    """
    time_s = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    is_on = (time_s >= first_s) & ((time_s - first_s) % period_s < beep_s)
    return np.round(np.where(is_on, 0.5 * np.cos(2 * np.pi * 1000 * time_s), 0) * 32767).astype(
        np.int16
    )


def write_wav(path: Path, samples: NDArray[np.int16]) -> Path:
    """Mono, 16 kHz."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
        file.writeframes(samples.astype("<i2").tobytes())
    return path


@contextmanager
def browser(microphone: Path | None = None) -> Iterator[Any]:
    """Playwright's browser; ``microphone`` is a wav file that is heard again and again.

    Raises:
        UserError: no Chromium, or no Playwright.
    """
    executable = find_chromium()
    if executable is None:
        raise UserError("expected Chromium on this machine, found none: apt-get install chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError as error:
        raise UserError(
            "expected the package playwright, found none: pip install playwright"
        ) from error
    arguments = (
        [*_ARGUMENTS, f"--use-file-for-fake-audio-capture={microphone}"]
        if microphone
        else [*_ARGUMENTS]
    )
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=executable, args=arguments)
        try:
            yield launched
        finally:
            launched.close()


class LivePage:
    """A tab with the live page.

    Args:
        launched: from :func:`browser`.
        url: of the server.
        size: of the window, in px.
        scripts: run before the page's own, such as one that takes a feature away.
        options: of Playwright's context, such as ``color_scheme``.
    """

    def __init__(
        self,
        launched: Any,
        url: str,
        size: tuple[int, int] = WIDE,
        scripts: tuple[str, ...] = (),
        **options: Any,
    ) -> None:
        viewport = {"width": size[0], "height": size[1]}
        self.context = launched.new_context(viewport=viewport, accept_downloads=True, **options)
        self.page = self.context.new_page()
        self.found: dict[str, Any] = {}
        # errors of scripts, and everything that the content policy refused
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on(
            "console",
            lambda said: self.problems.append(said.text) if said.type == "error" else None,
        )
        self.page.on("request", lambda request: self.requests.append(request.url))
        for script in scripts:
            self.page.add_init_script(script)
        self.page.goto(url)
        self.page.wait_for_selector(".portrait input[type=radio]:checked", state="attached")

    def speak(self, is_marked: bool = True) -> None:
        """Press Speak, wait for the first frame, measure from here on. A fake microphone has no
        echo to remove.
        """
        self.page.uncheck("#echo")
        self.page.click("#speak")
        self.watch(is_marked)

    def watch(self, is_marked: bool = True) -> None:
        """Measure from here on."""
        live = (
            "import('/page/app.js').then(({ app }) => (app.session?.player.shown.length ?? 0) > 0)"
        )
        self.until(live, "a first frame")
        self.found.clear()
        self.page.evaluate(PROBE.read_text(encoding="utf-8"), {"isMarked": is_marked})

    def until(self, condition: str, what: str, seconds: float = 30.0) -> None:
        """Wait until a JavaScript condition holds."""
        for _ in range(round(seconds * 20)):
            if self.page.evaluate(condition):
                return
            self.page.wait_for_timeout(50)
        raise UserError(
            f"expected {what} within {seconds:g} s, got `{self.message}`: see the server's log"
        )

    @property
    def message(self) -> str:
        """The line that the page shows."""
        return str(self.page.inner_text("#message"))

    def wait(self, seconds: float) -> None:
        """Let it run."""
        self.page.wait_for_timeout(1000 * seconds)

    def measured(self) -> dict[str, Any]:
        """Everything that was measured so far."""
        for name, new in self.page.evaluate("probe.drain()").items():
            self.found[name] = [*self.found.get(name, []), *new] if isinstance(new, list) else new
        return self.found | {"message": self.message}

    def forget(self) -> None:
        """Measure anew from here on."""
        self.found = {"began": self.measured()["ended"]}

    def interrupt(self) -> dict[str, Any]:
        """Interrupt, and see how long sound and picture went on; ms."""
        result: dict[str, Any] = self.page.evaluate("probe.interrupt()")
        return result

    def close(self) -> None:
        """Close the tab."""
        self.context.close()
