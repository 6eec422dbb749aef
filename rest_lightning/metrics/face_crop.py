"""Face crops for the published SyncNet, cut out of videos along a track as its authors' pipeline cuts them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional

from rest_lightning.errors import UserError
from rest_lightning.metrics.sums import Frames, check_clip
from rest_lightning.metrics.syncnet import FACE_PX

CROP_SCALE = 0.40  # the crop reaches this much of the face's half side beyond it
MIN_TRACK_FRAMES = 101  # the reference keeps tracks of more than 100 frames
_SMOOTHING_FRAMES = 13
_PADDING = 110  # grey level outside the image


def face_crops(frames: Frames, boxes: ArrayLike, min_track_frames: int = MIN_TRACK_FRAMES) -> Tensor:
    """Crops uint8 (n, 224, 224, 3) around a face that was found in every frame.

    Centre and size go through a median over 13 frames (zeros beyond the ends, as in the reference). The crop is a
    square of 1.4 box heights that reaches further down, to the chin.

    Args:
        frames: uint8 (n, H, W, 3).
        boxes: (n, 4), left, top, right and bottom of the detector's box in pixels.
        min_track_frames: a shorter track is no track.

    Raises:
        UserError: too short a track, boxes that do not fit the frames or are empty.
    """
    from scipy.signal import medfilt

    clip = check_clip(frames)
    box = np.asarray(boxes, dtype=np.float64)
    if box.shape != (len(clip), 4) or not np.isfinite(box).all():
        raise UserError(f"expected a box of 4 numbers for each of {len(clip)} frames, got {box.shape}: track the face")
    least = max(min_track_frames, _SMOOTHING_FRAMES)
    if len(clip) < least:
        raise UserError(f"expected a face track of at least {least} frames, got {len(clip)}: give a longer clip")
    sides = np.maximum(box[:, 3] - box[:, 1], box[:, 2] - box[:, 0]) / 2
    if sides.min() <= 0:
        raise UserError(f"expected boxes with a size, got an empty one in frame {int(sides.argmin())}: track the face")
    centres_x, centres_y = (box[:, 0] + box[:, 2]) / 2, (box[:, 1] + box[:, 3]) / 2
    smooth = [medfilt(values, _SMOOTHING_FRAMES) for values in (sides, centres_x, centres_y)]
    return torch.stack([_crop(frame, *(float(x[i]) for x in smooth)) for i, frame in enumerate(clip)])


def _crop(frame: Tensor, side: float, x: float, y: float) -> Tensor:
    margin = int(side * (1 + 2 * CROP_SCALE))
    padded = functional.pad(frame.permute(2, 0, 1), (margin,) * 4, value=_PADDING)
    x, y = x + margin, y + margin
    rows = slice(int(y - side), int(y + side * (1 + 2 * CROP_SCALE)))
    columns = slice(int(x - side * (1 + CROP_SCALE)), int(x + side * (1 + CROP_SCALE)))
    face = padded[:, rows, columns].float()
    resized = functional.interpolate(face[None], (FACE_PX, FACE_PX), mode="bilinear", align_corners=False)[0]
    return resized.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
