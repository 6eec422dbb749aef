"""Prepared clips: layout, reading, the data module, and the makers of data sets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rest_lightning.names import lazy

if TYPE_CHECKING:
    from rest_lightning.data.augment import SpeechAugmentation as SpeechAugmentation
    from rest_lightning.data.dataset import PreparedClips as PreparedClips
    from rest_lightning.data.layout import ManifestRow as ManifestRow
    from rest_lightning.data.layout import Sidecar as Sidecar
    from rest_lightning.data.layout import read_manifest as read_manifest
    from rest_lightning.data.layout import read_sidecar as read_sidecar
    from rest_lightning.data.module import TalkingHeadDataModule as TalkingHeadDataModule
    from rest_lightning.data.streams import PredictPair as PredictPair
    from rest_lightning.data.streams import SpeechStream as SpeechStream
    from rest_lightning.data.window_cache import LatentsCache as LatentsCache
    from rest_lightning.data.window_cache import SpeechCache as SpeechCache
    from rest_lightning.data.window_cache import encode_dataset as encode_dataset
    from rest_lightning.data.window_cache import encode_speech as encode_speech

__all__, __getattr__ = lazy(
    __name__,
    {
        "augment": ["SpeechAugmentation"],
        "dataset": ["PreparedClips"],
        "layout": ["ManifestRow", "Sidecar", "read_manifest", "read_sidecar"],
        "module": ["TalkingHeadDataModule"],
        "streams": ["PredictPair", "SpeechStream"],
        "window_cache": ["LatentsCache", "SpeechCache", "encode_dataset", "encode_speech"],
    },
)
