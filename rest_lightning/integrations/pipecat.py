"""A talking portrait in a Pipecat pipeline, between the speech synthesis and the transport's
output.

::

    avatar = AvatarVideoService(settings=AvatarVideoService.Settings(portrait="me.jpg"))
    pipeline = Pipeline([transport.input(), stt, llm, tts, avatar, transport.output()])

The transport has to send video of the avatar's size, 25 times a second: :func:`transport_params`.
docs/agents.md says how it all fits together.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from rest_lightning.avatar import Avatar, AvatarFrame, AvatarPool, AvatarSettings, ModelError
from rest_lightning.constants import FPS
from rest_lightning.errors import UserError
from rest_lightning.extras import missing

try:
    from pipecat.frames.frames import (
        CancelFrame,
        EndFrame,
        Frame,
        InterruptionFrame,
        OutputImageRawFrame,
        ServiceUpdateSettingsFrame,
        StartFrame,
        TTSAudioRawFrame,
        TTSStoppedFrame,
    )
    from pipecat.processors.frame_processor import FrameDirection, FrameProcessorSetup
    from pipecat.services.ai_service import AIService
    from pipecat.services.settings import ServiceSettings
    from pipecat.transports.base_transport import TransportParams
    from pipecat.utils.types import NOT_GIVEN, NotGiven, is_given
except ModuleNotFoundError as error:
    raise missing(error.name, "pipecat", "the adapter") from None

if TYPE_CHECKING:
    from rest_lightning.talking_head import TalkingHead

_Params = TypeVar("_Params", bound=TransportParams)


@dataclass
class AvatarVideoSettings(ServiceSettings):
    """What can be changed while a pipeline runs, with a ``ServiceUpdateSettingsFrame``.

    Attributes:
        portrait: as in :meth:`rest_lightning.TalkingHead.open`; a new one is shown from the next
            chunk on.
    """

    portrait: Any | NotGiven = field(default_factory=lambda: NOT_GIVEN)


class AvatarVideoService(AIService):
    """Takes the agent's speech, and gives it back with pictures, both when they are due.

    ``TTSAudioRawFrame`` goes in and is not passed on. Every 40 ms there is an
    ``OutputImageRawFrame``, and behind it, where somebody speaks, a ``TTSAudioRawFrame`` of 40 ms.
    A ``TTSStoppedFrame`` follows the last piece of the speech that it ends. After an
    ``InterruptionFrame`` nothing comes of what was said before. All other frames pass.

    If the model fails, the service pushes an error, and speech passes without pictures from then
    on.

    Args:
        model: a talking head, or a pool that several services share; None loads the bundled model.
        avatar: how the avatar waits and answers.
        settings: ``AvatarVideoService.Settings(portrait=...)``.
        kwargs: of the base class.

    Raises:
        UserError: no portrait.
    """

    Settings = AvatarVideoSettings
    _settings: AvatarVideoSettings

    def __init__(
        self,
        *,
        settings: AvatarVideoSettings,
        model: TalkingHead | AvatarPool | None = None,
        avatar: AvatarSettings | None = None,
        **kwargs: Any,
    ) -> None:
        # Not by comparing, as apply_update does: an array has no one answer to that.
        complete = AvatarVideoSettings(
            model=None, portrait=settings.portrait, extra=dict(settings.extra)
        )
        if not is_given(complete.portrait):
            raise UserError(
                "expected a portrait in the settings, got none: "
                "AvatarVideoService.Settings(portrait='me.jpg')"
            )
        super().__init__(settings=complete, **kwargs)
        self.avatar = Avatar(complete.portrait, model, avatar)
        # Frames that end an utterance, held until it has left.
        self._stops: deque[tuple[int, TTSStoppedFrame]] = deque()
        self._contexts: dict[int, str | None] = {}  # of utterances, as Pipecat names them
        self._shown = asyncio.Event()  # set whenever a piece has left
        self._task: asyncio.Task[None] | None = None
        self._has_failed = False

    def can_generate_metrics(self) -> bool:
        """From the first speech to the first picture with it (TTFB)."""
        return True

    async def setup(self, setup: FrameProcessorSetup) -> None:
        """Load the model and the portrait.

        Raises:
            UserError: a portrait or model that cannot be used.
        """
        await super().setup(setup)
        await self.avatar.start()

    async def stop(self, frame: EndFrame) -> None:
        """Say what is left, then end."""
        await super().stop(frame)
        if not self._has_failed and not self.avatar.is_closed:
            await self.avatar.flush()
        while self._task is not None and not self._task.done() and self.avatar.is_speaking:
            self._shown.clear()
            await self._shown.wait()
        await self._close()

    async def cancel(self, frame: CancelFrame) -> None:
        """End at once."""
        await super().cancel(frame)
        await self._close()

    async def cleanup(self) -> None:
        """End at once, where nothing else did."""
        await super().cleanup()
        await self._close()

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        """See the class."""
        await super().process_frame(frame, direction)
        if direction == FrameDirection.DOWNSTREAM and not self._has_failed:
            if isinstance(frame, TTSAudioRawFrame):
                await self._speak(frame)
                return
            if isinstance(frame, TTSStoppedFrame):
                await self._end(frame)
                return
        if isinstance(frame, ServiceUpdateSettingsFrame) and self._is_ours(frame):
            await self._update_settings(frame.delta)
            return
        if isinstance(frame, InterruptionFrame):
            self._interrupt()
        await self.push_frame(frame, direction)
        if isinstance(frame, StartFrame) and self._task is None:
            self._task = self.create_task(self._show())

    def _is_ours(self, frame: ServiceUpdateSettingsFrame) -> bool:
        return isinstance(frame.delta, AvatarVideoSettings) and frame.service in (None, self)

    async def _speak(self, frame: TTSAudioRawFrame) -> None:
        samples = np.frombuffer(frame.audio, np.int16)
        if frame.num_channels > 1:
            samples = samples.reshape(-1, frame.num_channels)
        try:
            number = await self.avatar.push_audio(samples, frame.sample_rate)
        except ModelError:
            await self.push_frame(frame)
            return
        except UserError as error:
            await self.push_error(str(error), exception=error)
            return
        if number not in self._contexts:
            self._contexts[number] = frame.context_id
            await self.start_ttfb_metrics()

    async def _end(self, frame: TTSStoppedFrame) -> None:
        number = await self.avatar.flush()
        if number is not None:
            self._stops.append((number, frame))
        elif self._stops:
            self._stops.append((self._stops[-1][0], frame))
        else:
            await self.push_frame(frame)

    def _interrupt(self) -> None:
        if not self.avatar.is_closed:
            self.avatar.interrupt()
        self._stops.clear()
        self._contexts.clear()

    async def _show(self) -> None:
        try:
            async for frame in self.avatar.run():
                await self._push(frame)
                self._shown.set()
        except ModelError as error:
            self._has_failed = True
            await self.push_error(str(error), exception=error)
        finally:
            self._shown.set()
        for _, stop in self._stops:
            await self.push_frame(stop)
        self._stops.clear()

    async def _push(self, frame: AvatarFrame) -> None:
        height, width, _ = frame.picture.shape
        image = OutputImageRawFrame(
            image=frame.picture.tobytes(), size=(width, height), format="RGB"
        )
        image.sync_with_audio = True
        await self.push_frame(image)
        if frame.utterance is None or frame.epoch != self.avatar.epoch:
            return
        if frame.begins:
            await self.stop_ttfb_metrics()
        channels = 1 if frame.samples.ndim == 1 else frame.samples.shape[1]
        context = self._contexts.get(frame.utterance)
        audio = TTSAudioRawFrame(
            frame.samples.tobytes(), frame.sample_rate, channels, context_id=context
        )
        await self.push_frame(audio)
        if frame.ends:
            self._contexts.pop(frame.utterance, None)
            while self._stops and self._stops[0][0] <= frame.utterance:
                await self.push_frame(self._stops.popleft()[1])

    async def _update_settings(self, delta: ServiceSettings) -> dict[str, Any]:
        given = getattr(delta, "portrait", NOT_GIVEN)
        changed = await super()._update_settings(replace(delta, portrait=NOT_GIVEN))
        if is_given(given) and given is not self._settings.portrait:
            try:
                await self.avatar.switch_identity(given)
            except UserError as error:
                await self.push_error(str(error), exception=error)
            else:
                changed["portrait"] = self._settings.portrait
                self._settings.portrait = given
        return changed

    async def _close(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            await self.cancel_task(task)
        await self.avatar.aclose()


def transport_params(kind: type[_Params], size_px: int, **others: Any) -> _Params:
    """Parameters of a transport that sends an avatar: its size, 25 pictures a second, sound in
    pieces of 40 ms.

    Args:
        kind: ``TransportParams`` or the transport's own.
        size_px: of the model's pictures (``TalkingHead.size_px``).
        others: further parameters, which take precedence over these.
    """
    own: dict[str, Any] = {
        "audio_out_enabled": True,
        "audio_out_10ms_chunks": 100 // FPS,
        "video_out_enabled": True,
        "video_out_is_live": False,  # live pictures do not wait for the sound before them
        "video_out_width": size_px,
        "video_out_height": size_px,
        "video_out_framerate": FPS,
    }
    return kind(**{**own, **others})


def set_webrtc_frame_rate(frames_per_second: int = FPS) -> None:
    """Set the rate at which aiortc plays video, through which ``SmallWebRTCTransport`` sends.

    aiortc stamps every picture of its own tracks as one of 30 a second, whatever the transport
    sends; a player then shows 25 pictures in 0.83 s and waits. There is one rate in a process: call
    this before the first connection.

    Raises:
        UserError: aiortc is not installed, or has no such rate to set.
    """
    try:
        from aiortc import mediastreams
    except ModuleNotFoundError:
        raise UserError(
            "expected the package aiortc, found none: pip install 'pipecat-ai[webrtc]'"
        ) from None
    if not hasattr(mediastreams, "VIDEO_PTIME"):
        raise UserError("expected aiortc 1.9 to 1.16, got one that paces its video in another way")
    mediastreams.VIDEO_PTIME = 1 / frames_per_second
