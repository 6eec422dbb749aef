"""An mp4 that grows as frames and speech come, and appears under its final name only when it is whole."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import FrameType, TracebackType

import av
import numpy as np
from av.video.frame import VideoFrame

from rest_lightning.constants import FPS, SAMPLE_RATE
from rest_lightning.errors import UserError
from rest_lightning.streaming.output import check_output, explain_write_error

_BLOCK_SAMPLES = 16_384
_BT601 = 6  # AVCOL_SPC_SMPTE170M: what swscale computes; tagged, so that no player has to guess


class Mp4Writer:
    """Writes H.264 (yuv420p) and AAC to ``path``, frame by frame, in bounded memory.

    Everything goes to a hidden temporary file in the same folder; :meth:`close` moves it to ``path``. As a context
    manager it closes on success and on Ctrl-C (the video of what was done so far stays playable) and aborts on any
    other error.

    Args:
        path: the final name, ending in ``.mp4``.
        size_px: side of square frames, or ``(height, width)``; even numbers.
        fps: frames per second, a constant rate.
        sample_rate: rate of the mono speech given to :meth:`write_audio`, in Hz.
        crf: constant rate factor of x264; 18 looks lossless, 51 is the worst.
        overwrite: whether a file under the final name may be replaced.
        audio: whether the file gets an audio track. A track that receives no sample is left out.
        preset: preset of x264.

    Raises:
        UserError: on a name, size or folder that cannot be written, on an existing file, and when the disk is full.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        size_px: int | tuple[int, int],
        fps: int = FPS,
        sample_rate: int = SAMPLE_RATE,
        crf: int = 18,
        overwrite: bool = False,
        audio: bool = True,
        preset: str = "veryfast",
    ) -> None:
        self.path = Path(path)
        self.height, self.width = (size_px, size_px) if isinstance(size_px, int) else size_px
        self.fps = fps
        self.sample_rate = sample_rate
        self.num_frames = 0
        self.num_samples = 0
        self._closed = False
        if min(self.height, self.width) < 2 or self.height % 2 or self.width % 2:
            size = f"{self.height}x{self.width}"
            raise UserError(f"expected even frame sides for H.264, got {size}: crop or pad by one pixel")
        check_output(self.path, overwrite)
        self._temporary = self.path.with_name(f".{self.path.stem}.{os.getpid()}.{id(self):x}.part.mp4")
        with self._errors():
            self._container = av.open(str(self._temporary), "w", format="mp4", options={"movflags": "+faststart"})
            self._video = self._container.add_stream("libx264", rate=fps)
            self._video.width, self._video.height, self._video.pix_fmt = self.width, self.height, "yuv420p"
            self._video.options = {"crf": str(crf), "preset": preset}
            context = self._video.codec_context
            context.thread_count = 1  # the same bits on every machine, and no cores taken from the model
            context.time_base = Fraction(1, fps)
            context.colorspace = context.color_primaries = context.color_trc = _BT601
            context.color_range = 1
            self._audio = self._container.add_stream("aac", rate=sample_rate, layout="mono") if audio else None
            if self._audio is not None:
                self._audio.bit_rate = 64_000
            self._container.start_encoding()  # opens the file: a folder that refuses says so now, not after an hour

    @property
    def duration_s(self) -> float:
        """Seconds of video written so far."""
        return self.num_frames / self.fps

    def write(self, frames: np.ndarray) -> None:
        """Appends frames (n, H, W, 3) or one frame (H, W, 3), uint8 RGB; ``n`` may be 0."""
        frames = frames[None] if frames.ndim == 3 else frames
        if frames.dtype != np.uint8 or frames.shape[1:] != (self.height, self.width, 3):
            raise UserError(
                f"expected uint8 frames (n, {self.height}, {self.width}, 3), got {frames.dtype} {frames.shape}: "
                "open the writer with the size of the frames"
            )
        with self._errors(), _interrupt_later():
            for pixels in frames:
                frame = VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                frame.pts, frame.time_base = self.num_frames, Fraction(1, self.fps)
                self._container.mux(self._video.encode(frame.reformat(format="yuv420p", dst_colorspace="SMPTE170M")))
                self.num_frames += 1

    def write_audio(self, samples: np.ndarray) -> None:
        """Appends mono speech (n,), float32 in [-1, 1] (clipped beyond) at ``sample_rate``."""
        if self._audio is None:
            raise UserError("expected a writer with an audio track, got audio=False: open it with audio=True")
        samples = np.clip(np.asarray(samples, dtype=np.float32).reshape(1, -1), -1.0, 1.0)
        with self._errors(), _interrupt_later():
            for start in range(0, samples.shape[1], _BLOCK_SAMPLES):
                block = np.ascontiguousarray(samples[:, start : start + _BLOCK_SAMPLES])
                frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="mono")
                frame.sample_rate = self.sample_rate
                frame.pts, frame.time_base = self.num_samples, Fraction(1, self.sample_rate)
                self._container.mux(self._audio.encode(frame))
                self.num_samples += block.shape[1]

    def close(self) -> None:
        """Finishes the file and moves it to ``path``. A second call does nothing."""
        if self._closed:
            return
        with self._errors(), _interrupt_later():
            if self.num_frames:
                self._container.mux(self._video.encode(None))
            if self._audio is not None and self.num_samples:
                self._container.mux(self._audio.encode(None))
            self._container.close()
            if not self.num_frames and not self.num_samples:
                raise UserError(f"expected at least one frame for {self.path}, got none: nothing was written")
            with open(self._temporary, "rb+") as file:
                os.fsync(file.fileno())  # a full disk may tell only now
            os.replace(self._temporary, self.path)
            self._closed = True

    def abort(self) -> None:
        """Gives up: removes the temporary file and leaves whatever is under ``path`` alone."""
        if self._closed:
            return
        self._closed = True
        with _interrupt_later():
            try:
                self._container.close()
            except (OSError, ValueError):
                pass  # a full disk cannot take the trailer either, and the file goes away anyway
            finally:
                self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> Mp4Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or (issubclass(kind, KeyboardInterrupt) and self.num_frames):
            self.close()
        else:
            self.abort()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turns what the operating system says into one line, and never leaves the temporary file behind."""
        if self._closed:
            raise UserError(f"expected an open writer, got a closed one ({self.path}): open a new one")
        try:
            yield
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            if hasattr(self, "_container"):
                self.abort()
            else:
                self._temporary.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise UserError(explain_write_error(self.path, error)) from error
            raise


@contextmanager
def _interrupt_later() -> Iterator[None]:
    """Holds Ctrl-C back until the block is done: half a packet in the file would be a broken video."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[tuple[int, FrameType | None]] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: pending.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous if previous is not None else signal.SIG_DFL)
    if pending and callable(previous):
        previous(*pending[0])
