from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from rest_lightning.diffusion.noise import (
    add_noise,
    drop_reference,
    drop_speech,
    noisy_path,
    sample_drops,
    sample_sigmas_ans,
    sample_sigmas_cans,
    velocity_target,
)
from rest_lightning.diffusion.schedule import training_table
from rest_lightning.errors import UserError

TABLE = training_table()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cdf(sigma: Tensor) -> Tensor:
    """Analytic distribution function of sigmoid(Normal(2.05, 1))."""
    normal = NormalDist(2.05, 1.0)
    return torch.tensor([normal.cdf(math.log(s / (1 - s))) for s in sigma.double().tolist()])


def kolmogorov_distance(sigma: Tensor, low: float, high: float) -> float:
    """Largest distance between the sampled and the analytic distribution inside the quantile range
    [low, high].
    """
    uniform = ((cdf(sigma) - low) / (high - low)).sort().values
    ranks = (torch.arange(len(uniform)) + 0.5) / len(uniform)
    return (uniform - ranks).abs().max().item()


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("chunk_length", [1, 2, 3])
def test_cans_orders_chunks_and_keeps_the_reference_clean(
    num_chunks: int, chunk_length: int
) -> None:
    sigma = sample_sigmas_cans(
        200, num_chunks, chunk_length, TABLE, motion_dropout=0.0, generator=generator()
    )
    assert sigma.shape == (200, 1 + num_chunks * chunk_length)
    assert (sigma[:, 0] == 0).all()
    chunks = sigma[:, 1:].unflatten(1, (num_chunks, chunk_length))
    assert (chunks == chunks[:, :, :1]).all()
    assert (chunks[:, :, 0].diff(dim=1) > 0).all()


@pytest.mark.parametrize("num_chunks", [1, 3, 4])
def test_cans_follows_the_analytic_quantiles(num_chunks: int) -> None:
    sigma = sample_sigmas_cans(
        8000, num_chunks, 1, TABLE, motion_dropout=0.0, generator=generator()
    )
    bounds = [i * 1000 // num_chunks / 1000 for i in range(num_chunks + 1)]
    for i in range(num_chunks):
        # 5 % point of n = 8000: 0.015
        assert kolmogorov_distance(sigma[:, 1 + i], bounds[i], bounds[i + 1]) < 0.025


def test_cans_motion_dropout_shares_one_level_of_the_whole_table() -> None:
    sigma = sample_sigmas_cans(8000, 4, 3, TABLE, motion_dropout=0.5, generator=generator())[:, 1:]
    is_shared = (sigma == sigma[:, :1]).all(dim=1)
    assert is_shared.float().mean().item() == pytest.approx(0.5, abs=0.025)
    assert kolmogorov_distance(sigma[is_shared, 0], 0.0, 1.0) < 0.03
    every = sample_sigmas_cans(100, 4, 3, TABLE, motion_dropout=1.0, generator=generator())[:, 1:]
    assert (every == every[:, :1]).all()


def test_cans_marginal_over_chunks_is_the_table() -> None:
    sigma = sample_sigmas_cans(8000, 4, 1, TABLE, motion_dropout=0.5, generator=generator())[:, 1:]
    assert kolmogorov_distance(sigma.flatten(), 0.0, 1.0) < 0.02


@pytest.mark.parametrize(("num_chunks", "chunk_length"), [(4, 3), (1, 1), (5, 2)])
def test_ans_is_one_cleaner_frame_then_one_level(num_chunks: int, chunk_length: int) -> None:
    sigma = sample_sigmas_ans(
        4000, num_chunks, chunk_length, TABLE, motion_dropout=0.0, generator=generator()
    )
    assert sigma.shape == (4000, 1 + num_chunks * chunk_length)
    assert (sigma[:, 0] == 0).all()
    assert (sigma[:, 2:] == sigma[:, 2:3]).all()
    if num_chunks * chunk_length > 1:
        assert (sigma[:, 1] < sigma[:, 2]).all()
        # minimum and maximum of two uniforms: distribution functions 1 - (1-u)^2 and u^2
        low, high = cdf(sigma[:, 1]), cdf(sigma[:, 2])
        assert low.mean().item() == pytest.approx(1 / 3, abs=0.015)
        assert high.mean().item() == pytest.approx(2 / 3, abs=0.015)


def test_ans_motion_dropout() -> None:
    sigma = sample_sigmas_ans(4000, 4, 3, TABLE, motion_dropout=0.5, generator=generator())
    is_shared = sigma[:, 1] == sigma[:, 2]
    assert is_shared.float().mean().item() == pytest.approx(0.5, abs=0.03)
    # One plain draw: its index is 500 of 1,000 on average, not that of the larger of two draws.
    assert kolmogorov_distance(sigma[is_shared, 1], 0.0, 1.0) < 0.04
    assert cdf(sigma[is_shared, 1]).mean().item() == pytest.approx(0.5, abs=0.03)


def test_draws_come_from_the_generator_alone() -> None:
    torch.manual_seed(1)
    first = (
        sample_sigmas_cans(4, 4, 3, TABLE, generator=generator(3)),
        sample_drops(4, generator=generator(3)).audio,
    )
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = (
        sample_sigmas_cans(4, 4, 3, TABLE, generator=generator(3)),
        sample_drops(4, generator=generator(3)).audio,
    )
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first[0], sample_sigmas_cans(4, 4, 3, TABLE, generator=generator(4)))


def test_drops_have_their_rates_and_are_independent() -> None:
    drops = sample_drops(20000, identity=0.1, audio=0.2, joint=0.0, generator=generator())
    assert drops.identity.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert drops.audio.float().mean().item() == pytest.approx(0.2, abs=0.01)
    assert (drops.identity & drops.audio).float().mean().item() == pytest.approx(0.02, abs=0.004)
    joint = sample_drops(20000, identity=0.0, audio=0.0, joint=0.08, generator=generator())
    assert torch.equal(joint.identity, joint.audio)
    assert joint.audio.float().mean().item() == pytest.approx(0.08, abs=0.01)


def test_drops_zero_the_chosen_rows_only() -> None:
    latents, speech = torch.randn(3, 4, 5, 2, 2), torch.randn(3, 5, 2, 8)
    dropped = torch.tensor([True, False, True])
    without = drop_reference(latents, dropped)
    assert (without[dropped][:, :, 0] == 0).all()
    assert torch.equal(without[1], latents[1])
    assert torch.equal(without[:, :, 1:], latents[:, :, 1:])
    silent = drop_speech(speech, dropped)
    assert (silent[dropped] == 0).all()
    assert torch.equal(silent[1], speech[1])


@pytest.mark.parametrize("shape", [(1, 2, 1, 1, 1), (2, 4, 13, 2, 3)])
def test_noising_and_its_inverses(shape: tuple[int, ...]) -> None:
    latents, noise = torch.randn(2, *shape, dtype=torch.float64)
    sigma = torch.rand(shape[0], shape[2], dtype=torch.float64)
    sigma[:, 0] = 0
    path = noisy_path(latents, noise, sigma)
    for b in range(shape[0]):
        for i in range(shape[2]):
            expected = (1 - sigma[b, i]) * latents[b, :, i] + sigma[b, i] * noise[b, :, i]
            assert torch.allclose(path.noisy_latents[b, :, i], expected, atol=1e-12)
    assert torch.equal(path.noisy_latents[:, :, 0], latents[:, :, 0])
    assert torch.equal(path.velocity, velocity_target(latents, noise))
    denoised = path.noisy_latents - sigma[:, None, :, None, None] * path.velocity
    assert torch.allclose(denoised, latents, atol=1e-12)
    assert torch.equal(add_noise(latents, noise, 1.0), noise)
    assert add_noise(latents.bfloat16(), noise.bfloat16(), sigma.float()).dtype == torch.bfloat16


def test_bad_arguments_are_named() -> None:
    with pytest.raises(UserError, match=r"1 to 1000 chunks.*got 0"):
        sample_sigmas_cans(1, 0, 3, TABLE, generator=generator())
    with pytest.raises(UserError, match="at least 2 training noise levels for ANS, got 1"):
        sample_sigmas_ans(1, 4, 3, TABLE[:1], generator=generator())
