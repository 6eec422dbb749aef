"""A tiny model on disk, a portrait and short speech, all made here."""

from __future__ import annotations

import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from stills import face

from rest_lightning.constants import SAMPLE_RATE


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of a few thousand random parameters, 64x64 frames, 24 frames per chunk."""
    import torch

    from rest_lightning.diffusion.sampling import Sampling
    from rest_lightning.models.speech import LogMelEncoder
    from rest_lightning.models.speech_ae import SpeechAE
    from rest_lightning.models.transformer import A2VDiT
    from rest_lightning.models.vae import CompactVAE
    from rest_lightning.talking_head import TalkingHead

    torch.manual_seed(0)
    head = TalkingHead(
        CompactVAE(4, (8, 16, 16), (1, 1, 1), (1, 1, 1), ((4, 2), (2, 2)), patch_size=8),
        LogMelEncoder(lookahead_frames=2),
        SpeechAE(feature_dim=160, num_tokens=2, latent_dim=8, width=8),
        A2VDiT(
            in_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=16,
            caption_channels=None,
            speech_dim=8,
            attention="chunked",
        ),
        Sampling(num_steps=1, guidance=1.0, shift=1.0),
        size_px=64,
    )
    folder = tmp_path_factory.mktemp("model") / "tiny"
    head.save_pretrained(folder)
    return folder


@pytest.fixture
def portrait(tmp_path: Path) -> Path:
    """A face as a PNG of 80x96."""
    face(80, 96).save(tmp_path / "portrait.png")
    return tmp_path / "portrait.png"


@pytest.fixture
def make_speech(tmp_path: Path) -> Callable[..., Path]:
    """Writes a 16-bit wav of so many samples of noise at 16 kHz."""

    def make(num_samples: int, name: str = "speech.wav") -> Path:
        noise = np.random.default_rng(0).normal(scale=2000, size=num_samples).astype("<i2")
        with wave.open(str(tmp_path / name), "wb") as file:
            file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
            file.writeframes(noise.tobytes())
        return tmp_path / name

    return make
