"""What benchmarks/live.py measures: every scenario is a dataclass whose ``run`` gives a dictionary
for JSON.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._browser import LivePage, beeps, browser, write_wav
from benchmarks._models import DRAWN_FOLDER
from benchmarks._scenarios import spread
from rest_lightning.constants import FPS, SAMPLE_RATE
from rest_lightning.errors import UserError
from rest_lightning.machine import resident_memory_mb

Row = dict[str, Any]
MARKED, MARKED_SIZE_PX = "marked", 256
# for each session, behind the last one's start: pages that load take the processor from those that
# run
_SETTLE_S = 6.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAIR_S = 0.5  # a beep that is heard this far from its picture is another one


class Server:
    """A live server in a process of its own.

    Args:
        model: ``people``, ``drawn``, or ``marked``, the stand-in whose frames carry their number.
        max_sessions: it refuses more.
    """

    def __init__(self, model: str, max_sessions: int = 3) -> None:
        name = str(DRAWN_FOLDER) if model == "drawn" else model
        command = ["-m", "rest_lightning", "serve", "--port", "0", "--model", name]
        if model == MARKED:
            command = ["-m", "benchmarks._live_server", "--size-px", str(MARKED_SIZE_PX)]
        command = [sys.executable, *command, "--max-sessions", str(max_sessions)]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `stop`)
        pipes: Row = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": self._log,
            "text": True,
        }
        self._process = subprocess.Popen(command, **pipes)
        self.url = ""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if found := re.search(r"https?://\S+", line):
                self.url = found[0]
                return
        self._log.seek(0)
        said = self._log.read().strip().splitlines()
        raise UserError(
            f"expected a server, got `{said[-1] if said else 'nothing'}`: run `rest serve`"
        )

    def cpu_s(self) -> float:
        """Processor time of all its threads so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S

    def resident_mb(self) -> float:
        """Resident memory, 10^6 bytes."""
        return resident_memory_mb(self._process.pid)

    def stop(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()
        self._log.close()


@contextmanager
def stage(model: str, microphone: Any, max_sessions: int = 3) -> Iterator[tuple[Server, Any]]:
    """A server, and a browser whose microphone hears ``microphone`` again and again."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        server = Server(model, max_sessions)
        stack.callback(server.stop)
        yield (
            server,
            stack.enter_context(browser(write_wav(Path(folder) / "microphone.wav", microphone))),
        )


def begin(launched: Any, server: Server, num: int, is_marked: bool) -> list[LivePage]:
    """Sessions that speak, one after another as users come, and have settled."""
    pages = []
    for _ in range(num):
        pages.append(LivePage(launched, server.url))
        pages[-1].speak(is_marked)
    pages[0].wait(_SETTLE_S * num)
    for page in pages:
        page.forget()
    return pages


def heard_and_seen(found: Row) -> list[Row]:
    """Every beep that was heard: picture after sound (ms), and microphone to picture and to sound
    (s).

    The picture is the frame that the beep lies in by the server's account; the marked model shows
    that the account is true.
    """
    frames = {frame["index"]: frame for frame in found["frames"]}
    pairs = []
    for beep in found["sent"]:
        frame, onset_s = frames.get(beep["index"]), beep["onset"] / SAMPLE_RATE
        if frame is None:
            continue
        heard = [
            one
            for one in found["heard"]
            if abs(one["leaves"] - 1000 * onset_s - frame["drawn"]) < 1000 * _PAIR_S
        ]
        if not heard or frame["latency"] is None:
            continue
        leaves = min((one["leaves"] for one in heard), key=lambda each: abs(each - frame["drawn"]))
        began_ms = leaves - 1000 * onset_s
        # Beeps are alike: of those spoken, the one that came back is nearest to what the page says
        # of this frame.
        past_s = [frame["time"] - one["time"] for one in found["spoken"]]
        latency_s = min(past_s, key=lambda past: abs(past - frame["latency"]), default=np.nan)
        if abs(latency_s - frame["latency"]) > _PAIR_S:
            latency_s = np.nan  # spoken before the measurement began
        pairs.append({"offset_ms": frame["drawn"] - began_ms, "latency_s": latency_s})
    return pairs


def latencies_ms(found: Row) -> list[float]:
    """Of every frame that shows speech: from the capture of its first sample to its drawing."""
    return [1000 * frame["latency"] for frame in found["frames"] if frame["latency"] is not None]


def gaps_ms(found: Row) -> list[float]:
    """Between a frame's drawing and the next one's; a picture that stands still to the end is a gap
    too.
    """
    moments = [found["began"], *(frame["drawn"] for frame in found["frames"]), found["ended"]]
    return [after - before for before, after in pairwise(moments)]


def num_lost(found: Row) -> int:
    """Frames of the stream that were never drawn."""
    numbers = [frame["index"] for frame in found["frames"]]
    return numbers[-1] - numbers[0] + 1 - len(set(numbers)) if numbers else 0


def offsets(found: Row) -> Row:
    """Mean, deviation and largest of the beeps' offsets, ms."""
    values = np.array([pair["offset_ms"] for pair in heard_and_seen(found)])
    if len(values) < 2:
        return {"num": len(values)}
    return {
        "num": len(values),
        "mean": float(values.mean()),
        "mean_abs": float(abs(values.mean())),
        "sd": float(values.std(ddof=1)),
        "max_abs": float(np.abs(values).max()),
    }


def session_row(found: Row) -> Row:
    """Everything of one session."""
    beep_ms = [
        1000 * pair["latency_s"] for pair in heard_and_seen(found) if np.isfinite(pair["latency_s"])
    ]
    return {
        "latency_ms": spread(latencies_ms(found)) if latencies_ms(found) else None,
        "beep_latency_ms": spread(beep_ms) if beep_ms else None,
        "offset_ms": offsets(found),
        "num_frames": len(found["frames"]),
        "num_lost": num_lost(found),
        "largest_gap_ms": max(gaps_ms(found)),
        "message": found["message"],
        "fps": found["figures"]["fps"],
        "underruns": found["figures"]["numUnderruns"],
        "cushion_ms": found["figures"]["cushionMs"],
    }


def _numbers(rows: Sequence[Row], *path: str) -> list[float]:
    found = []
    for row in rows:
        value: Any = row
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            found.append(float(value))
    return found


@dataclass(frozen=True)
class Sessions:
    """``num`` sessions for a while: latency, offset, gaps; the last run tries one more session."""

    num: int
    model: str
    seconds: float

    @property
    def name(self) -> str:
        """Key in the JSON."""
        return f"sessions_{self.num}"

    def run(self) -> Row:
        """The worst session counts."""
        with stage(self.model, beeps(19.0), max_sessions=self.num) as (server, launched):
            pages = begin(launched, server, self.num, self.model == MARKED)
            pages[0].wait(self.seconds)
            rows = [session_row(page.measured()) for page in pages]
            refused = self._refused(launched, server)
            resident_mb = server.resident_mb()
        worst = {
            "latency_p95_ms": max(_numbers(rows, "latency_ms", "p95"), default=None),
            "beep_latency_p95_ms": max(_numbers(rows, "beep_latency_ms", "p95"), default=None),
            "num_lost": max(_numbers(rows, "num_lost")),
            "lost_of_1500": max(
                1500
                * (
                    row["num_lost"] / (row["num_frames"] + row["num_lost"])
                    if row["num_frames"]
                    else 1.0
                )
                for row in rows
            ),
            "largest_gap_ms": max(_numbers(rows, "largest_gap_ms")),
            "offset_mean_abs_ms": max(_numbers(rows, "offset_ms", "mean_abs"), default=None),
            "offset_sd_ms": max(_numbers(rows, "offset_ms", "sd"), default=None),
            "offset_max_abs_ms": max(_numbers(rows, "offset_ms", "max_abs"), default=None),
            # Real time: all frames come, 25 of them a second.
            "num_in_real_time": sum(
                row["num_frames"] >= 0.995 * FPS * self.seconds for row in rows
            ),
        }
        return {
            "seconds": self.seconds,
            **worst,
            "refused": refused,
            "resident_mb": resident_mb,
            "sessions": rows,
        }

    def _refused(self, launched: Any, server: Server) -> str:
        """What one session too many is told."""
        page = LivePage(launched, server.url)
        page.page.click("#speak")
        page.page.wait_for_selector("#message[data-kind=error]")
        return page.message


@dataclass(frozen=True)
class Pixels:
    """The marked model: frame numbers and beeps read from the pixels agree with what the protocol
    says of them.
    """

    seconds: float
    name: str = "pixels"

    def run(self) -> Row:
        """Shares that agree; 1 is all."""
        with stage(MARKED, beeps(19.0)) as (server, launched):
            page = begin(launched, server, 1, True)[0]
            page.wait(self.seconds)
            found = page.measured()
        frames, said = found["frames"], {beep["index"]: beep["onset"] for beep in found["sent"]}
        number = [
            frame["marks"] is not None and frame["marks"]["number"] == frame["index"]
            for frame in frames
        ]
        onsets = [(frame["index"], frame["marks"]["onset"]) for frame in frames if frame["marks"]]
        onset = [
            abs(said.get(index, -99) - seen) <= 12 for index, seen in onsets if seen is not None
        ]
        row = session_row(found)
        return {
            "numbers_agree": float(np.mean(number)),
            "beeps_agree": float(np.mean(onset)),
            "session": row,
        }


@dataclass(frozen=True)
class Interruptions:
    """A voice that never pauses, interrupted again and again."""

    model: str
    num: int
    name: str = "interruption"

    def run(self) -> Row:
        """The slowest counts."""
        time_s = np.arange(20 * SAMPLE_RATE) / SAMPLE_RATE
        tone = np.round(16_000 * np.sin(2 * np.pi * 440 * time_s)).astype(np.int16)
        with stage(self.model, tone) as (server, launched):
            page = begin(launched, server, 1, False)[0]
            rows = []
            for turn in range(self.num):
                page.wait(2.5 + 0.13 * turn)  # every phase of a chunk
                rows.append(page.interrupt())
        return {
            "num": self.num,
            "num_loud": sum(row["wasLoud"] for row in rows),
            "silent_ms": spread([row["silent"] for row in rows]),
            "picture_gone_ms": spread(
                [row["gone"] if row["gone"] is not None else 5000.0 for row in rows]
            ),
            "next_picture_ms": spread(
                [row["fresh"] for row in rows if row["fresh"] is not None] or [5000.0]
            ),
        }


@dataclass(frozen=True)
class ServerCpu:
    """Processor time of the server's process with the marked model: network, intake, encoding of
    256 px.
    """

    seconds: float
    name: str = "cpu"

    def run(self) -> Row:
        """Percent of a core per session; what an idle server takes is not counted out."""
        row: Row = {"size_px": MARKED_SIZE_PX}
        for num in (1, 3):
            with stage(MARKED, beeps(19.0)) as (server, launched):
                pages = begin(launched, server, num, False)
                cpu_s, start_s = server.cpu_s(), time.perf_counter()
                pages[0].wait(self.seconds)
                share = (server.cpu_s() - cpu_s) / (time.perf_counter() - start_s)
                row[f"percent_of_{num}"] = 100 * share / num
        return row


@dataclass(frozen=True)
class LongSession:
    """One session for an hour: does sound leave picture, does memory grow?"""

    model: str
    minutes: float
    name: str = "long"

    def run(self) -> Row:
        """By minutes; drift and growth are between the second and the last one."""
        by_minute = []
        with stage(self.model, beeps(19.0)) as (server, launched):
            page = begin(launched, server, 1, False)[0]
            for minute in range(max(3, round(self.minutes))):
                page.wait(min(60.0, 60.0 * self.minutes / 3))
                found = page.measured()
                page.forget()
                heap = page.page.evaluate("performance.memory?.usedJSHeapSize ?? null")
                row = {
                    "minute": minute + 1,
                    "resident_mb": server.resident_mb(),
                    "page_heap_mb": heap and heap / 1e6,
                }
                by_minute.append(row | session_row(found))
                print(
                    (f"minute {minute + 1}: {row['resident_mb']:.1f} MB"),
                    file=sys.stderr,
                    flush=True,
                )
        means = _numbers(by_minute, "offset_ms", "mean")
        return {
            "minutes": self.minutes,
            "drift_ms": abs(means[-1] - means[1]) if len(means) == len(by_minute) else None,
            "growth_mb": by_minute[-1]["resident_mb"] - by_minute[1]["resident_mb"],
            "num_lost": sum(row["num_lost"] for row in by_minute),
            "underruns": by_minute[-1]["underruns"],
            "by_minute": by_minute,
        }
