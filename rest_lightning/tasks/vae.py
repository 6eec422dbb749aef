"""Training of the spatiotemporal VAE."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from rest_lightning.constants import SPATIAL_RATIO
from rest_lightning.errors import UserError
from rest_lightning.metrics.image import border_jump_ratio, psnr_db
from rest_lightning.models.discriminator import PatchDiscriminator, random_pieces
from rest_lightning.models.vae import (
    PrincipalPath,
    VideoAutoencoder,
    check_frames,
    fit_principal_path,
)
from rest_lightning.tasks.base import OptimizerSettings, StageModule
from rest_lightning.tasks.regions import landmarks_of, random_crops, region_weights

_PIECES = 4  # of each clip, that the discriminator judges in a step
# Its own loss counts little: gradients are clipped together, by a length that is to be the VAE's.
# AdamW divides the factor out again.
_DOUBT = 0.03
PRINCIPAL_FRAMES = 17  # length of the windows that the principal path is fitted to


@dataclass
class VAELossWeights:
    """Weights of the VAE's losses.

    The papers name no losses of a VAE; docs/method.md#vae tells why these were chosen.

    Attributes:
        l1: absolute error of pixels.
        l2: squared error of pixels, as in PSNR; it weighs the few large errors of a moving mouth.
        difference: absolute error of the differences of neighbouring frames.
        border: factor on the differences across a latent border (frames 8k and 8k + 1), where
            temporal compression makes videos jump.
        kl: Kullback-Leibler divergence of the latents from a unit Gaussian, per value.
        lpips: LPIPS of single frames; needs the published VGG weights.
        adversarial: what a discriminator's judgement weighs: the length of its gradient at the
            frames, where 1 is that of all losses above together (LDM's adaptive weight, but at the
            frames). It points the same way everywhere, so a few hundredths are much. Errors of
            pixels alone paint the mean of all mouths that a latent may mean, which is grey.
        mouth, eyes: weight of a mouth's or an eye's pixels, where any other pixel counts 1.
        motion: how much more a pixel weighs per unit of its distance from its mean over time,
            averaged over the colours (range 2). Without it a blurred mouth that hardly moves costs
            little, and lips cannot be read from reconstructions.
    """

    l1: float = 1.0
    l2: float = 0.0
    difference: float = 1.0
    border: float = 1.0
    kl: float = 1e-7
    lpips: float = 0.0
    adversarial: float = 0.0
    mouth: float = 1.0
    eyes: float = 1.0
    motion: float = 0.0


class VAEModule(StageModule):
    """Trains a :class:`VideoAutoencoder` on clips; a validation measures the latents' statistics.

    Args:
        vae: the network.
        loss_weights: weights of the losses.
        optimizer: AdamW settings.
        initial: ``{"vae": checkpoint or folder}`` to start from.
        principal_batches: batches to which the principal path of the network is fitted, before the
            first step of a new training; 0 leaves the path as it is. With ``initial`` it is fitted
            to the new data, and the trained network adds nothing to the path at first.
        whitening: of the components, see :func:`~rest_lightning.models.vae.fit_principal_path`.
        train_encoder: False trains the decoder alone and measures no statistics, so that existing
            latents, and models trained on them, stay valid. A VAE with published statistics
            (LTX-Video's) needs that, since they belong to its published encoder.
        latent_noise: largest strength of the noise that is added to normalised latents before they
            are decoded, drawn for each clip, in training only: a generated latent is never exactly
            one of the encoder's. Needs measured statistics.
        crop_px: side of a random square that training sees of every clip, a multiple of 32. A
            convolutional network learns as much from a quarter of the pixels, in a quarter of the
            time. None takes whole frames; the last minutes should do so, for the frames' borders.
        mouth_crops: share of these squares that are placed around the mouth, 0 to 1.
        discriminator: trained along, for ``loss_weights.adversarial``; None where that is 0.
        adversarial_start: step from which its judgement counts, fully from twice that step on;
            until then it learns alone.

    Raises:
        UserError: ``principal_batches`` for a network that has no principal path, a ``crop_px``
            that is no multiple of 32, ``mouth_crops`` outside 0 to 1, or ``train_encoder`` where
            published statistics rule.
    """

    vae: VideoAutoencoder
    discriminator: PatchDiscriminator

    def __init__(
        self,
        vae: VideoAutoencoder,
        loss_weights: VAELossWeights | None = None,
        optimizer: OptimizerSettings | None = None,
        initial: dict[str, str] | None = None,
        principal_batches: int = 0,
        whitening: float = 0.5,
        train_encoder: bool = True,
        latent_noise: float = 0.0,
        crop_px: int | None = None,
        mouth_crops: float = 0.5,
        discriminator: PatchDiscriminator | None = None,
        adversarial_start: int = 100,
    ) -> None:
        loss_weights = loss_weights or VAELossWeights()
        if bool(loss_weights.adversarial) != (discriminator is not None):
            raise UserError(
                "expected a discriminator with loss_weights.adversarial above 0, and none without, "
                f"got {loss_weights.adversarial:g} and {type(discriminator).__name__}: set both, "
                "or neither"
            )
        judges = {} if discriminator is None else {"discriminator": discriminator}
        super().__init__({"vae": vae, **judges}, {}, initial, optimizer)
        self.loss_weights, self.adversarial_start = loss_weights, adversarial_start
        if crop_px is not None and (crop_px < SPATIAL_RATIO or crop_px % SPATIAL_RATIO):
            raise UserError(
                f"expected a crop_px that is a multiple of {SPATIAL_RATIO}, got {crop_px}: use 128"
            )
        if not 0 <= mouth_crops <= 1:
            raise UserError(f"expected mouth_crops from 0 to 1, got {mouth_crops:g}: use 0.5")
        self.crop_px, self.mouth_crops = crop_px, mouth_crops
        if principal_batches and self._principal_path() is None:
            raise UserError(
                "principal_batches: expected a VAE with a principal path, got "
                f"{type(vae).__name__} without one: set "
                "principal_components of a CompactVAE, or leave principal_batches out"
            )
        self.principal_batches, self.starts_from_weights = principal_batches, bool(initial)
        self.whitening = whitening
        if train_encoder and not vae.measures_statistics:
            raise UserError(
                f"expected train_encoder false for {type(vae).__name__}, whose published "
                "statistics of the latents rule, got true: a trained encoder would make other "
                "latents"
            )
        self.train_encoder, self.latent_noise = train_encoder, latent_noise
        if not train_encoder:
            freeze_encoder(vae)
        self.lpips: nn.Module | None = None
        if self.loss_weights.lpips:
            from rest_lightning.metrics.reconstruction import load_lpips

            self.lpips = load_lpips()
        self._moments = LatentMoments(self.vae.latent_channels)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns reconstruction, mean and log-variance; latents are sampled in training only."""
        mean, log_variance = self.vae.encode_moments(frames)
        latents = mean
        if self.training:
            latents = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
        if self.training and self.latent_noise:
            strength = self.latent_noise * torch.rand(len(mean), 1, 1, 1, 1, device=mean.device)
            normal = self.vae.normalise(latents)
            latents = self.vae.denormalise(normal + strength * torch.randn_like(normal))
        return self.vae.decode_raw(latents), mean, log_variance

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Returns each loss of a batch by name, unweighted, and their weighted sum as ``loss``;
        ``adversarial`` and ``discriminator`` in training only.
        """
        frames = batch["frames"]
        check_frames(frames)
        landmarks = landmarks_of(batch, frames.shape[2])
        weights = self.loss_weights
        pixel_weights = region_weights(landmarks, frames.shape[-2:], weights.mouth, weights.eyes)
        if self.training and self.crop_px is not None and self.crop_px < min(frames.shape[-2:]):
            frames, pixel_weights = random_crops(
                frames, pixel_weights, landmarks[:, :, 0], self.crop_px, self.mouth_crops
            )
        if weights.motion:
            moved = (frames - frames.mean(dim=2, keepdim=True)).abs().mean(dim=1, keepdim=True)
            pixel_weights = pixel_weights * (1 + weights.motion * moved)
        reconstruction, mean, log_variance = self(frames)
        error = reconstruction.float() - frames
        terms = {
            "l1": (pixel_weights * error.abs()).mean(),
            "l2": (pixel_weights * error.square()).mean(),
            "difference": _difference_loss(error, pixel_weights, weights.border),
            "kl": 0.5
            * (
                mean.float().square() + log_variance.float().exp() - 1.0 - log_variance.float()
            ).mean(),
        }
        if self.lpips is not None:
            pairs = [
                video.transpose(1, 2).flatten(0, 1) for video in (reconstruction.float(), frames)
            ]
            terms["lpips"] = self.lpips(*pairs).mean()
        loss = torch.stack([getattr(weights, name) * value for name, value in terms.items()]).sum()
        if weights.adversarial and self.training:
            terms |= self._judged(reconstruction, frames, loss)
            loss = loss + _DOUBT * terms["discriminator"]
            late = self.global_step + 1 - self.adversarial_start
            ramp = min(1.0, max(0.0, late / max(1, self.adversarial_start)))
            loss = loss + ramp * weights.adversarial * terms["adversarial"]
        return {**terms, "loss": loss}

    def _judged(self, fake: Tensor, real: Tensor, others: Tensor) -> dict[str, Tensor]:
        """The hinge losses of the discriminator, and of the decoder whose frames it judges.

        One optimiser serves both: each loss reaches the weights of its own side alone. That of the
        decoder is scaled so that its gradient at the frames is as long as that of ``others``.
        """
        judge = self.discriminator
        fakes, reals = random_pieces((fake, real), judge.num_frames, _PIECES)
        doubt = F.relu(1 + judge(fakes.detach())).mean() + F.relu(1 - judge(reals)).mean()
        praise = -judge.unmoved(fakes).mean()
        wanted, had = (
            torch.autograd.grad(loss, fake, retain_graph=True)[0].float().norm()
            for loss in (others, praise)
        )
        scale = (wanted / had.clamp(min=1e-8)).clamp(max=1e4)
        return {"adversarial": scale * praise, "discriminator": doubt}

    def on_train_start(self) -> None:
        """Fits the principal path to training data, once."""
        super().on_train_start()
        path = self._principal_path()
        if path is None or not self.principal_batches or self.global_step:
            return
        strategy = self.trainer.strategy
        psnr = fit_principal_path(
            path,
            self._weighted_frames,
            self.whitening,
            lambda x: strategy.reduce(x, reduce_op="sum"),
        )
        path.load_state_dict(strategy.broadcast(path.state_dict()))
        if self.starts_from_weights:
            # What the network added to the old path is wrong for the new one.
            self.vae.silence()  # type: ignore[operator]
        rank_zero_info(
            f"principal path: {psnr:.1f} dB on {self.principal_batches} weighted batches before "
            "training"
        )

    def _principal_path(self) -> PrincipalPath | None:
        path = getattr(self.vae, "principal", None)
        return path if isinstance(path, PrincipalPath) else None

    def _weighted_frames(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Frames and pixel weights of ``principal_batches`` batches; the order of the training's
        own batches does not change.
        """
        loader: Any = self.trainer.train_dataloader  # type: ignore[attr-defined]
        if not hasattr(loader, "sample_batches"):
            raise UserError(
                "principal_batches: expected the loader of a TalkingHeadDataModule to draw clips "
                f"from, got {type(loader).__name__}: pass `datamodule=` to fit, or leave "
                "principal_batches out"
            )
        for batch in itertools.islice(
            loader.sample_batches(PRINCIPAL_FRAMES), self.principal_batches
        ):
            frames, landmarks = (batch[name].to(self.device) for name in ("frames", "landmarks"))
            weights = self.loss_weights
            yield frames, region_weights(landmarks, frames.shape[-2:], weights.mouth, weights.eyes)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Returns the loss of one step; logs every term."""
        terms = self.losses(batch)
        self.log_dict({f"train/{name}": value.detach() for name, value in terms.items()})
        self.log("lr", self.optimizers().param_groups[0]["lr"], prog_bar=True)  # type: ignore[union-attr]
        self.log("train_loss", terms["loss"].detach(), prog_bar=True, logger=False)
        return terms["loss"]

    def on_validation_epoch_start(self) -> None:
        """Forgets the statistics of the last validation."""
        self._moments = LatentMoments(self.vae.latent_channels)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Logs the quality of reconstructions, and adds to the latents' statistics."""
        frames = batch["frames"]
        size = frames.shape[0]
        reconstruction, mean, _ = self(frames)
        reconstruction = reconstruction.float()
        self._moments.update(mean.float())
        landmarks = landmarks_of(batch, frames.shape[2])
        mouth = region_weights(landmarks, frames.shape[-2:], 2.0, 1.0) - 1.0
        squared = (reconstruction.clamp(-1, 1) - frames).square()
        mouth_error = (squared * mouth).sum(dim=(1, 2, 3, 4)) / (
            3 * mouth.sum(dim=(1, 2, 3, 4))
        ).clamp(min=1.0)
        shown = {
            "val/psnr_db": psnr_db(squared.mean(dim=(1, 2, 3, 4))).mean(),
            "val/mouth_psnr_db": psnr_db(mouth_error).mean(),
            "val/jump_ratio": border_jump_ratio(reconstruction),
        }
        self.log_dict(shown, prog_bar=True, batch_size=size, sync_dist=True)
        truth = border_jump_ratio(frames)
        self.log("val/jump_ratio_truth", truth, batch_size=size, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Stores the statistics of all processes' clips in the network."""
        if not (self.train_encoder and self.vae.measures_statistics):
            return
        strategy = self.trainer.strategy
        moments = self._moments.reduced(
            lambda x: strategy.reduce(x.to(self.device), reduce_op="sum").cpu()
        )
        if moments.count[1] > 0:
            mean, std = moments.compute()
            self.vae.latents_mean.copy_(mean)
            self.vae.latents_std.copy_(std)


def freeze_encoder(vae: VideoAutoencoder) -> None:
    """Takes the encoder out of the training, so that latents stay as they are."""
    for name, parameter in vae.named_parameters():
        if any(piece.startswith("encoder") for piece in name.split(".")):
            parameter.requires_grad_(False)


class LatentMoments:
    """Running sums, in float64, for the mean and the deviation of each channel.

    Slot 0, which encodes a single frame, has statistics of its own.
    """

    def __init__(self, num_channels: int) -> None:
        self.count = torch.zeros(2, 1, dtype=torch.float64)
        self.sum = torch.zeros(2, num_channels, dtype=torch.float64)
        self.square_sum = torch.zeros(2, num_channels, dtype=torch.float64)

    def update(self, latents: Tensor) -> None:
        """Takes in raw latents (B, C, f, h, w)."""
        groups = [latents[:, :, :1], latents[:, :, 1:]]
        flat = [group.detach().double().cpu().movedim(1, 0).flatten(1) for group in groups]
        self.count += torch.tensor([[group.shape[1]] for group in flat], dtype=torch.float64)
        self.sum += torch.stack([group.sum(1) for group in flat])
        self.square_sum += torch.stack([group.square().sum(1) for group in flat])

    def reduced(self, total: Callable[[Tensor], Tensor]) -> LatentMoments:
        """Returns the sums of all processes; ``total`` adds a tensor up over them."""
        together = LatentMoments(self.sum.shape[1])
        for name in ("count", "sum", "square_sum"):
            setattr(together, name, total(getattr(self, name).clone()))
        return together

    def compute(self) -> tuple[Tensor, Tensor]:
        """Returns mean and standard deviation, float32 (2, C) each: slot 0, then all others."""
        mean = self.sum / self.count
        variance = (self.square_sum / self.count - mean.square()).clamp(min=1e-8)
        return mean.float(), variance.sqrt().float()


def _difference_loss(error: Tensor, pixel_weights: Tensor, border: float) -> Tensor:
    if error.shape[2] < 2:
        return error.new_zeros(())  # single images
    change = error[:, :, 1:] - error[:, :, :-1]
    weights = torch.where(torch.arange(change.shape[2], device=error.device) % 8 == 0, border, 1.0)
    return (pixel_weights[:, :, 1:] * weights[:, None, None] * change.abs()).mean()
