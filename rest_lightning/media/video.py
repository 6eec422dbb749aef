"""Reading clips: frames through decord (PyAV where decord has no wheel), audio through PyAV, both
on one clock.

The two video backends give the same frames (tested). A reader belongs to one process: open it in
the worker that uses it. Every fault of a file is a `UserError` that names the file.
"""

from __future__ import annotations

import os
from fractions import Fraction
from functools import cache, cached_property
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from rest_lightning.constants import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME
from rest_lightning.errors import UserError
from rest_lightning.media.audio import sound_on_clock
from rest_lightning.media.container import (
    MediaError,
    keeps_its_promises,
    open_media,
    picture_stream,
    quarter_turns,
    seconds,
    sound_stream,
)
from rest_lightning.media.files import Closing

Backend = Literal["decord", "pyav"]
Frames = NDArray[np.uint8]
Samples = NDArray[np.float32]
PathLike = str | os.PathLike[str]


@cache
def has_decord() -> bool:
    """Whether decord is installed (it has no wheels for some platforms)."""
    return find_spec("decord") is not None


class VideoFile(Closing):
    """Random access to the frames of a video file, decoded on one thread.

    Attributes:
        num_frames: frames in the file.
        fps: average frames per second.

    Args:
        path: any video that FFmpeg reads.
        backend: ``decord`` or ``pyav``; None takes decord where it is installed and the file holds
            what its container says, else PyAV.

    Raises:
        UserError: the file is absent, is not a video, or is broken.
    """

    def __init__(self, path: PathLike, backend: Backend | None = None) -> None:
        self.path = os.fspath(path)
        _check_file(self.path)
        trusted = backend is None and has_decord() and keeps_its_promises(self.path)
        self.backend: Backend = backend or ("decord" if trusted else "pyav")
        self._may_change = backend is None
        try:
            self._reader: _Reader = (
                _DecordReader(self.path) if self.backend == "decord" else _PyAVReader(self.path)
            )
        except Exception as error:
            raise _broken(self.path, "a readable video", error) from None
        self.num_frames, self.fps = self._reader.num_frames, self._reader.fps

    @cached_property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels; decodes a frame, so look at the frames' shape where you have
        them.
        """
        height, width = self.read(0, 1).shape[1:3]
        return int(height), int(width)

    def read(self, start: int = 0, count: int | None = None) -> Frames:
        """Frames [start, start + count) as uint8 RGB (count, H, W, 3); to the end without
        ``count``.

        Raises:
            UserError: frames outside the file, or data that cannot be decoded.
        """
        count = self.num_frames - start if count is None else count
        if start < 0 or count < 1 or start + count > self.num_frames:
            raise UserError(
                f"{self.path}: expected frames within 0..{self.num_frames - 1}, got "
                f"{start}..{start + count - 1}: "
                "read a shorter window"
            )
        try:
            frames = self._reader.read(start, count)
        except Exception as error:
            if self._may_change and self.backend == "decord":
                self._use_pyav()
                return self.read(start, count)
            raise _broken(self.path, f"frames {start}..{start + count - 1}", error) from None
        if len(frames) != count:
            raise _broken(self.path, f"{count} frames from {start}", f"{len(frames)} frames")
        return frames

    def _use_pyav(self) -> None:
        # decord 0.6.0 fails on widths that are no multiple of 32
        try:
            self._reader, self.backend = _PyAVReader(self.path), "pyav"
        except Exception as error:
            raise _broken(self.path, "a readable video", error) from None

    def close(self) -> None:
        """Release the decoder. Closing twice is fine."""
        self._reader.close()


def read_frames(
    path: PathLike, start: int = 0, count: int | None = None, backend: Backend | None = None
) -> Frames:
    """Frames [start, start + count) of a file, uint8 RGB (count, H, W, 3). See `VideoFile`."""
    with VideoFile(path, backend) as video:
        return video.read(start, count)


def read_clip_audio(path: PathLike, num_frames: int) -> Samples:
    """Audio of a prepared clip, float32 (640 * num_frames,), sample 640k heard at the start of
    frame k.

    The codec's priming samples are left out and every block is put at its own time stamp, so that a
    late start or a gap in the stream becomes silence and shifts nothing. A short tail is filled
    with zeros.

    Args:
        path: an mp4 with 16 kHz mono audio.
        num_frames: video frames at 25 fps.

    Raises:
        UserError: no file, no audio stream, another rate or more channels, or data that cannot be
            decoded.
    """
    name = os.fspath(path)
    _check_file(name)
    samples = np.zeros(num_frames * SAMPLES_PER_FRAME, np.float32)
    num_decoded = 0
    try:
        origin_s = _check_clip_audio(name)
        for start, block in sound_on_clock(Path(name), [origin_s]):
            low, high = max(start, 0), min(start + len(block), len(samples))
            if low < high:
                samples[low:high] = block[low - start : high - start]
            num_decoded += len(block)
    except MediaError as error:
        raise _broken(name, "decodable audio", error.reason) from None
    except UserError:
        raise
    except Exception as error:
        raise _broken(name, "decodable audio", error) from None
    if not num_decoded:
        raise _broken(name, "decodable audio", "no samples")
    return samples


def first_picture_s(path: PathLike) -> Fraction:
    """Time stamp of a video's first picture in seconds; 0 where there is none.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with open_media(path) as container:
            stream = picture_stream(container)
            start = None if stream is None else seconds(stream.start_time, stream.time_base)
            return start or Fraction(0)
    except MediaError as error:
        raise _broken(os.fspath(path), "a readable video", error.reason) from None


def _check_clip_audio(name: str) -> Fraction:
    """The time stamp of the first picture, where the sound is 16 kHz mono."""
    with open_media(name) as container:
        stream = sound_stream(container)
        if stream is None:
            raise UserError(
                f"{name}: expected an audio stream, got none: remake the clip with its sound"
            )
        rate, num_channels = stream.rate, stream.codec_context.layout.nb_channels
    if rate != SAMPLE_RATE or num_channels != 1:
        raise UserError(
            f"{name}: expected {SAMPLE_RATE} Hz mono audio, got {rate} Hz with {num_channels} "
            "channels: encode its sound as 16 kHz mono"
        )
    return first_picture_s(name)


class _Reader(Protocol):
    num_frames: int
    fps: float

    def read(self, start: int, count: int) -> Frames: ...

    def close(self) -> None: ...


class _DecordReader:
    def __init__(self, path: str) -> None:
        # decord retries 10240 times at a truncated end by default, which looks like a hang
        os.environ.setdefault("DECORD_EOF_RETRY_MAX", "128")
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        self._video: Any = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
        self.num_frames = len(self._video)
        if not self.num_frames:
            raise ValueError("no frames")
        self.fps = float(self._video.get_avg_fps())

    def read(self, start: int, count: int) -> Frames:
        frames: Frames = self._video.get_batch(range(start, start + count)).asnumpy()
        return frames

    def close(self) -> None:
        self._video = None


class _PyAVReader:
    def __init__(self, path: str) -> None:
        self._container = open_media(path)
        self._stream = picture_stream(self._container)
        if self._stream is None:
            self._container.close()
            raise ValueError("no video stream")
        self.fps = float(self._stream.average_rate or FPS)
        claimed = self._stream.frames
        if not claimed or claimed > Path(path).stat().st_size:  # a picture takes a byte at least
            claimed = sum(1 for _ in self._container.decode(self._stream))
        self.num_frames = claimed
        if not self.num_frames:
            raise ValueError("no frames")

    def read(self, start: int, count: int) -> Frames:
        if start and (frames := self._read_from_key_frame(start, count)) is not None:
            return frames
        # From the start and by counting: what is always right, as time stamps of foreign files need
        # not be.
        self._container.seek(0)
        decoded = islice(self._container.decode(self._stream), start, start + count)
        return _stack([_pixels(frame) for frame in decoded])

    def _read_from_key_frame(self, start: int, count: int) -> Frames | None:
        """The same frames, decoded from the key frame before them; None where that cannot be
        trusted.
        """
        shown = self._packet_times
        if shown is None:
            return None
        wanted = shown[start : start + count]
        seek_to = next((dts for pts, dts in reversed(self._key_frames) if pts <= wanted[0]), None)
        if seek_to is None or seek_to == self._key_frames[0][1]:
            return None  # nothing to leap over
        self._container.seek(seek_to, stream=self._stream)
        frames, times = [], []
        for frame in self._container.decode(self._stream):
            if frame.pts is not None and frame.pts < wanted[0]:
                continue
            frames.append(_pixels(frame))
            times.append(frame.pts)
            if len(frames) == count:
                break
        return _stack(frames) if times == wanted else None

    @cached_property
    def _packet_times(self) -> list[int] | None:
        """When each frame is shown, in time-base units; None where the file does not say it
        clearly.
        """
        self._container.seek(0)
        packets = [
            packet
            for packet in self._container.demux(self._stream)
            if packet.size and not packet.is_discard
        ]
        times = sorted(packet.pts for packet in packets if packet.pts is not None)
        self._key_frames = sorted(
            (packet.pts, packet.dts)
            for packet in packets
            if packet.is_keyframe and packet.pts is not None and packet.dts is not None
        )
        is_clear = (
            len(times) == len(set(times)) == len(packets) == self.num_frames and self._key_frames
        )
        return times if is_clear else None

    def close(self) -> None:
        self._container.close()


def _pixels(frame: Any) -> Frames:
    pixels: Frames = frame.to_ndarray(format="rgb24")
    turns = quarter_turns(frame)
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels


def _stack(frames: list[Frames]) -> Frames:
    return np.stack(frames) if frames else np.empty((0, 0, 0, 3), np.uint8)


def _check_file(path: str) -> None:
    if not Path(path).is_file():
        raise UserError(f"expected a video file {path}, got no such file: check the path")


def _broken(path: str, expected: str, came: object) -> UserError:
    text = " ".join(str(came).split())
    return UserError(
        f"{path}: expected {expected}, got {text[:200] or type(came).__name__}: "
        "remake or remove the file"
    )


def check_memory(num_bytes: int, name: str) -> None:
    """UserError when ``num_bytes`` of decoded clips would not fit into the free memory, where that
    is known.
    """
    try:
        with Path("/proc/meminfo").open(encoding="ascii") as file:
            available = next(
                int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable")
            )
    except (OSError, StopIteration):
        return
    if num_bytes > 0.9 * available:
        raise UserError(
            f"{name}: expected the decoded clips to fit into memory, got {num_bytes / 1e9:.1f} GB "
            "with "
            f"{available / 1e9:.1f} GB free: set cache_in_memory to false"
        )
