"""Signed recordings of live sessions: the server writes down what it generates and sends.

It never signs what a client uploads. A recording lies in a temporary folder of its own until its
session fetches it, which it can do once; it goes with the session.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from rest_lightning.constants import FPS
from rest_lightning.errors import UserError
from rest_lightning.media.files import is_disk_full
from rest_lightning.media.writer import BackgroundWriter, Mp4Writer
from rest_lightning.serve.limits import Refused
from rest_lightning.serve.protocol import ChannelClosed, Pcm
from rest_lightning.serve.resample import MonoResampler
from rest_lightning.serve.uploads import RECORDING_FOLDER

if TYPE_CHECKING:
    from rest_lightning.media.provenance import Signer

LOG = logging.getLogger("rest_lightning.serve")
RATE_HZ = 48_000  # whatever the session's sound is, and changes to, nothing of it is lost
_MAX_WAITING_FRAMES = 125  # five seconds in which the disk, or the processor, may stand still
_MAX_BITS_PER_S = 5_000_000  # bounds the file: 10 minutes are 380 MB at most
Say = Callable[..., Awaitable[None]]


class Recording:
    """One recording. Only :meth:`add` belongs to the event loop; the others wait for the disk.

    Args:
        signer: signs the finished file.
        size_px: side of the pictures.
        longest_s: the recording ends by itself then.
    """

    def __init__(self, signer: Signer, size_px: int, longest_s: float) -> None:
        self.name = f"synthetic-talking-head-{datetime.now(UTC):%Y-%m-%dT%H-%M-%S}.mp4"
        self.num_frames = 0
        self._signer, self._size_px, self._longest_s = signer, size_px, longest_s
        self._lock = threading.Lock()  # a session that ends waits for what its threads have begun
        self._is_over = False
        self._folder: Path | None = None
        self._background: BackgroundWriter | None = None
        self._resampler = MonoResampler(RATE_HZ)

    def open(self) -> None:
        """Begins the file. Raises a UserError."""
        with self._lock:
            if self._is_over:  # the session has ended before this thread began
                return
            try:
                self._folder = Path(tempfile.mkdtemp(prefix=f"{RECORDING_FOLDER}{os.getpid()}_"))
                writer = Mp4Writer(
                    self._folder / self.name,
                    self._size_px,
                    sample_rate=RATE_HZ,
                    signer=self._signer,
                    max_bits_per_s=_MAX_BITS_PER_S,
                )
                self._background = BackgroundWriter(writer, _MAX_WAITING_FRAMES, threaded=True)
            except Exception as error:
                self._remove()
                raise _told(error) from error

    def add(self, picture: np.ndarray, sound: Pcm, rate_hz: int) -> str | None:
        """Takes what was sent of 40 ms, and never waits.

        Args:
            picture: uint8 (H, W, 3); must not change.
            sound: int16 (n,) or (n, channels).
            rate_hz: of the sound.

        Returns:
            One line when the recording ends here, else None.
        """
        assert self._background is not None, "not open"
        samples = _floats(self._resampler.push(sound, rate_hz))
        try:
            if not self._background.offer(picture[None], samples):
                return "the server is too busy to record on: what came before is kept"
        except Exception:  # of the writer: told by finish
            return "the recording has failed"
        self.num_frames += 1
        if self.num_frames >= self._longest_s * FPS:
            return f"a recording lasts {self._longest_s / 60:g} minutes: record again"
        return None

    def finish(self) -> None:
        """Writes what waits, and signs it. Raises a UserError; nothing is left then."""
        with self._lock:
            try:
                if not self.num_frames or self._background is None:
                    raise UserError(
                        "expected a second of video to record, got none: let the recording run"
                    )
                nothing = np.zeros((0, self._size_px, self._size_px, 3), np.uint8)
                self._background.write(nothing, _floats(self._resampler.flush()))
                self._background.close()
            except Exception as error:
                self._discard()
                if not self.num_frames:
                    raise
                raise _told(error) from error

    def hand_over(self) -> BinaryIO:
        """The finished file, open; its name is gone, so that it goes with whoever closes it."""
        with self._lock:
            assert self._folder is not None
            file = (self._folder / self.name).open("rb")
            self._remove()
            return file

    def discard(self) -> None:
        """Ends whatever goes on, and leaves nothing."""
        with self._lock:
            self._discard()

    def _discard(self) -> None:
        self._is_over = True
        if self._background is not None:
            self._background.abort()
        self._remove()

    def _remove(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _floats(samples: Pcm) -> np.ndarray:
    return samples.astype(np.float32) / 32768.0


def _told(error: Exception) -> UserError:
    """One line for the client, without names of the server's files; the log has the place."""
    LOG.warning("a recording failed", exc_info=error)
    if is_disk_full(error):
        return UserError("expected room for the recording, but the server's disk is full")
    return UserError("the server failed at the recording: whoever runs it finds why in its log")


class Recordings:
    """The recordings of a server that are signed and wait to be fetched, each by a token that its
    session alone was told.

    Args:
        signer: of all recordings.
        longest_s: of each.
    """

    def __init__(self, signer: Signer, longest_s: float) -> None:
        self.signer, self.longest_s = signer, longest_s
        self._waiting: dict[str, Recording] = {}

    def offer(self, recording: Recording) -> str:
        """Keep a finished recording; returns its token."""
        token = secrets.token_urlsafe(24)
        self._waiting[token] = recording
        return token

    def take(self, token: str) -> Recording:
        """The recording of a token, which is good once. Raises Refused."""
        recording = self._waiting.pop(token, None)
        if recording is None:
            raise Refused(
                "token",
                "this recording was fetched already, or its session has ended: record again",
            )
        return recording

    def withdraw(self, token: str) -> Recording | None:
        """The token is good no more; the recording, unless it was fetched."""
        return self._waiting.pop(token, None)


class Recorder:
    """The recordings of one session, one at a time: a new one takes the place of one that nobody
    has fetched.

    Args:
        recordings: of the server.
        say: sends a text message to the client.
        size_px: side of the pictures.
    """

    def __init__(self, recordings: Recordings, say: Say, size_px: int) -> None:
        self._recordings, self._say, self._size_px = recordings, say, size_px
        self._task: asyncio.Task[None] | None = None
        self._ended: asyncio.Future[str | None] | None = None
        self._recording: Recording | None = None  # takes what is sent
        self._kept: Recording | None = None  # until it is fetched, or the session ends
        self._token, self._first = "", 0

    async def start(self) -> None:
        """Record from the next picture on; told with ``recording``."""
        if self._task is not None and not self._task.done():
            text = "expected one recording at a time, got a second one: end the first"
            await self._say("error", code="recording", message=text)
            return
        self._ended = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._record(self._ended))

    def add(self, index: int, picture: np.ndarray, sound: Pcm, rate_hz: int) -> None:
        """Picture ``index`` was sent, with its sound; see :meth:`Recording.add`."""
        if self._recording is not None:
            if not self._recording.num_frames:
                self._first = index
            why = self._recording.add(picture, sound, rate_hz)
            if why is not None:
                self._end(why)

    def stop(self) -> None:
        """End the recording, which is told with ``recorded``; nothing, where it has ended."""
        self._end(None)

    async def aclose(self) -> None:
        """Nothing is left of what was not fetched."""
        self._recording = None
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        await self._forget()

    def _end(self, why: str | None) -> None:
        self._recording = None
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(why)

    async def _forget(self) -> None:
        kept, self._kept = self._kept, None
        if kept is not None and (not self._token or self._recordings.withdraw(self._token)):
            await asyncio.to_thread(kept.discard)
        self._token = ""

    async def _record(self, ended: asyncio.Future[str | None]) -> None:
        await self._forget()
        recording = Recording(self._recordings.signer, self._size_px, self._recordings.longest_s)
        self._kept = recording
        try:
            await asyncio.to_thread(recording.open)
            if not ended.done():
                self._recording = recording
                await self._say("recording")
            why = await ended
            await asyncio.to_thread(recording.finish)
            self._token = self._recordings.offer(recording)
            await self._say(
                "recorded",
                url=f"api/recordings/{self._token}",
                name=recording.name,
                frame=self._first,
                frames=recording.num_frames,
                why=why,
            )
        except UserError as error:
            await self._say("error", code="record", message=str(error))
        except ChannelClosed:
            pass  # the session ends, and its recording with it
        finally:
            self._recording = None


def try_signer(signer: Signer) -> None:
    """Signs a black picture, and throws it away: a certificate that is not for signing is told
    before anybody records.

    Raises:
        UserError: it cannot sign, or there is no room for temporary files.
    """
    with (
        tempfile.TemporaryDirectory(prefix=f"{RECORDING_FOLDER}{os.getpid()}_") as folder,
        Mp4Writer(Path(folder) / "try.mp4", 16, audio=False, signer=signer) as writer,
    ):
        writer.write(np.zeros((1, 16, 16, 3), np.uint8))
