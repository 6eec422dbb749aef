"""Sync-C, Sync-D and the offset between lips and speech, as joonson/syncnet_python computes
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional

from rest_lightning.constants import SAMPLES_PER_FRAME
from rest_lightning.errors import UserError
from rest_lightning.metrics.sums import Frames, MeanMetric, check_clip
from rest_lightning.metrics.syncnet import WINDOW_FRAMES

MAX_OFFSET_FRAMES = 15
KEYS = ("sync_c", "sync_d", "offset_frames", "offset_abs_frames")


@dataclass(frozen=True)
class Sync:
    """How well one clip's lips fit its speech.

    Attributes:
        confidence: Sync-C, median over offsets of the mean distance minus its minimum: higher is
            better.
        distance: Sync-D, the minimum: lower is better.
        offset_frames: where it is; positive when the lips come late.
        by_offset: the mean distance of every offset, from +15 down to -15.
    """

    confidence: float
    distance: float
    offset_frames: int
    by_offset: Tensor


def sync_of_embeddings(
    faces: Tensor, speech: Tensor, max_offset_frames: int = MAX_OFFSET_FRAMES
) -> Sync:
    """Compare every window of frames with the speech of up to 15 frames earlier and later.

    Speech before the first and after the last window is a zero embedding, as in the reference
    implementation: it keeps far offsets of short clips from winning.

    Args:
        faces, speech: embeddings (n, D) of the same n windows.
        max_offset_frames: the search goes this far both ways.

    Raises:
        UserError: no windows, or embeddings that are not numbers.
    """
    if not len(faces) or faces.shape != speech.shape:
        shapes = f"{tuple(faces.shape)} and {tuple(speech.shape)}"
        raise UserError(
            f"expected embeddings of the same windows, at least one, got {shapes}: "
            "give a longer clip"
        )
    if not (faces.isfinite().all() and speech.isfinite().all()):
        raise UserError(
            "expected numbers as embeddings, got NaN or infinity: look at the clip "
            "and "
            "at the weights"
        )
    reach = max_offset_frames
    padded = functional.pad(speech, (0, 0, reach, reach))
    means = [
        functional.pairwise_distance(faces, padded[shift : shift + len(faces)]).mean()
        for shift in range(2 * reach + 1)
    ]
    by_offset = torch.stack(means)
    smallest = int(by_offset.argmin())
    confidence = by_offset.median() - by_offset[smallest]
    return Sync(float(confidence), float(by_offset[smallest]), reach - smallest, by_offset)


def sync_of_clip(frames: Frames, audio: ArrayLike, extractor: Any) -> Sync:
    """Sync of one clip through an extractor of
    :func:`rest_lightning.metrics.extractors.load_extractor`.

    Args:
        frames: face crops, uint8 (n, H, W, 3) at 25 fps.
        audio: (samples,) 16 kHz mono in [-1, 1]; where the lengths differ, the shorter one counts.

    Raises:
        UserError: too short for one window, no numbers.
    """
    clip = check_clip(frames)
    samples = torch.as_tensor(audio)
    if samples.ndim != 1:
        raise UserError(
            f"expected mono audio (samples,), got shape {tuple(samples.shape)}: mix "
            "the channels down"
        )
    num_frames = min(len(clip), len(samples) // SAMPLES_PER_FRAME)
    num_windows = num_frames - WINDOW_FRAMES  # the reference leaves the last possible window out
    if num_windows < 1:
        raise UserError(
            f"expected at least {WINDOW_FRAMES + 1} frames with audio, got {len(clip)} frames and "
            f"{len(samples) / 16000:.2f} s: give a longer clip"
        )
    faces, speech = extractor(clip[:num_frames], samples, num_windows)
    return sync_of_embeddings(faces, speech)


class SyncScore(MeanMetric):
    """Means over clips of Sync-C, Sync-D, the offset and its absolute value.

    Args:
        extractor: of ``load_extractor("sync")``; None takes the embedded one.
    """

    def __init__(self, extractor: Any = None, **kwargs: Any) -> None:
        from rest_lightning.metrics.extractors import load_extractor

        super().__init__(KEYS, extractor or load_extractor("sync"), **kwargs)

    def update(self, frames: Frames, audio: ArrayLike) -> None:  # type: ignore[override]
        """One clip, see :func:`sync_of_clip`."""
        self.extractor.to(self.device)
        sync = sync_of_clip(frames, audio, self.extractor)
        offset = sync.offset_frames
        self.add(
            dict(
                zip(
                    KEYS,
                    (sync.confidence, sync.distance, float(offset), float(abs(offset))),
                    strict=True,
                )
            )
        )
