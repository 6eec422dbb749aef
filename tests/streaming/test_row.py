"""A minute and an hour of speech through a row: nothing is lost, nothing grows, and the video is as
long as the speech.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rest_lightning.constants import SAMPLES_PER_FRAME
from rest_lightning.streaming.engine import ChunkEngine, EngineOptions
from rest_lightning.streaming.session import Row
from rest_lightning.talking_head import TalkingHead


@pytest.mark.parametrize(
    ("num_samples", "first_chunk_length"),
    [
        (3600 * 16_000 - 321, None),
        *((60 * 16_000 + more, first) for more in (0, 1, -321) for first in (None, 1)),
    ],
)
def test_a_video_is_as_long_as_its_speech(
    head: TalkingHead, num_samples: int, first_chunk_length: int | None
) -> None:
    engine = ChunkEngine(
        head, 1, head.sampling, options=EngineOptions(first_chunk_length=first_chunk_length)
    )
    row = Row(engine, torch.zeros(1, 3, head.size_px, head.size_px), seed=0)
    size = len(row._buffer)
    # Numbers that tell where a sample was; float32 has all whole numbers below 2^24.
    speech = (np.arange(num_samples) % 2**20).astype(np.float32)
    left = engine.model.speech_encoder.left_context_frames * SAMPLES_PER_FRAME
    position = 0
    rng = np.random.default_rng(0)
    while position < num_samples:
        block = speech[position : position + int(rng.integers(1, 40_000))]
        position += len(block)
        row.push(block)
        while row.has_chunk:
            start = SAMPLES_PER_FRAME * row.num_frames
            audio, _, num_frames = row.take()
            expected = speech[start : start + audio.shape[1] - left]
            assert np.array_equal(audio[0, left:].numpy(), expected)
            assert num_frames == 8 * (engine.chunk_length if start else engine.first_length)
        assert row.num_samples + row.num_waiting == position
    row.is_finished = True
    while row.has_chunk:
        start = SAMPLES_PER_FRAME * row.num_frames
        audio, _, _ = row.take()
        rest = speech[start : start + audio.shape[1] - left]
        assert np.array_equal(audio[0, left : left + len(rest)].numpy(), rest)
        assert not audio[0, left + len(rest) :].any()
    assert row.num_frames == row.total_frames == -(-num_samples // SAMPLES_PER_FRAME)
    assert len(row._buffer) == size
