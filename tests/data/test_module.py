from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rest_lightning.constants import SAMPLES_PER_FRAME
from rest_lightning.data.clips import ClipError
from rest_lightning.data.layout import clip_path
from rest_lightning.data.module import (
    TalkingHeadDataModule,
    _OrderedSampler,
    _Position,
    _TrainSampler,
    to_model_batch,
)
from rest_lightning.data.window_cache import encode_dataset
from rest_lightning.errors import UserError
from rest_lightning.media.video import read_frames
from rest_lightning.torchvision_compat import ensure_torchvision

ensure_torchvision()
import lightning  # noqa: E402


def module(data_dir: Path, **changes: Any) -> TalkingHeadDataModule:
    settings: dict[str, Any] = {
        "batch_size": 3,
        "num_frames": 9,
        "num_workers": 0,
        "progress": False,
    }
    return TalkingHeadDataModule(str(data_dir), **settings | changes)


def identity(batch: dict[str, Any]) -> list[Any]:
    """A batch as plain values, to compare."""
    return [
        sorted(batch),
        *(v.nan_to_num(-9).tolist() if isinstance(v, Tensor) else v for v in batch.values()),
    ]


def take(batches: Iterable[dict[str, Any]], count: int) -> list[Any]:
    return [identity(batch) for batch in itertools.islice(batches, count)]


def epochs(data: TalkingHeadDataModule, count: int) -> list[Any]:
    loader = data.train_dataloader()
    try:
        return [identity(batch) for _ in range(count) for batch in loader]
    finally:
        data.teardown()


@pytest.mark.parametrize(
    ("batch_size", "num_frames", "left", "right"), [(1, 9, 8, 4), (3, 17, 0, 0), (4, 41, 2, 9)]
)
def test_batch_is_as_promised(
    dataset_dir: Path, batch_size: int, num_frames: int, left: int, right: int
) -> None:
    data = module(
        dataset_dir,
        batch_size=batch_size,
        num_frames=num_frames,
        audio_left_frames=left,
        audio_right_frames=right,
    )
    batch = next(iter(data.train_dataloader()))
    assert batch["frames"].dtype == torch.uint8
    out = data.on_after_batch_transfer(batch)
    shapes = {name: tuple(value.shape) for name, value in out.items() if isinstance(value, Tensor)}
    assert shapes == {
        "frames": (batch_size, 3, num_frames, 32, 32),
        "reference": (batch_size, 3, 32, 32),
        "audio": (batch_size, SAMPLES_PER_FRAME * (left + num_frames + right)),
        "mouth_opening": (batch_size, num_frames),
        "landmarks": (batch_size, num_frames, 3, 2),
        "start": (batch_size,),
    }
    assert all(out[name].dtype == torch.float32 for name in shapes if name != "start")
    assert out["frames"].is_contiguous()
    assert len(out["clip_id"]) == batch_size
    for row, clip_id in enumerate(out["clip_id"]):
        frames = read_frames(clip_path(dataset_dir, clip_id), int(out["start"][row]), num_frames)
        expected = torch.from_numpy(frames).permute(3, 0, 1, 2) / 127.5 - 1
        torch.testing.assert_close(out["frames"][row], expected, atol=1e-6, rtol=0)
    assert torch.equal(out["reference"], out["frames"][:, :, 0])


def test_range_of_the_models_pictures() -> None:
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16, 1).expand(1, 1, 16, 16, 3)
    out = to_model_batch({"frames": values})["frames"]
    assert (out.min().item(), out.max().item()) == (-1.0, 1.0)
    assert torch.equal(((out + 1) * 127.5).round().to(torch.uint8).movedim(1, -1), values)


@pytest.mark.parametrize(
    "settings", [{}, {"cache_in_memory": True}, {"augment": True, "reference": "random_frame"}]
)
def test_workers_change_nothing(dataset_dir: Path, settings: dict[str, Any]) -> None:
    """Two worker processes give the batches of none; epochs differ; the seed decides."""
    alone, helped = (
        epochs(module(dataset_dir, num_workers=n, batch_size=2, **settings), 3) for n in (0, 2)
    )
    assert alone == helped
    assert len(alone) == 6
    assert len({repr(batch[-1]) + repr(batch[-2]) for batch in alone}) == 6
    other = epochs(module(dataset_dir, batch_size=2, seed=1, **settings), 3)
    assert alone != other


def test_an_epoch_holds_every_clip_once(dataset_dir: Path) -> None:
    data = module(dataset_dir, batch_size=2, windows_per_clip=3)
    loader = data.train_dataloader()
    for _ in range(3):
        ids = [clip_id for batch in loader for clip_id in batch["clip_id"]]
        assert sorted(ids) == sorted([f"clip-{i:03d}" for i in range(4)] * 3)
    assert len(loader) == 6


@pytest.mark.parametrize("batch_size", [3, 7])
def test_batches_that_do_not_divide_the_clips(dataset_dir: Path, batch_size: int) -> None:
    data = module(dataset_dir, batch_size=batch_size)
    loader = data.train_dataloader()
    ids = [clip_id for _ in range(12) for batch in loader for clip_id in batch["clip_id"]]
    assert len(ids) == 12 * batch_size
    counts = {ids.count(f"clip-{i:03d}") for i in range(4)}
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_clips(world_size: int) -> None:
    def keys(rank: int) -> list[Any]:
        sampler = _TrainSampler(24, 1, 2, 0, rank, world_size, _Position())
        return [key for batch in sampler for key in batch]

    drawn = [key for rank in range(world_size) for key in keys(rank)]
    assert sorted(key.clip for key in drawn) == list(range(24))
    assert sorted(key.draw for key in drawn) == list(range(24))
    ordered = [
        [key.clip for batch in _OrderedSampler(7, 2, rank, world_size) for key in batch]
        for rank in range(world_size)
    ]
    assert len({len(clips) for clips in ordered}) == 1
    assert set(itertools.chain(*ordered)) == set(range(7))


@pytest.mark.parametrize(("num_workers", "stop_after"), [(0, 3), (0, 4), (0, 6), (2, 3)])
def test_a_resumed_loader_gives_the_next_batches(
    dataset_dir: Path, num_workers: int, stop_after: int
) -> None:
    whole = epochs(module(dataset_dir, batch_size=1, augment=True), 2)
    first = module(dataset_dir, batch_size=1, augment=True, num_workers=num_workers)
    loader = first.train_dataloader()
    seen = take(itertools.chain(loader, loader), stop_after)
    second = module(dataset_dir, batch_size=1, augment=True, num_workers=num_workers)
    second.load_state_dict(first.state_dict())
    rest = second.train_dataloader()
    assert seen + take(itertools.chain(rest, rest), 8 - stop_after) == whole
    first.teardown()
    second.teardown()
    with pytest.raises(UserError, match="expected the checkpoint's data seed 0, got 5"):
        module(dataset_dir, seed=5).load_state_dict(first.state_dict())


class Recorder(lightning.LightningModule):
    """A model that remembers its batches, with weights that depend on all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen: list[Any] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.seen.append(
            identity(
                {"clip_id": batch["clip_id"], "start": batch["start"], "audio": batch["audio"]}
            )
        )
        out: Tensor = self.layer(batch["frames"].mean().reshape(1, 1))
        return (out - batch["audio"].std() + torch.rand(1)).square().mean()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        assert batch["frames"].is_floating_point()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def fit(
    data_dir: Path, folder: Path, max_steps: int, ckpt: str | None = None, **settings: Any
) -> Recorder:
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            lightning.pytorch.callbacks.ModelCheckpoint(
                folder, every_n_train_steps=1, save_top_k=-1
            )
        ],
        **settings,
    )
    torch.manual_seed(0)
    model = Recorder()
    trainer.fit(
        model,
        datamodule=module(data_dir, batch_size=1, augment=True, num_workers=2),
        ckpt_path=ckpt,
    )
    return model


def test_a_resumed_fit_goes_on_with_the_next_batch(dataset_dir: Path, tmp_path: Path) -> None:
    """At an epoch's end (4) and within one (7): an epoch has 4 batches."""
    whole = fit(dataset_dir, tmp_path / "whole", 10)
    assert len(whole.seen) == 10
    for steps in (4, 7):
        (ckpt,) = (tmp_path / "whole").glob(f"*step={steps}.ckpt")
        resumed = fit(dataset_dir, tmp_path / f"from-{steps}", 10, str(ckpt))
        assert resumed.seen == whole.seen[steps:]


def test_limited_epochs_see_all_clips(dataset_dir: Path, tmp_path: Path) -> None:
    model = fit(dataset_dir, tmp_path, 8, limit_train_batches=1)
    ids = [batch[1][0] for batch in model.seen]
    assert {tuple(sorted(ids[:4])), tuple(sorted(ids[4:]))} == {
        tuple(f"clip-{i:03d}" for i in range(4))
    }


def test_global_random_state_is_left_alone(dataset_dir: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    epochs(module(dataset_dir, num_workers=2), 2)
    assert torch.equal(before, torch.get_rng_state())


def test_validation_and_test_are_fixed(dataset_dir: Path) -> None:
    data = module(dataset_dir, augment=True, num_frames=17, num_frames_train=9)
    data.setup("fit")
    assert next(iter(data.train_dataloader()))["frames"].shape[1] == 9
    val = data.val_dataloader()
    assert [identity(batch) for batch in val] == [identity(batch) for batch in val]
    (batch,) = data.test_dataloader()
    assert (batch["clip_id"], batch["start"].tolist(), batch["frames"].shape[1]) == (
        ["clip-005"],
        [12],
        17,
    )


def test_no_validation_clips(make: Any, tmp_path: Path) -> None:
    data = module(make.dataset(tmp_path, num_frames=(41,), splits=("train",)))
    data.setup("fit")
    assert data.val_dataloader() == []
    with pytest.raises(UserError, match="expected test clips of 9 frames or more, got none"):
        data.test_dataloader()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_errors_of_workers_are_one_line(make: Any, tmp_path: Path, num_workers: int) -> None:
    root = make.dataset(tmp_path)
    for i in range(4):
        clip_path(root, f"clip-{i:03d}").write_bytes(b"nothing")
    with pytest.raises(
        ClipError,
        match=(
            r"^\S+: expected at most 0 unreadable train clips, got 1 "
            r"of 4"
        ),
    ) as caught:
        epochs(module(root, num_workers=num_workers), 1)
    assert "\n" not in str(caught.value)


def test_report_is_beside_the_run(make: Any, tmp_path: Path) -> None:
    root = make.dataset(tmp_path / "talkers")
    clip_path(root, "clip-002").write_bytes(b"nothing")
    data = module(root, batch_size=1, num_workers=2, max_corrupt=0.5)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=lightning.pytorch.loggers.CSVLogger(tmp_path, name="run", version=0),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Recorder(), datamodule=data)
    assert "clip-002" in (tmp_path / "run" / "version_0" / "corrupt_clips.jsonl").read_text()
    assert data.dataset("train").corrupt_clip_ids == ["clip-002"]
    assert not multiprocessing.active_children()  # the fit has ended its workers


class HalvingVAE:
    def encode(self, frames: Tensor) -> Tensor:
        return nn.functional.avg_pool3d(frames, (1, 16, 16))[:, :, ::8]


@pytest.mark.parametrize(("cache_in_memory", "num_workers"), [(False, 0), (False, 2), (True, 0)])
def test_latents_instead_of_frames(
    dataset_dir: Path, tmp_path: Path, cache_in_memory: bool, num_workers: int
) -> None:
    settings: dict[str, Any] = {
        "fingerprint": "v1",
        "num_frames": 9,
        "dtype": "float32",
        "progress": False,
    }
    encode_dataset(HalvingVAE(), dataset_dir, tmp_path, windows_per_clip=3, **settings)
    data = module(
        dataset_dir,
        latents_dir=str(tmp_path),
        cache_in_memory=cache_in_memory,
        num_workers=num_workers,
        augment=True,
    )
    for loader in (data.train_dataloader(), data.test_dataloader()):
        batch = data.on_after_batch_transfer(next(iter(loader)))
        assert "frames" not in batch
        assert batch["latents"].shape[1:] == (3, 2, 2, 2)
        for row, clip_id in enumerate(batch["clip_id"]):
            frames = read_frames(clip_path(dataset_dir, clip_id), int(batch["start"][row]), 9)
            pictures = torch.from_numpy(frames).permute(3, 0, 1, 2)[None] / 127.5 - 1
            torch.testing.assert_close(batch["latents"][row], HalvingVAE().encode(pictures)[0])
        assert batch["latents_of"] == "v1"
    with pytest.raises(UserError, match="expected latents of the VAE v2, got those of v1"):
        module(dataset_dir, latents_dir=str(tmp_path), latents_fingerprint="v2").setup("fit")
    with pytest.raises(UserError, match="expected latents of 17 frames, got 9"):
        module(dataset_dir, latents_dir=str(tmp_path), num_frames_train=9, num_frames=17).setup(
            "fit"
        )


def test_samples_of_another_length_leave_the_training_order_alone(dataset_dir: Path) -> None:
    data = module(dataset_dir, num_frames_train=1, cache_in_memory=True)
    expected = [batch["start"].tolist() for batch in data.train_dataloader()]
    data = module(dataset_dir, num_frames_train=1, cache_in_memory=True)
    loader = data.train_dataloader()
    samples = list(loader.sample_batches(17))
    assert [batch["start"].tolist() for batch in loader] == expected
    for batch in samples:
        assert batch["frames"].shape[2] == batch["mouth_opening"].shape[1] == 17
        for frames, clip_id, start in zip(
            batch["frames"], batch["clip_id"], batch["start"].tolist(), strict=True
        ):
            truth = torch.from_numpy(
                read_frames(clip_path(dataset_dir, clip_id), start, 17)
            ).permute(3, 0, 1, 2)
            torch.testing.assert_close(frames, truth / 127.5 - 1)
    with pytest.raises(UserError, match="expected train clips of 9001 frames or more, got none"):
        next(loader.sample_batches(9001))


def test_settings_that_cannot_be(dataset_dir: Path) -> None:
    with pytest.raises(UserError, match="expected batch_size of at least 1, got 0"):
        module(dataset_dir, batch_size=0)
    with pytest.raises(UserError, match="expected 64x64 pixels, got 32x32"):
        module(dataset_dir, size_px=64).setup("fit")
    with pytest.raises(UserError, match="make one with `rest synthesize"):
        module(dataset_dir / "nothing").setup("fit")


def test_augmentation_is_for_training_alone(dataset_dir: Path) -> None:
    plain, augmented = (module(dataset_dir, augment=augment) for augment in (False, True))
    one, other = (next(iter(data.test_dataloader()))["audio"] for data in (plain, augmented))
    assert torch.equal(one, other)
    one, other = (next(iter(data.train_dataloader()))["audio"] for data in (plain, augmented))
    assert np.abs((one - other).numpy()).max() > 0
