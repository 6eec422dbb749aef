"""Prepared clips as a torch data set: windows of frames with exactly their audio."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from rest_lightning.constants import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME, num_latent_frames
from rest_lightning.data.augment import Samples, SpeechAugmentation
from rest_lightning.data.layout import LANDMARKS, ManifestRow, clip_path, read_manifest, read_sidecar, sha256_of
from rest_lightning.data.video import Backend, Frames, VideoFile, check_memory, read_clip_audio
from rest_lightning.errors import UserError

if TYPE_CHECKING:
    from rest_lightning.data.latents import LatentsCache
    from rest_lightning.data.speech_cache import SpeechCache

Reference = Literal["first_frame", "random_frame", "clip_start"]

_log = logging.getLogger(__name__)
_NUM_NAMED = 3  # corrupt clips named in an error; the report has all


class ClipError(UserError):
    """A user's error that keeps its one line when a data loader's worker raises it.

    torch rebuilds a worker's exception from its printed traceback; only the last line is for the user.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rstrip().rpartition(f"{type(self).__name__}: ")[2])


class CorruptClip(UserError):
    """One clip cannot be read; the data set leaves it out."""


class WindowKey(NamedTuple):
    """What to load: the number ``clip`` of a clip, and the number that seeds every random choice of this sample."""

    clip: int
    draw: int


@dataclass
class ClipTracks:
    """Audio and per-frame values of one clip: audio (640 F,), mouth_opening (F,), landmarks (F, 3, 2); NaN unknown."""

    audio: Samples
    mouth_opening: NDArray[np.float32]
    landmarks: NDArray[np.float32]


def select_rows(
    rows: Sequence[ManifestRow], num_frames: int, size_px: int | None = None
) -> tuple[list[ManifestRow], dict[str, int]]:
    """Clips that are long enough, and how many were left out for which reason.

    Raises:
        UserError: a clip is not ``size_px`` pixels wide (None: as wide as the first one).
    """
    for row in rows:
        size_px = size_px or row.size_px
        if row.size_px != size_px:
            raise UserError(
                f"clip {row.clip_id}: expected {size_px}x{size_px} pixels, got {row.size_px}x{row.size_px}: "
                "prepare all clips at one size, and set size_px to it"
            )
    chosen = [row for row in rows if row.num_frames >= num_frames]
    num_short = len(rows) - len(chosen)
    return chosen, {f"shorter than {num_frames} frames": num_short} if num_short else {}


def check_clip_file(root: str | os.PathLike[str], row: ManifestRow) -> None:
    """CorruptClip when a clip's file is not the one of the manifest: decoders conceal damage, checksums do not."""
    path = clip_path(root, row.clip_id)
    if path.is_file() and sha256_of(path) != row.sha256:
        raise CorruptClip(f"{path}: expected the checksum of the manifest, got another: remake the clip")


def load_frames(
    root: str | os.PathLike[str],
    row: ManifestRow,
    ranges: Sequence[tuple[int, int]] | None = None,
    backend: Backend | None = None,
) -> list[Frames]:
    """Decoded (start, count) ``ranges`` of a clip, each uint8 (count, H, W, 3); the whole clip without ``ranges``.

    Raises:
        CorruptClip: it cannot be read, or has fewer frames than its manifest row says.
        ClipError: frame rate or size is not what the layout promises, which no other clip will mend.
    """
    path = clip_path(root, row.clip_id)
    try:
        with VideoFile(path, backend) as video:
            if abs(video.fps - FPS) > 0.01:
                raise ClipError(f"{path}: expected {FPS} frames per second, got {video.fps:g}: encode it at {FPS} fps")
            if video.num_frames < row.num_frames:
                raise CorruptClip(
                    f"{path}: expected {row.num_frames} frames as in the manifest, got {video.num_frames}"
                )
            pieces = [video.read(start, count) for start, count in ranges or [(0, row.num_frames)]]
    except (CorruptClip, ClipError):
        raise
    except UserError as error:
        raise CorruptClip(str(error)) from None
    height, width = pieces[0].shape[1:3]
    if (height, width) != (row.size_px, row.size_px):
        raise ClipError(
            f"{path}: expected {row.size_px}x{row.size_px} pixels as in the manifest, got {width}x{height}: "
            "remake the data set"
        )
    return pieces


def load_tracks(root: str | os.PathLike[str], row: ManifestRow) -> ClipTracks:
    """Audio, mouth opening and landmarks of a whole clip. Raises CorruptClip or ClipError like `load_frames`."""
    try:
        sidecar = read_sidecar(root, row.clip_id)
        if (sidecar.fps, sidecar.sample_rate_hz) != (FPS, SAMPLE_RATE):
            raise ClipError(
                f"clip {row.clip_id}: expected {FPS} frames per second and {SAMPLE_RATE} Hz, got {sidecar.fps} and "
                f"{sidecar.sample_rate_hz}: encode its sound as 16 kHz mono"
            )
        if sidecar.num_frames != row.num_frames:
            raise CorruptClip(
                f"clip {row.clip_id}: expected {row.num_frames} frames as in the manifest, got {sidecar.num_frames}"
            )
        audio = read_clip_audio(clip_path(root, row.clip_id), row.num_frames)
    except (CorruptClip, ClipError):
        raise
    except UserError as error:
        raise CorruptClip(str(error)) from None
    mouth = np.full(row.num_frames, np.nan, np.float32)
    landmarks = np.full((row.num_frames, len(LANDMARKS), 2), np.nan, np.float32)
    if sidecar.mouth_opening is not None:
        mouth[:] = np.array(sidecar.mouth_opening, np.float32)
    if sidecar.landmarks is not None:
        for i, name in enumerate(LANDMARKS):
            landmarks[:, i] = np.array(sidecar.landmarks[name], np.float32)
    return ClipTracks(audio, mouth, landmarks)


def cut_audio(audio: Samples, start_frame: int, num_frames: int, left_frames: int, right_frames: int) -> Samples:
    """Samples of frames [start - left, start + num_frames + right), zeros where the clip has none.

    Args:
        audio: (640 * clip frames,).
        start_frame, num_frames: the window.
        left_frames, right_frames: margins.

    Returns:
        A copy, (640 * (left_frames + num_frames + right_frames),).
    """
    begin = (start_frame - left_frames) * SAMPLES_PER_FRAME
    out = np.zeros((left_frames + num_frames + right_frames) * SAMPLES_PER_FRAME, np.float32)
    low, high = max(begin, 0), min(begin + len(out), len(audio))
    if low < high:
        out[low - begin : high - begin] = audio[low:high]
    return out


class PreparedClips(Dataset[dict[str, Any]]):
    """Windows of the clips of one split (layout: `rest_lightning.data.layout`).

    A sample is chosen by a `WindowKey`: the same key gives the same sample in every worker, epoch and run. A plain
    index is the key (index, index). Samples hold ``frames`` uint8 (F, H, W, 3), ``reference`` uint8 (H, W, 3),
    ``audio`` float32 (640 * (left + F + right),), ``mouth_opening`` (F,) and ``landmarks`` (F, 3, 2) in the order
    mouth, left eye, right eye (NaN unknown), ``clip_id`` and ``start`` (first frame of the window in its clip).
    With ``latents``: ``latents`` (C, f, h, w) instead of frames and reference. With ``speech``: also ``speech_steps``
    (n, D_A), which `SpeechEncoder.unpack` turns into the window's features.

    Clips that are too short are left out and counted in ``skipped``. A clip that cannot be read is left out when that
    is found, the next readable one takes its place, and it is named in the log and the report.

    Args:
        root: folder of the data set.
        split: ``train``, ``val`` or ``test``.
        num_frames: window length F, 8n + 1.
        random_window: a random start (training), else the window in the middle of the clip.
        size_px: expected side of the frames; None takes the first clip's.
        reference: ``first_frame`` of the window, a ``random_frame`` of the whole clip, or ``clip_start``, its first frame
            (of an animated clip the still itself, as a stream has it).
        audio_left_frames, audio_right_frames: audio margins, from the clip where it has them, else zeros.
        augmentation: applied to the audio, margins included; None leaves it as recorded.
        latents: cache to read latents from; its windows are then the ones to choose from.
        speech: the same for speech features; of both caches, the windows of ``latents`` have to be in ``speech``.
        with_frames: False leaves out frames and reference (a speech stage needs none).
        seed: of all random choices, together with the key.
        max_corrupt: how many unreadable clips are left out before it is an error: below 1 a fraction, else a number.
        report_path: JSON-lines file to name unreadable clips in (appended).
        backend: of the video reader.

    Raises:
        UserError: no data set, no usable clip, a clip of another size, or (when loading) too many unreadable clips.
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
        self.augmentation, self.latents, self.with_frames = augmentation, latents, with_frames and latents is None
        self.speech, self.seed, self.report_path, self.backend = speech, seed, report_path, backend
        rows = read_manifest(root, split)
        self.rows, self.skipped = select_rows(rows, num_frames, size_px)
        for cache in (latents, speech):
            self.rows = self.rows if cache is None else cache.select(self.rows, self.skipped)
        if latents is not None and speech is not None:
            speech.check_windows(latents, self.rows)
        for reason, count in self.skipped.items():
            _log.warning("%s: %d of %d %s clips left out: %s", self.root, count, len(rows), split, reason)
        if not self.rows:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items())
            raise UserError(
                f"{self.root}: expected {split} clips of {num_frames} frames or more, got {reasons or 'none'}: add "
                "clips or choose a smaller num_frames"
            )
        self.size_px = self.rows[0].size_px
        self.max_num_corrupt = int(max_corrupt * len(self.rows) if max_corrupt < 1 else max_corrupt)
        self._corrupt = torch.zeros(len(self.rows), dtype=torch.bool).share_memory_()  # seen by all workers
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
        raise ClipError(f"{self.root}: expected a readable {self.split} clip, got none: remake the data set")

    def with_window(self, num_frames: int) -> PreparedClips:
        """The same clips, decoded ones included, in windows of ``num_frames``; shorter clips are left out."""
        kept = [i for i, row in enumerate(self.rows) if row.num_frames >= num_frames]
        if not kept:
            raise UserError(
                f"{self.root}: expected {self.split} clips of {num_frames} frames or more, got none: add longer clips"
            )
        other = copy.copy(self)
        other.num_frames, other._verified = num_frames, set()
        other.rows, other._corrupt = [self.rows[i] for i in kept], self._corrupt[kept]
        other._frames, other._tracks = [self._frames[i] for i in kept], [self._tracks[i] for i in kept]
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
                    self._frames[index] = load_frames(self.root, self.rows[index], None, self.backend)[0]
            except CorruptClip as error:
                return error
            return None

        from tqdm import tqdm

        with ThreadPoolExecutor(max(1, num_threads)) as pool:
            results = pool.map(load, range(len(self)))
            bar = tqdm(results, f"decoding {self.split} clips", len(self), disable=not progress, unit="clip")
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
                frames, (reference,) = load_frames(self.root, row, [(start, length), (chosen, 1)], self.backend)
            images = {"frames": torch.from_numpy(frames), "reference": torch.from_numpy(reference)}
        speech = {} if self.speech is None else {"speech_steps": self.speech.at(row.clip_id, start)}
        audio = cut_audio(tracks.audio, start, length, self.audio_left_frames, self.audio_right_frames)
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
            line = json.dumps({"clip_id": clip_id, "split": self.split, "data_dir": self.root, "reason": str(error)})
            os.makedirs(os.path.dirname(os.path.abspath(self.report_path)), exist_ok=True)
            with open(
                self.report_path, "a", encoding="utf-8"
            ) as file:  # one short append: whole lines from all workers
                file.write(line + "\n")
        corrupt = self.corrupt_clip_ids
        if len(corrupt) > self.max_num_corrupt:
            names = ", ".join(corrupt[:_NUM_NAMED]) + (", ..." if len(corrupt) > _NUM_NAMED else "")
            raise ClipError(
                f"{self.root}: expected at most {self.max_num_corrupt} unreadable {self.split} clips, got "
                f"{len(corrupt)} of {len(self)} ({names}; last: {error}): remake them or raise max_corrupt"
            )
