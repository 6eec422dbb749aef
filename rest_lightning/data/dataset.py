"""Windows of prepared clips as a torch dataset."""

from __future__ import annotations

import copy
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from rest_lightning.constants import num_latent_frames
from rest_lightning.data.augment import Samples, SpeechAugmentation
from rest_lightning.data.clips import (
    ClipError,
    ClipTracks,
    CorruptClip,
    Reference,
    check_clip_file,
    cut_audio,
    load_frames,
    load_tracks,
    select_rows,
)
from rest_lightning.data.layout import read_manifest
from rest_lightning.errors import UserError
from rest_lightning.media.video import Backend, Frames, check_memory

if TYPE_CHECKING:
    from rest_lightning.data.window_cache import LatentsCache, SpeechCache

_log = logging.getLogger(__name__)
_NUM_NAMED = 3  # corrupt clips named in an error; the report has all


class WindowKey(NamedTuple):
    """What to load: the number ``clip`` of a clip, and the number that seeds every random choice of
    this sample.
    """

    clip: int
    draw: int


class PreparedClips(Dataset[dict[str, Any]]):
    """Windows of the clips of one split (layout: `rest_lightning.data.layout`).

    A sample is chosen by a `WindowKey`: the same key gives the same sample in every worker, epoch
    and run. A plain index is the key (index, index). Samples hold ``frames`` uint8 (F, H, W, 3),
    ``reference`` uint8 (H, W, 3), ``audio`` float32 (640 * (left + F + right),), ``mouth_opening``
    (F,) and ``landmarks`` (F, 3, 2) in the order mouth, left eye, right eye (NaN unknown),
    ``clip_id`` and ``start`` (first frame of the window in its clip). With ``latents``: ``latents``
    (C, f, h, w) instead of frames and reference. With ``speech``: also ``speech_steps`` (n, D_A),
    which `SpeechEncoder.unpack` turns into the window's features.

    Clips that are too short are left out and counted in ``skipped``. A clip that cannot be read is
    left out when that is found, the next readable one takes its place, and it is named in the log
    and the report.

    Args:
        root: folder of the data set.
        split: ``train``, ``val`` or ``test``.
        num_frames: window length F, 8n + 1.
        random_window: a random start (training), else the window in the middle of the clip.
        size_px: expected side of the frames; None takes the first clip's.
        reference: ``first_frame`` of the window, a ``random_frame`` of the whole clip, or
            ``clip_start``, the clip's first frame (of an animated clip the still itself, as a
            stream has it).
        audio_left_frames, audio_right_frames: audio margins, from the clip where it has them, else
            zeros.
        augmentation: applied to the audio, margins included; None leaves it as recorded.
        latents: cache to read latents from; its windows are then the ones to choose from.
        speech: the same for speech features; of both caches, the windows of ``latents`` have to be
            in ``speech``.
        with_frames: False leaves out frames and reference (a speech stage needs none).
        seed: of all random choices, together with the key.
        max_corrupt: how many unreadable clips are left out before it is an error: below 1 a
            fraction, else a number.
        report_path: JSON-lines file to name unreadable clips in (appended).
        backend: of the video reader.

    Raises:
        UserError: no data set, no usable clip, a clip of another size, or (when loading) too many
            unreadable clips.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        num_frames: int,
        *,
        random_window: bool = False,
        size_px: int | None = None,
        reference: Reference = "first_frame",
        audio_left_frames: int = 8,
        audio_right_frames: int = 4,
        augmentation: SpeechAugmentation | None = None,
        latents: LatentsCache | None = None,
        speech: SpeechCache | None = None,
        with_frames: bool = True,
        seed: int = 0,
        max_corrupt: float = 0.02,
        report_path: str | os.PathLike[str] | None = None,
        backend: Backend | None = None,
    ) -> None:
        try:
            num_latent_frames(num_frames)
        except ValueError as error:
            raise UserError(f"num_frames: {error}") from None
        self.root, self.split, self.num_frames = os.fspath(root), split, num_frames
        self.random_window, self.reference = random_window, reference
        self.audio_left_frames, self.audio_right_frames = audio_left_frames, audio_right_frames
        self.augmentation, self.latents, self.with_frames = (
            augmentation,
            latents,
            with_frames and latents is None,
        )
        self.speech, self.seed, self.report_path, self.backend = speech, seed, report_path, backend
        rows = read_manifest(root, split)
        self.rows, self.skipped = select_rows(rows, num_frames, size_px)
        for cache in (latents, speech):
            self.rows = self.rows if cache is None else cache.select(self.rows, self.skipped)
        if latents is not None and speech is not None:
            speech.check_windows(latents, self.rows)
        for reason, count in self.skipped.items():
            _log.warning(
                "%s: %d of %d %s clips left out: %s", self.root, count, len(rows), split, reason
            )
        if not self.rows:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items())
            raise UserError(
                f"{self.root}: expected {split} clips of {num_frames} frames or more, got "
                f"{reasons or 'none'}: add "
                "clips or choose a smaller num_frames"
            )
        self.size_px = self.rows[0].size_px
        self.max_num_corrupt = int(max_corrupt * len(self.rows) if max_corrupt < 1 else max_corrupt)
        self._corrupt = torch.zeros(
            len(self.rows), dtype=torch.bool
        ).share_memory_()  # seen by all workers
        self._verified: set[int] = set()
        self._frames: list[Frames | None] = [None] * len(self.rows)
        self._tracks: list[ClipTracks | None] = [None] * len(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def corrupt_clip_ids(self) -> list[str]:
        """Clips found unreadable so far, by any worker."""
        return [self.rows[i].clip_id for i in self._corrupt.nonzero().flatten().tolist()]

    def __getitem__(self, key: int | WindowKey) -> dict[str, Any]:
        index, draw = key if isinstance(key, tuple) else (key, key)
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            if self._corrupt[candidate]:
                continue
            try:
                return self._sample(candidate, draw)
            except CorruptClip as error:
                self._report(candidate, error)
        raise ClipError(
            f"{self.root}: expected a readable {self.split} clip, got none: remake the data set"
        )

    def with_window(self, num_frames: int) -> PreparedClips:
        """The same clips, decoded ones included, in windows of ``num_frames``; shorter clips are
        left out.
        """
        kept = [i for i, row in enumerate(self.rows) if row.num_frames >= num_frames]
        if not kept:
            raise UserError(
                f"{self.root}: expected {self.split} clips of {num_frames} frames or more, got "
                "none: add longer clips"
            )
        other = copy.copy(self)
        other.num_frames, other._verified = num_frames, set()
        other.rows, other._corrupt = [self.rows[i] for i in kept], self._corrupt[kept]
        other._frames, other._tracks = (
            [self._frames[i] for i in kept],
            [self._tracks[i] for i in kept],
        )
        return other

    def load_into_memory(self, num_threads: int = 1, progress: bool = True) -> None:
        """Decode every clip once and keep it as uint8 (one 128x128 clip of 113 frames: 5.6 MB).

        Forked workers share this memory; call it before the loader starts.

        Raises:
            UserError: it would not fit into the free memory, or too many clips are unreadable.
        """
        if self.with_frames:
            check_memory(sum(row.num_frames for row in self.rows) * self.size_px**2 * 3, self.root)

        def load(index: int) -> CorruptClip | None:
            try:
                self._tracks[index] = self._load_tracks(index)
                if self.with_frames:
                    self._frames[index] = load_frames(
                        self.root, self.rows[index], None, self.backend
                    )[0]
            except CorruptClip as error:
                return error
            return None

        from tqdm import tqdm

        with ThreadPoolExecutor(max(1, num_threads)) as pool:
            results = pool.map(load, range(len(self)))
            bar = tqdm(
                results,
                f"decoding {self.split} clips",
                len(self),
                disable=not progress,
                unit="clip",
            )
            for index, error in enumerate(bar):
                if error is not None:
                    self._report(index, error)

    def _sample(self, index: int, draw: int) -> dict[str, Any]:
        row, length = self.rows[index], self.num_frames
        rng = np.random.default_rng((self.seed, draw))
        tracks = self._tracks[index] or self._load_tracks(index)
        images: dict[str, Tensor] = {}
        if self.latents is not None:
            start, images["latents"] = self.latents.sample(
                row.clip_id, rng if self.random_window else None, self.reference
            )
        elif self.speech is not None:
            number = self.speech.choose(row.clip_id, rng if self.random_window else None)
            start = self.speech.starts(row.clip_id)[number]
        else:
            slack = row.num_frames - length
            start = int(rng.integers(slack + 1)) if self.random_window else slack // 2
        if self.with_frames:
            chosen = {"first_frame": start, "clip_start": 0}.get(self.reference)
            if chosen is None:
                chosen = int(rng.integers(row.num_frames))
            cached = self._frames[index]
            if cached is not None:
                frames, reference = cached[start : start + length], cached[chosen]
            elif start <= chosen < start + length:
                (frames,) = load_frames(self.root, row, [(start, length)], self.backend)
                reference = frames[chosen - start]
            else:
                frames, (reference,) = load_frames(
                    self.root, row, [(start, length), (chosen, 1)], self.backend
                )
            images = {"frames": torch.from_numpy(frames), "reference": torch.from_numpy(reference)}
        speech = {} if self.speech is None else {"speech_steps": self.speech.at(row.clip_id, start)}
        audio = cut_audio(
            tracks.audio, start, length, self.audio_left_frames, self.audio_right_frames
        )
        if self.augmentation is not None:
            audio = self.augmentation(audio, rng, lambda rng: self._other_voice(index, rng))
        return {
            **images,
            **speech,
            "audio": torch.from_numpy(audio),
            "mouth_opening": torch.from_numpy(tracks.mouth_opening[start : start + length]),
            "landmarks": torch.from_numpy(tracks.landmarks[start : start + length]),
            "clip_id": row.clip_id,
            "start": start,
        }

    def _load_tracks(self, index: int) -> ClipTracks:
        row = self.rows[index]
        if index not in self._verified:
            check_clip_file(self.root, row)
            self._verified.add(index)
        return load_tracks(self.root, row)

    def _other_voice(self, index: int, rng: np.random.Generator) -> Samples:
        other = int(rng.integers(len(self)))
        tracks = self._tracks[other]
        try:
            if other == index or self._corrupt[other]:
                return np.empty(0, np.float32)
            return tracks.audio if tracks is not None else self._load_tracks(other).audio
        except CorruptClip as error:
            self._report(other, error)
            return np.empty(0, np.float32)

    def _report(self, index: int, error: CorruptClip) -> None:
        self._corrupt[index] = True
        clip_id = self.rows[index].clip_id
        _log.warning("clip %s left out: %s", clip_id, error)
        if self.report_path is not None:
            line = json.dumps(
                {
                    "clip_id": clip_id,
                    "split": self.split,
                    "data_dir": self.root,
                    "reason": str(error),
                }
            )
            Path(self.report_path).parent.mkdir(parents=True, exist_ok=True)
            # One short append: whole lines from all workers.
            with Path(self.report_path).open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        corrupt = self.corrupt_clip_ids
        if len(corrupt) > self.max_num_corrupt:
            names = ", ".join(corrupt[:_NUM_NAMED]) + (", ..." if len(corrupt) > _NUM_NAMED else "")
            raise ClipError(
                f"{self.root}: expected at most {self.max_num_corrupt} unreadable {self.split} "
                "clips, got "
                f"{len(corrupt)} of {len(self)} ({names}; last: {error}): remake them or raise "
                "max_corrupt"
            )
