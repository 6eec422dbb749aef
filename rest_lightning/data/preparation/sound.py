"""The sound of a video as 16 kHz mono on the clock of its frames, in a file: two hours are 230 MB
and not in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rest_lightning.constants import SAMPLES_PER_FRAME
from rest_lightning.errors import UserError
from rest_lightning.media.audio import sound_on_clock, survey
from rest_lightning.media.container import Losses

_SILENCE = 1e-5  # of full scale: -100 dB


def decode_sound(
    path: Path, target: Path, num_samples: int, origins_s: Sequence[Fraction]
) -> str | None:
    """Write the sound of a video as raw int16 samples.

    Every block is put where its time stamp says: sound that begins late or stops between is silence
    there, and what is heard before the first frame is left out. The track marked as default is
    taken, else the first; channels are mixed down as by
    :func:`rest_lightning.media.audio.open_speech`.

    Args:
        path: the video.
        target: gets exactly ``num_samples`` samples.
        num_samples: at 16 kHz.
        origins_s: time stamp of the first frame; of each part where they start again.

    Returns:
        What was wrong, in one line; None if nothing was.

    Raises:
        OSError: the target cannot be written.
    """
    losses, num_written = Losses(), 0
    with open(target, "wb") as file:
        file.truncate(2 * num_samples)
        try:
            mix = survey(path).mix
            for position, block in sound_on_clock(path, origins_s, mix, losses):
                low, high = max(position, 0), min(position + len(block), num_samples)
                if low < high:
                    part = block[low - position : high - position]
                    file.seek(2 * low)
                    file.write(_as_int16(part).tobytes())
                    num_written += high - low
        except UserError as error:
            return str(error).replace(str(path), path.name)
    if losses.seconds > 0.1:
        return (
            f"expected sound that can be decoded, got '{losses.error}' for {losses.seconds:.2f} s "
            f"from {losses.first_s or 0:.2f} s on"
        )
    return None if num_written else "expected sound beside the frames, got none"


def _as_int16(samples: NDArray[np.float32]) -> NDArray[np.int16]:
    return np.clip(np.round(samples * 32768.0), -32768, 32767).astype("<i2")


def read_sound(source: Path, start_frame: int, num_frames: int) -> NDArray[np.float32]:
    """Samples (640 * num_frames,) in [-1, 1] of frames from ``start_frame`` on, of `decode_sound`'s
    file.
    """
    count = num_frames * SAMPLES_PER_FRAME
    raw = np.fromfile(source, np.int16, count, offset=2 * start_frame * SAMPLES_PER_FRAME)
    samples = np.zeros(count, np.float32)
    samples[: len(raw)] = raw.astype(np.float32) / 32768.0
    return samples


def silent_share(samples: NDArray[np.float32], silence_db: float) -> float:
    """Share of 40 ms stretches whose RMS lies below ``silence_db`` dB of full scale, of samples
    (640 n,).
    """
    power = np.square(samples.reshape(-1, SAMPLES_PER_FRAME), dtype=np.float64).mean(axis=1)
    return float(np.mean(10 * np.log10(power + _SILENCE**2) < silence_db))
