"""Speech that waits: pieces of 40 ms, each with its sound and with what the model reads."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

import av
import numpy as np
from av.audio.frame import AudioFrame
from numpy.typing import NDArray

from rest_lightning.constants import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME
from rest_lightning.errors import UserError
from rest_lightning.media.level import MAX_PEAK, refuse_bytes

MIN_RATE_HZ, MAX_RATE_HZ = 4000, 192_000
MAX_CHANNELS = 8
_PAUSE_LEVEL = 0.01  # -40 dBFS

Sound = NDArray[Any]
Samples = NDArray[np.float32]

_SILENCE: Samples = np.zeros(SAMPLES_PER_FRAME, np.float32)
_SILENCE.flags.writeable = False


@dataclass(frozen=True, slots=True)
class Slot:
    """40 ms of a stream.

    Attributes:
        samples: what the model reads, float32 (640,) at 16 kHz.
        sound: what is heard, as it was pushed, (n,) or (n, channels); None is silence.
        sample_rate: of the sound, in Hz.
        utterance: number of the utterance; None for silence between two.
        offset: samples of the utterance's sound before this piece.
        is_first, is_last: whether the utterance begins or ends here.
    """

    samples: Samples = field(default_factory=lambda: _SILENCE)
    sound: Sound | None = None
    sample_rate: int = SAMPLE_RATE
    utterance: int | None = None
    offset: int = 0
    is_first: bool = False
    is_last: bool = False

    @property
    def is_pause(self) -> bool:
        """Whether nothing is said here, so that it can be left out within an utterance."""
        quiet = float(np.abs(self.samples).max()) < _PAUSE_LEVEL
        return quiet and not self.is_first and not self.is_last


IDLE = Slot()


def check_sound(samples: Any, sample_rate: int) -> Sound:
    """Sound as it is kept: int16, or float32 in about [-1, 1]; (n,) or (n, channels).

    Raises:
        UserError: another type or shape, samples that are not finite or beyond 16, or a rate that
            speech does not have.
    """
    refuse_bytes(samples)
    block = np.asarray(samples)
    if block.ndim not in (1, 2) or (block.ndim == 2 and not 1 <= block.shape[1] <= MAX_CHANNELS):
        raise UserError(
            f"expected speech as (samples,) or (samples, channels) with 1 to {MAX_CHANNELS} "
            f"channels, "
            f"got shape {block.shape}: transpose it, or average the channels"
        )
    if block.dtype != np.int16 and not np.issubdtype(block.dtype, np.floating):
        raise UserError(
            f"expected speech as int16 or float, got {block.dtype}: convert it to float32 in [-1, "
            f"1]"
        )
    if isinstance(sample_rate, bool) or not isinstance(sample_rate, int | np.integer):
        raise UserError(f"expected a sample rate in Hz as an integer, got {sample_rate!r}")
    if not MIN_RATE_HZ <= sample_rate <= MAX_RATE_HZ:
        raise UserError(
            f"expected a sample rate from {MIN_RATE_HZ} to {MAX_RATE_HZ} Hz, got {sample_rate}: "
            "give the rate of the samples in Hz"
        )
    if block.dtype == np.int16:
        return block
    block = block.astype(np.float32, copy=False)
    if not np.isfinite(block).all():
        raise UserError(
            "expected finite samples of speech, got NaN or infinity: check the speech synthesis; "
            "nothing of this block is kept"
        )
    if block.size and (peak := float(np.abs(block).max())) > MAX_PEAK:
        raise UserError(
            f"expected samples in [-1, 1], got one of {peak:g}: divide by the largest integer; "
            "nothing of this block is kept"
        )
    return block


class SpeechQueue:
    """Utterances in their order, cut into slots as soon as 40 ms are there.

    The sound of a slot is what was pushed, untouched, at its own rate. For the model it is averaged
    over the channels and resampled to 16 kHz (FFmpeg's resampler, without delay); at 16 kHz it is
    read as it is. The last slot of an utterance is filled up with silence.

    Attributes:
        num_pushed: utterances begun so far.
    """

    def __init__(self) -> None:
        self.num_pushed = 0
        self._slots: deque[Slot] = deque()
        self._open: _Utterance | None = None

    def push(self, sound: Sound, sample_rate: int) -> int:
        """Add to the open utterance, or begin one; returns its number.

        Raises:
            UserError: another rate, type or number of channels than the utterance began with.
        """
        if self._open is None:
            self._open = _Utterance(self.num_pushed, sample_rate, sound[:0].copy())
            self.num_pushed += 1
        self._slots.extend(self._open.push(sound, sample_rate))
        return self._open.number

    def finish(self) -> int | None:
        """End the open utterance; returns its number, None when there is none."""
        if self._open is None:
            return None
        utterance, self._open = self._open, None
        rest = utterance.finish()
        if rest:
            self._slots.extend(rest[:-1])
            self._slots.append(replace(rest[-1], is_last=True))
        elif self._slots:
            self._slots[-1] = replace(self._slots[-1], is_last=True)
        else:  # the last piece has been taken: the end is told with the silence behind it
            self._slots.append(replace(utterance.silence(), is_last=True))
        return utterance.number

    def clear(self) -> float:
        """Forget everything; returns how many seconds of speech it was."""
        dropped_s = self.waiting_s
        self._slots.clear()
        self._open = None
        return dropped_s

    def take(self) -> Slot:
        """The next 40 ms."""
        return self._slots.popleft()

    def leave_out_pauses(self, most: int) -> int:
        """Forget the oldest slots in which nobody speaks; returns how many, at most ``most``."""
        kept: deque[Slot] = deque()
        num_left_out = 0
        for slot in self._slots:
            if num_left_out < most and slot.is_pause:
                num_left_out += 1
            else:
                kept.append(slot)
        self._slots = kept
        return num_left_out

    def drop(self, most: int) -> int:
        """Forget the oldest slots, but not the end of an utterance; returns how many."""
        num_dropped = 0
        begins = False
        while num_dropped < most and self._slots and not self._slots[0].is_last:
            begins |= self._slots.popleft().is_first
            num_dropped += 1
        if begins and self._slots:
            self._slots[0] = replace(self._slots[0], is_first=True)
        return num_dropped

    @property
    def has_speech(self) -> bool:
        """Whether any speech waits, less than 40 ms included."""
        return bool(self._slots) or (self._open is not None and self._open.num_pending > 0)

    @property
    def num_slots(self) -> int:
        """Slots that can be taken."""
        return len(self._slots)

    @property
    def waiting_s(self) -> float:
        """Seconds of speech that wait."""
        pending = self._open.num_pending / self._open.sample_rate if self._open is not None else 0.0
        return len(self._slots) / FPS + pending

    @property
    def is_whole(self) -> bool:
        """Whether the utterance of the next slot has ended, so that all its slots are here."""
        if self._open is None:
            return True
        return bool(self._slots) and self._slots[0].utterance != self._open.number


class _Utterance:
    """Cuts one utterance into slots."""

    def __init__(self, number: int, sample_rate: int, empty: Sound) -> None:
        self.number, self.sample_rate = number, int(sample_rate)
        self._sound = empty
        self._samples = np.zeros(0, np.float32)
        self._num_slots = 0
        self._num_cut = 0  # samples of sound that have left
        self._resampler: av.AudioResampler | None = None
        if self.sample_rate != SAMPLE_RATE:
            self._resampler = av.AudioResampler("fltp", "mono", SAMPLE_RATE)

    @property
    def num_pending(self) -> int:
        """Samples of sound that are no slot yet."""
        return len(self._sound)

    def push(self, sound: Sound, sample_rate: int) -> list[Slot]:
        old = self._sound
        if (
            sample_rate != self.sample_rate
            or sound.dtype != old.dtype
            or sound.shape[1:] != old.shape[1:]
        ):
            raise UserError(
                f"expected speech at {self.sample_rate} Hz, {_kind(old)}, to the end of the "
                f"utterance, "
                f"got {sample_rate} Hz, {_kind(sound)}: call flush() before speech of another kind"
            )
        self._sound = np.concatenate([old, sound])
        self._samples = np.concatenate([self._samples, *self._resample(_mono(sound))])
        return self._cut()

    def finish(self) -> list[Slot]:
        if self._resampler is not None:
            rest = [piece.to_ndarray()[0] for piece in self._resampler.resample(None)]
            self._samples = np.concatenate([self._samples, *rest])
        slots = self._cut()
        if len(self._sound) or not self._num_slots:
            self._sound = np.concatenate(
                [self._sound, self._zeros(self._next_size - len(self._sound))]
            )
            self._samples = np.pad(
                self._samples, (0, max(0, SAMPLES_PER_FRAME - len(self._samples)))
            )
            slots += self._cut()
        return slots

    def silence(self) -> Slot:
        """40 ms of silence, as a slot of this utterance."""
        sound = self._zeros(self._next_size)
        return Slot(_SILENCE, sound, self.sample_rate, self.number, self._num_cut)

    @property
    def _next_size(self) -> int:
        """Samples of sound in the next slot; a rate that 25 does not divide makes some longer by
        one.
        """
        return (self._num_slots + 1) * self.sample_rate // FPS - self._num_cut

    def _zeros(self, size: int) -> Sound:
        return np.zeros((size, *self._sound.shape[1:]), self._sound.dtype)

    def _cut(self) -> list[Slot]:
        slots = []
        while len(self._samples) >= SAMPLES_PER_FRAME and len(self._sound) >= self._next_size:
            size = self._next_size
            slots.append(
                Slot(
                    # resampling may overshoot what `check_sound` let in, and the model refuses it
                    self._samples[:SAMPLES_PER_FRAME].clip(-MAX_PEAK, MAX_PEAK),
                    self._sound[:size],
                    self.sample_rate,
                    self.number,
                    self._num_cut,
                    is_first=self._num_slots == 0,
                )
            )
            self._samples, self._sound = self._samples[SAMPLES_PER_FRAME:], self._sound[size:]
            self._num_slots += 1
            self._num_cut += size
        return slots

    def _resample(self, mono: Samples) -> list[Samples]:
        if self._resampler is None or not len(mono):
            return [mono]
        frame = AudioFrame.from_ndarray(
            np.ascontiguousarray(mono[None]), format="fltp", layout="mono"
        )
        frame.sample_rate = self.sample_rate
        frame.pts = None
        return [piece.to_ndarray()[0] for piece in self._resampler.resample(frame)]


def _mono(sound: Sound) -> Samples:
    samples = sound.astype(np.float32) / 32768.0 if sound.dtype == np.int16 else sound
    return samples if samples.ndim == 1 else samples.mean(axis=1, dtype=np.float32)


def _kind(sound: Sound) -> str:
    channels = 1 if sound.ndim == 1 else sound.shape[1]
    return f"{channels} channel{'s' if channels > 1 else ''}, {sound.dtype}"
