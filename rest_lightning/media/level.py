"""How loud speech is: a meter for what goes into a model, notes where it is odd, and what cannot
go in.

Quiet speech. The encoder's features have a fixed floor: from about 35 dB below ordinary speech on
nothing rises above it, and lips stay shut. A file is therefore raised by one constant gain that is
known before its first sample is read. A stream is not raised but told: at its beginning nothing
tells quiet speech from the hiss of a room, and a gain that follows the sound would move lips in
pauses. So the frames of a stream never depend on a gain, and those of a file not on how it was cut.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rest_lightning.constants import FPS, SAMPLE_RATE
from rest_lightning.errors import UserError

MAX_PEAK = 16.0
"""Samples beyond this (24 dB over full scale) are integers by mistake, not loud speech."""

MAX_GAIN_DB = 40.0
_QUIET_DB = -45.0  # of full scale: lips follow speech above it
_SILENT_DB = -85.0  # the last bit of 16-bit samples
_TARGET_DB = -24.0  # of ordinary recorded speech
_SPEECH_RANGE_DB = 10.0  # speech swings by more than this between sounds and pauses, hiss does not
_LOUD_PERCENTILE, _PAUSE_PERCENTILE = 95.0, 10.0
_FLOOR_DB, _TOP_DB = -120, 30
_CLIPPED_SHARE = 0.01
_BATCH_WINDOWS = 100
_CLIPPED_FROM = 0.999


def refuse_bytes(samples: Any) -> None:
    """Refuses speech as bytes, which many speech engines give: they do not tell their type.

    Raises:
        UserError: bytes.
    """
    if isinstance(samples, bytes | bytearray | memoryview):
        raise UserError(
            "expected speech as an array, got bytes: np.frombuffer(samples, np.int16) reads 16-bit "
            "samples"
        )


class LevelMeter:
    """Peak, loudness and clipping of mono sound that comes in pieces; bounded memory.

    The result does not depend on how the sound was cut.

    Attributes:
        num_samples: samples so far.

    Args:
        sample_rate: of the sound, in Hz.
    """

    def __init__(self, sample_rate: int = SAMPLE_RATE) -> None:
        self.num_samples = 0
        self._peak, self._num_clipped, self._num_looked = 0.0, 0, 0
        self._window = max(1, sample_rate // FPS)
        self._waiting: list[NDArray[np.float32]] = []
        self._num_waiting = 0
        self._counts = np.zeros(_TOP_DB - _FLOOR_DB + 1, np.int64)

    def add(self, samples: NDArray[np.float32]) -> None:
        """Take in samples (n,), float32."""
        self.num_samples += len(samples)
        self._waiting.append(samples)
        self._num_waiting += len(samples)
        if self._num_waiting > _BATCH_WINDOWS * self._window:  # one look at many is cheaper
            self._look()

    def _look(self) -> None:
        """Measure what waits, but for the beginning of a window."""
        if not self._num_waiting:
            return
        waiting = np.concatenate(self._waiting)
        new = waiting[self._num_looked :]
        if len(new):
            size = np.abs(new)
            self._peak = max(self._peak, float(size.max()))
            self._num_clipped += int((size >= _CLIPPED_FROM).sum())
        whole = len(waiting) // self._window * self._window
        rest = waiting[whole:].copy()
        self._waiting, self._num_waiting, self._num_looked = [rest], len(rest), len(rest)
        if whole:
            self._count(waiting[:whole].reshape(-1, self._window))

    @property
    def peak(self) -> float:
        """Largest magnitude so far."""
        self._look()
        return self._peak

    @property
    def num_clipped(self) -> int:
        """Samples at full scale or beyond, so far."""
        self._look()
        return self._num_clipped

    def _count(self, windows: NDArray[np.float32]) -> None:
        power = np.square(windows, dtype=np.float64).mean(axis=1)
        decibels = 10 * np.log10(power + 1e-12)
        places = np.clip(np.round(decibels) - _FLOOR_DB, 0, len(self._counts) - 1)
        self._counts += np.bincount(places.astype(np.int64), minlength=len(self._counts))

    def percentile_db(self, percentile: float) -> float:
        """RMS of 40 ms stretches in dB of full scale, to 1 dB: ``percentile`` of them are not
        louder. -120 before the first 40 ms.
        """
        self._look()
        total = int(self._counts.sum())
        if not total:
            return float(_FLOOR_DB)
        place = np.searchsorted(np.cumsum(self._counts), percentile / 100 * total)
        return float(_FLOOR_DB + min(int(place), len(self._counts) - 1))

    @property
    def loud_db(self) -> float:
        """RMS of the loud stretches (95th percentile) in dB of full scale."""
        return self.percentile_db(_LOUD_PERCENTILE)

    @property
    def is_quiet_speech(self) -> bool:
        """Whether there is sound that swings as speech does, too quiet for lips to follow."""
        swing = self.loud_db - self.percentile_db(_PAUSE_PERCENTILE)
        return _SILENT_DB < self.loud_db < _QUIET_DB and swing > _SPEECH_RANGE_DB

    @property
    def gain_db(self) -> float:
        """The gain that makes quiet speech ordinary, 0 to 40 dB; 0 for all other sound."""
        if not self.is_quiet_speech:
            return 0.0
        headroom_db = -1.0 - 20 * np.log10(max(self.peak, 1e-9))
        return float(max(0.0, min(_TARGET_DB - self.loud_db, headroom_db, MAX_GAIN_DB)))

    def notes(self) -> list[str]:
        """What is odd, one line each; empty for ordinary speech."""
        if not self.num_samples:
            return []
        found = []
        if self.loud_db <= _SILENT_DB:
            found.append("the sound is silent: lips stay closed; check the source")
        elif self.loud_db < _QUIET_DB:
            found.append(
                f"the sound is very quiet ({self.loud_db:.0f} dB of full scale where it is "
                f"loud, lips follow from {_QUIET_DB:.0f} dB on): raise the level of the source"
            )
        share = self.num_clipped / self.num_samples
        if share > _CLIPPED_SHARE:
            found.append(
                f"{share:.0%} of the samples are at full scale: the sound is clipped; lower the "
                "level of the source"
            )
        return found
