"""A face for a voice agent: speech goes in, pictures with their sound come out in real time."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from rest_lightning.avatar.pool import AvatarPool, ModelError
from rest_lightning.avatar.speech import Slot, Sound, check_sound
from rest_lightning.avatar.timeline import Computed, Order, Timeline
from rest_lightning.constants import FPS
from rest_lightning.errors import UserError

if TYPE_CHECKING:
    from rest_lightning.talking_head import TalkingHead

FRAME_S = 1.0 / FPS
_MARGIN_S = 0.02  # beyond the time that the model is expected to take
_AWAY_S = 0.2  # a reader that comes back later than this does not catch up
_RECENT_S = 0.15  # what came since then tells how fast a source is
_SPEED_SHARE = 0.8  # of the speed measured that is relied on


@dataclass(frozen=True)
class AvatarSettings:
    """How an avatar waits and answers.

    Attributes:
        cushion_ms: speech kept in reserve at the beginning of an utterance, against a source that
            stutters. More of it answers later.
        patience_ms: how long to wait for more of an utterance that nobody has flushed, before what
            is there is shown.
        max_waiting_s: speech that may wait; beyond it ``push_audio`` waits.
        sample_rate: of the silence before the first utterance, in Hz; afterwards it is that of the
            last utterance.
        seed: of the noise.
        crop: of the portrait: ``auto`` (the head that is found), ``centre``, or a box.
        is_live: whether the speech is that of a microphone, which must not be heard later and
            later: its pauses are left out where it is late, and of more than two chunks that wait
            the oldest are dropped. Pieces come as soon as they are computed, for a reader with a
            clock of its own; no picture is held, and :meth:`Avatar.take_early` gives what is ready.
            Otherwise all speech is kept, and leaves untouched.
    """

    cushion_ms: float = 80.0
    patience_ms: float = 400.0
    max_waiting_s: float = 120.0
    sample_rate: int = 24_000
    seed: int = 0
    crop: Any = "auto"
    is_live: bool = False

    def __post_init__(self) -> None:
        for name in ("cushion_ms", "patience_ms"):
            value = getattr(self, name)
            if not 0.0 <= value < math.inf:
                raise UserError(
                    f"expected {name} of at least 0, got {value}: leave it out for the default"
                )
        if not self.max_waiting_s >= 2.0:
            raise UserError(
                f"expected max_waiting_s of at least 2, got {self.max_waiting_s}: 120 is the "
                f"default"
            )
        check_sound(np.zeros(0, np.int16), self.sample_rate)


@dataclass(frozen=True, slots=True)
class AvatarFrame:
    """40 ms: one picture, and the sound that is heard with it.

    Attributes:
        index: counts what :meth:`Avatar.run` has given, from 0 on.
        picture: uint8 (H, W, 3).
        samples: the sound, as it was pushed: type, rate and channels; zeros where nobody speaks.
            The last piece of an utterance is filled up with zeros.
        sample_rate: of the sound, in Hz.
        utterance: what ``push_audio`` returned for the speech that is heard; None where nobody
            speaks.
        offset: samples of the utterance before this piece.
        begins, ends: whether the utterance begins or ends in this piece.
        is_held: whether the picture is the last one again, because the next was not computed in
            time.
        epoch: interruptions before this piece.
        identity: number of the portrait that is shown: 0, then what ``switch_identity`` returned.
        computed: what the chunk of this picture cost; None where the picture is held.
    """

    index: int
    picture: NDArray[np.uint8]
    samples: Sound
    sample_rate: int
    utterance: int | None
    begins: bool
    ends: bool
    is_held: bool
    epoch: int
    offset: int = 0
    identity: int = 0
    computed: Computed | None = None

    @property
    def is_speech(self) -> bool:
        """Whether the sound is somebody's speech."""
        return self.utterance is not None

    @property
    def time_s(self) -> float:
        """When the piece begins, on the clock of the sound."""
        return self.index * FRAME_S


@dataclass
class AvatarStats:
    """What has happened so far.

    Attributes:
        num_frames: pieces given.
        num_held: pieces with the last picture again, because the model was late.
        num_utterances: utterances begun.
        num_interruptions: interruptions.
        num_starved: how often an utterance stood still because its speech had not come.
        num_away: how often the reader was away for so long that the clock began anew.
        dropped_s: seconds of speech that interruptions dropped before they were planned.
        left_out_s: seconds of pauses of a live source that were left out.
        overrun_s: seconds of speech of a live source that were dropped because too much waited.
        first_picture_ms: milliseconds from the first sample to the first picture with it, of the
            last 256 utterances.
    """

    num_frames: int = 0
    num_held: int = 0
    num_utterances: int = 0
    num_interruptions: int = 0
    num_starved: int = 0
    num_away: int = 0
    dropped_s: float = 0.0
    left_out_s: float = 0.0
    overrun_s: float = 0.0
    first_picture_ms: list[float] = field(default_factory=list)


class Avatar:
    """A portrait that speaks what it is given, idles in between, and can be interrupted.

    ::

        async with Avatar("portrait.png") as avatar:
            # answer awaits avatar.push_audio(samples, sample_rate) for each block of speech, and
            # avatar.flush() at the end of an utterance
            speaking = asyncio.create_task(answer(avatar))
            async for frame in avatar.run():  # without end
                show(frame.picture)
                play(frame.samples, frame.sample_rate)

    ``answer``, ``show`` and ``play`` are yours. Where the speech is an iterable of blocks,
    :func:`speak` is shorter: it pushes, flushes, runs, and ends with the speech.

    :meth:`run` gives a piece of 40 ms at a time, in step with the clock of the event loop, whatever
    happens: idle pictures never stop. Sound leaves as it came; it is resampled for the model alone.
    Every method belongs to the event loop that :meth:`run` runs in.

    Args:
        portrait: as in :meth:`TalkingHead.open`.
        model: a talking head, or a pool of avatars that share one; None loads the bundled model.
        settings: see :class:`AvatarSettings`.

    Attributes:
        stats: what has happened so far.
        size_px: side of the pictures; known once the model is loaded.
    """

    def __init__(
        self,
        portrait: Any,
        model: TalkingHead | AvatarPool | None = None,
        settings: AvatarSettings | None = None,
    ) -> None:
        self.settings = settings or AvatarSettings()
        self.stats = AvatarStats()
        self.epoch = 0
        self._given, self._owns_pool = model, not isinstance(model, AvatarPool)
        self._portrait = portrait
        self._pool: AvatarPool | None = None
        self._row: int | None = None
        self._timeline: Timeline | None = None
        self._starting: asyncio.Task[None] | None = None
        self._order: Order | None = None  # in work
        self._changed = asyncio.Event()
        self._room = asyncio.Event()  # set while speech may be pushed
        self._error: ModelError | None = None
        self._is_running = self._is_closed = False
        self._pushed_s = self._due_s = 0.0
        # Of the open utterance: when a piece came, and seconds of speech with it.
        self._arrivals: deque[tuple[float, float]] = deque()
        self._begun_s: dict[int, float] = {}
        self._picture: NDArray[np.uint8] | None = None
        self._sound: tuple[int, Sound] = (self.settings.sample_rate, np.zeros(0, np.int16))

    # -- life -------------------------------------------------------------------------------------

    @property
    def size_px(self) -> int:
        """Side of the square pictures."""
        return int(self._ready().model.size_px)

    async def start(self) -> None:
        """Load the model and the portrait, and warm up; :meth:`run` does it where nobody else has.

        Raises:
            UserError: a portrait that cannot be used, no place in the pool, no memory, or a closed
                avatar.
        """
        self._check_open()
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
        await asyncio.shield(self._starting)
        self._check_open()

    async def _start(self) -> None:
        given = self._given
        if not isinstance(given, AvatarPool):
            if given is None:
                from rest_lightning.talking_head import TalkingHead

                given = await asyncio.to_thread(TalkingHead.from_pretrained)
            given = AvatarPool(given)
        settings = self.settings
        try:
            self._row = await given.acquire(self._portrait, settings.seed, settings.crop)
        except BaseException:
            if self._owns_pool:
                await given.aclose()
            raise
        self._pool = given
        cushion_frames = math.ceil(settings.cushion_ms / 1e3 * FPS)
        self._timeline = Timeline(
            given.chunk_frames, given.lookahead_frames, cushion_frames, settings.is_live
        )
        self._room.set()
        self._portrait = None

    async def aclose(self) -> None:
        """End: :meth:`run` ends, and the place in the pool is free. A second call does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        self._changed.set()
        self._room.set()
        if self._starting is not None:
            await asyncio.wait({self._starting})
        if self._pool is not None and self._row is not None:
            await self._pool.release(self._row)
            if self._owns_pool:
                await self._pool.aclose()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    # -- speech -----------------------------------------------------------------------------------

    async def push_audio(self, samples: Any, sample_rate: int) -> int:
        """Speech, in pieces of any length and at any speed; waits while too much of it waits.

        Args:
            samples: int16, or float in [-1, 1]; (n,) or (n, channels).
            sample_rate: in Hz; the same to the end of the utterance.

        Returns:
            The number of the utterance that the speech belongs to; it begins with the first samples
            after :meth:`flush` or :meth:`interrupt`.

        Raises:
            UserError: samples or a rate that are no speech, or a closed avatar; nothing of the
                block is kept then.
            ModelError: the avatar has ended because the model failed.
        """
        sound = check_sound(samples, sample_rate)
        if self._timeline is None:
            await self.start()
        epoch = self.epoch
        queue = self._speech().queue
        block = max(1, sample_rate)  # a second at a time, so that a long block waits in the middle
        number = queue.num_pushed
        for start in range(0, max(1, len(sound)), block):
            await self._wait_for_room()
            if epoch != self.epoch:
                break  # an interruption came while we waited, and is meant for the rest as well
            piece = sound[start : start + block].copy()
            number = queue.push(piece, sample_rate)
            if len(piece):
                self._arrived(number, len(piece) / sample_rate)
            self._plan()
        return number

    async def flush(self) -> int | None:
        """End of an utterance: what is left of it is shown without waiting for more.

        Returns:
            The number of the utterance; None where none was open, and nothing happens.

        Raises:
            UserError: a closed avatar.
        """
        if self._timeline is None:
            await self.start()
        number = self._speech().queue.finish()
        self._plan()
        return number

    def interrupt(self) -> None:
        """Be silent at once: speech that was not given out by :meth:`run` is dropped, and the face
        comes to rest.

        Pictures go on from the last one; until the model has computed them, which takes a chunk's
        time, it is held.

        Raises:
            UserError: a closed avatar.
        """
        self._check_open()
        if self._timeline is None:
            return
        timeline = self._timeline
        self.epoch += 1
        self.stats.num_interruptions += 1
        self.stats.dropped_s += timeline.queue.waiting_s
        self._begun_s.clear()
        order = timeline.interrupt()
        self._due_s = min(self._due_s, self._now() + FRAME_S)  # what was taken early is not shown
        if order is not None:
            self._submit(order)
        else:
            self._plan()
        self._changed.set()
        self._room.set()

    async def switch_identity(self, portrait: Any) -> int:
        """Go on with another portrait from the next chunk on.

        Returns:
            Its number: the :attr:`AvatarFrame.identity` of the pictures that show it.

        Raises:
            UserError: a portrait that cannot be used, or a closed avatar; the old one stays.
        """
        if self._timeline is None:
            await self.start()
        reference = await self._ready().load(portrait, self.settings.crop)
        return self._speech().switch_identity(reference)

    def delay(self, seconds: float) -> None:
        """Give the next piece, and all behind it, so much later.

        For a reader that has pieces enough to show meanwhile: what is said next then reaches it
        sooner after it was pushed.
        """
        self._due_s += max(0.0, seconds)

    @property
    def is_closed(self) -> bool:
        """Whether :meth:`aclose` was called."""
        return self._is_closed

    @property
    def is_speaking(self) -> bool:
        """Whether speech waits or is being shown."""
        return self._timeline is not None and not self._timeline.is_idle

    @property
    def waiting_s(self) -> float:
        """Seconds of speech that wait to be planned."""
        return 0.0 if self._timeline is None else self._timeline.queue.waiting_s

    # -- pictures ---------------------------------------------------------------------------------

    async def run(self) -> AsyncGenerator[AvatarFrame, None]:
        """Pictures and sound, 40 ms at a time, each when it is due; without end, until
        :meth:`aclose`. Those of a live source come as soon as they are ready.

        A reader that lets pieces wait is not hurried: less than 0.2 s are caught up, and after a
        longer absence the clock begins anew with the next piece; meanwhile nothing is computed
        beyond two chunks.

        Raises:
            UserError: it runs already, or the avatar is closed.
            ModelError: the model failed, or the pool was closed.
        """
        if self._is_running:
            raise UserError(
                "expected one run() of an avatar, got a second one: pass its frames on instead"
            )
        self._is_running = True
        try:
            await self.start()
            self._plan()
            while self._picture is None and not self._speech().num_ready:
                self._changed.clear()
                await self._changed.wait()
                if self._is_closed:
                    return
                self._raise_failure()
            self._due_s = self._now()
            while not self._is_closed:
                is_away = self.ahead_s < -_AWAY_S
                if self.settings.is_live:
                    await self._until_ready()
                elif self.ahead_s > 0:
                    await asyncio.sleep(self.ahead_s)
                if self.ahead_s < -_AWAY_S:
                    self._due_s = self._now()
                    self.stats.num_away += is_away
                if self._is_closed:
                    return
                self._raise_failure()
                yield self._next()
        finally:
            self._is_running = False

    def take_early(self) -> list[AvatarFrame]:
        """Pieces of a live source that are ready before they are due, behind the last one that
        :meth:`run` gave; empty for other sources, whose pictures may still change.
        """
        num_ready = self._speech().num_ready if self.settings.is_live else 0
        return [self._next() for _ in range(num_ready)]

    @property
    def ahead_s(self) -> float:
        """Seconds until the next piece is due; negative where it is late."""
        return self._due_s - self._now()

    async def _until_ready(self) -> None:
        """Wait for the next picture of a live source."""
        while not (self._speech().num_ready or self._is_closed or self._error):
            self._changed.clear()
            try:
                async with asyncio.timeout(self.ahead_s % FRAME_S + 1e-3):
                    await self._changed.wait()
            except TimeoutError:
                self._plan()  # another frame is due

    def _next(self) -> AvatarFrame:
        timeline, stats = self._speech(), self.stats
        taken = timeline.take()
        slot, computed, is_held = Slot(), None, taken is None
        if taken is not None:
            self._picture, slot, computed = taken
        assert self._picture is not None, "no picture before the first chunk"
        if slot.sound is not None:
            self._sound = (slot.sample_rate, slot.sound[:0])
            samples = slot.sound
        else:
            rate, kind = self._sound
            samples = np.zeros((rate // FPS, *kind.shape[1:]), kind.dtype)
        if slot.is_first and slot.utterance is not None:
            stats.num_utterances += 1
            begun_s = self._begun_s.pop(slot.utterance, None)
            if begun_s is not None:
                stats.first_picture_ms = [
                    *stats.first_picture_ms[-255:],
                    1e3 * (self._now() - begun_s),
                ]
        frame = AvatarFrame(
            index=stats.num_frames,
            picture=self._picture,
            samples=samples,
            sample_rate=self._sound[0],
            utterance=slot.utterance,
            begins=slot.is_first,
            ends=slot.is_last,
            is_held=is_held,
            epoch=self.epoch,
            offset=slot.offset,
            identity=timeline.identity,
            computed=computed,
        )
        stats.num_frames += 1
        stats.num_held += is_held
        stats.num_starved = timeline.num_starved
        stats.left_out_s = timeline.num_left_out * FRAME_S
        stats.overrun_s = timeline.num_dropped * FRAME_S
        self._due_s += FRAME_S
        if timeline.queue.waiting_s < self.settings.max_waiting_s:
            self._room.set()
        self._plan()
        return frame

    # -- the model --------------------------------------------------------------------------------

    def _plan(self) -> None:
        """Give the model its next order, if there is one."""
        if (
            self._order is not None
            or self._error is not None
            or self._is_closed
            or not self._is_running
        ):
            return
        assert self._pool is not None and self._row is not None
        seconds = self._pool.turnaround_s(self._row) + _MARGIN_S
        is_patient = self._now() - self._pushed_s < self.settings.patience_ms / 1e3
        lead, num_early = math.ceil(seconds * FPS - 1e-6), math.ceil(self.ahead_s * FPS - 1e-6) - 1
        order = self._speech().plan(lead, is_patient, self._speed(), max(0, num_early))
        if order is not None:
            self._submit(order)

    def _arrived(self, number: int, seconds: float) -> None:
        """Notes when speech came."""
        self._pushed_s = now_s = self._now()
        if number not in self._begun_s:
            self._begun_s[number] = now_s
            self._arrivals.clear()
        so_far_s = self._arrivals[-1][1] if self._arrivals else 0.0
        self._arrivals.append((now_s, so_far_s + seconds))
        while len(self._arrivals) > 2 and self._arrivals[1][0] < now_s - _RECENT_S:
            self._arrivals.popleft()

    def _speed(self) -> float:
        """How fast the open utterance has come lately, in multiples of real time; at least 1."""
        if len(self._arrivals) < 2 or self._now() - self._arrivals[0][0] < _RECENT_S:
            return 1.0
        (start_s, before_s), (_, after_s) = self._arrivals[0], self._arrivals[-1]
        return max(1.0, _SPEED_SHARE * (after_s - before_s) / (self._now() - start_s))

    def _submit(self, order: Order) -> None:
        assert self._pool is not None and self._row is not None
        self._order = order
        self._pool.submit(self._row, order).add_done_callback(
            lambda done: self._computed(order, done)
        )

    def _computed(self, order: Order, done: asyncio.Future[Any]) -> None:
        if done.cancelled() or self._timeline is None:
            return
        error = done.exception()
        if self._order is order:
            self._order = None
        if error is not None:
            if self._error is None:
                self._error = error if isinstance(error, ModelError) else ModelError(str(error))
        elif done.result() is not None:
            self._timeline.put(order, done.result())
        self._changed.set()
        self._plan()

    # -- checks -----------------------------------------------------------------------------------

    async def _wait_for_room(self) -> None:
        while True:
            self._check_open()
            self._raise_failure()
            if self.waiting_s < self.settings.max_waiting_s:
                return
            self._room.clear()
            await self._room.wait()

    def _check_open(self) -> None:
        if self._is_closed:
            raise UserError("expected an open avatar, got a closed one: open a new one")

    def _raise_failure(self) -> None:
        if self._error is not None:
            raise self._error

    def _ready(self) -> AvatarPool:
        self._check_open()
        if self._pool is None:
            raise UserError("expected a started avatar, got one that is not: await start() first")
        return self._pool

    def _speech(self) -> Timeline:
        self._ready()
        assert self._timeline is not None
        return self._timeline

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
