"""LightningModules, one per training stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rest_lightning.names import lazy
from rest_lightning.torchvision_compat import ensure_torchvision

if TYPE_CHECKING:
    from rest_lightning.tasks.a2v import A2VModule as A2VModule
    from rest_lightning.tasks.a2v import NoiseSettings as NoiseSettings
    from rest_lightning.tasks.base import OptimizerSettings as OptimizerSettings
    from rest_lightning.tasks.base import StageModule as StageModule
    from rest_lightning.tasks.detail import DetailModule as DetailModule
    from rest_lightning.tasks.predict import EvaluateModule as EvaluateModule
    from rest_lightning.tasks.predict import PredictModule as PredictModule
    from rest_lightning.tasks.speech_ae import SpeechAEModule as SpeechAEModule
    from rest_lightning.tasks.student import ASDSettings as ASDSettings
    from rest_lightning.tasks.student import DistillSettings as DistillSettings
    from rest_lightning.tasks.student import RolloutSettings as RolloutSettings
    from rest_lightning.tasks.student import StudentModule as StudentModule
    from rest_lightning.tasks.teacher import TeacherModule as TeacherModule
    from rest_lightning.tasks.vae import VAELossWeights as VAELossWeights
    from rest_lightning.tasks.vae import VAEModule as VAEModule

# Before anything in here imports lightning or torchmetrics: both import torchvision.
ensure_torchvision()

__all__, __getattr__ = lazy(
    __name__,
    {
        "a2v": ["A2VModule", "NoiseSettings"],
        "base": ["OptimizerSettings", "StageModule"],
        "detail": ["DetailModule"],
        "predict": ["EvaluateModule", "PredictModule"],
        "speech_ae": ["SpeechAEModule"],
        "student": ["ASDSettings", "DistillSettings", "RolloutSettings", "StudentModule"],
        "teacher": ["TeacherModule"],
        "vae": ["VAELossWeights", "VAEModule"],
    },
)
