"""Is it still the person of the reference image?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rest_lightning.errors import UserError
from rest_lightning.metrics.sums import Frames, MeanMetric, check_clip


def identity_similarity(frames: Frames, reference: Frames, extractor: Any) -> float:
    """Returns the mean cosine of every frame's identity with that of the reference, -1 to 1.

    Args:
        frames: uint8 (n, H, W, 3).
        reference: uint8 (H, W, 3).
        extractor: that of ``load_extractor("identity")``.

    Raises:
        UserError: no such frames, or identities that are not numbers.
    """
    first = identities(torch.as_tensor(reference)[None], extractor)
    return float(functional.cosine_similarity(identities(frames, extractor), first, dim=1).mean())


def identities(frames: Frames, extractor: Any) -> Tensor:
    """Returns the identity in each frame, (n, num_features); arguments and errors as those of
    :func:`identity_similarity`.
    """
    found: Tensor = extractor(check_clip(frames))
    if not found.isfinite().all():
        raise UserError(
            "expected numbers as identities, got NaN or infinity: look at the extractor's weights"
        )
    return found


class IdentitySimilarity(MeanMetric):
    """Mean over clips of :func:`identity_similarity`.

    An extractor of None takes the embedded one.
    """

    higher_is_better = True

    def __init__(self, extractor: Any = None, **kwargs: Any) -> None:
        from rest_lightning.metrics.extractors import load_extractor

        super().__init__(
            ("identity_similarity",), extractor or load_extractor("identity"), **kwargs
        )

    def update(self, frames: Frames, reference: Frames) -> None:  # type: ignore[override]
        """Takes in one clip and its reference image."""
        self.extractor.to(self.device)
        self.add({"identity_similarity": identity_similarity(frames, reference, self.extractor)})
