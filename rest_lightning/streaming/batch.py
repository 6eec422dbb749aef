"""Many streams at once: rows that start, stop and change independently, computed together chunk by
chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch

from rest_lightning.constants import FPS, SAMPLE_RATE
from rest_lightning.errors import UserError
from rest_lightning.streaming.device import Frames
from rest_lightning.streaming.engine import (
    ChunkEngine,
    EngineOptions,
    StreamState,
    Tables,
    explain_out_of_memory,
)
from rest_lightning.streaming.report import StreamClock, StreamReport
from rest_lightning.streaming.session import (
    NotFiniteError,
    Row,
    RowState,
    as_reference,
    as_samples,
    describe,
    launch,
)

if TYPE_CHECKING:
    from rest_lightning.diffusion.sampling import Sampling
    from rest_lightning.parts import TalkingParts

Idle = Literal["wait", "silence"]


@dataclass(frozen=True)
class BatchState:
    """All rows of a batch between two steps; None for a row that is not in use."""

    rows: tuple[RowState | None, ...]


class BatchSession:
    """Up to n streams of one model; made by :meth:`TalkingHead.open_batch`.

    Speech is pushed to rows in any amounts, and :meth:`step` computes one chunk of every row that
    is ready. The frames of a row are those of a session alone (1e-5 before rounding to uint8),
    whatever other rows do and whenever they come and go.

    Every row owns the memory of a session alone. Rows that are computed together are copied into
    lanes that lie side by side, and stay there as long as the same rows are computed together; so a
    stopped or silent row costs nothing, and a row that starts or changes touches no other. Memory
    is that of 2 n sessions, without the weights.

    Args:
        model: the talking head.
        num_rows: n.
        sampling: None takes the model's own; the same for all rows.
        options: switches of the engine.
        max_waiting_s: speech that a row may hold beyond its next chunk.

    Attributes:
        clock: of all rows together.
        size_px: side of the frames.
    """

    def __init__(
        self,
        model: TalkingParts,
        num_rows: int,
        *,
        sampling: Sampling | None = None,
        options: EngineOptions | None = None,
        max_waiting_s: float = 60.0,
    ) -> None:
        if num_rows < 1:
            raise UserError(f"expected a batch of at least 1 row, got {num_rows}")
        if not max_waiting_s > 0:
            raise UserError(
                f"expected max_waiting_s above 0, got {max_waiting_s}: 60 is the default"
            )
        self.model, self.max_waiting_s = model, max_waiting_s
        self._sampling, self._options = sampling or model.sampling, options or EngineOptions()
        self.clock = StreamClock()
        self.configuration = describe(model, self._sampling, self._options) | {"num_rows": num_rows}
        self._closed = False
        self._failed: dict[int, NotFiniteError] = {}
        # The rows whose state is in the lanes, newer than their own.
        self._in_lanes: tuple[int, ...] = ()
        self.size_px = self._options.output_px(model.size_px)
        with explain_out_of_memory(model, num_rows, self._sampling), self.clock.paused():
            first = StreamState(Tables(model, self._sampling, self._options), 1)
            # Any portrait tells how much a decoder remembers.
            first.start(torch.zeros(1, 3, self.size_px, self.size_px))
            lanes = first.for_batch(num_rows)
            self._places = [first, *(first.for_batch(1) for _ in range(num_rows - 1))]
        self._rows: list[Row | None] = [None] * num_rows
        self._widest = ChunkEngine(
            model, num_rows, self._sampling, self.clock, self._options, lanes
        )
        self._lanes = {num_rows: self._widest}
        if self._options.warms_up(model.device):
            for size in range(1, num_rows + 1):
                self._engine(size).warm_up()

    @property
    def num_rows(self) -> int:
        """n, rows in use or not."""
        return len(self._rows)

    @property
    def rows(self) -> list[int]:
        """Rows in use: started, and neither stopped nor finished."""
        return [row for row, held in enumerate(self._rows) if held is not None]

    @property
    def ready(self) -> list[int]:
        """Rows whose next chunk can be computed."""
        return [row for row in self.rows if self._row(row).has_chunk]

    def num_frames(self, row: int) -> int:
        """Returns how many frames a row's stream has given so far."""
        return self._row(row).num_frames

    def waiting_s(self, row: int) -> float:
        """Returns the seconds of speech that a row holds beyond its next chunk."""
        return self._row(row).num_waiting / SAMPLE_RATE

    # -- rows come, change and go ------------------------------------------------------------------

    def start(self, row: int, portrait: Any, *, seed: int = 0) -> None:
        """Begin a stream in a row; one that is in use starts anew, and what it held is dropped.
        Costs one prefill.

        Args:
            row: 0 to n - 1.
            portrait, seed: see :meth:`TalkingHead.open`.
        """
        self._check(row)
        reference = as_reference(portrait, self.size_px)
        self._settle([row])
        self._rows[row] = None
        self._failed.pop(row, None)
        with explain_out_of_memory(self.model, self.num_rows, self._sampling):
            self._rows[row] = Row(self._widest, reference, seed, self._places[row])

    def push(self, row: int, samples: Any) -> None:
        """Give speech to a row, as to :meth:`StreamingSession.push`; nothing is computed yet.

        Raises:
            UserError: no such row, one that is not started or has finished, bad samples, or more
                than the row may hold; nothing of the block is kept then.
        """
        held = self._row(row)
        if held.is_finished:
            raise UserError(
                f"expected speech before finish({row}), got a push after it: start the row anew"
            )
        block = as_samples(samples, held.num_samples + held.num_waiting)
        if len(block) + held.num_waiting > held.num_missing + self.max_waiting_s * SAMPLE_RATE:
            got_s = (len(block) + held.num_waiting) / SAMPLE_RATE
            raise UserError(
                f"expected at most {self.max_waiting_s:g} s of speech waiting in row {row}, got "
                f"{got_s:.1f} s: "
                "call step() between pushes, or open the batch with a larger max_waiting_s"
            )
        held.push(block)

    def amend(self, row: int, samples: Any) -> None:
        """Put other speech in the place of the last that was pushed to a row, as far as no chunk
        has shown it.

        After a step that is what the model reads ahead: the lookahead of the speech encoder.

        Raises:
            UserError: bad samples, or more than were not shown yet; nothing has changed then.
        """
        held = self._row(row)
        block = as_samples(samples, held.num_samples - len(samples))
        if len(block) > held.num_amendable:
            raise UserError(
                f"expected at most {held.num_amendable} samples in place of those that row {row} "
                f"has not shown, got {len(block)}: amend after a step"
            )
        held.amend(block)

    def finish(self, row: int) -> None:
        """Ends a row's speech.

        The next steps give what is left; with its last frame the row is free again.
        """
        held = self._row(row)
        held.is_finished = True
        self._release(row)

    def stop(self, row: int) -> None:
        """Ends a row's stream at once; what it held is dropped, and the row is free."""
        self._row(row)
        self._rows[row] = None

    def drop_waiting(self, row: int) -> float:
        """Drops the speech that waits beyond a row's next chunk, for an interruption.

        Returns:
            Seconds of speech that were dropped.
        """
        dropped_s = self.waiting_s(row)
        self._row(row).drop_waiting()
        return dropped_s

    def switch_identity(self, row: int, portrait: Any) -> None:
        """Continues a row with another portrait from its next chunk on.

        This costs one prefill of this row.
        """
        held = self._row(row)
        reference = as_reference(portrait, self.size_px)
        self._settle([row])
        with explain_out_of_memory(self.model, self.num_rows, self._sampling):
            held.switch_identity(reference)

    def snapshot_row(self, row: int) -> RowState:
        """A copy of everything that the following frames of one row depend on; a few megabytes at
        the embedded size.
        """
        held = self._row(row)
        self._settle([row])
        return held.snapshot()

    def restore_row(self, row: int, state: RowState) -> None:
        """Take one row back to a snapshot of it, or of a row of a batch like this one; the others
        go on.

        Raises:
            UserError: no such row, one that is not in use, or a snapshot of another model; the row
                is as it was then.
        """
        held = self._row(row)
        self._places[row].check(state.engine)
        self._settle([row])
        with self.clock.paused():
            held.restore(state)

    # -- computing ---------------------------------------------------------------------------------

    def step(self, idle: Idle = "wait") -> dict[int, Frames]:
        """Compute one chunk of every row that is ready.

        Args:
            idle: what becomes of rows in use whose speech does not fill a chunk: ``wait``, or
                ``silence`` in place of what is missing, so that they go on moving.

        Returns:
            Frames (n, H, W, 3) of the rows that were computed; nothing when none was ready. A row
            whose frames are not finite has ended without them: the next call for it raises
            :class:`~rest_lightning.streaming.session.NotFiniteError`.
        """
        self._check_open()
        if idle not in ("wait", "silence"):
            raise UserError(f"expected idle `wait` or `silence`, got {idle!r}")
        if idle == "silence":
            for row in self.rows:
                held = self._row(row)
                if not held.is_finished:
                    held.push(np.zeros(held.num_missing, dtype=np.float32))
        groups: dict[tuple[int, bool], list[int]] = {}
        for row in self.ready:
            key = (self._row(row).num_latents, self._reference_expected(row))
            groups.setdefault(key, []).append(row)
        frames: dict[int, Frames] = {}
        for rows in groups.values():
            engine = self._enter_lanes(rows)
            pending, counts = launch(engine, self.clock, [self._row(row) for row in rows])
            computed = pending.frames()
            for lane, (row, count) in enumerate(zip(rows, counts, strict=True)):
                if pending.finite[lane]:
                    frames[row] = computed[lane, :count]
                else:
                    self._give_up(row, count)
        if frames:
            self.clock.end_chunk(sum(map(len, frames.values())))
        for row in frames:
            self._release(row)
        return dict(sorted(frames.items()))

    def _give_up(self, row: int, num_frames: int) -> None:
        """End a row whose frames are no numbers; the others go on."""
        at_s = (self._row(row).num_frames - num_frames) / FPS
        self._settle([row])
        self._rows[row] = None
        self._failed[row] = NotFiniteError(at_s)

    def _enter_lanes(self, rows: Sequence[int]) -> ChunkEngine:
        engine = self._engine(len(rows))
        if tuple(rows) != self._in_lanes:
            self._settle(self._in_lanes)
            engine.state.copy_rows_([(lane, self._places[row], 0) for lane, row in enumerate(rows)])
            self._in_lanes = tuple(rows)
        return engine

    def _settle(self, rows: Sequence[int]) -> None:
        """Bring the rows that are in the lanes back to their own memory, if one of ``rows`` is
        among them.
        """
        if not set(rows) & set(self._in_lanes):
            return
        engine = self._engine(len(self._in_lanes))
        engine.join()
        for lane, row in enumerate(self._in_lanes):
            self._places[row].copy_rows_([(0, engine.state, lane)])
        self._in_lanes = ()

    def _engine(self, size: int) -> ChunkEngine:
        """The engine of the first ``size`` lanes; made when first wanted, in memory that is
        there.
        """
        if size not in self._lanes:
            self._lanes[size] = self._widest.narrow(size)
        return self._lanes[size]

    def _reference_expected(self, row: int) -> bool:
        """Whether a row's next chunk comes with its reference; the lanes hold only rows that agree
        on it.
        """
        if row in self._in_lanes:
            return self._engine(len(self._in_lanes)).cache.reference_expected
        return self._places[row].cache.reference_expected

    # -- the whole batch ---------------------------------------------------------------------------

    def report(self) -> StreamReport:
        """Returns frames, speed, latency and memory so far, of all rows together.

        A chunk in it is one step.
        """
        return self.clock.report(self.configuration)

    def snapshot(self) -> BatchState:
        """A copy of everything that the following frames of all rows depend on."""
        self._check_open()
        self._settle(self._in_lanes)
        return BatchState(tuple(None if held is None else held.snapshot() for held in self._rows))

    def restore(self, state: BatchState) -> None:
        """Go back to a snapshot of this batch or of one like it: the same speech then gives the
        same frames.

        Raises:
            UserError: a snapshot with another number of rows, or of another model; the batch is as
                it was then.
        """
        self._check_open()
        if len(state.rows) != self.num_rows:
            raise UserError(
                f"expected a snapshot of {self.num_rows} rows, got one of {len(state.rows)}: "
                "restore it in a batch with as many"
            )
        for place, saved in zip(self._places, state.rows, strict=True):
            if saved is not None:
                place.check(saved.engine)
        self._settle(self._in_lanes)
        with self.clock.paused():
            for row, saved in enumerate(state.rows):
                self._rows[row] = None
                if saved is not None:
                    held = Row(self._widest, saved.reference, 0, self._places[row])
                    held.restore(saved)
                    self._rows[row] = held

    def close(self) -> None:
        """Ends all streams; only :meth:`report` can be called afterwards."""
        self._widest.join()
        self._rows = [None] * self.num_rows
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _release(self, row: int) -> None:
        """Free a row whose speech has ended and was shown to the last frame."""
        held = self._row(row)
        if held.is_finished and not held.has_chunk:
            self._rows[row] = None

    def _check_open(self) -> None:
        if self._closed:
            raise UserError(
                "expected an open batch, got a closed one: open a new one with open_batch"
            )

    def _check(self, row: int) -> None:
        self._check_open()
        if not 0 <= row < self.num_rows:
            raise UserError(
                f"expected a row from 0 to {self.num_rows - 1}, got {row}: open the batch with "
                "more rows"
            )

    def _row(self, row: int) -> Row:
        self._check(row)
        held = self._rows[row]
        if held is None and row in self._failed:
            raise self._failed[row]
        if held is None:
            raise UserError(
                f"expected a row in use, but row {row} was not started or has ended: call "
                f"start({row}, ...)"
            )
        return held
