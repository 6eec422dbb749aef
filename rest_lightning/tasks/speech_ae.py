"""Training of SpeechAE (READ), and the speech features that all stages read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rest_lightning.constants import SAMPLES_PER_FRAME
from rest_lightning.diffusion.losses import SpeechAELoss, speech_ae_loss
from rest_lightning.errors import UserError
from rest_lightning.models.speech import SpeechEncoder
from rest_lightning.models.speech_ae import SpeechAE
from rest_lightning.tasks.base import OptimizerSettings, StageModule


class SpeechAEModule(StageModule):
    """Trains SpeechAE to reconstruct windows of speech features: ``10 * MSE + frame InfoNCE``
    (READ).

    Args:
        speech_ae: the network.
        speech_encoder: frozen.
        temperature: of the InfoNCE term; READ does not give it.
        optimizer: AdamW settings; READ trains this stage at 1e-4.
        initial: ``{"speech_ae": checkpoint or folder}``.
    """

    speech_ae: SpeechAE
    speech_encoder: SpeechEncoder

    def __init__(
        self,
        speech_ae: SpeechAE,
        speech_encoder: SpeechEncoder,
        temperature: float = 0.1,
        optimizer: OptimizerSettings | None = None,
        initial: dict[str, str] | None = None,
    ) -> None:
        super().__init__(
            {"speech_ae": speech_ae}, {"speech_encoder": speech_encoder}, initial, optimizer
        )
        self.temperature = temperature

    def forward(self, features: Tensor) -> Tensor:
        """Returns the reconstruction of speech features (B, F, 10, D_A)."""
        return self.speech_ae.decode(self.speech_ae.encode(features))

    def losses(self, batch: dict[str, Any]) -> SpeechAELoss:
        """Returns the losses of one batch."""
        self.check_maker(batch, "speech_of", self.speech_encoder, with_config=True)
        with torch.no_grad():
            features = speech_features(batch, self.speech_encoder)
        return speech_ae_loss(self(features), features, temperature=self.temperature)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Returns the loss of one step; logs every term."""
        terms = self.losses(batch)
        self.log_dict(
            {
                f"train/{name}": getattr(terms, name).detach()
                for name in ("loss", "mse", "contrastive")
            }
        )
        self.log("train_loss", terms.loss.detach(), prog_bar=True, logger=False)
        return terms.loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Logs the same losses on held-out clips."""
        terms = self.losses(batch)
        for name in ("loss", "mse", "contrastive"):
            self.log(
                f"val/{name}",
                getattr(terms, name),
                prog_bar=name == "mse",
                batch_size=len(batch["audio"]),
                sync_dist=True,
            )


def speech_features(batch: Mapping[str, Any], encoder: SpeechEncoder) -> Tensor:
    """Returns the features (B, F, 10, D_A) of a batch, from the cache on disk where the batch has
    them (``speech_steps``), else by ``encoder``.
    """
    audio = crop_audio(batch, encoder)
    if "speech_steps" in batch:
        return encoder.unpack(batch["speech_steps"], encoder.num_frames(audio))
    # Row by row, as the cache is made: matrix products round differently in larger batches.
    return torch.cat([encoder(row) for row in audio.split(1)])


def crop_audio(batch: Mapping[str, Any], encoder: SpeechEncoder) -> Tensor:
    """Returns the audio of a batch, cut to the margins that ``encoder`` reads.

    Args:
        batch: ``audio`` (B, 640 * (left + F + right)) and its ``audio_margin_frames``; a batch
            without the latter has the encoder's margins already.
        encoder: reads left and right context beyond the clip.

    Raises:
        UserError: margins that are too small.
    """
    audio: Tensor = batch["audio"]
    left, right = encoder.left_context_frames, encoder.lookahead_frames
    have_left, have_right = batch.get("audio_margin_frames", (left, right))
    if have_left < left or have_right < right:
        raise UserError(
            f"expected at least {left} and {right} frames of audio around a clip for this speech "
            "encoder, got "
            f"{have_left} and {have_right}: raise data.audio_left_frames and "
            "data.audio_right_frames"
        )
    start = (have_left - left) * SAMPLES_PER_FRAME
    end = audio.shape[1] - (have_right - right) * SAMPLES_PER_FRAME
    return audio[:, start:end]
