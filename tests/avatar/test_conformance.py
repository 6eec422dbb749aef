"""The seam keeps what every way to an avatar has to keep, with chunks of 0.96 and of 0.32 s."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from rest_lightning.avatar import Avatar, conformance
from rest_lightning.avatar.conformance import AvatarSubject, Piece, Subject
from rest_lightning.avatar.simulation import TracedModel

HOURS = [conformance.hours_of_idling, conformance.ten_minutes_faster_than_real_time]
QUICK = [case for case in conformance.CASES if case not in HOURS]


@pytest.mark.parametrize("chunk_length", [3, 1])
@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.__name__)
def test_the_seam_conforms(case: conformance.Case, chunk_length: int) -> None:
    conformance.check(case, conformance.open_avatar, partial(TracedModel, chunk_length))


@pytest.mark.slow
@pytest.mark.parametrize("case", HOURS, ids=lambda case: case.__name__)
def test_the_seam_conforms_for_hours(case: conformance.Case) -> None:
    conformance.check(case, conformance.open_avatar)


# -- a way that breaks something is noticed -------------------------------------------------------

Change = Callable[[AsyncIterator[Piece]], AsyncIterator[Piece]]


async def late_sound(pieces: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
    before: Piece | None = None
    async for piece in pieces:
        sound = None if before is None else before.samples
        yield replace(piece, samples=sound, ends=before is not None and before.ends)
        before = piece


async def lost_picture(pieces: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
    count = 0
    async for piece in pieces:
        count += 1
        if count != 20:
            yield piece


async def picture_twice(pieces: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
    before: Piece | None = None
    count = 0
    async for piece in pieces:
        count += 1
        yield piece if before is None or count % 20 else replace(piece, picture=before.picture)
        before = piece


async def lost_tail(pieces: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
    async for piece in pieces:
        yield replace(piece, samples=None) if piece.ends else piece


async def no_end(pieces: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
    async for piece in pieces:
        yield replace(piece, ends=False)


async def slow_way(pieces: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
    async for piece in pieces:
        await asyncio.sleep(0.45)
        yield piece


async def quiet_between(pieces: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
    async for piece in pieces:
        yield piece
        if piece.ends:
            yield replace(piece, samples=None, ends=False)


class DeafSubject(AvatarSubject):
    """Does not hear an interruption."""

    async def interrupt(self) -> None:
        """Nothing."""


class ChangedSubject(AvatarSubject):
    """Something happens on the way out."""

    def __init__(self, avatar: Avatar, change: Change) -> None:
        super().__init__(avatar)
        self.change = change

    async def pieces(self) -> AsyncIterator[Piece]:
        """The pieces, changed."""
        async for piece in self.change(super().pieces()):
            yield piece


@pytest.mark.parametrize(
    ("case", "make", "said"),
    [
        (
            conformance.rates_and_channels,
            partial(ChangedSubject, change=late_sound),
            "within 20 ms",
        ),
        (
            conformance.interruption_of_nothing,
            partial(ChangedSubject, change=lost_picture),
            "after it, got",
        ),
        (
            conformance.interruption_of_nothing,
            partial(ChangedSubject, change=picture_twice),
            "after it, got",
        ),
        (
            conformance.utterances_of_any_length,
            partial(ChangedSubject, change=lost_tail),
            "the tail is lost",
        ),
        (
            conformance.utterances_of_any_length,
            partial(ChangedSubject, change=no_end),
            "once, got it 0 times",
        ),
        (conformance.a_quick_answer, partial(ChangedSubject, change=slow_way), "within 700 ms"),
        (
            conformance.utterances_that_follow_at_once,
            partial(ChangedSubject, change=quiet_between),
            "no pause",
        ),
        (
            conformance.interruption_at_every_phase,
            DeafSubject,
            "expected the samples that were pushed, got others",
        ),
        (
            conformance.interruption_while_the_next_utterance_comes,
            DeafSubject,
            "no old sound 40 ms after",
        ),
    ],
    ids=lambda given: getattr(given, "__name__", None) or "",
)
def test_what_is_broken_is_noticed(case: conformance.Case, make: Any, said: str) -> None:
    @asynccontextmanager
    async def open_broken(model: TracedModel) -> AsyncIterator[Subject]:
        async with Avatar(conformance.portrait(), model) as avatar:  # type: ignore[arg-type]
            yield make(avatar)

    with pytest.raises(AssertionError, match=said):
        conformance.check(case, open_broken)
