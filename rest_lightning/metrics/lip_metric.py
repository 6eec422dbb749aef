"""Lip correlation as a torchmetrics metric, for validation loops and several processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rest_lightning.metrics.lips import MAX_LAG_FRAMES, lip_correlation, summary
from rest_lightning.torchvision_compat import ensure_torchvision

ensure_torchvision()  # torchmetrics imports torchvision

from torchmetrics import Metric  # noqa: E402  the line above must come first


class LipCorrelation(Metric):
    """Lip correlation over clips: every update is one clip, every clip weighs the same.

    Clips with a constant curve have no correlation; they are counted, never skipped in silence.

    Args:
        max_lag_frames: see :func:`lip_correlation`.
        rank: rank correlation instead of Pearson's.

    ``compute`` returns scalars: ``mean``, ``sd``, ``min``, ``max`` at lag zero, ``best_lag_frames`` (mean) and
    ``num_undefined``.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    zero_lag: list[Tensor]
    best_lag: list[Tensor]

    def __init__(self, max_lag_frames: int = MAX_LAG_FRAMES, rank: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.max_lag_frames, self.rank = max_lag_frames, rank
        self.add_state("zero_lag", default=[], dist_reduce_fx="cat")
        self.add_state("best_lag", default=[], dist_reduce_fx="cat")

    def update(self, estimated: Tensor, true: Tensor) -> None:
        """One clip: two curves (n,)."""
        curves = [curve.detach().cpu().numpy() for curve in (estimated, true)]
        result = lip_correlation(curves[0], curves[1], self.max_lag_frames, self.rank)
        self.zero_lag.append(torch.tensor([result.zero_lag], device=self.device))
        self.best_lag.append(torch.tensor([float(result.best_lag_frames)], device=self.device))

    def compute(self) -> dict[str, Tensor]:
        """Over all clips so far."""
        values, lags = _joined(self.zero_lag), _joined(self.best_lag)
        known = ~values.isnan()
        result = summary(values.tolist())
        numbers = {key: float("nan") if result[key] is None else result[key] for key in ("mean", "sd", "min", "max")}
        numbers["best_lag_frames"] = float(lags[known].mean())
        numbers["num_undefined"] = result["num_undefined"]
        return {key: torch.tensor(float(value)) for key, value in numbers.items()}  # type: ignore[arg-type]


def _joined(state: list[Tensor] | Tensor) -> Tensor:
    """A list state before, or the tensor it becomes after, reduction over processes."""
    return state if isinstance(state, Tensor) else torch.cat(state) if state else torch.zeros(0)
