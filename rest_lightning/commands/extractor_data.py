"""Synthetic talkers as the embedded extractors' training reads them: once, into a few tensors."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rest_lightning.data.layout import ManifestRow, Sidecar, clip_path, read_sidecar
from rest_lightning.errors import UserError
from rest_lightning.metrics.extractors import FACTORS, IMAGE_PX, VIDEO_PX
from rest_lightning.metrics.mfcc import mfcc, to_int16
from rest_lightning.metrics.mouth import crop_mouth

SYNC_MARGIN_PX = 3
VIDEO_FRAMES = 48  # of a clip: windows of 16 start anywhere in them
_SOURCE = re.compile(r"synthetic talkers v\d+, seed (\d+), index (\d+)$")


@dataclass(frozen=True)
class Clips:
    """N clips of one split.

    Attributes:
        images: uint8 (N, K, 128, 128, 3), K frames of every clip.
        image_factors: (N, K, 13), the renderer's curves at these frames.
        videos: uint8 (N, 48, 64, 64, 3), one piece of every clip.
        video_factors: (N, 48, 13).
        mouths: grey uint8 (N, F, 70, 78), the mouth's crop with a margin.
        cepstra: (N, 4F - 1, 13), MFCC.
    """

    images: Tensor
    image_factors: Tensor
    videos: Tensor
    video_factors: Tensor
    mouths: Tensor
    cepstra: Tensor

    def __len__(self) -> int:
        return len(self.images)


def factors_of(sidecar: Sidecar) -> np.ndarray:
    """The renderer's curves (F, 13) of a clip, made again from its seed.

    Raises:
        UserError: the clip is not of this generator, or its curves come out differently.
    """
    from rest_lightning.data.synthetic.script import sample_script
    from rest_lightning.data.synthetic.synthesize import face_track

    match = _SOURCE.search(sidecar.source)
    if match is None or sidecar.mouth_opening is None:
        raise UserError(
            f"expected a synthetic talker of `rest synthesize`, got {sidecar.clip_id} from {sidecar.source!r}: "
            "the embedded extractors learn from the renderer's curves"
        )
    words, motion = (np.random.default_rng([int(match[1]), int(match[2]), part]) for part in range(2))
    script = sample_script(words, sidecar.num_frames, held_out=sidecar.split != "train")
    track = face_track(motion, script, sidecar.num_frames)
    if np.abs(track.mouth_opening - np.asarray(sidecar.mouth_opening)).max() > 1e-3:
        raise UserError(f"expected {sidecar.clip_id} as this version renders it, got other curves: synthesize it again")
    return np.stack([getattr(track, name) for name in FACTORS], axis=1).astype(np.float32)


def read_clips(
    data: Path, rows: list[ManifestRow], frames_per_clip: int, rng: np.random.Generator, seconds: float = 1e9
) -> Clips:
    """Read clips, in random order, for at most ``seconds``; at least two."""
    from rich.progress import track

    from rest_lightning.media.video import read_clip_audio, read_frames

    parts: list[tuple[Tensor, ...]] = []
    started_s = time.monotonic()
    for i in track(rng.permutation(len(rows)).tolist(), description="reading"):
        if len(parts) >= 2 and time.monotonic() - started_s > seconds:
            break
        row = rows[i]
        if row.num_frames < VIDEO_FRAMES:
            raise UserError(f"expected clips of at least {VIDEO_FRAMES} frames, got {row.num_frames} in {row.clip_id}")
        path = clip_path(data, row.clip_id)
        frames, factors = read_frames(path), factors_of(read_sidecar(data, row.clip_id))
        cepstra = mfcc(to_int16(read_clip_audio(path, row.num_frames)))
        parts.append(_parts(torch.from_numpy(frames), torch.from_numpy(factors), cepstra, frames_per_clip, rng))
    if len({part[4].shape for part in parts}) != 1:
        raise UserError("expected clips of one length, got several: synthesize them with one --num-frames")
    return Clips(*(torch.stack(each) for each in zip(*parts, strict=True)))


def _parts(
    frames: Tensor, factors: Tensor, cepstra: np.ndarray, frames_per_clip: int, rng: np.random.Generator
) -> tuple[Tensor, ...]:
    chosen = torch.from_numpy(np.sort(rng.permutation(len(frames))[:frames_per_clip]))
    start = int(rng.integers(0, len(frames) - VIDEO_FRAMES + 1))
    window = slice(start, start + VIDEO_FRAMES)
    small = _resized(frames[window], VIDEO_PX)
    grey = crop_mouth(frames, SYNC_MARGIN_PX).mean(dim=1).add(1.0).mul(127.5)
    mouths = grey.round().clamp(0, 255).to(torch.uint8)
    speech = torch.from_numpy(cepstra.astype(np.float32))
    return _resized(frames[chosen], IMAGE_PX), factors[chosen], small, factors[window], mouths, speech


def _resized(frames: Tensor, side: int) -> Tensor:
    if frames.shape[1:3] == (side, side):
        return frames
    x = frames.permute(0, 3, 1, 2).float()
    x = torch.nn.functional.interpolate(x, (side, side), mode="bilinear", antialias=True, align_corners=False)
    return x.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
