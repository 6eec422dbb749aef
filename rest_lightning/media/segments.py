"""Video for players that fetch it piece by piece (HLS): MPEG-TS segments, made while the stream
goes on.

Each segment begins with a key frame and can be decoded alone. One encoder makes them all, so that
sound goes on over their borders without a gap.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter

from rest_lightning.constants import FPS, SAMPLE_RATE
from rest_lightning.media.container import local_name
from rest_lightning.media.files import whole_file
from rest_lightning.media.writer import (
    PROVENANCE,
    as_frames,
    even_sides,
    tag_colours,
    video_frame,
)

if TYPE_CHECKING:
    from rest_lightning.media.provenance import Signer

# AAC begins with 64 ms that lie before the first frame, and MPEG-TS has no negative times.
_START_S = 1


@dataclass(frozen=True)
class Segment:
    """A piece of a video.

    Attributes:
        data: an MPEG-TS file.
        duration_s: of its pictures.
    """

    data: bytes
    duration_s: float


class SegmentEncoder:
    """Encodes frames and speech (H.264, AAC) into one segment after the other.

    Args:
        size_px: side of square frames, or ``(height, width)``; even numbers.
        crf, preset: of x264, see :class:`rest_lightning.media.writer.Mp4Writer`.

    Attributes:
        num_frames, num_samples: encoded so far.

    Raises:
        UserError: an odd size.
    """

    def __init__(
        self, size_px: int | tuple[int, int], crf: int = 18, preset: str = "veryfast"
    ) -> None:
        self.height, self.width = even_sides(size_px)
        self.num_frames = self.num_samples = 0
        self._reformatter = VideoReformatter()
        # FFmpeg's streams belong to a container; this one keeps nothing.
        self._container = av.open(_Nothing(), "w", format="null")
        self._video = self._container.add_stream("libx264", rate=FPS)
        self._video.width, self._video.height = self.width, self.height
        self._video.pix_fmt = "yuv420p"
        # Frames leave the encoder at once: a segment is whole as soon as its frames are there.
        self._video.options = {"crf": str(crf), "preset": preset, "tune": "zerolatency"}
        self._video.codec_context.thread_count = 1
        self._video.codec_context.time_base = Fraction(1, FPS)
        tag_colours(self._video.codec_context)
        self._audio = self._container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
        self._audio.bit_rate = 64_000
        self._container.start_encoding()

    def encode(self, frames: np.ndarray, samples: np.ndarray, last: bool = False) -> Segment:
        """Returns the next segment.

        The encoder of the sound holds up to 128 ms back, which the next segment begins with.

        Args:
            frames: uint8 RGB (n, H, W, 3), n > 0.
            samples: mono speech (m,) of these frames, float32 in [-1, 1] (clipped beyond), 16 kHz.
            last: whether the video ends here; nothing may follow.

        Raises:
            UserError: frames of another type or size.
        """
        frames = as_frames(frames, self.height, self.width)
        packets = [*self._encode_frames(frames), *self._encode_samples(samples)]
        if last:
            packets += [*self._video.encode(None), *self._audio.encode(None)]
            self.close()
        file = io.BytesIO()
        # Counters of packets begin anew with each segment, which this flag tells to players.
        options = {"mpegts_flags": "initial_discontinuity"}
        with av.open(file, "w", format="mpegts", options=options) as container:
            streams = {
                stream: container.add_stream_from_template(stream)
                for stream in (self._video, self._audio)
            }
            for packet in sorted(packets, key=_time):
                packet.stream = streams[packet.stream]
                container.mux(packet)
        return Segment(file.getvalue(), len(frames) / FPS)

    def close(self) -> None:
        """Gives the encoders' memory back. A second call does nothing."""
        with suppress(OSError, ValueError, av.FFmpegError):
            self._container.close()

    def _encode_frames(self, frames: np.ndarray) -> list[Any]:
        packets = []
        for number, pixels in enumerate(frames):
            frame = video_frame(pixels, self.num_frames + _START_S * FPS, FPS, self._reformatter)
            frame.pict_type = PictureType.I if number == 0 else PictureType.NONE
            packets += self._video.encode(frame)
            self.num_frames += 1
        return packets

    def _encode_samples(self, samples: np.ndarray) -> list[Any]:
        if not len(samples):
            return []
        samples = np.clip(np.asarray(samples, dtype=np.float32).reshape(1, -1), -1.0, 1.0)
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(samples), format="fltp", layout="mono"
        )
        frame.sample_rate = SAMPLE_RATE
        frame.pts = self.num_samples + _START_S * SAMPLE_RATE
        frame.time_base = Fraction(1, SAMPLE_RATE)
        self.num_samples += samples.shape[1]
        return list(self._audio.encode(frame))


def join_segments(segments: Iterable[bytes], path: Path, signer: Signer | None = None) -> None:
    """Writes the segments of one encoder as one mp4, without encoding anew. The mp4 says that it is
    synthetic, as all do, and is signed where a signer is given.

    Raises:
        UserError: the operating system refuses.
    """
    with whole_file(path) as temporary:
        _join(segments, temporary)
        if signer is not None:
            with whole_file(temporary) as signed:
                signer.sign(temporary, signed, path.name)


def _join(segments: Iterable[bytes], path: Path) -> None:
    with (
        av.open(io.BytesIO(b"".join(segments)), "r", format="mpegts") as source,
        av.open(local_name(path), "w", format="mp4", options={"movflags": "+faststart"}) as target,
    ):
        target.metadata.update(PROVENANCE)
        streams = {
            stream.index: target.add_stream_from_template(stream) for stream in source.streams
        }
        for packet in source.demux():
            if packet.dts is None:  # the end of a stream
                continue
            assert packet.pts is not None
            start = round(_START_S / packet.time_base)
            packet.pts -= start
            packet.dts -= start
            packet.stream = streams[packet.stream.index]
            target.mux(packet)


class _Nothing:
    def write(self, data: bytes) -> int:
        return len(data)


def _time(packet: Any) -> Fraction:
    return Fraction(packet.dts * packet.time_base)
