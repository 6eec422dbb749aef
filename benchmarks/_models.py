"""The models that benchmarks/streaming.py measures: by name, on a device, in a type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._cost import read_student
from rest_lightning.diffusion.sampling import Sampling
from rest_lightning.models.ltx_vae import LTXVideoVAE
from rest_lightning.models.speech import LogMelEncoder
from rest_lightning.models.speech_ae import SpeechAE
from rest_lightning.models.transformer import A2VDiT
from rest_lightning.models.vae import CompactVAE
from rest_lightning.parts import PART_NAMES
from rest_lightning.talking_head import DEFAULT_MODEL, TalkingHead
from rest_lightning.torchvision_compat import ensure_torchvision

SIZES = ("tiny", "drawn", DEFAULT_MODEL, "paper")
# The model of drawn faces, 128x128, which shipped until 0.1: tests and figures of it need a clone.
DRAWN_FOLDER = Path(__file__).resolve().parent.parent / "tests" / "assets" / "drawn"
# Decoders in the style of published LTX-Video VAEs, which look ahead; widths are set by
# `halo_decoders`.
_LTX_STYLES: dict[str, dict[str, Any]] = {
    "LTX-Video 0.9": {"layers_per_block": [1] * 5, "decoder_layers_per_block": [1] * 5},
    "LTX-Video 0.9.1": {
        "layers_per_block": [1] * 5,
        "decoder_layers_per_block": [1] * 4,
        "decoder_spatio_temporal_scaling": [True] * 3,
        "decoder_inject_noise": [False] * 4,
        "upsample_residual": [True] * 3,
        "upsample_factor": [2] * 3,
        "timestep_conditioning": True,
    },
}


def load_head(size: str, device: str, dtype: torch.dtype) -> tuple[TalkingHead, str]:
    """A model and what its weights are: ``trained`` of the bundled model and the drawn one, else
    ``random``.
    """
    if size in (DEFAULT_MODEL, "drawn"):
        folder = DRAWN_FOLDER if size == "drawn" else None
        return TalkingHead.from_pretrained(folder, device=device, dtype=dtype), "trained"
    torch.manual_seed(0)
    head = _tiny() if size == "tiny" else _paper(device)
    # the speech encoder computes in float32, as in `TalkingHead.from_pretrained`
    for name in PART_NAMES:
        getattr(head, name).to(
            device=device, dtype=torch.float32 if name == "speech_encoder" else dtype
        )
    if device == "cuda":
        torch.cuda.empty_cache()
    return head, "random"


def _tiny() -> TalkingHead:
    transformer = A2VDiT(
        in_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        caption_channels=None,
        speech_dim=8,
        attention="chunked",
    )
    vae = CompactVAE(4, (8, 16, 16), (1, 1, 1), (1, 1, 1), ((4, 2), (2, 2)), patch_size=8)
    speech_ae = SpeechAE(feature_dim=160, num_tokens=2, latent_dim=8, width=8)
    settings = Sampling(num_steps=2, guidance=2.0, shift=1.0)
    return TalkingHead(
        vae, LogMelEncoder(lookahead_frames=2), speech_ae, transformer, settings, size_px=64
    )


def _paper(device: str) -> TalkingHead:
    """Made on the device, where drawing 2.8 billion weights takes no time; 8 steps, guidance 6
    (REST).
    """
    with torch.device(device):
        parts, size_px = read_student("paper")
    return TalkingHead(**parts, sampling=Sampling(), size_px=size_px)


def ltx_pair(head: TalkingHead) -> tuple[nn.Module, A2VDiT]:
    """Diffusers' transformer at the width and depth of ``head``'s, random, and ours with its
    weights.
    """
    ensure_torchvision()
    from diffusers.models.transformers.transformer_ltx import LTXVideoTransformer3DModel

    config = head.transformer.config
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    torch.manual_seed(0)
    with torch.device(head.device):
        ltx = LTXVideoTransformer3DModel(
            in_channels=config["in_channels"],
            out_channels=config["in_channels"],
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            num_layers=config["num_layers"],
            cross_attention_dim=heads * head_dim,
            caption_channels=64
            if config["caption_channels"] is None
            else config["caption_channels"],
        )
        ltx = ltx.to(dtype=head.dtype).eval().requires_grad_(False)
        ours = A2VDiT.from_ltx(ltx, causal_positions=False, speech_dim=None)
    return ltx, ours.to(head.device).eval().requires_grad_(False)


def run_ltx(ltx: nn.Module, latents: Tensor, sigma: Tensor, text: Tensor, fps: float) -> Tensor:
    """Diffusers' forward with a noise level per latent frame: velocity (B, C, f, h, w)."""
    _, _, frames, height, width = latents.shape
    velocity: Tensor = ltx(
        hidden_states=latents.flatten(2).transpose(1, 2),
        encoder_hidden_states=text,
        timestep=(1000 * sigma).repeat_interleave(height * width, 1),
        encoder_attention_mask=torch.ones(text.shape[:2], device=text.device),
        num_frames=frames,
        height=height,
        width=width,
        rope_interpolation_scale=(8 / fps, 32, 32),
        return_dict=False,
    )[0]
    return velocity.transpose(1, 2).unflatten(2, (frames, height, width))


def halo_decoders(width: int, device: str, seed: int = 0) -> dict[str, LTXVideoVAE]:
    """Stock LTX decoders (not causal) of random weights; ``width`` channels in the finest stage."""
    decoders = {}
    for name, style in _LTX_STYLES.items():
        torch.manual_seed(seed)
        config = {
            "latent_channels": 16,
            "block_out_channels": [width, 2 * width, 2 * width, 2 * width],
            "decoder_block_out_channels": [width, 2 * width, 2 * width, 2 * width],
            "decoder_causal": False,
            **style,
        }
        if len(style["decoder_layers_per_block"]) == 4:
            config["decoder_block_out_channels"] = [width, 2 * width, 4 * width]
        decoders[name] = LTXVideoVAE(ltx_config=config).eval().requires_grad_(False).to(device)
    return decoders
