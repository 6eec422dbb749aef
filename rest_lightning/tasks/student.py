"""The streaming student: chunk by chunk through the ID-Context Cache (REST sec. 3.2 and 3.4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rest_lightning.diffusion.losses import asd_loss
from rest_lightning.errors import UserError
from rest_lightning.models.autoencoder import VideoAutoencoder
from rest_lightning.models.speech import SpeechEncoder
from rest_lightning.models.speech_ae import SpeechAE
from rest_lightning.models.transformer import A2VDiT
from rest_lightning.parts import build_part, read_part
from rest_lightning.tasks.a2v import A2VModule, NoiseSettings, TrainingInput
from rest_lightning.tasks.base import OptimizerSettings


@dataclass
class ASDSettings:
    """Asynchronous streaming distillation (REST sec. 3.4).

    Attributes:
        teacher: checkpoint of the teacher stage, or a folder that holds its transformer.
        alpha: weight of the contrastive loss.
        beta: weight of the smoothness loss.
        temperature: of the contrastive loss.
    """

    teacher: str
    alpha: float = 0.2
    beta: float = 0.2
    temperature: float = 0.1


class StudentModule(A2VModule):
    """Trains an A2V-DiT with chunked attention: pre-training without, distillation with ``asd``.

    Training runs all chunks in one parallel forward, which equals the sequential cached computation.

    Args:
        transformer, speech_ae, speech_encoder, vae, noise, optimizer, initial, mouth_weight: see :class:`A2VModule`;
            ``initial`` takes the transformer from the teacher's checkpoint, whose parameter names are the same.
        asd: the distillation, or None for pre-training on ground truth only.
    """

    teacher: A2VDiT

    def __init__(
        self,
        transformer: A2VDiT,
        speech_ae: SpeechAE,
        speech_encoder: SpeechEncoder,
        vae: VideoAutoencoder | None = None,
        noise: NoiseSettings | None = None,
        optimizer: OptimizerSettings | None = None,
        initial: dict[str, str] | None = None,
        asd: ASDSettings | None = None,
        mouth_weight: float = 1.0,
    ) -> None:
        noise = noise or NoiseSettings()
        if transformer.config["attention"] != "chunked":
            raise UserError("expected a student with attention 'chunked', got 'full': that is the teacher's")
        if transformer.config["cache_options"]["chunk_length"] != noise.chunk_length:
            raise UserError(
                f"expected one chunk length, got {transformer.config['cache_options']['chunk_length']} in the "
                f"transformer's cache_options and {noise.chunk_length} in noise: make them equal"
            )
        frozen = {"teacher": _load_teacher(asd.teacher, transformer)} if asd else {}
        super().__init__(
            transformer,
            speech_ae,
            speech_encoder,
            vae,
            noise,
            optimizer,
            initial,
            frozen,  # type: ignore[arg-type]
            mouth_weight,
        )
        self.asd = asd

    def forward(self, inputs: TrainingInput) -> Tensor:
        """The network's velocity; with ``cache_noise: clean_pass`` later chunks read the clean latents."""
        clean = self.transformer.cache_options.cache_noise == "clean_pass"
        return self.transformer(
            inputs.path.noisy_latents,
            inputs.path.sigma,
            inputs.speech_latents,
            context_latents=inputs.clean_latents if clean else None,
        )

    def losses(self, inputs: TrainingInput) -> dict[str, Tensor]:
        """The flow loss to ground truth, and with ASD the teacher's contrastive and smoothness losses."""
        if self.asd is None:
            return super().losses(inputs)
        velocity = self(inputs)
        with torch.no_grad():
            teacher_velocity = self.teacher(inputs.path.noisy_latents, inputs.path.sigma, inputs.speech_latents)
        terms = asd_loss(
            velocity,
            teacher_velocity,
            inputs.path.velocity,
            alpha=self.asd.alpha,
            beta=self.asd.beta,
            temperature=self.asd.temperature,
            mask=inputs.weights,
        )
        error = (velocity - teacher_velocity)[:, :, 1:].detach().float().square().mean()
        return {
            "loss": terms.loss,
            "flow": terms.flow,
            "contrastive": terms.contrastive,
            "smoothness": terms.smoothness,
            "teacher_error": error,
        }


def _load_teacher(source: str, student: A2VDiT) -> A2VDiT:
    description, state = read_part("transformer", source)
    teacher = build_part(description)
    assert isinstance(teacher, A2VDiT)
    if teacher.config["attention"] != "full":
        raise UserError(f"expected a teacher with attention 'full', got a student in {source}")
    for name in ("in_channels", "num_layers", "num_attention_heads", "attention_head_dim", "speech_dim"):
        if teacher.config[name] != student.config[name]:
            raise UserError(
                f"expected a teacher of the student's shape, got {name} {teacher.config[name]} in {source} against "
                f"{student.config[name]}: use one transformer configuration for both stages"
            )
    teacher.load_state_dict(state)
    return teacher
