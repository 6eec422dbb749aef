"""The queue before the model, on a clock of the test: nothing is cut, nothing drifts, nothing piles
up.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from rest_lightning.serve.intake import Intake, Piece

RATE = 16_000
CHUNK, LOOKAHEAD = 15_360, 1280
CHUNK_S, WHOLE_S = CHUNK / RATE, (CHUNK + LOOKAHEAD) / RATE

Arrival = tuple[float, np.ndarray, int]


def speech(num_samples: int, first: int = 1) -> np.ndarray:
    """Samples that tell their place, and are loud."""
    return (1000 + (np.arange(first, first + num_samples) * 7919) % 20_000).astype(np.int16)


def arrivals(
    samples: np.ndarray, start_s: float, size: int, jitter_s: float = 0.0, seed: int = 0
) -> list[Arrival]:
    """Blocks of a microphone that is opened at ``start_s``: each arrives when its last sample was
    heard, or later.
    """
    rng = np.random.default_rng(seed)
    blocks = [(index, samples[index : index + size]) for index in range(0, len(samples), size)]
    times = [
        start_s + (index + len(block)) / RATE + rng.uniform(0, jitter_s) for index, block in blocks
    ]
    return [
        (at, block, index)
        for at, (index, block) in zip(np.maximum.accumulate(times), blocks, strict=True)
    ]


def play(
    intake: Intake, events: list[Arrival], until_s: float, compute_s: float = 0.15
) -> list[tuple[float, Piece]]:
    """What a session takes, and when: it takes the next chunk when the model is done with the
    last.
    """
    pieces: list[tuple[float, Piece]] = []
    waiting, now_s, free_s = list(events), 0.0, 0.0
    while now_s < until_s:
        while waiting and waiting[0][0] <= now_s:
            _, block, index = waiting.pop(0)
            intake.push(block, index, now_s)
        if now_s >= free_s and intake.advance(now_s):
            pieces.append((now_s, intake.take()))
            free_s = now_s + compute_s
            continue
        now_s += 0.002
    return pieces


def sound_of(pieces: list[tuple[float, Piece]]) -> np.ndarray:
    return np.concatenate([piece.sound for _, piece in pieces])


def place_of(samples: np.ndarray, sound: np.ndarray) -> int:
    """Where speech begins within the sound; it must be there whole and in one piece."""
    start = int(np.flatnonzero(sound)[0])
    np.testing.assert_array_equal(sound[start : start + len(samples)], samples)
    return start


@pytest.mark.parametrize("size", [128, 320, 1000])
@pytest.mark.parametrize("start_s", [0.05, 0.5, 0.93, 2.0])
@pytest.mark.parametrize(
    ("jitter_s", "lookahead"), [(0.0, LOOKAHEAD), (0.04, LOOKAHEAD), (0.04, 0)]
)
def test_speech_that_flows_is_heard_whole_and_where_the_clock_is(
    size: int, start_s: float, jitter_s: float, lookahead: int
) -> None:
    samples = speech(4 * RATE)
    intake = Intake(CHUNK, lookahead, 0.0)
    pieces = play(intake, arrivals(samples, start_s, size, jitter_s), until_s=start_s + 6)
    start = place_of(samples, sound_of(pieces))
    # Chunk k is complete at k * 0.96 s, so what is spoken at time t lies at the clock's t + 1.04 s.
    late_s = start / RATE - (start_s + (CHUNK + lookahead) / RATE)
    assert -0.005 <= late_s <= 0.03 + jitter_s + 0.002
    assert all(at <= number * CHUNK_S + 0.07 for number, (at, _) in enumerate(pieces))
    assert intake.num_dropped == intake.num_trimmed == 0


@pytest.mark.parametrize("pause_s", [0.03, 0.2, 0.7, 1.5, 4.0])
def test_pauses_become_silence_of_their_length(pause_s: float) -> None:
    first, second = speech(RATE), speech(2 * RATE, 30_000)
    events = arrivals(first, 0.3, 320)
    events += [
        (at, block, index + RATE) for at, block, index in arrivals(second, 1.3 + pause_s, 320)
    ]
    pieces = play(Intake(CHUNK, LOOKAHEAD, 0.0), events, until_s=6 + pause_s)
    sound = sound_of(pieces)
    start = place_of(first, sound)
    silence = int(np.flatnonzero(sound[start + RATE :])[0])
    np.testing.assert_array_equal(sound[start + RATE + silence :][: 2 * RATE], second)
    allowed = 0.06 if pause_s < 0.06 else 0.025  # a gap within the slack is closed up
    assert abs(silence / RATE - pause_s) <= allowed


def test_nothing_to_hear_is_idle_and_on_time() -> None:
    pieces = play(Intake(CHUNK, LOOKAHEAD, 0.4), [], until_s=9.5)
    times = [at for at, _ in pieces]
    np.testing.assert_allclose(times, 0.4 + CHUNK_S * np.arange(len(times)), atol=0.004)
    assert len(times) == 10 and all(piece.idle and piece.last_index is None for _, piece in pieces)
    assert not sound_of(pieces).any()


def test_windows_overlap_by_what_the_model_has_read() -> None:
    pieces = play(Intake(CHUNK, LOOKAHEAD, 0.0), arrivals(speech(3 * RATE), 0.2, 320), until_s=5)
    assert pieces[0][1].num_new == CHUNK + LOOKAHEAD
    assert all(piece.num_new == CHUNK for _, piece in pieces[1:])
    for (_, before), (_, after) in pairwise(pieces):
        np.testing.assert_array_equal(before.window[CHUNK:], after.window[:LOOKAHEAD])
        np.testing.assert_array_equal(after.sound, after.window[:CHUNK])


def test_a_chunk_tells_its_last_sample_of_speech() -> None:
    samples = speech(2 * RATE)
    pieces = play(Intake(CHUNK, LOOKAHEAD, 0.0), arrivals(samples, 0.5, 320), until_s=5)
    heard = 0
    for _, piece in pieces:
        heard += int(np.count_nonzero(piece.sound))
        if not piece.idle:
            assert piece.last_index == heard - 1
            assert piece.num_speech == np.flatnonzero(piece.sound)[-1] + 1
    assert heard == len(samples)


def test_a_slow_model_drops_whole_chunks_and_stays_near_the_clock() -> None:
    samples = speech(20 * RATE)
    intake = Intake(CHUNK, LOOKAHEAD, 0.0)
    pieces = play(intake, arrivals(samples, 0.0, 320), until_s=19.9, compute_s=1.5)
    assert intake.num_dropped > 0 and intake.num_dropped % CHUNK == 0
    assert intake.num_waiting <= 3 * CHUNK
    at_s, last = pieces[-1]
    assert last.last_index is not None and at_s - last.last_index / RATE < 4 * CHUNK_S
    heard = sound_of(pieces)[CHUNK + LOOKAHEAD + 2000 :].astype(int)  # behind the first silence
    # where the next sample is not that of the speech
    leaps = np.count_nonzero((np.diff(heard) - 7919) % 20_000)
    assert 0 < leaps <= intake.num_dropped // CHUNK


def test_a_burst_may_be_two_chunks_ahead() -> None:
    samples = speech(CHUNK + LOOKAHEAD + 2 * CHUNK)
    intake = Intake(CHUNK, LOOKAHEAD, 0.0)
    assert intake.push(samples, 0, 0.0) == 0
    pieces = play(intake, [], until_s=3.0)
    # one chunk before it is due, no more
    assert [round(at / CHUNK_S, 1) for at, _ in pieces[:3]] == [0.0, 0.2, 1.0]
    np.testing.assert_array_equal(sound_of(pieces)[: len(samples)], samples)


def test_of_a_longer_burst_whole_chunks_are_dropped() -> None:
    samples = speech(CHUNK + LOOKAHEAD + 3 * CHUNK)
    intake = Intake(CHUNK, LOOKAHEAD, 0.0)
    assert intake.push(samples, 0, 0.0) == 1
    pieces = play(intake, [], until_s=3.0)
    assert intake.num_dropped == CHUNK
    np.testing.assert_array_equal(sound_of(pieces)[: len(samples) - CHUNK], samples[CHUNK:])


def test_an_interruption_forgets_and_answers_at_once() -> None:
    intake = Intake(CHUNK, LOOKAHEAD, 0.0)
    pieces = play(intake, arrivals(speech(2 * RATE), 0.0, 320), until_s=1.5)
    assert not pieces[-1][1].idle
    assert intake.interrupt(1.5) > 0
    assert intake.advance(1.5) and not intake.has_speech
    after = intake.take()
    assert after.idle and not after.sound.any() and after.num_new == CHUNK
    assert not intake.advance(1.5 + CHUNK_S - 0.01) and intake.advance(1.5 + CHUNK_S)


@pytest.mark.parametrize("ahead_s", [0.2, 0.9])
def test_latency_is_won_back_in_pauses(ahead_s: float) -> None:
    """A client whose chunks lie there for too long says so: its next pause is that much shorter."""
    intake = Intake(CHUNK, LOOKAHEAD, 0.0)
    talk, pause = speech(RATE), np.full(4 * RATE, 20, np.int16)  # room noise
    samples = np.concatenate([talk, pause, talk])
    events = arrivals(samples, 0.0, 320)
    early = play(intake, [each for each in events if each[0] <= 0.5], until_s=0.5)
    for _ in range(3):  # told again before it can have helped: once is enough
        intake.trim(ahead_s, 3.5)
    pieces = early + play_from(intake, [each for each in events if each[0] > 0.5], 0.5, 8.0)
    assert abs(intake.num_trimmed / RATE - ahead_s) < 0.045
    loud = np.flatnonzero(np.abs(sound_of(pieces)) > 500)
    gap_s = np.diff(loud).max() / RATE
    assert abs(gap_s - (4.0 - ahead_s)) < 0.1


@pytest.mark.parametrize(
    ("waits_s", "moves_s"),
    [
        ([0.05] * 9, 0.0),
        ([0.3, 0.2, 0.0] * 3, 0.0),
        ([0.3, 0.2, 0.25] * 2 + [0.0] * 3, 0.14),
        ([0.3, 0.2, 0.25] * 3, 0.28),  # it still waits, so it moves again
    ],
)
def test_what_always_waits_for_the_model_comes_later(waits_s: list[float], moves_s: float) -> None:
    """By the least of the last waits less the slack; a wait now and then moves nothing."""

    def drive(waits_s: list[float]) -> Intake:
        intake, waits = Intake(CHUNK, LOOKAHEAD, 0.0), iter(waits_s)
        for turn in range(round(8.2 * CHUNK_S * 50)):
            intake.push(np.zeros(320, np.int16), 320 * turn, turn / 50)
            if intake.advance(turn / 50):
                intake.take()
                intake.note_wait(next(waits), turn / 50)
        return intake

    moved, plain = drive(waits_s), drive([0.0] * len(waits_s))
    assert moved.due_s - plain.due_s == pytest.approx(moves_s, abs=1e-6)
    assert plain.num_trimmed == 0
    assert 0 <= moves_s - moved.num_trimmed / RATE < 0.1  # of the pause, in whole blocks


def play_from(
    intake: Intake, events: list[Arrival], start_s: float, until_s: float
) -> list[tuple[float, Piece]]:
    """:func:`play`, later."""
    intake.due_s -= start_s
    intake._settled_s -= start_s
    pieces = play(
        intake, [(at - start_s, block, index) for at, block, index in events], until_s - start_s
    )
    return [(at + start_s, piece) for at, piece in pieces]


@pytest.mark.parametrize("flows", [False, True])
def test_after_a_standstill_the_clock_begins_anew(flows: bool) -> None:
    """A laptop that slept for a minute neither computes a minute of silence nor adds to its
    latency.
    """
    intake = Intake(CHUNK, LOOKAHEAD, 0.0)
    play(intake, [], until_s=2.0)
    start_s, samples = 62.0, speech(3 * RATE)
    intake.due_s -= start_s
    pieces = play(intake, arrivals(samples, 0.0, 320) if flows else [], until_s=5.0)
    assert len(pieces) <= 5.0 / CHUNK_S + 2
    if flows:
        assert place_of(samples, sound_of(pieces)) / RATE < WHOLE_S + 0.05


@pytest.mark.parametrize("num_samples", [1, 640, 15_360, 16_640, 40_000])
def test_the_end_gives_all_speech_at_once(num_samples: int) -> None:
    intake = Intake(CHUNK, LOOKAHEAD, 0.0)
    idle = play(intake, [], until_s=0.5)
    intake.push(speech(num_samples), 0, 0.5)
    intake.finish(0.5)
    pieces: list[tuple[float, Piece]] = []
    while intake.has_speech:
        assert intake.advance(0.5 + CHUNK_S * max(0, len(pieces) - 1))
        pieces.append((0.5, intake.take()))
    assert len(idle) == 1
    assert np.count_nonzero(sound_of(pieces)) == num_samples
    assert pieces[-1][1].num_speech == np.flatnonzero(pieces[-1][1].sound)[-1] + 1
    assert intake.push(speech(5), num_samples, 0.6) == 0 and not intake.has_speech
