"""Frechet distances between two sets of features: FID, FVD and E-FID share one computation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rest_lightning.errors import UserError
from rest_lightning.metrics.sums import Frames, RowMetric, check_clip

MIN_SAMPLES = 2  # below, there is no covariance
_SIDES = {True: "real", False: "generated"}


def feature_sums(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns number, sum (D,) and sum of outer products (D, D) of features (m, D).

    All are float64.
    """
    x = features.detach().to(torch.float64)
    return torch.tensor(float(len(x)), dtype=torch.float64, device=x.device), x.sum(dim=0), x.T @ x


def moments(num: Tensor, total: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean (D,) and covariance (D, D) of :func:`feature_sums`.

    The covariance is divided by n - 1, as numpy's.
    """
    mean = total / num
    covariance = (outer - num * torch.outer(mean, mean)) / (num - 1)
    return mean, (covariance + covariance.T) / 2


def trace_of_root(a: Tensor, b: Tensor) -> Tensor:
    """Tr (A B)^(1/2) of two covariances (D, D), singular ones too.

    A B has the eigenvalues of the symmetric R' B R with A = R R', so symmetric solvers do, and
    rounding that turns an eigenvalue of zero negative is cut off instead of becoming an imaginary
    root.
    """
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp(min=0).sqrt()
    product = root.T @ b @ root
    return torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()


def frechet_distance(
    mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor
) -> Tensor:
    """Returns the squared Frechet distance of two Gaussians, as FID and FVD report it.

    It is never negative (Dowson and Landau 1982).
    """
    traces = (
        covariance_a.trace() + covariance_b.trace() - 2 * trace_of_root(covariance_a, covariance_b)
    )
    return ((mean_a - mean_b).square().sum() + traces).clamp(min=0)


class FrechetDistance(RowMetric):
    """Frechet distance between real and generated features (m, D), in any number of calls.

    Args:
        num_features: D.
        key: name of the number in ``compute()``.
        extractor: see :class:`RowMetric`; subclasses look through it.
    """

    higher_is_better = False
    num_real: Tensor
    sum_real: Tensor
    outer_real: Tensor
    num_generated: Tensor
    sum_generated: Tensor
    outer_generated: Tensor

    def __init__(
        self, num_features: int, key: str = "frechet", extractor: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(extractor, **kwargs)
        self.num_features, self.key = num_features, key
        for side in _SIDES.values():
            self.add_sum(f"num_{side}")
            self.add_sum(f"sum_{side}", num_features)
            self.add_sum(f"outer_{side}", num_features, num_features)

    def update(self, features: Tensor, real: bool) -> None:
        """Takes in features (m, D).

        Raises:
            UserError: another shape, or features that are not numbers; the states are then
                unchanged.
        """
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise UserError(
                f"expected features (m, {self.num_features}), got {tuple(features.shape)}: is it "
                "this extractor's?"
            )
        bad = ~features.isfinite().all(dim=1)
        if bad.any():
            raise UserError(
                f"expected numbers as {self.key} features, got NaN or infinity in {int(bad.sum())} "
                f"of {len(features)}, "
                f"first in number {int(bad.nonzero()[0])}: look at the clip and at the extractor's "
                "weights"
            )
        side = _SIDES[real]
        for name, value in zip(
            ("num", "sum", "outer"), feature_sums(features.to(self.device)), strict=True
        ):
            getattr(self, f"{name}_{side}").add_(value)

    def compute(self) -> dict[str, Tensor]:
        """Returns ``{key: distance}``, a float64 scalar.

        Raises:
            UserError: fewer than two features on a side.
        """
        for side in _SIDES.values():
            count = int(getattr(self, f"num_{side}"))
            if count < MIN_SAMPLES:
                raise UserError(
                    f"expected at least {MIN_SAMPLES} {side} samples for {self.key}, got {count}: "
                    "give more clips"
                )
        real = moments(self.num_real, self.sum_real, self.outer_real)
        generated = moments(self.num_generated, self.sum_generated, self.outer_generated)
        return {self.key: frechet_distance(*real, *generated)}

    def notes(self) -> list[str]:
        """Warns of sets with no more samples than features.

        Their covariance is singular, and the distance is biased upwards.
        """
        counts = {side: int(getattr(self, f"num_{side}")) for side in _SIDES.values()}
        few = [f"{count} {side}" for side, count in counts.items() if count <= self.num_features]
        return (
            [(f"{self.key}: {' and '.join(few)} samples for {self.num_features} features, biased")]
            if few
            else []
        )


class ClipFrechetDistance(FrechetDistance):
    """Frechet distance of what an extractor sees in clips.

    Args:
        extractor: called with uint8 (n, H, W, 3), gives features (m, num_features).
        key: of the number in ``compute()``.
    """

    def __init__(self, extractor: Any, key: str, **kwargs: Any) -> None:
        super().__init__(extractor.num_features, key, extractor, **kwargs)

    def update(self, frames: Frames, real: bool) -> None:  # type: ignore[override]
        """Takes in one clip, uint8 (n, H, W, 3).

        Raises:
            UserError: no such frames, too few of them, or features that are not numbers.
        """
        clip = check_clip(frames, self.extractor.min_frames)
        self.extractor.to(self.device)
        super().update(self.extractor(clip), real)


def _default(metric: str, extractor: Any) -> Any:
    from rest_lightning.metrics.extractors import load_extractor

    return load_extractor(metric) if extractor is None else extractor


class FID(ClipFrechetDistance):
    """Frechet inception distance; every frame is a sample.

    Args:
        extractor: of ``load_extractor("fid")``; None takes the embedded image network.
        key: name of the number in ``compute()``.
    """

    def __init__(self, extractor: Any = None, key: str = "fid", **kwargs: Any) -> None:
        super().__init__(_default("fid", extractor), key, **kwargs)


class FVD(ClipFrechetDistance):
    """Frechet video distance; clips, or their windows, are samples.

    Args:
        extractor: of ``load_extractor("fvd")`` or ``load_extractor("fvd_videomae")``; None takes
            the embedded video network.
        key: name of the number in ``compute()``.
    """

    def __init__(self, extractor: Any = None, key: str = "fvd", **kwargs: Any) -> None:
        super().__init__(_default("fvd", extractor), key, **kwargs)


class EFID(ClipFrechetDistance):
    """Frechet distance of expression coefficients.

    Implementations differ, so the extractor's name labels the number.

    Args:
        extractor: of ``load_extractor("e_fid")``; None takes the embedded network.
        key: name of the number in ``compute()``.
    """

    def __init__(self, extractor: Any = None, key: str = "e_fid", **kwargs: Any) -> None:
        super().__init__(_default("e_fid", extractor), key, **kwargs)
