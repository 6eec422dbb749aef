"""rest_lightning: train, evaluate and stream REST talking heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rest_lightning.constants import VERSION as __version__

__all__ = [
    "A2VDiT",
    "BatchSession",
    "EngineOptions",
    "SamplingSettings",
    "StreamingSession",
    "TalkingHead",
    "UserError",
    "__version__",
]

if TYPE_CHECKING:
    from rest_lightning.diffusion.sampling import SamplingSettings
    from rest_lightning.errors import UserError
    from rest_lightning.models.transformer import A2VDiT
    from rest_lightning.streaming.batch import BatchSession
    from rest_lightning.streaming.engine import EngineOptions
    from rest_lightning.streaming.session import StreamingSession
    from rest_lightning.talking_head import TalkingHead

_HOMES = {
    "A2VDiT": "rest_lightning.models.transformer",
    "BatchSession": "rest_lightning.streaming.batch",
    "EngineOptions": "rest_lightning.streaming.engine",
    "SamplingSettings": "rest_lightning.talking_head",
    "StreamingSession": "rest_lightning.streaming.session",
    "TalkingHead": "rest_lightning.talking_head",
    "UserError": "rest_lightning.errors",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: commands that need no model do not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'rest_lightning' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
