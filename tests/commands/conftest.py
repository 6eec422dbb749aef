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
    from tiny_head import make_quick_head

    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_quick_head().save_pretrained(folder)
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
