"""Tiny LTX VAEs in the style of three published versions, for the tests of the wrapper."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rest_lightning.models.ltx_vae import LTXVideoVAE
from rest_lightning.torchvision_compat import ensure_torchvision

CONFIGS: dict[str, dict[str, Any]] = {
    "0.9.0": {
        "latent_channels": 4,
        "block_out_channels": [4, 8, 8, 8],
        "decoder_block_out_channels": [4, 8, 8, 8],
        "layers_per_block": [1, 1, 1, 1, 1],
        "decoder_layers_per_block": [1, 1, 1, 1, 1],
        "scaling_factor": 0.7,
    },
    "0.9.1": {
        "latent_channels": 6,
        "block_out_channels": [8, 8, 8, 8],
        "decoder_block_out_channels": [8, 16, 32],
        "layers_per_block": [1, 2, 1, 1, 1],
        "decoder_layers_per_block": [1, 2, 1, 1],
        "decoder_spatio_temporal_scaling": [True, True, True],
        "decoder_inject_noise": [False, False, False, False],
        "upsample_residual": [True, True, True],
        "upsample_factor": [2, 2, 2],
        "timestep_conditioning": True,
    },
    "0.9.5": {
        "latent_channels": 4,
        "block_out_channels": [4, 8, 8, 16, 16],
        "down_block_types": ["LTXVideo095DownBlock3D"] * 4,
        "decoder_block_out_channels": [8, 16, 32],
        "layers_per_block": [1, 1, 1, 1, 1],
        "decoder_layers_per_block": [1, 1, 1, 1],
        "spatio_temporal_scaling": [True, True, True, True],
        "decoder_spatio_temporal_scaling": [True, True, True],
        "decoder_inject_noise": [False, False, False, False],
        "downsample_type": ["spatial", "temporal", "spatiotemporal", "spatiotemporal"],
        "upsample_residual": [True, True, True],
        "upsample_factor": [2, 2, 2],
        "timestep_conditioning": True,
        "spatial_compression_ratio": 32,
        "temporal_compression_ratio": 8,
    },
}


def make_ltx(version: str = "0.9.0", seed: int = 0, **changes: Any) -> Any:
    """A tiny AutoencoderKLLTXVideo with random weights and statistics."""
    ensure_torchvision()
    from diffusers.models.autoencoders.autoencoder_kl_ltx import AutoencoderKLLTXVideo

    torch.manual_seed(seed)
    ltx = AutoencoderKLLTXVideo(**{**CONFIGS[version], **changes})
    ltx.latents_mean.normal_()
    ltx.latents_std.uniform_(0.5, 2.0)
    return ltx.eval().requires_grad_(False)


def wrap(ltx: Any, **arguments: Any) -> LTXVideoVAE:
    """Our network with the weights of ``ltx``, through our own state dict."""
    config = {name: value for name, value in ltx.config.items() if not name.startswith("_")}
    vae = LTXVideoVAE(ltx_config=config, **arguments)
    vae.ltx.load_state_dict(ltx.state_dict())
    vae.latents_mean.copy_(ltx.latents_mean)
    vae.latents_std.copy_(ltx.latents_std / ltx.config.scaling_factor)
    return vae.eval().requires_grad_(False)


def make_vae(
    version: str = "0.9.0", causal: bool = True, seed: int = 0, **arguments: Any
) -> LTXVideoVAE:
    return wrap(make_ltx(version, seed, decoder_causal=causal), **arguments)


def random_latents(
    vae: LTXVideoVAE, num_frames: int, batch: int = 2, size: tuple[int, int] = (1, 2)
) -> Tensor:
    return torch.randn(batch, vae.latent_channels, num_frames, *size)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Random decoders leave [-1, 1]: the tolerance grows with them."""
    assert actual.shape == expected.shape
    assert float((actual - expected).detach().abs().max()) <= tolerance * max(
        1.0, float(expected.detach().abs().max())
    )
