"""One session: speech comes in through a channel, pictures and sound go out, chunk by chunk, in
step with a clock.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import count, pairwise
from typing import TypeVar

from rest_lightning.constants import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME
from rest_lightning.errors import UserError
from rest_lightning.serve.encoder import FrameEncoder, open_encoder
from rest_lightning.serve.intake import Intake, Piece
from rest_lightning.serve.limits import Bucket, Limits
from rest_lightning.serve.metrics import LOG, Metrics
from rest_lightning.serve.protocol import (
    IDLE,
    KEYFRAME,
    MAX_EPOCH,
    SOUND,
    Channel,
    ChannelClosed,
    Hello,
    Identity,
    Interrupt,
    Pcm,
    ProtocolError,
    Speech,
    Stats,
    message,
    num_frames_of,
    pack,
    parse_speech,
    parse_text,
)
from rest_lightning.serve.scheduler import Computed, ModelError, Scheduler, Slot
from rest_lightning.serve.uploads import Portraits
from rest_lightning.streaming.device import Frames

# -- what a session sends --------------------------------------------------------------------------

_FIRST_FRAMES = 4  # sent while the others are being encoded
_Result = TypeVar("_Result")


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
        encoder: of the frames; to be set before the first chunk.
    """

    encoder: FrameEncoder

    def __init__(self, channel: Channel, encoding: Executor, unread_s: float) -> None:
        self._channel, self._encoding, self._unread_s = channel, encoding, unread_s

    async def say(self, kind: str, **fields: object) -> None:
        """Sends a text message."""
        await self._patiently(self._channel.send_text(message(kind, **fields)))

    async def send_chunk(
        self,
        sound: Pcm,
        frames: Frames,
        epoch: int,
        first: int,
        *,
        idle: bool,
        keyframe: bool,
        wanted: Callable[[], bool],
    ) -> float | None:
        """Sends sound (640 n,) and frames (n, H, W, 3) that belong to it.

        Args:
            sound, frames, epoch: what is sent.
            first: index of the first frame.
            idle: whether the sound is the server's silence.
            keyframe: whether the first frame must be one.
            wanted: asked before every frame; the rest is kept back when it says no.

        Returns:
            Seconds spent encoding; None when not everything was sent.
        """
        flags = IDLE if idle else 0
        if len(sound):
            data = sound.astype("<i2", copy=False).tobytes()
            await self._patiently(
                self._channel.send_bytes(pack(SOUND, flags, epoch, first, len(sound), data))
            )
        encode_s = 0.0
        for start, stop in ((0, _FIRST_FRAMES), (_FIRST_FRAMES, len(frames))):
            begin_s = time.perf_counter()
            encoded = await self.in_thread(partial(self._encode, frames[start:stop], keyframe))
            keyframe = False
            encode_s += time.perf_counter() - begin_s
            for index, (data, is_key) in enumerate(encoded, first + start):
                if not wanted():
                    return None
                kind, mark = self.encoder.kind, flags | (KEYFRAME if is_key else 0)
                await self._patiently(
                    self._channel.send_bytes(pack(kind, mark, epoch, index, 1, data))
                )
        return encode_s

    def _encode(self, frames: Frames, keyframe: bool) -> list[tuple[bytes, bool]]:
        return [
            self.encoder.encode(pixels, keyframe and place == 0)
            for place, pixels in enumerate(frames)
        ]

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


CUSHION_MS, MAX_CUSHION_MS = 80, 300
_INTERRUPTS_PER_S, _INTERRUPT_BURST = 4.0, 20.0  # each lets the model begin a chunk at once
_numbers = count(1)


@dataclass
class Service:
    """What the sessions of a server share: nothing of a user's."""

    scheduler: Scheduler
    portraits: Portraits
    limits: Limits = field(default_factory=Limits)
    metrics: Metrics = field(default_factory=Metrics)
    sessions: set[Session] = field(default_factory=set)
    encoding: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "encoder"))

    def begin_s(self, now_s: float, chunk_s: float) -> float:
        """When a new session should begin, so that its chunks fall due where other sessions' chunks
        do not.

        In the middle of the largest gap between them, less than a chunk from now.
        """
        phases = sorted(
            (session.due_s - now_s) % chunk_s
            for session in self.sessions
            if session.due_s is not None
        )
        if not phases:
            return now_s
        gaps = [
            (after - before, before) for before, after in pairwise([*phases, phases[0] + chunk_s])
        ]
        length, begin_s = max(gaps)
        return now_s + (begin_s + length / 2) % chunk_s

    @property
    def cushion_ms(self) -> int:
        """What a client should keep ready: beside other sessions, one of whose chunks may just be
        in work, more.
        """
        took_ms = self.scheduler.warm_up_ms[:1] if len(self.sessions) > 1 else []
        return min(MAX_CUSHION_MS, CUSHION_MS + round(sum(took_ms)))

    def close(self) -> None:
        """End the threads."""
        self.scheduler.close()
        self.encoding.shutdown(wait=False, cancel_futures=True)


async def run_session(channel: Channel, service: Service, address: str = "") -> str:
    """Serve one client to the end; the channel is closed then, and nothing of the session is left.

    Args:
        channel: the connection; any transport will do.
        service: model, portraits, limits, metrics.
        address: of the client, for the log.

    Returns:
        Why it ended, in one word: ended, gone, idle, too_long, unread, model, stopping, full, or a
            protocol error's.
    """
    slot = service.scheduler.acquire()
    session = Session(channel, service, slot) if slot is not None else None
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
    except asyncio.CancelledError:
        reason = "cancelled"
        raise
    except Exception:
        LOG.exception("session failed", extra={"session": number})
        reason, said = "internal", "the server failed in this session: start a new one"
    finally:
        if session is not None and slot is not None:
            service.sessions.discard(session)
            slot.release()
        service.metrics.sessions.dec()
        service.metrics.ended.labels(reason).inc()
        num_frames = session.num_frames if session is not None else 0
        LOG.info(
            "session ended",
            extra={
                "session": number,
                "address": address,
                "reason": reason,
                "seconds": round(time.monotonic() - start_s, 1),
                "frames": num_frames,
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


class Session:
    """State and tasks of one client; see :func:`run_session`."""

    def __init__(self, channel: Channel, service: Service, slot: Slot) -> None:
        self.channel, self.service, self.slot = channel, service, slot
        self.outlet = Outlet(channel, service.encoding, service.limits.unread_s)
        self.epoch = self.num_frames = 0
        now_s = time.monotonic()
        limits = service.limits
        self._next_index = 0
        self._speech_s = Bucket(limits.input_rate, limits.input_burst_s, now_s)
        self._messages = Bucket(limits.messages_per_s, limits.message_burst, now_s)
        self._start_s = self._heard_s = now_s
        self._portrait: str | None = None  # to be shown from the next chunk on
        self._keyframe = True
        self._stop: SessionOver | None = None
        self._changed = asyncio.Event()
        self._interrupts = Bucket(_INTERRUPTS_PER_S, _INTERRUPT_BURST, now_s)
        self._intake: Intake | None = None

    @property
    def due_s(self) -> float | None:
        """When the next chunk should be complete; None before the first."""
        return None if self._intake is None else self._intake.due_s

    @property
    def intake(self) -> Intake:
        """The speech that waits."""
        assert self._intake is not None, "speech before hello"
        return self._intake

    def stop(self, code: str, said: str) -> None:
        """End the session after the chunk that it is at."""
        self._stop = SessionOver(code, said)
        self._changed.set()

    async def run(self) -> None:
        """To the end.

        Raises:
            ChannelClosed: the client has gone; ProtocolError: it broke the rules; SessionOver: the
                server ends it.
        """
        await self._begin()
        task: asyncio.Task[None] | None
        tasks = {asyncio.create_task(self._read()), asyncio.create_task(self._produce())}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            # An error refers to this frame, and this frame to the error: without a collection of
            # garbage neither would end, nor what they hold.
            tasks, done, task, self._stop = set(), set(), None, None
            self.outlet.close()

    # -- from the client ---------------------------------------------------------------------------

    async def _begin(self) -> None:
        limits, scheduler = self.service.limits, self.service.scheduler
        size_px = scheduler.model.size_px
        try:
            async with asyncio.timeout(limits.hello_s):
                hello = self._parse(await self.channel.receive())
        except TimeoutError:
            raise ProtocolError(
                "hello", f"expected a hello within {limits.hello_s:g} s, got none"
            ) from None
        if not isinstance(hello, Hello):
            raise ProtocolError("hello", "expected a hello first, got another message")
        encoder = await self.outlet.in_thread(lambda: open_encoder(hello.codecs, size_px))
        if encoder is None:
            raise ProtocolError("codec", "expected a codec of h264, jpeg, got none of them")
        self.outlet.encoder = encoder
        try:
            portrait = await self.outlet.in_thread(
                lambda: self.service.portraits.load(hello.portrait, size_px)
            )
        except UserError as error:
            raise ProtocolError("portrait", str(error)) from None
        await asyncio.wrap_future(self.slot.start(portrait, hello.seed))
        fields: dict[str, object] = {
            "version": hello.version,
            "size_px": size_px,
            "fps": FPS,
            "sample_rate_hz": SAMPLE_RATE,
            "chunk_frames": scheduler.chunk_frames,
            "lookahead_ms": round(1e3 * scheduler.lookahead_samples / SAMPLE_RATE),
            "codec": encoder.codec,
            "codec_string": encoder.codec_string,
            "cushion_ms": self.service.cushion_ms,
            "limits": {
                "session_s": limits.session_s,
                "idle_s": limits.idle_s,
                "message_bytes": limits.message_bytes,
                "input_rate": limits.input_rate,
                "input_burst_s": limits.input_burst_s,
            },
        }
        await self.outlet.say("hello", **fields)
        begin_s = self.service.begin_s(time.monotonic(), scheduler.chunk_samples / SAMPLE_RATE)
        self._intake = Intake(scheduler.chunk_samples, scheduler.lookahead_samples, begin_s)

    def _parse(self, data: bytes | str) -> object:
        now_s = time.monotonic()
        if not self._messages.take(1.0, now_s):
            raise ProtocolError(
                "flood", f"expected at most {self._messages.rate:g} messages a second, got more"
            )
        if len(data) > self.service.limits.message_bytes:
            most = self.service.limits.message_bytes
            raise ProtocolError(
                "too_long", f"expected messages of at most {most} bytes, got {len(data)}"
            )
        return parse_text(data) if isinstance(data, str) else parse_speech(data)

    async def _read(self) -> None:
        while True:
            received = self._parse(await self.channel.receive())
            match received:
                case Speech():
                    self._hear(received)
                case Interrupt():
                    await self._interrupt(received.epoch)
                case Identity():
                    self._portrait = received.portrait  # of several before a chunk, the last
                case Stats():
                    self._note(received)
                    continue
                case Hello():
                    raise ProtocolError("hello", "expected one hello, got a second one")
                case _:
                    self.intake.finish(time.monotonic())
            self._heard_s = time.monotonic()
            self._changed.set()

    def _hear(self, speech: Speech) -> None:
        now_s = time.monotonic()
        if not self._speech_s.take(len(speech.samples) / SAMPLE_RATE, now_s):
            rate = self.service.limits.input_rate
            raise ProtocolError(
                "input_rate", f"expected speech at {rate:g} x real time at most, got it faster"
            )
        if speech.epoch < self.epoch:
            self.service.metrics.dropped_s.labels("epoch").inc(len(speech.samples) / SAMPLE_RATE)
            return
        self._raise_epoch(speech.epoch)
        if speech.index < self._next_index:
            raise ProtocolError(
                "index",
                (
                    f"expected speech from sample {self._next_index} of the epoch on, got sample "
                    f"{speech.index}"
                ),
            )
        self._next_index = speech.index + len(speech.samples)
        trimmed = self.intake.num_trimmed
        dropped = self.intake.push(speech.samples, speech.index, now_s)
        self._keyframe |= dropped > 0
        lost_s = self.service.metrics.dropped_s
        lost_s.labels("queue").inc(dropped * self.intake.chunk_s)
        lost_s.labels("trim").inc((self.intake.num_trimmed - trimmed) / SAMPLE_RATE)

    async def _interrupt(self, epoch: int) -> None:
        if epoch >= self.epoch:
            self._raise_epoch(epoch)
            await self.outlet.say("interrupted", epoch=epoch)

    def _raise_epoch(self, epoch: int) -> None:
        if epoch == self.epoch:
            return
        if epoch > self.epoch + 1 or epoch == MAX_EPOCH:
            raise ProtocolError(
                "epoch", f"expected epoch {self.epoch} or {self.epoch + 1}, got {epoch}"
            )
        if not self._interrupts.take(1.0, time.monotonic()):
            raise ProtocolError(
                "flood", f"expected at most {_INTERRUPTS_PER_S:g} interruptions a second, got more"
            )
        self.epoch, self._next_index = epoch, 0
        forgotten = self.intake.interrupt(time.monotonic())
        self.service.metrics.dropped_s.labels("interrupt").inc(forgotten / SAMPLE_RATE)
        self._keyframe = True

    def _note(self, stats: Stats) -> None:
        if stats.offset_ms is not None:
            self.service.metrics.offset_s.observe(stats.offset_ms / 1e3)
        if stats.slack_ms is not None:
            self.intake.trim(stats.slack_ms / 1e3, time.monotonic())

    # -- to the client -----------------------------------------------------------------------------

    async def _produce(self) -> None:
        while not (self.intake.is_finished and not self.intake.has_speech):
            await self._until_chunk()
            if self._portrait is not None:
                await self._switch(self._portrait)
            piece, epoch = self.intake.take(), self.epoch
            try:
                chunk = await asyncio.wrap_future(self.slot.compute(piece.window, piece.num_new))
            except ModelError as error:
                self.service.metrics.model_errors.inc()
                LOG.warning("the model failed", exc_info=error.__cause__)
                raise SessionOver(
                    "model", "the model failed in this session: start a new one"
                ) from error
            self.intake.note_wait(chunk.queued_ms / 1e3, time.monotonic())
            if epoch == self.epoch:
                await self._send(piece, chunk, epoch)

    async def _until_chunk(self) -> None:
        """Wait until a chunk can be taken."""
        limits = self.service.limits
        while True:
            self._changed.clear()
            now_s = time.monotonic()
            if self._stop is not None:
                raise self._stop
            if now_s - self._start_s > limits.session_s:
                raise SessionOver(
                    "too_long",
                    f"a session lasts {limits.session_s / 60:g} minutes: start a new one",
                )
            if now_s - self._heard_s > limits.idle_s:
                raise SessionOver(
                    "idle",
                    f"nothing was sent for {limits.idle_s / 60:g} minutes: start a new session",
                )
            if self.intake.advance(now_s):
                return
            try:
                async with asyncio.timeout(self.intake.wait_s(now_s) + 0.001):
                    await self._changed.wait()
            except TimeoutError:
                pass

    async def _switch(self, name: str) -> None:
        self._portrait = None
        size_px = self.service.scheduler.model.size_px
        try:
            portrait = await self.outlet.in_thread(
                lambda: self.service.portraits.load(name, size_px)
            )
        except UserError as error:
            await self.outlet.say("error", code="portrait", message=str(error))
            return
        await asyncio.wrap_future(self.slot.show(portrait))
        self._keyframe = True
        await self.outlet.say("identity", portrait=name, frame=self.num_frames)

    async def _send(self, piece: Piece, chunk: Computed, epoch: int) -> None:
        intake, metrics, first = self.intake, self.service.metrics, self.num_frames
        frames, sound = chunk.frames, piece.sound
        if intake.is_finished and not intake.has_speech:  # the last one: as long as the speech
            frames = frames[: num_frames_of(piece.num_speech)]
            sound = sound[: SAMPLES_PER_FRAME * len(frames)]
        self.num_frames += len(frames)
        keyframe, self._keyframe = self._keyframe, False
        encode_s = await self.outlet.send_chunk(
            sound,
            frames,
            epoch,
            first,
            idle=piece.idle,
            keyframe=keyframe,
            wanted=lambda: epoch == self.epoch,
        )
        if encode_s is None:
            return
        metrics.chunk(chunk, len(frames), encode_s, idle=piece.idle)
        await self.outlet.say(
            "chunk",
            index=first,
            frames=len(frames),
            epoch=epoch,
            compute_ms=round(chunk.compute_ms, 1),
            queued_ms=round(chunk.queued_ms, 1),
            encode_ms=round(1e3 * encode_s, 1),
            rows=chunk.num_rows,
            input_sample=piece.last_index,
            speech_samples=piece.num_speech,
            dropped_s=round(intake.num_dropped / SAMPLE_RATE, 2),
        )
