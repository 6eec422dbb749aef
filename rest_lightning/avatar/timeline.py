"""What an avatar's next chunk shows, and what becomes of frames that were not shown.

No clock, no threads and no model: frames are counted, and an :class:`Order` says what the model has
to do.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rest_lightning.avatar.speech import IDLE, Samples, Slot, SpeechQueue
from rest_lightning.constants import SAMPLES_PER_FRAME

Frames = NDArray[np.uint8]
_LATE_FRAMES = 2  # speech of a live source may be so much later than when it began
_MAX_CHUNKS = 2  # of a live source may wait beyond the next one


@dataclass(frozen=True)
class Computed:
    """How the model came to a chunk.

    Attributes:
        compute_ms: time of the step; queued_ms: time from the order to the step.
        num_rows: avatars that were computed in the same step.
    """

    compute_ms: float
    queued_ms: float
    num_rows: int


@dataclass(frozen=True)
class Identity:
    """A portrait to go on with, and the how-manieth of the avatar it is."""

    number: int
    portrait: Any


@dataclass(eq=False)
class Mark:
    """A row's state before a chunk; filled in when the model comes to it."""

    state: Any = None


@dataclass(eq=False)
class Order:
    """One chunk for the model.

    Attributes:
        samples: float32, 16 kHz: all that the chunk reads beyond what the frames before it showed.
        num_carried: how many of them the row has read already, ahead of the chunk before.
        is_amended: whether those have changed since.
        mark: where to keep the state before the chunk.
        restore: the state to begin from; None goes on from where the row is.
        identity: a portrait to go on with from this chunk on; None keeps the one that is shown.
        computed: how long it took; filled in by the model.
        is_void: nobody waits for the chunk any more. The mark is wanted all the same.
    """

    samples: Samples
    num_carried: int = 0
    is_amended: bool = False
    mark: Mark = field(default_factory=Mark)
    restore: Mark | None = None
    identity: Identity | None = None
    computed: Computed | None = None
    is_void: bool = False


@dataclass(eq=False)
class _Chunk:
    start: int
    slots: list[Slot]
    order: Order
    num_carried: int  # slots that the model had read before, ahead of the chunk before
    frames: Frames | None = None
    # Of the chunk that this one replaces: its frames, shown until this one is computed.
    earlier: Frames | None = None
    num_earlier: int = 0

    @property
    def end(self) -> int:
        return self.start + len(self.slots)

    @property
    def ready_until(self) -> int:
        """The first frame that cannot be shown yet."""
        return self.start + (len(self.slots) if self.frames is not None else self.num_earlier)


class Timeline:
    """The frames of one avatar in a row: shown, computed, planned.

    Silence is planned as late as it can be. Speech that comes while silence is planned takes the
    place of what was not shown of it: the row goes back to the state before that chunk, and the
    chunk is computed again with the speech in its place, so that its first frames are those that
    were shown. An interruption does the same with silence. So the face goes on from the very frame
    that was shown last, and a model with long chunks answers in the middle of one.

    Speech begins where a source that speaks in real time would not run out again before its next
    chunk.

    A live source, such as a microphone, cannot wait: its pauses are left out where speech is shown
    later than at the beginning of an utterance would do, and of speech that nevertheless piles up
    whole chunks are dropped, the oldest first. Its frames may be taken before they are due, as soon
    as they are computed: what such speech waits for is its own next chunk.

    Args:
        chunk_frames: frames of a chunk.
        lookahead_frames: frames of speech that the model reads beyond it.
        cushion_frames: speech kept in reserve at the beginning of an utterance, against a source
            that stutters.
        is_live: whether the source is live.

    Attributes:
        queue: speech that waits.
        shown: number of the next frame to be shown.
        identity: number of the portrait that was shown last.
        num_left_out: pieces of pauses that were left out; num_dropped: pieces of speech dropped.
        num_starved: how often an utterance stood still because its speech had not come.
    """

    def __init__(
        self,
        chunk_frames: int,
        lookahead_frames: int,
        cushion_frames: int = 2,
        is_live: bool = False,
    ) -> None:
        self.chunk_frames, self.lookahead_frames = chunk_frames, lookahead_frames
        self.cushion_frames, self.is_live = cushion_frames, is_live
        self.queue = SpeechQueue()
        self.shown = self.num_starved = 0
        self.identity = self.num_left_out = self.num_dropped = 0
        self._chunks: deque[_Chunk] = deque()
        self._end = 0  # of what is planned
        self._now = 0  # the frame that is due
        self._ahead: list[Slot] = []  # read by the model beyond the last chunk
        self._is_amended = False  # whether it read something else there
        self._quiet_from = 0  # from here on everything planned is silence
        self._is_speaking = False  # whether speech goes on where the plan ends
        self._num_identities = 0
        self._identity: Identity | None = None  # to be shown from the next chunk on
        self._late: int | None = None  # frames; None: nothing seen since the last chunk
        self._is_late = False

    @property
    def num_ready(self) -> int:
        """Frames that can be shown now."""
        until = self.shown
        for chunk in self._chunks:
            until = max(until, chunk.ready_until)
            if chunk.frames is None:
                break
        return until - self.shown

    @property
    def is_idle(self) -> bool:
        """Whether no speech waits or is planned."""
        return self._quiet_from <= self.shown and not self.queue.has_speech

    def take(self) -> tuple[NDArray[np.uint8], Slot, Computed | None] | None:
        """The next frame, what is heard with it, and how its chunk was computed; None when it is
        not computed yet.
        """
        if not self._chunks or self._chunks[0].ready_until <= self.shown:
            return None
        chunk = self._chunks[0]
        place = self.shown - chunk.start
        frames = chunk.frames if chunk.frames is not None else chunk.earlier
        assert frames is not None, "a frame that is ready is there"
        picture, slot = frames[place], chunk.slots[place]
        if chunk.frames is not None and chunk.order.identity is not None:
            self.identity = chunk.order.identity.number
        self.shown += 1
        if self.shown == chunk.end:
            self._chunks.popleft()
        return picture, slot, chunk.order.computed

    def put(self, order: Order, frames: Frames) -> bool:
        """The model has computed an order; returns whether it is still wanted."""
        for chunk in self._chunks:
            if chunk.order is order:
                chunk.frames, chunk.earlier = frames, None
                return True
        return False

    def switch_identity(self, portrait: Any) -> int:
        """Go on with another portrait from the next chunk on; returns its number, from 1."""
        self._num_identities += 1
        self._identity = Identity(self._num_identities, portrait)
        return self._num_identities

    def plan(
        self, lead: int, is_patient: bool, speed: float = 1.0, num_early: int = 0
    ) -> Order | None:
        """What the model should do now, if anything.

        Args:
            lead: frames that are shown until an order given now is computed.
            is_patient: whether more of the open utterance may be on its way; otherwise what is
                there is shown.
            speed: how fast the open utterance comes at least, in multiples of real time.
            num_early: frames that were taken before they were due.
        """
        self._now = self.shown - num_early
        if self.is_live and self.queue.num_slots > _MAX_CHUNKS * self.chunk_frames + self._window:
            self.num_dropped += self.queue.drop(self.chunk_frames)
        if self._is_speaking:
            num_new = self._window - len(self._ahead)
            if self.is_live:
                self._catch_up(lead, num_new)
            if self._has(num_new):
                is_near = self._end - self._now <= max(self.chunk_frames, lead)
                return self._append() if is_near else None
            return self._append() if self._end - self._now <= lead else None
        if self.queue.num_slots:
            order = self._begin(lead, is_patient, speed)
            if order is not None:
                return order
        return self._append(is_silent=True) if self._end - self._now <= lead else None

    @property
    def _window(self) -> int:
        """Frames of speech that the model reads for a chunk."""
        return self.chunk_frames + self.lookahead_frames

    def _catch_up(self, lead: int, num_new: int) -> None:
        """Leave pauses out where speech is later than at the beginning of an utterance.

        How late it is tells the least of what was seen since the last chunk: speech that comes in
        large blocks is late only between two of them. What is left out now comes in time behind it.
        """
        latency = self._end - self._now + len(self._ahead) + self.queue.num_slots
        late = latency - (self._window + self.cushion_frames + lead)
        self._late = late if self._late is None else min(self._late, late)
        if self._has(num_new) and self._late > (0 if self._is_late else _LATE_FRAMES):
            num_left_out = self.queue.leave_out_pauses(self._late)
            self.num_left_out += num_left_out
            self._late -= num_left_out
            self._is_late = self._late > 0

    def interrupt(self) -> Order | None:
        """Forget all speech, waiting or planned; what was shown last is followed by silence.

        Returns:
            What the model should do now: None when everything that is planned is silence.
        """
        self.queue.clear()
        self._is_speaking = False
        if self._quiet_from <= self.shown:
            return None
        self._quiet_from = self.shown
        if self._chunks:
            return self._replace(self._chunks[0], self.shown)
        self._ahead = [IDLE] * len(self._ahead)
        self._is_amended = True
        return None

    # -- placing speech ---------------------------------------------------------------------------

    def _has(self, num_slots: int) -> bool:
        """Whether so many slots of speech can follow without a gap; an utterance that has ended may
        be shorter.
        """
        return self.queue.num_slots >= num_slots or (
            self.queue.is_whole and self.queue.num_slots > 0
        )

    def _begin(self, lead: int, is_patient: bool, speed: float) -> Order | None:
        """Let an utterance begin at the earliest frame that can still be changed, or wait for more
        of it.
        """
        first = max(self._now + lead, self.shown, self._quiet_from)
        # What is left of a chunk has to last until the next one is computed.
        target = next(
            (chunk for chunk in self._chunks if max(first, chunk.start) + lead <= chunk.end), None
        )
        if target is not None:
            first, end = max(first, target.start), target.end
        else:
            # Frames that were taken early knew the silence that was read ahead of them.
            earliest = self._end + (len(self._ahead) if self.is_live else 0)
            first, end = max(earliest, self._quiet_from), self._end + self.chunk_frames
        is_due = target is None and self._end - self._now <= lead
        if not self.queue.is_whole and is_patient:
            # Enough to fill the chunk, and enough that the next one can be filled when it has to be
            # computed.
            waiting = self.queue.num_slots - self.cushion_frames
            fills = end + self.lookahead_frames - waiting
            lasts = fills + self.chunk_frames - int(speed * max(0, end - lead - self._now))
            best = max(first, fills, lasts)
            # A chunk that has to be computed now is silent where it would take longer than to
            # replace it.
            latest = end - 1 if self.is_live else min(end - 1, self._end + 2 * lead)
            if best > first and (not is_due or best > latest):
                return None
            first = best
        if target is not None:
            return self._replace(target, first)
        return self._append(first) if is_due or self._end - self._now <= self.chunk_frames else None

    def _append(self, first: int | None = None, *, is_silent: bool = False) -> Order:
        """Plan a chunk behind the others, in which speech begins at frame ``first``; None: where
        the plan ends.
        """
        kept = self._ahead if first is None else self._ahead[: first - self._end]
        num_carried = self.lookahead_frames if self._end else 0
        return self._add(self._end, kept, num_carried, first, None, is_silent)

    def _replace(self, chunk: _Chunk, first: int) -> Order:
        """Compute a chunk anew from frame ``first`` on, and forget what was planned behind it."""
        while self._chunks and self._chunks[-1].start >= chunk.start:
            dropped = self._chunks.pop()
            dropped.order.is_void = True
            if self._identity is None:  # the latest counts
                self._identity = dropped.order.identity
        place = first - chunk.start
        self._is_amended = chunk.order.is_amended
        order = self._add(
            chunk.start, chunk.slots[:place], chunk.num_carried, first, chunk.order.mark, False
        )
        replacing = self._chunks[-1]
        replacing.earlier = chunk.frames if chunk.frames is not None else chunk.earlier
        replacing.num_earlier = place if chunk.frames is not None else min(place, chunk.num_earlier)
        return order

    def _add(
        self,
        start: int,
        kept: list[Slot],
        num_carried: int,
        first: int | None,
        restore: Mark | None,
        is_silent: bool,
    ) -> Order:
        """Plan the chunk that begins at frame ``start`` with slots that are there; fill it up."""
        count = self._window - len(kept)
        num_silent = (
            count if is_silent else 0 if first is None else max(0, first - start - len(kept))
        )
        slots = [*kept, *[IDLE] * num_silent]
        self._is_speaking = self._is_speaking and first is None
        num_speech = self._fill(slots, start, self._window)
        samples = np.concatenate([slot.samples for slot in slots])
        is_amended = self._is_amended or len(kept) < num_carried
        order = Order(
            samples,
            num_carried * SAMPLES_PER_FRAME,
            is_amended,
            restore=restore,
            identity=self._identity,
        )
        self._identity, self._is_amended, self._late = None, False, None
        self._chunks.append(_Chunk(start, slots[: self.chunk_frames], order, num_carried))
        self._end = start + self.chunk_frames
        self._ahead = slots[self.chunk_frames :]
        if self._is_speaking and num_speech < len(slots):
            # What the model reads ahead may come later: only sound that is missing tears the
            # speech.
            self._is_speaking = num_speech >= self.chunk_frames
            self._ahead = (
                self._ahead[: max(0, num_speech - self.chunk_frames)]
                if self._is_speaking
                else self._ahead
            )
            self.num_starved += not self._is_speaking
        return order

    def _fill(self, slots: list[Slot], start: int, count: int) -> int:
        """Fill up with speech as far as there is any, then with silence.

        Returns:
            How many slots there were with the last of the speech.
        """
        while len(slots) < count and self.queue.num_slots:
            slot = self.queue.take()
            slots.append(slot)
            self._quiet_from = start + len(slots)
            # The next utterance follows at once if it has come as far as it has to.
            missing = max(count - len(slots), 1) + self.chunk_frames
            self._is_speaking = not slot.is_last or self._has(missing)
            if not self._is_speaking:
                break
        num_speech = len(slots)
        slots += [IDLE] * (count - len(slots))
        return num_speech
