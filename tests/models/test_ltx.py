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

from rest_lightning.errors import UserError
from rest_lightning.models.ltx import load_ltx
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
    ltx: nn.Module,
    latents: Tensor,
    sigma: Tensor,
    text: Tensor,
    mask: Tensor | None,
    fps: float,
    causal: bool = False,
) -> Tensor:
    """Diffusers' forward with a noise level per latent frame (as timesteps per token).

    ``causal``: the times of diffusers' pipeline for LTX-Video 0.9.5 and later.
    """
    _, _, frames, height, width = latents.shape
    coordinates = None
    if causal:
        from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXConditionPipeline as Pipeline

        ids = Pipeline._prepare_video_ids(len(latents), frames, height, width)
        coordinates = Pipeline._scale_video_ids(ids, 32, 8, frame_index=0, device=None).float()
        coordinates[:, 0] *= 1.0 / fps
    velocity = ltx(
        hidden_states=latents.flatten(2).transpose(1, 2),
        encoder_hidden_states=text,
        timestep=(1000 * sigma).repeat_interleave(height * width, 1),
        encoder_attention_mask=mask,
        num_frames=frames,
        height=height,
        width=width,
        rope_interpolation_scale=(8 / fps, 32, 32),
        video_coords=coordinates,
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


@pytest.mark.parametrize("causal", [False, True])
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
    causal: bool,
) -> None:
    """Random weights in the shape of LTX-Video 0.9.0 and 0.9.1, and of 0.9.5 and later (causal)."""
    ltx = make_ltx(
        num_attention_heads=heads, attention_head_dim=head_dim, num_layers=layers, **changes
    )
    model = A2VDiT.from_ltx(ltx, causal, speech_dim=10, fps=fps)
    latents, sigma, text, mask = random_inputs(ltx.config.in_channels, frames, height, width)
    speech = torch.randn(2, frames, 2, 10)  # heard, but the speech attention's output is still zero
    with torch.no_grad():
        for text_mask in (None, mask):
            expected = run_ltx(ltx, latents, sigma, text, text_mask, fps, causal)
            actual = model(latents, sigma, speech, text, text_mask)
            assert float((actual - expected).abs().max()) <= 1e-5 * max(
                1.0, float(expected.abs().max())
            )


def test_gradients_equal_ltx() -> None:
    ltx = make_ltx()
    model = A2VDiT.from_ltx(ltx, False, speech_dim=None)
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
    model = A2VDiT.from_ltx(source, False, speech_dim=10)
    assert model.config["num_attention_heads"] == 2
    for name, value in ltx.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    latents, sigma, text, mask = random_inputs(6, 4, 2, 3)
    with torch.no_grad():
        difference = model(latents, sigma, None, text, mask) - run_ltx(
            ltx, latents, sigma, text, mask, 25
        )
    assert float(difference.abs().max()) <= 1e-5


# As the original files of these versions state it.
STATED = {
    "num_attention_heads": 2,
    "num_layers": 2,
    "norm_eps": 1e-6,
    "qk_norm": "rms_norm",
    "positional_embedding_type": "rope",
    "positional_embedding_theta": 10000.0,
    "positional_embedding_max_pos": [20, 2048, 2048],
    "timestep_scale_multiplier": 1000,
    "adaptive_norm": "single_scale_shift",
}


@pytest.mark.parametrize(
    ("version", "stated", "causal", "scale"),
    [
        ("0.9.1", {}, False, {}),
        ("0.9.5", {"causal_temporal_positioning": True}, True, {}),
        (
            "another",
            {
                "causal_temporal_positioning": True,
                "positional_embedding_theta": 100.0,
                "positional_embedding_max_pos": [10, 64, 32],
                "norm_eps": 1e-3,
            },
            True,
            {"theta": 100.0, "base_num_frames": 10, "base_height": 64, "base_width": 32},
        ),
    ],
)
def test_single_file_says_what_its_version_is(
    tmp_path: Path, version: str, stated: dict[str, Any], causal: bool, scale: dict[str, Any]
) -> None:
    ltx = make_ltx(norm_eps=stated.get("norm_eps", 1e-6))
    for name, value in scale.items():
        setattr(ltx.rope, name, value)
    source = tmp_path / f"ltx-{version}.safetensors"
    config = {"transformer": {**STATED, **stated}}
    save_file(original_names(ltx.state_dict()), source, {"config": json.dumps(config)})
    model = A2VDiT.from_ltx(source, speech_dim=10)
    assert model.config["causal_positions"] is causal
    latents, sigma, text, mask = random_inputs(6, 4, 2, 3)
    with torch.no_grad():
        expected = run_ltx(ltx, latents, sigma, text, mask, 25, causal)
        difference = model(latents, sigma, None, text, mask) - expected
        other = run_ltx(ltx, latents, sigma, text, mask, 25, not causal)
    assert float(difference.abs().max()) <= 1e-5
    assert float((other - expected).abs().max()) > 1e-3
    with pytest.raises(UserError, match=f"expected causal_positions {causal}, as .* states, got"):
        A2VDiT.from_ltx(source, not causal)
    again = A2VDiT.from_config(json.loads(json.dumps(model.config)))
    assert again.rope == model.rope


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("timestep_scale_multiplier", 1),
        ("qk_norm", "layer_norm"),
        ("adaptive_norm", "single_scale"),
        ("positional_embedding_type", "sinusoidal"),
        ("positional_embedding_max_pos", [20]),
        ("use_middle_indices_grid", True),
    ],
)
def test_stated_settings_that_are_not_covered_are_named(
    tmp_path: Path, name: str, value: Any
) -> None:
    source = tmp_path / "ltx.safetensors"
    metadata = {"config": json.dumps({"transformer": {**STATED, name: value}})}
    save_file(original_names(make_ltx().state_dict()), source, metadata)
    with pytest.raises(UserError, match=f"{name}.*not covered"):
        A2VDiT.from_ltx(source)


def test_sources_that_do_not_say_where_frames_are_need_a_word(tmp_path: Path) -> None:
    ltx = make_ltx()
    ltx.save_pretrained(tmp_path)
    message = "expected causal_positions .*0.9.0 and 0.9.1, true for 0.9.5 to 0.9.8"
    for source in (ltx, tmp_path):
        with pytest.raises(UserError, match=message):
            A2VDiT.from_ltx(source)
        model = A2VDiT.from_ltx(source, True, speech_dim=10)
        load_ltx(model, source)
        unsaid = A2VDiT.from_config({**model.config, "causal_positions": None})
        with pytest.raises(UserError, match=message):
            load_ltx(unsaid, source)


def test_keeps_dtype_and_overrides() -> None:
    model = A2VDiT.from_ltx(
        make_ltx().bfloat16(), False, speech_dim=10, spatial_embedding=(2, 3), attention="chunked"
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
        A2VDiT.from_ltx(tmp_path, False)


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
            A2VDiT.from_ltx(source, False)
    with pytest.raises(ValueError, match="patch_size=1, got 2"):
        A2VDiT.from_ltx(make_ltx(patch_size=2), False)
