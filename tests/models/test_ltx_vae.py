"""The LTX VAE: whole clips equal diffusers, causal streams equal whole clips, halos, weights, a talking head on it."""

from __future__ import annotations

import copy
import json
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rest_lightning.commands.encode import fingerprint_of
from rest_lightning.models.cache import CacheOptions
from rest_lightning.models.causal import Stream
from rest_lightning.models.ltx_vae import LTXVideoVAE, frame_noise, streamed_decode, streaming_error
from rest_lightning.models.speech import LogMelEncoder
from rest_lightning.models.speech_ae import SpeechAE
from rest_lightning.models.transformer import A2VDiT
from rest_lightning.parts import build_part, describe_part
from rest_lightning.streaming.engine import to_uint8
from rest_lightning.talking_head import SamplingSettings, TalkingHead
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


def make_vae(version: str = "0.9.0", causal: bool = True, seed: int = 0, **arguments: Any) -> LTXVideoVAE:
    return wrap(make_ltx(version, seed, decoder_causal=causal), **arguments)


def random_latents(vae: LTXVideoVAE, num_frames: int, batch: int = 2, size: tuple[int, int] = (1, 2)) -> Tensor:
    return torch.randn(batch, vae.latent_channels, num_frames, *size)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Random decoders leave [-1, 1]: the tolerance grows with them."""
    assert actual.shape == expected.shape
    assert float((actual - expected).detach().abs().max()) <= tolerance * max(1.0, float(expected.detach().abs().max()))


@pytest.mark.parametrize("version", CONFIGS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("num_frames", "size"), [(1, (32, 32)), (9, (32, 64)), (17, (64, 32))])
def test_equals_diffusers(version: str, causal: bool, num_frames: int, size: tuple[int, int]) -> None:
    ltx = make_ltx(version, decoder_causal=causal)
    vae = wrap(ltx, decode_timestep=0.07, decode_noise_scale=0.3)
    frames = torch.rand(2, 3, num_frames, *size) * 2 - 1
    posterior = ltx.encode(frames).latent_dist
    mean, log_variance = vae.encode_moments(frames)
    assert torch.equal(mean, posterior.mean)
    assert torch.equal(log_variance, posterior.logvar)

    # diffusers.pipelines.ltx: _normalize_latents, _denormalize_latents and the end of __call__.
    shift, scale = (x.view(1, -1, 1, 1, 1) for x in (ltx.latents_mean, ltx.latents_std))
    latents = vae.encode(frames)
    assert_close(latents, (mean - shift) * ltx.config.scaling_factor / scale)
    raw = latents * scale / ltx.config.scaling_factor + shift
    timestep = None
    if ltx.config.timestep_conditioning:
        raw = (1 - 0.3) * raw + 0.3 * frame_noise(torch.zeros(2, dtype=torch.long), raw)
        timestep = torch.full((2,), 0.07)
    decoded = vae.decode(latents)
    assert decoded.shape == frames.shape
    assert_close(decoded, ltx.decode(raw, timestep).sample)
    if timestep is None:
        assert torch.equal(vae.decode_raw(raw), ltx.decode(raw).sample)


def test_gradients_equal_diffusers() -> None:
    ltx = make_ltx(decoder_causal=True).requires_grad_(True)
    vae = wrap(ltx).requires_grad_(True)
    latents = torch.randn(1, 4, 3, 1, 1)
    ltx.decode(latents).sample.square().mean().backward()
    vae.decode_raw(latents).square().mean().backward()
    own = dict(vae.ltx.decoder.named_parameters())
    assert set(own) == {name for name, _ in ltx.decoder.named_parameters()}
    for name, parameter in ltx.decoder.named_parameters():
        assert torch.equal(own[name].grad, parameter.grad), name


@pytest.mark.parametrize("version", CONFIGS)
@pytest.mark.parametrize("pieces", [(1, 1, 1, 1, 1, 1, 1), (2, 2, 2, 1), (3, 3, 1), (2, 3, 2), (7,)])
def test_causal_stream_equals_whole_clip(version: str, pieces: tuple[int, ...]) -> None:
    vae = make_vae(version, decode_noise_scale=0.3)
    latents = random_latents(vae, 1 + sum(pieces))
    first, stream = vae.start_decode(latents[:, :, :1])
    frames = [first]
    for piece in latents[:, :, 1:].split(list(pieces), dim=2):
        frames.append(vae.decode_chunk(piece, stream))
        assert frames[-1].shape[2] == 8 * piece.shape[2]
    assert_close(torch.cat(frames, dim=2), vae.decode(latents))


def test_stream_keeps_its_size_and_addresses() -> None:
    vae = make_vae("0.9.1")
    latents = random_latents(vae, 7)
    _, stream = vae.start_decode(latents[:, :, :1])
    addresses = {name: past.data_ptr() for name, past in stream.items()}
    for piece in latents[:, :, 1:].split(2, dim=2):
        vae.decode_chunk(piece, stream)
    assert {name: past.data_ptr() for name, past in stream.items()} == addresses
    assert "ltx.decoder.conv_in" in addresses


def test_injected_noise_streams() -> None:
    ltx = make_ltx(decoder_causal=True, decoder_block_out_channels=[8] * 4, decoder_inject_noise=[True] * 5)
    silent = wrap(ltx)
    latents = random_latents(silent, 5)
    assert torch.equal(silent.decode_raw(latents), ltx.decode(latents).sample)  # the scales start at zero
    for name, parameter in ltx.named_parameters():
        if "per_channel_scale" in name:
            nn.init.constant_(parameter, 0.5)
    vae = wrap(ltx)
    assert float((vae.decode(latents) - silent.decode(latents)).abs().max()) > 1e-2
    assert torch.equal(vae.decode(latents), vae.decode(latents))
    assert_close(streamed_decode(vae, latents, 2), vae.decode(latents))


@pytest.mark.parametrize("version", ["0.9.0", "0.9.5"])
@pytest.mark.parametrize("halo", [0, 1, 2, 3])
def test_stock_decoder_streams_with_a_halo(version: str, halo: int) -> None:
    vae = make_vae(version, causal=False, halo=halo, decode_noise_scale=0.3)
    latents = random_latents(vae, 8)
    whole = vae.decode(latents)
    streamed = streamed_decode(vae, latents, 3)
    assert streamed.shape == whole.shape
    assert torch.equal(streamed_decode(vae, latents, 3, halo), streamed)
    # As long as the halo reaches back to slot 0, a piece is the end of a clip that diffusers decodes.
    raw = vae.denormalise(latents)
    if halo:
        assert_close(streamed[:, :, 1:25], vae.decode_raw(raw[:, :, :4])[:, :, 1:])
    if halo == 0:
        assert_close(streamed[:, :, :1], vae.decode_raw(raw[:, :, :1]))


def test_error_of_a_stock_decoder_falls_with_the_halo() -> None:
    for seed in range(3):
        vae = make_vae(causal=False, seed=seed)
        latents = random_latents(vae, 10, size=(1, 1))
        whole = vae.decode(latents)
        heads, errors = [], []
        for halo in range(4):
            streamed = streamed_decode(vae, latents, 3, halo)
            difference = (streamed - whole).abs()
            errors.append(streaming_error(vae, latents, 3, halo))
            assert errors[-1] == float(difference.max())
            # The first latent after a border: what lies left of it matters most there.
            heads.append(float(difference[:, :, 1:].unflatten(2, (3, 24))[:, :, 1:, :4].mean()))
        assert heads[0] > heads[1] > heads[2] > heads[3]
        assert max(errors[1:]) <= errors[0]


@pytest.mark.parametrize("causal", [True, False])
def test_snapshot_restores_bit_for_bit(causal: bool) -> None:
    vae = make_vae("0.9.5", causal=causal, halo=2)
    latents = random_latents(vae, 8)
    _, stream = vae.start_decode(latents[:, :, :1])
    vae.decode_chunk(latents[:, :, 1:2], stream)
    state = stream.snapshot()
    expected = [vae.decode_chunk(piece, stream) for piece in latents[:, :, 2:].split(3, dim=2)]
    other = Stream()
    for target in (stream, other):
        target.restore(state)
        actual = [vae.decode_chunk(piece, target) for piece in latents[:, :, 2:].split(3, dim=2)]
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("causal", [True, False])
def test_rows_restart_alone(causal: bool) -> None:
    vae = make_vae("0.9.5", causal=causal, halo=2, decode_noise_scale=0.3)
    latents, later = random_latents(vae, 9, batch=2), random_latents(vae, 5, batch=1)
    _, stream = vae.start_decode(latents[:, :, :1])
    for piece in latents[:, :, 1:5].split(2, dim=2):
        vae.decode_chunk(piece, stream)
    _, alone = vae.start_decode(later[:, :, :1])
    stream.copy_row(1, alone)
    joined = torch.cat([latents[:1, :, 5:], later[:, :, 1:]])
    frames = torch.cat([vae.decode_chunk(piece, stream) for piece in joined.split(2, dim=2)], dim=2)
    first = streamed_decode(vae, latents[:1], 2)[:, :, -32:]
    second = streamed_decode(vae, later, 2)[:, :, 1:]
    assert_close(frames, torch.cat([first, second]))


def test_threads_do_not_disturb_each_other() -> None:
    vae = make_vae()
    latents = random_latents(vae, 10)
    whole = vae.decode(latents)
    results: dict[int, Tensor] = {}

    def work(length: int) -> None:
        with torch.no_grad():
            results[length] = streamed_decode(vae, latents, length) if length else vae.decode(latents)

    threads = [threading.Thread(target=work, args=(length,)) for length in (0, 1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results.values():
        assert_close(result, whole)
    assert len(results) == 4


def test_copies_are_networks_of_their_own() -> None:
    vae = make_vae("0.9.5")
    latents = random_latents(vae, 5)
    expected = vae.decode(latents)
    for other in (copy.deepcopy(vae), pickle.loads(pickle.dumps(vae))):
        assert other._call is not vae._call
        assert other.ltx.decoder.conv_in._call is other._call
        assert_close(streamed_decode(other, latents, 2), expected)


def test_noise_is_a_unit_gaussian_of_the_latent_index() -> None:
    shape = torch.zeros(2, 32, 6, 8, 8)
    noise = frame_noise(torch.tensor([0, 2]), shape)
    assert torch.equal(noise[0, :, 2:], noise[1, :, :4])
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02
    quantiles = torch.linspace(0.02, 0.98, 25)
    expected = torch.distributions.Normal(0.0, 1.0).icdf(quantiles)
    torch.testing.assert_close(noise[0].flatten().quantile(quantiles), expected, atol=0.06, rtol=0)
    frames = noise[0].transpose(0, 1).flatten(1)
    assert float((torch.corrcoef(frames) - torch.eye(6)).abs().max()) < 0.1
    places = noise[0].permute(0, 2, 3, 1).flatten(0, 2)[:, :-1], noise[0].permute(0, 2, 3, 1).flatten(0, 2)[:, 1:]
    assert abs(float((places[0] * places[1]).mean())) < 0.05


@pytest.mark.parametrize("version", CONFIGS)
def test_configuration_rebuilds_the_network(version: str) -> None:
    vae = make_vae(version, causal=version != "0.9.1", decode_timestep=0.1, decode_noise_scale=0.2, halo=3)
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
    torch.testing.assert_close(vae.latents_std, ltx.latents_std.expand(2, -1) / ltx.config.scaling_factor)
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


# Blocks of LTX-Video 0.9.0's single file in their order there, under diffusers' names.
ORIGINAL_BLOCKS = {
    "encoder.down_blocks": (
        *("down_blocks.0", "down_blocks.0.downsamplers.0", "down_blocks.0.conv_out"),
        *("down_blocks.1", "down_blocks.1.downsamplers.0", "down_blocks.1.conv_out"),
        *("down_blocks.2", "down_blocks.2.downsamplers.0", "down_blocks.3", "mid_block"),
    ),
    "decoder.up_blocks": (
        *("mid_block", "up_blocks.0", "up_blocks.1.upsamplers.0", "up_blocks.1", "up_blocks.2.conv_in"),
        *("up_blocks.2.upsamplers.0", "up_blocks.2", "up_blocks.3.conv_in", "up_blocks.3.upsamplers.0", "up_blocks.3"),
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
            inside = [block for block in blocks if family.startswith(side) and rest.startswith(block + ".")]
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
    save_file({name.removeprefix("vae."): value for name, value in original_names(ltx).items()}, alone)
    assert fingerprint_of(LTXVideoVAE(str(alone), config)) == fingerprint_of(vae)
    save_file(ltx.state_dict(), alone)  # diffusers' names already
    assert fingerprint_of(LTXVideoVAE(str(alone), config)) == fingerprint_of(vae)
    other = {**config, "latent_channels": 5}
    with pytest.raises(ValueError, match=r"got \d+ of another shape: .*; give the `ltx_config` of these weights"):
        LTXVideoVAE(str(path), other)
    name = "vae.encoder.conv_in.conv.bias"
    for broken, message in [
        ({k: v for k, v in original_names(ltx).items() if k != name}, r"got 1 missing: encoder.conv_in.conv.bias"),
        ({**original_names(ltx), "vae.extra.weight": torch.zeros(1)}, r"got 1 left over: extra.weight"),
        ({"proj_out.bias": torch.zeros(1)}, r"got no vae.encoder.conv_out.conv.weight: get them with"),
    ]:
        save_file(broken, alone)
        with pytest.raises(ValueError, match=message):
            LTXVideoVAE(str(alone), config)


def test_bad_weights(tmp_path: Path) -> None:
    make_ltx().save_pretrained(tmp_path / "good")
    (tmp_path / "empty").mkdir()
    for name in ("other", "bare", "short", "long"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text((tmp_path / "good" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    weights = "diffusion_pytorch_model.safetensors"
    state = load_file(tmp_path / "good" / weights)
    save_file(state, tmp_path / "other" / weights)
    save_file({**state, "extra.weight": torch.zeros(1)}, tmp_path / "long" / weights)
    save_file(
        {name: v for name, v in state.items() if name != "encoder.conv_in.conv.bias"}, tmp_path / "short" / weights
    )
    (tmp_path / "text.safetensors").write_text("not weights")
    for source, message in [
        ("empty", r"expected an LTX VAE with config.json, looked in .*empty: get them with `hf download"),
        ("bare", r"expected an LTX VAE with diffusion_pytorch_model.safetensors, looked in .*bare: get them"),
        ("other", r"expected an AutoencoderKLLTXVideo in .*other, got AutoencoderKL: "),
        ("short", r"missing: encoder.conv_in.conv.bias"),
        ("long", r"left over: extra.weight"),
        ("absent", r"looked in .*absent: get them with"),
        ("text.safetensors", r"expected an LTX VAE as safetensors in .*text.safetensors: .*hf download"),
    ]:
        with pytest.raises(ValueError, match=message) as raised:
            LTXVideoVAE(str(tmp_path / source))
        assert "\n" not in str(raised.value)
    with pytest.raises(
        ValueError, match=r"nobody/nothing \(config.json and .*\), looked in .* and the hub cache .*hf download"
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
        ({"ltx_config": {**tiny, "decoder_spatio_temporal_scaling": [True, True, False, False]}}, "LTX decoder of 8x"),
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
    sampling = SamplingSettings(num_steps=2, guidance=1.0, shift=1.0)
    return TalkingHead(vae, LogMelEncoder(lookahead_frames=2), speech_ae, transformer, sampling, size_px=64)


@pytest.mark.parametrize("causal", [True, False])
def test_talking_head(causal: bool, tmp_path: Path) -> None:
    head = make_head(causal)
    portrait = torch.rand(3, 64, 64) * 2 - 1
    samples = np.random.default_rng(1).normal(scale=0.2, size=60 * 640).astype(np.float32)

    def frames_of(head: TalkingHead, cuts: list[int]) -> np.ndarray:
        session = head.open(portrait)
        return np.concatenate([*(session.push(block) for block in np.split(samples, cuts)), session.flush()])

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
    decode_chunk = head.vae.decode_chunk

    def recorded(chunk: Tensor, stream: Stream) -> Tensor:
        latents.append(chunk)
        return decode_chunk(chunk, stream)

    head.vae.decode_chunk = recorded  # type: ignore[assignment, method-assign]
    session.push(samples)
    session.flush()
    with torch.inference_mode():
        reference = head.vae.encode(portrait[None, :, None])
        whole = to_uint8(head.vae.decode(torch.cat([reference, *latents], dim=2)))[0, 1:61].numpy()
    assert np.abs(whole.astype(int) - frames.astype(int)).max() <= 1
