"""Conversations on the live page: the microphone goes to a realtime server, its answers come back
with a face.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from rest_lightning.avatar import AvatarFrame, AvatarPool, AvatarSettings
from rest_lightning.constants import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME
from rest_lightning.errors import UserError
from rest_lightning.serve.limits import Limits
from rest_lightning.serve.protocol import Channel, Format, Pcm, Speech
from rest_lightning.serve.realtime import (
    RATE_HZ,
    Answer,
    AnswerDone,
    Caption,
    RealtimeClient,
    SpeechStarted,
    Trouble,
)
from rest_lightning.serve.resample import MonoResampler
from rest_lightning.serve.server import LiveServer, ServerOptions
from rest_lightning.serve.session import Service, Session, SessionOver

if TYPE_CHECKING:
    from rest_lightning.media.provenance import Signer

Connect = Callable[[], AbstractAsyncContextManager[RealtimeClient]]


class ConverseServer(LiveServer):
    """The live page, with a conversation in every session.

    Args:
        pool: of avatars, started; as many as sessions.
        connect: makes a client of the realtime server, for each session.
        options, limits, signer: of the server.
    """

    def __init__(
        self,
        pool: AvatarPool,
        connect: Connect,
        options: ServerOptions | None = None,
        limits: Limits | None = None,
        signer: Signer | None = None,
    ) -> None:
        new_session = partial(ConverseSession, connect)
        super().__init__(pool, options, limits, new_session=new_session, signer=signer)


class ConverseSession(Session):
    """A session whose speech goes to a realtime server, and whose avatar says what that answers."""

    def __init__(self, connect: Connect, channel: Channel, service: Service) -> None:
        super().__init__(channel, service)
        self._connect = connect
        # utterances, and the items that they are
        self._items: deque[tuple[int, str]] = deque(maxlen=64)
        self._heard: dict[str, int] = {}  # pieces of 40 ms of an item that have left
        self._up = MonoResampler(RATE_HZ)
        self._down = MonoResampler(SAMPLE_RATE)
        self._sound: Pcm = np.zeros(SAMPLES_PER_FRAME // 4, np.int16)  # of clients that hear 16 kHz
        self._realtime: RealtimeClient | None = None

    @property
    def realtime(self) -> RealtimeClient:
        """The realtime server."""
        assert self._realtime is not None, "no server before hello"
        return self._realtime

    async def run(self) -> None:
        """As its parent's; a realtime server that is absent ends it as well (SessionOver)."""
        try:
            await super().run()
        except UserError as error:
            raise SessionOver("realtime", str(error)) from None

    def _settings(self) -> AvatarSettings:
        return replace(super()._settings(), sample_rate=RATE_HZ, is_live=False)

    async def _enter(self, stack: AsyncExitStack) -> None:
        self._realtime = await stack.enter_async_context(self._connect())
        if self.hello.version > 1:
            self._sound_format = Format(RATE_HZ, 1)

    def _jobs(self) -> list[Coroutine[None, None, None]]:
        return [*super()._jobs(), self._answer()]

    # -- from the client --------------------------------------------------------------------------

    async def _hear(self, speech: Speech) -> None:
        """Whatever its epoch: an interruption does not make the user's own words void."""
        samples = self._up.push(speech.samples, self._format.sample_rate_hz)
        await self.realtime.send_speech(samples)

    async def _flush(self) -> None:
        """Nothing: the realtime server tells where the user's words end."""

    async def _be_interrupted(self, epoch: int) -> None:
        if epoch > self.epoch:
            item, heard_ms = self._last_item()
            await super()._be_interrupted(epoch)
            await self.realtime.cancel(item, heard_ms)

    # -- from the realtime server -----------------------------------------------------------------

    async def _answer(self) -> None:
        async for event in self.realtime.events():
            match event:
                case SpeechStarted():
                    if self.avatar.is_speaking:
                        item, heard_ms = self._last_item()
                        self._interrupt()
                        if self.hello.version > 1:
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
                    if self.hello.version > 1:
                        await self.outlet.say("caption", who=event.who, text=event.text)
                case Trouble():
                    await self.outlet.say("error", code="realtime", message=event.text)
        raise SessionOver(
            "realtime", "the realtime server has gone: start it, then reload the page"
        )

    def _last_item(self) -> tuple[str | None, int]:
        """What is being said, and how much of it has left, in ms."""
        if not self._items or not self.avatar.is_speaking:
            return None, 0
        item = self._items[-1][1]
        return item, round(1000 * self._heard.get(item, 0) / FPS)

    # -- to the client ----------------------------------------------------------------------------

    def _sound_of(self, frame: AvatarFrame) -> Pcm:
        item = next((item for number, item in self._items if number == frame.utterance), None)
        if item is not None:
            self._heard = {item: self._heard.get(item, 0) + 1}
        sound = super()._sound_of(frame)
        if self.hello.version > 1:
            return sound
        self._sound = np.concatenate([self._sound, self._down.push(sound, RATE_HZ)])
        sound, self._sound = self._sound[:SAMPLES_PER_FRAME], self._sound[SAMPLES_PER_FRAME:]
        return sound
