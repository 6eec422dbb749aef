"""What every way to an avatar has to keep: cases for the seam, for adapters, for your own.

::

    @pytest.mark.parametrize("case", conformance.CASES, ids=lambda case: case.__name__)
    def test_conformance(case):
        conformance.check(case, open_mine)

``open_mine(model)`` is an asynchronous context manager that gives a :class:`Subject`: your way in
and out, around an avatar of the model that it is given. Cases run in simulated time
(:mod:`rest_lightning.avatar.simulation`), with a model whose pictures tell which speech they were
computed from. An AssertionError says in words what was not kept.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rest_lightning.avatar.avatar import FRAME_S, Avatar, AvatarSettings
from rest_lightning.avatar.simulation import TracedModel, read_trace, simulate
from rest_lightning.constants import FPS
from rest_lightning.machine import resident_memory_mb

MAX_OFFSET_S = 0.02  # between sound and picture
MAX_OLD_S = 0.04  # after an interruption
MAX_GROWN_MB = 5.0  # of the process, in two hours of idling
_SLOPE = 0.08  # level a second: 40 ms are 100 steps of int16
_LOW, _HIGH = 0.1, 0.9
_SPEED = 8.0  # times real time, as speech synthesis comes


@dataclass(frozen=True)
class Piece:
    """What comes out, 40 ms at a time.

    Attributes:
        picture: uint8 (H, W, 3).
        samples: the speech that is heard with it, (n,) or (n, channels); None where nobody speaks.
        sample_rate: of the speech.
        ends: whether the end of an utterance is told behind this piece.
    """

    picture: NDArray[np.uint8]
    samples: NDArray[Any] | None
    sample_rate: int
    ends: bool = False


class Subject(Protocol):
    """A way to an avatar, and back."""

    async def push(self, samples: NDArray[np.int16], sample_rate: int) -> None:
        """Speech; waits where the way does."""

    async def flush(self) -> None:
        """End of an utterance."""

    async def interrupt(self) -> None:
        """Be silent at once."""

    def pieces(self) -> AsyncIterator[Piece]:
        """What comes out, when it is due; without end."""


Open = Callable[[TracedModel], AbstractAsyncContextManager[Subject]]
MakeModel = Callable[[], TracedModel]
Case = Callable[[Open, MakeModel], Awaitable[None]]


def check(case: Case, open_subject: Open, make_model: MakeModel = TracedModel) -> None:
    """Run a case; raises AssertionError when it is not kept.

    Args:
        case: one of :data:`CASES`.
        open_subject: what is tested.
        make_model: models of other chunks.
    """

    async def run() -> None:
        await case(open_subject, make_model)

    simulate(run())


@asynccontextmanager
async def open_avatar(model: TracedModel) -> AsyncIterator[Subject]:
    """The seam itself as a subject."""
    async with Avatar(portrait(), model, AvatarSettings()) as avatar:  # type: ignore[arg-type]
        yield AvatarSubject(avatar)


class AvatarSubject:
    """An avatar without anything around it."""

    def __init__(self, avatar: Avatar) -> None:
        self.avatar = avatar

    async def push(self, samples: NDArray[np.int16], sample_rate: int) -> None:
        """As the avatar's."""
        await self.avatar.push_audio(samples, sample_rate)

    async def flush(self) -> None:
        """As the avatar's."""
        await self.avatar.flush()

    async def interrupt(self) -> None:
        """As the avatar's."""
        self.avatar.interrupt()

    async def pieces(self) -> AsyncIterator[Piece]:
        """Of the avatar's frames."""
        async for frame in self.avatar.run():
            samples = frame.samples if frame.is_speech else None
            yield Piece(frame.picture, samples, frame.sample_rate, frame.ends)


def portrait(is_bright: bool = False) -> Any:
    """A portrait that traced pictures can tell."""
    import torch

    return torch.full((3, 16, 16), 0.9 if is_bright else -0.9)


def speech(
    seconds: float, sample_rate: int = 24_000, number: int = 0, channels: int = 0
) -> NDArray[np.int16]:
    """Speech whose level tells its place: a slow triangle, below zero for odd numbers.

    Args:
        seconds: length; a sample begun counts as one.
        number: of the utterance.
        channels: 0 for (n,), otherwise (n, channels).
    """
    times = (
        np.arange(max(round(seconds * sample_rate), 1 if seconds else 0)) / sample_rate
        + 1.7 * number
    )
    period = 2 * (_HIGH - _LOW) / _SLOPE
    level = _LOW + _SLOPE * np.abs((times + period / 2) % period - period / 2)
    samples = np.round(32767 * level * (-1) ** number).astype(np.int16)
    return samples if not channels else np.repeat(samples[:, None], channels, axis=1)


@dataclass
class Seen:
    """A piece with the moment that it came."""

    time_s: float
    piece: Piece


@dataclass
class Recording:
    """Reads a subject in a task of its own, and keeps what came.

    Attributes:
        seen: what came, where ``keeps`` says so.
        num_seen, num_ends: pieces, and ends of utterances told so far.
    """

    subject: Subject
    keeps: bool = True
    seen: list[Seen] = field(default_factory=list)
    num_seen: int = 0
    num_ends: int = 0
    _task: asyncio.Task[None] | None = None
    _reading: asyncio.Event = field(default_factory=asyncio.Event)

    async def __aenter__(self) -> Recording:
        self._reading.set()
        self._task = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _read(self) -> None:
        async for piece in self.subject.pieces():
            self.num_seen += 1
            self.num_ends += piece.ends
            if self.keeps:
                self.seen.append(Seen(now(), piece))
            await self._reading.wait()

    def pause(self) -> None:
        """Stop reading."""
        self._reading.clear()

    def resume(self) -> None:
        """Go on reading."""
        self._reading.set()

    async def until(self, condition: Callable[[], bool], most_s: float, what: str) -> None:
        """Wait in simulated time."""
        end_s = now() + most_s
        while not condition():
            if self._task is not None and self._task.done():
                self._task.result()
            assert now() < end_s, f"expected {what} within {most_s:g} s, which did not come"
            await asyncio.sleep(FRAME_S / 4)

    async def until_ends(self, count: int, most_s: float) -> None:
        """Wait for the ends of so many utterances."""
        await self.until(lambda: self.num_ends >= count, most_s, f"the end of utterance {count}")

    @property
    def sound(self) -> NDArray[Any]:
        """All speech that was heard."""
        heard = [each.piece.samples for each in self.seen if each.piece.samples is not None]
        return np.concatenate(heard) if heard else np.zeros(0, np.int16)


def now() -> float:
    """Simulated seconds."""
    return asyncio.get_running_loop().time()


async def say(
    subject: Subject,
    samples: NDArray[np.int16],
    sample_rate: int = 24_000,
    speed: float = _SPEED,
    block_s: float = 0.02,
) -> None:
    """Push an utterance in blocks at a multiple of real time, and end it."""
    size = max(1, round(block_s * sample_rate))
    for start in range(0, len(samples), size):
        block = samples[start : start + size]
        await subject.push(block, sample_rate)
        await asyncio.sleep(len(block) / sample_rate / speed)
    await subject.flush()


# -- what always holds ----------------------------------------------------------------------------


def assert_steady(seen: list[Seen], num_held: int = 0) -> None:
    """A face that moves without a jump, 25 times a second.

    Args:
        num_held: pictures that may be the last one again.
    """
    traces = [read_trace(each.piece.picture) for each in seen]
    held = 0
    for i, (before, after) in enumerate(pairwise(traces)):
        step = after.frame - before.frame
        assert step in (0, 1), (
            f"expected picture {before.frame + 1} or {before.frame} after it, got {after.frame}"
        )
        held += step == 0
        wait_s = seen[i + 1].time_s - seen[i].time_s
        assert wait_s < 2.5 * FRAME_S, (
            f"expected a picture every {FRAME_S:g} s, got none for {wait_s:.3f} s"
        )
    assert held <= num_held, f"expected at most {num_held} pictures twice, got {held}"


def offset_s(piece: Piece) -> float | None:
    """Seconds between a piece's picture and its sound, which is of :func:`speech`, without a sign.

    None where there is nothing to tell by: nobody speaks, or the speech begins or ends.
    """
    if piece.samples is None:
        return None
    mono = piece.samples.astype(np.float32) / 32768
    mono = mono if mono.ndim == 1 else mono.mean(axis=1)
    if not mono.all() or np.abs(np.diff(mono)).max(initial=0.0) > 0.05:
        return None  # a step has no level
    quarter = len(mono) // 4
    level = float(mono[quarter : len(mono) - quarter].mean())
    return abs(level - read_trace(piece.picture).level) / _SLOPE


def assert_in_step(seen: list[Seen]) -> None:
    """Sound and picture belong together wherever somebody speaks."""
    for each in seen:
        apart_s = offset_s(each.piece)
        assert apart_s is None or apart_s <= MAX_OFFSET_S, (
            f"expected sound and picture within {1e3 * MAX_OFFSET_S:g} ms, got "
            f"{1e3 * apart_s:.1f} ms"
        )


def assert_heard(sound: NDArray[Any], expected: NDArray[Any], sample_rate: int = 24_000) -> None:
    """Speech as it was pushed, to the last sample, and less than 40 ms of silence behind it."""
    assert len(sound) >= len(expected), (
        f"expected {len(expected)} samples of speech, got {len(sound)}: the tail is lost"
    )
    assert np.array_equal(sound[: len(expected)], expected), (
        "expected the samples that were pushed, got others"
    )
    rest = sound[len(expected) :]
    assert len(rest) <= -(-sample_rate // FPS), (
        f"expected at most 40 ms behind the speech, got {len(rest)} samples"
    )
    assert not rest.any(), "expected silence behind the speech"


# -- cases ----------------------------------------------------------------------------------------


async def utterances_of_any_length(open_subject: Open, make_model: MakeModel = TracedModel) -> None:
    """Every one is heard to its end, which is told once, behind the last piece; one without samples
    is none.
    """
    for seconds in (0.0, 1e-9, 0.039, 0.04, 0.041, 0.96, 3.3):
        async with open_subject(make_model()) as subject, Recording(subject) as recording:
            await asyncio.sleep(1.33)
            samples = speech(seconds)
            await say(subject, samples)
            await asyncio.sleep(seconds + 3.0)
            assert_heard(recording.sound, samples)
            assert_steady(recording.seen)
            assert_in_step(recording.seen)
            assert recording.num_ends == (len(samples) > 0), (
                f"expected the end of an utterance of {len(samples)} samples once, got it "
                f"{recording.num_ends} times"
            )
            if recording.num_ends:
                last = max(
                    i for i, each in enumerate(recording.seen) if each.piece.samples is not None
                )
                assert recording.seen[last].piece.ends, (
                    "expected the end behind the last piece of the utterance"
                )


async def ten_minutes_faster_than_real_time(
    open_subject: Open, make_model: MakeModel = TracedModel
) -> None:
    """A hundred times faster; nothing is lost, and the pictures keep their pace."""
    async with open_subject(make_model()) as subject, Recording(subject) as recording:
        await asyncio.sleep(1.0)
        samples = speech(600.0, 16_000)
        await asyncio.gather(
            say(subject, samples, 16_000, speed=100.0, block_s=0.1), recording.until_ends(1, 620.0)
        )
        assert_heard(recording.sound, samples, 16_000)
        assert_steady(recording.seen)
        assert_in_step(recording.seen)


async def rates_and_channels(open_subject: Open, make_model: MakeModel = TracedModel) -> None:
    """Sound leaves at its own rate, with its own channels."""
    for sample_rate in (8000, 11_025, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000):
        for channels in (0, 2):
            async with open_subject(make_model()) as subject, Recording(subject) as recording:
                await asyncio.sleep(0.5)
                samples = speech(1.5, sample_rate, channels=channels)
                await say(subject, samples, sample_rate)
                await recording.until_ends(1, 5.0)
                assert_heard(recording.sound, samples, sample_rate)
                assert_in_step(recording.seen)
                rates = {
                    each.piece.sample_rate
                    for each in recording.seen
                    if each.piece.samples is not None
                }
                assert rates == {sample_rate}, f"expected {sample_rate} Hz, got {rates}"


async def interruption_at_every_phase(
    open_subject: Open, make_model: MakeModel = TracedModel
) -> None:
    """Nothing old after 40 ms, a face that goes on from where it was, the next utterance whole."""
    for delay_s in (0.0, 0.02, 0.15, 0.3, *np.arange(0.5, 3.6, 0.13), 4.5, 5.5):
        async with open_subject(make_model()) as subject, Recording(subject) as recording:
            await asyncio.sleep(1.21)
            saying = asyncio.create_task(say(subject, speech(3.0)))
            await asyncio.sleep(float(delay_s))
            await subject.interrupt()
            saying.cancel()
            await asyncio.gather(saying, return_exceptions=True)
            at_s = now()
            num_ends = recording.num_ends
            await asyncio.sleep(0.7)
            _assert_nothing_old(recording.seen, at_s, is_odd=False)
            assert recording.num_ends == num_ends, (
                "expected no end of an utterance that was interrupted"
            )
            after = speech(1.4, number=1)
            await say(subject, after)
            await recording.until_ends(num_ends + 1, 5.0)
            await asyncio.sleep(0.5)
            assert_heard(_spoken_after(recording.seen, at_s + MAX_OLD_S), after)
            assert_steady(recording.seen, num_held=6)
            assert_in_step(recording.seen)


async def interruption_while_the_next_utterance_comes(
    open_subject: Open, make_model: MakeModel = TracedModel
) -> None:
    """Twice in a row, with speech right behind it."""
    for delay_s in (0.1, 0.6, 1.0, 1.37):
        async with open_subject(make_model()) as subject, Recording(subject) as recording:
            await asyncio.sleep(1.0)
            await say(subject, speech(3.0))
            await asyncio.sleep(delay_s)
            await subject.interrupt()
            await subject.interrupt()
            at_s = now()
            after = speech(2.0, number=1)
            await say(subject, after)
            await recording.until_ends(1, 6.0)
            await asyncio.sleep(0.5)
            _assert_nothing_old(recording.seen, at_s, is_odd=False)
            assert_heard(_spoken_after(recording.seen, at_s + MAX_OLD_S), after)
            assert_steady(recording.seen, num_held=10)
            assert_in_step(recording.seen)


async def interruption_of_nothing(open_subject: Open, make_model: MakeModel = TracedModel) -> None:
    """While the face idles nothing happens."""
    async with open_subject(make_model()) as subject, Recording(subject) as recording:
        for _ in range(5):
            await asyncio.sleep(0.77)
            await subject.interrupt()
        await asyncio.sleep(1.0)
        assert_steady(recording.seen)
        assert not recording.num_ends and not len(recording.sound)


async def utterances_that_follow_at_once(
    open_subject: Open, make_model: MakeModel = TracedModel
) -> None:
    """No silence between utterances that wait already, and an end behind each."""
    async with open_subject(make_model()) as subject, Recording(subject) as recording:
        await asyncio.sleep(1.0)
        parts = [speech(1.02, number=number) for number in range(4)]
        for part in parts:
            await say(subject, part)
        await recording.until_ends(4, 8.0)
        places = [i for i, each in enumerate(recording.seen) if each.piece.samples is not None]
        gap = places[-1] - places[0] + 1 - len(places)
        assert gap == 0, (
            f"expected no pause between utterances that wait, got {gap} pieces of silence"
        )
        ends = [i for i, each in enumerate(recording.seen) if each.piece.ends]
        starts = np.cumsum([-(-len(part) * FPS // 24_000) for part in parts]) + places[0] - 1
        assert ends == list(starts), f"expected ends behind pieces {list(starts)}, got {ends}"
        assert_steady(recording.seen)
        assert_in_step(recording.seen)


async def speech_in_real_time(open_subject: Open, make_model: MakeModel = TracedModel) -> None:
    """A source that is never ahead of the clock, and stutters within the cushion, is not torn."""
    async with open_subject(make_model()) as subject, Recording(subject) as recording:
        await asyncio.sleep(1.0)
        samples, late_s = speech(6.0), 0.0
        for start in range(0, len(samples), 960):
            wanted_s = 0.04 * (start % 4800 == 0)
            await asyncio.sleep(max(0.0, 0.04 + wanted_s - late_s))
            late_s = wanted_s
            await subject.push(samples[start : start + 960], 24_000)
        await subject.flush()
        await recording.until_ends(1, 5.0)
        places = [i for i, each in enumerate(recording.seen) if each.piece.samples is not None]
        torn = places[-1] - places[0] + 1 - len(places)
        assert torn == 0, f"expected speech in one piece, got {torn} pieces of silence in it"
        assert_heard(recording.sound, samples)
        assert_steady(recording.seen)
        assert_in_step(recording.seen)


async def speech_slower_than_real_time(
    open_subject: Open, make_model: MakeModel = TracedModel
) -> None:
    """It stands still and goes on: all of it is heard, in order."""
    async with open_subject(make_model()) as subject, Recording(subject) as recording:
        await asyncio.sleep(1.0)
        samples = speech(4.0)
        await say(subject, samples, speed=0.5)
        await recording.until_ends(1, 6.0)
        assert_heard(recording.sound, samples)
        assert_steady(recording.seen)
        assert_in_step(recording.seen)


async def an_end_that_nobody_tells(open_subject: Open, make_model: MakeModel = TracedModel) -> None:
    """Whole pieces of an utterance that is not flushed are shown after a while."""
    async with open_subject(make_model()) as subject, Recording(subject) as recording:
        await asyncio.sleep(1.0)
        samples = speech(0.4)
        await subject.push(samples, 24_000)
        await asyncio.sleep(2.0)
        assert len(recording.sound) >= len(samples) - 2 * 960, (
            "expected the speech without a flush, got none"
        )
        await subject.flush()
        await recording.until_ends(1, 3.0)


async def a_model_slower_than_real_time(
    open_subject: Open, make_model: MakeModel = TracedModel
) -> None:
    """For ten seconds: sound and picture stay together and nothing is lost; afterwards it is as
    before.
    """
    model = make_model()
    async with open_subject(model) as subject, Recording(subject) as recording:
        await asyncio.sleep(1.0)
        samples = speech(20.0)
        await say(subject, samples, speed=40.0)
        await asyncio.sleep(2.0)
        model.compute_s = 1.5
        await asyncio.sleep(10.0)
        model.compute_s = 0.1
        await recording.until_ends(1, 40.0)
        assert_heard(recording.sound, samples)
        assert_in_step(recording.seen)
        assert_steady(recording.seen, num_held=400)
        await asyncio.sleep(12.0)
        count = len(recording.seen)
        await asyncio.sleep(5.0)
        assert_steady(recording.seen[count:])


async def a_reader_that_stops(open_subject: Open, make_model: MakeModel = TracedModel) -> None:
    """Nothing piles up meanwhile but the speech, nothing is lost, and it goes on at its pace."""
    model = make_model()
    async with open_subject(model) as subject, Recording(subject) as recording:
        await asyncio.sleep(1.0)
        samples = speech(5.0)
        await say(subject, samples)
        recording.pause()
        await asyncio.sleep(2.0)
        steps, count = model.num_steps, len(recording.seen)
        await asyncio.sleep(60.0)
        assert model.num_steps <= steps + 2, (
            f"expected no work for nobody, got {model.num_steps - steps} chunks"
        )
        at_s = now()
        recording.resume()
        await recording.until_ends(1, 8.0)
        assert_heard(recording.sound, samples)
        assert_in_step(recording.seen)
        took_s, pieces = now() - at_s, len(recording.seen) - count
        assert pieces <= took_s * FPS + 8, (
            f"expected the pace of the clock, got {pieces} pieces in {took_s:.1f} s"
        )


async def hours_of_idling(
    open_subject: Open, make_model: MakeModel = TracedModel, hours: float = 2.0
) -> None:
    """Pictures never stop, and memory does not grow."""
    async with open_subject(make_model()) as subject, Recording(subject, keeps=False) as recording:
        await asyncio.sleep(60.0)
        gc.collect()
        before_mb, start = resident_memory_mb(), recording.num_seen
        await asyncio.sleep(3600.0 * hours)
        gc.collect()
        grown_mb = resident_memory_mb() - before_mb
        count = recording.num_seen - start
        assert abs(count - 3600 * hours * FPS) <= FPS, (
            f"expected {3600 * hours * FPS:.0f} pictures, got {count}"
        )
        assert grown_mb < MAX_GROWN_MB, (
            f"expected memory that does not grow, got {grown_mb:.1f} MB more"
        )


async def a_quick_answer(open_subject: Open, make_model: MakeModel = TracedModel) -> None:
    """From the first sample to the first picture with it: 700 ms where the model takes 100 ms."""
    for phase_s in np.arange(0.0, 0.96, 0.11):
        async with open_subject(make_model()) as subject, Recording(subject) as recording:
            await asyncio.sleep(3.0 + float(phase_s))
            at_s = now()
            await say(subject, speech(2.0), speed=4.0)
            await recording.until(lambda: len(recording.sound) > 0, 3.0, "speech")
            first_s = next(each.time_s for each in recording.seen if each.piece.samples is not None)
            assert first_s - at_s <= 0.7, (
                f"expected an answer within 700 ms, got it after {1e3 * (first_s - at_s):.0f}"
            )


CASES: tuple[Case, ...] = (
    utterances_of_any_length,
    ten_minutes_faster_than_real_time,
    rates_and_channels,
    interruption_at_every_phase,
    interruption_while_the_next_utterance_comes,
    interruption_of_nothing,
    utterances_that_follow_at_once,
    speech_in_real_time,
    speech_slower_than_real_time,
    an_end_that_nobody_tells,
    a_model_slower_than_real_time,
    a_reader_that_stops,
    hours_of_idling,
    a_quick_answer,
)


def _spoken_after(seen: list[Seen], at_s: float) -> NDArray[Any]:
    heard = [
        each.piece.samples for each in seen if each.piece.samples is not None and each.time_s > at_s
    ]
    return np.concatenate(heard) if heard else np.zeros(0, np.int16)


def _assert_nothing_old(seen: list[Seen], at_s: float, is_odd: bool) -> None:
    """After an interruption neither the sound nor the pictures of speech whose number was even, or
    odd.
    """
    sign = -1 if is_odd else 1
    held = max(
        (read_trace(each.piece.picture).frame for each in seen if each.time_s - at_s <= MAX_OLD_S),
        default=-1,
    )
    for each in seen:
        late_s = each.time_s - at_s
        if late_s <= MAX_OLD_S:
            continue
        samples, trace = each.piece.samples, read_trace(each.piece.picture)
        assert samples is None or not (sign * samples > 0).any(), (
            f"expected no old sound {1e3 * MAX_OLD_S:g} ms after an interruption, got some after "
            f"{1e3 * late_s:.0f} ms"
        )
        assert trace.frame == held or sign * trace.level < _LOW / 2, (
            f"expected no old picture {1e3 * MAX_OLD_S:g} ms after an interruption, got one after "
            f"{1e3 * late_s:.0f} ms"
        )
