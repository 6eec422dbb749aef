"""What the metric classes of result rows share: states that are sums, and an extractor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rest_lightning.errors import UserError
from rest_lightning.torchvision_compat import ensure_torchvision

ensure_torchvision()  # torchmetrics imports torchvision

from torchmetrics import Metric  # noqa: E402  the line above must come first

Frames = NDArray[np.uint8] | Tensor


def check_clip(frames: Frames, min_frames: int = 1) -> Tensor:
    """Returns a clip as a uint8 (n, H, W, 3) tensor.

    Raises:
        UserError: another type or shape, or fewer frames than ``min_frames``.
    """
    clip = torch.as_tensor(frames)
    if clip.ndim != 4 or clip.shape[-1] != 3 or clip.dtype != torch.uint8 or 0 in clip.shape[1:3]:
        got = f"{str(clip.dtype).removeprefix('torch.')} {tuple(clip.shape)}"
        raise UserError(f"expected frames as uint8 (n, H, W, 3), got {got}: convert them")
    if len(clip) < min_frames:
        raise UserError(
            f"expected at least {min_frames} frames, got {len(clip)}: give a longer clip"
        )
    return clip


class RowMetric(Metric):
    """Base class of metrics whose numbers stand in result rows.

    States are float64 sums that processes add up. ``compute`` returns scalars by their key in a
    row.

    Args:
        extractor: network that the metric looks through, or None. Its weights are no state: they
            are not in ``state_dict`` and are not reduced over processes.
    """

    full_state_update = False
    is_differentiable = False

    def __init__(self, extractor: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._held = (extractor,)  # a tuple, so that torch does not register it as a submodule

    @property
    def extractor(self) -> Any:
        """The network that the metric looks through."""
        return self._held[0]

    def add_sum(self, name: str, *shape: int) -> None:
        """Adds a state of float64 zeros that is summed over processes."""
        self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def notes(self) -> list[str]:
        """Returns what a reader of the numbers must know; mostly nothing."""
        return []


class MeanMetric(RowMetric):
    """Means over clips of named numbers.

    A clip for which a number is not defined (NaN) does not count for that number.

    Args:
        names: names of the numbers, the keys of a result row.
        extractor: see :class:`RowMetric`.
    """

    total: Tensor
    num_defined: Tensor
    num_clips: Tensor

    def __init__(self, names: Iterable[str], extractor: Any = None, **kwargs: Any) -> None:
        super().__init__(extractor, **kwargs)
        self.names = tuple(names)
        self.add_sum("total", len(self.names))
        self.add_sum("num_defined", len(self.names))
        self.add_sum("num_clips")

    def add(self, scores: Mapping[str, float]) -> None:
        """Takes in the numbers of one clip.

        Missing names count as not defined; other names are ignored.
        """
        values = torch.tensor(
            [float(scores.get(name, float("nan"))) for name in self.names], dtype=torch.float64
        )
        values = values.to(self.device)
        known = values.isfinite()
        self.total += torch.where(known, values, 0.0)
        self.num_defined += known
        self.num_clips += 1

    def update(self, scores: Mapping[str, float]) -> None:
        """Takes in one clip, see :meth:`add`."""
        self.add(scores)

    def compute(self) -> dict[str, Tensor]:
        """Returns the means by name; NaN where no clip defined the number.

        Raises:
            UserError: no clip so far.
        """
        if not self.num_clips:
            raise UserError(
                f"expected at least 1 clip for {self.names[0]}, got none: every clip "
                "may have failed"
            )
        means = self.total / self.num_defined  # 0 / 0 is NaN
        return dict(zip(self.names, means.unbind(), strict=True))

    def notes(self) -> list[str]:
        """Names the numbers that some clips, but not all, had no value for."""
        counts = zip(self.names, self.num_defined.tolist(), strict=True)
        partial = [(name, int(count)) for name, count in counts if 0 < count < self.num_clips]
        return [
            (f"{name}: mean over {count} of {int(self.num_clips)} clips") for name, count in partial
        ]
