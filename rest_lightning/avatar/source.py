"""Speech of a source that may pause, such as a pipe, said by an avatar to its end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing, suppress
from typing import Any

from rest_lightning.avatar.avatar import Avatar, AvatarFrame
from rest_lightning.constants import SAMPLE_RATE


async def speak(
    avatar: Avatar, blocks: Iterable[Any], sample_rate: int = SAMPLE_RATE
) -> AsyncIterator[AvatarFrame]:
    """Frames of an avatar that says what a source gives, until all of it has been said.

    A thread reads the source, so that the face idles while the source pauses. Nothing is lost: a
    source faster than real time waits when the avatar has enough. The thread may outlive the
    iteration by one read of the source.

    Args:
        avatar: not running yet; whoever opened it closes it.
        blocks: arrays of any length, as :meth:`Avatar.push_audio` takes them; read once.
        sample_rate: of all blocks, in Hz.

    Yields:
        Frames as :meth:`Avatar.run` does, one every 40 ms; the last one has the last of the speech.

    Raises:
        ModelError: the model failed.
        Exception: whatever the source raises, once all that it gave before has been said.
    """
    loop = asyncio.get_running_loop()
    has_ended, is_unwanted = asyncio.Event(), threading.Event()
    failures: list[BaseException] = []

    def read() -> None:
        try:
            try:
                for block in blocks:
                    if is_unwanted.is_set():
                        return
                    pushing = avatar.push_audio(block, sample_rate)
                    asyncio.run_coroutine_threadsafe(pushing, loop).result()
            except BaseException as error:  # raised where the frames are read
                failures.append(error)
            asyncio.run_coroutine_threadsafe(avatar.flush(), loop).result()
        except BaseException as error:
            failures.append(error)
        finally:
            with suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(has_ended.set)

    threading.Thread(target=read, name="speech-source", daemon=True).start()
    try:
        async with aclosing(avatar.run()) as frames:
            async for frame in frames:
                yield frame
                if has_ended.is_set() and not avatar.is_speaking:
                    break
    finally:
        is_unwanted.set()
    if failures:
        raise failures[0]
