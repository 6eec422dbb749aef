from __future__ import annotations

import itertools
import json
import warnings

import pytest
import torch
from tiny_student import make_student, make_transformer

from rest_lightning.diffusion.noise import add_noise
from rest_lightning.diffusion.sampling import (
    Guidance,
    Sampling,
    euler_step,
    integrate,
    joint_guidance,
    split_guidance,
    warn_of_unseen_levels,
)
from rest_lightning.diffusion.schedule import lowest_level, ltx_sigma_table, sigma_table
from rest_lightning.generation import generate_clip, generate_overlapping
from rest_lightning.models.transformer import A2VDiT

SHAPE = (2, 4, 7, 2, 2)


@pytest.mark.parametrize("num_steps", [1, 2, 8])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_euler_is_exact_on_a_straight_path(num_steps: int, shift: float) -> None:
    latents, noise = torch.randn(2, *SHAPE, dtype=torch.float64)
    steps: list[int] = []

    def velocity(sample: torch.Tensor, step: int) -> torch.Tensor:
        steps.append(step)
        assert torch.allclose(sample, add_noise(latents, noise, table[step]), atol=1e-6)
        return noise - latents

    table = sigma_table(num_steps, shift)
    for sigmas in (table, table.tolist()):
        steps.clear()
        assert torch.allclose(integrate(velocity, noise, sigmas), latents, atol=1e-6)
        assert steps == list(range(num_steps))


def test_euler_step_goes_frame_by_frame() -> None:
    latents, noise = torch.randn(2, *SHAPE, dtype=torch.float64)
    sigma, sigma_next = torch.rand(2, 2, 7, dtype=torch.float64)
    sigma_next[:, 0] = sigma[:, 0] = 0
    start = add_noise(latents, noise, sigma)
    end = euler_step(start, noise - latents, sigma, sigma_next)
    assert torch.allclose(end, add_noise(latents, noise, sigma_next), atol=1e-12)
    assert torch.equal(end[:, :, 0], start[:, :, 0])


def test_euler_step_equals_the_diffusers_step() -> None:
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler,
    )

    scheduler = FlowMatchEulerDiscreteScheduler()
    table = ltx_sigma_table(8, 1792)
    scheduler.set_timesteps(sigmas=table[:-1].tolist())
    ours = theirs = torch.randn(1, 4, 3, 2, 2)
    for step, timestep in enumerate(scheduler.timesteps):
        velocity = torch.randn_like(ours)
        theirs = scheduler.step(velocity, timestep, theirs, return_dict=False)[0]
        ours = euler_step(ours, velocity, table[step], table[step + 1])
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_euler_step_keeps_the_dtype(dtype: torch.dtype) -> None:
    sample = torch.randn(SHAPE, dtype=dtype)
    for sigma in (torch.rand(2, 7), torch.tensor(0.5), 0.5):
        assert euler_step(sample, sample, sigma, 0.0).dtype == dtype


def test_guidance_algebra() -> None:
    v_none, v_ref, v_full = torch.randn(3, *SHAPE, dtype=torch.float64)
    assert torch.equal(joint_guidance(v_none, v_full, 1.0), v_full)
    assert torch.equal(joint_guidance(v_none, v_full, 0.0), v_none)
    assert torch.allclose(joint_guidance(v_none, v_full, 6.0), -5 * v_none + 6 * v_full, atol=1e-12)
    assert torch.equal(split_guidance(v_none, v_ref, v_full, 0.0, 1.0), v_full)
    assert torch.allclose(
        split_guidance(v_none, v_ref, v_full, 2.0, 6.0),
        -7 * v_none + 2 * v_ref + 6 * v_full,
        atol=1e-12,
    )
    # equal branches change nothing; without a reference term split guidance is joint guidance
    assert torch.allclose(split_guidance(v_full, v_full, v_full, 2.0, 6.0), v_full, atol=1e-12)
    assert torch.allclose(
        split_guidance(v_none, v_ref, v_full, 0.0, 6.0),
        joint_guidance(v_none, v_full, 6.0),
        atol=1e-12,
    )


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("weight", "reference_weight", "num_branches"),
    [
        (1.0, 0.0, 1),
        (6.0, 0.0, 2),
        (0.0, 0.0, 2),
        (6.0, 2.0, 3),
        (1.0, 0.5, 3),
        (0.0, -1.0, 3),
        (4.0, -3.0, 2),
    ],
)
def test_branches_are_one_batch(
    batch: int, weight: float, reference_weight: float, num_branches: int
) -> None:
    guidance = Guidance(weight, reference_weight)
    assert guidance.num_branches == num_branches
    reference, speech, sample = torch.randn(3, batch, 4, dtype=torch.float64)

    def network(
        sample: torch.Tensor, reference: torch.Tensor, speech: torch.Tensor
    ) -> torch.Tensor:
        return sample * (1 + reference) + torch.sin(speech + reference)

    rows = network(
        guidance.samples(sample), guidance.references(reference), guidance.speech(speech)
    )
    assert rows.shape == (num_branches * batch, 4)
    zero = torch.zeros_like(reference)
    expected = (
        weight * network(sample, reference, speech)
        + reference_weight * network(sample, reference, zero)
        + (1 - weight - reference_weight) * network(sample, zero, zero)
    )
    assert torch.allclose(guidance.combine(rows), expected, atol=1e-12)


def test_levels_below_those_of_the_training_are_told() -> None:
    """READ's table ends at 0.224, LTX's sampler at 0.1; the noise settings stay with the model."""
    module = make_student()
    config = json.loads(json.dumps(module.transformer.config))
    model = A2VDiT.from_config(config)
    assert lowest_level(model.training_noise) == pytest.approx(0.224, abs=1e-3)
    with pytest.warns(UserWarning, match=r"is at noise level 0\.100, .* trained at 0\.224"):
        warn_of_unseen_levels(Sampling(8, 1.0, None), 112, model.training_noise)
    low = make_student(uniform_share=0.1).transformer.training_noise
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_unseen_levels(Sampling(8, 1.0, None), 112, low)
        warn_of_unseen_levels(Sampling(4, 1.0, 5.0), 112, model.training_noise)
        warn_of_unseen_levels(Sampling(8, 1.0, None), 112, None)


@pytest.mark.parametrize(("weight", "reference_weight"), [(1.0, 0.0), (6.0, 2.0)])
@pytest.mark.parametrize("num_frames", [4, 12, 15, 24])
def test_overlapping_clips_are_read_s_asynchronous_reverse(
    num_frames: int, weight: float, reference_weight: float
) -> None:
    """The levels that every clip sees, the frame that two clips share, and one clip as a whole."""
    model = make_transformer("full", seed=3, std=0.1)
    reference = torch.randn(1, 4, 1, 2, 2)
    noise, speech = torch.randn(1, 4, 1 + num_frames, 2, 2), torch.randn(1, 1 + num_frames, 2, 8)
    sigmas, guidance = [1.0, 0.6, 0.2, 0.0], Guidance(weight, reference_weight)
    seen: list[tuple[torch.Tensor, ...]] = []
    model.register_forward_pre_hook(lambda _, args: seen.append(args))
    given = (model, reference, speech, noise, sigmas, guidance)
    latents = generate_overlapping(*given)
    assert latents.shape == noise.shape
    assert torch.equal(latents[:, :, :1], reference)
    starts = [0] if num_frames <= 12 else [0, 11] if num_frames <= 23 else [0, 11, 22]
    assert len(seen) == 3 * len(starts)
    calls = iter(seen.copy())
    for sigma, sigma_next in itertools.pairwise(sigmas):
        before = None
        for start in starts:
            rows, levels, heard = next(calls)
            length = min(12, num_frames - start)
            motion = [sigma_next] if start else [sigma]
            expected = torch.tensor([0.0, *motion, *[sigma] * (length - 1)])
            assert torch.equal(levels, expected.expand(guidance.num_branches, -1))
            assert torch.equal(heard[:1, 1:], speech[:, 1 + start : 1 + start + length])
            if before is not None:  # one Euler step ahead
                velocity = guidance.combine(model(*before)[:, :, -1:])
                moved = euler_step(before[0][:1, :, -1:], velocity, sigma, sigma_next)
                torch.testing.assert_close(rows[:1, :, 1:2], moved, atol=1e-5, rtol=1e-5)
            before = (rows, levels, heard)
    if num_frames <= 12:
        torch.testing.assert_close(latents, generate_clip(*given), atol=1e-6, rtol=1e-6)
