"""Students of a few thousand parameters, with the stages around them and draws to feed them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rest_lightning.models.cache import CacheOptions
from rest_lightning.models.speech import LogMelEncoder
from rest_lightning.models.speech_ae import SpeechAE
from rest_lightning.models.transformer import A2VDiT
from rest_lightning.parts import PARTS_KEY, describe_part
from rest_lightning.tasks.a2v import Conditions, NoiseSettings, TrainingInput
from rest_lightning.tasks.base import OptimizerSettings
from rest_lightning.tasks.student import StudentModule
from rest_lightning.tasks.teacher import TeacherModule

CHANNELS, SPEECH_DIM = 4, 8


def make_transformer(
    attention: str = "chunked", seed: int = 0, std: float = 0.15, **options: Any
) -> A2VDiT:
    """Random weights everywhere, so that no path is hidden behind a zero start."""
    generator = torch.Generator().manual_seed(seed)
    model = A2VDiT(
        in_channels=CHANNELS,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=10,
        caption_channels=None,
        speech_dim=SPEECH_DIM,
        attention=attention,  # type: ignore[arg-type]
        cache_options=CacheOptions(**options),
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std, generator=generator)
    return model


def make_parts(seed: int = 0) -> dict[str, Any]:
    """SpeechAE and speech encoder of a stage."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        speech_ae = SpeechAE(feature_dim=160, num_tokens=2, latent_dim=SPEECH_DIM, width=8)
    return {"speech_ae": speech_ae, "speech_encoder": LogMelEncoder(lookahead_frames=2)}


def make_student(transformer: A2VDiT | None = None, **settings: Any) -> StudentModule:
    """A student stage; ``settings`` are asd, rollout and distill, and those of the noise."""
    transformer = transformer or make_transformer()
    stages = {name: settings.pop(name, None) for name in ("asd", "rollout", "distill")}
    noise = NoiseSettings(chunk_length=transformer.cache_options.chunk_length, **settings)
    optimizer = OptimizerSettings(lr=3e-3, warmup_steps=1)
    return StudentModule(transformer, **make_parts(), noise=noise, optimizer=optimizer, **stages)


def make_teacher(**settings: Any) -> TeacherModule:
    """A teacher stage with the same transformer, attending fully."""
    optimizer = OptimizerSettings(lr=3e-3, warmup_steps=1)
    transformer = make_transformer("full", seed=1)
    return TeacherModule(
        transformer, **make_parts(), noise=NoiseSettings(**settings), optimizer=optimizer
    )


def save_transformer(transformer: A2VDiT, path: Path) -> str:
    """A checkpoint with this transformer and a SpeechAE, as a stage would have written it."""
    parts = {"transformer": transformer, "speech_ae": make_parts()["speech_ae"]}
    state = {
        f"{part}.{name}": value
        for part, network in parts.items()
        for name, value in network.state_dict().items()
    }
    descriptions = {part: describe_part(network) for part, network in parts.items()}
    torch.save({"state_dict": state, PARTS_KEY: descriptions}, path)
    return str(path)


def make_conditions(
    batch: int = 2, num_frames: int = 7, height: int = 2, width: int = 2, seed: int = 0
) -> Conditions:
    """Latents and speech latents of some clip."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, CHANNELS, num_frames, height, width, generator=generator)
    return Conditions(latents, torch.randn(batch, num_frames, 2, SPEECH_DIM, generator=generator))


def rows_of(inputs: TrainingInput, rows: slice) -> TrainingInput:
    """Some rows of a draw: what one of several processes would have drawn."""

    def cut(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value[rows]
        if value is None or isinstance(value, int):
            return value
        return replace(value, **{name: part[rows] for name, part in vars(value).items()})

    return replace(inputs, **{name: cut(value) for name, value in vars(inputs).items()})


def train_on(module: StudentModule, inputs: TrainingInput, num_steps: int) -> list[float]:
    """The losses of ``num_steps`` optimiser steps on one draw."""
    optimizer = module.configure_optimizers()["optimizer"]
    losses = []
    for _ in range(num_steps):
        loss = module.losses(inputs)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
