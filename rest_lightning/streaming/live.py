"""Speech in real time: blocks as they arrive, and silence where their source pauses."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from rest_lightning.constants import SAMPLE_RATE

_POLL_S = 0.2  # how often a reader that has to wait looks whether it is still wanted


class _End:
    """The last thing a reader sends: that nothing follows, or why."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class LiveSpeech:
    """Passes blocks on as they arrive, and fills pauses of their source with silence.

    A thread reads the source into a bounded queue, and what is there is passed on at once. When the
    speech so far would have ended ``pause_s`` ago, had it been played from the start, a piece of
    silence of that length is passed on. So a stream behind it goes on at the pace of the clock,
    idle and with resting lips, and silence never puts it ahead of the clock. A source that delivers
    faster than it plays (text to speech) is not interrupted: its pause begins where its speech
    ends. Pauses shorter than ``pause_s`` are waited for.

    Nothing is lost: what comes out is what came in, in order, with ``num_silent`` zeros more. The
    thread may outlive the iteration by one read of the source.

    Args:
        blocks: arrays of mono samples, any length; read once.
        pause_s: seconds of stream time after which silence takes over; less than the duration of a
            chunk makes little sense.
        max_waiting: blocks in the queue; beyond them the source has to wait.

    Attributes:
        num_samples: samples passed on, silence included.
        num_silent: samples of silence among them.
    """

    def __init__(self, blocks: Iterable[Any], pause_s: float, max_waiting: int = 16) -> None:
        self.blocks, self.pause_s = blocks, pause_s
        self.num_samples = self.num_silent = 0
        self._waiting: queue.Queue[Any] = queue.Queue(max_waiting)
        self._stopped = threading.Event()

    def __iter__(self) -> Iterator[Any]:
        """Yields the blocks and the silence between them.

        Raises:
            Exception: whatever the source raises, after the blocks before it.
        """
        threading.Thread(target=self._read, name="live-speech", daemon=True).start()
        try:
            yield from self._pace()
        finally:
            self._stopped.set()

    def _pace(self) -> Iterator[Any]:
        silence = np.zeros(round(self.pause_s * SAMPLE_RATE), np.float32)
        # when the first sample was due; later when the source fell behind without a pause
        start_s = time.monotonic()
        while True:
            ends_s = start_s + self.num_samples / SAMPLE_RATE
            try:
                block = self._waiting.get(
                    timeout=max(0.0, ends_s + self.pause_s - time.monotonic())
                )
            except queue.Empty:
                self.num_samples += len(silence)
                self.num_silent += len(silence)
                yield silence
                continue
            if isinstance(block, _End):
                if block.error is not None:
                    raise block.error
                return
            start_s += max(0.0, time.monotonic() - ends_s)
            self.num_samples += len(block)
            yield block

    def _read(self) -> None:
        end = _End()
        try:
            for block in self.blocks:
                if not self._put(block):
                    return
        except BaseException as error:  # told where the blocks are used
            end = _End(error)
        self._put(end)

    def _put(self, item: Any) -> bool:
        while not self._stopped.is_set():
            try:
                self._waiting.put(item, timeout=_POLL_S)
                return True
            except queue.Full:
                continue
        return False
