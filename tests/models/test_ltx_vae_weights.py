"""The LTX VAE: configurations, weights from folders and files, errors, and a talking head on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_ltx import CONFIGS, assert_close, make_ltx, make_vae, random_latents, wrap
from torch import Tensor

from rest_lightning.diffusion.sampling import Sampling
from rest_lightning.errors import UserError
from rest_lightning.models.cache import CacheOptions
from rest_lightning.models.causal import Stream
from rest_lightning.models.ltx_vae import VERSIONS, LTXVideoVAE, streamed_decode
from rest_lightning.models.speech import LogMelEncoder
from rest_lightning.models.speech_ae import SpeechAE
from rest_lightning.models.transformer import A2VDiT
from rest_lightning.parts import build_part, describe_part, fingerprint_of
from rest_lightning.streaming.engine import to_uint8
from rest_lightning.talking_head import TalkingHead


@pytest.mark.parametrize("version", CONFIGS)
def test_configuration_rebuilds_the_network(version: str) -> None:
    vae = make_vae(
        version, causal=version != "0.9.1", decode_timestep=0.1, decode_noise_scale=0.2, halo=3
    )
    description = json.loads(json.dumps(describe_part(vae)))
    assert description == describe_part(vae)
    other = build_part(description)
    assert isinstance(other, LTXVideoVAE)
    other.load_state_dict(vae.state_dict())
    assert other.config == vae.config
    assert fingerprint_of(other) == fingerprint_of(vae)
    latents = random_latents(vae, 3)
    assert torch.equal(other.eval().decode(latents), vae.decode(latents))


@pytest.mark.parametrize("kind", ["folder", "pipeline"])
@pytest.mark.parametrize("version", CONFIGS)
def test_loads_a_diffusers_folder(version: str, kind: str, tmp_path: Path) -> None:
    ltx = make_ltx(version)
    ltx.save_pretrained(tmp_path / "vae" if kind == "pipeline" else tmp_path)
    vae = LTXVideoVAE(str(tmp_path))
    assert "weights" not in vae.config
    for name, value in ltx.state_dict().items():
        assert torch.equal(vae.ltx.state_dict()[name], value), name
    torch.testing.assert_close(vae.latents_mean, ltx.latents_mean.expand(2, -1))
    torch.testing.assert_close(
        vae.latents_std, ltx.latents_std.expand(2, -1) / ltx.config.scaling_factor
    )
    latents = random_latents(vae, 3)
    assert torch.equal(vae.decode(latents), wrap(ltx).decode(latents))


def test_folder_with_changes(tmp_path: Path) -> None:
    ltx = make_ltx()
    ltx.save_pretrained(tmp_path)
    vae = LTXVideoVAE(str(tmp_path), {"decoder_causal": True})
    assert vae.decoder_causal
    assert vae.config["ltx_config"]["decoder_causal"]
    latents = random_latents(vae, 5)
    assert_close(vae.decode(latents), make_vae().decode(latents))
    assert_close(streamed_decode(vae, latents, 2), vae.decode(latents))


def test_versions(tmp_path: Path) -> None:
    make_ltx("0.9.0").save_pretrained(tmp_path)
    names = "block_out_channels|decoder_block_out_channels|decoder_inject_noise"
    with pytest.raises(UserError, match=f"expected an LTX VAE 0.9.1 in .*, got ({names})"):
        LTXVideoVAE(str(tmp_path), version="0.9.1")
    with pytest.raises(UserError, match=r"expected a version of .*, 0\.9\.5, got '0\.9\.2'"):
        LTXVideoVAE(version="0.9.2")
    with torch.device("meta"):
        networks = {version: LTXVideoVAE(version=version) for version in VERSIONS}
    conditioned = {name: vae.ltx.config.timestep_conditioning for name, vae in networks.items()}
    assert conditioned == {"0.9.0": False, "0.9.1": True, "0.9.5": True}
    injected = {name: any(vae.ltx.config.decoder_inject_noise) for name, vae in networks.items()}
    assert injected == {"0.9.0": False, "0.9.1": True, "0.9.5": False}


# Blocks of LTX-Video 0.9.0's single file in their order there, under diffusers' names.
ORIGINAL_BLOCKS = {
    "encoder.down_blocks": (
        *("down_blocks.0", "down_blocks.0.downsamplers.0", "down_blocks.0.conv_out"),
        *("down_blocks.1", "down_blocks.1.downsamplers.0", "down_blocks.1.conv_out"),
        *("down_blocks.2", "down_blocks.2.downsamplers.0", "down_blocks.3", "mid_block"),
    ),
    "decoder.up_blocks": (
        *(
            "mid_block",
            "up_blocks.0",
            "up_blocks.1.upsamplers.0",
            "up_blocks.1",
            "up_blocks.2.conv_in",
        ),
        *(
            "up_blocks.2.upsamplers.0",
            "up_blocks.2",
            "up_blocks.3.conv_in",
            "up_blocks.3.upsamplers.0",
            "up_blocks.3",
        ),
    ),
}


def original_names(ltx: Any) -> dict[str, Tensor]:
    """The tensors under the names of LTX-Video 0.9.0's single file."""
    renamed = {
        "vae.per_channel_statistics.mean-of-means": ltx.latents_mean,
        "vae.per_channel_statistics.std-of-means": ltx.latents_std,
        "vae.per_channel_statistics.channel": torch.zeros(1),
    }
    for name, value in ltx.state_dict().items():
        side, _, rest = name.partition(".")
        for family, blocks in ORIGINAL_BLOCKS.items():
            inside = [
                block
                for block in blocks
                if family.startswith(side) and rest.startswith(block + ".")
            ]
            if inside:
                block = max(inside, key=len)
                rest = f"{family.split('.')[1]}.{blocks.index(block)}{rest.removeprefix(block)}"
                break
        for ours, theirs in (
            ("resnets", "res_blocks"),
            ("norm3", "norm3.norm"),
            ("conv_shortcut.conv", "conv_shortcut"),
        ):
            rest = rest.replace(ours, theirs)
        if not name.startswith("latents_"):
            renamed[f"vae.{side}.{rest}"] = value.contiguous()
    return renamed


def test_loads_an_original_single_file(tmp_path: Path) -> None:
    ltx = make_ltx(decoder_block_out_channels=[4, 6, 8, 8])
    config = {**CONFIGS["0.9.0"], "decoder_block_out_channels": [4, 6, 8, 8]}
    path = tmp_path / "ltx-video.safetensors"
    save_file({**original_names(ltx), "model.diffusion_model.proj_out.bias": torch.zeros(1)}, path)
    vae = LTXVideoVAE(str(path), config)
    for name, value in ltx.state_dict().items():
        assert torch.equal(vae.ltx.state_dict()[name], value), name
    alone = tmp_path / "vae.safetensors"
    save_file(
        {name.removeprefix("vae."): value for name, value in original_names(ltx).items()}, alone
    )
    assert fingerprint_of(LTXVideoVAE(str(alone), config)) == fingerprint_of(vae)
    save_file(ltx.state_dict(), alone)  # diffusers' names already
    assert fingerprint_of(LTXVideoVAE(str(alone), config)) == fingerprint_of(vae)
    other = {**config, "latent_channels": 5}
    with pytest.raises(
        ValueError,
        match=(
            r"got \d+ of another shape: .*; give the `ltx_config` of "
            r"these weights"
        ),
    ):
        LTXVideoVAE(str(path), other)
    name = "vae.encoder.conv_in.conv.bias"
    for broken, message in [
        (
            {k: v for k, v in original_names(ltx).items() if k != name},
            (
                r"got 1 missing: "
                r"encoder.conv_in.conv.bias"
            ),
        ),
        (
            {**original_names(ltx), "vae.extra.weight": torch.zeros(1)},
            (
                r"got 1 left over: "
                r"extra.weight"
            ),
        ),
        (
            {"proj_out.bias": torch.zeros(1)},
            (
                r"got no vae.encoder.conv_out.conv.weight: get them "
                r"with"
            ),
        ),
    ]:
        save_file(broken, alone)
        with pytest.raises(ValueError, match=message):
            LTXVideoVAE(str(alone), config)


def test_bad_weights(tmp_path: Path) -> None:
    make_ltx().save_pretrained(tmp_path / "good")
    (tmp_path / "empty").mkdir()
    for name in ("other", "bare", "short", "long"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(
            (tmp_path / "good" / "config.json").read_text()
        )
    (tmp_path / "other" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    weights = "diffusion_pytorch_model.safetensors"
    state = load_file(tmp_path / "good" / weights)
    save_file(state, tmp_path / "other" / weights)
    save_file({**state, "extra.weight": torch.zeros(1)}, tmp_path / "long" / weights)
    save_file(
        {name: v for name, v in state.items() if name != "encoder.conv_in.conv.bias"},
        tmp_path / "short" / weights,
    )
    (tmp_path / "text.safetensors").write_text("not weights")
    for source, message in [
        (
            "empty",
            (
                r"expected an LTX VAE with config.json, looked in .*empty: get them with `hf "
                r"download"
            ),
        ),
        (
            "bare",
            (
                r"expected an LTX VAE with diffusion_pytorch_model.safetensors, looked in "
                r".*bare: "
                r"get them"
            ),
        ),
        ("other", r"expected an AutoencoderKLLTXVideo in .*other, got AutoencoderKL: "),
        ("short", r"missing: encoder.conv_in.conv.bias"),
        ("long", r"left over: extra.weight"),
        ("absent", r"looked in .*absent: get them with"),
        (
            "text.safetensors",
            (
                r"expected an LTX VAE as safetensors in .*text.safetensors: .*hf "
                r"download"
            ),
        ),
    ]:
        with pytest.raises(ValueError, match=message) as raised:
            LTXVideoVAE(str(tmp_path / source))
        assert "\n" not in str(raised.value)
    with pytest.raises(
        ValueError,
        match=(
            r"nobody/nothing \(config.json and .*\), looked in .* and the hub cache "
            r".*hf download"
        ),
    ):
        LTXVideoVAE("nobody/nothing")
    with pytest.raises(ValueError, match=r"got decoder_casual: did you mean decoder_causal"):
        LTXVideoVAE(str(tmp_path / "good"), {"decoder_casual": True})
    with pytest.raises(ValueError, match=r"expected weights of an AutoencoderKLLTXVideo in .*good"):
        LTXVideoVAE(str(tmp_path / "good"), {"latent_channels": 5})


def test_bad_arguments() -> None:
    tiny = CONFIGS["0.9.0"]
    for arguments, message in [
        ({"halo": -1}, "at least 0 latents, got -1"),
        ({"decode_timestep": 1.5}, "expected decode_timestep in"),
        ({"decode_noise_scale": -0.1}, "expected decode_noise_scale in"),
        ({"ltx_config": {**tiny, "patch_size": 2}}, "32x in space.*got 8x, 16x"),
        (
            {"ltx_config": {**tiny, "decoder_spatio_temporal_scaling": [True, True, False, False]}},
            "LTX decoder of 8x",
        ),
        ({"ltx_config": {**tiny, "layers": 3}}, "got layers: "),
        ({"ltx_config": {**tiny, "down_block_types": ["x"] * 4}}, "Unknown down block type: x"),
    ]:
        with pytest.raises(ValueError, match=message):
            LTXVideoVAE(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="8n\\+1"):
        make_vae().encode(torch.zeros(1, 3, 8, 32, 32))


def make_head(causal: bool) -> TalkingHead:
    vae = make_vae("0.9.5", causal=causal)
    transformer = A2VDiT(
        in_channels=vae.latent_channels,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
        caption_channels=None,
        speech_dim=8,
        attention="chunked",
        cache_options=CacheOptions(chunk_length=3),
    )
    speech_ae = SpeechAE(feature_dim=160, num_tokens=2, latent_dim=8, width=8)
    sampling = Sampling(num_steps=2, guidance=1.0, shift=1.0)
    return TalkingHead(
        vae, LogMelEncoder(lookahead_frames=2), speech_ae, transformer, sampling, size_px=64
    )


@pytest.mark.parametrize("causal", [True, False])
def test_talking_head(causal: bool, tmp_path: Path) -> None:
    head = make_head(causal)
    portrait = torch.rand(3, 64, 64) * 2 - 1
    samples = np.random.default_rng(1).normal(scale=0.2, size=60 * 640).astype(np.float32)

    def frames_of(head: TalkingHead, cuts: list[int]) -> np.ndarray:
        session = head.open(portrait)
        return np.concatenate(
            [*(session.push(block) for block in np.split(samples, cuts)), session.flush()]
        )

    frames = frames_of(head, [])
    assert frames.shape == (60, 64, 64, 3)
    assert frames.std() > 5
    assert np.array_equal(frames, frames_of(head, [1, 20_000, 20_001]))
    head.save_pretrained(tmp_path / "head")
    assert np.array_equal(frames, frames_of(TalkingHead.from_pretrained(tmp_path / "head"), []))
    if not causal:
        return
    latents: list[Tensor] = []
    session = head.open(portrait)
    vae = session.engine.tables.vae  # on a CPU a copy with packed weights
    decode_chunk = vae.decode_chunk

    def recorded(chunk: Tensor, stream: Stream) -> Tensor:
        latents.append(chunk.clone())  # the engine decodes from one static buffer
        return decode_chunk(chunk, stream)

    vae.decode_chunk = recorded  # type: ignore[assignment, method-assign]
    session.push(samples)
    session.flush()
    with torch.inference_mode():
        reference = head.vae.encode(portrait[None, :, None])
        whole = to_uint8(head.vae.decode(torch.cat([reference, *latents], dim=2)))[0, 1:61].numpy()
    assert np.abs(whole.astype(int) - frames.astype(int)).max() <= 1
