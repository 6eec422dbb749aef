"""Video into a pipe while it is made: fragmented mp4, or raw frames."""

from __future__ import annotations

from typing import Any, BinaryIO, Literal, get_args

import numpy as np

from rest_lightning.constants import FPS
from rest_lightning.errors import UserError
from rest_lightning.streaming.writer import Encoder, VideoWriter, as_frames, interrupt_later

PipeFormat = Literal["mp4", "rgb24"]
# An index without samples in front, then a fragment for every frame. The index waits for the first sound: it tells how
# much the sound's encoder put before it (64 ms), by which a reader that joins what it decodes would be late.
_MOVFLAGS = "frag_keyframe+empty_moov+default_base_moof+delay_moov"
# The interleaver would hold the pictures back until the sound, which its encoder delays by 128 ms, has caught up.
_CONTAINER = {"frag_duration": "40000", "max_interleave_delta": "1", "flush_packets": "1"}
_GOP_FRAMES = 24


def open_pipe(pipe: BinaryIO, size_px: int, kind: PipeFormat) -> VideoWriter:
    """A writer into ``pipe``: ``mp4`` with sound, or ``rgb24`` (H * W * 3 bytes a frame, no sound).

    Raises:
        UserError: another format.
    """
    if kind == "mp4":
        return Mp4Pipe(pipe, size_px)
    if kind == "rgb24":
        return RawPipe(pipe, size_px)
    raise UserError(f"expected a format of {', '.join(get_args(PipeFormat))}, got {kind!r}: choose one")


class Mp4Pipe:
    """Writes fragmented mp4 (H.264, AAC) that plays while it grows; every frame leaves as soon as it is encoded.

    x264 runs without B-frames and lookahead, which would hold back half a second. Only the last frame of a chunk waits
    for the next one: a fragment ends when another begins.

    Args:
        pipe: anything with ``write`` and ``flush``.
        size_px, crf, preset: see :class:`rest_lightning.streaming.writer.Mp4Writer`.

    Raises:
        BrokenPipeError: from any call, when the reader has gone away.
    """

    def __init__(self, pipe: BinaryIO, size_px: int, crf: int = 18, preset: str = "veryfast") -> None:
        self._pipe, self._closed = pipe, False
        options = {"crf": str(crf), "preset": preset, "tune": "zerolatency", "g": str(_GOP_FRAMES)}
        self._encoder = Encoder(_WriteOnly(pipe), size_px, _MOVFLAGS, options, _CONTAINER)
        pipe.flush()

    @property
    def num_frames(self) -> int:
        """Frames written so far."""
        return self._encoder.num_frames

    @property
    def num_samples(self) -> int:
        """Samples of speech written so far."""
        return self._encoder.num_samples

    @property
    def duration_s(self) -> float:
        """Seconds of video written so far."""
        return self._encoder.num_frames / FPS

    def write(self, frames: np.ndarray) -> None:
        """Appends frames (n, H, W, 3), uint8 RGB."""
        with interrupt_later():
            self._encoder.write(as_frames(frames, self._encoder.height, self._encoder.width))
            self._pipe.flush()

    def write_audio(self, samples: np.ndarray) -> None:
        """Appends mono speech (n,), float32 in [-1, 1], 16 kHz."""
        with interrupt_later():
            self._encoder.write_audio(samples)
            self._pipe.flush()

    def close(self) -> None:
        """Ends the video; the pipe stays open. A second call does nothing."""
        if not self._closed:
            self._closed = True
            with interrupt_later():
                self._encoder.finish()
                self._pipe.flush()

    def abort(self) -> None:
        """Gives up; what was sent was sent."""
        if not self._closed:
            self._closed = True
            self._encoder.give_up()


class RawPipe:
    """Writes frames as they are, RGB, 8 bits a value, row by row; speech is counted and left out."""

    def __init__(self, pipe: BinaryIO, size_px: int) -> None:
        self._pipe, self._size_px = pipe, size_px
        self.num_frames = self.num_samples = 0

    @property
    def duration_s(self) -> float:
        """Seconds of video written so far."""
        return self.num_frames / FPS

    def write(self, frames: np.ndarray) -> None:
        """Appends frames (n, H, W, 3), uint8 RGB."""
        frames = as_frames(frames, self._size_px, self._size_px)
        with interrupt_later():
            for pixels in frames:
                self._pipe.write(np.ascontiguousarray(pixels).data)
                self.num_frames += 1
            self._pipe.flush()

    def write_audio(self, samples: np.ndarray) -> None:
        """Counts speech (n,)."""
        self.num_samples += len(samples)

    def close(self) -> None:
        """Sends what waits; the pipe stays open."""
        self._pipe.flush()

    def abort(self) -> None:
        """Nothing to give up: what was sent was sent."""


class _WriteOnly:
    """Shows FFmpeg nothing but ``write``: a pipe that claims to seek would get an index at its beginning."""

    def __init__(self, pipe: Any) -> None:
        self.write = pipe.write
