"""How far the sound is off the lips of a clip, through SyncNet's published weights or the embedded
network.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rest_lightning.errors import UserError
from rest_lightning.media.faces import Picture

MAX_FRAMES = 250  # ten seconds say it, and more would not fit into a worker's memory


def load_sync(weights: str) -> Any:
    """The extractor, once per process. Raises UserError where there are no such weights."""
    return _load(weights)


def sync_scores(
    frames: list[Picture],
    boxes: NDArray[np.float64] | None,
    samples: NDArray[np.float32],
    weights: str,
) -> dict[str, float]:
    """``sync``: frames between sound and lips, without sign; ``sync_offset``, positive when the
    lips come late; ``sync_confidence``: Sync-C. Empty for clips that are too short.

    Args:
        frames: uint8 RGB crops, the first of a clip.
        boxes: left, top, right, bottom of the detector's boxes in them (n, 4); None: the crops are
            faces.
        samples: 16 kHz, of the same frames.
        weights: of `PrepareOptions.sync_weights`.
    """
    import torch

    from rest_lightning.metrics.sync import sync_of_clip
    from rest_lightning.metrics.syncnet import face_crops

    extractor = load_sync(weights)
    clip = torch.from_numpy(np.stack(frames))
    # looks for the mouth at its place in a prepared clip
    embedded = extractor.name.startswith("embedded")
    try:
        crops = clip if boxes is None or embedded else face_crops(clip, boxes, min_track_frames=1)
        sync = sync_of_clip(crops, samples, extractor)
    except UserError:
        return {}
    return {
        "sync": float(abs(sync.offset_frames)),
        "sync_offset": float(sync.offset_frames),
        "sync_confidence": sync.confidence,
    }


@lru_cache(maxsize=1)
def _load(weights: str) -> Any:
    import torch

    from rest_lightning.metrics.extractors import load_extractor

    torch.set_num_threads(1)  # the workers share the cores
    return load_extractor("sync", weights)
