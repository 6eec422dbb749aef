"""The student's own contexts: those of a stream, found without a cache, and what a training step
makes of them.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_student import (
    SPEECH_DIM,
    make_conditions,
    make_student,
    make_transformer,
    save_transformer,
    train_on,
)
from torch import Tensor

from benchmarks._differentiable_cache import DifferentiableCache
from rest_lightning.diffusion.rollout import Context, roll_out
from rest_lightning.diffusion.sampling import Sampling, euler_step
from rest_lightning.diffusion.schedule import sampling_sigmas
from rest_lightning.errors import UserError
from rest_lightning.models.speech import LogMelEncoder
from rest_lightning.models.speech_ae import SpeechAE
from rest_lightning.models.transformer import A2VDiT
from rest_lightning.models.vae import CompactVAE
from rest_lightning.streaming.engine import ChunkEngine
from rest_lightning.talking_head import TalkingHead
from rest_lightning.tasks.student import ASDSettings, RolloutSettings, StudentModule

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "absolute": {"positions": "absolute"},
    "no_sink": {"use_sink": False},
    "first_chunk": {"reference_attends": "first_chunk"},
    "every_chunk": {"reference_attends": "every_chunk"},
    "clean_pass": {"cache_noise": "clean_pass"},
    "detached": {"cache_gradient": "detached"},
    "adjacent": {"first_chunk_slot": "adjacent"},
    "first_chunk_clean": {"reference_attends": "first_chunk", "cache_noise": "clean_pass"},
}


def without_a_cache(
    model: A2VDiT, reference: Tensor, noise: Tensor, speech: Tensor, sigmas: list[float]
) -> tuple[Context, Tensor]:
    """The rollout with a parallel forward of everything so far at every step; also the finished
    samples.
    """
    length = model.cache_options.chunk_length
    fed, levels = reference, torch.zeros(len(noise), 1)
    finished = []
    for start in range(0, noise.shape[2], length):
        sample = noise[:, :, start : start + length]
        seen = slice(0, 1 + start + length)
        for sigma, sigma_next in pairwise(sigmas):
            before, level = sample, sigma
            clip = torch.cat([fed, sample], 2)
            clip_sigma = torch.cat([levels, torch.full((len(clip), length), sigma)], 1)
            velocity = model(
                clip, clip_sigma, speech[:, seen], context_latents=clip, context_sigma=clip_sigma
            )
            sample = euler_step(sample, velocity[:, :, -length:], sigma, sigma_next)
        finished.append(sample)
        if model.cache_options.cache_noise == "clean_pass":
            before, level = sample, 0.0
        fed = torch.cat([fed, before], 2)
        levels = torch.cat([levels, torch.full((len(noise), length), level)], 1)
    return Context(fed, levels), torch.cat(finished, 2)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize(
    ("num_chunks", "chunk_length", "num_steps"), [(1, 3, 2), (2, 1, 4), (3, 2, 1), (4, 3, 2)]
)
def test_contexts_are_those_of_parallel_sampling(
    options: dict[str, Any], num_chunks: int, chunk_length: int, num_steps: int
) -> None:
    model = make_transformer(chunk_length=chunk_length, **options)
    clean = make_conditions(2, 1 + num_chunks * chunk_length, 2, 3)
    reference, noise = clean.latents[:, :, :1], clean.latents[:, :, 1:]
    sigmas = sampling_sigmas(num_steps, 2.0, 0)
    own = roll_out(model, reference, noise, clean.speech_latents, sigmas)
    with torch.no_grad():
        expected, _ = without_a_cache(model, reference, noise, clean.speech_latents, sigmas)
    read = slice(0, -chunk_length)  # the last chunk is nobody's context
    torch.testing.assert_close(
        own.latents[:, :, read], expected.latents[:, :, read], atol=2e-5, rtol=1e-4
    )
    assert torch.equal(own.sigma[:, read], expected.sigma[:, read])
    assert torch.equal(own.latents[:, :, -chunk_length:], noise[:, :, -chunk_length:])
    assert (own.sigma[:, -chunk_length:] == 1).all()
    assert not own.latents.requires_grad


@pytest.mark.parametrize("cache_noise", ["last_step", "clean_pass"])
@pytest.mark.parametrize("reference_attends", ["self", "first_chunk"])
def test_contexts_are_those_of_a_session(cache_noise: str, reference_attends: str) -> None:
    """One more Euler step from the context of ``last_step`` gives the latents that a session
    decodes.
    """
    model = make_transformer(cache_noise=cache_noise, reference_attends=reference_attends)
    vae = CompactVAE(
        latent_channels=4, widths=(8, 16, 16), encoder_blocks=(0, 0, 0), decoder_blocks=(0, 0, 0),
        strides=((4, 2), (2, 2)), patch_size=8, principal_components=0,
    )  # fmt: skip
    speech_ae = SpeechAE(feature_dim=160, num_tokens=2, latent_dim=SPEECH_DIM, width=8)
    head = TalkingHead(vae, LogMelEncoder(), speech_ae, model, Sampling(3, 1.0, 1.0), size_px=64)
    engine = ChunkEngine(head, 2, replace(head.sampling, num_steps=3, guidance=1.0))
    engine.start(torch.zeros(2, 3, 64, 64))
    reference = vae.encode(torch.zeros(2, 3, 1, 64, 64))
    clean = make_conditions(2, 10)
    noise = clean.latents[:, :, 1:]
    own = roll_out(model, reference, noise, clean.speech_latents, engine.sigmas)
    for chunk in range(2):
        frames = slice(1 + 3 * chunk, 4 + 3 * chunk)
        with torch.inference_mode():
            decoded = engine.denoise(clean.latents[:, :, frames], clean.speech_latents[:, frames])
        if cache_noise == "last_step":
            # The last velocity is that of a whole clip whose contexts are all of the rollout.
            with torch.no_grad():
                velocity = model(
                    own.latents,
                    own.sigma,
                    clean.speech_latents,
                    context_latents=own.latents,
                    context_sigma=own.sigma,
                )
            found = euler_step(own.latents, velocity, own.sigma, torch.zeros_like(own.sigma))[
                :, :, frames
            ]
        else:
            found = own.latents[:, :, frames]
        torch.testing.assert_close(found, decoded, atol=2e-5, rtol=1e-4)


def sequential(module: StudentModule, inputs: Any, context: Context) -> Tensor:
    """Velocities chunk after chunk: each is predicted from its noisy latents, then the context goes
    into the cache.
    """
    model, speech = module.transformer, inputs.speech_latents
    noisy, sigma = inputs.path.noisy_latents, inputs.path.sigma
    rows, _, num_frames, height, width = noisy.shape
    cache = model.new_cache(rows, height, width, kind=DifferentiableCache)
    if model.cache_options.reference_attends == "self":
        model.prefill(noisy[:, :, :1], cache)
    out, length = [], model.cache_options.chunk_length
    for start in range(1, num_frames, length):
        together = cache.reference_expected
        read = [0] * together + list(range(start, start + length))
        out.append(
            model(noisy[:, :, read], sigma[:, read], speech[:, read], cache=cache)[:, :, -length:]
        )
        model(context.latents[:, :, read], context.sigma[:, read], speech[:, read], cache=cache)
        cache.commit()
    return torch.cat(out, 2)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize(("num_chunks", "chunk_length"), [(2, 3), (4, 1)])
def test_training_step_is_the_sequential_one(
    options: dict[str, Any], num_chunks: int, chunk_length: int
) -> None:
    """Loss and gradients, where chunk i sees what the rollout of chunk i - 1 left; also through
    keys and values.
    """
    model = make_transformer(chunk_length=chunk_length, **options)
    module = make_student(
        model, rollout=RolloutSettings(2, 1.0, 1.0), identity_dropout=0.4, audio_dropout=0.4
    )
    inputs = module.draw(make_conditions(3, 1 + num_chunks * chunk_length, 2, 3))
    loss = module.losses(inputs)["loss"]
    context = roll_out(
        model,
        inputs.path.noisy_latents[:, :, :1],
        inputs.noise[:, :, 1:],
        inputs.speech_latents,
        [1.0, 0.5, 0.0],
    )
    velocity = sequential(module, inputs, context)
    expected = (velocity - inputs.path.velocity[:, :, 1:]).square().mean()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    weights = list(model.parameters())
    found, wanted = (torch.autograd.grad(x, weights, allow_unused=True) for x in (loss, expected))
    for a, b in zip(found, wanted, strict=True):
        zero = torch.zeros(())
        torch.testing.assert_close(
            zero if a is None else a, zero if b is None else b, atol=2e-5, rtol=1e-3
        )


@pytest.mark.parametrize("cache_noise", ["last_step", "clean_pass"])
def test_rows_that_are_not_rolled_out_are_those_of_plain_training(cache_noise: str) -> None:
    model = make_transformer(cache_noise=cache_noise)
    module, plain = make_student(model, rollout=RolloutSettings(2, 1.0, 0.5)), make_student(model)
    inputs = module.draw(make_conditions(4))
    mask = torch.tensor([True, False, False, True])
    with torch.no_grad():
        mixed = module(inputs, module.own_context(replace(inputs, rolled_out=mask)))
        every = module(
            inputs, module.own_context(replace(inputs, rolled_out=torch.ones_like(mask)))
        )
        truth = plain(inputs)
        torch.testing.assert_close(
            mixed, torch.where(mask[:, None, None, None, None], every, truth)
        )
        assert module.own_context(replace(inputs, rolled_out=~torch.ones_like(mask))) is None
    first, later = slice(1, 4), slice(4, None)
    # the first chunk has no context
    torch.testing.assert_close(every[:, :, first], truth[:, :, first])
    assert float((every - truth)[:, :, later].abs().max()) > 1e-3


@pytest.mark.parametrize("probability", [0.25, 0.5, 1.0])
def test_how_many_samples_are_rolled_out(probability: float) -> None:
    module, plain = make_student(rollout=RolloutSettings(probability=probability)), make_student()
    clean = make_conditions(4000, 4, 1, 1)
    torch.manual_seed(3)
    inputs = module.draw(clean)
    torch.manual_seed(3)
    expected = plain.draw(clean)
    assert float(inputs.rolled_out.float().mean()) == pytest.approx(
        probability, abs=4 * 0.5 / 4000**0.5
    )
    assert expected.rolled_out is None
    assert torch.equal(inputs.path.noisy_latents, expected.path.noisy_latents)
    assert torch.equal(inputs.drops.audio, expected.drops.audio)


def test_teacher_sees_the_whole_noisy_sequence_of_the_draw(tmp_path: Path) -> None:
    teacher = save_transformer(make_transformer("full", seed=5), tmp_path / "teacher.ckpt")
    module = make_student(asd=ASDSettings(teacher), rollout=RolloutSettings(2, 1.0, 1.0))
    inputs = module.draw(make_conditions())
    seen: list[tuple[Tensor, ...]] = []
    module.teacher.register_forward_pre_hook(lambda _, args: seen.append(args))
    terms = module.losses(inputs)
    ((noisy, sigma, speech),) = seen
    assert noisy is inputs.path.noisy_latents
    assert sigma is inputs.path.sigma
    assert speech is inputs.speech_latents
    with torch.no_grad():
        error = module(inputs, module.own_context(inputs)) - module.teacher(noisy, sigma, speech)
    torch.testing.assert_close(terms["teacher_error"], error[:, :, 1:].square().mean())
    terms["loss"].backward()
    assert all(parameter.grad is None for parameter in module.teacher.parameters())


def test_autocast_leaves_every_weight_its_gradient() -> None:
    """The rollout runs without gradients first; casts of weights that it left behind must not serve
    the training.
    """
    module = make_student(rollout=RolloutSettings(2, 1.0, 1.0))
    inputs = module.draw(make_conditions())
    with torch.autocast("cpu", torch.bfloat16):
        loss = module.losses(inputs)["loss"]
    loss.backward()
    assert all(float(weight.grad.abs().max()) > 0 for weight in module.transformer.parameters())


@pytest.mark.parametrize("with_teacher", [False, True])
def test_loss_on_own_contexts_falls(tmp_path: Path, with_teacher: bool) -> None:
    teacher = ASDSettings(save_transformer(make_transformer("full"), tmp_path / "teacher.ckpt"))
    module = make_student(
        asd=teacher if with_teacher else None, rollout=RolloutSettings(2, 1.0, 1.0)
    )
    inputs = module.draw(make_conditions())
    losses = train_on(module, inputs, num_steps=60)
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        validation = module.validation_losses(inputs)
    assert validation.keys() == {"flow_loss", "rollout_flow_loss"}
    assert validation["rollout_flow_loss"] != validation["flow_loss"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, r"expected rollout\.num_steps of at least 1, got 0: use"),
        (
            {"probability": 0.0},
            (
                r"expected a rollout\.probability above 0 and up to 1, got 0\.0: "
                r"use"
            ),
        ),
        (
            {"probability": 1.5},
            (
                r"expected a rollout\.probability above 0 and up to 1, got 1\.5: "
                r"use"
            ),
        ),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RolloutSettings(**settings)


@pytest.mark.parametrize("options", [{"cache_noise": "per_step"}, {"use_context": False}])
def test_caches_without_a_context_to_roll_out(options: dict[str, Any]) -> None:
    with pytest.raises(
        UserError,
        match=("expected a cache of last_step or clean_pass for rollout, got cache_noise"),
    ):
        make_student(make_transformer(**options), rollout=RolloutSettings())
