"""Guidance and step distillation: its targets by hand, by another formula, and by a guided stream
with caches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_student import make_conditions, make_student, make_transformer, save_transformer, train_on
from torch import Tensor

from rest_lightning.diffusion.rollout import Context
from rest_lightning.diffusion.sampling import Sampling, euler_step, integrate, joint_guidance
from rest_lightning.diffusion.schedule import ltx_sigma_table, sampling_sigmas, sigma_table
from rest_lightning.diffusion.step_distillation import (
    average_velocity,
    guided_velocity,
    levels_of_steps,
    sample_sigmas_of_steps,
)
from rest_lightning.errors import UserError
from rest_lightning.models.transformer import A2VDiT
from rest_lightning.tasks.a2v import TrainingInput
from rest_lightning.tasks.student import ASDSettings, DistillSettings, RolloutSettings


@pytest.mark.parametrize(
    ("num_steps", "num_chunks", "chunk_length"), [(1, 1, 1), (2, 4, 3), (4, 3, 2), (8, 2, 3)]
)
def test_levels_are_those_of_the_steps_and_equally_likely(
    num_steps: int, num_chunks: int, chunk_length: int
) -> None:
    table, batch = sigma_table(num_steps, 2.0), 3000
    generator = torch.Generator().manual_seed(0)
    sigma = sample_sigmas_of_steps(batch, num_chunks, chunk_length, table, generator=generator)
    assert sigma.shape == (batch, 1 + num_chunks * chunk_length)
    assert (sigma[:, 0] == 0).all()
    chunks = sigma[:, 1:].unflatten(1, (num_chunks, chunk_length))
    assert (chunks == chunks[:, :, :1]).all()
    counts = torch.stack([(chunks[:, :, 0] == level).float().mean(0) for level in table[:-1]])
    assert (counts.sum(0) == 1).all()
    assert float((counts - 1 / num_steps).abs().max()) < 4 * 0.5 / batch**0.5
    # chunks draw on their own: they agree as often as chance has it
    if num_chunks > 1 and num_steps > 1:
        agree = float((chunks[:, 0, 0] == chunks[:, 1, 0]).float().mean())
        assert agree == pytest.approx(1 / num_steps, abs=4 * 0.5 / batch**0.5)


@pytest.mark.parametrize("shift", [None, 0.5, 1.0, 7.8])
@pytest.mark.parametrize(("num_steps", "student_steps"), [(1, 1), (4, 1), (4, 2), (8, 4), (9, 3)])
def test_the_source_is_evaluated_where_its_sampler_goes(
    shift: float | None, num_steps: int, student_steps: int
) -> None:
    """Level by level, with LTX's terminal one as well: a step of the student is a run of those."""
    source = torch.tensor(sampling_sigmas(num_steps, shift, 112))
    student = torch.tensor(sampling_sigmas(student_steps, shift, 112, num_steps))
    num_substeps = num_steps // student_steps
    levels = levels_of_steps(student[:-1][None], source, num_substeps)
    assert levels.shape == (num_substeps + 1, 1, student_steps)
    assert torch.equal(levels[0, 0], student[:-1])
    assert torch.equal(levels[-1, 0], student[1:])
    assert torch.equal(levels[:-1, 0].T.flatten(), source[:-1])
    still = levels_of_steps(torch.zeros(2, 3), source, num_substeps)
    assert torch.equal(still, torch.zeros(num_substeps + 1, 2, 3))
    settings = DistillSettings("source", 6.0, num_steps, student_steps, shift)
    assert settings.sigmas(student_steps, 112) == student.tolist()
    sampler = Sampling(student_steps, 1.0, shift, table_steps=num_steps)
    assert sampler.sigmas(112) == student.tolist()


def test_a_distilled_student_is_distilled_again() -> None:
    """8 to 4 to 2 steps: all levels stay those of the first table."""
    table = sampling_sigmas(8, None, 112)
    again = DistillSettings("source", 1.0, 4, 2, None, table_steps=8)
    assert again.sigmas(4, 112) == table[::2]
    assert again.sigmas(2, 112) == table[::4]
    assert sampling_sigmas(4, None, 112) != table[::2]  # LTX's own table of 4 steps is another
    with pytest.raises(
        UserError, match=r"expected distill\.num_steps to divide table_steps, got 4"
    ):
        DistillSettings("source", 1.0, 4, 2, None, table_steps=6)
    with pytest.raises(UserError, match="that divides table_steps 8, got 3"):
        Sampling(num_steps=3, table_steps=8)


@pytest.mark.parametrize("num_substeps", [1, 2, 4])
def test_average_velocity_ends_where_the_steps_end(num_substeps: int) -> None:
    """Each frame against a plain loop of its own; and against the target as Salimans and Ho write
    it, in float64.
    """
    torch.manual_seed(0)
    batch, num_frames = 2, 4
    sigma = torch.rand(batch, num_frames, dtype=torch.float64).sort(1).values
    sigma[:, 0] = 0.0
    share = torch.linspace(1.0, 0.4, num_substeps + 1, dtype=torch.float64).view(-1, 1, 1)
    levels = share * sigma
    sample = torch.randn(batch, 3, num_frames, 2, 2, dtype=torch.float64)

    def field(sample: Tensor, sigma: Tensor) -> Tensor:
        level = sigma if sigma.ndim == 0 else sigma[:, None, :, None, None]
        return torch.sin(3 * sample + level) - level * sample

    def along(path: Tensor) -> Callable[[Tensor, int], Tensor]:
        return lambda sample, step: field(sample, path[step])

    average = average_velocity(field, sample, levels)
    end = euler_step(sample, average, levels[0], levels[-1])
    for row in range(batch):
        for frame in range(1, num_frames):
            alone = sample[row : row + 1, :, frame : frame + 1]
            path = levels[:, row, frame]
            expected = integrate(along(path), alone, path)
            torch.testing.assert_close(
                end[row : row + 1, :, frame : frame + 1], expected, atol=1e-6, rtol=1e-6
            )
            start_level, end_level = levels[0, row, frame], levels[-1, row, frame]
            ratio = end_level / start_level
            target = (expected - ratio * alone) / ((1 - end_level) - ratio * (1 - start_level))
            denoised = alone - start_level * average[row : row + 1, :, frame : frame + 1]
            torch.testing.assert_close(denoised, target, atol=1e-5, rtol=1e-5)
    assert torch.equal(average[:, :, 0], torch.zeros_like(average[:, :, 0]))
    assert torch.equal(end[:, :, 0], sample[:, :, 0])


def test_many_steps_average_to_the_exact_flow() -> None:
    """Gaussian data with deviation s: the flow scales a sample by the ratio of the deviations at
    both ends.
    """
    s, sigma, sigma_next = 0.5, torch.full((1, 1), 0.9), torch.full((1, 1), 0.2)
    sample = torch.linspace(-2, 2, 5).view(1, 5, 1, 1, 1)

    def deviation(level: Tensor) -> Tensor:
        return ((1 - level) ** 2 * s**2 + level**2).sqrt()

    # d/d level of log deviation, times the sample
    def field(sample: Tensor, level: Tensor) -> Tensor:
        slope = (level - (1 - level) * s**2) / deviation(level) ** 2
        return slope[:, None, :, None, None] * sample

    share = torch.linspace(0, 1, 401).view(-1, 1, 1)
    average = average_velocity(field, sample, torch.lerp(sigma, sigma_next, share))
    end = euler_step(sample, average, sigma, sigma_next)
    torch.testing.assert_close(
        end, sample * deviation(sigma_next) / deviation(sigma), atol=2e-3, rtol=0
    )


def streamed_steps(
    model: A2VDiT, inputs: TrainingInput, context: Context, levels: Tensor, guidance: float
) -> Tensor:
    """Chunk after chunk as a guided stream does it: two rows of cache per clip, some Euler steps
    from the noisy chunk.

    Returns the samples after the last step, without the reference.
    """
    noisy, speech = inputs.path.noisy_latents, inputs.speech_latents
    rows, _, num_frames, height, width = noisy.shape
    cache = model.new_cache(2 * rows, height, width)
    references = torch.cat([noisy[:, :, :1], torch.zeros_like(noisy[:, :, :1])])
    if model.cache_options.reference_attends == "self":
        model.prefill(references, cache)
    out, length = [], model.cache_options.chunk_length

    def both(sample: Tensor, sigma: Tensor, frames: slice) -> tuple[Tensor, Tensor]:
        conditions = torch.cat([speech[:, frames], torch.zeros_like(speech[:, frames])])
        sample, sigma = torch.cat([sample, sample]), torch.cat([sigma, sigma])
        if cache.reference_expected:
            sample, sigma = (
                torch.cat([references, sample], 2),
                torch.cat([torch.zeros_like(sigma[:, :1]), sigma], 1),
            )
            conditions = torch.cat([torch.zeros_like(conditions[:, :1]), conditions], 1)
        velocity = model(sample, sigma, conditions, cache=cache)[:, :, -length:]
        conditional, unconditional = velocity.chunk(2)
        return conditional, unconditional

    for start in range(1, num_frames, length):
        frames = slice(start, start + length)
        sample = noisy[:, :, frames]
        for sigma, sigma_next in zip(levels[:-1, :, frames], levels[1:, :, frames], strict=True):
            conditional, unconditional = both(sample, sigma, frames)
            velocity = joint_guidance(unconditional, conditional, guidance)
            sample = euler_step(sample, velocity, sigma, sigma_next)
        out.append(sample)
        both(context.latents[:, :, frames], context.sigma[:, frames], frames)
        cache.commit()
    return torch.cat(out, 2)


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "absolute": {"positions": "absolute"},
    "no_sink": {"use_sink": False},
    "first_chunk": {"reference_attends": "first_chunk"},
    "clean_pass": {"cache_noise": "clean_pass"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize(
    ("guidance", "num_steps", "student_steps", "shift"),
    [(6.0, 8, 4, 1.0), (1.0, 4, 2, 3.0), (3.0, 4, 1, None)],
)
def test_loss_is_the_distance_to_guided_streams(
    tmp_path: Path,
    options: dict[str, Any],
    guidance: float,
    num_steps: int,
    student_steps: int,
    shift: float | None,
) -> None:
    source = make_transformer(seed=3, **options)
    settings = DistillSettings(
        save_transformer(source, tmp_path / "source.ckpt"),
        guidance,
        num_steps,
        student_steps,
        shift,
    )
    module = make_student(
        make_transformer(**options), distill=settings, identity_dropout=0.3, audio_dropout=0.3
    )
    inputs = module.draw(make_conditions(3, 10, 2, 3))
    loss = module.losses(inputs)["loss"]

    def table(steps: int) -> Tensor:
        whole = (
            ltx_sigma_table(num_steps, 7 * 6) if shift is None else sigma_table(num_steps, shift)
        )
        return whole[:: num_steps // steps]

    def context(level: float) -> Context:
        sigma = inputs.path.sigma.new_full(
            inputs.path.sigma.shape, 0.0 if "cache_noise" in options else level
        )
        sigma[:, 0] = 0
        share = sigma[:, None, :, None, None]
        noise = inputs.path.velocity + inputs.clean_latents
        return Context((1 - share) * inputs.clean_latents + share * noise, sigma)

    sigma = inputs.path.sigma
    source_table, substeps = table(num_steps).tolist(), num_steps // student_steps
    levels = torch.zeros(substeps + 1, *sigma.shape)
    for row, frame in itertools.product(*map(range, sigma.shape)):
        if frame:  # the reference stays at 0
            at = source_table.index(float(sigma[row, frame]))
            levels[:, row, frame] = torch.tensor(source_table[at : at + substeps + 1])
    sigma_next = levels[-1]
    with torch.no_grad():
        end = streamed_steps(source, inputs, context(float(table(num_steps)[-2])), levels, guidance)
        start = inputs.path.noisy_latents[:, :, 1:]
        target = (start - end) / (sigma - sigma_next)[:, None, 1:, None, None]
        own = context(float(table(student_steps)[-2]))
        velocity = module.transformer(
            inputs.path.noisy_latents, sigma, inputs.speech_latents,
            context_latents=own.latents, context_sigma=own.sigma,
        )[:, :, 1:]  # fmt: skip
    torch.testing.assert_close(
        loss.detach(), (velocity - target).square().mean(), atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(module.validation_losses(inputs)["distillation_loss"], loss)


def test_one_branch_is_run_without_guidance() -> None:
    model, clean = make_transformer(), make_conditions(2, 7)
    sigma = torch.rand(2, 7) * (torch.arange(7) > 0)
    context = Context(clean.latents, torch.zeros(2, 7))
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    with torch.no_grad():
        results = [
            guided_velocity(model, clean.latents, sigma, clean.speech_latents, context, a)
            for a in (1.0, 1 + 1e-7)
        ]
    assert seen == [2, 4]
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("guidance", "num_steps", "student_steps"), [(3.0, 4, 4), (1.0, 4, 2)])
def test_student_learns_and_its_source_stays(
    tmp_path: Path, guidance: float, num_steps: int, student_steps: int
) -> None:
    source = make_transformer(seed=0, std=0.1)
    settings = DistillSettings(
        save_transformer(source, tmp_path / "source.ckpt"), guidance, num_steps, student_steps, 1.0
    )
    module = make_student(make_transformer(seed=0, std=0.1), distill=settings)
    inputs = module.draw(make_conditions(4))
    losses = train_on(module, inputs, num_steps=40)
    assert losses[-1] < 0.5 * losses[0]
    assert "source" in module.frozen_parts
    for name, value in module.source.state_dict().items():
        assert torch.equal(value, source.state_dict()[name])
    assert all(weight.grad is None for weight in module.source.parameters())


def test_settings_that_do_not_fit(tmp_path: Path) -> None:
    source = save_transformer(make_transformer(), tmp_path / "source.ckpt")
    teacher = save_transformer(make_transformer("full"), tmp_path / "teacher.ckpt")
    with pytest.raises(
        UserError,
        match=(
            r"expected distill\.student_steps to divide num_steps, "
            r"got "
            r"3 and 8: use"
        ),
    ):
        DistillSettings(source, student_steps=3)
    with pytest.raises(
        UserError,
        match=("expected guidance or steps to distil, got guidance 1 and 4 steps for both"),
    ):
        DistillSettings(source, 1.0, 4, 4)
    with pytest.raises(UserError, match="expected distill alone, got asd or rollout beside it"):
        make_student(distill=DistillSettings(source), rollout=RolloutSettings())
    with pytest.raises(UserError, match="expected distill alone, got asd or rollout beside it"):
        make_student(distill=DistillSettings(source), asd=ASDSettings(teacher))
    with pytest.raises(
        UserError, match=("expected a source with attention 'chunked', got a teacher in")
    ):
        make_student(distill=DistillSettings(teacher))
    with pytest.raises(
        UserError,
        match=(
            r"expected a source of the student's shape, got "
            r"cache_options .* against"
        ),
    ):
        make_student(make_transformer(positions="absolute"), distill=DistillSettings(source))
    with pytest.raises(
        UserError, match=("expected a cache of last_step or clean_pass for distill, got")
    ):
        make_student(make_transformer(cache_noise="per_step"), distill=DistillSettings(source))
    with pytest.raises(UserError, match="got no such file"):
        make_student(distill=DistillSettings(str(tmp_path / "absent.ckpt")))
