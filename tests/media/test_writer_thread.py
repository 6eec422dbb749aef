"""Writing in a thread and without one: the same file, bounded, with the writer's own errors and
interruptions.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rest_lightning.constants import SAMPLES_PER_FRAME
from rest_lightning.errors import UserError
from rest_lightning.machine import num_usable_cores
from rest_lightning.media.writer import (
    THREAD_VARIABLE,
    BackgroundWriter,
    Mp4Writer,
    RawPipe,
    writes_in_thread,
)


def chunks(count: int, size_px: int = 64) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    for _ in range(count):
        frames = rng.integers(0, 256, (24, size_px, size_px, 3), dtype=np.uint8)
        yield frames, rng.uniform(-0.5, 0.5, 24 * SAMPLES_PER_FRAME).astype(np.float32)


class SlowPipe:
    """A reader that takes a frame every ``pause_s``, or none any more after ``num_frames``."""

    def __init__(self, pause_s: float = 0.0, num_frames: int = 1000) -> None:
        self.pause_s, self.num_frames, self.taken = pause_s, num_frames, 0

    def write(self, data: memoryview) -> int:
        if self.taken == self.num_frames:
            raise BrokenPipeError
        time.sleep(self.pause_s)
        self.taken += 1
        return len(data)

    def flush(self) -> None:
        """Nothing waits."""


@pytest.fixture(params=[True, False], ids=["thread", "inline"])
def threaded(request: pytest.FixtureRequest) -> bool:
    """Both ways of writing."""
    return bool(request.param)


def test_few_cores_write_for_themselves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(THREAD_VARIABLE, raising=False)
    assert [writes_in_thread(cores) for cores in (1, 2, 3, 64)] == [False, False, True, True]
    assert writes_in_thread() == (num_usable_cores() > 2)
    for variable in ("0", "1"):
        monkeypatch.setenv(THREAD_VARIABLE, variable)
        assert all(writes_in_thread(cores) == (variable == "1") for cores in (None, 1, 64))
        with BackgroundWriter(Mp4Writer(tmp_path / f"{variable}.mp4", 64)) as background:
            assert any(thread.name == "writer" for thread in threading.enumerate()) == (
                variable == "1"
            )
            background.write(*next(chunks(1)))
            assert variable == "1" or background.writer.num_frames == 24  # nothing waits
    monkeypatch.setenv(THREAD_VARIABLE, "yes")
    with pytest.raises(UserError, match="expected REST_WRITER_THREAD=0 or 1, got 'yes'"):
        writes_in_thread()


def test_the_file_is_the_one_without_a_thread(tmp_path: Path, threaded: bool) -> None:
    with Mp4Writer(tmp_path / "plain.mp4", 64) as writer:
        for frames, samples in chunks(4):
            writer.write(frames)
            writer.write_audio(samples)
    with BackgroundWriter(Mp4Writer(tmp_path / "thread.mp4", 64), threaded=threaded) as background:
        for frames, samples in chunks(4):
            background.write(frames, samples)
    assert (tmp_path / "thread.mp4").read_bytes() == (tmp_path / "plain.mp4").read_bytes()
    assert background.busy_s > 0 and background.writer.num_frames == 96


def test_a_slow_writer_makes_the_caller_wait() -> None:
    pipe = SlowPipe(pause_s=0.002)
    background = BackgroundWriter(RawPipe(pipe, 64), max_waiting=2, threaded=True)  # type: ignore[arg-type]
    for number, (frames, samples) in enumerate(chunks(6), 1):
        background.write(frames, samples)
        assert number * 24 - pipe.taken <= 24 * (2 + 1)  # two wait, one is being written
    background.close()
    assert pipe.taken == 6 * 24 and not any(
        thread.name == "writer" for thread in threading.enumerate()
    )


def test_the_writers_error_reaches_the_caller(threaded: bool) -> None:
    pipe = SlowPipe(num_frames=30)
    with (
        pytest.raises(BrokenPipeError),
        BackgroundWriter(RawPipe(pipe, 64), threaded=threaded) as background,
    ):  # type: ignore[arg-type]
        for frames, samples in chunks(50):
            background.write(frames, samples)
    assert pipe.taken == 30
    closing = BackgroundWriter(RawPipe(SlowPipe(num_frames=0), 64), threaded=True)  # type: ignore[arg-type]
    closing._put(next(chunks(1)))
    with pytest.raises(BrokenPipeError):
        closing.close()


def test_an_error_beside_leaves_nothing(tmp_path: Path, threaded: bool) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        BackgroundWriter(Mp4Writer(tmp_path / "a.mp4", 64), threaded=threaded) as background,
    ):
        for frames, samples in chunks(3):
            background.write(frames, samples)
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [0, 3])
def test_an_interruption_keeps_everything_handed_over(
    tmp_path: Path, threaded: bool, count: int
) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        BackgroundWriter(Mp4Writer(tmp_path / "a.mp4", 64), threaded=threaded) as background,
    ):
        for frames, samples in chunks(count):
            background.write(frames, samples)
        raise KeyboardInterrupt
    assert background.writer.num_frames == 24 * count
    assert background.writer.num_samples == 24 * count * SAMPLES_PER_FRAME
    assert [path.name for path in tmp_path.iterdir()] == (["a.mp4"] if count else [])


def test_bad_frames_are_told_in_one_line(tmp_path: Path, threaded: bool) -> None:
    with pytest.raises(UserError, match="expected uint8 frames"):  # noqa: SIM117
        with BackgroundWriter(Mp4Writer(tmp_path / "a.mp4", 64), threaded=threaded) as background:
            background.write(np.zeros((1, 32, 32, 3), np.uint8), np.zeros(640, np.float32))
    assert not list(tmp_path.iterdir())
