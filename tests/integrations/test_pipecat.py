"""The Pipecat adapter in real pipelines: the conformance suite, frames in their order, settings,
mistakes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pipecat", reason="pipecat-ai (extra `pipecat`) is what the adapter is for")

from pipecat.frames.frames import (
    CancelFrame,
    EndFrame,
    ErrorFrame,
    Frame,
    InterruptionFrame,
    OutputImageRawFrame,
    ServiceUpdateSettingsFrame,
    StartFrame,
    TTSAudioRawFrame,
    TTSStartedFrame,
    TTSStoppedFrame,
    TTSTextFrame,
)
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineWorker
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.transports.base_transport import TransportParams
from pipecat.workers.runner import WorkerRunner

from rest_lightning.avatar import conformance
from rest_lightning.avatar.conformance import Piece, Subject, portrait, speech
from rest_lightning.avatar.simulation import TracedModel, read_trace, simulate
from rest_lightning.errors import UserError
from rest_lightning.integrations import pipecat
from rest_lightning.integrations.pipecat import AvatarVideoService, transport_params

HOURS = [conformance.hours_of_idling, conformance.ten_minutes_faster_than_real_time]
QUICK = [case for case in conformance.CASES if case not in HOURS]


class Sink(FrameProcessor):
    """What comes out behind the service; in front of it, what goes upstream."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[Frame] = []
        self.coming: asyncio.Queue[Frame] = asyncio.Queue()
        self.keeps = False
        self.is_open = asyncio.Event()
        self.is_open.set()

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        if self.keeps:
            self.frames.append(frame)
        elif isinstance(frame, OutputImageRawFrame | TTSAudioRawFrame | TTSStoppedFrame):
            await self.coming.put(frame)
        await self.push_frame(frame, direction)


def service(model: TracedModel | None = None, **given: Any) -> AvatarVideoService:
    settings = AvatarVideoService.Settings(portrait=given.pop("portrait", portrait()))
    return AvatarVideoService(model=model or TracedModel(), settings=settings, **given)  # type: ignore[arg-type]


@asynccontextmanager
async def running(
    processor: AvatarVideoService, sink: Sink, front: Sink | None = None
) -> AsyncIterator[PipelineWorker]:
    """A pipeline of the service and what is around it, to its end."""
    parts = [*([front] if front else []), processor, sink]
    worker = PipelineWorker(Pipeline(parts), cancel_on_idle_timeout=False, enable_rtvi=False)
    started = asyncio.Event()

    @worker.event_handler("on_pipeline_started")
    async def on_started(worker: Any, frame: Any) -> None:
        started.set()

    runner = WorkerRunner(handle_sigint=False)
    await runner.add_workers(worker)
    task = asyncio.create_task(runner.run())
    await asyncio.wait(
        {task, asyncio.create_task(started.wait())}, return_when=asyncio.FIRST_COMPLETED
    )
    try:
        yield worker
    finally:
        await worker.cancel()
        await task


class PipelineSubject:
    """A pipeline as an agent uses it."""

    def __init__(self, worker: PipelineWorker, sink: Sink, avatar: AvatarVideoService) -> None:
        self.worker, self.sink, self.avatar = worker, sink, avatar

    async def push(self, samples: np.ndarray, sample_rate: int) -> None:
        channels = 1 if samples.ndim == 1 else samples.shape[1]
        await self.worker.queue_frame(TTSAudioRawFrame(samples.tobytes(), sample_rate, channels))
        await self._settle()

    async def flush(self) -> None:
        await self.worker.queue_frame(TTSStoppedFrame())
        await self._settle()

    async def interrupt(self) -> None:
        await (
            self._settle()
        )  # a system frame overtakes speech that is still on its way to the service
        await self.worker.queue_frame(InterruptionFrame())
        await self._settle()

    async def _settle(self) -> None:
        """Frames reach the service through tasks and queues."""
        for _ in range(40):
            await asyncio.sleep(0)

    async def pieces(self) -> AsyncIterator[Piece]:
        """An image with what comes right behind it."""
        piece: Piece | None = None
        while True:
            frame: Frame | None
            try:
                async with asyncio.timeout(None if piece is None else 0.001):
                    frame = await self.sink.coming.get()
            except TimeoutError:
                frame = None
            if piece is not None and (frame is None or isinstance(frame, OutputImageRawFrame)):
                yield piece
                piece = None
            if isinstance(frame, OutputImageRawFrame):
                assert frame.sync_with_audio
                picture = np.frombuffer(frame.image, np.uint8).reshape(
                    frame.size[1], frame.size[0], 3
                )
                piece = Piece(picture, None, 24_000)
            elif isinstance(frame, TTSAudioRawFrame):
                assert piece is not None
                samples = np.frombuffer(frame.audio, np.int16).reshape(-1, frame.num_channels)
                samples = samples[:, 0] if frame.num_channels == 1 else samples
                piece = replace(piece, samples=samples, sample_rate=frame.sample_rate)
            elif (
                isinstance(frame, TTSStoppedFrame)
                and piece is not None
                and piece.samples is not None
            ):
                piece = replace(piece, ends=True)


@asynccontextmanager
async def open_pipeline(model: TracedModel) -> AsyncIterator[Subject]:
    sink, processor = Sink(), service(model)
    async with running(processor, sink) as worker:
        yield PipelineSubject(worker, sink, processor)


# A pipeline's queues are without bound: a reader that stops would have to be a transport that does
# not return.
CASES = [case for case in QUICK if case is not conformance.a_reader_that_stops]


@pytest.mark.parametrize("chunk_length", [3, 1])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_the_service_conforms(case: conformance.Case, chunk_length: int) -> None:
    conformance.check(case, open_pipeline, partial(TracedModel, chunk_length))


@pytest.mark.slow
@pytest.mark.parametrize("case", HOURS, ids=lambda case: case.__name__)
def test_the_service_conforms_for_hours(case: conformance.Case) -> None:
    conformance.check(case, open_pipeline)


def audio(samples: np.ndarray, context_id: str | None = None) -> TTSAudioRawFrame:
    return TTSAudioRawFrame(samples.tobytes(), 24_000, 1, context_id=context_id)


def names(frames: list[Frame]) -> list[str]:
    """Kinds of frames; pieces of speech in a row are one, and images are left out."""
    kinds = [type(frame).__name__ for frame in frames if not isinstance(frame, OutputImageRawFrame)]
    return [
        kind
        for i, kind in enumerate(kinds)
        if i == 0 or kind != kinds[i - 1] or kind != "TTSAudioRawFrame"
    ]


def test_frames_leave_in_their_order_and_an_end_waits_for_the_speech() -> None:
    async def talk() -> list[Frame]:
        sink = Sink()
        sink.keeps = True
        async with running(service(), sink) as worker:
            await asyncio.sleep(1.0)
            for number, context in enumerate(("one", "two")):
                text = TTSTextFrame(context, aggregated_by="word")
                parts = [
                    TTSStartedFrame(),
                    audio(speech(1.0, number=number), context),
                    text,
                    TTSStoppedFrame(),
                ]
                await worker.queue_frames(parts)
            await worker.queue_frame(EndFrame())
            await asyncio.sleep(5.0)
        return sink.frames

    frames = simulate(talk())
    spoken = [frame for frame in frames if isinstance(frame, TTSAudioRawFrame)]
    assert [frame.context_id for frame in spoken] == ["one"] * 25 + ["two"] * 25
    assert {frame.num_frames for frame in spoken} == {960}
    heard = np.concatenate([np.frombuffer(frame.audio, np.int16) for frame in spoken])
    np.testing.assert_array_equal(heard, np.concatenate([speech(1.0), speech(1.0, number=1)]))
    order = [name for name in names(frames) if name.startswith("TTS") or name == "EndFrame"]
    assert order[-5:] == [
        "TTSAudioRawFrame",
        "TTSStoppedFrame",
        "TTSAudioRawFrame",
        "TTSStoppedFrame",
        "EndFrame",
    ]


def test_an_interruption_passes_and_nothing_old_follows() -> None:
    async def talk() -> list[Frame]:
        sink = Sink()
        sink.keeps = True
        async with running(service(), sink) as worker:
            await asyncio.sleep(1.0)
            await worker.queue_frames([audio(speech(5.0)), TTSStoppedFrame()])
            await asyncio.sleep(2.0)
            await worker.queue_frame(InterruptionFrame())
            await asyncio.sleep(2.0)
        return sink.frames

    frames = simulate(talk())
    place = next(i for i, frame in enumerate(frames) if isinstance(frame, InterruptionFrame))
    assert any(isinstance(frame, TTSAudioRawFrame) for frame in frames[:place])
    after = frames[place:]
    assert sum(isinstance(frame, TTSAudioRawFrame) for frame in after) <= 1
    assert not any(isinstance(frame, TTSStoppedFrame) for frame in frames)
    assert sum(isinstance(frame, OutputImageRawFrame) for frame in after) >= 45


def test_a_new_portrait_and_one_that_is_none() -> None:
    async def talk() -> tuple[list[Frame], list[Frame]]:
        sink, front = Sink(), Sink()
        sink.keeps = front.keeps = True
        async with running(service(), sink, front) as worker:
            await asyncio.sleep(1.0)
            for given in (portrait(is_bright=True), "none.png"):
                delta = AvatarVideoService.Settings(portrait=given)
                await worker.queue_frame(ServiceUpdateSettingsFrame(delta=delta))
                await asyncio.sleep(3.0)
        return sink.frames, front.frames

    frames, upstream = simulate(talk())
    images = [frame for frame in frames if isinstance(frame, OutputImageRawFrame)]
    shown = [
        read_trace(np.frombuffer(image.image, np.uint8).reshape(16, 16, 3)).portrait
        for image in images
    ]
    assert shown[0] == 0 and shown == sorted(shown) and shown[-1] == 1
    errors = [frame.error for frame in upstream if isinstance(frame, ErrorFrame)]
    assert len(errors) == 1 and "none.png does not exist: check the name" in errors[0]


def test_speech_passes_without_pictures_when_the_model_has_failed() -> None:
    async def talk() -> tuple[list[Frame], list[Frame]]:
        sink, front = Sink(), Sink()
        sink.keeps = front.keeps = True
        async with running(service(TracedModel(broken_level=0.95)), sink, front) as worker:
            await asyncio.sleep(1.0)
            for samples in (np.full(24_000, 32_700, np.int16), speech(1.0)):
                await worker.queue_frames([audio(samples), TTSStoppedFrame()])
                await asyncio.sleep(2.0)
        return sink.frames, front.frames

    frames, upstream = simulate(talk())
    errors = [frame.error for frame in upstream if isinstance(frame, ErrorFrame)]
    assert len(errors) == 1 and "the speech was too loud" in errors[0] and "\n" not in errors[0]
    spoken = [frame for frame in frames if isinstance(frame, TTSAudioRawFrame)]
    assert [frame.num_frames for frame in spoken] == [24_000]
    assert sum(isinstance(frame, TTSStoppedFrame) for frame in frames) == 2


def test_bad_use() -> None:
    with pytest.raises(UserError, match="expected a portrait in the settings, got none"):
        AvatarVideoService(settings=AvatarVideoService.Settings())


def test_a_transport_is_told_size_and_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    params = transport_params(TransportParams, 128, audio_in_enabled=True, video_out_width=256)
    assert (params.video_out_framerate, params.audio_out_10ms_chunks, params.video_out_is_live) == (
        25,
        4,
        False,
    )
    assert (params.video_out_width, params.video_out_height, params.audio_in_enabled) == (
        256,
        128,
        True,
    )
    mediastreams = pytest.importorskip(
        "aiortc.mediastreams", reason="aiortc is what sends SmallWebRTC's video"
    )
    monkeypatch.setattr(mediastreams, "VIDEO_PTIME", mediastreams.VIDEO_PTIME)

    async def stamps() -> int:
        track = mediastreams.VideoStreamTrack()
        first, second = await track.next_timestamp(), await track.next_timestamp()
        return int(second[0] - first[0])

    assert asyncio.run(stamps()) == 3000  # of 90,000 a second: the reason for the override
    pipecat.set_webrtc_frame_rate()
    assert asyncio.run(stamps()) == 3600
    assert issubclass(StartFrame, Frame) and issubclass(CancelFrame, Frame)
