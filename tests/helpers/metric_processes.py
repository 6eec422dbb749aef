"""One of two processes that feed the same metrics their share of clips. A module: spawned processes
import it.
"""

from __future__ import annotations

from typing import Any

import torch

from rest_lightning.evaluation.measures import Measure
from rest_lightning.metrics.frechet import FrechetDistance
from rest_lightning.metrics.sums import MeanMetric

NUM_CLIPS, NUM_FEATURES = 5, 5


def numbers_of(clips: range) -> dict[str, Any]:
    """The metrics of these clips and their notes; over all processes where there are several."""
    frechet, mean = FrechetDistance(NUM_FEATURES), MeanMetric(("a", "b"))
    for clip in clips:
        generator = torch.Generator().manual_seed(clip)
        frechet.update(torch.randn(11 + clip, NUM_FEATURES, generator=generator), real=True)
        frechet.update(
            1.2 * torch.randn(9 + clip, NUM_FEATURES, generator=generator) + 0.3, real=False
        )
        mean.update({"a": clip * 0.1, "b": float("nan") if clip == 3 else float(clip**2)})
    numbers = {**frechet.compute(), **mean.compute()}
    notes = [*Measure(frechet, frechet, {}).notes(), *Measure(mean, mean, {}).notes()]
    return numbers | {"notes": notes}


def run(rank: int, folder: str) -> None:
    """Process ``rank`` of two: three clips or two, then the reduced numbers on disk."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    torch.save(numbers_of(range(rank, NUM_CLIPS, 2)), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
