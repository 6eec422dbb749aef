"""What the A2V-DiT refuses: shapes and arguments that do not fit the model, each with the way out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from rest_lightning.errors import UserError

if TYPE_CHECKING:
    from rest_lightning.models.cache import IDContextCache
    from rest_lightning.models.layers import SigmaEmbedding
    from rest_lightning.models.transformer import A2VDiT


def check_latents(model: A2VDiT, latents: Tensor) -> None:
    """Raise a UserError unless ``latents`` are (B, C, f, h, w) of the model's channels and, where fixed, its size."""
    if latents.ndim != 5 or latents.shape[1] != model.in_channels:
        raise UserError(
            f"expected noisy_latents of shape (B, {model.in_channels}, f, h, w), got {tuple(latents.shape)}: "
            "set in_channels to the channels of the VAE"
        )
    if model.spatial_size is not None and tuple(latents.shape[3:]) != model.spatial_size:
        raise UserError(
            f"expected latents of {model.spatial_size[0]}x{model.spatial_size[1]} (spatial_embedding), "
            f"got {latents.shape[3]}x{latents.shape[4]}: use the size that the model was trained at"
        )


def check_sigma(model: A2VDiT, sigma: Tensor, latents: Tensor, name: str) -> None:
    """Raise a UserError unless ``sigma`` is (B, f)."""
    expected = (latents.shape[0], latents.shape[2])
    if tuple(sigma.shape) != expected:
        raise UserError(f"expected {name} of shape (B, f) = {expected}, got {tuple(sigma.shape)}: one per frame")


def check_chunks(model: A2VDiT, latents: Tensor, sigma: Tensor | SigmaEmbedding, context: Tensor | None) -> None:
    """Raise a UserError unless a whole clip has 1 + K * l latents and what its kind of cache is fed with."""
    length, num_frames = model.cache_options.chunk_length, latents.shape[2]
    if num_frames <= 1 or (num_frames - 1) % length:
        raise UserError(
            f"expected 1 + K * {length} latent frames (reference and K chunks), got {num_frames}: "
            f"cut the clip or change chunk_length"
        )
    noise = model.cache_options.cache_noise
    if noise == "clean_pass" and context is None:
        raise UserError("expected context_latents with cache_noise=clean_pass, got None: pass the clean latents")
    if noise == "per_step" and isinstance(sigma, Tensor) and bool((sigma[:, 1:] != sigma[:, 1:2]).any()):
        raise UserError(
            "expected one sigma for all chunks of a clip with cache_noise=per_step, got several: "
            "step s reads the keys of step s, so set the motion dropout to 1"
        )


def check_cache(model: A2VDiT, cache: IDContextCache, latents: Tensor) -> None:
    """Raise a UserError unless ``cache`` is the model's, with rows and size of ``latents``."""
    if model.attention != "chunked" or cache.options != model.cache_options:
        raise UserError("expected a cache of this very model, got another: use IDContextCache.allocate(model, ...)")
    expected = (cache.rows, cache.height, cache.width)
    got = (latents.shape[0], latents.shape[3], latents.shape[4])
    if got != expected:
        raise UserError(f"expected latents of the cache's (rows, h, w) = {expected}, got {got}: allocate it anew")
