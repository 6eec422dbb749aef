"""Teacher and student: what they are fed, what they refuse, and that they learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rest_lightning.diffusion.losses import flow_matching_loss
from rest_lightning.diffusion.sampling import Sampling
from rest_lightning.errors import UserError
from rest_lightning.models.cache import CacheOptions
from rest_lightning.models.speech import LogMelEncoder
from rest_lightning.models.speech_ae import SpeechAE
from rest_lightning.models.transformer import A2VDiT
from rest_lightning.parts import build_part, read_part, read_sampling
from rest_lightning.talking_head import TalkingHead
from rest_lightning.tasks.a2v import Conditions, NoiseSettings
from rest_lightning.tasks.base import OptimizerSettings
from rest_lightning.tasks.regions import region_weights, token_weights
from rest_lightning.tasks.student import ASDSettings, StudentModule
from rest_lightning.tasks.teacher import TeacherModule

SHAPE = {
    "in_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "speech_dim": 8,
}


def transformer(attention: str, chunk_length: int = 3, **changes: Any) -> A2VDiT:
    options = CacheOptions(chunk_length=chunk_length)
    config = {**SHAPE, "caption_channels": None, "spatial_embedding": (2, 2), **changes}
    return A2VDiT(**config, attention=attention, cache_options=options)  # type: ignore[arg-type]


def speech_parts() -> dict[str, Any]:
    speech_ae = SpeechAE(feature_dim=160, num_tokens=2, latent_dim=8, width=8)
    return {"speech_ae": speech_ae, "speech_encoder": LogMelEncoder(lookahead_frames=2)}


def student(recipe: Any = None, asd: bool = False, **noise: Any) -> StudentModule:
    settings = ASDSettings(str(recipe.final("teacher"))) if asd else None
    optimizer = OptimizerSettings(lr=3e-3, warmup_steps=1)
    return StudentModule(
        transformer("chunked"),
        **speech_parts(),
        noise=NoiseSettings(**noise),
        asd=settings,
        optimizer=optimizer,
    )


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("teacher", Sampling(8, 4.0, 1.0, -3.0)),
        ("asd", Sampling(8, 4.0, 1.0, -3.0)),
        ("distill", Sampling(2, 1.0, 1.0, table_steps=8)),
    ],
)
def test_a_checkpoint_remembers_the_sampling_of_its_stage(
    recipe: Any, stage: str, expected: Sampling
) -> None:
    assert read_sampling(recipe.final(stage)) == recipe.clis[stage].model.sampling == expected


def conditions(batch: int = 2, num_frames: int = 7, seed: int = 0) -> Conditions:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 4, num_frames, 2, 2, generator=generator)
    return Conditions(latents, torch.randn(batch, num_frames, 2, 8, generator=generator))


@pytest.mark.parametrize("seed", range(3))
def test_asd_feeds_teacher_and_student_the_same(recipe: Any, seed: int) -> None:
    module = student(recipe, asd=True, identity_dropout=0.5, audio_dropout=0.5, motion_dropout=0.5)
    seen: dict[str, tuple[Tensor, ...]] = {}
    for name in ("transformer", "teacher"):
        getattr(module, name).register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args})
        )
    torch.manual_seed(seed)
    inputs = module.draw(conditions(batch=8, seed=seed))
    terms = module.losses(inputs)
    assert len(seen["transformer"]) == 3
    assert all(torch.equal(a, b) for a, b in zip(seen["transformer"], seen["teacher"], strict=True))
    noisy, sigma, speech = seen["transformer"]
    assert torch.equal((noisy[:, :, 0] == 0).all(dim=(1, 2, 3)), inputs.drops.identity)
    assert torch.equal((speech == 0).all(dim=(1, 2, 3)), inputs.drops.audio)
    assert (sigma[:, 0] == 0).all()
    assert terms["loss"].requires_grad
    terms["loss"].backward()
    assert all(parameter.grad is None for parameter in module.teacher.parameters())  # type: ignore[union-attr]
    assert (
        sum(
            float(p.grad.abs().sum()) for p in module.transformer.parameters() if p.grad is not None
        )
        > 0
    )


@pytest.mark.parametrize(("schedule", "chunk_length"), [("cans", 1), ("cans", 3), ("ans", 3)])
def test_draws_follow_the_global_random_state_alone(schedule: str, chunk_length: int) -> None:
    module = TeacherModule(
        transformer("full"), **speech_parts(), noise=NoiseSettings(schedule, chunk_length)
    )
    clean = conditions()
    torch.manual_seed(5)
    first, second = module.draw(clean), module.draw(clean)
    torch.manual_seed(5)
    again = module.draw(clean)
    assert torch.equal(first.path.noisy_latents, again.path.noisy_latents)
    assert torch.equal(first.path.sigma, again.path.sigma)
    assert not torch.equal(first.path.noisy_latents, second.path.noisy_latents)
    noise = first.path.velocity + clean.latents
    level = first.path.sigma[:, None, :, None, None]
    torch.testing.assert_close(
        first.path.noisy_latents[:, :, 1:], ((1 - level) * clean.latents + level * noise)[:, :, 1:]
    )


@pytest.mark.parametrize("kind", ["teacher", "student", "asd"])
def test_loss_falls_on_one_batch(recipe: Any, kind: str) -> None:
    torch.manual_seed(0)
    if kind == "teacher":
        optimizer_settings = OptimizerSettings(lr=3e-3, warmup_steps=1)
        module: Any = TeacherModule(
            transformer("full"), **speech_parts(), optimizer=optimizer_settings
        )
    else:
        module = student(recipe, asd=kind == "asd")
    inputs = module.draw(conditions())
    optimizer = module.configure_optimizers()["optimizer"]
    losses = []
    for _ in range(60):
        loss = module.losses(inputs)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses[::10]


@pytest.mark.parametrize(("num_frames", "chunk_length"), [(1, 3), (6, 3), (8, 3), (4, 2)])
def test_clips_that_are_no_whole_number_of_chunks(num_frames: int, chunk_length: int) -> None:
    module = TeacherModule(
        transformer("full"), **speech_parts(), noise=NoiseSettings(chunk_length=chunk_length)
    )
    with pytest.raises(
        UserError,
        match=(
            rf"expected clips of 1 \+ {chunk_length}k latent frames, "
            rf"got {num_frames}:"
        ),
    ):
        module.conditions(
            {"latents": torch.zeros(1, 4, num_frames, 2, 2), "audio": torch.zeros(1, 640)}
        )


def test_settings_that_do_not_fit(recipe: Any) -> None:
    parts = speech_parts()
    with pytest.raises(UserError, match="expected a student with attention 'chunked'"):
        StudentModule(transformer("full"), **parts)
    with pytest.raises(UserError, match="expected a teacher with attention 'full'"):
        TeacherModule(transformer("chunked"), **parts)
    with pytest.raises(UserError, match=r"expected one chunk length, got 2 .* and 3 in noise"):
        StudentModule(transformer("chunked", chunk_length=2), **parts)
    with pytest.raises(UserError, match="expected a noise schedule of cans, ans, got 'dans'"):
        NoiseSettings("dans")
    with pytest.raises(
        UserError,
        match=(
            r"expected a teacher of the student's shape, got "
            r"num_layers 2 in .* against 3"
        ),
    ):
        StudentModule(
            transformer("chunked", num_layers=3),
            **parts,
            asd=ASDSettings(str(recipe.final("teacher"))),
        )
    with pytest.raises(
        UserError, match=("expected a teacher with attention 'full', got a student in")
    ):
        StudentModule(
            transformer("chunked"), **parts, asd=ASDSettings(str(recipe.final("student")))
        )
    with pytest.raises(UserError, match="got no such file"):
        StudentModule(transformer("chunked"), **parts, asd=ASDSettings("absent.ckpt"))


def test_frames_need_a_vae() -> None:
    module = student()
    with pytest.raises(
        UserError,
        match=("expected batches with precomputed latents, got frames: give this stage a vae"),
    ):
        module.conditions({"frames": torch.zeros(1, 3, 25, 64, 64), "audio": torch.zeros(1, 640)})


def test_margins_of_audio_that_are_too_small(recipe: Any, tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=(
            r"expected at least \d+ and 2 frames of audio around a "
            r"clip .* and 1: raise"
        ),
    ):
        recipe.run("speech_ae", tmp_path, "--data.audio_right_frames=1", "--final_checkpoint=false")


@pytest.mark.parametrize("random_frame", [False, True])
def test_conditions_of_frames_and_of_latents_are_the_same(recipe: Any, random_frame: bool) -> None:
    module, datamodule = recipe.clis["asd"].model, recipe.clis["asd"].datamodule
    batch = datamodule.on_after_batch_transfer(next(iter(datamodule.val_dataloader())))
    if random_frame:
        batch["reference"] = torch.rand_like(batch["reference"]) * 2 - 1
    module.eval()
    with torch.no_grad():
        from_frames = module.conditions(batch)
        frames = batch["frames"].clone()
        frames[:, :, 0] = batch["reference"]
        reference = module.vae.encode(batch["reference"][:, :, None])
        latents = torch.cat([reference, module.vae.encode(batch["frames"])[:, :, 1:]], dim=2)
        cached = {
            name: value for name, value in batch.items() if name not in ("frames", "reference")
        }
        from_latents = module.conditions(cached | {"latents": latents})
    torch.testing.assert_close(from_frames.latents, from_latents.latents, atol=1e-5, rtol=1e-5)
    assert torch.equal(from_frames.speech_latents, from_latents.speech_latents)
    assert from_frames.speech_latents.shape[:2] == (len(latents), latents.shape[2])


def test_validation_draws_the_same_every_time(recipe: Any) -> None:
    module = recipe.clis["student"].model
    clean = conditions()
    generators = [torch.Generator().manual_seed(4) for _ in range(2)]
    first, second = (module.draw(clean, generator) for generator in generators)
    assert torch.equal(first.path.noisy_latents, second.path.noisy_latents)
    with torch.no_grad():
        loss = flow_matching_loss(module(first), first.path.velocity)
    assert torch.isfinite(loss)


def test_checkpoint_to_model_folder_gives_the_same_frames(
    recipe: Any, model_folder: Path, tmp_path: Path
) -> None:
    sources = {"vae": recipe.vae_stage, "speech_ae": "asd", "transformer": "asd"}
    parts: dict[str, Any] = {"speech_encoder": LogMelEncoder(lookahead_frames=2)}
    for name, stage in sources.items():
        description, state = read_part(name, recipe.final(stage))
        parts[name] = build_part(description)
        parts[name].load_state_dict(state)
    head = TalkingHead(**parts, sampling=Sampling(2, 1.0, 1.0), size_px=64)
    samples = np.random.default_rng(0).normal(scale=0.1, size=50_000).astype(np.float32)
    portrait = torch.rand(3, 64, 64) * 2 - 1

    def frames(model: TalkingHead) -> np.ndarray:
        session = model.open(portrait)
        return np.concatenate([session.push(samples), session.flush()])

    expected = frames(head)
    assert expected.std() > 5
    assert np.array_equal(frames(TalkingHead.from_pretrained(model_folder)), expected)
    again = tmp_path / "again"
    TalkingHead.from_pretrained(model_folder).save_pretrained(again)
    assert np.array_equal(frames(TalkingHead.from_pretrained(again)), expected)


@pytest.mark.parametrize(("mouth", "size"), [(4.0, (2, 2)), (3.0, (4, 6))])
def test_token_weights_are_the_mean_of_the_pixels_in_each_token(
    mouth: float, size: tuple[int, int]
) -> None:
    height, width = size
    landmarks = torch.rand(2, 17, 3, 2, generator=torch.Generator().manual_seed(0))
    landmarks[1, 9:] = float("nan")  # unknown
    weights = token_weights(landmarks, height, width, mouth)
    assert weights.shape == (2, 1, 3, height, width)
    pixels = region_weights(landmarks, (64 * height, 64 * width), mouth, 1.0)[:, 0].numpy()
    for slot, frames in enumerate((slice(0, 1), slice(1, 9), slice(9, 17))):
        for y, x in np.ndindex(height, width):
            place = pixels[:, frames, 64 * y : 64 * (y + 1), 64 * x : 64 * (x + 1)].mean(
                axis=(1, 2, 3)
            )
            np.testing.assert_allclose(
                weights[:, 0, slot, y, x].numpy(), place, atol=0.12 * (mouth - 1)
            )
    assert (weights[1, 0, 2] == 1).all()


def test_mouth_weight_weighs_the_flow_loss_and_nothing_else() -> None:
    weights = torch.ones(2, 1, 7, 2, 2)
    weights[..., 1, 1] = 3.0
    clean = conditions()
    for module in (student(), TeacherModule(transformer("full"), **speech_parts())):
        torch.manual_seed(1)
        plain = module.draw(clean)
        torch.manual_seed(1)
        weighted = module.draw(Conditions(clean.latents, clean.speech_latents, weights))
        assert torch.equal(plain.path.noisy_latents, weighted.path.noisy_latents)
        error = (module(plain) - plain.path.velocity)[:, :, 1:].square().double()
        expected = (error * weights[:, :, 1:]).sum() / (weights[:, :, 1:].sum() * 4)
        assert float(module.losses(weighted)["loss"]) == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(UserError, match=r"expected a mouth_weight above 0, got 0\.0"):
        TeacherModule(transformer("full"), **speech_parts(), mouth_weight=0.0)
