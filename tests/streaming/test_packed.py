"""Packed weights: the same numbers, one copy for all, and never those of yesterday."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rest_lightning.models.blocks import FeedForward
from rest_lightning.models.transformer import A2VDiT
from rest_lightning.models.vae import CompactVAE
from rest_lightning.streaming.packed import can_pack, packed

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not can_pack(CPU, torch.float32), reason="torch without oneDNN")


def vae() -> CompactVAE:
    """A small VAE whose every layer matters."""
    torch.manual_seed(0)
    network = CompactVAE(8, (16, 16, 24, 24), (1, 1, 1, 1), (1, 2, 1, 1), principal_components=4)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network.eval()


def dit(attention_bias: bool = True) -> A2VDiT:
    """A small network whose speech attention speaks."""
    torch.manual_seed(0)
    network = A2VDiT(
        8, None, 2, 2, 16, caption_channels=None, speech_dim=12, attention_bias=attention_bias
    )
    for block in network.transformer_blocks:
        for norm in (block.attn1.norm_q, block.attn1.norm_k):
            nn.init.normal_(norm.weight, mean=1.0, std=0.2)
    for block in network.transformer_blocks:
        nn.init.normal_(block.speech_attn.to_out[0].weight, std=0.1)
    return network.eval()


@torch.inference_mode()
@pytest.mark.parametrize("num_latents", [1, 2, 4, 7])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_vae_gives_the_same(num_latents: int, batch: int) -> None:
    network = vae()
    frames = torch.rand(batch, 3, 8 * num_latents - 7, 64, 96) * 2 - 1
    latents = torch.randn(batch, 8, num_latents, 2, 3)
    torch.testing.assert_close(
        packed(network).encode(frames), network.encode(frames), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        packed(network).decode(latents), network.decode(latents), atol=1e-5, rtol=1e-5
    )


@torch.inference_mode()
@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_a_packed_stream_gives_what_the_whole_gives(chunk: int) -> None:
    network, latents = vae(), torch.randn(2, 8, 8, 2, 2)
    fast = packed(network)
    first, stream = fast.start_decode(latents[:, :, :1])
    pieces = [
        first,
        *(fast.decode_chunk(piece, stream) for piece in latents[:, :, 1:].split(chunk, 2)),
    ]
    torch.testing.assert_close(torch.cat(pieces, 2), network.decode(latents), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("num_frames", [1, 3, 7])
@pytest.mark.parametrize("attention_bias", [True, False])
def test_the_transformer_gives_the_same(num_frames: int, attention_bias: bool) -> None:
    network = dit(attention_bias)
    latents, sigma = torch.randn(2, 8, num_frames, 2, 3), torch.rand(2, num_frames)
    speech = torch.randn(2, num_frames, 4, 12)
    expected = network(latents, sigma, speech)
    torch.testing.assert_close(
        packed(network)(latents, sigma, speech), expected, atol=1e-5, rtol=1e-5
    )


@torch.inference_mode()
@pytest.mark.skipif(not can_pack(CPU, torch.bfloat16), reason="no bfloat16 in this oneDNN")
def test_bfloat16_errs_no_more_than_without_packing() -> None:
    network = dit()
    latents, sigma, speech = torch.randn(2, 8, 4, 4, 4), torch.rand(2, 4), torch.randn(2, 4, 4, 12)
    exact, coarse = network(latents, sigma, speech), copy.deepcopy(network).bfloat16()
    inputs = latents.bfloat16(), sigma, speech.bfloat16()
    plain, fast = (
        (model(*inputs).float() - exact).abs().mean() for model in (coarse, packed(coarse))
    )
    assert 0 < fast < 1.5 * plain


def test_one_copy_serves_until_the_weights_change() -> None:
    torch.manual_seed(0)
    network, x = FeedForward(32), torch.randn(5, 32)
    first = packed(network)
    assert packed(network) is first and first is not network
    before = network(x)
    assert "forward" not in network.net[2].__dict__  # the original is as it was
    with torch.no_grad():
        torch.testing.assert_close(first(x), before, atol=1e-5, rtol=1e-5)
        network.net[2].weight.mul_(2.0)  # as an optimizer does
        torch.testing.assert_close(packed(network)(x), network(x), atol=1e-5, rtol=1e-5)
        # a session goes on with its own
        torch.testing.assert_close(first(x), before, atol=1e-5, rtol=1e-5)
        network.net[0].proj.weight.data.mul_(2.0)  # past the version counter
        torch.testing.assert_close(packed(network)(x), network(x), atol=1e-5, rtol=1e-5)
        network.load_state_dict({name: value + 0.1 for name, value in network.state_dict().items()})
        torch.testing.assert_close(packed(network)(x), network(x), atol=1e-5, rtol=1e-5)


def test_no_weight_is_packed_twice() -> None:
    attention = packed(dit()).transformer_blocks[0].attn1
    assert "queries_keys_values" in attention.__dict__
    assert all(
        "forward" not in layer.__dict__
        for layer in (attention.to_q, attention.to_k, attention.to_v)
    )
    assert "forward" in attention.to_out[0].__dict__


def test_what_cannot_be_packed_comes_back() -> None:
    doubles = FeedForward(8).double()
    assert packed(doubles) is doubles
    assert packed(nn.ReLU()).__class__ is nn.ReLU
    assert not can_pack(torch.device("cuda"), torch.float32) and not can_pack(CPU, torch.float16)
