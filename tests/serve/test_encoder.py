"""What a browser's decoder gets: frames that decode one by one, keyframes when asked for, the right
codec string.
"""

from __future__ import annotations

import io

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter
from PIL import Image

from rest_lightning.media.writer import video_frame
from rest_lightning.serve.encoder import H264Encoder, JpegEncoder, open_encoder


def moving(num_frames: int, size_px: int) -> np.ndarray:
    """A soft pattern that moves."""
    y, x = np.mgrid[0 : 1 : size_px * 1j, 0 : 1 : size_px * 1j]
    waves = [
        127 + 120 * np.sin(4 * x + 3 * y + 0.2 * index + phase)
        for index in range(num_frames)
        for phase in (0, 1, 2)
    ]
    return (
        np.stack(waves)
        .reshape(num_frames, 3, size_px, size_px)
        .transpose(0, 2, 3, 1)
        .astype(np.uint8)
    )


@pytest.mark.parametrize("size_px", [64, 128, 256])
def test_every_packet_is_a_frame(size_px: int) -> None:
    frames, encoder = moving(30, size_px), H264Encoder(size_px)
    decoder = av.CodecContext.create("h264", "r")
    decoder.flags |= 0x0008_0000  # low delay: a frame for every packet
    num_shown = 0
    for index, pixels in enumerate(frames):
        data, is_key = encoder.encode(pixels, keyframe=index == 17)
        assert is_key == (index in (0, 17))
        types = [
            data[at + 4] & 31 for at in range(len(data) - 4) if data[at : at + 4] == b"\0\0\0\1"
        ]
        assert (7 in types and 8 in types) == is_key, "SPS and PPS come with keyframes"
        if is_key:
            sps = data.index(b"\0\0\0\1\x67") + 5
            assert encoder.codec_string == "avc1." + data[sps : sps + 3].hex().upper()
            assert data[sps] == 66, "baseline: no frame waits for a later one"
        for frame in decoder.decode(av.Packet(data)):  # type: ignore[attr-defined]
            shown = frame.to_ndarray(format="rgb24").astype(int)
            assert np.abs(shown - frames[num_shown]).mean() < 4.0
            num_shown += 1
    assert num_shown >= 29


def test_a_keyframe_can_be_decoded_without_what_came_before() -> None:
    frames, encoder = moving(12, 64), H264Encoder(64)
    packets = [
        encoder.encode(pixels, keyframe=index == 7)[0] for index, pixels in enumerate(frames)
    ]
    decoder = av.CodecContext.create("h264", "r")
    shown = [frame for data in packets[7:] for frame in decoder.decode(av.Packet(data))]  # type: ignore[attr-defined]
    shown += decoder.decode(None)  # type: ignore[attr-defined]
    assert len(shown) == 5
    assert np.abs(shown[0].to_ndarray(format="rgb24").astype(int) - frames[7]).mean() < 4.0


def test_images_are_whole_and_close() -> None:
    frames, encoder = moving(3, 64), JpegEncoder()
    for pixels in frames:
        data, is_key = encoder.encode(pixels)
        assert is_key
        assert np.abs(np.asarray(Image.open(io.BytesIO(data))).astype(int) - pixels).mean() < 4.0


def test_the_first_codec_that_both_know() -> None:
    kinds = [
        type(open_encoder(codecs, 64))
        for codecs in (["av1", "jpeg", "h264"], ["h264", "jpeg"], ["av1"], [])
    ]
    assert kinds == [JpegEncoder, H264Encoder, type(None), type(None)]


def test_a_kept_reformatter_gives_the_same_pixels() -> None:
    reformatter = VideoReformatter()
    for pixels in moving(3, 64):
        kept = video_frame(pixels, 0, 25, reformatter).to_ndarray()
        once = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
            format="yuv420p", dst_colorspace="SMPTE170M"
        )
        np.testing.assert_array_equal(kept, once.to_ndarray())
