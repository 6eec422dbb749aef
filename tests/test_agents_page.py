"""The programs of docs/agents.md are run as they stand: rooms, transports and speech come from
here.
"""

from __future__ import annotations

import re
import wave
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import drawn
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "rest_lightning" / "assets"
PAGE = (ROOT / "docs" / "agents.md").read_text("utf-8")
BLOCKS = dict(re.findall(r"^<!-- test: ([\w-]+) -->\n```python\n(.*?)^```$", PAGE, re.M | re.S))


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn_by_default: None) -> None:
    """A folder with portraits."""
    for name in ("portrait", "anna", "ben", "cora"):
        (tmp_path / f"{name}.png").symlink_to(drawn.PORTRAITS[0])
    monkeypatch.chdir(tmp_path)


def speech() -> np.ndarray:
    with wave.open(str(ASSETS / "speech.wav")) as file:
        return np.frombuffer(file.readframes(16_000), np.int16)


def run(name: str, **names: Any) -> dict[str, Any]:
    exec(compile(BLOCKS[name], f"docs/agents.md {name}", "exec"), names)
    return names


def test_the_page_has_its_programs() -> None:
    assert set(BLOCKS) == {"livekit", "pipecat", "seam", "several"}


def test_seam() -> None:
    shown: list[np.ndarray] = []
    heard: list[np.ndarray] = []

    def speech_blocks() -> Iterator[tuple[np.ndarray, int]]:
        for block in np.array_split(speech(), 10):
            yield block, 16_000

    run(
        "seam",
        speech_blocks=speech_blocks,
        show=shown.append,
        play=lambda samples, rate: heard.append(samples),
    )
    assert len(shown) == len(heard) >= 25
    sound = np.concatenate([samples for samples in heard if samples.any()])
    assert np.count_nonzero(sound) == np.count_nonzero(speech())


@pytest.mark.slow
def test_several(capsys: pytest.CaptureFixture[str]) -> None:
    shown: list[int] = []

    async def serve(avatar: Any) -> None:
        async for frame in avatar.run():
            if frame.index == 10:
                shown.append(frame.index)
                return

    run("several", serve=serve)
    assert shown == [10, 10, 10]
    assert re.match(r"\d\.\d\d s of video take \[", capsys.readouterr().out)


def test_livekit() -> None:
    pytest.importorskip(
        "livekit.agents", reason="livekit-agents (extra `livekit`) is what this program uses"
    )
    import asyncio

    from livekit import rtc
    from livekit.agents import AgentSession

    class Room(rtc.EventEmitter[Any]):
        def __init__(self) -> None:
            super().__init__()
            self.name, self.published = "room", []  # type: ignore[var-annotated]
            self.local_participant = SimpleNamespace(
                identity="agent", publish_track=self.publish, track_publications={}, kind=0
            )

        def isconnected(self) -> bool:
            return True

        async def publish(self, track: Any, options: Any) -> Any:
            async def wait_for_subscription() -> None:
                return None

            self.published.append(track.name)
            return SimpleNamespace(wait_for_subscription=wait_for_subscription)

    sessions: list[AgentSession] = []

    class Session(AgentSession):  # type: ignore[type-arg]
        async def start(self, *args: Any, **given: Any) -> Any:
            """Without a room service; the program's own lines have been run by then."""
            sessions.append(self)

    async def talk() -> None:
        names = run("livekit")
        names["AgentSession"] = Session
        room = Room()
        await names["entrypoint"](SimpleNamespace(room=room))
        output, finished = sessions[0].output.audio, asyncio.Event()
        assert output is not None
        output.on("playback_finished", lambda event: finished.set())
        samples = np.repeat(speech(), 2)[: 24_000 // 2]
        await output.capture_frame(rtc.AudioFrame(samples.tobytes(), 24_000, 1, len(samples)))
        output.flush()
        async with asyncio.timeout(30):
            await finished.wait()
        assert room.published == ["avatar_audio", "avatar_video"]

    asyncio.run(talk())


def test_pipecat() -> None:
    pytest.importorskip("pipecat", reason="pipecat-ai (extra `pipecat`) is what this program uses")
    import asyncio

    from pipecat.frames.frames import (
        EndFrame,
        Frame,
        OutputImageRawFrame,
        TTSAudioRawFrame,
        TTSStoppedFrame,
    )
    from pipecat.pipeline.pipeline import Pipeline
    from pipecat.pipeline.worker import PipelineWorker
    from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
    from pipecat.workers.runner import WorkerRunner

    frames: list[Frame] = []

    class Output(FrameProcessor):
        async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
            await super().process_frame(frame, direction)
            frames.append(frame)
            await self.push_frame(frame, direction)

    names = run("pipecat")
    assert names["params"].video_out_width == names["model"].size_px

    async def talk() -> None:
        worker = PipelineWorker(
            Pipeline([names["pipeline"], Output()]), cancel_on_idle_timeout=False, enable_rtvi=False
        )
        runner = WorkerRunner(handle_sigint=False)
        await runner.add_workers(worker)
        await worker.queue_frames(
            [TTSAudioRawFrame(speech().tobytes(), 16_000, 1), TTSStoppedFrame(), EndFrame()]
        )
        async with asyncio.timeout(60):
            await runner.run()

    asyncio.run(talk())
    spoken = [
        np.frombuffer(frame.audio, np.int16)
        for frame in frames
        if isinstance(frame, TTSAudioRawFrame)
    ]
    np.testing.assert_array_equal(np.concatenate(spoken)[:16_000], speech())
    assert sum(isinstance(frame, OutputImageRawFrame) for frame in frames) >= 25
