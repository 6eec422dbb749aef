"""Writing beside the model: frames go to a thread, and the stream goes on; with two cores or fewer there is no thread.

Measured on two cores: 119 frames per second when the stream writes for itself, 110 with a thread beside it, for the
model's own threads then wait for the one that shares its core.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from rest_lightning.constants import SAMPLES_PER_FRAME
from rest_lightning.errors import UserError
from rest_lightning.machine import num_usable_cores
from rest_lightning.streaming.writer import VideoWriter, interrupt_later, keeps

if TYPE_CHECKING:
    from rest_lightning.streaming.session import StreamingSession

THREAD_VARIABLE = "REST_WRITER_THREAD"
_MIN_CORES = 3
_POLL_S = 0.1


def writes_in_thread(num_cores: int | None = None) -> bool:
    """Whether a video is written in a thread of its own: with three cores or more, unless ``REST_WRITER_THREAD`` in the
    environment says 0 (never) or 1 (always).

    Args:
        num_cores: that this process may use; None asks the system.

    Raises:
        UserError: another value of the variable.
    """
    variable = os.environ.get(THREAD_VARIABLE)
    if variable not in (None, "0", "1"):
        raise UserError(f"expected {THREAD_VARIABLE}=0 or 1, got {variable!r}: leave it out to go by the cores")
    if variable is not None:
        return variable == "1"
    return (num_usable_cores() if num_cores is None else num_cores) >= _MIN_CORES


class BackgroundWriter:
    """Hands frames and speech to a writer in a thread of its own; encoders and pipes release Python's lock.

    At most ``max_waiting`` chunks wait: a slow writer, or the slow reader of a pipe, makes the caller wait and never
    makes memory grow. An error of the writer is raised by the next call, and by :meth:`close`. As a context manager it
    behaves like :class:`rest_lightning.streaming.writer.Mp4Writer`: after Ctrl-C everything handed over is written, and
    the video is closed.

    Args:
        writer: what writes; nobody else may use it until :meth:`close`. Arrays that were handed over must not change.
        max_waiting: chunks in the queue.
        threaded: False writes at once, in the caller's thread; nothing ever waits then. None: :func:`writes_in_thread`.

    Attributes:
        busy_s: seconds spent writing.
    """

    def __init__(self, writer: VideoWriter, max_waiting: int = 2, threaded: bool | None = None) -> None:
        self.threaded = writes_in_thread() if threaded is None else threaded
        self.writer = writer
        self.busy_s = 0.0
        self._error: BaseException | None = None
        self._waiting: queue.Queue[tuple[np.ndarray, np.ndarray] | None] = queue.Queue(max_waiting)
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        if self.threaded:
            self._thread.start()

    def write(self, frames: np.ndarray, samples: np.ndarray) -> None:
        """Hands over frames (n, H, W, 3) and the speech that belongs to them: an interruption finds both or none."""
        if self.threaded:
            self._put((frames, samples))
        elif self._error is None:
            with interrupt_later():
                self._write(frames, samples)
        self._raise()

    def drain(self) -> None:
        """Waits until everything is written; nothing more may be handed over then."""
        with interrupt_later():
            self._end()
        self._raise()

    def close(self) -> None:
        """Waits for the thread, then finishes the video. A second call does nothing."""
        self.drain()
        self.writer.close()

    def abort(self) -> None:
        """Drops what waits and gives up."""
        with interrupt_later():
            while not self._waiting.empty():
                try:
                    self._waiting.get_nowait()
                except queue.Empty:
                    break
            self._end()
        self.writer.abort()

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with interrupt_later():
            if kind is None or issubclass(kind, KeyboardInterrupt):
                self._end()
        if self._error is None and keeps(kind, self.writer):
            self.close()
        else:
            self.abort()
            if kind is None or issubclass(kind, KeyboardInterrupt):
                self._raise()

    def _end(self) -> None:
        if self._thread.is_alive():
            self._put(None)
            self._thread.join()

    def _put(self, item: tuple[np.ndarray, np.ndarray] | None) -> None:
        while self._error is None and self._thread.is_alive():  # after an error nobody takes what waits
            try:
                self._waiting.put(item, timeout=_POLL_S)
                return
            except queue.Full:
                continue

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while self._error is None and (item := self._waiting.get()) is not None:
            self._write(*item)

    def _write(self, frames: np.ndarray, samples: np.ndarray) -> None:
        start_s = time.perf_counter()
        try:
            self.writer.write(frames)
            if len(samples):
                self.writer.write_audio(samples)
        except BaseException as error:  # told to the caller
            self._error = error
        self.busy_s += time.perf_counter() - start_s


def write_stream(session: StreamingSession, speech: Iterable[np.ndarray], writer: BackgroundWriter) -> Iterator[int]:
    """Streams speech (float32 blocks, 16 kHz) into a video; yields the number of frames of every chunk.

    Speech is held back until its frames are there: in an interrupted video it ends with the pictures. What the stream
    waits for the writer is charged to the stage ``writing``.
    """
    waiting: deque[np.ndarray] = deque()
    num_frames = num_samples = 0

    def listened() -> Iterator[np.ndarray]:
        for block in speech:
            waiting.append(block)
            yield block

    for frames in session.stream(listened()):
        num_frames += len(frames)
        samples = _take(waiting, num_frames * SAMPLES_PER_FRAME - num_samples)
        num_samples += len(samples)
        with session.clock.stage("writing"):
            writer.write(frames, samples)
        yield len(frames)


def _take(waiting: deque[np.ndarray], count: int) -> np.ndarray:
    """The first ``count`` samples of what waits, or all there are."""
    taken = []
    while waiting and count > 0:
        block = waiting.popleft()
        if len(block) > count:
            waiting.appendleft(block[count:])
            block = block[:count]
        taken.append(block)
        count -= len(block)
    return np.concatenate([np.zeros(0, np.float32), *taken])
