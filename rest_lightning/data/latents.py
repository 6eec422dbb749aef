"""VAE latents of a data set on disk, computed once for the DiT stages.

Windows (N, C, f, h, w) and references (M, C, 1, h, w), as :mod:`rest_lightning.data.window_cache` tells.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from rest_lightning.data.clips import load_frames
from rest_lightning.data.layout import ManifestRow
from rest_lightning.data.window_cache import WindowCache
from rest_lightning.errors import UserError

Precision = Literal["bfloat16", "float32"]


class FrameEncoder(Protocol):
    """Any VAE: frames (B, 3, F, H, W) in [-1, 1] -> latents (B, C, f, h, w)."""

    def encode(self, frames: Tensor) -> Tensor: ...


class LatentsCache(WindowCache):
    """Latents of `encode_dataset`; `window` gives (C, f, h, w)."""

    content, network, prefix = "latents", "VAE", "latents"

    def reference(self, clip_id: str, number: int) -> Tensor:
        """Latents (C, 1, h, w), float32, of the clip's reference frame ``number``, encoded on its own."""
        entry = self._clips[clip_id]
        return self._row(entry["shard"], "references", entry["reference_row"] + number)

    def sample(self, clip_id: str, rng: np.random.Generator | None, reference: str) -> tuple[int, Tensor]:
        """Start frame and latents (C, f, h, w) of one window: a random one, or without ``rng`` the middle one.

        Args:
            clip_id: of the clip.
            rng: chooses the window, and a random reference.
            reference: ``first_frame`` leaves the window as it is. ``random_frame`` and ``clip_start`` put a latent of a
                single frame into slot 0: the causal encoder treats the first frame on its own, so that is the latent of
                the window with another reference.

        Raises:
            UserError: the cache holds no such single frames.
        """
        number = self.choose(clip_id, rng)
        latents = self.window(clip_id, number)
        if reference != "first_frame":
            frames: list[int] = self._clips[clip_id]["reference_frames"]
            if not frames or (reference == "clip_start" and frames[0] != 0):
                raise UserError(
                    f"{self.folder}: expected latents of reference frames for reference={reference}, got none: "
                    "make them with `rest encode --references_per_clip 4` (1 is the clip's first frame)"
                )
            choice = 0 if rng is None or reference == "clip_start" else int(rng.integers(len(frames)))
            latents = torch.cat([self.reference(clip_id, choice), latents[:, 1:]], dim=1)
        return self.starts(clip_id)[number], latents


def encode_dataset(
    vae: FrameEncoder,
    data_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    fingerprint: str,
    num_frames: int = 97,
    windows_per_clip: int = 1,
    references_per_clip: int = 0,
    splits: Sequence[str] = ("train", "val", "test"),
    dtype: Precision = "bfloat16",
    batch_size: int = 4,
    device: str | torch.device = "cpu",
    clips_per_shard: int = 64,
    max_corrupt: float = 0.02,
    overwrite: bool = False,
    progress: bool = True,
) -> LatentsCache:
    """Encode windows of every clip of a data set and write them to ``out_dir``; continues an interrupted run.

    Args:
        vae: gives latents (B, C, f, h, w) of frames (B, 3, F, H, W) in [-1, 1]; should be in evaluation mode.
        data_dir: prepared clips.
        out_dir: folder of the cache.
        fingerprint: text that identifies the VAE's weights.
        num_frames: window length, 8n + 1.
        windows_per_clip: windows evenly spread over each clip (fewer where a clip has fewer starts).
        references_per_clip: single frames, encoded on their own, for ``reference=random_frame`` and ``clip_start``: the
            clip's first, and others evenly spread behind it.
        splits: which clips.
        dtype: of the stored latents.
        batch_size: windows encoded at once.
        device: where the VAE is.
        clips_per_shard: clips per file.
        max_corrupt: unreadable clips that are left out: below 1 a fraction, else a number.
        overwrite: drop a cache that was made in another way.
        progress: show a progress bar.

    Raises:
        UserError: no data set, a cache of another VAE or other settings, or too many unreadable clips.
    """
    encode = _Encoder(vae, torch.device(device), getattr(torch, dtype), batch_size)

    def read_clip(row: ManifestRow, starts: list[int], frames: list[int]) -> tuple[list[Tensor], list[Tensor]]:
        (clip,) = load_frames(data_dir, row)
        windows = encode([clip[start : start + num_frames] for start in starts])
        return windows, encode([clip[frame : frame + 1] for frame in frames])

    return LatentsCache.encode(
        read_clip,
        data_dir,
        out_dir,
        fingerprint=fingerprint,
        num_frames=num_frames,
        windows_per_clip=windows_per_clip,
        references_per_clip=references_per_clip,
        splits=splits,
        dtype=dtype,
        clips_per_shard=clips_per_shard,
        max_corrupt=max_corrupt,
        overwrite=overwrite,
        progress=progress,
    )


class _Encoder:
    """Encodes uint8 pieces of one length in batches and gives them back one by one in the storage precision."""

    def __init__(self, vae: FrameEncoder, device: torch.device, dtype: torch.dtype, batch_size: int) -> None:
        self.vae, self.device, self.dtype, self.batch_size = vae, device, dtype, batch_size

    @torch.inference_mode()
    def __call__(self, pieces: Sequence[np.ndarray]) -> list[Tensor]:
        out: list[Tensor] = []
        for low in range(0, len(pieces), self.batch_size):
            batch = torch.from_numpy(np.stack(pieces[low : low + self.batch_size])).to(self.device)
            frames = batch.permute(0, 4, 1, 2, 3).to(torch.float32, memory_format=torch.contiguous_format)
            out += self.vae.encode(frames.mul_(1 / 127.5).sub_(1)).to(self.dtype).cpu().unbind(0)
        return out
