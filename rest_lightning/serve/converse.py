"""Conversations on the live page: the microphone goes to a realtime server, its answers come back
with a face.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

import av
import numpy as np
from av.audio.frame import AudioFrame

from rest_lightning.avatar import Avatar, AvatarFrame, AvatarPool, AvatarSettings, ModelError
from rest_lightning.constants import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME
from rest_lightning.errors import UserError
from rest_lightning.serve.encoder import open_encoder
from rest_lightning.serve.limits import Bucket, Limits
from rest_lightning.serve.metrics import Metrics
from rest_lightning.serve.protocol import (
    Channel,
    ChannelClosed,
    End,
    Hello,
    Identity,
    Interrupt,
    Pcm,
    ProtocolError,
    Speech,
    Stats,
    parse_speech,
    parse_text,
)
from rest_lightning.serve.realtime import (
    RATE_HZ,
    Answer,
    AnswerDone,
    Caption,
    RealtimeClient,
    SpeechStarted,
    Trouble,
)
from rest_lightning.serve.server import PageServer, ServerOptions
from rest_lightning.serve.session import Outlet, SessionOver, say_goodbye
from rest_lightning.serve.uploads import Portraits

_CUSHION_MS = 80
_MAX_WAITING_S = (
    1800.0  # of an answer: a server that is waited for could not tell of an interruption
)
_INTERRUPTS_PER_S, _INTERRUPT_BURST = 4.0, 20.0

Connect = Callable[[], AbstractAsyncContextManager[RealtimeClient]]


@dataclass
class ConverseService:
    """What the conversations of a server share."""

    pool: AvatarPool
    connect: Connect
    portraits: Portraits
    limits: Limits = field(default_factory=Limits)
    metrics: Metrics = field(default_factory=Metrics)
    sessions: set[ConverseSession] = field(default_factory=set)
    encoding: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "encoder"))


class ConverseServer(PageServer):
    """The live page, with a conversation in every session.

    Args:
        pool: of avatars, started; as many as sessions.
        connect: makes a client of the realtime server, for each session.
        options, limits: of the server.
    """

    def __init__(
        self,
        pool: AvatarPool,
        connect: Connect,
        options: ServerOptions | None = None,
        limits: Limits | None = None,
    ) -> None:
        limits = limits or Limits()
        portraits = Portraits(limits.max_portraits, limits.portrait_s)
        self.service = service = ConverseService(pool, connect, portraits, limits)
        size_px = pool.model.size_px
        options = options or ServerOptions()
        super().__init__(options, limits, portraits, service.metrics, service.sessions, size_px)

    async def run_session(self, channel: Channel, token: str, address: str) -> None:
        """Serve one client."""
        reason, said = "ended", "the conversation has ended"
        session = ConverseSession(channel, self.service)
        self.service.sessions.add(session)
        self.metrics.sessions.inc()
        try:
            await session.run()
        except ChannelClosed:
            reason = "gone"
        except (ProtocolError, SessionOver) as error:
            reason, said = error.code, str(error)
        except UserError as error:
            reason, said = "realtime", str(error)
        except ModelError as error:
            self.metrics.model_errors.inc()
            reason, said = "model", str(error)
        finally:
            self.service.sessions.discard(session)
            self.metrics.sessions.dec()
            self.metrics.ended.labels(reason).inc()
            await say_goodbye(channel, reason, said)

    async def is_alive(self) -> bool:
        """Always, as long as the process lives: the model works for whoever asks."""
        return True

    async def aclose(self) -> None:
        """End the threads, after :meth:`stop`."""
        await self.service.pool.aclose()
        self.service.encoding.shutdown(wait=False, cancel_futures=True)


class ConverseSession:
    """State and tasks of one conversation."""

    def __init__(self, channel: Channel, service: ConverseService) -> None:
        self.channel, self.service = channel, service
        self.outlet = Outlet(channel, service.encoding, service.limits.unread_s)
        self.epoch = 0
        now_s, limits = time.monotonic(), service.limits
        self._messages = Bucket(limits.messages_per_s, limits.message_burst, now_s)
        self._speech_s = Bucket(limits.input_rate, limits.input_burst_s, now_s)
        self._interrupts = Bucket(_INTERRUPTS_PER_S, _INTERRUPT_BURST, now_s)
        self._start_s = self._heard_s = now_s
        self._hello = Hello()
        self._keyframe = True
        self._num_spare = 0
        self._items: deque[tuple[int, str]] = deque(
            maxlen=64
        )  # utterances, and the items that they are
        self._heard: dict[str, int] = {}  # pieces of 40 ms of an item that have left
        self._up = _Resampler(SAMPLE_RATE, RATE_HZ)
        self._down = _Resampler(RATE_HZ, SAMPLE_RATE)
        self._sound: Pcm = np.zeros(SAMPLES_PER_FRAME // 4, np.int16)  # of clients that hear 16 kHz
        self._stop: SessionOver | None = None
        self._avatar: Avatar | None = None
        self._realtime: RealtimeClient | None = None

    def stop(self, code: str, said: str) -> None:
        """End the conversation with the next picture."""
        self._stop = SessionOver(code, said)

    @property
    def avatar(self) -> Avatar:
        """The face."""
        assert self._avatar is not None, "no avatar before hello"
        return self._avatar

    @property
    def realtime(self) -> RealtimeClient:
        """The realtime server."""
        assert self._realtime is not None, "no server before hello"
        return self._realtime

    async def run(self) -> None:
        """To the end.

        Raises:
            ChannelClosed: the client has gone.
            ProtocolError: it broke the rules.
            SessionOver: the server ends it.
            UserError: no realtime server.
            ModelError: the model failed.
        """
        limits, portraits = self.service.limits, self.service.portraits
        try:
            async with asyncio.timeout(limits.hello_s):
                hello = self._parse(await self.channel.receive())
        except TimeoutError:
            text = f"expected a hello within {limits.hello_s:g} s, got none"
            raise ProtocolError("hello", text) from None
        if not isinstance(hello, Hello):
            raise ProtocolError("hello", "expected a hello first, got another message")
        self._hello, size_px = hello, self.service.pool.model.size_px
        encoder = await self.outlet.in_thread(lambda: open_encoder(hello.codecs, size_px))
        if encoder is None:
            raise ProtocolError("codec", "expected a codec of h264, jpeg, got none of them")
        self.outlet.encoder = encoder
        try:
            portrait = await self.outlet.in_thread(lambda: portraits.load(hello.portrait, size_px))
        except UserError as error:
            raise ProtocolError("portrait", str(error)) from None
        settings = AvatarSettings(
            seed=hello.seed, sample_rate=RATE_HZ, max_waiting_s=_MAX_WAITING_S
        )
        async with (
            self.service.connect() as self._realtime,
            Avatar(portrait, self.service.pool, settings) as self._avatar,
        ):
            await self.outlet.say(
                "hello",
                version=hello.version,
                size_px=size_px,
                fps=FPS,
                sample_rate_hz=RATE_HZ if hello.version > 1 else SAMPLE_RATE,
                chunk_frames=1,
                lookahead_ms=0,
                codec=encoder.codec,
                codec_string=encoder.codec_string,
                cushion_ms=_CUSHION_MS,
                limits={
                    "session_s": limits.session_s,
                    "idle_s": limits.idle_s,
                    "message_bytes": limits.message_bytes,
                    "input_rate": limits.input_rate,
                    "input_burst_s": limits.input_burst_s,
                },
            )
            await self._converse()

    async def _converse(self) -> None:
        tasks = [asyncio.create_task(each) for each in (self._read(), self._answer(), self._show())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # -- from the client --------------------------------------------------------------------------

    def _parse(self, data: bytes | str) -> object:
        limits = self.service.limits
        if not self._messages.take(1.0, time.monotonic()):
            text = f"expected at most {limits.messages_per_s:g} messages a second, got more"
            raise ProtocolError("flood", text)
        if len(data) > limits.message_bytes:
            text = f"expected messages of at most {limits.message_bytes} bytes, got {len(data)}"
            raise ProtocolError("too_long", text)
        return parse_text(data) if isinstance(data, str) else parse_speech(data)

    async def _read(self) -> None:
        """To the client's end of the conversation."""
        while True:
            received = self._parse(await self.channel.receive())
            self._heard_s = time.monotonic()
            match received:
                case Speech():
                    if not self._speech_s.take(len(received.samples) / SAMPLE_RATE, self._heard_s):
                        rate = self.service.limits.input_rate
                        text = f"expected speech at {rate:g} x real time at most, got it faster"
                        raise ProtocolError("input_rate", text)
                    await self.realtime.send_speech(self._up.push(received.samples))
                case Interrupt():
                    if received.epoch > self.epoch:
                        self.epoch = received.epoch
                        await self._interrupt()
                        item, heard_ms = self._last_item()
                        await self.realtime.cancel(item, heard_ms)
                        await self.outlet.say("interrupted", epoch=self.epoch)
                case Stats():
                    if received.slack_ms is not None and received.slack_ms > 0:
                        # So long do pieces lie at the client: as many are left out where nobody
                        # speaks.
                        self._num_spare = min(FPS, round(received.slack_ms / 1e3 * FPS))
                case Identity():
                    await self._switch(received.portrait)
                case Hello():
                    raise ProtocolError("hello", "expected one hello, got a second one")
                case End():
                    return

    async def _switch(self, name: str) -> None:
        size_px = self.service.pool.model.size_px
        try:
            portrait = await self.outlet.in_thread(
                lambda: self.service.portraits.load(name, size_px)
            )
        except UserError as error:
            await self.outlet.say("error", code="portrait", message=str(error))
            return
        await self.avatar.switch_identity(portrait)
        self._keyframe = True
        await self.outlet.say("identity", portrait=name, frame=self.avatar.stats.num_frames)

    # -- from the realtime server -----------------------------------------------------------------

    async def _answer(self) -> None:
        async for event in self.realtime.events():
            match event:
                case SpeechStarted():
                    if self.avatar.is_speaking:
                        item, heard_ms = self._last_item()
                        await self._interrupt()
                        if self._hello.version > 1:
                            self.epoch += 1
                            await self.outlet.say("interrupt", epoch=self.epoch)
                        if item is not None:
                            await self.realtime.truncate(item, heard_ms)
                case Answer():
                    number = await self.avatar.push_audio(event.samples, RATE_HZ)
                    if not self._items or self._items[-1][0] != number:
                        self._items.append((number, event.item))
                case AnswerDone():
                    await self.avatar.flush()
                case Caption():
                    if self._hello.version > 1:
                        await self.outlet.say("caption", who=event.who, text=event.text)
                case Trouble():
                    await self.outlet.say("error", code="realtime", message=event.text)
        raise SessionOver(
            "realtime", "the realtime server has gone: start it, then reload the page"
        )

    async def _interrupt(self) -> None:
        if not self._interrupts.take(1.0, time.monotonic()):
            text = f"expected at most {_INTERRUPTS_PER_S:g} interruptions a second, got more"
            raise ProtocolError("flood", text)
        self.service.metrics.dropped_s.labels("interrupt").inc(self.avatar.waiting_s)
        self.avatar.interrupt()
        self._keyframe = True

    def _last_item(self) -> tuple[str | None, int]:
        """What is being said, and how much of it has left, in ms."""
        if not self._items or not self.avatar.is_speaking:
            return None, 0
        item = self._items[-1][1]
        return item, round(1000 * self._heard.get(item, 0) / FPS)

    # -- to the client ----------------------------------------------------------------------------

    async def _show(self) -> None:
        limits = self.service.limits
        async for frame in self.avatar.run():
            now_s = time.monotonic()
            if self._stop is not None:
                raise self._stop
            if now_s - self._start_s > limits.session_s:
                text = f"a session lasts {limits.session_s / 60:g} minutes: start a new one"
                raise SessionOver("too_long", text)
            if now_s - self._heard_s > limits.idle_s:
                text = f"nothing was sent for {limits.idle_s / 60:g} minutes: start a new session"
                raise SessionOver("idle", text)
            await self._send(frame)

    async def _send(self, frame: AvatarFrame) -> None:
        if self._num_spare and not frame.is_speech:
            self._num_spare -= 1
            return
        sound = frame.samples.astype(np.int16, copy=False)
        if self._hello.version == 1:
            self._sound = np.concatenate([self._sound, self._down.push(sound)])
            sound, self._sound = self._sound[:SAMPLES_PER_FRAME], self._sound[SAMPLES_PER_FRAME:]
        item = next((item for number, item in self._items if number == frame.utterance), None)
        if item is not None:
            self._heard = {item: self._heard.get(item, 0) + 1}
        keyframe, self._keyframe = self._keyframe, False
        await self.outlet.send_chunk(
            sound,
            frame.picture[None],
            self.epoch,
            frame.index,
            idle=not frame.is_speech,
            keyframe=keyframe,
            wanted=lambda: True,
        )
        self.service.metrics.frames.inc()


class _Resampler:
    """s16 mono from one rate to another, block by block."""

    def __init__(self, from_hz: int, to_hz: int) -> None:
        self._from_hz = from_hz
        self._resampler = av.AudioResampler("s16", "mono", to_hz)

    def push(self, samples: Pcm) -> Pcm:
        if not len(samples):
            return samples
        frame = AudioFrame.from_ndarray(
            np.ascontiguousarray(samples[None]), format="s16", layout="mono"
        )
        frame.sample_rate = self._from_hz
        frame.pts = None
        pieces = [piece.to_ndarray()[0] for piece in self._resampler.resample(frame)]
        return np.concatenate([np.zeros(0, np.int16), *pieces])
