"""Numbers that are not finite or absurd: refused at the door, or the end of the stream, never black
video. And a session that two threads use at once.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from tiny_head import make_head

from rest_lightning.errors import UserError
from rest_lightning.streaming.session import NotFiniteError

SPEECH = np.zeros(32_000, np.float32)
BAD = [float("nan"), float("inf"), -float("inf"), 1e30, 255.0]


@pytest.mark.parametrize("value", BAD)
def test_portraits_and_samples_are_refused(value: float) -> None:
    head = make_head()
    portrait = torch.zeros(3, 64, 64)
    session = head.open(portrait)
    bad_portrait = portrait.clone()
    bad_portrait[1, 5, 7] = value
    bad_samples = SPEECH.copy()
    bad_samples[8000] = value
    for refused in (
        lambda: head.open(bad_portrait),
        lambda: session.switch_identity(bad_portrait),
        lambda: session.push(bad_samples),
        lambda: session.push(np.where(np.arange(9) == 4, value, 0.0) * 1e8),
    ):
        with pytest.raises(UserError, match="expected") as info:
            refused()
        assert "\n" not in str(info.value)
    assert session.push(SPEECH).shape[0] == head.open(portrait).push(SPEECH).shape[0]


@pytest.mark.parametrize("value", [*BAD[:4], 101.0])
@pytest.mark.parametrize("name", ["guidance", "reference_guidance"])
def test_weights_of_guidance_have_bounds(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"expected a finite {name}"):
        make_head().open(torch.zeros(3, 64, 64), **{name: value})


@pytest.mark.parametrize(
    "change",
    [
        {"shift": 0.0},
        {"shift": 1e30},
        {"shift": float("nan")},
        {"num_steps": 0},
        {"num_steps": 10**9},
    ],
)
def test_steps_and_shift_have_bounds(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="expected"):
        make_head().open(torch.zeros(3, 64, 64), **change)


@pytest.mark.parametrize("part", ["vae", "speech_ae", "transformer"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_weights_that_are_no_numbers_end_the_stream(part: str, value: float) -> None:
    head = make_head()
    for parameter in getattr(head, part).parameters():
        parameter.data.fill_(value)
    session = head.open(torch.zeros(3, 64, 64))
    with pytest.raises(NotFiniteError, match=r"NaN or infinity in the chunk at 0\.00 s") as info:
        for _ in range(3):
            session.push(SPEECH)
    assert "\n" not in str(info.value)
    with pytest.raises(UserError, match="open a new session"):
        session.push(SPEECH)


def test_one_bad_row_ends_alone() -> None:
    head = make_head()
    portrait = torch.zeros(3, 64, 64)
    alone = head.open(portrait, seed=1)
    with head.open_batch(3) as batch:
        for row in range(3):
            batch.start(row, portrait, seed=row)
            batch.push(row, SPEECH)
        held = batch._rows[2]
        assert held is not None
        held._buffer[:] = np.nan
        frames = batch.step()
        assert sorted(frames) == [0, 1] and batch.rows == [0, 1]
        with pytest.raises(NotFiniteError, match=r"chunk at 0\.00 s"):
            batch.push(2, SPEECH)
        expected = alone.push(SPEECH)
        np.testing.assert_allclose(
            frames[1].astype(int), expected[: len(frames[1])].astype(int), atol=1
        )
        batch.start(2, portrait)
        batch.push(2, SPEECH)
        assert 2 in batch.step()


def test_a_second_thread_is_refused() -> None:
    session = make_head().open(torch.zeros(3, 64, 64))
    with session._alone:
        for call in (lambda: session.push(SPEECH), session.flush, session.snapshot):
            with pytest.raises(UserError, match="one thread at a time"):
                call()
    assert len(session.push(SPEECH))


def test_threads_that_come_again_lose_no_frame() -> None:
    session = make_head().open(torch.zeros(3, 64, 64))
    counts: list[int] = []

    def push_all() -> None:
        left = 20
        while left:
            try:
                frames = session.push(SPEECH[:1600])
            except UserError:
                continue
            counts.append(len(frames))
            left -= 1

    threads = [threading.Thread(target=push_all) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(counts) + len(session.flush()) == 3 * 20 * 1600 // 640


def test_speech_may_change_the_portrait_between_its_own_frames() -> None:
    """The frames of a stream are handed out while no thread is in the session."""
    session = make_head().open(torch.zeros(3, 64, 64))
    for _ in session.stream([SPEECH, SPEECH]):
        session.switch_identity(torch.ones(3, 64, 64))
