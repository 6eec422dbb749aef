"""Talking heads of a few thousand parameters, with random weights, 64x64 frames."""

from __future__ import annotations

from typing import Any

import torch

from rest_lightning.diffusion.sampling import Sampling
from rest_lightning.models.cache import CacheOptions
from rest_lightning.models.detail import DetailTransfer
from rest_lightning.models.speech import LogMelEncoder
from rest_lightning.models.speech_ae import SpeechAE
from rest_lightning.models.transformer import A2VDiT
from rest_lightning.models.vae import CompactVAE
from rest_lightning.talking_head import TalkingHead


def make_head(
    chunk_length: int = 3,
    lookahead_frames: int = 2,
    seed: int = 0,
    detail: DetailTransfer | None = None,
    caption_channels: int | None = None,
    **cache_options: Any,
) -> TalkingHead:
    """Random weights, also where training starts from zero, so that every input matters.

    With ``caption_channels`` the transformer reads a prompt of 9 tokens, 4 of them padding.
    """
    head = _build(
        seed,
        Sampling(num_steps=2, guidance=1.5, shift=1.0),
        lookahead_frames,
        detail,
        num_layers=2,
        caption_channels=caption_channels,
        prompt_length=None if caption_channels is None else 9,
        cache_options=CacheOptions(chunk_length=chunk_length, **cache_options),
    )
    if head.transformer.prompt_embeds is not None and head.transformer.prompt_mask is not None:
        head.transformer.prompt_embeds.normal_()
        head.transformer.prompt_mask[5:] = 0
    for parameter in head.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return head


def make_quick_head() -> TalkingHead:
    """One block and one step, for tests of what lies around a model; 24 frames per chunk."""
    return _build(
        0, Sampling(num_steps=1, guidance=1.0, shift=1.0), num_layers=1, caption_channels=None
    )


def _build(
    seed: int,
    sampling: Sampling,
    lookahead_frames: int = 2,
    detail: DetailTransfer | None = None,
    **transformer: Any,
) -> TalkingHead:
    torch.manual_seed(seed)
    return TalkingHead(
        CompactVAE(4, (8, 16, 16), (1, 1, 1), (1, 1, 1), ((4, 2), (2, 2)), patch_size=8),
        LogMelEncoder(lookahead_frames=lookahead_frames),
        SpeechAE(feature_dim=160, num_tokens=2, latent_dim=8, width=8),
        A2VDiT(
            in_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            speech_dim=8,
            attention="chunked",
            **transformer,
        ),
        sampling,
        size_px=64,
        detail=detail,
    )
