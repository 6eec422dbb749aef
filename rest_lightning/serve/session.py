"""One session: speech comes in through a channel and goes to an avatar, whose pictures and sound go
out, 40 ms at a time, in step with a clock.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import count, groupby
from typing import TypeVar

import numpy as np

from rest_lightning.avatar import (
    FRAME_S,
    Avatar,
    AvatarFrame,
    AvatarPool,
    AvatarSettings,
    ModelError,
)
from rest_lightning.constants import FPS, SAMPLE_RATE
from rest_lightning.errors import UserError
from rest_lightning.serve.encoder import FrameEncoder, open_encoder
from rest_lightning.serve.limits import Bucket, Limits
from rest_lightning.serve.metrics import LOG, Metrics
from rest_lightning.serve.protocol import (
    IDLE,
    KEYFRAME,
    MAX_EPOCH,
    SOUND,
    Channel,
    ChannelClosed,
    End,
    Flush,
    Format,
    Hello,
    Identity,
    Interrupt,
    Pcm,
    ProtocolError,
    Record,
    Speech,
    Stats,
    message,
    pack,
    parse_speech,
    parse_text,
)
from rest_lightning.serve.recording import Recorder, Recordings
from rest_lightning.serve.uploads import Portraits

CUSHION_MS = 80  # at the client, against the network; the model's time is the avatar's affair
_FIRST_FRAMES = 4  # sent while the others are being encoded
_INTERRUPTS_PER_S, _INTERRUPT_BURST = 4.0, 20.0  # each lets the model begin a chunk at once
_RECORDINGS_PER_S, _RECORDING_BURST = 0.2, 10.0  # each opens an encoder, and signs a file
# Of speech that nothing is dropped of: whoever let a client wait could not hear it interrupt.
_MAX_WAITING_S = 1800.0
_MAX_DELAY_S, _DELAY_EVERY_S = 1.0, 3.0
_numbers = count(1)
_Result = TypeVar("_Result")

# -- the way to a client ---------------------------------------------------------------------------


class SessionOver(Exception):
    """The server ends a session; ``code`` is for programs, the message is one line for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Outlet:
    """The way to a client.

    Args:
        channel: the connection.
        encoding: threads for what would keep the network waiting.
        unread_s: a client that lets a message wait for longer is given up (SessionOver).

    Attributes:
        encoder: of the pictures; to be set before the first one.
    """

    encoder: FrameEncoder

    def __init__(self, channel: Channel, encoding: Executor, unread_s: float) -> None:
        self._channel, self._encoding, self._unread_s = channel, encoding, unread_s

    async def say(self, kind: str, **fields: object) -> None:
        """Sends a text message."""
        await self._patiently(self._channel.send_text(message(kind, **fields)))

    async def encode(self, pictures: list[np.ndarray], keyframe: bool) -> list[tuple[bytes, bool]]:
        """Pictures as bytes, and whether each can be decoded on its own.

        Args:
            pictures: in their order.
            keyframe: whether the first one must be one.
        """

        def encode() -> list[tuple[bytes, bool]]:
            return [
                self.encoder.encode(picture, keyframe and place == 0)
                for place, picture in enumerate(pictures)
            ]

        return await self.in_thread(encode)

    async def send_sound(self, sound: Pcm, epoch: int, index: int, *, idle: bool) -> None:
        """Sends sound (n,) or (n, channels).

        Args:
            sound, epoch: what is sent.
            index: of the first picture that it belongs to.
            idle: whether it is the server's silence.
        """
        flags = IDLE if idle else 0
        data = sound.astype("<i2", copy=False).tobytes()
        await self._patiently(
            self._channel.send_bytes(pack(SOUND, flags, epoch, index, len(sound), data))
        )

    async def send_picture(
        self, encoded: tuple[bytes, bool], epoch: int, index: int, *, idle: bool
    ) -> None:
        """Sends an encoded picture; ``idle``: whether nobody speaks in it."""
        data, is_key = encoded
        flags = (IDLE if idle else 0) | (KEYFRAME if is_key else 0)
        await self._patiently(
            self._channel.send_bytes(pack(self.encoder.kind, flags, epoch, index, 1, data))
        )

    def close(self) -> None:
        """Lets the encoder go, with its memory and threads, whoever still refers to the outlet."""
        vars(self).pop("encoder", None)

    async def in_thread(self, call: Callable[[], _Result]) -> _Result:
        """Runs what would keep the network waiting."""
        return await asyncio.get_running_loop().run_in_executor(self._encoding, call)

    async def _patiently(self, sending: Coroutine[None, None, None]) -> None:
        try:
            async with asyncio.timeout(self._unread_s):
                await sending
        except TimeoutError:
            text = f"what was sent was not read for {self._unread_s:g} s: reload the page"
            raise SessionOver("unread", text) from None


# -- sessions of a server --------------------------------------------------------------------------


@dataclass
class Service:
    """What the sessions of a server share: nothing of a user's.

    Attributes:
        new_session: makes the session of a client.
        recordings: where the server records and signs what it sends; None: it does not.
    """

    pool: AvatarPool
    portraits: Portraits
    limits: Limits = field(default_factory=Limits)
    metrics: Metrics = field(default_factory=Metrics)
    sessions: set[Session] = field(default_factory=set)
    encoding: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "encoder"))
    new_session: NewSession = field(default_factory=lambda: Session)
    recordings: Recordings | None = None

    async def aclose(self) -> None:
        """End the threads."""
        await self.pool.aclose()
        self.encoding.shutdown(wait=False, cancel_futures=True)


async def run_session(channel: Channel, service: Service, address: str = "") -> str:
    """Serve one client to the end; the channel is closed then, and nothing of the session is left.

    Args:
        channel: the connection; any transport will do.
        service: model, portraits, limits, metrics.
        address: of the client, for the log.

    Returns:
        Why it ended, in one word: ended, gone, idle, too_long, unread, model, stopping, full,
            realtime, or a protocol error's.
    """
    is_full = len(service.sessions) >= service.pool.num_avatars
    session = None if is_full else service.new_session(channel, service)
    number = next(_numbers)
    LOG.info("session begins", extra={"session": number, "address": address})
    reason, said = "ended", "the session has ended"
    service.metrics.sessions.inc()
    start_s = time.monotonic()
    try:
        if session is None:
            raise SessionOver("full", "the server is full: try again later")
        service.sessions.add(session)
        await session.run()
    except ChannelClosed:
        reason = "gone"
    except (ProtocolError, SessionOver) as error:
        reason, said = error.code, str(error)
    except ModelError as error:
        service.metrics.model_errors.inc()
        LOG.warning("the model failed", exc_info=error.__cause__)
        reason, said = "model", "the model failed in this session: start a new one"
    except asyncio.CancelledError:
        reason = "cancelled"
        raise
    except Exception:
        LOG.exception("session failed", extra={"session": number})
        reason, said = "internal", "the server failed in this session: start a new one"
    finally:
        if session is not None:
            service.sessions.discard(session)
        service.metrics.sessions.dec()
        service.metrics.ended.labels(reason).inc()
        LOG.info(
            "session ended",
            extra={
                "session": number,
                "address": address,
                "reason": reason,
                "seconds": round(time.monotonic() - start_s, 1),
                "frames": session.num_frames if session is not None else 0,
            },
        )
        await say_goodbye(channel, reason, said)
    return reason


async def say_goodbye(channel: Channel, reason: str, said: str) -> None:
    """Tells the client why, as far as it still listens."""
    try:
        async with asyncio.timeout(1.0):
            if reason not in ("ended", "gone", "cancelled"):
                await channel.send_text(message("error", code=reason, message=said))
            if reason != "gone":
                await channel.send_text(message("bye", reason=said))
    except (ChannelClosed, TimeoutError):
        pass
    await channel.close()


# -- one session -----------------------------------------------------------------------------------


@dataclass
class _Spoken:
    """An utterance on its way through the avatar: its first sample within the epoch, and how many
    there are.
    """

    index: int
    num_samples: int = 0


class Session:
    """State and tasks of one client, whose speech the avatar says; see :func:`run_session`.

    Silence, cushions and interruptions are those of :class:`rest_lightning.avatar.Avatar`.
    """

    def __init__(self, channel: Channel, service: Service) -> None:
        self.channel, self.service = channel, service
        self.outlet = Outlet(channel, service.encoding, service.limits.unread_s)
        self.hello = Hello()
        self.epoch = 0
        now_s, limits = _now(), service.limits
        self._messages = Bucket(limits.messages_per_s, limits.message_burst, now_s)
        self._speech_s = Bucket(limits.input_rate, limits.input_burst_s, now_s)
        self._interrupts = Bucket(_INTERRUPTS_PER_S, _INTERRUPT_BURST, now_s)
        self._records = Bucket(_RECORDINGS_PER_S, _RECORDING_BURST, now_s)
        self._recorder: Recorder | None = None
        self._start_s = self._heard_s = self._settled_s = now_s
        self._avatar: Avatar | None = None
        self._stop: SessionOver | None = None
        self._has_ended = False
        self._format = Format(SAMPLE_RATE, 1)  # of the client's speech
        self._sound_format = Format(SAMPLE_RATE, 1)  # of what it hears
        self._next_index = 0
        self._spoken: dict[int, _Spoken] = {}
        self._names: dict[int, str] = {}  # of portraits that are not shown yet
        self._identity = 0
        self._keyframe = True
        self._told: object = None  # what the last picture's chunk was computed in
        self._lost_s = [0.0, 0.0]
        self._early_s = math.inf  # of what was sent since the client last told its slack

    @property
    def avatar(self) -> Avatar:
        """The face."""
        assert self._avatar is not None, "no avatar before hello"
        return self._avatar

    @property
    def num_frames(self) -> int:
        """Pictures so far."""
        return 0 if self._avatar is None else self._avatar.stats.num_frames

    def stop(self, code: str, said: str) -> None:
        """End the session with the next picture."""
        self._stop = SessionOver(code, said)

    async def run(self) -> None:
        """To the end.

        Raises:
            ChannelClosed: the client has gone.
            ProtocolError: it broke the rules.
            SessionOver: the server ends it.
            ModelError: the model failed.
        """
        portrait = await self._greet()
        async with AsyncExitStack() as stack:
            await self._enter(stack)
            recordings, pool = self.service.recordings, self.service.pool
            if recordings is not None and self.hello.version > 1:
                self._recorder = Recorder(recordings, self.outlet.say, pool.model.size_px)
                stack.push_async_callback(self._recorder.aclose)
            avatar = Avatar(portrait, pool, self._settings())
            self._avatar = await stack.enter_async_context(avatar)
            await self._answer_hello()
            tasks = [asyncio.create_task(each) for each in self._jobs()]
            task: asyncio.Task[None] | None
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                # An error refers to this frame, and this frame to the error: without a collection
                # of garbage neither would end, nor what they hold.
                tasks, done, task = [], set(), None
                self.outlet.close()

    # -- what kinds of sessions differ in ----------------------------------------------------------

    def _settings(self) -> AvatarSettings:
        return AvatarSettings(
            seed=self.hello.seed,
            sample_rate=SAMPLE_RATE,
            max_waiting_s=_MAX_WAITING_S,
            is_live=self.hello.live,
        )

    async def _enter(self, stack: AsyncExitStack) -> None:
        """Opens what a session needs beside its avatar."""

    def _jobs(self) -> list[Coroutine[None, None, None]]:
        """What runs at the same time; the session ends with the first that does."""
        return [self._read(), self._show()]

    async def _hear(self, speech: Speech) -> None:
        """Gives the client's speech to the avatar."""
        num_samples = len(speech.samples)
        if speech.epoch < self.epoch:
            lost_s = num_samples / self._format.sample_rate_hz
            self.service.metrics.dropped_s.labels("epoch").inc(lost_s)
            return
        self._raise_epoch(speech.epoch)
        if speech.index < self._next_index:
            raise ProtocolError(
                "index",
                f"expected speech from sample {self._next_index} of the epoch on, got sample "
                f"{speech.index}",
            )
        if not num_samples or self._has_ended:
            return
        if speech.index > self._next_index:  # what was said before a gap is an utterance
            await self.avatar.flush()
        self._next_index = speech.index + num_samples
        number = await self.avatar.push_audio(speech.samples, self._format.sample_rate_hz)
        self._spoken.setdefault(number, _Spoken(speech.index)).num_samples += num_samples

    async def _flush(self) -> None:
        """Ends the utterance that the client's speech belongs to."""
        await self.avatar.flush()

    async def _be_interrupted(self, epoch: int) -> None:
        """The client says that everything of older epochs is void."""
        if epoch >= self.epoch:
            self._raise_epoch(epoch)
            await self.outlet.say("interrupted", epoch=epoch)

    def _sound_of(self, frame: AvatarFrame) -> Pcm:
        """What is sent of a frame's sound."""
        return frame.samples.astype(np.int16, copy=False)

    # -- from the client ---------------------------------------------------------------------------

    async def _greet(self) -> object:
        """Waits for the hello, and opens what it names; returns the portrait."""
        limits = self.service.limits
        try:
            async with asyncio.timeout(limits.hello_s):
                hello = self._parse(await self.channel.receive())
        except TimeoutError:
            text = f"expected a hello within {limits.hello_s:g} s, got none"
            raise ProtocolError("hello", text) from None
        if not isinstance(hello, Hello):
            raise ProtocolError("hello", "expected a hello first, got another message")
        self.hello = hello
        size_px = self.service.pool.model.size_px
        encoder = await self.outlet.in_thread(lambda: open_encoder(hello.codecs, size_px))
        if encoder is None:
            raise ProtocolError("codec", "expected a codec of h264, jpeg, got none of them")
        self.outlet.encoder = encoder
        try:
            return await self._load(hello.portrait)
        except UserError as error:
            raise ProtocolError("portrait", str(error)) from None

    async def _load(self, name: str | None) -> object:
        size_px, portraits = self.service.pool.model.size_px, self.service.portraits
        return await self.outlet.in_thread(lambda: portraits.load(name, size_px))

    async def _answer_hello(self) -> None:
        limits, pool, encoder = self.service.limits, self.service.pool, self.outlet.encoder
        records = {} if self._recorder is None else {"record_s": limits.record_s}
        await self.outlet.say(
            "hello",
            version=self.hello.version,
            size_px=pool.model.size_px,
            fps=FPS,
            sample_rate_hz=self._sound_format.sample_rate_hz,
            chunk_frames=pool.chunk_frames if self._settings().is_live else 1,
            lookahead_ms=round(1e3 * pool.lookahead_frames * FRAME_S),
            codec=encoder.codec,
            codec_string=encoder.codec_string,
            cushion_ms=CUSHION_MS,
            limits={
                "session_s": limits.session_s,
                "idle_s": limits.idle_s,
                "message_bytes": limits.message_bytes,
                "input_rate": limits.input_rate,
                "input_burst_s": limits.input_burst_s,
                **records,
            },
        )

    def _parse(self, data: bytes | str) -> object:
        limits = self.service.limits
        if not self._messages.take(1.0, _now()):
            text = f"expected at most {limits.messages_per_s:g} messages a second, got more"
            raise ProtocolError("flood", text)
        if len(data) > limits.message_bytes:
            text = f"expected messages of at most {limits.message_bytes} bytes, got {len(data)}"
            raise ProtocolError("too_long", text)
        if isinstance(data, str):
            return parse_text(data)
        return parse_speech(data, self._format.channels)

    async def _read(self) -> None:
        while True:
            received = self._parse(await self.channel.receive())
            if isinstance(received, Stats):
                self._note(received)
                continue
            self._heard_s = _now()
            match received:
                case Speech():
                    seconds = len(received.samples) / self._format.sample_rate_hz
                    if not self._speech_s.take(seconds, self._heard_s):
                        rate = self.service.limits.input_rate
                        text = f"expected speech at {rate:g} x real time at most, got it faster"
                        raise ProtocolError("input_rate", text)
                    await self._hear(received)
                case Interrupt():
                    await self._be_interrupted(received.epoch)
                case Identity():
                    await self._switch_identity(received.portrait)
                case Flush():
                    await self._flush()
                case Format():
                    await self._flush()
                    self._format = received
                case Record():
                    await self._record(received.on)
                case Hello():
                    raise ProtocolError("hello", "expected one hello, got a second one")
                case End():
                    self._has_ended = True
                    await self.avatar.flush()

    def _raise_epoch(self, epoch: int) -> None:
        if epoch == self.epoch:
            return
        if epoch > self.epoch + 1 or epoch == MAX_EPOCH:
            raise ProtocolError(
                "epoch", f"expected epoch {self.epoch} or {self.epoch + 1}, got {epoch}"
            )
        self._interrupt()
        self.epoch, self._next_index = epoch, 0

    def _interrupt(self) -> None:
        if not self._interrupts.take(1.0, _now()):
            text = f"expected at most {_INTERRUPTS_PER_S:g} interruptions a second, got more"
            raise ProtocolError("flood", text)
        self.service.metrics.dropped_s.labels("interrupt").inc(self.avatar.waiting_s)
        self.avatar.interrupt()
        self._spoken.clear()
        self._keyframe = True

    async def _switch_identity(self, name: str) -> None:
        try:
            portrait = await self._load(name)
        except UserError as error:
            await self.outlet.say("error", code="portrait", message=str(error))
            return
        self._names[await self.avatar.switch_identity(portrait)] = name

    async def _record(self, on: bool) -> None:
        if self._recorder is None:
            text = "expected a server that records (--sign), got one that does not"
            await self.outlet.say("error", code="record", message=text)
        elif not on:
            self._recorder.stop()
        elif self._records.take(1.0, _now()):
            await self._recorder.start()
        else:
            text = f"expected at most {60 * _RECORDINGS_PER_S:g} recordings a minute, got more"
            raise ProtocolError("flood", text)

    def _note(self, stats: Stats) -> None:
        if stats.offset_ms is not None:
            self.service.metrics.offset_s.observe(stats.offset_ms / 1e3)
        if stats.slack_ms is not None and stats.slack_ms > 0:
            # So long does at the client lie what was not sent early: it can come so much later, and
            # the client is nearer to what is said then.
            spare_s = stats.slack_ms / 1e3 - self._early_s
            if spare_s > 0 and _now() > self._settled_s:
                self.avatar.delay(min(spare_s, _MAX_DELAY_S))
                self._settled_s = _now() + _DELAY_EVERY_S
            self._early_s = math.inf

    # -- to the client -----------------------------------------------------------------------------

    async def _show(self) -> None:
        limits = self.service.limits
        async for frame in self.avatar.run():
            now_s = _now()
            if self._stop is not None:
                raise self._stop
            if now_s - self._start_s > limits.session_s:
                text = f"a session lasts {limits.session_s / 60:g} minutes: start a new one"
                raise SessionOver("too_long", text)
            if now_s - self._heard_s > limits.idle_s:
                text = f"nothing was sent for {limits.idle_s / 60:g} minutes: start a new session"
                raise SessionOver("idle", text)
            frames = [frame, *self.avatar.take_early()]
            early_s = self.avatar.ahead_s - len(frames) * FRAME_S
            self._early_s = min(self._early_s, max(0.0, early_s))
            is_over = self._has_ended and not self.avatar.is_speaking
            while is_over and len(frames) > 1 and not frames[-1].is_speech:
                frames.pop()  # pictures end with the speech
            for _, alike in groupby(frames, key=_kind_of):
                if frame.epoch == self.avatar.epoch:  # else the rest is void
                    await self._send(list(alike))
            if is_over:
                return

    async def _send(self, frames: list[AvatarFrame]) -> None:
        """Sends pictures with their sound, which is of one kind, and the account of both."""
        first = frames[0]
        if first.identity != self._identity:
            self._identity, self._keyframe = first.identity, True
            name = self._names[first.identity]
            self._names = {n: each for n, each in self._names.items() if n > first.identity}
            await self.outlet.say("identity", portrait=name, frame=first.index)
        self._count_losses()
        is_idle = not any(frame.is_speech for frame in frames)
        sounds = [self._sound_of(frame) for frame in frames]
        encode_s, epoch = 0.0, self.epoch
        num_sent = 0
        for start, stop in ((0, _FIRST_FRAMES), (_FIRST_FRAMES, len(frames))):
            if start >= len(frames):
                break
            start_s = time.perf_counter()
            encoded = await self._encode(frames[start:stop])
            encode_s += time.perf_counter() - start_s
            if epoch != self.epoch:
                # Interrupted: of what was said nothing follows, but the face goes on from here.
                if start:
                    break
                frames, encoded = frames[:1], await self._encode(frames[:1])
                epoch, is_idle = self.epoch, True
                sounds = [np.zeros_like(sounds[0])]
            if not start and len(sound := np.concatenate(sounds)):
                await self._tell_format(first, sound)
                await self.outlet.send_sound(sound, epoch, first.index, idle=is_idle)
            for frame, picture in zip(frames[start:stop], encoded, strict=True):
                if epoch != self.epoch:
                    break
                await self.outlet.send_picture(picture, epoch, frame.index, idle=is_idle)
                self._note_sent(frame, sounds[num_sent])
                num_sent += 1
        computed = first.computed if first.computed is not self._told else None
        self._told = frames[-1].computed
        self.service.metrics.chunk(computed, num_sent, encode_s, idle=is_idle)
        if epoch != self.epoch:
            return
        if self.hello.version > 1 and not is_idle:
            for frame in frames:
                if frame.ends:
                    await self.outlet.say("flushed", frame=frame.index)
        await self._account_for(frames, epoch, encode_s, is_idle)

    def _note_sent(self, frame: AvatarFrame, sound: Pcm) -> None:
        if self._recorder is not None:
            self._recorder.add(frame.index, frame.picture, sound, frame.sample_rate)

    async def _encode(self, frames: list[AvatarFrame]) -> list[tuple[bytes, bool]]:
        keyframe, self._keyframe = self._keyframe, False
        return await self.outlet.encode([frame.picture for frame in frames], keyframe)

    async def _account_for(
        self, frames: list[AvatarFrame], epoch: int, encode_s: float, is_idle: bool
    ) -> None:
        last_index, num_speech, position = None, 0, 0
        for frame in frames:
            utterance = -1 if is_idle or frame.utterance is None else frame.utterance
            spoken = self._spoken.get(utterance)
            if spoken is not None:
                count = min(len(frame.samples), spoken.num_samples - frame.offset)
                last_index = spoken.index + frame.offset + count - 1
                num_speech = position + count
                for number in [each for each in self._spoken if each < utterance]:
                    del self._spoken[number]
            position += len(frame.samples)
        computed = frames[0].computed
        await self.outlet.say(
            "chunk",
            index=frames[0].index,
            frames=len(frames),
            epoch=epoch,
            compute_ms=0.0 if computed is None else round(computed.compute_ms, 1),
            queued_ms=0.0 if computed is None else round(computed.queued_ms, 1),
            encode_ms=round(1e3 * encode_s, 1),
            rows=0 if computed is None else computed.num_rows,
            input_sample=last_index,
            speech_samples=num_speech,
            dropped_s=round(self.avatar.stats.overrun_s, 2),
        )

    async def _tell_format(self, frame: AvatarFrame, sound: Pcm) -> None:
        given = Format(frame.sample_rate, 1 if sound.ndim == 1 else sound.shape[1])
        if self.hello.version > 1 and given != self._sound_format:
            self._sound_format = given
            await self.outlet.say(
                "format", sample_rate_hz=given.sample_rate_hz, channels=given.channels
            )

    def _count_losses(self) -> None:
        stats, lost_s = self.avatar.stats, self.service.metrics.dropped_s
        new_s = [stats.overrun_s, stats.left_out_s]
        self._keyframe |= new_s[0] > self._lost_s[0]
        for reason, now_s, before_s in zip(("queue", "trim"), new_s, self._lost_s, strict=True):
            lost_s.labels(reason).inc(now_s - before_s)
        self._lost_s = new_s


NewSession = Callable[[Channel, Service], Session]


def _kind_of(frame: AvatarFrame) -> tuple[object, ...]:
    """What pictures that are sent together have in common."""
    return frame.identity, frame.sample_rate, frame.samples.shape[1:]


def _now() -> float:
    return asyncio.get_running_loop().time()
