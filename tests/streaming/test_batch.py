"""Batches: a row is a session alone, whatever the others do; identity, silence, state, memory,
errors.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tape import tensors_alive_bytes

from rest_lightning.streaming.batch import BatchSession
from rest_lightning.streaming.engine import EngineOptions, EngineState
from rest_lightning.streaming.session import StreamingSession
from rest_lightning.talking_head import TalkingHead

CHUNK = 24 * 640


def portrait(seed: int = 0) -> torch.Tensor:
    return torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def speech(num_frames: float, seed: int = 1) -> np.ndarray:
    return (
        np.random.default_rng(seed).normal(scale=0.2, size=int(num_frames * 640)).astype(np.float32)
    )


def alone(
    head: TalkingHead, row: int, samples: np.ndarray, **options: Any
) -> tuple[np.ndarray, StreamingSession]:
    session = head.open(portrait(row), seed=row, **options)
    return np.concatenate([session.push(samples), session.flush()]), session


def assert_same_frames(actual: np.ndarray, expected: np.ndarray) -> None:
    """Equal but for rounding to uint8 at the edge."""
    difference = np.abs(actual.astype(int) - expected.astype(int))
    assert actual.shape == expected.shape
    assert difference.max() <= 1 and difference.mean() < 1e-3


def assert_same_state(actual: EngineState, expected: EngineState, tolerance: float = 1e-5) -> None:
    """Everything that a next chunk would read, before any rounding."""
    assert actual.cache["num_frames"] == expected.cache["num_frames"]
    assert (
        actual.speech.keys() == expected.speech.keys()
        and actual.decoder.keys() == expected.decoder.keys()
    )
    pairs = [(actual.reference_rows, expected.reference_rows)]
    for name in ("keys", "values"):
        num_past = (
            actual.cache[name].shape[3] * 4 // 7
        )  # of previous, sink and current; chunks of 3
        pairs.append(
            (actual.cache[name][..., :num_past, :], expected.cache[name][..., :num_past, :])
        )
    pairs += [(actual.speech[name], expected.speech[name]) for name in expected.speech]
    pairs += [(actual.decoder[name], expected.decoder[name]) for name in expected.decoder]
    for got, wanted in pairs:
        assert float((got - wanted).abs().max()) <= tolerance * max(1.0, float(wanted.abs().max()))


def drain(batch: BatchSession, frames: dict[int, list[np.ndarray]], idle: Any = "wait") -> None:
    while computed := batch.step(idle):
        for row, part in computed.items():
            frames.setdefault(row, []).append(part)


@pytest.mark.parametrize(
    ("num_rows", "joins", "options", "sampling"),
    [
        (2, (0, 0), {}, {}),
        (3, (0, 1, 3), {}, {"guidance": 2.0}),
        (3, (2, 0, 1), {"chunk_length": 1}, {}),
        (
            4,
            (0, 2, 2, 1),
            {"reference_attends": "first_chunk"},
            {"guidance": 3.0, "reference_guidance": 0.5},
        ),
        (2, (1, 0), {"positions": "absolute", "use_sink": False}, {}),
        (
            3,
            (0, 1, 1),
            {"cache_noise": "per_step"},
            {"options": EngineOptions(first_chunk_length=1)},
        ),
        (1, (0,), {"cache_noise": "clean_pass"}, {}),
    ],
    ids=str,
)
def test_a_row_is_a_session_alone(
    make: Callable[..., TalkingHead],
    num_rows: int,
    joins: tuple[int, ...],
    options: dict[str, Any],
    sampling: dict[str, Any],
) -> None:
    head = make(**options)
    voices = [speech(40 + 13.7 * row, seed=row) for row in range(num_rows)]
    rng, position = np.random.default_rng(0), [0] * num_rows
    frames: dict[int, list[np.ndarray]] = {}
    with head.open_batch(num_rows, **sampling) as batch:
        for tick in range(40):
            for row, join in enumerate(joins):
                if tick == join:
                    batch.start(row, portrait(row), seed=row)
                if row in batch.rows and position[row] < len(voices[row]):
                    end = position[row] + int(rng.integers(1, 20_000))  # each at a pace of its own
                    batch.push(row, voices[row][position[row] : end])
                    position[row] = end
                    if end >= len(voices[row]):
                        batch.finish(row)
            for row, part in batch.step().items():
                frames.setdefault(row, []).append(part)
        assert batch.rows == [] and batch.step() == {}
    for row, voice in enumerate(voices):
        assert_same_frames(np.concatenate(frames[row]), alone(head, row, voice, **sampling)[0])
    assert batch.report().num_frames == sum(-(-len(voice) // 640) for voice in voices)


def test_states_of_rows_are_those_of_sessions_alone(head: TalkingHead) -> None:
    batch = head.open_batch(3)
    sessions = []
    # Row r has had 2 - r chunks when the last comes in: its first is computed with their third.
    for row in range(3):
        batch.start(row, portrait(row), seed=row)
        sessions.append(head.open(portrait(row), seed=row))
        for other in range(row + 1):
            block = speech(24 + 2 * (other == row), seed=10 * other + row)
            batch.push(other, block)
            sessions[other].push(block)
        assert sorted(batch.step()) == list(range(row + 1))
    for saved, session in zip(batch.snapshot().rows, sessions, strict=True):
        assert saved is not None
        assert_same_state(saved.engine, session.snapshot().row.engine)


def test_switch_restart_and_stop_leave_the_others_alone(head: TalkingHead) -> None:
    def run(
        changes: dict[int, Callable[[BatchSession], None]],
    ) -> tuple[dict[int, list[np.ndarray]], BatchSession]:
        batch, frames = head.open_batch(3), {row: [] for row in range(3)}  # type: ignore[var-annotated]
        for row in range(3):
            batch.start(row, portrait(row), seed=row)
            batch.push(row, speech(2, seed=row))
        for tick in range(4):
            changes.get(tick, lambda batch: None)(batch)
            for row in batch.rows:
                batch.push(row, speech(24, seed=100 * row + tick))
            for row, part in batch.step().items():
                frames[row].append(part)
        return frames, batch

    plain, _ = run({})

    def restart(batch: BatchSession) -> None:
        batch.start(1, portrait(8), seed=8)

    changed, batch = run({1: lambda batch: batch.switch_identity(0, portrait(9)), 2: restart})
    assert batch.rows == [0, 1, 2]
    for a, b in zip(plain[2], changed[2], strict=True):
        assert_same_frames(a, b)
    assert np.array_equal(plain[0][0], changed[0][0]) and np.array_equal(plain[1][1], changed[1][1])
    assert np.abs(plain[0][1].astype(int) - changed[0][1]).max() > 10

    session = head.open(portrait(0), seed=0)
    session.push(speech(2, seed=0))
    expected = [session.push(speech(24, seed=0))]
    session.switch_identity(portrait(9))
    expected += [session.push(speech(24, seed=tick)) for tick in (1, 2, 3)]
    assert_same_frames(np.concatenate(changed[0]), np.concatenate(expected))
    session = head.open(portrait(8), seed=8)
    expected = [session.push(speech(24, seed=100 + tick)) for tick in (2, 3)]
    assert_same_frames(
        np.concatenate(changed[1][2:]), np.concatenate(expected)[: 24 * len(changed[1][2:])]
    )

    stopped, batch = run({2: lambda batch: batch.stop(1)})
    assert batch.rows == [0, 2] and len(stopped[1]) == 2
    for row in (0, 2):
        assert_same_frames(np.concatenate(stopped[row]), np.concatenate(plain[row]))


def test_a_switch_does_not_show_in_a_row_that_is_computed_with_it(head: TalkingHead) -> None:
    videos = []
    for switches in (False, True):
        batch = head.open_batch(2)
        for row in range(2):
            batch.start(row, portrait(row), seed=row)
            batch.push(row, speech(74, seed=row))
        batch.step()
        if switches:
            batch.switch_identity(0, portrait(7))
        videos.append(batch.step()[1])
    assert_same_frames(
        *videos
    )  # row 0 is at its first chunk again: the attention of both is masked for one chunk
    assert videos[0].std() > 5


def test_rows_without_speech_wait_or_hear_silence(head: TalkingHead) -> None:
    batch = head.open_batch(2)
    for row in range(2):
        batch.start(row, portrait(row), seed=row)
    batch.push(0, speech(26, seed=0))
    batch.push(1, speech(10, seed=1))
    assert batch.ready == [0]
    first = batch.step()
    assert list(first) == [0] and batch.num_frames(1) == 0
    heard = batch.step(idle="silence")
    assert list(heard) == [0, 1]
    batch.push(1, speech(24, seed=2))
    after = batch.step()
    session = head.open(portrait(1), seed=1)
    quiet = np.concatenate([speech(10, seed=1), np.zeros(16 * 640, np.float32), speech(24, seed=2)])
    assert_same_frames(np.concatenate([heard[1], after[1]]), session.push(quiet))
    session = head.open(portrait(0), seed=0)
    silent = np.concatenate([speech(26, seed=0), np.zeros(CHUNK, np.float32)])
    assert_same_frames(np.concatenate([first[0], heard[0]]), session.push(silent))


def test_an_interruption_drops_what_waits(head: TalkingHead) -> None:
    batch = head.open_batch(1)
    batch.start(0, portrait(), seed=0)
    batch.push(0, speech(100))
    assert batch.waiting_s(0) == pytest.approx(74 / 25)
    assert batch.drop_waiting(0) == pytest.approx(74 / 25) and batch.waiting_s(0) == 0
    assert len(batch.step()[0]) == 24 and batch.step() == {}
    batch.finish(0)
    assert len(batch.step()[0]) == 2 and batch.rows == []


def test_snapshot_and_restore_are_bit_identical(
    make: Callable[..., TalkingHead], head: TalkingHead
) -> None:
    batch, other = head.open_batch(3, guidance=2.0), head.open_batch(3, guidance=2.0)
    for row in (0, 2):
        batch.start(row, portrait(row), seed=row)
        batch.push(row, speech(40 + 30 * row, seed=row))
    batch.step()
    state = batch.snapshot()
    videos = []
    for target in (batch, batch, other):
        target.restore(state)
        assert target.rows == [0, 2]
        frames: dict[int, list[np.ndarray]] = {}
        target.start(1, portrait(1), seed=1)
        for row in range(3):
            target.push(row, speech(50, seed=row))
            target.finish(row)
        drain(target, frames)
        videos.append({row: np.concatenate(parts) for row, parts in frames.items()})
    for video in videos[1:]:
        assert all(np.array_equal(video[row], videos[0][row]) for row in range(3))
    with pytest.raises(
        ValueError, match="expected a snapshot of 2 rows, got one of 3: restore it in a batch with"
    ):
        head.open_batch(2, guidance=2.0).restore(state)
    stranger = make(seed=1).open_batch(3, guidance=2.0)
    stranger.start(1, portrait(1))
    with pytest.raises(
        ValueError, match="got one of another: restore it in a session that was opened alike"
    ):
        stranger.restore(state)
    assert stranger.rows == [1]


def test_one_row_goes_back_and_the_others_go_on(
    make: Callable[..., TalkingHead], head: TalkingHead
) -> None:
    batch = head.open_batch(3)
    frames: dict[int, list[np.ndarray]] = {}
    for row in (0, 1):
        batch.start(row, portrait(row), seed=row)
        batch.push(row, speech(26, seed=row))
    drain(batch, frames)
    state = batch.snapshot_row(1)
    for row in (0, 1):
        batch.push(row, speech(24, seed=10 + row))
    drain(batch, frames)
    dropped = frames[1].pop()
    batch.restore_row(1, state)
    for row, seed in ((0, 20), (1, 30)):
        batch.push(row, speech(24, seed=seed))
    drain(batch, frames)
    spoken = {
        0: np.concatenate([speech(26, seed=0), speech(24, seed=10), speech(24, seed=20)]),
        1: np.concatenate([speech(26, seed=1), speech(24, seed=30)]),
    }
    for row, samples in spoken.items():
        video = np.concatenate(frames[row])
        assert_same_frames(video, alone(head, row, samples)[0][: len(video)])
    assert not np.array_equal(dropped, frames[1][-1])
    with pytest.raises(
        ValueError, match="expected a row in use, but row 2 was not started or has ended"
    ):
        batch.restore_row(2, state)
    stranger = make(seed=1).open_batch(1)
    stranger.start(0, portrait(0))
    with pytest.raises(
        ValueError, match="got one of another: restore it in a session that was opened alike"
    ):
        stranger.restore_row(0, state)


def test_what_was_read_ahead_can_be_amended(head: TalkingHead) -> None:
    batch = head.open_batch(2)
    frames: dict[int, list[np.ndarray]] = {}
    first, second, other = speech(26, seed=1), speech(24, seed=2), speech(2, seed=3)
    for row in (0, 1):
        batch.start(row, portrait(row), seed=row)
        batch.push(row, first)
    drain(batch, frames)
    with pytest.raises(
        ValueError, match="expected at most 1280 samples in place of those that row 0 has not shown"
    ):
        batch.amend(0, speech(3))
    batch.amend(0, other)
    for row in (0, 1):
        batch.push(row, second)
    drain(batch, frames)
    amended = np.concatenate([first[: -2 * 640], other, second])
    for row, samples in ((0, amended), (1, np.concatenate([first, second]))):
        heard = alone(head, row, samples)[0][
            24:48
        ]  # the first chunk was computed with what was there before
        again = np.concatenate(frames[row])[24:]
        if row:
            assert_same_frames(again, heard)
        else:
            assert (
                np.abs(again.astype(int) - heard.astype(int)).mean()
                < np.abs(
                    again.astype(int)
                    - alone(head, row, np.concatenate([first, second]))[0][24:48].astype(int)
                ).mean()
            )


def test_memory_is_that_of_the_start(head: TalkingHead) -> None:
    batch = head.open_batch(3)
    alive, addresses = [], []
    for turn in range(3):
        for row in range(3):
            batch.start(row, portrait(row + turn), seed=row)
            batch.push(row, speech(30 + 20 * row, seed=row))
        batch.switch_identity(1, portrait(9))
        batch.step()
        batch.stop(2)
        for row in (0, 1):
            batch.finish(row)
        drain(batch, {})
        addresses.append([a for size in (1, 2, 3) for a in batch._engine(size).addresses])
        alive.append(tensors_alive_bytes())
    assert len(set(alive)) == 1
    assert all(found == addresses[0] for found in addresses)


def test_lanes_are_entered_only_when_the_company_changes(head: TalkingHead) -> None:
    batch = head.open_batch(3)
    for row in range(3):
        batch.start(row, portrait(row))
        batch.push(row, speech(26 + 48 * (row < 2), seed=row))
    companies = []
    for _ in range(3):
        batch.step()
        companies.append(batch._in_lanes)
    assert companies == [(0, 1, 2), (0, 1), (0, 1)]


def test_bad_use(head: TalkingHead) -> None:
    batch = head.open_batch(2, max_waiting_s=2.0)
    for row in (-1, 2):
        with pytest.raises(
            ValueError,
            match=f"expected a row from 0 to 1, got {row}: open the batch with more rows",
        ):
            batch.start(row, portrait())
    for name, more in (("finish", ()), ("stop", ()), ("num_frames", ()), ("push", (speech(1),))):
        with pytest.raises(
            ValueError, match=r"row 1 was not started or has ended: call start\(1, ...\)"
        ):
            getattr(batch, name)(1, *more)
    batch.start(0, portrait())
    with pytest.raises(ValueError, match=r"got NaN or infinity at 0\.00 s"):
        batch.push(0, np.array([np.nan], np.float32))
    with pytest.raises(
        ValueError,
        match=r"expected at most 2 s of speech waiting in row 0, got 600\.0 s: call step",
    ):
        batch.push(0, np.zeros(600 * 16_000, np.float32))
    batch.push(0, speech(1))
    with pytest.raises(ValueError, match="expected idle `wait` or `silence`, got 'sleep'"):
        batch.step("sleep")  # type: ignore[arg-type]
    batch.finish(0)
    with pytest.raises(
        ValueError,
        match=r"expected speech before finish\(0\), got a push after it: start the row anew",
    ):
        batch.push(0, speech(1))
    with pytest.raises(ValueError, match=r"expected a portrait tensor of shape \(3, 64, 64\)"):
        batch.start(1, portrait()[:, 1:])
    assert len(batch.step()[0]) == 1
    batch.close()
    for call in (
        batch.step,
        batch.snapshot,
        lambda: batch.push(0, speech(1)),
        lambda: batch.start(0, portrait()),
    ):
        with pytest.raises(
            ValueError,
            match="expected an open batch, got a closed one: open a new one with open_batch",
        ):
            call()
    with pytest.raises(ValueError, match="expected a batch of at least 1 row, got 0"):
        head.open_batch(0)
    with pytest.raises(ValueError, match="expected max_waiting_s above 0, got 0"):
        head.open_batch(1, max_waiting_s=0)


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux holds a process to its limit of address space"
)
def test_too_little_memory_says_what_was_needed(head: TalkingHead) -> None:
    import resource

    num_rows = 50_000  # 0.36 GB of keys and values
    head.open_batch(1)  # whatever the first batch allocates for itself is there
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 200_000_000, hard))
    try:
        with pytest.raises(
            ValueError, match=r"lower the number of streams or size_px, .* guidance to 1"
        ) as caught:
            head.open_batch(num_rows)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    cache = head.open(portrait()).engine.cache
    needed_gb = (cache.keys.numel() + cache.values.numel()) * 4 * num_rows / 1e9
    message = str(caught.value)
    assert message.startswith(f"expected memory on cpu for {num_rows} stream(s) of 64x64 pixels: ")
    assert f" {needed_gb:.2f} GB of cache" in message and "\n" not in message
