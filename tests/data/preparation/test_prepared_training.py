"""Raw videos of talkers, prepared by the command, train a VAE, a SpeechAE and a teacher as rendered
clips do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rest_lightning.cli import main
from rest_lightning.data.layout import clip_path, read_manifest, read_sidecar
from rest_lightning.data.module import TalkingHeadDataModule
from rest_lightning.media.video import read_clip_audio, read_frames

LEFT, TOP, SIDE = 150, 40, 256  # of the talker in the raw frame
HEIGHT, WIDTH = 320, 480


def raw_frames(talker: np.ndarray, seed: int) -> np.ndarray:
    """A talker's frames, enlarged, in a larger noisy scene: uint8 (F, 320, 480, 3)."""
    rng = np.random.default_rng(seed)
    scene = rng.integers(0, 255, (10, 15, 3), dtype=np.uint8)
    frames = np.stack([np.asarray(Image.fromarray(scene).resize((WIDTH, HEIGHT)))] * len(talker))
    frames = np.clip(frames + rng.normal(0, 8, frames.shape), 0, 255).astype(np.uint8)
    for frame, picture in zip(frames, talker, strict=True):
        frame[TOP : TOP + SIDE, LEFT : LEFT + SIDE] = np.asarray(
            Image.fromarray(picture).resize((SIDE, SIDE))
        )
    return frames


@pytest.fixture(scope="module")
def prepared(talkers: Path, make: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six videos in folders as people have them, one of them broken, through `rest prepare`."""
    raw, out = (tmp_path_factory.mktemp(name) for name in ("raw", "prepared"))
    for number, row in enumerate(read_manifest(talkers)):
        frames = raw_frames(read_frames(clip_path(talkers, row.clip_id)), number)
        sound = read_clip_audio(clip_path(talkers, row.clip_id), row.num_frames)
        make.mp4(raw / f"talk {number}.mp4", frames, sound, crf=10)
    (raw / "cut.mp4").write_bytes((raw / "talk 0.mp4").read_bytes()[:5000])
    words = [
        "prepare",
        str(raw),
        "--out",
        str(out),
        "--box",
        f"{LEFT},{TOP},{SIDE},{SIDE}",
        "--size-px",
        "128",
    ]
    words += [
        "--min-frames",
        "49",
        "--val-fraction",
        "0.1",
        "--test-fraction",
        "0.1",
        "--num-workers",
        "1",
        "--quiet",
    ]
    for name in ("max_text", "max_flow", "min_sharpness"):
        words += [f"--{name}", "null"]
    assert main(words) == 0
    return out


@pytest.mark.slow
def test_clips_are_the_talkers(prepared: Path, talkers: Path) -> None:
    rows, truth = read_manifest(prepared), read_manifest(talkers)
    assert len(rows) == len(truth) == 6
    for row in rows:
        source = read_sidecar(prepared, row.clip_id).source
        true = truth[int(source.removeprefix("talk ").removesuffix(".mp4"))]
        got, expected = (
            read_frames(clip_path(root, r.clip_id))
            for root, r in ((prepared, row), (talkers, true))
        )
        assert got.shape == (57, 128, 128, 3)
        wide = np.stack(
            [np.asarray(Image.fromarray(frame).resize((128, 128))) for frame in expected]
        )
        error = np.abs(got.astype(int) - wide).mean((1, 2, 3))
        assert error.max() < 4, (
            "every frame at its time and place, but for two encoders and their resizing"
        )
        assert error.max() < np.abs(got[10].astype(int) - wide[40]).mean() + 4
        ours = read_clip_audio(clip_path(prepared, row.clip_id), 57)
        theirs = read_clip_audio(clip_path(talkers, true.clip_id), 57)
        assert np.corrcoef(ours, theirs)[0, 1] > 0.95


@pytest.mark.slow
def test_batches_are_those_of_rendered_clips(prepared: Path, talkers: Path) -> None:
    batches = []
    for root in (prepared, talkers):
        data = TalkingHeadDataModule(
            str(root), batch_size=2, num_frames=49, num_workers=0, progress=False
        )
        batches.append(data.on_after_batch_transfer(next(iter(data.train_dataloader()))))
        data.teardown()
    ours, theirs = batches
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor) and name not in ("frames", "reference"):
            assert (ours[name].shape, ours[name].dtype) == (value.shape, value.dtype)
    assert ours["frames"].shape == (2, 3, 49, 128, 128)
    assert ours["audio"].abs().max() > 0.05
    assert bool(ours["mouth_opening"].isnan().all()), "no renderer knows it"


@pytest.mark.slow
def test_it_trains_a_vae_and_a_teacher(
    prepared: Path, recipe_class: Any, repository: Path, tmp_path: Path
) -> None:
    recipe = recipe_class(tmp_path, prepared, repository)
    recipe.vae_stage = "vae"
    # 128 pixels where the tiny configuration has 64
    large = "--data.size_px=128"
    wider = "--model.transformer.init_args.spatial_embedding=[4,4]"
    for stage, words in (("vae", ()), ("speech_ae", ()), ("teacher", (wider,))):
        cli = recipe.run(stage, tmp_path / stage, large, *words)
        assert cli.trainer.global_step == 3
        losses = [
            value
            for name, value in cli.trainer.logged_metrics.items()
            if name.startswith(("train/", "val/"))
        ]
        assert losses
        assert all(bool(torch.isfinite(value).all()) for value in losses)
        assert recipe.final(stage).is_file()
        assert not list(tmp_path.rglob("corrupt_clips.jsonl"))
    start = recipe.run(
        "teacher",
        tmp_path / "none",
        large,
        wider,
        "--trainer.max_steps=0",
        "--final_checkpoint=false",
    )
    before, after = start.model.transformer.state_dict(), cli.model.transformer.state_dict()
    assert any(not torch.equal(value, after[name]) for name, value in before.items())
