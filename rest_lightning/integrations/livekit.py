"""A talking portrait in a LiveKit room, for agents that are built with livekit-agents.

::

    avatar = AvatarSession(portrait="me.jpg")
    await avatar.start(session, ctx.room)  # before session.start(...)

The avatar runs in the agent's process, or in one of its own that joins the room
(``AvatarSession(worker=True)``, or ``python -m rest_lightning.integrations.livekit`` on another
machine). docs/agents.md says how.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import numpy as np

from rest_lightning.avatar import Avatar, AvatarFrame, AvatarPool, AvatarSettings, ModelError
from rest_lightning.constants import FPS
from rest_lightning.errors import UserError, exit_code
from rest_lightning.extras import missing

try:
    from livekit import api, rtc
    from livekit.agents import AgentSession
    from livekit.agents.types import ATTRIBUTE_PUBLISH_ON_BEHALF
    from livekit.agents.voice.avatar import (
        AudioReceiver,
        AudioSegmentEnd,
        AvatarOptions,
        AvatarRunner,
        DataStreamAudioOutput,
        DataStreamAudioReceiver,
        QueueAudioOutput,
        VideoGenerator,
    )
    from livekit.agents.voice.avatar import AvatarSession as BaseAvatarSession
except ModuleNotFoundError as error:
    raise missing(error.name, "livekit", "the adapter") from None

if TYPE_CHECKING:
    from rest_lightning.talking_head import TalkingHead

SAMPLE_RATE_HZ = 24_000  # what most speech synthesis gives; the agent resamples to it
IDENTITY, NAME = "rest-avatar", "REST avatar"
TOKEN_VARIABLE, URL_VARIABLE = "LIVEKIT_TOKEN", "LIVEKIT_URL"
_QUEUE_MS = 100  # of the runner; what is in it is old after an interruption, and dropped
_TURN_S = 0.5  # the longest that an interruption waits for the runner to come back with a frame
LOG = logging.getLogger("rest_lightning.integrations.livekit")


class AvatarVideoGenerator(VideoGenerator):
    """An avatar as an ``AvatarRunner`` of livekit-agents drives it.

    Every 40 ms there is a picture. Sound comes with it where somebody speaks, and only there: the
    runner takes any sound for the beginning of playback.

    Args:
        avatar: not running yet; it is not closed here.
        sample_rate, num_channels: of the sound that goes out, in Hz; speech of another kind is
            converted. None: as it comes.
    """

    def __init__(
        self, avatar: Avatar, sample_rate: int | None = None, num_channels: int | None = None
    ) -> None:
        self._avatar = avatar
        self._sample_rate, self._num_channels = sample_rate, num_channels
        self._resampler: rtc.AudioResampler | None = None
        self._resampled_rate = 0
        self._is_back = asyncio.Event()  # the reader has come back for another frame
        self._is_back.set()
        self._runner: AvatarRunner | None = None
        self._num_open = 0  # utterances whose end has not been told
        self._is_open = False  # whether sound has come since the last end
        self._changed = asyncio.Event()

    def drives(self, runner: AvatarRunner) -> None:
        """Tell which runner reads: an interruption empties its queues too."""
        self._runner = runner

    async def push_audio(self, frame: rtc.AudioFrame | AudioSegmentEnd) -> None:
        """Speech, or the end of an utterance. Waits while too much speech waits.

        Raises:
            UserError: the avatar is closed.
        """
        try:
            if not isinstance(frame, AudioSegmentEnd):
                self._is_open = True
                await self._push(self._resample(frame))
                return
            if self._is_open:
                self._is_open = False
                self._num_open += 1
                self._changed.set()
            await self._push(self._flush_resampler())
            await self._avatar.flush()
        except ModelError:
            pass  # told by the generator

    async def clear_buffer(self) -> None:
        """Be silent at once, in the runner's queues too.

        Returns when the runner has dealt with the frame that it may have in hand. Otherwise it
        would take that frame for the beginning of the next utterance, and tell of its playback.
        """
        self._resampler = None
        self._num_open, self._is_open = 0, False
        self._avatar.interrupt()
        if self._runner is not None:
            await self._runner.av_sync.clear_queue()
        try:
            async with asyncio.timeout(_TURN_S):
                await self._is_back.wait()
        except TimeoutError:
            pass

    async def __aiter__(self) -> AsyncIterator[rtc.VideoFrame | rtc.AudioFrame | AudioSegmentEnd]:
        """Pictures with their sound; an AudioSegmentEnd behind the last piece of an utterance."""
        try:
            async for frame in self._avatar.run():
                for part in self._parts(frame):
                    if frame.epoch != self._avatar.epoch:
                        break  # an interruption came between the picture and its sound
                    if isinstance(part, AudioSegmentEnd):
                        self._num_open -= 1
                    self._is_back.clear()
                    yield part
                    self._is_back.set()
        except ModelError as error:
            LOG.error("%s", error)
        finally:
            self._is_back.set()
        # Without pictures an agent has to learn all the same that its utterances are over.
        while not self._avatar.is_closed:
            if self._num_open > 0:
                self._num_open -= 1
                yield AudioSegmentEnd()
            else:
                self._changed.clear()
                await self._changed.wait()

    def _parts(self, frame: AvatarFrame) -> list[rtc.VideoFrame | rtc.AudioFrame | AudioSegmentEnd]:
        height, width, _ = frame.picture.shape
        parts: list[rtc.VideoFrame | rtc.AudioFrame | AudioSegmentEnd] = [
            rtc.VideoFrame(width, height, rtc.VideoBufferType.RGB24, frame.picture.tobytes())
        ]
        if frame.is_speech:
            samples = frame.samples
            channels = 1 if samples.ndim == 1 else samples.shape[1]
            parts.append(
                rtc.AudioFrame(samples.tobytes(), frame.sample_rate, channels, len(samples))
            )
        if frame.ends:
            parts.append(AudioSegmentEnd())
        return parts

    async def _push(self, frames: list[rtc.AudioFrame]) -> None:
        for frame in frames:
            samples = np.frombuffer(frame.data, np.int16).reshape(-1, frame.num_channels)
            if self._num_channels not in (None, frame.num_channels):
                mono = samples.mean(axis=1).round().astype(np.int16)
                samples = np.repeat(mono[:, None], self._num_channels or 1, axis=1)
            if samples.shape[1] == 1:
                samples = samples[:, 0]
            await self._avatar.push_audio(samples, frame.sample_rate)

    def _resample(self, frame: rtc.AudioFrame) -> list[rtc.AudioFrame]:
        if self._sample_rate in (None, frame.sample_rate):
            return [frame]
        assert self._sample_rate is not None, "None is as it comes"
        if self._resampler is None or self._resampled_rate != frame.sample_rate:
            self._resampled_rate = frame.sample_rate
            self._resampler = rtc.AudioResampler(
                frame.sample_rate, self._sample_rate, num_channels=frame.num_channels
            )
        return self._resampler.push(frame)

    def _flush_resampler(self) -> list[rtc.AudioFrame]:
        if self._resampler is None:
            return []
        resampler, self._resampler = self._resampler, None
        return resampler.flush()


class AvatarSession(BaseAvatarSession[str]):
    """A talking portrait for an ``AgentSession``: call :meth:`start` before the agent session's
    own.

    Args:
        portrait: as in :meth:`rest_lightning.TalkingHead.open`; with ``worker`` a file that the
            worker can read.
        model: a talking head, or a pool that several sessions share; None loads the bundled model.
            Not with ``worker``.
        settings: of the avatar.
        sample_rate: of the sound that is published, in Hz.
        worker: run the avatar in a process of its own, which joins the room as a participant.
        identity, name: of that participant.
        clear_buffer_timeout: seconds that the agent waits for the worker to confirm an
            interruption, before it goes on without; None waits for ever.
        url, api_key, api_secret: of the LiveKit server, for the worker; None takes ``LIVEKIT_URL``,
            ``LIVEKIT_API_KEY`` and ``LIVEKIT_API_SECRET`` from the environment.
        model_folder: of the worker's model; None takes the bundled model.

    Raises:
        UserError: a worker with a model of this process.
    """

    _room: Any  # of the base class

    def __init__(
        self,
        portrait: Any,
        *,
        model: TalkingHead | AvatarPool | None = None,
        settings: AvatarSettings | None = None,
        sample_rate: int = SAMPLE_RATE_HZ,
        worker: bool = False,
        identity: str = IDENTITY,
        name: str = NAME,
        clear_buffer_timeout: float | None = 2.0,
        url: str | None = None,
        api_key: str | None = None,
        api_secret: str | None = None,
        model_folder: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        if worker and (model is not None or not isinstance(portrait, str | os.PathLike)):
            raise UserError(
                "expected a worker's portrait as a file and its model as model_folder, got an "
                "object of this process: "
                "give names of files, or leave worker out"
            )
        self._portrait, self._model, self._settings = portrait, model, settings
        self._sample_rate, self._is_worker = sample_rate, worker
        self._identity, self._name = identity, name
        self._clear_buffer_timeout = clear_buffer_timeout
        self._url = url or os.environ.get(URL_VARIABLE)
        self._key, self._secret, self._model_folder = api_key, api_secret, model_folder
        self._avatar: Avatar | None = None
        self._runner: AvatarRunner | None = None
        self._process: asyncio.subprocess.Process | None = None

    @property
    def avatar_identity(self) -> str:
        """Of the participant that publishes the avatar: the worker, or the agent itself."""
        if self._is_worker or self._room is None:
            return self._identity
        return str(self._room.local_participant.identity)

    @property
    def provider(self) -> str:
        """For metrics."""
        return "rest_lightning"

    async def start(self, agent_session: AgentSession, room: rtc.Room) -> None:
        """Load the avatar and take the agent session's sound.

        Raises:
            UserError: a portrait or model that cannot be used, or no server for the worker.
        """
        if self._is_worker:
            await self._start_worker(agent_session, room)
        else:
            await self._start_here(agent_session, room)
        await super().start(agent_session, room)

    async def aclose(self) -> None:
        """Stop the avatar; a second call does nothing."""
        runner, avatar, process = self._runner, self._avatar, self._process
        self._runner = self._avatar = self._process = None
        if runner is not None:
            await runner.aclose()
        if avatar is not None:
            await avatar.aclose()
        if process is not None and process.returncode is None:
            process.terminate()
            await process.wait()
        if not self._is_worker and self._room is not None:
            # The base class removes the avatar's participant: here that is the agent, who stays.
            self._room.off("connection_state_changed", self._on_connection_state_changed)
            self._room = None
        await super().aclose()

    async def _start_here(self, agent_session: AgentSession, room: rtc.Room) -> None:
        self._avatar = Avatar(self._portrait, self._model, self._settings)
        audio = QueueAudioOutput(sample_rate=self._sample_rate, wait_playback_start=True)
        try:
            self._runner = await start_runner(room, audio, self._avatar, self._sample_rate)
        except BaseException:
            await self._avatar.aclose()
            raise
        agent_session.output.replace_audio_tail(audio)

    async def _start_worker(self, agent_session: AgentSession, room: rtc.Room) -> None:
        if not self._url:
            raise UserError(
                f"expected the address of the LiveKit server, got none: set {URL_VARIABLE}, or "
                f"give url="
            )
        local = room.local_participant.identity if room.isconnected() else ""
        try:
            token = api.AccessToken(self._key, self._secret)
        except ValueError:
            raise UserError(
                "expected the key of the LiveKit server, got none: set LIVEKIT_API_KEY and "
                "LIVEKIT_API_SECRET"
            ) from None
        token = token.with_identity(self._identity).with_name(self._name).with_kind("agent")
        token = token.with_grants(api.VideoGrants(room_join=True, room=room.name))
        token = token.with_attributes({ATTRIBUTE_PUBLISH_ON_BEHALF: local})
        words = ["--portrait", os.fspath(self._portrait), "--sample-rate", str(self._sample_rate)]
        words += ["--sender", local] if local else []
        words += ["--model", os.fspath(self._model_folder)] if self._model_folder else []
        environment = {**os.environ, URL_VARIABLE: self._url, TOKEN_VARIABLE: token.to_jwt()}
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", __name__, *words, env=environment
        )
        agent_session.output.replace_audio_tail(
            DataStreamAudioOutput(
                room,
                destination_identity=self._identity,
                sample_rate=self._sample_rate,
                wait_remote_track=rtc.TrackKind.KIND_VIDEO,
                clear_buffer_timeout=self._clear_buffer_timeout,
                wait_playback_start=True,
            )
        )


async def start_runner(
    room: rtc.Room, audio: AudioReceiver, avatar: Avatar, sample_rate: int = SAMPLE_RATE_HZ
) -> AvatarRunner:
    """Returns a runner that publishes an avatar in a room; the caller closes both.

    Args:
        room: connected, or about to be.
        audio: where the speech comes from.
        avatar: not running yet.
        sample_rate: of the sound that is published, in Hz.

    Raises:
        UserError: a portrait or model that cannot be used.
    """
    await avatar.start()
    generator = AvatarVideoGenerator(avatar, sample_rate, num_channels=1)
    options = AvatarOptions(
        video_width=avatar.size_px,
        video_height=avatar.size_px,
        video_fps=FPS,
        audio_sample_rate=sample_rate,
        audio_channels=1,
    )
    runner = AvatarRunner(
        room, audio_recv=audio, video_gen=generator, options=options, _queue_size_ms=_QUEUE_MS
    )
    generator.drives(runner)
    await runner.start()
    return runner


async def run_worker(
    room: rtc.Room,
    portrait: Any,
    *,
    model: TalkingHead | AvatarPool | None = None,
    settings: AvatarSettings | None = None,
    sample_rate: int = SAMPLE_RATE_HZ,
    sender_identity: str | None = None,
) -> None:
    """Publish an avatar in a connected room, for an agent that sends its speech there, until the
    room is left.

    Args:
        room: connected.
        portrait, model, settings: of the avatar.
        sample_rate: of the sound that is published, in Hz.
        sender_identity: of the agent; None takes the first agent in the room.

    Raises:
        UserError: a portrait or model that cannot be used.
    """
    left = asyncio.Event()

    def leave(*_: object) -> None:
        left.set()

    room.on("disconnected", leave)
    async with Avatar(portrait, model, settings) as avatar:
        audio = DataStreamAudioReceiver(room, sender_identity=sender_identity)
        starting = asyncio.create_task(start_runner(room, audio, avatar, sample_rate))
        leaving = asyncio.create_task(left.wait())
        try:
            await asyncio.wait({starting, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                await leaving
        finally:
            leaving.cancel()
            await _ended(starting)
            room.off("disconnected", leave)


async def _ended(starting: asyncio.Task[AvatarRunner]) -> None:
    if not starting.done():
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
    elif not starting.cancelled() and starting.exception() is None:
        await starting.result().aclose()


def main() -> int:
    """``python -m rest_lightning.integrations.livekit``: the worker."""
    parser = argparse.ArgumentParser(
        description="Join a LiveKit room as the avatar of its agent.",
        epilog=f"Environment: {URL_VARIABLE}, the server; {TOKEN_VARIABLE}, the room's token.",
    )
    parser.add_argument("--portrait", required=True, help="image file")
    parser.add_argument("--model", help="model folder (default: the bundled model)")
    parser.add_argument("--sample-rate", type=int, default=SAMPLE_RATE_HZ, help="of the sound, Hz")
    parser.add_argument("--sender", help="identity of the agent (default: the first agent)")
    args = parser.parse_args()
    return exit_code(lambda: asyncio.run(_join(args)))


async def _join(args: argparse.Namespace) -> int:
    url, token = os.environ.get(URL_VARIABLE), os.environ.get(TOKEN_VARIABLE)
    if not url or not token:
        got = "no token" if url else "no address"
        raise UserError(
            f"expected {URL_VARIABLE} and {TOKEN_VARIABLE} in the environment, got {got}"
        )
    from rest_lightning.talking_head import TalkingHead

    model = await asyncio.to_thread(TalkingHead.from_pretrained, args.model)
    room = rtc.Room()
    try:
        await room.connect(url, token)
    except rtc.ConnectError as error:
        raise UserError(f"expected a LiveKit room at {url}, got: {error}") from None
    try:
        await run_worker(
            room,
            args.portrait,
            model=model,
            sample_rate=args.sample_rate,
            sender_identity=args.sender,
        )
    finally:
        await room.disconnect()
    return 0


if __name__ == "__main__":
    sys.exit(main())
