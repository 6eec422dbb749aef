"""What is computed once for windows of a data set's clips and kept on disk: latents, and speech
features.

::

    <folder>/<prefix>-00000.safetensors   windows (N, ...) and references (M, ...)
    <folder>/index.json                   the network (fingerprint), and where each window is

The index is replaced after every shard: an interrupted run continues where it was.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor

from rest_lightning.constants import num_latent_frames
from rest_lightning.data.clips import (
    CorruptClip,
    check_clip_file,
    cut_audio,
    load_frames,
    load_tracks,
    select_rows,
)
from rest_lightning.data.layout import ManifestRow, read_manifest
from rest_lightning.errors import UserError
from rest_lightning.media.files import whole_file, write_text_atomic
from rest_lightning.models.speech import SpeechEncoder

CACHE_VERSION = 1
# A clip, the first frames of its windows and its reference frames -> a tensor for each of them.
ReadClip = Callable[[ManifestRow, list[int], list[int]], tuple[list[Tensor], list[Tensor]]]

_log = logging.getLogger(__name__)


class CacheSettings(TypedDict, total=False):
    """What :func:`encode_dataset` and :func:`encode_speech` have in common.

    Attributes:
        windows_per_clip: windows evenly spread over each clip (fewer where a clip has fewer
            starts), by default 1; 0: as many as cover the clip.
        splits: which clips, by default all of them.
        clips_per_shard: clips per file, by default 64.
        max_corrupt: unreadable clips that are left out: below 1 a fraction (by default 0.02), else
            a number.
        overwrite: drop a cache that was made in another way.
        progress: show a progress bar, the default.
    """

    windows_per_clip: int
    splits: Sequence[str]
    clips_per_shard: int
    max_corrupt: float
    overwrite: bool
    progress: bool


class WindowCache:
    """A folder that :meth:`encode` wrote; shards are memory-mapped.

    Args:
        folder: of the cache.
        num_frames: expected window length; None takes the cache's.
        fingerprint: of the expected network; None does not ask.
        in_memory: read all shards now instead of mapping them.

    Raises:
        UserError: no cache, another content, version, window length or network.
    """

    content: str  # plural, for messages and the index
    network: str  # what it comes from, for messages
    prefix: str  # of the shards' names

    def __init__(
        self,
        folder: str | os.PathLike[str],
        num_frames: int | None = None,
        fingerprint: str | None = None,
        in_memory: bool = False,
    ) -> None:
        self.folder = Path(folder)
        index = self._read_index(self.folder)
        if index is None:
            raise UserError(
                f"expected a {self.content} cache {self.folder}, got none: make it with `rest "
                "encode`"
            )
        self._check_content(self.folder, index)
        self.index: dict[str, Any] = index
        self.fingerprint: str = self.index["fingerprint"]
        self.num_frames: int = self.index["num_frames"]
        if fingerprint is not None:
            self.check_fingerprint(fingerprint)
        if num_frames is not None:
            self.check_num_frames(num_frames)
        self._clips: dict[str, dict[str, Any]] = self.index["clips"]
        self._corrupt: dict[str, str] = self.index.get("corrupt", {})
        self._open_files: dict[tuple[int, int], Any] = {}
        self._loaded: list[dict[str, Tensor]] = []
        if in_memory:
            from safetensors.torch import load_file

            self._loaded = [load_file(self.folder / name) for name in self.index["shards"]]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open_files": {}}  # mapped files belong to their process

    def check_fingerprint(self, fingerprint: str) -> None:
        """UserError unless the cache comes from the network of this fingerprint."""
        if fingerprint != self.fingerprint:
            raise UserError(
                f"{self.folder}: expected {self.content} of the {self.network} {fingerprint}, got "
                "those of "
                f"{self.fingerprint}: make them again with `rest encode --overwrite`"
            )

    def check_num_frames(self, num_frames: int) -> None:
        """UserError unless the windows have ``num_frames`` frames."""
        if num_frames != self.num_frames:
            raise UserError(
                f"{self.folder}: expected {self.content} of {num_frames} frames, got "
                f"{self.num_frames}: make them "
                "again with `rest encode`, or set num_frames to theirs"
            )

    def select(self, rows: list[ManifestRow], skipped: dict[str, int]) -> list[ManifestRow]:
        """The clips that are in the cache; counts in ``skipped`` those that could not be read when
        it was made.

        Raises:
            UserError: clips that the cache has not seen, or was made from another version of.
        """
        kept = [row for row in rows if self.check_clip(row)]
        missing = [
            row.clip_id
            for row in rows
            if row.clip_id not in self._clips and row.clip_id not in self._corrupt
        ]
        if missing:
            raise UserError(
                f"{self.folder}: expected {self.content} of all {len(rows)} clips, got none of "
                f"{len(missing)} (first: "
                f"{missing[0]}): run the same `rest encode` again, it adds them"
            )
        if len(kept) < len(rows):
            skipped[f"not in the {self.content} cache"] = len(rows) - len(kept)
        return kept

    def check_clip(self, row: ManifestRow) -> bool:
        """Whether the clip is in the cache; UserError when it was made from another version of the
        clip.
        """
        entry = self._clips.get(row.clip_id)
        if entry is not None and entry["sha256"] != row.sha256:
            raise UserError(
                f"{self.folder}: expected {self.content} of the present clip {row.clip_id}, got "
                "those of an older "
                "version: make them again with `rest encode --overwrite`"
            )
        return entry is not None

    def starts(self, clip_id: str) -> list[int]:
        """First frames of the clip's windows."""
        starts: list[int] = self._clips[clip_id]["starts"]
        return starts

    def choose(self, clip_id: str, rng: np.random.Generator | None) -> int:
        """Number of one window: a random one, or without ``rng`` the middle one."""
        count = len(self.starts(clip_id))
        return count // 2 if rng is None else int(rng.integers(count))

    def window(self, clip_id: str, number: int) -> Tensor:
        """What was kept of window ``number`` of a clip, float32."""
        entry = self._clips[clip_id]
        return self._row(entry["shard"], "windows", entry["row"] + number)

    def _row(self, shard: int, name: str, row: int) -> Tensor:
        if self._loaded:
            return self._loaded[shard][name][row].float()
        key = (os.getpid(), shard)
        if key not in self._open_files:
            from safetensors import safe_open

            self._open_files[key] = safe_open(
                self.folder / self.index["shards"][shard], framework="pt"
            )
        rows: Tensor = self._open_files[key].get_slice(name)[row : row + 1]
        return rows[0].float()

    @classmethod
    def encode(
        cls,
        read_clip: ReadClip,
        data_dir: str | os.PathLike[str],
        out_dir: str | os.PathLike[str],
        *,
        fingerprint: str,
        num_frames: int,
        references_per_clip: int,
        dtype: str,
        windows_per_clip: int = 1,
        splits: Sequence[str] = ("train", "val", "test"),
        clips_per_shard: int = 64,
        max_corrupt: float = 0.02,
        overwrite: bool = False,
        progress: bool = True,
    ) -> Self:
        """Keeps what ``read_clip`` makes of every clip's windows; arguments as those of
        :func:`encode_dataset`.
        """
        from safetensors.torch import save_file
        from torch import stack
        from tqdm import tqdm

        folder = Path(out_dir)
        settings = {
            "version": CACHE_VERSION,
            "content": cls.content,
            "fingerprint": fingerprint,
            "num_frames": num_frames,
            "windows_per_clip": windows_per_clip,
            "references_per_clip": references_per_clip,
            "dtype": dtype,
        }
        index = cls._start(folder, settings, overwrite)
        rows, _ = select_rows(
            [row for row in read_manifest(data_dir) if row.split in splits], num_frames
        )
        done: dict[str, Any] = index["clips"]
        for row in rows:
            if row.clip_id in done and done[row.clip_id]["sha256"] != row.sha256:
                raise UserError(
                    f"{folder}: expected {cls.content} of the present clip {row.clip_id}, got "
                    "those of an older "
                    "version: give another folder or `--overwrite`"
                )
        todo = [row for row in rows if row.clip_id not in done]
        allowed = int(max_corrupt * len(rows) if max_corrupt < 1 else max_corrupt)
        with tqdm(
            total=len(rows),
            initial=len(rows) - len(todo),
            desc="encoding",
            unit="clip",
            disable=not progress,
        ) as bar:
            for group in _groups(todo, clips_per_shard):
                number = len(index["shards"])
                windows: list[Tensor] = []
                references: list[Tensor] = []
                entries: dict[str, dict[str, Any]] = {}
                for row in group:
                    bar.update()
                    # 0: as many windows as cover the clip; neighbours share a frame or more.
                    count = windows_per_clip or -(-(row.num_frames - 1) // (num_frames - 1))
                    starts = _spread(row.num_frames - num_frames, count)
                    # The first frame comes first, alone or not: clip_start asks for it.
                    frames = (
                        [0]
                        if references_per_clip == 1
                        else _spread(row.num_frames - 1, references_per_clip)
                    )
                    try:
                        check_clip_file(data_dir, row)
                        new_windows, new_references = read_clip(row, starts, frames)
                    except CorruptClip as error:
                        _leave_out(index, row, error, allowed, data_dir)
                        continue
                    index["corrupt"].pop(row.clip_id, None)  # a run before found it broken
                    entries[row.clip_id] = {
                        "sha256": row.sha256,
                        "shard": number,
                        "row": len(windows),
                        "starts": starts,
                        "reference_row": len(references),
                        "reference_frames": frames,
                    }
                    windows += new_windows
                    references += new_references
                if not entries:
                    continue
                tensors = {"windows": stack(windows)}
                if references:
                    tensors["references"] = stack(references)
                path = folder / f"{cls.prefix}-{number:05d}.safetensors"
                with whole_file(path) as temporary:
                    save_file(tensors, temporary)
                index["shards"].append(path.name)
                done.update(entries)
                _write_index(folder, index)
        return cls(folder, num_frames, fingerprint)

    @classmethod
    def _start(cls, folder: Path, settings: dict[str, Any], overwrite: bool) -> dict[str, Any]:
        """The index to go on with: that of the same settings, or a new one."""
        try:
            num_latent_frames(settings["num_frames"])
        except ValueError as error:
            raise UserError(f"num_frames: {error}") from None
        folder.mkdir(parents=True, exist_ok=True)
        try:
            index = cls._read_index(folder)
        except UserError:
            if not overwrite:
                raise
            index = None
        cls._check_content(folder, index)  # one cache never overwrites another of something else
        if index is None or overwrite:
            index = {**settings, "shards": [], "clips": {}, "corrupt": {}}
            _write_index(
                folder, index
            )  # before old shards go: no index ever names a file that is not there
            for old in folder.glob(f"{cls.prefix}-*.safetensors"):
                old.unlink()
            return index
        changed = {
            key: (value, index.get(key))
            for key, value in settings.items()
            if index.get(key) != value
        }
        if changed:
            key, (expected, came) = next(iter(changed.items()))
            raise UserError(
                f"{folder}: expected a {cls.content} cache with {key} {expected}, got one with "
                f"{came}: give another "
                "folder or `--overwrite`"
            )
        return index

    @classmethod
    def _read_index(cls, folder: Path) -> dict[str, Any] | None:
        path = folder / "index.json"
        if not path.is_file():
            return None
        try:
            index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            version = index.get("version")
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path}: expected the index of a {cls.content} cache, got {error}: delete the "
                "folder"
            ) from None
        if version != CACHE_VERSION:
            raise UserError(
                f"{path}: expected cache version {CACHE_VERSION}, got {version!r}: make it again "
                "with "
                "`rest encode --overwrite`"
            )
        index.setdefault("content", "latents")  # older caches do not say it, and hold nothing else
        return index

    @classmethod
    def _check_content(cls, folder: Path, index: dict[str, Any] | None) -> None:
        if index is not None and index["content"] != cls.content:
            raise UserError(
                f"{folder}: expected a {cls.content} cache, got one of {index['content']}: name "
                "another folder"
            )


def _leave_out(
    index: dict[str, Any],
    row: ManifestRow,
    error: CorruptClip,
    allowed: int,
    data_dir: str | os.PathLike[str],
) -> None:
    index["corrupt"][row.clip_id] = str(error)
    _log.warning("clip %s left out: %s", row.clip_id, error)
    if len(index["corrupt"]) > allowed:
        names = ", ".join(list(index["corrupt"])[:3])
        raise UserError(
            f"{data_dir}: expected at most {allowed} unreadable clips, got {len(index['corrupt'])} "
            f"({names}; last: {error}): remake them or raise max_corrupt"
        ) from None


def _spread(last: int, count: int) -> list[int]:
    """Up to ``count`` different whole numbers evenly spread over 0..last; one is the middle."""
    if count < 1:
        return []
    return (
        [last // 2]
        if count == 1
        else sorted(set(np.linspace(0, last, count).round().astype(int).tolist()))
    )


def _groups(rows: Sequence[ManifestRow], size: int) -> Iterator[Iterable[ManifestRow]]:
    for low in range(0, len(rows), size):
        yield rows[low : low + size]


def _write_index(folder: Path, index: dict[str, Any]) -> None:
    write_text_atomic(folder / "index.json", json.dumps(index))


# -- latents ---------------------------------------------------------------------------------------
# VAE latents of a data set on disk, computed once for the DiT stages.
#
# Windows (N, C, f, h, w) and references (M, C, 1, h, w), as
# :mod:`rest_lightning.data.window_cache` tells.

Precision = Literal["bfloat16", "float32"]


class FrameEncoder(Protocol):
    """Any VAE: frames (B, 3, F, H, W) in [-1, 1] -> latents (B, C, f, h, w)."""

    def encode(self, frames: Tensor) -> Tensor:
        """Returns the latents of frames."""


class LatentsCache(WindowCache):
    """Latents of `encode_dataset`; `window` gives (C, f, h, w)."""

    content, network, prefix = "latents", "VAE", "latents"

    def reference(self, clip_id: str, number: int) -> Tensor:
        """Latents (C, 1, h, w), float32, of the clip's reference frame ``number``, encoded on its
        own.
        """
        entry = self._clips[clip_id]
        return self._row(entry["shard"], "references", entry["reference_row"] + number)

    def sample(
        self, clip_id: str, rng: np.random.Generator | None, reference: str
    ) -> tuple[int, Tensor]:
        """Start frame and latents (C, f, h, w) of one window: a random one, or without ``rng`` the
        middle one.

        Args:
            clip_id: of the clip.
            rng: chooses the window, and a random reference.
            reference: ``first_frame`` leaves the window as it is. ``random_frame`` and
                ``clip_start`` put a latent of a single frame into slot 0: the causal encoder treats
                the first frame on its own, so that is the latent of the window with another
                reference.

        Raises:
            UserError: the cache holds no such single frames.
        """
        number = self.choose(clip_id, rng)
        latents = self.window(clip_id, number)
        if reference != "first_frame":
            frames: list[int] = self._clips[clip_id]["reference_frames"]
            if not frames or (reference == "clip_start" and frames[0] != 0):
                raise UserError(
                    f"{self.folder}: expected latents of reference frames for "
                    f"reference={reference}, got none: "
                    "make them with `rest encode --references-per-clip 4` (1 is the clip's first "
                    "frame)"
                )
            choice = (
                0 if rng is None or reference == "clip_start" else int(rng.integers(len(frames)))
            )
            latents = torch.cat([self.reference(clip_id, choice), latents[:, 1:]], dim=1)
        return self.starts(clip_id)[number], latents


def encode_dataset(
    vae: FrameEncoder,
    data_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    fingerprint: str,
    num_frames: int = 97,
    references_per_clip: int = 0,
    dtype: Precision = "bfloat16",
    batch_size: int = 4,
    device: str | torch.device = "cpu",
    **settings: Unpack[CacheSettings],
) -> LatentsCache:
    """Encodes windows of every clip of a data set and writes them to ``out_dir``; continues an
    interrupted run.

    Args:
        vae: gives latents (B, C, f, h, w) of frames (B, 3, F, H, W) in [-1, 1]; should be in
            evaluation mode.
        data_dir: prepared clips.
        out_dir: folder of the cache.
        fingerprint: text that identifies the VAE's weights.
        num_frames: window length, 8n + 1.
        references_per_clip: single frames, encoded on their own, for ``reference=random_frame`` and
            ``clip_start``: the clip's first, and others evenly spread behind it.
        dtype: of the stored latents; bfloat16 encodes in it, too, by autocast.
        batch_size: windows encoded at once.
        device: where the VAE is.
        settings: see :class:`CacheSettings`.

    Raises:
        UserError: no data set, a cache of another VAE or other settings, or too many unreadable
            clips.
    """
    encode = _Encoder(vae, torch.device(device), getattr(torch, dtype), batch_size)

    def read_clip(
        row: ManifestRow, starts: list[int], frames: list[int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        (clip,) = load_frames(data_dir, row)
        windows = encode([clip[start : start + num_frames] for start in starts])
        return windows, encode([clip[frame : frame + 1] for frame in frames])

    return LatentsCache.encode(
        read_clip,
        data_dir,
        out_dir,
        fingerprint=fingerprint,
        num_frames=num_frames,
        references_per_clip=references_per_clip,
        dtype=dtype,
        **settings,
    )


class _Encoder:
    """Encodes uint8 pieces of one length in batches and gives them back one by one in the storage
    precision.
    """

    def __init__(
        self, vae: FrameEncoder, device: torch.device, dtype: torch.dtype, batch_size: int
    ) -> None:
        self.vae, self.device, self.dtype, self.batch_size = vae, device, dtype, batch_size

    @torch.inference_mode()
    def __call__(self, pieces: Sequence[np.ndarray]) -> list[Tensor]:
        out: list[Tensor] = []
        for low in range(0, len(pieces), self.batch_size):
            batch = torch.from_numpy(np.stack(pieces[low : low + self.batch_size])).to(self.device)
            frames = batch.permute(0, 4, 1, 2, 3).to(
                torch.float32, memory_format=torch.contiguous_format
            )
            with torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32):
                latents = self.vae.encode(frames.mul_(1 / 127.5).sub_(1))
            out += latents.to(self.dtype).cpu().unbind(0)
        return out


# -- speech features -------------------------------------------------------------------------------
# Speech features of a data set on disk, computed once for the stages after SpeechAE, or for
# SpeechAE itself.
#
# Kept in float32 and without the repetitions of overlapping windows (`SpeechEncoder.pack`), as
# (n, D_A) per window. :mod:`rest_lightning.data.window_cache` tells how they lie there.


class SpeechCache(WindowCache):
    """Speech features of `encode_speech`; `window` gives the packed steps (n, D_A)."""

    content, network, prefix = "speech features", "speech encoder", "speech"

    def at(self, clip_id: str, start: int) -> Tensor:
        """Packed steps (n, D_A), float32, of the window that begins with frame ``start`` of the
        clip.
        """
        return self.window(clip_id, self.starts(clip_id).index(start))

    def check_windows(self, latents: WindowCache, rows: Sequence[ManifestRow]) -> None:
        """UserError unless every window of ``latents`` has its speech features."""
        for row in rows:
            missing = set(latents.starts(row.clip_id)) - set(self.starts(row.clip_id))
            if missing:
                raise UserError(
                    f"{self.folder}: expected speech features of the windows of {latents.folder}, "
                    "got none of frame "
                    f"{min(missing)} of clip {row.clip_id}: make both with the same "
                    "--windows-per-clip"
                )


def encode_speech(
    encoder: SpeechEncoder,
    data_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    fingerprint: str,
    num_frames: int = 97,
    device: str | torch.device = "cpu",
    **settings: Unpack[CacheSettings],
) -> SpeechCache:
    """Encodes the speech of windows of every clip and writes it to ``out_dir``; continues an
    interrupted run.

    Args:
        encoder: the frozen speech encoder of the stages to come.
        data_dir: prepared clips; their speech as recorded, without augmentation.
        out_dir: folder of the cache.
        fingerprint: text that identifies the encoder's weights and settings.
        num_frames: window length, 8n + 1.
        device: where the encoder is; that of the training, for the features to be the same bit by
            bit.
        settings: see :class:`CacheSettings`.

    Raises:
        UserError: no data set, a cache of another encoder or other settings, or too many unreadable
            clips.
    """
    margins = encoder.left_context_frames, encoder.lookahead_frames

    @torch.no_grad()
    def read_clip(
        row: ManifestRow, starts: list[int], frames: list[int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        audio = load_tracks(data_dir, row).audio
        windows: list[Tensor] = []
        for start in starts:
            samples = torch.from_numpy(cut_audio(audio, start, num_frames, *margins)).to(device)
            features = encoder(samples[None])
            steps = encoder.pack(features)
            assert torch.equal(encoder.unpack(steps, num_frames), features), (
                "windows of one block that do not overlap"
            )
            windows += steps.cpu().unbind(0)
        return windows, []

    return SpeechCache.encode(
        read_clip,
        data_dir,
        out_dir,
        fingerprint=fingerprint,
        num_frames=num_frames,
        references_per_clip=0,
        dtype="float32",
        **settings,
    )
