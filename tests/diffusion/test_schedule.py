from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch

from rest_lightning.diffusion.schedule import (
    ltx_shift,
    ltx_sigma_table,
    sigma_table,
    training_table,
)
from rest_lightning.errors import UserError


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8, 50])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, math.exp(2.05)])
@pytest.mark.parametrize("terminal", [None, 0.1])
def test_sigma_table_descends_from_one_to_zero(
    num_steps: int, shift: float, terminal: float | None
) -> None:
    table = sigma_table(num_steps, shift, terminal)
    assert table.shape == (num_steps + 1,)
    assert table.dtype == torch.float32
    assert table[0] == 1
    assert table[-1] == 0
    assert (table.diff() < 0).all()
    if terminal is not None and num_steps > 1:
        assert table[-2].item() == pytest.approx(terminal, abs=1e-6)


def test_sigma_table_by_hand() -> None:
    assert torch.allclose(sigma_table(4), torch.tensor([1, 0.75, 0.5, 0.25, 0]))
    assert torch.allclose(sigma_table(2, shift=3.0), torch.tensor([1, 1.5 / 2, 0]))


@pytest.mark.parametrize("num_steps", [2, 8, 20])
@pytest.mark.parametrize("num_tokens", [16, 768, 1024, 1792, 3328, 8192])
def test_ltx_table_equals_diffusers(num_steps: int, num_tokens: int) -> None:
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler,
    )

    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        shift_terminal=0.1,
    )
    # the line through both points, as diffusers.pipelines.ltx.pipeline_ltx.calculate_shift draws it
    mu = 0.95 + (2.05 - 0.95) * (num_tokens - 1024) / (4096 - 1024)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps).tolist(), mu=mu)
    assert torch.allclose(ltx_sigma_table(num_steps, num_tokens), scheduler.sigmas, atol=1e-6)
    assert ltx_shift(num_tokens) == pytest.approx(math.exp(mu))


@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0])
def test_constant_shift_equals_diffusers(shift: float) -> None:
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler,
    )

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 8, 8).tolist())
    assert torch.allclose(sigma_table(8, shift), scheduler.sigmas, atol=1e-6)


@pytest.mark.parametrize(
    ("num_levels", "mean", "std"),
    [(1000, 2.05, 1.0), (1000, 0.0, 1.0), (10, 1.0, 0.5), (1, 2.05, 1.0)],
)
def test_training_table_holds_the_quantiles(num_levels: int, mean: float, std: float) -> None:
    table = training_table(num_levels, mean, std)
    normal = NormalDist(mean, std)
    expected = [
        1 / (1 + math.exp(-normal.inv_cdf((i + 0.5) / num_levels))) for i in range(num_levels)
    ]
    assert torch.allclose(table, torch.tensor(expected), atol=1e-6)
    assert (table.diff() > 0).all()
    assert table[0] > 0
    assert table[-1] < 1


@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
def test_a_uniform_share_reaches_down(share: float) -> None:
    """Quantiles of the mixture, by its distribution function."""
    table = training_table(uniform_share=share)
    assert (table.diff() > 0).all()
    normal = NormalDist(2.05, 1.0)
    shares = torch.tensor(
        [
            (1 - share) * normal.cdf(math.log(s / (1 - s))) + share * s
            for s in table.double().tolist()
        ]
    )
    expected = (torch.arange(1000) + 0.5) / 1000
    assert torch.allclose(shares, expected, atol=1e-4)
    assert float(training_table()[0]) == pytest.approx(0.224, abs=1e-3)
    assert float(table[0]) < 0.1 * float(training_table()[0])


def test_bad_arguments_are_named() -> None:
    with pytest.raises(UserError, match="at least 1 denoising step, got 0"):
        sigma_table(0)
    with pytest.raises(UserError, match="shift above 0, got -1"):
        sigma_table(8, shift=-1)
    with pytest.raises(UserError, match="terminal sigma between 0 and 1, got 1"):
        sigma_table(8, terminal=1.0)
    with pytest.raises(UserError, match="at least 1 training noise level, got 0"):
        training_table(0)
    with pytest.raises(UserError, match=r"standard deviation above 0 .* got 0"):
        training_table(std=0.0)
    with pytest.raises(UserError, match=r"uniform_share .* from 0 to 1, got -0\.1"):
        training_table(uniform_share=-0.1)
