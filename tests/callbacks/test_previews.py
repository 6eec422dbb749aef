"""Sample videos: what is in them, and that training does not notice."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rest_lightning.callbacks.previews import (
    SampleVideos,
    _log_picture,
    _log_video,
    borrowed_head,
    generate_clip,
)
from rest_lightning.data.layout import read_manifest
from rest_lightning.diffusion.sampling import Guidance, Sampling, SamplingChanges, euler_step
from rest_lightning.media.video import VideoFile, read_clip_audio
from rest_lightning.media.writer import Mp4Writer
from rest_lightning.models.transformer import A2VDiT
from rest_lightning.streaming.engine import to_uint8

OVERLAY = """
trainer:
  logger:
    class_path: lightning.pytorch.loggers.TensorBoardLogger
    init_args: {save_dir: FOLDER, name: "", version: ""}
  check_val_every_n_epoch: 1
  callbacks+:
    - class_path: rest_lightning.callbacks.previews.SampleVideos
      init_args: {num_clips: 3, num_grid_frames: 4}
sampling: {num_steps: 2, guidance: 1.5, shift: 1.0}
"""


# A validation after each epoch of two batches (VAE) or four, and the one after training.
@pytest.mark.parametrize(
    ("stage", "num_frames", "steps"),
    [("vae_whole", 49, [2, 3]), ("teacher", 49, [3]), ("student", 49, [3])],
)
def test_samples_are_written_and_training_is_the_same(
    recipe: Any, tmp_path: Path, stage: str, num_frames: int, steps: list[int]
) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(OVERLAY.replace("FOLDER", str(tmp_path)))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "no sample videos")
        recipe.run(stage, tmp_path, overlays=(overlay,))
    plain, sampled = (
        torch.load(path / "final.ckpt", weights_only=False)
        for path in (recipe.out / stage, tmp_path)
    )
    assert plain["state_dict"].keys() == sampled["state_dict"].keys()
    pairs = {
        name: (value, sampled["state_dict"][name]) for name, value in plain["state_dict"].items()
    }
    different = {
        name: float((a - b).abs().max()) for name, (a, b) in pairs.items() if not torch.equal(a, b)
    }
    assert not different

    (row,) = read_manifest(recipe.data, "val")
    videos = sorted((tmp_path / "samples").iterdir())
    assert [path.name for path in videos] == [
        f"step-{step:06d}-{row.clip_id}.mp4" for step in steps
    ]
    with VideoFile(videos[-1]) as video:
        frames = video.read(0, video.num_frames)
    assert frames.shape == (num_frames, 64, 128, 3)
    start = (row.num_frames - num_frames) // 2
    with VideoFile(recipe.data / "clips" / f"{row.clip_id}.mp4") as video:
        truth = video.read(start, num_frames)
    assert np.abs(frames[:, :, :64].astype(float) - truth).mean() < 6
    assert np.abs(frames[:, :, 64:].astype(float) - truth).mean() > 6  # three steps of training
    audio = read_clip_audio(videos[-1], num_frames)
    spoken = read_clip_audio(recipe.data / "clips" / f"{row.clip_id}.mp4", row.num_frames)
    assert np.corrcoef(audio, spoken[start * 640 :][: len(audio)])[0, 1] > 0.9

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path), {"images": 0}).Reload()
    images = events.Images(f"samples/{row.clip_id}")
    assert [image.step for image in images] == steps
    assert (images[0].width, images[0].height) == (4 * 64, 2 * 64)


def test_without_vae_training_goes_on_with_a_warning(recipe: Any, tmp_path: Path) -> None:
    from rest_lightning.data.window_cache import encode_dataset

    with borrowed_head(recipe.clis["student"].model, Sampling(), 64) as head:
        encode_dataset(
            head.vae,
            recipe.data,
            tmp_path / "latents",
            fingerprint="tiny",
            num_frames=49,
            references_per_clip=1,
            progress=False,
        )
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(
        f"model: {{init_args: {{vae: null, initial: null}}}}\ndata: {{latents_dir: "
        f"{tmp_path / 'latents'}}}\n" + OVERLAY.replace("FOLDER", str(tmp_path))
    )
    configs = ["embedded/teacher", "trainer/tiny", "model/tiny", "data/tiny"]
    words = [word for config in [*configs, str(overlay)] for word in ("--config", config)]
    words += ["--data.data_dir", str(recipe.data), "--trainer.default_root_dir", str(tmp_path)]
    from rest_lightning import lightning_cli

    with pytest.warns(match=r"no sample videos at step .*expected a stage with a vae"):
        cli = lightning_cli.run(["fit", *words])
    assert cli.trainer.global_step == 3
    assert (tmp_path / "final.ckpt").is_file()


def test_stream_of_the_student_equals_a_session(recipe: Any) -> None:
    module = recipe.clis["student"].model
    datamodule = recipe.clis["student"].datamodule
    left, right = datamodule.audio_left_frames, datamodule.audio_right_frames
    reference = torch.rand(1, 3, 64, 64) * 2 - 1
    speech = torch.randn(1, 48 * 640) * 0.1
    silence = [torch.zeros(1, count * 640) for count in (left + 1, right)]
    audio = torch.cat([silence[0], speech, silence[1]], dim=1)
    generator = torch.Generator().manual_seed(3)
    noise = torch.cat([torch.randn(1, 4, 3, 2, 2, generator=generator) for _ in range(2)], dim=2)
    noise = torch.cat([torch.zeros(1, 4, 1, 2, 2), noise], dim=2)
    callback = SampleVideos(sampling=SamplingChanges(num_steps=3, guidance=2.0, shift=1.0))
    module.train()
    flags = [parameter.requires_grad for parameter in module.parameters()]
    modes = [part.training for part in module.modules()]
    video = callback._stream(module, reference, audio, noise, left)
    assert [parameter.requires_grad for parameter in module.parameters()] == flags
    assert [part.training for part in module.modules()] == modes
    with borrowed_head(module, callback.sampling.of(module.sampling), 64) as head:
        assert head.transformer is module.transformer
        expected = head.open(reference[0], seed=3)
        frames = np.concatenate([expected.push(speech[0]), expected.flush()])
    assert torch.equal(video[0, :1], to_uint8(reference[:, :, None])[0])
    assert np.array_equal(video[0, 1:].numpy(), frames)


@pytest.mark.parametrize(
    "guidance", [Guidance(), Guidance(3.0), Guidance(3.0, 2.0), Guidance(1.0, -0.5)], ids=str
)
@pytest.mark.parametrize("num_frames", [4, 7])
def test_generated_clip_is_the_plain_euler_loop(guidance: Guidance, num_frames: int) -> None:
    shape = {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "caption_channels": None,
    }
    transformer = A2VDiT(in_channels=4, speech_dim=8, **shape).eval()
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    reference, noise = torch.randn(2, 4, 1, 2, 2), torch.randn(2, 4, num_frames, 2, 2)
    speech, table = torch.randn(2, num_frames, 2, 8), [1.0, 0.6, 0.0]
    clip = generate_clip(transformer, reference, speech, noise, table, guidance)

    sample = torch.cat([reference, noise[:, :, 1:]], dim=2)
    for sigma, sigma_next in ((1.0, 0.6), (0.6, 0.0)):
        levels, levels_next = (
            torch.full((2, num_frames), sigma),
            torch.full((2, num_frames), sigma_next),
        )
        levels[:, 0] = levels_next[:, 0] = 0
        dropped = sample.clone()
        dropped[:, :, 0] = 0
        with torch.no_grad():
            velocity = guidance.weight * transformer(sample, levels, speech)
            velocity = velocity + guidance.reference_weight * transformer(sample, levels, None)
            rest = 1 - guidance.weight - guidance.reference_weight
            velocity = velocity + rest * transformer(dropped, levels, None)
        sample = euler_step(sample, velocity, levels, levels_next)
    torch.testing.assert_close(clip, sample, atol=1e-4, rtol=1e-4)
    assert torch.equal(clip[:, :, :1], reference)


@pytest.mark.parametrize("kind", ["csv", "wandb", "mlflow"])
def test_pictures_go_to_every_logger_that_takes_them(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard's are looked at above; a CSV logger takes none, and is no error."""
    from lightning.pytorch import loggers

    if kind != "csv":
        pytest.importorskip(kind, reason=f"{kind} is no extra of this package")
    monkeypatch.chdir(tmp_path)
    picture, video = np.zeros((32, 64, 3), np.uint8), np.zeros((10, 32, 64, 3), np.uint8)
    path = tmp_path / "clip.mp4"
    with Mp4Writer(path, (32, 64)) as writer:
        writer.write(video)
    logger: Any = {
        "csv": lambda: loggers.CSVLogger(str(tmp_path / "log")),
        "wandb": lambda: loggers.WandbLogger(save_dir=str(tmp_path / "log"), offline=True),
        "mlflow": lambda: loggers.MLFlowLogger(tracking_uri=(tmp_path / "log").as_uri()),
    }[kind]()
    _log_picture(logger, "samples/a", picture, 3)
    _log_video(logger, "videos/a", video, path, 3)
    if kind == "wandb":
        logger.experiment.finish(quiet=True)
    found = {each.suffix for each in tmp_path.rglob("*") if each != path}
    assert ({".png", ".mp4"} <= found) == (kind != "csv")
