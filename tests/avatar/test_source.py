"""A source that may pause is said to its end, and the face idles meanwhile."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest

from rest_lightning.avatar import Avatar, AvatarFrame, AvatarSettings, conformance, speak
from rest_lightning.avatar.simulation import TracedModel
from rest_lightning.errors import UserError

SPEECH = conformance.speech(0.4, 16_000)


def said(blocks: Iterable[Any], see: Callable[[AvatarFrame], None], **settings: Any) -> None:
    """Hands what comes to ``see``, on the real clock."""

    async def run() -> None:
        model: Any = TracedModel(chunk_length=1, compute_s=0.005)
        async with Avatar(conformance.portrait(), model, AvatarSettings(**settings)) as avatar:
            async for frame in speak(avatar, blocks):
                see(frame)

    asyncio.run(run())


def test_all_of_it_is_said_once_and_the_face_idles_while_the_source_pauses() -> None:
    def source() -> Iterator[np.ndarray]:
        for half in np.array_split(SPEECH, 2):
            time.sleep(0.3)
            yield half

    seen: list[AvatarFrame] = []
    said(source(), seen.append)
    heard = [frame.samples for frame in seen if frame.is_speech]
    conformance.assert_heard(np.concatenate(heard), SPEECH, 16_000)
    is_speech = [frame.is_speech for frame in seen]
    assert not is_speech[0] and is_speech[-1]
    assert is_speech.count(False) >= 10  # half a second of pauses, less what was caught up


def test_an_error_of_the_source_comes_when_its_speech_has_been_said() -> None:
    def source() -> Iterator[np.ndarray]:
        yield SPEECH
        raise UserError("expected a good source")

    seen: list[AvatarFrame] = []
    with pytest.raises(UserError, match="expected a good source"):
        said(source(), seen.append)
    heard = [frame.samples for frame in seen if frame.is_speech]
    conformance.assert_heard(np.concatenate(heard), SPEECH, 16_000)


def test_a_source_without_end_waits_and_ends_with_whoever_reads() -> None:
    num_read = 0

    def source() -> Iterator[np.ndarray]:
        nonlocal num_read
        while True:
            num_read += 1
            yield SPEECH[:1600]

    class Enough(Exception):
        """The reader goes away."""

    def see(frame: AvatarFrame) -> None:
        if frame.index == 5:
            raise Enough

    with pytest.raises(Enough):
        said(source(), see, max_waiting_s=2.0)
    assert num_read <= 10 * 2.0 + 10  # what waits, and a chunk or two on their way
    end_s = time.monotonic() + 5.0
    while any(thread.name == "speech-source" for thread in threading.enumerate()):
        assert time.monotonic() < end_s
        time.sleep(0.01)
