"""The LTX VAE: whole clips equal diffusers, causal streams equal whole clips, halos."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from tiny_ltx import CONFIGS, assert_close, make_ltx, make_vae, random_latents, wrap
from torch import Tensor, nn

from rest_lightning.models.causal import Stream
from rest_lightning.models.ltx_vae import frame_noise, streamed_decode


@pytest.mark.parametrize("version", CONFIGS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("num_frames", "size"), [(1, (32, 32)), (9, (32, 64)), (17, (64, 32))])
def test_equals_diffusers(
    version: str, causal: bool, num_frames: int, size: tuple[int, int]
) -> None:
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
@pytest.mark.parametrize(
    "pieces", [(1, 1, 1, 1, 1, 1, 1), (2, 2, 2, 1), (3, 3, 1), (2, 3, 2), (7,)]
)
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
    ltx = make_ltx(
        decoder_causal=True, decoder_block_out_channels=[8] * 4, decoder_inject_noise=[True] * 5
    )
    silent = wrap(ltx)
    latents = random_latents(silent, 5)
    # the scales start at zero
    assert torch.equal(silent.decode_raw(latents), ltx.decode(latents).sample)
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
    # As long as the halo reaches back to slot 0, a piece is the end of a clip that diffusers
    # decodes.
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
            errors.append(float(difference.max()))
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
            results[length] = (
                streamed_decode(vae, latents, length) if length else vae.decode(latents)
            )

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
    places = (
        noise[0].permute(0, 2, 3, 1).flatten(0, 2)[:, :-1],
        noise[0].permute(0, 2, 3, 1).flatten(0, 2)[:, 1:],
    )
    assert abs(float((places[0] * places[1]).mean())) < 0.05
