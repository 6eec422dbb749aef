"""Sound of a session at another rate, block by block."""

from __future__ import annotations

import av
import numpy as np
from av.audio.frame import AudioFrame

from rest_lightning.serve.protocol import Pcm


class MonoResampler:
    """Sound of any rate and number of channels as mono of ``to_hz``; the rate that comes in may
    change.
    """

    def __init__(self, to_hz: int) -> None:
        self._to_hz, self._from_hz = to_hz, 0
        self._resampler: av.AudioResampler | None = None

    def push(self, samples: Pcm, from_hz: int) -> Pcm:
        """What is ready once ``samples`` (n,) or (n, channels) have come: some ms may wait for the
        next ones.
        """
        if samples.ndim > 1:
            samples = samples.mean(axis=1).astype(np.int16)
        if not len(samples):
            return samples
        before = self.flush() if from_hz != self._from_hz else samples[:0]
        if self._resampler is None:
            self._from_hz = from_hz
            self._resampler = av.AudioResampler("s16", "mono", self._to_hz)
        frame = AudioFrame.from_ndarray(
            np.ascontiguousarray(samples[None]), format="s16", layout="mono"
        )
        frame.sample_rate = from_hz
        frame.pts = None
        return np.concatenate([before, *_pieces(self._resampler.resample(frame))])

    def flush(self) -> Pcm:
        """What still waits; what is pushed then begins anew."""
        pieces = [] if self._resampler is None else _pieces(self._resampler.resample(None))
        self._resampler = None
        return np.concatenate([np.zeros(0, np.int16), *pieces])


def _pieces(frames: list[AudioFrame]) -> list[Pcm]:
    return [frame.to_ndarray()[0] for frame in frames]
