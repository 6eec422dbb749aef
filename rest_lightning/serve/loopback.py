"""A realtime server without a model: it answers with what the user said, or with a sentence of
espeak-ng.

It speaks the part of the OpenAI Realtime protocol that :mod:`rest_lightning.serve.realtime` reads,
so that ``rest converse --realtime echo`` takes the same way as a conversation with a real server,
on this machine alone.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import numpy as np
from aiohttp import WSMsgType, web

from rest_lightning.serve.protocol import Pcm
from rest_lightning.serve.realtime import RATE_HZ

Voice = Callable[[str], Pcm]

_BLOCK = RATE_HZ // 50
_LOUD = 0.02  # root mean square of a block of 20 ms that is speech
_START_BLOCKS, _END_BLOCKS = 5, 25  # 100 ms of speech begin an utterance, 500 ms of silence end it
_BEFORE_BLOCKS = 15  # kept from before an utterance was noticed
_MAX_S = 30.0
_DELTA_S, _SPEED = 0.1, 8.0  # answers come in pieces, faster than they are heard


class Loopback:
    """One conversation.

    Args:
        send: an event to the client.
        voice: makes sentences audible (mono, 24 kHz); None repeats the user.
    """

    def __init__(self, send: Callable[[dict[str, Any]], Any], voice: Voice | None = None) -> None:
        self._send, self._voice = send, voice
        self._rest: Pcm = np.zeros(0, np.int16)
        self._before: list[Pcm] = []
        self._heard: list[Pcm] = []
        self._num_loud = self._num_quiet = 0
        self._is_speech = False
        self._numbers = count(1)
        self._answering: asyncio.Task[None] | None = None

    async def hear(self, samples: Pcm) -> None:
        """Speech of the user, mono, 24 kHz, any length."""
        samples = np.concatenate([self._rest, samples])
        whole = len(samples) // _BLOCK * _BLOCK
        self._rest = samples[whole:]
        for block in samples[:whole].reshape(-1, _BLOCK):
            await self._hear_block(block)

    async def cancel(self) -> None:
        """Stop answering."""
        task, self._answering = self._answering, None
        if task is not None and not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await self._send({"type": "response.done", "response": {"status": "cancelled"}})

    async def _hear_block(self, block: Pcm) -> None:
        is_loud = float(np.sqrt(np.mean(np.square(block / 32768.0)))) > _LOUD
        self._num_loud = self._num_loud + 1 if is_loud else 0
        self._num_quiet = 0 if is_loud else self._num_quiet + 1
        if self._is_speech:
            self._heard.append(block)
            too_long = len(self._heard) * _BLOCK > _MAX_S * RATE_HZ
            if self._num_quiet >= _END_BLOCKS or too_long:
                await self._end_of_speech()
            return
        self._before = [*self._before, block][-_BEFORE_BLOCKS:]
        if self._num_loud >= _START_BLOCKS:
            self._is_speech, self._heard = True, self._before
            await self._send({"type": "input_audio_buffer.speech_started"})
            await self.cancel()

    async def _end_of_speech(self) -> None:
        heard, self._heard, self._before = np.concatenate(self._heard), [], []
        self._is_speech = False
        await self._send({"type": "input_audio_buffer.speech_stopped"})
        seconds = len(heard) / RATE_HZ - _END_BLOCKS / 50
        answer, text = heard, f"(what you said, {seconds:.1f} s)"
        if self._voice is not None:
            text = f"You spoke for {seconds:.1f} seconds."
            answer = await asyncio.to_thread(self._voice, text)
        self._answering = asyncio.create_task(self._answer(answer, text))

    async def _answer(self, samples: Pcm, text: str) -> None:
        number = next(self._numbers)
        names = {"response_id": f"resp_{number}", "item_id": f"item_{number}", "content_index": 0}
        await self._send({"type": "response.created", "response": {"id": names["response_id"]}})
        size = round(_DELTA_S * RATE_HZ)
        for start in range(0, len(samples), size):
            piece = samples[start : start + size].astype("<i2", copy=False)
            delta = base64.b64encode(piece.tobytes()).decode()
            await self._send({"type": "response.output_audio.delta", **names, "delta": delta})
            await asyncio.sleep(_DELTA_S / _SPEED)
        await self._send({"type": "response.output_audio.done", **names})
        await self._send(
            {"type": "response.output_audio_transcript.done", **names, "transcript": text}
        )
        await self._send({"type": "response.done", "response": {"status": "completed"}})


@asynccontextmanager
async def loopback_server(voice: Voice | None = None) -> AsyncIterator[str]:
    """A loopback server on a free port of this machine; gives its address."""

    async def converse(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(max_msg_size=2**24)
        await socket.prepare(request)

        async def send(event: dict[str, Any]) -> None:
            if not socket.closed:
                await socket.send_str(json.dumps(event))

        loopback = Loopback(send, voice)
        await send({"type": "session.created", "session": {}})
        try:
            async for message in socket:
                if message.type != WSMsgType.TEXT:
                    continue
                event = json.loads(message.data)
                if event["type"] == "input_audio_buffer.append":
                    samples = np.frombuffer(base64.b64decode(event["audio"]), "<i2").astype(
                        np.int16
                    )
                    await loopback.hear(samples)
                elif event["type"] == "response.cancel":
                    await loopback.cancel()
        except ConnectionError:
            pass
        finally:
            await loopback.cancel()
        return socket

    app = web.Application()
    app.router.add_get("/v1/realtime", converse)
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"ws://127.0.0.1:{runner.addresses[0][1]}/v1/realtime"
    finally:
        await runner.cleanup()


def espeak_voice() -> Voice:
    """The voice of espeak-ng, of the extra ``synthetic``.

    Raises:
        UserError: it is not installed.
    """
    from rest_lightning.data.synthetic.voice import speak

    def say(text: str) -> Pcm:
        import av
        from av.audio.frame import AudioFrame

        samples = np.asarray(speak(text).audio, np.float32)
        frame = AudioFrame.from_ndarray(
            np.ascontiguousarray(samples[None]), format="fltp", layout="mono"
        )
        frame.sample_rate = 16_000
        resampler = av.AudioResampler("s16", "mono", RATE_HZ)
        pieces = [*resampler.resample(frame), *resampler.resample(None)]
        return np.concatenate([piece.to_ndarray()[0] for piece in pieces]).astype(np.int16)

    say("Hello.")
    return say
