"""Training of the network that adds the portrait's detail to decoded frames (not in REST)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rest_lightning.metrics.image import psnr_db
from rest_lightning.models.causal import Stream
from rest_lightning.models.detail import DetailTransfer
from rest_lightning.models.vae import VideoAutoencoder, check_frames
from rest_lightning.tasks.base import OptimizerSettings, StageModule
from rest_lightning.tasks.regions import landmarks_of, region_weights


class DetailModule(StageModule):
    """Trains a :class:`~rest_lightning.models.detail.DetailTransfer` on reconstructions of a frozen
    VAE.

    The portrait is the batch's ``reference``. With ``data.reference: clip_start`` that is the still
    that an animated clip was made from; its later frames show the same face moved.

    Args:
        detail: the network.
        vae: frozen.
        optimizer: AdamW settings.
        initial: ``{"vae": checkpoint or folder}``, and ``detail`` to go on.
        latent_noise: largest strength of the noise on normalised latents, drawn for each clip,
            since generated latents are never exact.
        num_frames: frames of a window that each step trains on, evenly spread (the decoder has to
            decode all of them).
        mouth_weight, eyes_weight: weights of their pixels, where any other pixel counts 1.
    """

    detail: DetailTransfer
    vae: VideoAutoencoder

    def __init__(
        self,
        detail: DetailTransfer,
        vae: VideoAutoencoder,
        optimizer: OptimizerSettings | None = None,
        initial: dict[str, str] | None = None,
        latent_noise: float = 0.2,
        num_frames: int = 6,
        mouth_weight: float = 3.0,
        eyes_weight: float = 3.0,
    ) -> None:
        super().__init__({"detail": detail}, {"vae": vae}, initial, optimizer)
        self.latent_noise, self.num_frames = latent_noise, num_frames
        self.mouth_weight, self.eyes_weight = mouth_weight, eyes_weight

    @torch.no_grad()
    def decode(self, frames: Tensor, reference: Tensor, noise: float) -> tuple[Tensor, Tensor]:
        """Returns the decoded frames (B, 3, F, H, W) after slot 0 and the decoded portrait
        (B, 3, H, W), as a stream would decode them.
        """
        portrait = self.vae.encode(reference[:, :, None])
        latents = torch.cat([portrait, self.vae.encode(frames)[:, :, 1:]], dim=2)
        if noise:
            strength = noise * torch.rand(len(latents), 1, 1, 1, 1, device=latents.device)
            latents[:, :, 1:] += strength * torch.randn_like(latents[:, :, 1:])
        decoded = self.vae.decode(latents)
        return decoded[:, :, 1:], decoded[:, :, 0]

    def forward(self, decoded: Tensor, reference: Tensor, reconstruction: Tensor) -> Tensor:
        """Returns decoded frames (B, 3, F, H, W) with the detail of a portrait (B, 3, H, W)."""
        stream = _KeepsGradients()
        self.detail.start(reference, reconstruction, stream)
        return self.detail(decoded, stream)

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Returns the weighted absolute and squared errors of the frames, and ``loss``, their sum
        with a weight of 4 on the squared one.
        """
        frames, reference = batch["frames"], batch["reference"]
        check_frames(frames)
        decoded, reconstruction = self.decode(frames, reference, self.latent_noise)
        chosen = torch.randperm(decoded.shape[2])[: self.num_frames].sort().values.to(frames.device)
        decoded, truth = decoded[:, :, chosen], frames[:, :, 1 + chosen]
        landmarks = landmarks_of(batch, frames.shape[2])[:, 1 + chosen]
        weights = region_weights(landmarks, frames.shape[-2:], self.mouth_weight, self.eyes_weight)
        error = self(decoded, reference, reconstruction).float() - truth
        terms = {"l1": (weights * error.abs()).mean(), "l2": (weights * error.square()).mean()}
        return {**terms, "loss": terms["l1"] + 4.0 * terms["l2"]}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Returns the loss of one step; logs every term."""
        terms = self.losses(batch)
        self.log_dict({f"train/{name}": value.detach() for name, value in terms.items()})
        self.log("train_loss", terms["loss"].detach(), prog_bar=True, logger=False)
        return terms["loss"]

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Logs the PSNR with and without the detail, of whole frames and of the mouth, and that of
        the portrait itself.
        """
        frames, reference = batch["frames"], batch["reference"]
        decoded, reconstruction = self.decode(frames, reference, 0.0)
        truth = frames[:, :, 1:]
        landmarks = landmarks_of(batch, frames.shape[2])[:, 1:]
        mouth = region_weights(landmarks, frames.shape[-2:], 2.0, 1.0) - 1.0
        for name, video in (("vae", decoded), ("detail", self(decoded, reference, reconstruction))):
            squared = (video.float().clamp(-1, 1) - truth).square()
            at_mouth = (squared * mouth).sum(dim=(1, 2, 3, 4)) / (
                3 * mouth.sum(dim=(1, 2, 3, 4))
            ).clamp(min=1.0)
            whole = squared.mean(dim=(1, 2, 3, 4))
            self._log_psnr(f"{name}_psnr_db", whole)
            self._log_psnr(f"{name}_mouth_psnr_db", at_mouth)
        still = (
            self(reconstruction[:, :, None], reference, reconstruction)[:, :, 0]
            .float()
            .clamp(-1, 1)
        )
        self._log_psnr("portrait_psnr_db", (still - reference).square().mean(dim=(1, 2, 3)))

    def _log_psnr(self, name: str, errors: Tensor) -> None:
        value = psnr_db(errors).mean()
        self.log(f"val/{name}", value, prog_bar=True, batch_size=len(errors), sync_dist=True)


class _KeepsGradients(Stream):
    """A stream for one forward: the pasts of layers stay in the graph of gradients."""

    def remember(self, name: str, past: Tensor) -> None:
        self[name] = past
