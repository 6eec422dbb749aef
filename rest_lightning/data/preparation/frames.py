"""Any video as upright frames at 25 fps: variable rates, rotated phones, odd time stamps, damaged
ends.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter

from rest_lightning.constants import FPS
from rest_lightning.errors import UserError
from rest_lightning.media.audio import BACK_S
from rest_lightning.media.container import (
    MediaError,
    deinterlaced,
    open_media,
    picture_stream,
    quarter_turns,
    reason_of,
    seconds,
    wide_colours,
)
from rest_lightning.media.faces import Picture

MIN_SIDE_PX = 32
_SPF = Fraction(1, FPS)
_STILL = (
    "image2",
    "png_pipe",
    "jpeg_pipe",
    "webp_pipe",
    "bmp_pipe",
    "tiff_pipe",
    "gif_pipe",
    "piped",
    "ico",
)
_BACKWARDS_S = Fraction(1, 1000)


class SourceError(UserError):
    """A video that cannot be used; one line, without its name.

    Attributes:
        stage: at which it ended, see `rows.STAGES`.
    """

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(reason)
        self.stage = stage


@dataclass(frozen=True)
class Probe:
    """What a video's header says.

    Attributes:
        width, height: upright and with square pixels.
        rotation: counterclockwise degrees that make it upright, 0, 90, 180 or 270.
        fps: average frames per second, None where unknown.
        duration_s: None where unknown.
        num_audio_tracks: the first, or the one marked as default, is used.
    """

    width: int
    height: int
    rotation: int
    fps: float | None
    duration_s: float | None
    num_audio_tracks: int


@dataclass(frozen=True)
class Frame:
    """One frame at 25 fps.

    Attributes:
        index: number at 25 fps; a hole in the video leaves numbers out.
        is_repeat: whether it shows the same picture as the frame before.
    """

    index: int
    is_repeat: bool
    decoded: VideoFrame
    rotation: int
    reformatter: VideoReformatter

    def picture(self, width: int, height: int) -> Picture:
        """Upright uint8 RGB (height, width, 3), averaged over areas where it is reduced."""
        if self.rotation in (90, 270):
            width, height = height, width
        how = "AREA" if width < self.decoded.width else "BICUBIC"
        # One thread: FFmpeg would start new ones for every frame.
        reduced = self.reformatter.reformat(
            self.decoded, width, height, "rgb24", interpolation=how, threads=1
        )
        return np.ascontiguousarray(np.rot90(reduced.to_ndarray(), self.rotation // 90))


def probe(path: Path, min_fps: float = 0.0) -> Probe:
    """Read the header and the first frame.

    Raises:
        SourceError: unreadable, no video, too small, too slow.
    """
    _check_file(path)
    with open_container(path) as container:
        stream = video_stream(container)
        fps = float(stream.average_rate) if stream.average_rate else None
        if fps is not None and fps < min_fps:
            raise SourceError(
                "probe", (f"expected at least {min_fps:g} frames per second, got {fps:.3g}")
            )
        duration_s = _duration_s(container, stream)
        num_audio_tracks = len(container.streams.audio)
        first = next(decoded(container, stream), None)
        if first is None:
            raise SourceError(
                "decode",
                ("expected frames, got none that can be decoded: the file is damaged or empty"),
            )
        colours = wide_colours(first)
        if colours is not None:
            raise SourceError(
                "probe",
                f"expected colours of SDR video (BT.709 or BT.601), got {colours}: convert it, "
                "for example with FFmpeg's zscale and tonemap",
            )
        rotation = 90 * quarter_turns(first)
        aspect = stream.sample_aspect_ratio or Fraction(1)
        aspect = aspect if Fraction(1, 10) <= aspect <= 10 else Fraction(1)
        width, height = round(first.width * aspect), first.height
    if rotation in (90, 270):
        width, height = height, width
    if min(width, height) < MIN_SIDE_PX:
        raise SourceError(
            "probe", (f"expected at least {MIN_SIDE_PX} pixels on each side, got {width}x{height}")
        )
    return Probe(width, height, rotation, fps, duration_s, num_audio_tracks)


class FrameStream:
    """Frames at 25 fps of a video, one at a time.

    Frame k shows what the video shows in the middle of its 40 ms; times count from the first frame.

    Attributes:
        damage: after the iteration: what was wrong with the file, or None.
        origins_s: after the iteration: the time stamp of time 0, of each part where they start
            again.

    Args:
        path: the video.
        probe: of it.
        max_gap_s: after a longer hole no frame is repeated, and numbers are left out.
    """

    def __init__(self, path: Path, probe: Probe, max_gap_s: float = 2.0) -> None:
        self.path, self.probe, self.max_gap = path, probe, Fraction(max_gap_s)
        self.damage: str | None = None
        self.origins_s = [Fraction(0)]
        self._reformatter = VideoReformatter()

    def __iter__(self) -> Iterator[Frame]:
        damage: list[str] = []
        with open_container(self.path) as container:
            stream = video_stream(container)
            usual = 1 / stream.average_rate if stream.average_rate else _SPF
            index, last = 0, Fraction(0)
            shown: VideoFrame | None = None
            clock = _Clock(usual, self.max_gap + _SPF)
            for time, frame in clock.timed(deinterlaced(decoded(container, stream, damage))):
                if shown is not None:
                    hole = time - last > self.max_gap
                    yield from self._repeat(shown, index, last + usual if hole else time)
                    index = max(index, _next_index(time))
                shown, last = frame, time
            if shown is not None:
                yield from self._repeat(shown, index, last + usual)
        self.origins_s = clock.origins_s or [Fraction(0)]
        self.damage = (
            damage[0]
            if damage
            else self._truncation(float(last + usual) if shown is not None else 0.0)
        )

    def _repeat(self, shown: VideoFrame, index: int, end: Fraction) -> Iterator[Frame]:
        """The shown frame at all places before ``end``."""
        for number, place in enumerate(range(index, _next_index(end))):
            yield Frame(place, number > 0, shown, self.probe.rotation, self._reformatter)

    def _truncation(self, end_s: float) -> str | None:
        claimed_s = self.probe.duration_s
        if claimed_s is None or end_s >= claimed_s - 0.5 - 0.01 * claimed_s:
            return None
        return (
            f"expected {claimed_s:.2f} s of video as its header says, got {end_s:.2f} s: the "
            "file is truncated"
        )


def _next_index(time: Fraction) -> int:
    """Number of the first frame whose middle does not lie before ``time``."""
    return max(0, -((_SPF / 2 - time) // _SPF))


class _Clock:
    """Times of frames from the first one on.

    Frames that go back in time a little are left out. Where time stamps start again (joined
    recordings, a discontinuity of MPEG-TS) another part begins, after a hole that ends every clip.

    Attributes:
        origins_s: time stamp that is time 0, of each part.
    """

    def __init__(self, usual: Fraction, hole: Fraction) -> None:
        self.origins_s: list[Fraction] = []
        self._usual, self._hole = usual, hole

    def timed(self, frames: Iterator[VideoFrame]) -> Iterator[tuple[Fraction, VideoFrame]]:
        """Each frame with its time."""
        last = -self._usual
        for frame in frames:
            stamp = seconds(frame.pts, frame.time_base)
            if stamp is None:
                time = last + self._usual
            else:
                if not self.origins_s:
                    self.origins_s.append(stamp - max(last + self._usual, Fraction(0)))
                elif stamp - self.origins_s[-1] < last - BACK_S:
                    self.origins_s.append(stamp - (last + self._usual + self._hole))
                time = stamp - self.origins_s[-1]
            if time < last + _BACKWARDS_S and last >= 0:
                continue
            yield time, frame
            last = time


def decoded(
    container: Any, stream: Any, damage: list[str] | None = None, what: str = "frames"
) -> Iterator[Any]:
    """Decoded frames of a stream; a few bad packets are skipped, more end it and are told in
    ``damage``.
    """
    num_bad = num_good = 0
    at_s = 0.0
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
            frames = packet.decode() if packet is not None else []
        except (av.FFmpegError, ValueError, ZeroDivisionError, EOFError) as error:
            num_bad += 1
            if num_bad > 2 + num_good // 100:
                if damage is not None:
                    damage.append(
                        f"expected {what} that can be decoded, got '{reason_of(error)}' "
                        f"after {at_s:.2f} s"
                    )
                return
            continue
        if packet is None:
            return
        for frame in frames:
            num_good += 1
            at_s = frame.time or at_s
            yield frame


def open_container(path: Path) -> Any:
    """An open PyAV container. Raises SourceError."""
    try:
        return open_media(path)
    except MediaError as error:
        raise SourceError(
            "probe",
            f"expected a video, got '{error.reason}': the file is damaged or another kind",
        ) from None


def video_stream(container: Any) -> Any:
    """The video stream, on one decoding thread. Raises SourceError when there is none."""
    name = container.format.name
    if name in _STILL or name.endswith("_pipe"):
        raise SourceError("probe", "expected a video, got a still image")
    stream = picture_stream(container)
    if stream is not None:
        return stream
    if any(not is_picture(s) for s in container.streams.video):
        raise SourceError("probe", "expected a video codec that FFmpeg decodes, got another")
    if container.streams.audio:
        raise SourceError("probe", "expected a video stream, got sound only")
    kinds = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
    raise SourceError("probe", f"expected a video stream, got {kinds} only")


def is_picture(stream: Any) -> bool:
    """Whether a video stream is the cover picture of a sound file."""
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _duration_s(container: Any, stream: Any) -> float | None:
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return None


def _check_file(path: Path) -> None:
    try:
        info = path.stat()
        if stat.S_ISREG(info.st_mode) and info.st_size:
            with open(path, "rb") as file:
                file.read(1)
    except OSError as error:
        raise SourceError(
            "probe", (f"expected a readable file, got '{os.strerror(error.errno or 0).lower()}'")
        ) from None
    if not stat.S_ISREG(info.st_mode):
        raise SourceError("probe", "expected a file, got a pipe, a device or a folder")
    if not info.st_size:
        raise SourceError("probe", "expected a video, got an empty file of zero bytes")
