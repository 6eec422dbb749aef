"""torchmetrics classes over pure functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rest_lightning.names import lazy
from rest_lightning.torchvision_compat import ensure_torchvision

if TYPE_CHECKING:
    from rest_lightning.metrics.extractors import FeatureExtractor as FeatureExtractor
    from rest_lightning.metrics.extractors import load_extractor as load_extractor
    from rest_lightning.metrics.frechet import EFID as EFID
    from rest_lightning.metrics.frechet import FID as FID
    from rest_lightning.metrics.frechet import FVD as FVD
    from rest_lightning.metrics.identity import IdentitySimilarity as IdentitySimilarity
    from rest_lightning.metrics.mouth import MouthOpeningEstimator as MouthOpeningEstimator
    from rest_lightning.metrics.mouth import mouth_opening as mouth_opening
    from rest_lightning.metrics.reconstruction import ReconstructionScores as ReconstructionScores
    from rest_lightning.metrics.sums import MeanMetric as MeanMetric
    from rest_lightning.metrics.sums import check_clip as check_clip
    from rest_lightning.metrics.sync import SyncScore as SyncScore
    from rest_lightning.metrics.video import TalkingScores as TalkingScores
    from rest_lightning.metrics.video import VideoScores as VideoScores

# Before anything in here imports lightning or torchmetrics: both import torchvision.
ensure_torchvision()

__all__, __getattr__ = lazy(
    __name__,
    {
        "extractors": ["FeatureExtractor", "load_extractor"],
        "frechet": ["EFID", "FID", "FVD"],
        "identity": ["IdentitySimilarity"],
        "mouth": ["MouthOpeningEstimator", "mouth_opening"],
        "reconstruction": ["ReconstructionScores"],
        "sums": ["MeanMetric", "check_clip"],
        "sync": ["SyncScore"],
        "video": ["TalkingScores", "VideoScores"],
    },
)
