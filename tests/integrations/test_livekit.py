"""The LiveKit adapter: the conformance suite, and livekit-agents' own runner and streams with rooms
in this process.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip(
    "livekit.agents", reason="livekit-agents (extra `livekit`) is what the adapter is for"
)

from livekit import rtc
from livekit.agents import AgentSession
from livekit.agents.voice.avatar import AudioSegmentEnd, DataStreamAudioOutput

from rest_lightning.avatar import Avatar, conformance
from rest_lightning.avatar.conformance import Piece, Subject, portrait, speech
from rest_lightning.avatar.simulation import TracedModel, simulate
from rest_lightning.errors import UserError
from rest_lightning.integrations.livekit import AvatarSession, AvatarVideoGenerator, run_worker
from rest_lightning.talking_head import portraits_in

HOURS = [conformance.hours_of_idling, conformance.ten_minutes_faster_than_real_time]
QUICK = [case for case in conformance.CASES if case not in HOURS]


def audio(samples: np.ndarray, sample_rate: int = 24_000) -> rtc.AudioFrame:
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    return rtc.AudioFrame(samples.tobytes(), sample_rate, channels, len(samples))


class GeneratorSubject:
    """The generator as an AvatarRunner uses it."""

    def __init__(self, generator: AvatarVideoGenerator) -> None:
        self.generator = generator

    async def push(self, samples: np.ndarray, sample_rate: int) -> None:
        await self.generator.push_audio(audio(samples, sample_rate))

    async def flush(self) -> None:
        await self.generator.push_audio(AudioSegmentEnd())

    async def interrupt(self) -> None:
        await self.generator.clear_buffer()

    async def pieces(self) -> AsyncIterator[Piece]:
        """A picture with what comes right behind it."""
        parts = aiter(self.generator)
        coming = asyncio.ensure_future(anext(parts))
        piece: Piece | None = None
        try:
            while True:
                await asyncio.wait({coming}, timeout=None if piece is None else 0.001)
                part = coming.result() if coming.done() else None
                if piece is not None and (part is None or isinstance(part, rtc.VideoFrame)):
                    yield piece
                    piece = None
                if part is None:
                    continue
                coming = asyncio.ensure_future(anext(parts))
                if isinstance(part, rtc.VideoFrame):
                    picture = np.frombuffer(part.data, np.uint8).reshape(part.height, part.width, 3)
                    piece = Piece(picture, None, 24_000)
                elif piece is not None and isinstance(part, rtc.AudioFrame):
                    samples = np.frombuffer(part.data, np.int16).reshape(-1, part.num_channels)
                    samples = samples[:, 0] if part.num_channels == 1 else samples
                    piece = replace(piece, samples=samples, sample_rate=part.sample_rate)
                elif piece is not None:
                    piece = replace(piece, ends=True)
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)


@asynccontextmanager
async def open_generator(model: TracedModel) -> AsyncIterator[Subject]:
    async with Avatar(portrait(), model) as avatar:  # type: ignore[arg-type]
        yield GeneratorSubject(AvatarVideoGenerator(avatar))


@pytest.mark.parametrize("chunk_length", [3, 1])
@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.__name__)
def test_the_generator_conforms(case: conformance.Case, chunk_length: int) -> None:
    conformance.check(case, open_generator, partial(TracedModel, chunk_length))


@pytest.mark.slow
@pytest.mark.parametrize("case", HOURS, ids=lambda case: case.__name__)
def test_the_generator_conforms_for_hours(case: conformance.Case) -> None:
    conformance.check(case, open_generator)


def test_speech_of_another_kind_is_converted() -> None:
    async def talk() -> list[Any]:
        async with Avatar(portrait(), TracedModel()) as avatar:  # type: ignore[arg-type]
            generator = AvatarVideoGenerator(avatar, 24_000, 1)
            await generator.push_audio(audio(speech(1.0, 48_000, channels=2), 48_000))
            await generator.push_audio(AudioSegmentEnd())
            parts: list[Any] = []
            async for part in generator:
                parts.append(part)
                if isinstance(part, AudioSegmentEnd):
                    return parts
        raise AssertionError("the generator has ended")

    frames = [part for part in simulate(talk()) if isinstance(part, rtc.AudioFrame)]
    assert {(frame.sample_rate, frame.num_channels) for frame in frames} == {(24_000, 1)}
    heard = np.concatenate([np.frombuffer(frame.data, np.int16) for frame in frames])[:24_000]
    wanted = speech(1.0)
    assert np.abs(heard[500:23_000].astype(int) - wanted[500:23_000]).max() < 50


def test_an_agent_is_told_of_ends_when_the_model_has_failed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def talk() -> int:
        async with Avatar(portrait(), TracedModel(broken_level=0.95)) as avatar:  # type: ignore[arg-type]
            generator, ends = AvatarVideoGenerator(avatar), 0

            async def read() -> None:
                nonlocal ends
                async for part in generator:
                    ends += isinstance(part, AudioSegmentEnd)

            reading = asyncio.create_task(read())
            await asyncio.sleep(1.0)
            for samples in (np.full(24_000, 32_700, np.int16), speech(1.0), speech(1.0)):
                await generator.push_audio(audio(samples))
                await generator.push_audio(AudioSegmentEnd())
                await asyncio.sleep(2.0)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            return ends

    assert simulate(talk()) == 3
    assert [record.message for record in caplog.records] == [
        "the model failed for this avatar (RuntimeError: the speech was too loud): open a new one"
    ]


# -- rooms in this process ------------------------------------------------------------------------


class Reader:
    """A byte stream as its receiver sees it."""

    def __init__(self, attributes: dict[str, str]) -> None:
        self.info = SimpleNamespace(attributes=attributes, stream_id="stream")
        self.data: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def __anext__(self) -> bytes:
        data = await self.data.get()
        if data is None:
            raise StopAsyncIteration
        return data


class Participant:
    """Streams, calls and tracks of one side of a room."""

    def __init__(self, room: Room, identity: str) -> None:
        self.identity, self.kind, self.room = (
            identity,
            rtc.ParticipantKind.PARTICIPANT_KIND_AGENT,
            room,
        )
        self.state = rtc.ParticipantState.PARTICIPANT_STATE_ACTIVE
        self.track_publications: dict[str, Any] = {}
        self._rpc_handlers: dict[str, Callable[[Any], Any]] = {}
        self.published: list[Any] = []

    def register_rpc_method(self, name: str, handler: Callable[[Any], Any]) -> None:
        self._rpc_handlers[name] = handler

    async def perform_rpc(self, *, destination_identity: str, method: str, payload: str) -> str:
        other = self.room.others[destination_identity].local_participant
        answer = other._rpc_handlers[method](
            SimpleNamespace(caller_identity=self.identity, payload=payload)
        )
        return str(await answer if asyncio.iscoroutine(answer) else answer)

    async def stream_bytes(
        self, *, topic: str, attributes: dict[str, str], destination_identities: Any, name: str
    ) -> Any:
        reader = Reader(attributes)
        self.room.others[destination_identities[0]].byte_handlers[topic](reader, self.identity)

        async def write(data: bytes) -> None:
            reader.data.put_nowait(data)

        async def aclose() -> None:
            reader.data.put_nowait(None)

        return SimpleNamespace(write=write, aclose=aclose)

    async def publish_track(self, track: Any, options: Any) -> Any:
        async def wait_for_subscription() -> None:
            return None

        self.published.append(track)
        publication = SimpleNamespace(
            kind=track.kind,
            wait_for_subscription=wait_for_subscription,
            subscribed=True,
            track=track,
            sid=track.name,
        )
        self.track_publications[track.name] = publication
        self.room.emit("local_track_published", publication, track)
        return publication


class Room(rtc.EventEmitter[Any]):
    """A connected room; rooms that know each other are one."""

    def __init__(self, identity: str) -> None:
        super().__init__()
        self.name, self.others = "room", {}  # type: ignore[var-annotated]
        self.byte_handlers: dict[str, Callable[[Any, str], None]] = {}
        self.local_participant = Participant(self, identity)

    @property
    def remote_participants(self) -> dict[str, Participant]:
        return {identity: other.local_participant for identity, other in self.others.items()}

    def isconnected(self) -> bool:
        return True

    def register_byte_stream_handler(self, topic: str, handler: Callable[[Any, str], None]) -> None:
        self.byte_handlers[topic] = handler


class Told:
    """What an agent's sound output tells, with the utterance's position."""

    def __init__(self, output: Any) -> None:
        self.events: list[tuple[str, float, bool]] = []
        output.on("playback_started", lambda event: self.events.append(("started", 0.0, False)))
        output.on(
            "playback_finished",
            lambda event: self.events.append(
                ("finished", event.playback_position, event.interrupted)
            ),
        )

    async def until(self, count: int) -> None:
        async with asyncio.timeout(15):
            while len(self.events) < count:
                await asyncio.sleep(0.01)


async def utter(output: Any, seconds: float) -> None:
    for start in range(0, round(seconds * 24_000), 2400):
        await output.capture_frame(audio(speech(seconds)[start : start + 2400]))
    output.flush()


async def converse(output: Any) -> list[tuple[str, float, bool]]:
    """An utterance to its end, one that is interrupted, and a third."""
    told = Told(output)
    await utter(output, 0.6)
    await told.until(2)
    await utter(output, 5.0)
    await told.until(3)
    await asyncio.sleep(0.5)
    output.clear_buffer()
    await told.until(4)
    await asyncio.sleep(0.3)
    await utter(output, 0.4)
    await told.until(6)
    await asyncio.sleep(0.3)
    return told.events


def assert_conversation(events: list[tuple[str, float, bool]]) -> None:
    assert [(name, interrupted) for name, _, interrupted in events] == [
        ("started", False),
        ("finished", False),
        ("started", False),
        ("finished", True),
        ("started", False),
        ("finished", False),
    ]
    assert events[1][1] == pytest.approx(0.6, abs=0.041)
    assert 0.3 < events[3][1] < 1.0  # of five seconds
    assert events[5][1] == pytest.approx(0.4, abs=0.041)


def test_a_session_in_the_agents_process() -> None:
    async def talk() -> None:
        room, session = Room("agent"), AgentSession()
        avatar = AvatarSession(portrait(), model=TracedModel(compute_s=0.05))  # type: ignore[arg-type]
        metrics: list[Any] = []
        avatar.on("metrics_collected", metrics.append)
        await avatar.start(session, room)  # type: ignore[arg-type]
        assert session.output.audio is not None and session.output.audio.sample_rate == 24_000
        assert_conversation(await converse(session.output.audio))
        assert avatar.avatar_identity == "agent"
        assert [track.name for track in room.local_participant.published] == [
            "avatar_audio",
            "avatar_video",
        ]
        assert [(each.type, each.metadata.model_provider) for each in metrics] == [
            ("avatar_metrics", "rest_lightning")
        ]
        await avatar.aclose()
        await avatar.aclose()

    asyncio.run(talk())


def test_a_worker_in_a_room_of_its_own() -> None:
    async def talk() -> None:
        agent, worker = Room("agent"), Room("rest-avatar")
        agent.others["rest-avatar"], worker.others["agent"] = worker, agent
        running = asyncio.create_task(
            run_worker(worker, portrait(), model=TracedModel(compute_s=0.05))  # type: ignore[arg-type]
        )
        output = DataStreamAudioOutput(
            agent,  # type: ignore[arg-type]
            destination_identity="rest-avatar",
            sample_rate=24_000,
            wait_playback_start=True,
        )
        while "lk.audio_stream" not in worker.byte_handlers and not running.done():
            await asyncio.sleep(0.01)
        talking = asyncio.create_task(converse(output))
        await asyncio.wait({running, talking}, return_when=asyncio.FIRST_COMPLETED)
        assert_conversation(await talking)
        worker.emit("disconnected", "the room was closed")
        async with asyncio.timeout(5):
            await running

    asyncio.run(talk())


def test_bad_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match="expected a worker's portrait as a file and its model as model_folder"
    ):
        AvatarSession(portrait(), worker=True)
    for name in ("LIVEKIT_URL", "LIVEKIT_API_KEY", "LIVEKIT_API_SECRET"):
        monkeypatch.delenv(name, raising=False)

    async def start(avatar: AvatarSession) -> None:
        await avatar.start(AgentSession(), Room("agent"))  # type: ignore[arg-type]

    with pytest.raises(
        UserError, match="expected the address of the LiveKit server, got none: set LIVEKIT_URL"
    ):
        asyncio.run(start(AvatarSession("me.png", worker=True)))
    with pytest.raises(
        UserError, match="expected the key of the LiveKit server, got none: set LIVEKIT_API_KEY"
    ):
        asyncio.run(start(AvatarSession("me.png", worker=True, url="ws://127.0.0.1:9")))
    with pytest.raises(UserError, match=r"expected a portrait image, but none\.png does not exist"):
        asyncio.run(start(AvatarSession("none.png", model=TracedModel())))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("livekit-server") is None, reason="needs livekit-server on the PATH"
)
def test_a_worker_process_joins_a_real_room() -> None:
    async def talk() -> None:
        server = await asyncio.create_subprocess_exec(
            "livekit-server", "--dev", "--bind", "127.0.0.1"
        )
        try:
            from livekit import api

            url, keys = "ws://127.0.0.1:7880", ("devkey", "secret")
            token = api.AccessToken(*keys).with_identity("agent").with_kind("agent")
            token = token.with_grants(api.VideoGrants(room_join=True, room="test"))
            room = rtc.Room()
            for _ in range(50):
                try:
                    await room.connect(url, token.to_jwt())
                    break
                except rtc.ConnectError:
                    await asyncio.sleep(0.2)
            else:
                pytest.fail(f"livekit-server does not listen at {url}")
            session = AgentSession()
            face = portraits_in()[0]
            avatar = AvatarSession(face, worker=True, url=url, api_key=keys[0], api_secret=keys[1])
            await avatar.start(session, room)
            await avatar.wait_for_join(timeout=60)
            assert session.output.audio is not None
            assert_conversation(await converse(session.output.audio))
            await avatar.aclose()
            await room.disconnect()
        finally:
            server.terminate()
            await server.wait()

    asyncio.run(talk())
