"""Silence where a source pauses: nothing lost, nothing early, at the pace of the clock."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from rest_lightning.errors import UserError
from rest_lightning.streaming.live import LiveSpeech
from rest_lightning.talking_head import TalkingHead

PAUSE_S = 0.1
RATE = 16_000


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.1, 0.9, round(seconds * RATE)).astype(np.float32)


def paused(plan: list[float], speech: np.ndarray) -> Iterator[np.ndarray]:
    """Equal parts of ``speech``, each after a pause of so many seconds; the last pause comes before
    the end.
    """
    for pause_s, part in zip(plan, [*np.array_split(speech, len(plan) - 1), None], strict=True):
        time.sleep(pause_s)
        if part is not None:
            yield part


@pytest.mark.parametrize("plan", [[0, 0, 0, 0], [0, 0.35, 0], [0.25, 0, 0.25, 0.25]])
def test_nothing_is_lost_and_silence_never_runs_ahead_of_the_clock(plan: list[float]) -> None:
    speech = noise(0.3)
    live = LiveSpeech(paused(plan, speech), PAUSE_S)
    start_s, blocks = time.monotonic(), []
    for block in live:
        blocks.append(block)
        if not block.any():  # silence ends at the clock, whatever has come before
            assert sum(map(len, blocks)) / RATE <= time.monotonic() - start_s + 1e-3
    joined = np.concatenate(blocks)
    assert np.array_equal(joined[joined != 0], speech)
    assert len(joined) == live.num_samples == len(speech) + live.num_silent
    # Silence fills what the pauses are longer than the speech, but for the part that is waited for.
    wanted_s = sum(plan) - 0.3
    assert live.num_silent / RATE == pytest.approx(
        max(0.0, wanted_s), abs=0.25 + PAUSE_S * len(plan)
    )
    assert live.num_silent > 0 or wanted_s < 2 * PAUSE_S


def test_a_source_faster_than_real_time_is_not_interrupted() -> None:
    """Two seconds at once, then a pause of 0.5 s: the speech would still be playing."""
    live = LiveSpeech(paused([0, 0.5], noise(2.0)), PAUSE_S)
    assert sum(len(block) for block in live) == 2 * RATE and live.num_silent == 0


def test_a_silent_source_idles_at_the_pace_of_the_clock() -> None:
    live = LiveSpeech(paused([0.55, 0], noise(0.01)), PAUSE_S)
    start_s, times = time.monotonic(), []
    for block in live:
        assert len(block) in (160, round(PAUSE_S * RATE))
        times.append(time.monotonic() - start_s)
    assert 3 <= live.num_silent / round(PAUSE_S * RATE) <= 5
    assert all(
        at_s >= PAUSE_S * (i + 1) - 1e-3 for i, at_s in enumerate(times[: live.num_silent // 1600])
    )


def test_a_slow_consumer_makes_the_source_wait() -> None:
    produced = []

    def source() -> Iterator[np.ndarray]:
        for number in range(100):
            produced.append(number)
            yield noise(0.01)

    stream = iter(LiveSpeech(source(), 10.0, max_waiting=4))
    next(stream)
    time.sleep(0.1)
    # handed on, in the queue, in the reader's hand, counted before its yield
    assert len(produced) <= 1 + 4 + 1 + 1
    assert sum(len(block) for block in stream) == 99 * 160


def test_errors_of_the_source_come_after_its_blocks() -> None:
    def source() -> Iterator[np.ndarray]:
        yield noise(0.02)
        raise UserError("expected a good source")

    stream = iter(LiveSpeech(source(), 1.0))
    assert len(next(stream)) == 320
    with pytest.raises(UserError, match="expected a good source"):
        next(stream)


def test_the_reader_ends_with_the_iteration() -> None:
    def source() -> Iterator[np.ndarray]:
        while True:
            yield noise(0.01)

    stream: Any = iter(LiveSpeech(source(), 1.0))
    next(stream)
    stream.close()
    deadline_s = time.monotonic() + 5
    while any(thread.name == "live-speech" for thread in threading.enumerate()):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.mark.parametrize("block_samples", [1001, 5 * 640 + 3])
def test_minutes_with_pauses_stay_as_long_as_the_speech(
    head: TalkingHead, block_samples: int
) -> None:
    """A minute of stream, a pause every 20 s: every sample that went in, silence too, has its
    frame.
    """
    speech = noise(1.0)

    def source() -> Iterator[np.ndarray]:
        for second in range(60):
            if second % 20 == 19:
                time.sleep(0.01)
            yield from np.array_split(speech, -(-len(speech) // block_samples))
        yield speech[:77]

    live = LiveSpeech(source(), 0.001)
    with head.open(np.full((64, 64, 3), 90, np.uint8), num_steps=1, guidance=1.0) as session:
        num_frames = sum(len(frames) for frames in session.stream(live))
    assert live.num_samples == 60 * RATE + 77 + live.num_silent
    assert 0 <= num_frames * 640 - live.num_samples < 640
