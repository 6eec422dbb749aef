"""Plain PyTorch networks; nothing in here imports Lightning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rest_lightning.names import lazy

if TYPE_CHECKING:
    from rest_lightning.models.attention import Rope as Rope
    from rest_lightning.models.cache import CacheOptions as CacheOptions
    from rest_lightning.models.cache import IDContextCache as IDContextCache
    from rest_lightning.models.detail import AgreementDetail as AgreementDetail
    from rest_lightning.models.detail import DetailTransfer as DetailTransfer
    from rest_lightning.models.detail import EnlargedDetail as EnlargedDetail
    from rest_lightning.models.detail import LearnedDetail as LearnedDetail
    from rest_lightning.models.discriminator import PatchDiscriminator as PatchDiscriminator
    from rest_lightning.models.ltx_vae import LTXVideoVAE as LTXVideoVAE
    from rest_lightning.models.speech import LogMelEncoder as LogMelEncoder
    from rest_lightning.models.speech import SpeechEncoder as SpeechEncoder
    from rest_lightning.models.speech import WhisperEncoder as WhisperEncoder
    from rest_lightning.models.speech_ae import SpeechAE as SpeechAE
    from rest_lightning.models.speech_ae import SpeechPooling as SpeechPooling
    from rest_lightning.models.speech_ae import SpeechProjection as SpeechProjection
    from rest_lightning.models.transformer import A2VDiT as A2VDiT
    from rest_lightning.models.vae import CompactVAE as CompactVAE
    from rest_lightning.models.vae import VideoAutoencoder as VideoAutoencoder

__all__, __getattr__ = lazy(
    __name__,
    {
        "attention": ["Rope"],
        "cache": ["CacheOptions", "IDContextCache"],
        "detail": ["AgreementDetail", "DetailTransfer", "EnlargedDetail", "LearnedDetail"],
        "discriminator": ["PatchDiscriminator"],
        "ltx_vae": ["LTXVideoVAE"],
        "speech": ["LogMelEncoder", "SpeechEncoder", "WhisperEncoder"],
        "speech_ae": ["SpeechAE", "SpeechPooling", "SpeechProjection"],
        "transformer": ["A2VDiT"],
        "vae": ["CompactVAE", "VideoAutoencoder"],
    },
)
