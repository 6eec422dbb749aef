"""Segments for players: each can be decoded alone, together they are the video, and the mp4 of them
too.
"""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest

from rest_lightning.constants import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME
from rest_lightning.errors import UserError
from rest_lightning.media.segments import Segment, SegmentEncoder, join_segments

LENGTHS = (24, 8, 5)  # frames; the last one is a ragged end
TOTAL = sum(LENGTHS)


def sound() -> np.ndarray:
    times = np.arange(TOTAL * SAMPLES_PER_FRAME) / SAMPLE_RATE
    return (0.4 * np.sin(2 * np.pi * 220 * times)).astype(np.float32)


@pytest.fixture(scope="module")
def segments() -> list[Segment]:
    """Each frame has a grey of its own."""
    encoder, samples, done, made = SegmentEncoder((48, 64)), sound(), 0, []
    for length in LENGTHS:
        greys = 6 * np.arange(done, done + length)[:, None, None, None]
        frames = np.broadcast_to(greys, (length, 48, 64, 3)).astype(np.uint8)
        block = samples[done * SAMPLES_PER_FRAME : (done + length) * SAMPLES_PER_FRAME]
        done += length
        made.append(encoder.encode(frames, block, last=done == TOTAL))
    return made


def greys_of(data: bytes) -> list[int]:
    with av.open(io.BytesIO(data), "r", format="mpegts") as container:
        frames = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
    return [round(float(frame.mean()) / 6) for frame in frames]


def sound_of(container: av.container.InputContainer) -> tuple[np.ndarray, float]:
    """Samples, and when they begin in seconds."""
    frames = list(container.decode(audio=0))
    assert frames[0].time is not None
    return np.concatenate([frame.to_ndarray()[0] for frame in frames]), frames[0].time


def test_each_segment_can_be_decoded_alone(segments: list[Segment]) -> None:
    begin = 0
    for segment, length in zip(segments, LENGTHS, strict=True):
        assert segment.duration_s == length / FPS
        assert greys_of(segment.data) == list(range(begin, begin + length))
        begin += length


def test_times_go_on_over_borders(segments: list[Segment]) -> None:
    with av.open(io.BytesIO(b"".join(s.data for s in segments)), "r", format="mpegts") as container:
        times = sorted(frame.time for frame in container.decode(video=0) if frame.time is not None)
    np.testing.assert_allclose(np.diff(times), 1 / FPS, atol=1e-4)
    assert len(times) == TOTAL


def test_the_mp4_has_every_frame_and_the_sound_without_a_gap(
    segments: list[Segment], tmp_path: Path
) -> None:
    path = tmp_path / "out.mp4"
    join_segments([segment.data for segment in segments], path)
    with av.open(str(path)) as container:
        assert "trainedAlgorithmicMedia" in container.metadata["comment"]
        assert next(container.decode(video=0)).time == 0
    with av.open(str(path)) as container:
        heard, start_s = sound_of(container)
    skipped = round(-start_s * SAMPLE_RATE)  # the encoder's first samples lie before the video
    heard = heard[skipped : skipped + TOTAL * SAMPLES_PER_FRAME]
    error = heard[:20_000] - sound()[:20_000]
    assert np.sqrt(np.mean(error**2)) < 0.05  # 0.28 is the tone itself
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_encoded_is_told() -> None:
    with pytest.raises(UserError, match="even frame sides"):
        SegmentEncoder(63)
    encoder = SegmentEncoder(64)
    with pytest.raises(UserError, match="expected uint8 frames"):
        encoder.encode(np.zeros((1, 32, 32, 3), np.uint8), np.zeros(640, np.float32))
    encoder.close()
    encoder.close()
