"""Speech features of a data set on disk, computed once for the stages after SpeechAE, or for SpeechAE itself.

Kept in float32 and without the repetitions of overlapping windows (`SpeechEncoder.pack`), as (n, D_A) per window.
:mod:`rest_lightning.data.window_cache` tells how they lie there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from rest_lightning.data.clips import cut_audio, load_tracks
from rest_lightning.data.layout import ManifestRow
from rest_lightning.data.window_cache import WindowCache
from rest_lightning.errors import UserError
from rest_lightning.models.speech import SpeechEncoder


class SpeechCache(WindowCache):
    """Speech features of `encode_speech`; `window` gives the packed steps (n, D_A)."""

    content, network, prefix = "speech features", "speech encoder", "speech"

    def at(self, clip_id: str, start: int) -> Tensor:
        """Packed steps (n, D_A), float32, of the window that begins with frame ``start`` of the clip."""
        return self.window(clip_id, self.starts(clip_id).index(start))

    def check_windows(self, latents: WindowCache, rows: Sequence[ManifestRow]) -> None:
        """UserError unless every window of ``latents`` has its speech features."""
        for row in rows:
            missing = set(latents.starts(row.clip_id)) - set(self.starts(row.clip_id))
            if missing:
                raise UserError(
                    f"{self.folder}: expected speech features of the windows of {latents.folder}, got none of frame "
                    f"{min(missing)} of clip {row.clip_id}: make both with the same --windows-per-clip"
                )


def encode_speech(
    encoder: SpeechEncoder,
    data_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    fingerprint: str,
    num_frames: int = 97,
    windows_per_clip: int = 1,
    splits: Sequence[str] = ("train", "val", "test"),
    device: str | torch.device = "cpu",
    clips_per_shard: int = 64,
    max_corrupt: float = 0.02,
    overwrite: bool = False,
    progress: bool = True,
) -> SpeechCache:
    """Encode the speech of windows of every clip and write it to ``out_dir``; continues an interrupted run.

    Args:
        encoder: the frozen speech encoder of the stages to come.
        data_dir: prepared clips; their speech as recorded, without augmentation.
        out_dir: folder of the cache.
        fingerprint: text that identifies the encoder's weights and settings.
        num_frames: window length, 8n + 1.
        windows_per_clip: windows evenly spread over each clip (fewer where a clip has fewer starts).
        splits: which clips.
        device: where the encoder is; that of the training, for the features to be the same bit by bit.
        clips_per_shard: clips per file.
        max_corrupt: unreadable clips that are left out: below 1 a fraction, else a number.
        overwrite: drop a cache that was made in another way.
        progress: show a progress bar.

    Raises:
        UserError: no data set, a cache of another encoder or other settings, or too many unreadable clips.
    """
    margins = encoder.left_context_frames, encoder.lookahead_frames

    @torch.no_grad()
    def read_clip(row: ManifestRow, starts: list[int], frames: list[int]) -> tuple[list[Tensor], list[Tensor]]:
        audio = load_tracks(data_dir, row).audio
        windows: list[Tensor] = []
        for start in starts:
            samples = torch.from_numpy(cut_audio(audio, start, num_frames, *margins)).to(device)
            features = encoder(samples[None])
            steps = encoder.pack(features)
            assert torch.equal(encoder.unpack(steps, num_frames), features), "windows of one block that do not overlap"
            windows += steps.cpu().unbind(0)
        return windows, []

    return SpeechCache.encode(
        read_clip,
        data_dir,
        out_dir,
        fingerprint=fingerprint,
        num_frames=num_frames,
        windows_per_clip=windows_per_clip,
        references_per_clip=0,
        splits=splits,
        dtype="float32",
        clips_per_shard=clips_per_shard,
        max_corrupt=max_corrupt,
        overwrite=overwrite,
        progress=progress,
    )
