"""Frames of a session as H.264 access units or JPEG images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from typing import Protocol

import av
import numpy as np
from av.video.codeccontext import VideoCodecContext
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter
from PIL import Image

from rest_lightning.constants import FPS
from rest_lightning.media.writer import tag_colours, video_frame
from rest_lightning.serve.protocol import H264, JPEG, Codec

# 5 s: a decoder that lost its way finds it again; whoever needs a keyframe sooner asks for it
_GOP_FRAMES = 120
_JPEG_QUALITY = 85
_SPS_START = b"\x00\x00\x00\x01\x67"


class FrameEncoder(Protocol):
    """One session's encoder; ``codec_string`` is what a browser's decoder is configured with."""

    kind: int
    codec: Codec
    codec_string: str

    def encode(self, pixels: np.ndarray, keyframe: bool = False) -> tuple[bytes, bool]:
        """A frame (H, W, 3), uint8 RGB, as bytes, and whether it can be decoded on its own."""


class H264Encoder:
    """H.264, Annex B, baseline profile: every frame leaves at once, keyframes carry SPS and PPS.

    Args:
        size_px: side of square frames, an even number.
    """

    kind = H264
    codec: Codec = "h264"

    def __init__(self, size_px: int) -> None:
        self._context, self._reformatter, self._num_frames = _open(size_px), VideoReformatter(), 0
        self.codec_string = _codec_string(size_px)

    def encode(self, pixels: np.ndarray, keyframe: bool = False) -> tuple[bytes, bool]:
        """See :class:`FrameEncoder`."""
        frame = video_frame(pixels, self._num_frames, FPS, self._reformatter)
        if keyframe:
            frame.pict_type = PictureType.I
        self._num_frames += 1
        packets = self._context.encode(frame)
        return b"".join(map(bytes, packets)), any(packet.is_keyframe for packet in packets)


class JpegEncoder:
    """Every frame an image of its own, for browsers without a video decoder."""

    kind = JPEG
    codec: Codec = "jpeg"
    codec_string = "image/jpeg"

    def encode(self, pixels: np.ndarray, keyframe: bool = False) -> tuple[bytes, bool]:
        """See :class:`FrameEncoder`."""
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=_JPEG_QUALITY)
        return file.getvalue(), True


def open_encoder(codecs: Sequence[str], size_px: int) -> FrameEncoder | None:
    """The encoder of the first codec that both sides know; None where there is none."""
    for codec in codecs:
        if codec == "h264":
            return H264Encoder(size_px)
        if codec == "jpeg":
            return JpegEncoder()
    return None


def _open(size_px: int) -> VideoCodecContext:
    context = av.CodecContext.create("libx264", "w")
    assert isinstance(context, VideoCodecContext)
    context.width = context.height = size_px
    context.pix_fmt = "yuv420p"
    context.time_base, context.framerate = Fraction(1, FPS), Fraction(FPS)
    context.thread_count = 1
    context.options = {
        "preset": "superfast",
        "tune": "zerolatency",
        "profile": "baseline",
        "crf": "21",
        "g": str(_GOP_FRAMES),
        "forced-idr": "1",  # a keyframe that was asked for can be decoded without what came before
    }
    tag_colours(context)
    return context


@cache
def _codec_string(size_px: int) -> str:
    """``avc1.`` and profile, constraints and level, as x264 writes them into the SPS of this
    size.
    """
    black = video_frame(np.zeros((size_px, size_px, 3), np.uint8), 0, FPS, VideoReformatter())
    packets = b"".join(map(bytes, _open(size_px).encode(black)))
    profile = packets[packets.index(_SPS_START) + len(_SPS_START) :][:3]
    return f"avc1.{profile.hex().upper()}"
