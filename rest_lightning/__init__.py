"""rest_lightning: train, evaluate and stream REST talking heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rest_lightning.constants import VERSION as __version__  # noqa: F401
from rest_lightning.names import accept_old_names as _accept_old_names
from rest_lightning.names import lazy

if TYPE_CHECKING:
    from rest_lightning.diffusion.sampling import Sampling as Sampling
    from rest_lightning.errors import UserError as UserError
    from rest_lightning.models.transformer import A2VDiT as A2VDiT
    from rest_lightning.streaming.batch import BatchSession as BatchSession
    from rest_lightning.streaming.engine import EngineOptions as EngineOptions
    from rest_lightning.streaming.session import StreamingSession as StreamingSession
    from rest_lightning.talking_head import TalkingHead as TalkingHead

__all__, __getattr__ = lazy(
    __name__,
    {
        "diffusion.sampling": ["Sampling"],
        "errors": ["UserError"],
        "models.transformer": ["A2VDiT"],
        "streaming.batch": ["BatchSession"],
        "streaming.engine": ["EngineOptions"],
        "streaming.session": ["StreamingSession"],
        "talking_head": ["TalkingHead"],
    },
)
_accept_old_names()
