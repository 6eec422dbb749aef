"""Frechet distance: closed forms, torchmetrics, torch-fidelity, two processes, too few samples,
NaN.
"""

from __future__ import annotations

from pathlib import Path

import metric_processes
import numpy as np
import pytest
import scipy.linalg
import torch
import torch.multiprocessing
from torch import Tensor, nn

from rest_lightning.errors import UserError
from rest_lightning.metrics.frechet import (
    FID,
    FrechetDistance,
    feature_sums,
    frechet_distance,
    moments,
    trace_of_root,
)


def features(num: int, dims: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dims, dims, generator=generator)
    return shift + scale * torch.randn(num, dims, generator=generator) @ mixing


def distance(real: Tensor, generated: Tensor) -> float:
    metric = FrechetDistance(real.shape[1])
    metric.update(real, real=True)
    metric.update(generated, real=False)
    return float(metric.compute()["frechet"])


def reference(real: Tensor, generated: Tensor) -> float:
    """As the common FID and FVD code has it: numpy's covariance, scipy's square root of the
    product.
    """
    a, b = real.double().numpy(), generated.double().numpy()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    return float(
        np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b - 2 * np.real(root))
    )


@pytest.mark.parametrize(("num", "dims"), [(40, 2), (100, 16), (300, 64)])
def test_equals_the_square_root_of_the_product(num: int, dims: int) -> None:
    real, generated = features(num, dims, 0), features(num + 7, dims, 1, 1.3, 0.4)
    assert distance(real, generated) == pytest.approx(reference(real, generated), rel=1e-6)


def test_one_dimension_in_closed_form() -> None:
    """(mu - mu')^2 + (sd - sd')^2."""
    real, generated = features(50, 1, 2), features(60, 1, 3, 2.5, 1.0)
    a, b = real.double(), generated.double()
    assert distance(real, generated) == pytest.approx(
        float((a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2)
    )


@pytest.mark.parametrize("num", [2, 3, 20])
def test_fewer_samples_than_features_is_exact_too(num: int) -> None:
    """Singular covariances: their roots are known when both live on the same axes."""
    basis = torch.linalg.qr(features(32, 32, 4).double())[0]
    weights_a, weights_b = (
        torch.rand(num, dtype=torch.float64) + 0.1,
        torch.rand(num, dtype=torch.float64) + 0.1,
    )
    a = (basis[:, :num] * weights_a) @ basis[:, :num].T
    b = (basis[:, :num] * weights_b) @ basis[:, :num].T
    assert float(trace_of_root(a, b)) == pytest.approx(
        float((weights_a * weights_b).sqrt().sum()), rel=1e-6
    )
    mean = torch.zeros(32, dtype=torch.float64)
    expected = float((weights_a.sqrt() - weights_b.sqrt()).square().sum())
    assert float(frechet_distance(mean, a, mean, b)) == pytest.approx(expected, rel=1e-5)
    assert float(frechet_distance(mean, a, mean, a)) == pytest.approx(0.0, abs=1e-6)


def test_a_constant_set_is_its_mean() -> None:
    real, generated = torch.ones(8, 5), torch.ones(8, 5) * 3
    assert distance(real, generated) == pytest.approx(5 * 4.0)
    assert distance(real, real) == 0.0


@pytest.mark.parametrize("pieces", [1, 3, 10])
def test_pieces_and_order_do_not_matter(pieces: int) -> None:
    real, generated = features(30, 6, 0), features(30, 6, 1)
    metric = FrechetDistance(6)
    for part in generated.tensor_split(pieces):
        metric.update(part, real=False)
    for part in real.flip(0).tensor_split(pieces):
        metric.update(part, real=True)
    assert float(metric.compute()["frechet"]) == pytest.approx(distance(real, generated), rel=1e-10)
    metric.reset()
    assert float(metric.num_real) == 0


def test_covariance_far_from_zero_keeps_its_digits() -> None:
    """Sums of squares cancel; float64 leaves enough for features a thousand spreads away from
    zero.
    """
    x = (features(200, 4, 0).double() + 3000.0).float()
    _, covariance = moments(*feature_sums(x))
    np.testing.assert_allclose(
        covariance.numpy(), np.cov(x.double().numpy(), rowvar=False), rtol=1e-6, atol=1e-8
    )


def test_states_stay_float64_and_survive_a_checkpoint() -> None:
    metric = FrechetDistance(3)
    metric.persistent(True)
    metric.update(features(9, 3, 0), real=True)
    metric.update(features(9, 3, 1), real=False)
    metric.half().float()
    assert metric.outer_real.dtype == torch.float64
    again = FrechetDistance(3)
    again.persistent(True)
    again.load_state_dict(metric.state_dict())
    for each in (again, metric):
        each.update(features(4, 3, 2), real=False)
    assert float(again.compute()["frechet"]) == float(metric.compute()["frechet"])


def test_too_few_samples_and_notes() -> None:
    metric = FrechetDistance(4, key="fvd")
    metric.update(features(3, 4, 0), real=True)
    with pytest.raises(
        UserError, match=("at least 2 generated samples for fvd, got 0: give more clips")
    ):
        metric.compute()
    metric.update(features(5, 4, 0), real=False)
    assert float(metric.compute()["fvd"]) >= 0
    assert metric.notes() == ["fvd: 3 real samples for 4 features, biased"]
    metric.update(features(2, 4, 0), real=True)
    metric.reset()
    metric.update(features(5, 4, 0), real=True)
    metric.update(features(5, 4, 1), real=False)
    assert metric.notes() == []


def test_features_that_are_not_numbers_are_named_and_left_out() -> None:
    metric = FrechetDistance(2, key="fid")
    bad = features(5, 2, 0)
    bad[3, 1] = torch.nan
    with pytest.raises(
        UserError, match=("fid features, got NaN or infinity in 1 of 5, first in number 3")
    ):
        metric.update(bad, real=True)
    with pytest.raises(UserError, match=r"expected features \(m, 2\), got \(5, 3\)"):
        metric.update(torch.zeros(5, 3), real=True)
    assert float(metric.num_real) == 0 and not metric.sum_real.any()


class Colours(nn.Module):
    """Mean colours and their spread, 6 features of every frame."""

    num_features, min_frames = 6, 1

    def forward(self, frames: Tensor) -> Tensor:
        x = frames.permute(0, 3, 1, 2).flatten(2).float() / 255
        return torch.cat([x.mean(dim=2), x.std(dim=2)], dim=1)


def test_fid_equals_torchmetrics_on_the_same_network() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    class FromImages(Colours):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images.permute(0, 2, 3, 1))

    theirs = FrechetInceptionDistance(feature=FromImages())
    ours = FID(Colours())
    generator = torch.Generator().manual_seed(0)
    for real, low in ((True, 0), (False, 60)):
        for _ in range(3):
            frames = torch.randint(
                low, 200 + low // 2, (20, 8, 8, 3), dtype=torch.uint8, generator=generator
            )
            ours.update(frames, real=real)
            theirs.update(frames.permute(0, 3, 1, 2), real=real)
    assert float(ours.compute()["fid"]) == pytest.approx(float(theirs.compute()), rel=1e-5)


def test_number_equals_torch_fidelity() -> None:
    module = pytest.importorskip(
        "torch_fidelity.metric_fid", reason=("extra `test` has the reference FID")
    )
    real, generated = features(400, 48, 0), features(350, 48, 1, 0.8, 0.2)
    statistics = [
        {"mu": x.double().numpy().mean(0), "sigma": np.cov(x.double().numpy(), rowvar=False)}
        for x in (real, generated)
    ]
    name = module.KEY_METRIC_FID
    expected = module.fid_statistics_to_metric(*statistics, verbose=False)[name]
    assert distance(real, generated) == pytest.approx(expected, rel=1e-6)


def test_wrong_frames_are_named() -> None:
    metric = FID(Colours())
    with pytest.raises(UserError, match=r"uint8 \(n, H, W, 3\), got float32 \(4, 3, 8, 8\)"):
        metric.update(torch.zeros(4, 3, 8, 8), real=True)
    with pytest.raises(UserError, match=r"got uint8 \(4, 8, 0, 3\)"):
        metric.update(torch.zeros(4, 8, 0, 3, dtype=torch.uint8), real=True)
    assert float(metric.num_real) == 0


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(
        metric_processes.run, args=(str(tmp_path),), nprocs=2, start_method="fork"
    )
    alone = metric_processes.numbers_of(range(metric_processes.NUM_CLIPS))
    notes = alone.pop("notes")
    assert notes == ["b: mean over 4 of 5 clips"]  # of all processes
    assert set(alone) == {"frechet", "a", "b"} and float(alone["frechet"]) > 0.1
    for rank in range(2):
        together = torch.load(tmp_path / f"{rank}.pt")
        assert together["notes"] == notes
        for key, value in alone.items():
            assert float(together[key]) == pytest.approx(float(value), rel=1e-12), key
