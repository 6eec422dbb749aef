"""An mp4 that grows as frames and speech come, and appears under its final name only when it is whole."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol

import av
import numpy as np
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame

from rest_lightning.constants import FPS, SAMPLE_RATE
from rest_lightning.errors import UserError
from rest_lightning.streaming.output import check_output, explain_write_error, temporary_name

_BLOCK_SAMPLES = 16_384
_BT601 = 6  # AVCOL_SPC_SMPTE170M: what swscale computes; tagged, so that no player has to guess


class VideoWriter(Protocol):
    """What a stream can be written to: a file, or a pipe."""

    @property
    def num_frames(self) -> int:
        """Frames written so far."""

    @property
    def num_samples(self) -> int:
        """Samples of speech written so far."""

    @property
    def duration_s(self) -> float:
        """Seconds of video written so far."""

    def write(self, frames: np.ndarray) -> None:
        """Appends frames (n, H, W, 3), uint8 RGB."""

    def write_audio(self, samples: np.ndarray) -> None:
        """Appends mono speech (n,)."""

    def close(self) -> None:
        """Finishes what was written."""

    def abort(self) -> None:
        """Gives up."""


class Encoder:
    """H.264 (yuv420p) and AAC, muxed frame by frame into an mp4 container, in bounded memory.

    Args:
        target: path, or an object with ``write``, of the container.
        size_px: side of square frames, or ``(height, width)``; even numbers.
        movflags: options of FFmpeg's mp4 muxer; ``container_options`` are further ones of the container.
        video_options: of x264.
        fps, sample_rate, audio: see :class:`Mp4Writer`.
    """

    def __init__(
        self,
        target: Any,
        size_px: int | tuple[int, int],
        movflags: str,
        video_options: dict[str, Any],
        container_options: dict[str, str] | None = None,
        fps: int = FPS,
        sample_rate: int = SAMPLE_RATE,
        audio: bool = True,
    ) -> None:
        self.height, self.width = even_sides(size_px)
        self.fps, self.sample_rate = fps, sample_rate
        self.num_frames = self.num_samples = 0
        options = {"movflags": movflags, **(container_options or {})}
        self._container = av.open(target, "w", format="mp4", options=options)
        self._video = self._container.add_stream("libx264", rate=fps)
        self._video.width, self._video.height, self._video.pix_fmt = self.width, self.height, "yuv420p"
        self._video.options = video_options
        context = self._video.codec_context
        context.thread_count = 1  # the same bits on every machine, and no cores taken from the model
        context.time_base = Fraction(1, fps)
        tag_colours(context)
        self._audio = self._container.add_stream("aac", rate=sample_rate, layout="mono") if audio else None
        if self._audio is not None:
            self._audio.bit_rate = 64_000
        self._container.start_encoding()  # opens the file: a folder that refuses says so now, not after an hour

    def write(self, frames: np.ndarray) -> None:
        """Appends frames that :func:`as_frames` has checked."""
        for pixels in frames:
            self._container.mux(self._video.encode(video_frame(pixels, self.num_frames, self.fps)))
            self.num_frames += 1

    def write_audio(self, samples: np.ndarray) -> None:
        """Appends mono speech (n,), clipped to [-1, 1]."""
        assert self._audio is not None
        samples = np.clip(np.asarray(samples, dtype=np.float32).reshape(1, -1), -1.0, 1.0)
        for start in range(0, samples.shape[1], _BLOCK_SAMPLES):
            block = np.ascontiguousarray(samples[:, start : start + _BLOCK_SAMPLES])
            frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="mono")
            frame.sample_rate = self.sample_rate
            frame.pts, frame.time_base = self.num_samples, Fraction(1, self.sample_rate)
            self._container.mux(self._audio.encode(frame))
            self.num_samples += block.shape[1]

    def finish(self) -> None:
        """Writes what the encoders hold, and the container's end."""
        if self.num_frames:
            self._container.mux(self._video.encode(None))
        if self._audio is not None and self.num_samples:
            self._container.mux(self._audio.encode(None))
        self._container.close()

    def give_up(self) -> None:
        """Closes the container, whatever becomes of it."""
        # A full disk or a closed pipe cannot take the trailer either, and the file goes away anyway.
        with suppress(OSError, ValueError, av.FFmpegError):
            self._container.close()


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
        key_frame_every: most frames from one key frame to the next; None leaves it to x264 (250).

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
        key_frame_every: int | None = None,
    ) -> None:
        self.path = Path(path)
        even_sides(size_px)
        self.closed, self._has_audio = False, audio
        self._encoder: Encoder | None = None
        check_output(self.path, overwrite)
        self._temporary = temporary_name(self.path, f"{id(self):x}")
        options = {"crf": str(crf), "preset": preset}
        if key_frame_every is not None:
            options["g"] = str(key_frame_every)
        with self._errors():
            self._encoder = Encoder(
                str(self._temporary), size_px, "+faststart", options, fps=fps, sample_rate=sample_rate, audio=audio
            )

    @property
    def encoder(self) -> Encoder:
        """What encodes and muxes."""
        assert self._encoder is not None
        return self._encoder

    @property
    def num_frames(self) -> int:
        """Frames written so far."""
        return self.encoder.num_frames

    @property
    def num_samples(self) -> int:
        """Samples of speech written so far."""
        return self.encoder.num_samples

    @property
    def duration_s(self) -> float:
        """Seconds of video written so far."""
        return self.encoder.num_frames / self.encoder.fps

    def write(self, frames: np.ndarray) -> None:
        """Appends frames (n, H, W, 3) or one frame (H, W, 3), uint8 RGB; ``n`` may be 0."""
        frames = as_frames(frames, self.encoder.height, self.encoder.width)
        with self._errors(), interrupt_later():
            self.encoder.write(frames)

    def write_audio(self, samples: np.ndarray) -> None:
        """Appends mono speech (n,), float32 in [-1, 1] (clipped beyond) at ``sample_rate``."""
        if not self._has_audio:
            raise UserError("expected a writer with an audio track, got audio=False: open it with audio=True")
        with self._errors(), interrupt_later():
            self.encoder.write_audio(samples)

    def close(self) -> None:
        """Finishes the file and moves it to ``path``. A second call does nothing."""
        if self.closed:
            return
        with self._errors(), interrupt_later():
            self.encoder.finish()
            if not self.num_frames and not self.num_samples:
                raise UserError(f"expected at least one frame for {self.path}, got none: nothing was written")
            with open(self._temporary, "rb+") as file:
                os.fsync(file.fileno())  # a full disk may tell only now
            os.replace(self._temporary, self.path)
            self.closed = True

    def abort(self) -> None:
        """Gives up: removes the temporary file and leaves whatever is under ``path`` alone."""
        if self.closed:
            return
        self.closed = True
        with interrupt_later():
            try:
                if self._encoder is not None:
                    self._encoder.give_up()
            finally:
                self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> Mp4Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if keeps(kind, self):
            self.close()
        else:
            self.abort()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turns what the operating system says into one line, and never leaves the temporary file behind."""
        if self.closed:
            raise UserError(f"expected an open writer, got a closed one ({self.path}): open a new one")
        try:
            yield
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            self.abort()
            if isinstance(error, OSError):
                raise UserError(explain_write_error(self.path, error)) from error
            raise


def keeps(kind: type[BaseException] | None, writer: VideoWriter) -> bool:
    """Whether a block that ended with this kind of exception keeps its video: Ctrl-C does, once there is a frame."""
    return kind is None or (issubclass(kind, KeyboardInterrupt) and writer.num_frames > 0)


def video_frame(pixels: np.ndarray, index: int, fps: int) -> VideoFrame:
    """RGB pixels (H, W, 3), uint8, as the yuv420p frame ``index`` that an encoder takes."""
    frame = VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
    frame.pts, frame.time_base = index, Fraction(1, fps)
    return frame.reformat(format="yuv420p", dst_colorspace="SMPTE170M")


def tag_colours(context: VideoCodecContext) -> None:
    """Tells an encoder which colours :func:`video_frame` gives."""
    context.colorspace = context.color_primaries = context.color_trc = _BT601
    context.color_range = 1


def even_sides(size_px: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width. Raises a UserError unless H.264 takes them."""
    height, width = (size_px, size_px) if isinstance(size_px, int) else size_px
    if min(height, width) < 2 or height % 2 or width % 2:
        raise UserError(f"expected even frame sides for H.264, got {height}x{width}: crop or pad by one pixel")
    return height, width


def as_frames(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Frames (n, H, W, 3), uint8, of one frame or several. Raises a UserError when they are anything else."""
    frames = frames[None] if frames.ndim == 3 else frames
    if frames.dtype != np.uint8 or frames.shape[1:] != (height, width, 3):
        raise UserError(
            f"expected uint8 frames (n, {height}, {width}, 3), got {frames.dtype} {frames.shape}: "
            "open the writer with the size of the frames"
        )
    return frames


@contextmanager
def interrupt_later() -> Iterator[None]:
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
