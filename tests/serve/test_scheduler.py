"""The model's thread: a session's chunks are those of a stream alone, and a failure is one
session's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from live import short_head, tone

from rest_lightning.serve.scheduler import Computed, ModelError, Scheduler, Slot
from rest_lightning.talking_head import TalkingHead

CHUNK, LOOKAHEAD = 8 * 640, 2 * 640


@pytest.fixture(scope="module")
def head() -> TalkingHead:
    return short_head()


@pytest.fixture
def scheduler(head: TalkingHead) -> Iterator[Scheduler]:
    made = Scheduler(head, 3)
    made.start()
    yield made
    made.close()


def portrait(seed: int) -> torch.Tensor:
    return torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def begin(scheduler: Scheduler, seed: int) -> Slot:
    slot = scheduler.acquire()
    assert slot is not None
    slot.start(portrait(seed), seed).result(20)
    return slot


def chunk(slot: Slot, samples: np.ndarray, number: int) -> Future[Computed]:
    window = samples[number * CHUNK : (number + 1) * CHUNK + LOOKAHEAD]
    return slot.compute(window, len(window) if number == 0 else CHUNK)


def all_at_once(
    scheduler: Scheduler, asked: list[tuple[Slot, np.ndarray]], number: int
) -> list[Future[Computed]]:
    """Chunks that are all there before the model's next step."""
    futures: list[Future[Computed]] = []
    scheduler.post(
        lambda: futures.extend(chunk(slot, samples, number) for slot, samples in asked)
    ).result(20)
    return futures


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    difference = np.abs(actual.astype(int) - expected.astype(int))
    assert actual.shape == expected.shape and difference.max() <= 1 and difference.mean() < 1e-3


def test_sessions_side_by_side_are_streams_alone(head: TalkingHead, scheduler: Scheduler) -> None:
    """Chunks are handed in together and staggered; a session joins late, another leaves early."""
    speech = [tone(2.0, 0.2 + 0.2 * row, 150 + 90 * row) for row in range(3)]
    slots = [begin(scheduler, row) for row in range(2)]
    frames: dict[int, list[np.ndarray]] = {0: [], 1: [], 2: []}
    for number in range(4):
        if number == 1:
            slots.append(begin(scheduler, 2))
        rows = [row for row in range(len(slots)) if (row, number) != (0, 3)]
        futures = {row: chunk(slots[row], speech[row], number - (row == 2)) for row in rows}
        for row, future in futures.items():
            frames[row].append(future.result(20).frames)
    for row, parts in frames.items():
        alone = head.open(portrait(row), seed=row)
        expected = alone.push(speech[row][: len(parts) * CHUNK + LOOKAHEAD])
        assert_close(np.concatenate(parts), expected)


def test_what_waits_is_computed_together(scheduler: Scheduler) -> None:
    slots = [begin(scheduler, row) for row in range(3)]
    for number in range(2):
        futures = all_at_once(scheduler, [(slot, tone(1.0)) for slot in slots], number)
        assert [future.result(20).num_rows for future in futures] == [3, 3, 3]
    assert chunk(slots[1], tone(2.0), 2).result(20).num_rows == 1


def test_a_row_that_fails_ends_alone(head: TalkingHead, scheduler: Scheduler) -> None:
    """The others of the same step get their chunk, begun anew from their portraits, and go on."""
    good, bad = tone(2.0), tone(2.0)
    bad[CHUNK + LOOKAHEAD + 700] = 32767  # read for the second chunk
    slots = [begin(scheduler, row) for row in range(3)]
    samples = [good, bad, good]
    for slot, each in zip(slots, samples, strict=True):
        chunk(slot, each, 0).result(20)
    futures = all_at_once(scheduler, list(zip(slots, samples, strict=True)), 1)
    with pytest.raises(ModelError, match="the model failed: RuntimeError"):
        futures[1].result(20)
    anew = head.open(portrait(0), seed=0)
    expected = anew.push(good[CHUNK : 2 * CHUNK + LOOKAHEAD])
    assert_close(futures[0].result(20).frames, expected)
    assert futures[2].result(20).frames.shape == expected.shape
    third = anew.push(good[2 * CHUNK + LOOKAHEAD : 3 * CHUNK + LOOKAHEAD])
    assert_close(chunk(slots[0], good, 2).result(20).frames, third)
    with pytest.raises(ModelError):
        chunk(slots[1], bad, 2).result(20)
    slots[1].release()
    assert_close(
        chunk(begin(scheduler, 5), good, 0).result(20).frames[:1],
        head.open(portrait(5), seed=5).push(good[: CHUNK + LOOKAHEAD])[:1],
    )


@pytest.mark.parametrize("call", [1, 2])  # of two Euler steps
def test_a_failure_in_the_middle_of_a_chunk_is_got_over(
    head: TalkingHead, scheduler: Scheduler, call: int
) -> None:
    """Whatever the cache and the lanes hold by then: everybody begins anew, and goes on as a stream
    alone.
    """
    slots, speech, num_calls = [begin(scheduler, row) for row in range(2)], tone(2.0), 0
    for future in all_at_once(scheduler, [(slot, speech) for slot in slots], 0):
        future.result(20)

    def fail_once(*_: object) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == call:
            raise RuntimeError("once")

    hook = head.transformer.transformer_blocks[1].register_forward_pre_hook(fail_once)
    try:
        futures = all_at_once(scheduler, [(slot, speech) for slot in slots], 1)
        frames = [[future.result(20).frames] for future in futures]
    finally:
        hook.remove()
    assert num_calls == call + 2 * 3, (
        "the step that failed, then a prefill and two Euler steps of each session alone"
    )
    for parts, future in zip(
        frames, all_at_once(scheduler, [(slot, speech) for slot in slots], 2), strict=True
    ):
        parts.append(future.result(20).frames)
    for row, parts in enumerate(frames):
        expected = head.open(portrait(row), seed=row).push(speech[CHUNK : 3 * CHUNK + LOOKAHEAD])
        assert_close(np.concatenate(parts), expected)


def test_rows_are_given_back(scheduler: Scheduler) -> None:
    slots = [begin(scheduler, row) for row in range(3)]
    assert scheduler.acquire() is None
    futures: list[Future[Computed]] = []

    def ask_and_go() -> None:
        futures.append(chunk(slots[1], tone(1.0), 0))
        slots[1].release()
        slots[1].release()

    scheduler.post(ask_and_go).result(20)
    with pytest.raises(ModelError, match="the session has ended"):
        futures[0].result(20)
    assert scheduler.num_free == 1
    again = begin(scheduler, 7)
    assert again.row == slots[1].row
    slots[1].release()  # of a slot that is another's by now
    assert scheduler.num_free == 0
    assert chunk(again, tone(1.0), 0).result(20).frames.shape == (8, 64, 64, 3)


def test_another_portrait_from_the_next_chunk_on(head: TalkingHead, scheduler: Scheduler) -> None:
    speech, slot = tone(2.0), begin(scheduler, 0)
    frames = [chunk(slot, speech, 0).result(20).frames]
    slot.show(portrait(9)).result(20)
    frames.append(chunk(slot, speech, 1).result(20).frames)
    alone = head.open(portrait(0), seed=0)
    expected = [alone.push(speech[: CHUNK + LOOKAHEAD])]
    alone.switch_identity(portrait(9))
    expected.append(alone.push(speech[CHUNK + LOOKAHEAD : 2 * CHUNK + LOOKAHEAD]))
    assert_close(np.concatenate(frames), np.concatenate(expected))


def test_warm_up_measures_every_number_of_rows(scheduler: Scheduler) -> None:
    assert len(scheduler.warm_up_ms) == 3 and min(scheduler.warm_up_ms) > 0
    assert scheduler.rows == [] and scheduler.num_free == 3


def test_closing_tells_those_who_wait(head: TalkingHead) -> None:
    scheduler = Scheduler(head, 1)
    scheduler.start()
    slot = begin(scheduler, 0)
    futures: list[Future[Computed]] = []

    def stop_and_ask() -> None:
        scheduler.stop()
        futures.append(chunk(slot, tone(1.0), 0))

    scheduler.post(stop_and_ask).result(20)
    scheduler.close()
    with pytest.raises(ModelError, match="the session has ended"):
        futures[0].result(20)
    assert not scheduler.is_alive
