"""LTX weights: A2V-DiT with its speech attention at the zero start equals diffusers' own
network.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rest_lightning.models.transformer import A2VDiT
from rest_lightning.torchvision_compat import ensure_torchvision

TEXT_DIM = 12


def make_ltx(seed: int = 0, **changes: Any) -> Any:
    """A tiny LTX transformer with random weights."""
    ensure_torchvision()
    from diffusers.models.transformers.transformer_ltx import LTXVideoTransformer3DModel

    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "in_channels": 6,
        "out_channels": 6,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "caption_channels": TEXT_DIM,
        **changes,
    }
    config["cross_attention_dim"] = config["num_attention_heads"] * config["attention_head_dim"]
    model = LTXVideoTransformer3DModel(**config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return model.eval()


def run_ltx(
    ltx: nn.Module, latents: Tensor, sigma: Tensor, text: Tensor, mask: Tensor | None, fps: float
) -> Tensor:
    """Diffusers' forward with a noise level per latent frame (as timesteps per token)."""
    _, _, frames, height, width = latents.shape
    velocity = ltx(
        hidden_states=latents.flatten(2).transpose(1, 2),
        encoder_hidden_states=text,
        timestep=(1000 * sigma).repeat_interleave(height * width, 1),
        encoder_attention_mask=mask,
        num_frames=frames,
        height=height,
        width=width,
        rope_interpolation_scale=(8 / fps, 32, 32),
        return_dict=False,
    )[0]
    return velocity.transpose(1, 2).unflatten(2, (frames, height, width))


def random_inputs(
    channels: int, frames: int, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    latents = torch.randn(2, channels, frames, height, width)
    return (
        latents,
        torch.rand(2, frames),
        torch.randn(2, 5, TEXT_DIM),
        torch.tensor([[1, 1, 1, 0, 0], [1] * 5]),
    )


@pytest.mark.parametrize(
    ("heads", "head_dim", "layers", "frames", "height", "width", "fps", "changes"),
    [
        (1, 16, 1, 1, 2, 3, 25, {}),
        (2, 16, 2, 4, 2, 3, 25, {}),
        (4, 8, 3, 7, 4, 4, 24, {"in_channels": 3, "out_channels": 5}),
        (3, 12, 2, 13, 1, 2, 30, {"attention_bias": False}),
        (2, 18, 4, 5, 3, 2, 12.5, {"norm_elementwise_affine": True}),
        (8, 64, 1, 4, 2, 2, 25, {"attention_out_bias": False, "norm_eps": 1e-4}),
    ],
)
def test_equals_ltx(
    heads: int,
    head_dim: int,
    layers: int,
    frames: int,
    height: int,
    width: int,
    fps: float,
    changes: dict[str, Any],
) -> None:
    ltx = make_ltx(
        num_attention_heads=heads, attention_head_dim=head_dim, num_layers=layers, **changes
    )
    model = A2VDiT.from_ltx(ltx, speech_dim=10, fps=fps)
    latents, sigma, text, mask = random_inputs(ltx.config.in_channels, frames, height, width)
    speech = torch.randn(2, frames, 2, 10)  # heard, but the speech attention's output is still zero
    with torch.no_grad():
        for text_mask in (None, mask):
            expected = run_ltx(ltx, latents, sigma, text, text_mask, fps)
            actual = model(latents, sigma, speech, text, text_mask)
            assert float((actual - expected).abs().max()) <= 1e-5 * max(
                1.0, float(expected.abs().max())
            )


def test_gradients_equal_ltx() -> None:
    ltx = make_ltx()
    model = A2VDiT.from_ltx(ltx, speech_dim=None)
    latents, sigma, text, mask = random_inputs(6, 4, 2, 3)
    run_ltx(ltx, latents, sigma, text, mask, 25).square().mean().backward()
    model(latents, sigma, None, text, mask).square().mean().backward()
    own = dict(model.named_parameters())
    assert set(own) == {name for name, _ in ltx.named_parameters()}
    for name, parameter in ltx.named_parameters():
        gradient = own[name].grad
        assert gradient is not None
        assert torch.allclose(gradient, parameter.grad, rtol=1e-4, atol=1e-5), name


def original_names(
    state: dict[str, Tensor], prefix: str = "model.diffusion_model."
) -> dict[str, Tensor]:
    """Diffusers' names turned back into those of the original single file."""
    renames = {
        "proj_in": "patchify_proj",
        "time_embed": "adaln_single",
        "norm_q": "q_norm",
        "norm_k": "k_norm",
    }
    renamed = {}
    for name, value in state.items():
        for ours, theirs in renames.items():
            name = name.replace(ours, theirs)
        renamed[prefix + name] = value.contiguous()
    return renamed


@pytest.mark.parametrize("kind", ["folder", "pipeline", "single_file", "bare_single_file"])
def test_loads_from_disk(kind: str, tmp_path: Path) -> None:
    ltx = make_ltx()
    if kind in ("folder", "pipeline"):
        ltx.save_pretrained(tmp_path / "transformer" if kind == "pipeline" else tmp_path)
        source = tmp_path
    else:
        source = tmp_path / "ltx.safetensors"
        state = original_names(
            ltx.state_dict(), "model.diffusion_model." if kind == "single_file" else ""
        )
        metadata = {"config": json.dumps({"transformer": {"num_attention_heads": 2}})}
        save_file({**state, "vae.decoder.conv_in.bias": torch.zeros(1)}, source, metadata)
    model = A2VDiT.from_ltx(source, speech_dim=10)
    assert model.config["num_attention_heads"] == 2
    for name, value in ltx.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    latents, sigma, text, mask = random_inputs(6, 4, 2, 3)
    with torch.no_grad():
        difference = model(latents, sigma, None, text, mask) - run_ltx(
            ltx, latents, sigma, text, mask, 25
        )
    assert float(difference.abs().max()) <= 1e-5


def test_keeps_dtype_and_overrides() -> None:
    model = A2VDiT.from_ltx(
        make_ltx().bfloat16(), speech_dim=10, spatial_embedding=(2, 3), attention="chunked"
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.attention == "chunked"
    assert not model.spatial_embedding.any()


def test_left_over_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    state = original_names(make_ltx().state_dict())
    metadata = {"config": json.dumps({"transformer": {"num_attention_heads": 2}})}
    name = "model.diffusion_model.transformer_blocks.1.attn1.to_q.bias"
    cases = [
        (
            {**state, "model.diffusion_model.extra.weight": torch.zeros(1)},
            ("1 left over: extra.weight"),
        ),
        (
            {k: v for k, v in state.items() if k != name},
            ("1 missing: transformer_blocks.1.attn1.to_q.bias"),
        ),
        (
            {**state, name: torch.zeros(3)},
            ("1 of another shape: transformer_blocks.1.attn1.to_q.bias"),
        ),
        ({"model.diffusion_model.x": torch.zeros(1)}, "got no proj_in.weight"),
    ]
    for i, (broken, message) in enumerate(cases):
        save_file(broken, tmp_path / f"{i}.safetensors", metadata)
        with pytest.raises(ValueError, match=message):
            A2VDiT.from_ltx(tmp_path / f"{i}.safetensors", speech_dim=10)


def test_left_over_tensors_of_a_folder_are_named(tmp_path: Path) -> None:
    ltx = make_ltx()
    ltx.save_pretrained(tmp_path)
    save_file(
        {**ltx.state_dict(), "extra.weight": torch.zeros(1)},
        tmp_path / "diffusion_pytorch_model.safetensors",
    )
    with pytest.raises(ValueError, match=r"left over.*extra.weight"):
        A2VDiT.from_ltx(tmp_path)


def test_bad_sources(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("not weights")
    sources: list[tuple[Any, str]] = [
        (tmp_path, "expected a folder with config.json"),
        (tmp_path / "absent.safetensors", "got no such path"),
        (tmp_path / "text.safetensors", "expected LTX weights as safetensors"),
        (nn.Linear(2, 2), "expected an LTXVideoTransformer3DModel, got Linear"),
    ]
    for source, message in sources:
        with pytest.raises(ValueError, match=message):
            A2VDiT.from_ltx(source)
    with pytest.raises(ValueError, match="patch_size=1, got 2"):
        A2VDiT.from_ltx(make_ltx(patch_size=2))
