"""One data module for all stages: VAE, SpeechAE, teacher and student."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from rest_lightning.data.augment import SpeechAugmentation
from rest_lightning.data.clips import Reference
from rest_lightning.data.dataset import PreparedClips, WindowKey
from rest_lightning.data.layout import read_manifest
from rest_lightning.data.streams import BLOCK_SAMPLES, PredictPair, SpeechStream, read_pairs
from rest_lightning.data.window_cache import LatentsCache, SpeechCache
from rest_lightning.errors import UserError
from rest_lightning.torchvision_compat import ensure_torchvision

ensure_torchvision()  # lightning imports torchmetrics, and that torchvision
import lightning  # noqa: E402

Batch = dict[str, Any]

_CAN_FORK = sys.platform.startswith("linux")


class TalkingHeadDataModule(lightning.LightningDataModule):
    """Windows of prepared clips with their speech (layout: `rest_lightning.data.layout`).

    Batches, as a task gets them: ``frames`` (B, 3, F, H, W) and ``reference`` (B, 3, H, W) float32
    in [-1, 1] (uint8 until they are on the device), ``audio`` (B, 640 * (left + F + right))
    float32, ``mouth_opening`` (B, F) and ``landmarks`` (B, F, 3, 2) in the order mouth, left eye,
    right eye, float32 with NaN where unknown, ``clip_id`` list of B, ``start`` (B,) first frame of
    the window. With ``latents_dir``: ``latents`` (B, C, f, h, w) float32 instead of frames and
    reference. With ``speech_dir``: also ``speech_steps`` (B, n, D_A) float32.

    What tasks need to know of the clips is in the batch, too: ``audio_margin_frames`` (left,
    right), ``data_dir``, and with caches ``latents_of`` and ``speech_of``, the fingerprints of the
    networks that made them. Another data module leaves out what it does not have: without margins
    ``audio`` is what the speech encoder reads, and no more.

    Training draws from one endless sequence of seeded permutations: a batch depends on its number
    alone, not on workers or epochs, so a resumed run goes on with exactly the batch that comes next
    (`state_dict`). Validation and test take the middle window of every clip.

    Args:
        data_dir: folder of prepared clips, as `rest synthesize` makes it; predicting needs none.
        batch_size: clips per batch and device.
        num_frames: window length F, 8n + 1 (97 = reference + 4 chunks).
        num_frames_train: shorter windows for training only (the VAE); None takes ``num_frames``.
        num_workers: loader processes; 0 loads in the training process.
        size_px: expected side of the frames; None takes what is there.
        reference: ``first_frame`` of the window, a ``random_frame`` of the clip, or ``clip_start``,
            the clip's first.
        audio_left_frames, audio_right_frames: audio margins in video frames.
        augment: change the level, noise, colour and room of the training speech.
        augmentation: how; None takes the defaults of `SpeechAugmentation`.
        cache_in_memory: decode all clips once before training.
        latents_dir: cache of `rest encode`.
        latents_fingerprint: the VAE whose latents are expected; None does not ask.
        speech_dir: cache of `rest encode --speech-encoder`; not with ``augment``, which changes the
            sound every time.
        with_frames: False leaves out frames and reference (SpeechAE needs none).
        windows_per_clip: windows of each clip per epoch.
        max_corrupt: unreadable clips that are left out: below 1 a fraction of a split, else a
            number.
        progress: show a bar while decoding into memory.
        seed: of order, windows, references and augmentation.
        predict_pairs: portraits and speech to predict from: a list of {portrait, speech, name}, or
            a JSON, YAML or CSV file of them.
        predict_block_samples: samples that one step of predicting pushes.
    """

    def __init__(
        self,
        data_dir: str = "data/talkers",
        batch_size: int = 8,
        num_frames: int = 97,
        num_frames_train: int | None = None,
        num_workers: int = 2,
        size_px: int | None = None,
        reference: Reference = "first_frame",
        audio_left_frames: int = 8,
        audio_right_frames: int = 4,
        augment: bool = False,
        augmentation: SpeechAugmentation | None = None,
        cache_in_memory: bool = False,
        latents_dir: str | None = None,
        latents_fingerprint: str | None = None,
        speech_dir: str | None = None,
        with_frames: bool = True,
        windows_per_clip: int = 1,
        max_corrupt: float = 0.02,
        progress: bool = True,
        seed: int = 0,
        # Dictionaries, not PredictPair: of a list of those jsonargparse reads the file itself, and
        # forgets its folder.
        predict_pairs: str | list[dict[str, str]] | None = None,
        predict_block_samples: int = BLOCK_SAMPLES,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("windows_per_clip", windows_per_clip)):
            if value < 1:
                raise UserError(f"expected {name} of at least 1, got {value}: raise it")
        if speech_dir is not None and augment:
            raise UserError(
                "expected augment false with speech_dir, whose features are those of the speech as "
                "recorded, got true: "
                "set data.augment to false, or leave data.speech_dir out"
            )
        self.data_dir, self.batch_size, self.num_workers = data_dir, batch_size, num_workers
        self.num_frames, self.num_frames_train = num_frames, num_frames_train or num_frames
        self.size_px, self.reference, self.with_frames = size_px, reference, with_frames
        self.audio_left_frames, self.audio_right_frames = audio_left_frames, audio_right_frames
        self.augmentation = (augmentation or SpeechAugmentation()) if augment else None
        self.cache_in_memory, self.progress = cache_in_memory, progress
        self.latents_dir, self.latents_fingerprint, self.speech_dir = (
            latents_dir,
            latents_fingerprint,
            speech_dir,
        )
        self.windows_per_clip, self.max_corrupt, self.seed = windows_per_clip, max_corrupt, seed
        self.predict_pairs, self.predict_block_samples = predict_pairs, predict_block_samples
        self.pairs: list[PredictPair] = []
        self._position = _Position()
        self._datasets: dict[str, PreparedClips | None] = {}
        self._latents: LatentsCache | None = None
        self._speech: SpeechCache | None = None
        self._loaders: list[ClipLoader] = []

    def setup(self, stage: str | None = None) -> None:
        """Opens the splits of a stage (fit, validate, test), and decodes them where asked to.

        For predict it reads the pairs.
        """
        if stage == "predict":
            if self.predict_pairs is None:
                raise UserError(
                    "expected portraits and speech to predict from, got none: set "
                    "data.predict_pairs"
                )
            self.pairs = read_pairs(self.predict_pairs)
        splits = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ()}
        rows = read_manifest(self.data_dir) if stage != "predict" else []
        for split in splits.get(stage or "", ("train", "val", "test")):
            if split not in self._datasets:
                known = split == "train" or any(row.split == split for row in rows)
                self._datasets[split] = self._open(split) if known else None

    def teardown(self, stage: str | None = None) -> None:
        """Ends the worker processes of the stage's loaders.

        Decoded clips stay for the next stage.
        """
        for loader in self._loaders:
            loader.close()
        self._loaders.clear()

    def dataset(self, split: str) -> PreparedClips:
        """Returns the clips of ``split``, opened if need be.

        Raises:
            UserError: there are none.
        """
        if self._datasets.get(split) is None:
            self._datasets[split] = self._open(split)
        dataset = self._datasets[split]
        assert dataset is not None
        return dataset

    def train_dataloader(self) -> ClipLoader:
        """Returns an endless sequence of shuffled windows.

        It is cut into epochs of ``len(loader)`` batches.
        """
        dataset = self.dataset("train")
        rank, world_size = self._rank()
        sampler = _TrainSampler(
            len(dataset),
            self.windows_per_clip,
            self.batch_size,
            self.seed,
            rank,
            world_size,
            self._position,
        )
        return self._loader(dataset, sampler, self._position)

    def val_dataloader(self) -> ClipLoader | list[Any]:
        """Returns the middle window of every validation clip.

        An empty list when the set has none.
        """
        return self._ordered_loader("val") if self._has("val") else []

    def test_dataloader(self) -> ClipLoader:
        """Returns the middle window of every test clip."""
        return self._ordered_loader("test")

    def predict_dataloader(self) -> SpeechStream:
        """Returns the speech of ``pairs`` in blocks; devices take turns."""
        rank, world_size = self._rank()
        return SpeechStream(self.pairs[rank::world_size], self.predict_block_samples)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int = 0) -> Batch:
        """Turns uint8 pictures into the models' floats, on the device."""
        return to_model_batch(batch)

    def state_dict(self) -> dict[str, Any]:
        """Returns how many training samples were handed out, over all devices."""
        return {
            "num_samples": self._position.num_batches * self.batch_size * self._rank()[1],
            "seed": self.seed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues after ``state_dict["num_samples"]`` samples."""
        if state_dict["seed"] != self.seed:
            raise UserError(
                f"expected the checkpoint's data seed {state_dict['seed']}, got {self.seed}: set "
                "data.seed to it, or "
                "the resumed run would repeat and leave out clips"
            )
        self._position.num_batches = state_dict["num_samples"] // (
            self.batch_size * self._rank()[1]
        )

    def _open(self, split: str) -> PreparedClips:
        training = split == "train"
        num_frames = self.num_frames_train if training else self.num_frames
        if self.latents_dir is not None:
            if self._latents is None:
                self._latents = LatentsCache(
                    self.latents_dir, None, self.latents_fingerprint, in_memory=self.cache_in_memory
                )
            self._latents.check_num_frames(num_frames)
        if self.speech_dir is not None:
            self._speech = self._speech or SpeechCache(
                self.speech_dir, in_memory=self.cache_in_memory
            )
            self._speech.check_num_frames(num_frames)
        log_dir = self.trainer.log_dir if self.trainer is not None else None
        dataset = PreparedClips(
            self.data_dir,
            split,
            num_frames,
            random_window=training,
            size_px=self.size_px,
            reference=self.reference,
            audio_left_frames=self.audio_left_frames,
            audio_right_frames=self.audio_right_frames,
            augmentation=self.augmentation if training else None,
            latents=self._latents,
            speech=self._speech,
            with_frames=self.with_frames,
            seed=self.seed,
            max_corrupt=self.max_corrupt,
            report_path=str(Path(log_dir) / "corrupt_clips.jsonl") if log_dir else None,
        )
        if self.cache_in_memory:
            dataset.load_into_memory(max(1, self.num_workers), self.progress)
        return dataset

    def _has(self, split: str) -> bool:
        if split not in self._datasets:
            self.setup({"val": "validate"}.get(split, split))
        return self._datasets[split] is not None

    def _ordered_loader(self, split: str) -> ClipLoader:
        dataset = self.dataset(split)
        rank, world_size = self._rank()
        return self._loader(
            dataset, _OrderedSampler(len(dataset), self.batch_size, rank, world_size)
        )

    def _loader(
        self,
        dataset: PreparedClips,
        sampler: _TrainSampler | _OrderedSampler,
        position: _Position | None = None,
    ) -> ClipLoader:
        # Decoded clips reach the workers by forking alone; where that is not safe, they need no
        # workers either.
        num_workers = self.num_workers if _CAN_FORK or not self.cache_in_memory else 0
        loader = ClipLoader(dataset, sampler, num_workers, position)
        self._loaders.append(loader)
        return loader

    def _rank(self) -> tuple[int, int]:
        return (
            (self.trainer.global_rank, self.trainer.world_size)
            if self.trainer is not None
            else (0, 1)
        )


class ClipLoader:
    """A loader of batches that counts what it hands out.

    Not a DataLoader itself, so that Lightning leaves its sampler alone; ranks are shared out here.

    Attributes:
        dataset: the clips.
        facts: what each batch says of all of them (see :class:`TalkingHeadDataModule`).
    """

    def __init__(
        self,
        dataset: PreparedClips,
        sampler: _TrainSampler | _OrderedSampler,
        num_workers: int,
        position: _Position | None = None,
    ) -> None:
        self.dataset = dataset
        self.facts: Batch = {
            "audio_margin_frames": (dataset.audio_left_frames, dataset.audio_right_frames),
            "data_dir": dataset.root,
        }
        for name, cache in (("latents_of", dataset.latents), ("speech_of", dataset.speech)):
            if cache is not None:
                self.facts[name] = cache.fingerprint
        self._sampler, self._position = sampler, position
        self._loader: DataLoader[Batch] = DataLoader(
            dataset,
            batch_sampler=sampler,  # type: ignore[arg-type]  # it yields WindowKeys where torch's stubs want integers
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context="fork" if num_workers and _CAN_FORK else None,
            # else every epoch takes a number from the training's random state
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            if self._position is not None:
                # Counted when it is taken: batches that workers prefetched do not count.
                self._position.num_batches += 1
            yield {**self.facts, **batch}

    def sample_batches(self, num_frames: int) -> Iterator[Batch]:
        """One epoch of shuffled training windows of ``num_frames``, on the CPU; the training's own
        order goes on.
        """
        assert isinstance(self._sampler, _TrainSampler)
        dataset = self.dataset.with_window(num_frames)
        loader = ClipLoader(
            dataset, self._sampler.from_start(len(dataset)), self._loader.num_workers
        )
        try:
            for batch in loader:
                yield to_model_batch(batch)
        finally:
            loader.close()

    def close(self) -> None:
        """End the worker processes; the next iteration starts new ones."""
        iterator = self._loader._iterator  # as Lightning does for a plain DataLoader
        if iterator is not None:
            self._loader._iterator = None
            iterator._shutdown_workers()  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """Lightning takes a loader with these two methods for resumable; the data module's state is
        the same.
        """
        return {} if self._position is None else {"num_batches": self._position.num_batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to do: the data module has set the position, for another batch size, too."""


class _Position:
    """Training batches handed out so far to each device."""

    num_batches: int = 0


class _TrainSampler:
    """Batches of keys from an endless sequence of permutations, from the current position on."""

    def __init__(
        self,
        num_clips: int,
        windows_per_clip: int,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        position: _Position | None = None,
    ) -> None:
        self.num_clips, self.windows_per_clip = num_clips, windows_per_clip
        self.epoch_length = num_clips * windows_per_clip
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.position = position or _Position()

    def from_start(self, num_clips: int) -> _TrainSampler:
        """The same for another number of clips, from the first permutation on."""
        order = (self.batch_size, self.seed, self.rank, self.world_size)
        return _TrainSampler(num_clips, self.windows_per_clip, *order)

    def __len__(self) -> int:
        return max(1, self.epoch_length // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[WindowKey]]:
        first = self.position.num_batches
        orders: dict[int, np.ndarray] = {}
        for number in range(first, first + len(self)):
            begin = (number * self.world_size + self.rank) * self.batch_size
            keys = []
            for draw in range(begin, begin + self.batch_size):
                epoch, place = divmod(draw, self.epoch_length)
                if epoch not in orders:
                    order = np.random.default_rng((self.seed, epoch)).permutation(self.epoch_length)
                    orders = {**{e: o for e, o in orders.items() if e == epoch - 1}, epoch: order}
                keys.append(WindowKey(int(orders[epoch][place]) % self.num_clips, draw))
            yield keys


class _OrderedSampler:
    """Every clip once, in order; ranks take turns, and the last ones repeat a clip so that all have
    equally many.
    """

    def __init__(self, num_clips: int, batch_size: int, rank: int, world_size: int) -> None:
        self.indices = [
            i % num_clips for i in range(rank, -(-num_clips // world_size) * world_size, world_size)
        ]
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[WindowKey]]:
        for low in range(0, len(self.indices), self.batch_size):
            yield [WindowKey(i, i) for i in self.indices[low : low + self.batch_size]]


def to_model_batch(batch: Batch) -> Batch:
    """A collated batch with uint8 ``frames`` (B, F, H, W, 3) and ``reference`` (B, H, W, 3) as the
    models take it.

    Returns:
        A new dict: frames (B, 3, F, H, W) and reference (B, 3, H, W) float32 in [-1, 1]; the rest
            unchanged.
    """
    out = dict(batch)
    for name in ("frames", "reference"):
        images: Tensor | None = batch.get(name)
        if images is not None and images.dtype == torch.uint8:
            channels_first = images.movedim(-1, 1)
            floats = channels_first.to(torch.float32, memory_format=torch.contiguous_format)
            out[name] = floats.mul_(1 / 127.5).sub_(1)
    return out
