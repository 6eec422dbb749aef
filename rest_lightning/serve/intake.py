"""Speech on its way into a session: in step with the clock, cut into chunks, silence where nothing
comes.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from rest_lightning.constants import SAMPLE_RATE
from rest_lightning.serve.protocol import Pcm

_NUM_WAITS = 4  # chunks: one that waited says nothing
_QUIET = 330  # -40 dBFS: a block whose samples stay below it is a pause


@dataclass(frozen=True)
class Piece:
    """What one chunk takes from the speech.

    Attributes:
        sound: samples that are heard with the chunk's frames.
        window: the same, with what the model reads ahead; its last ``num_new`` samples were not
            read before.
        idle: whether the sound is the server's silence alone.
        last_index: index of the last sample of the client's speech in ``sound``; None where there
            is none.
        num_speech: samples of ``sound`` up to the last one that the client sent.
    """

    sound: Pcm
    window: Pcm
    num_new: int
    idle: bool
    last_index: int | None
    num_speech: int


@dataclass
class _Block:
    samples: Pcm
    index: int | None  # of the first sample within the epoch; None for silence of the server


class Intake:
    """The queue between a client and its chunks.

    There is one clock: ``due_s`` is when the next chunk should be complete, and a chunk later for
    every chunk taken. A sample that arrives after a pause is placed where the clock is by then,
    with silence before it; a chunk that is not complete when it is due is filled with silence. So
    sound that flows is never cut, a face never stands still for want of speech, and speech is never
    further from its pictures than at the start.

    Speech that comes faster than it plays is ahead of the clock: pauses in it are left out until it
    is not.

    Args:
        chunk_samples, lookahead_samples: what a chunk shows, and what the model reads beyond it.
        now_s: the first chunk is due now.
        max_chunks: chunks that may wait beyond the next one; of more, whole chunks are dropped, the
            oldest first.
        slack_s: how far from the clock speech may be before anything is done about it; late packets
            are waited for as long.

    Attributes:
        due_s: see above.
        num_dropped: samples of speech dropped for want of time; ``num_trimmed``: of pauses left
            out.
    """

    def __init__(
        self,
        chunk_samples: int,
        lookahead_samples: int,
        now_s: float,
        *,
        max_chunks: int = 2,
        slack_s: float = 0.06,
    ) -> None:
        self.chunk_samples, self.lookahead_samples = chunk_samples, lookahead_samples
        self.chunk_s = chunk_samples / SAMPLE_RATE
        self.due_s, self.slack_s, self._max_chunks = now_s, slack_s, max_chunks
        self.num_dropped = self.num_trimmed = 0
        self.is_finished = False
        self._blocks: deque[_Block] = deque()
        self._num = self._ahead = 0  # samples here; those of them that the model has read already
        self._flows = False  # whether the last sample was the client's
        self._waits: deque[float] = deque(maxlen=_NUM_WAITS)
        self._settled_s = now_s  # when the clock and the speech agreed again after a trim

    @property
    def num_waiting(self) -> int:
        """Samples that were not read by the model."""
        return self._num - self._ahead

    @property
    def _whole(self) -> int:
        return self.chunk_samples + self.lookahead_samples

    def push(self, samples: Pcm, index: int, now_s: float) -> int:
        """Speech of a client; returns how many chunks were dropped to make room."""
        if not len(samples) or self.is_finished:
            return 0
        self._catch_up(now_s)
        slack = round(self.slack_s * SAMPLE_RATE)
        margin = slack // 3  # later blocks may be as late without missing their chunk
        ahead = self._ahead_of_clock(now_s) + len(samples)
        if ahead < (-slack if self._flows else margin):
            self._append(np.zeros(min(margin - ahead, self._whole), np.int16), None)
        elif (
            ahead > (margin if self._is_trimming else slack)
            and np.abs(samples.astype(np.int32)).max() < _QUIET
        ):
            cut = min(ahead, len(samples))
            self.num_trimmed += cut
            samples, index, ahead = samples[cut:], index + cut, ahead - cut
        if ahead <= margin:
            self._settled_s = min(self._settled_s, now_s)
        self._append(samples, index)
        num_dropped = 0
        while self._num > self._whole + self._max_chunks * self.chunk_samples:
            self._drop_chunk(now_s)
            num_dropped += 1
        return num_dropped

    def advance(self, now_s: float) -> bool:
        """Fill what is due with silence; returns whether a chunk can be taken now.

        A chunk that is complete is given at most one chunk before it is due.
        """
        self._catch_up(now_s)
        missing = self._whole - self._num
        if missing > 0 and now_s >= self._deadline_s:
            self._append(np.zeros(missing, np.int16), None)
            self._settled_s = min(self._settled_s, now_s)
            missing = 0
        return missing <= 0 and now_s >= self.due_s - self.chunk_s

    def _catch_up(self, now_s: float) -> None:
        """Everything stood still, here or at the client: the clock begins anew."""
        if self._num < self._whole and now_s - self.due_s > self.chunk_s:
            self.due_s = now_s

    def wait_s(self, now_s: float) -> float:
        """Seconds until :meth:`advance` may say something else, if nothing comes."""
        next_s = self._deadline_s if self._num < self._whole else self.due_s - self.chunk_s
        return max(0.0, next_s - now_s)

    @property
    def _deadline_s(self) -> float:
        """When silence takes over: what is about to come is waited for a little."""
        if self.is_finished:
            return self.due_s - self.chunk_s
        is_flowing = 0 < self._whole - self._num <= self.slack_s * SAMPLE_RATE
        return self.due_s + (self.slack_s if is_flowing else 0.0)

    def take(self) -> Piece:
        """The next chunk; :meth:`advance` has said that there is one."""
        window, origins = self._peek(self._whole)
        num_new = self._whole - self._ahead
        last_index, num_speech, position = None, 0, 0
        for count, index in origins:
            inside = min(count, self.chunk_samples - position)
            if index is not None and inside > 0:
                last_index, num_speech = index + inside - 1, position + inside
            position += count
        self._remove(0, self.chunk_samples)
        self._ahead = self.lookahead_samples
        self.due_s += self.chunk_s
        sound = window[: self.chunk_samples]
        return Piece(sound, window, num_new, last_index is None, last_index, num_speech)

    def interrupt(self, now_s: float) -> int:
        """Forget what waits; the next chunk is due now. Returns how many samples of speech it
        was.
        """
        forgotten = sum(len(block.samples) for block in self._blocks if block.index is not None)
        self._blocks.clear()
        self._num, self._flows = 0, False
        # The model has read these: their sound is not heard, and the lips come to rest.
        self._append(np.zeros(self._ahead, np.int16), None)
        self.due_s = now_s
        return forgotten

    def finish(self, now_s: float) -> None:
        """Nothing follows: what is left is due now."""
        self.is_finished = True
        self.due_s = min(self.due_s, now_s)

    @property
    def has_speech(self) -> bool:
        """Whether speech of the client waits to be heard."""
        return any(block.index is not None for block in self._blocks)

    def trim(self, seconds: float, now_s: float) -> None:
        """Let the clock go back, so that as much silence is left out at the next pause.

        Until that has happened, and the client has had time to see it, further calls do nothing.
        """
        if seconds > 0.0 and now_s > self._settled_s + 3 * self.chunk_s:
            self.due_s += min(seconds, self.chunk_s)
            self._settled_s = math.inf

    def note_wait(self, seconds: float, now_s: float) -> None:
        """A chunk waited for the model. What each of the last few did, it can as well wait for
        before it is taken.

        Sessions whose chunks fall due together part in this way: the one that always comes second
        moves behind the first one's chunk, and is nearer to its speech by as much.

        Args:
            seconds: from asking for the chunk to the start of its computation.
            now_s: on the session's clock.
        """
        self._waits.append(seconds)
        if len(self._waits) == self._waits.maxlen:
            self.trim(min(self._waits) - self.slack_s, now_s)

    def _drop_chunk(self, now_s: float) -> None:
        self._remove(self._ahead, self.chunk_samples)
        self.num_dropped += self.chunk_samples
        behind_s = -self._ahead_of_clock(now_s) / SAMPLE_RATE
        self.due_s += min(max(behind_s, 0.0), self.chunk_s)  # what is left is no pause

    def _ahead_of_clock(self, now_s: float) -> int:
        """Samples that are here beyond those that would be, had speech come in step with the
        clock.
        """
        return self._num - self._whole - round((now_s - self.due_s) * SAMPLE_RATE)

    @property
    def _is_trimming(self) -> bool:
        return self._settled_s == math.inf

    def _append(self, samples: Pcm, index: int | None) -> None:
        if len(samples):
            self._flows = index is not None
            self._blocks.append(_Block(samples, index))
            self._num += len(samples)

    def _peek(self, count: int) -> tuple[Pcm, list[tuple[int, int | None]]]:
        """The first samples, and where they come from: (how many, index of the first)."""
        pieces: list[Pcm] = []
        origins: list[tuple[int, int | None]] = []
        for block in self._blocks:
            if count <= 0:
                break
            piece = block.samples[:count]
            pieces.append(piece)
            origins.append((len(piece), block.index))
            count -= len(piece)
        return np.concatenate(pieces), origins

    def _remove(self, start: int, count: int) -> None:
        """Take samples out, from position ``start`` on."""
        kept: deque[_Block] = deque()
        position, end = 0, start + count
        for block in self._blocks:
            length = len(block.samples)
            before, after = max(0, start - position), max(0, position + length - end)
            if before >= length or after >= length:
                kept.append(block)
            else:
                if before:
                    kept.append(_Block(block.samples[:before], block.index))
                if after:
                    index = None if block.index is None else block.index + length - after
                    kept.append(_Block(block.samples[-after:], index))
            position += length
        self._blocks = kept
        self._num = sum(len(block.samples) for block in kept)
