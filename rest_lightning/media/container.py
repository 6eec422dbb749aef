"""Media files of strangers, opened in one way: as local files, in containers that hold the media
themselves, and with a bound on the size of pictures.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import av
from av.container import InputContainer

from rest_lightning.errors import UserError

MAX_PIXELS = 8192 * 4608
"""Pixels of one picture of a video, 38 million: 8K is read, and one picture is at most 113 MB of
RGB."""

# Demuxers that name other files or addresses: a file of a stranger must not reach beyond itself.
_REACHES_OUT = (
    "concat,dash,hls,imf,lavfi,rtp,rtsp,sap,sdp,smoothstreaming,webm_dash_manifest,tee,fifo"
)
# Demuxers of samples without a header: they are chosen by the name's ending alone, and guess the
# rate.
HEADERLESS = (
    "alaw,mulaw,f32be,f32le,f64be,f64le,s8,s16be,s16le,s24be,s24le,s32be,s32le,u8,u16be,u16le,"
    "u24be,u24le,u32be,u32le,data,bin,vidc,g722,g726,g726le,g728,g729,sln,rawvideo,tty"
)


class MediaError(UserError):
    """A file that FFmpeg cannot read.

    Attributes:
        reason: FFmpeg's, in a few words.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(
            f"{os.fspath(path)}: expected sound or video, got a file that cannot be read "
            f"({reason}): copy or export it again"
        )
        self.reason = reason


@dataclass
class Losses:
    """What a pass over a stream could not decode.

    Attributes:
        num_bad, num_good: packets that were left out, and frames that were decoded.
        seconds: sound or video in stretches that were left out; single packets (a tag between
            frames, a joint) do not count.
        first_s: where the first of these stretches begins.
        error: what FFmpeg said first.
    """

    num_bad: int = 0
    num_good: int = 0
    seconds: float = 0.0
    first_s: float | None = None
    error: str | None = None


_TAG_PACKETS = 3
"""As many bad packets in a row are a tag or a joint, and no loss."""


def open_media(path: str | os.PathLike[str]) -> InputContainer:
    """An open container.

    The name is a file whatever it looks like ("12:30.wav" and "http:x.wav" too), and what it holds
    may not name other files or addresses, as playlists do.

    Raises:
        MediaError: FFmpeg cannot read it.
    """
    options = {
        "protocol_whitelist": "file",
        "format_whitelist": _formats(),
        "max_pixels": str(MAX_PIXELS),
    }
    try:
        return av.open(f"file:{os.fspath(path)}", options=options, metadata_errors="ignore")
    except (av.FFmpegError, OSError, ValueError, MemoryError) as error:
        raise MediaError(path, reason_of(error)) from None


@cache
def _formats() -> str:
    left_out = {*_REACHES_OUT.split(","), *HEADERLESS.split(",")}
    return ",".join(sorted(name for name in av.formats_available if name not in left_out))


def sound_stream(container: InputContainer) -> Any:
    """The sound track of a file: the one marked as default, else the first, of those that can be
    decoded; None where there is none.
    """
    streams = [s for s in container.streams.audio if s.codec_context is not None]
    marked = (s for s in streams if s.disposition & av.stream.Disposition.default)
    return next(marked, streams[0] if streams else None)


def picture_stream(container: InputContainer) -> Any:
    """The video track of a file: the one marked as default, else the first, without cover pictures
    of sound files; None where there is none. It decodes on one thread.
    """
    disposition = av.stream.Disposition
    streams = [
        s
        for s in container.streams.video
        if s.codec_context is not None and not s.disposition & disposition.attached_pic
    ]
    marked = (s for s in streams if s.disposition & disposition.default)
    stream = next(marked, streams[0] if streams else None)
    if stream is not None:
        # every thread more holds frames of its own: memory stays bounded
        stream.codec_context.thread_count = 1
    return stream


def quarter_turns(frame: Any) -> int:
    """How many quarter turns counterclockwise make a frame upright, as the display matrix of a
    phone's video says: 0 to 3.
    """
    return round(frame.rotation / 90) % 4


def keeps_its_promises(path: str | os.PathLike[str]) -> bool:
    """Whether a video holds as many pictures as its container says, of a size within bounds.

    Readers in C++ that are not maintained (decord) make room for what a container says, and take
    the process with them: what does not pass is read with PyAV alone.
    """
    try:
        with open_media(path) as container:
            stream = picture_stream(container)
            if stream is None or not stream.frames:
                return False
            if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
                return False
            num_packets = sum(1 for packet in container.demux(stream) if packet.size)
            return bool(num_packets == stream.frames)
    except (MediaError, av.FFmpegError, ValueError, MemoryError):
        return False


def deinterlaced(frames: Iterator[Any]) -> Iterator[Any]:
    """Frames of a video, interlaced ones (both fields in one frame) made whole by bwdif; frames of
    progressive video are handed on as they are.
    """
    graph: Any = None
    shape: tuple[Any, ...] = ()
    for frame in frames:
        now = (frame.width, frame.height, frame.format.name)
        if graph is not None and now != shape:
            yield from _pulled(graph, None)
            graph = None
        if graph is None and frame.interlaced_frame:
            graph, shape = _deinterlacer(frame), now
        if graph is None:
            yield frame
        else:
            yield from _pulled(graph, frame)
    if graph is not None:
        yield from _pulled(graph, None)


def _deinterlacer(frame: Any) -> Any:
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=frame.width,
        height=frame.height,
        format=frame.format,
        name="in",
        time_base=frame.time_base or Fraction(1, 90_000),
    )
    bwdif, sink = graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink")
    source.link_to(bwdif)
    bwdif.link_to(sink)
    graph.configure()
    return graph


def _pulled(graph: Any, frame: Any) -> Iterator[Any]:
    graph.push(frame)
    while True:
        try:
            yield graph.pull()
        except (av.BlockingIOError, av.EOFError):
            return


def wide_colours(frame: Any) -> str | None:
    """Name of the colours of a frame that an 8-bit sRGB picture cannot show as they are: HDR (HLG,
    PQ) and BT.2020; None for all others.
    """
    transfer = {16: "HDR (PQ)", 18: "HDR (HLG)"}.get(int(frame.color_trc))
    return transfer or ("BT.2020" if int(frame.color_primaries) == 9 else None)


def decode_what_is_there(
    container: InputContainer, stream: Any, losses: Losses | None = None
) -> Iterator[Any]:
    """Decoded frames of a stream to its end; packets that cannot be decoded are left out and
    counted in ``losses``.
    """
    losses = losses if losses is not None else Losses()
    in_a_row, end_s = 0, 0.0
    packets = container.demux(stream)
    while True:
        packet = None
        try:
            packet = next(packets, None)
            frames = packet.decode() if packet is not None else []
        except (av.FFmpegError, ValueError, ZeroDivisionError, MemoryError) as error:
            losses.num_bad += 1
            losses.error = losses.error or reason_of(error)
            in_a_row += 1
            if in_a_row > _TAG_PACKETS:
                losses.first_s = end_s if losses.first_s is None else losses.first_s
                num_new = in_a_row if in_a_row == _TAG_PACKETS + 1 else 1
                losses.seconds += num_new * _duration_s(packet)
            continue
        if packet is None:
            return
        for frame in frames:
            in_a_row = 0
            losses.num_good += 1
            end_s = frame.time if frame.time is not None else end_s
            yield frame


def seconds(stamp: int | None, time_base: Fraction | None) -> Fraction | None:
    """A time stamp in seconds; None where it is not known."""
    return None if stamp is None or time_base is None else stamp * time_base


def reason_of(error: BaseException) -> str:
    """A few words for what a library raised."""
    if isinstance(error, MemoryError):
        return "out of memory"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split()).lower()[:120]


def local_name(path: str | os.PathLike[str]) -> str:
    """A name to write to that FFmpeg takes for a file, whatever it looks like."""
    return f"file:{Path(path)}"


def _duration_s(packet: Any) -> float:
    length = None if packet is None else seconds(packet.duration, packet.time_base)
    return float(length or 0)
