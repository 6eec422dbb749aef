from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from rest_lightning.diffusion.losses import speech_ae_loss
from rest_lightning.errors import UserError
from rest_lightning.models.causal import Stream, num_bytes
from rest_lightning.models.speech_ae import SpeechAE, SpeechPooling, SpeechProjection
from rest_lightning.parts import build_part, describe_part


def speech_ae(**arguments: Any) -> SpeechAE:
    """Tiny, with every zero start filled: a test of streaming must see every convolution."""
    torch.manual_seed(0)
    model = SpeechAE(
        **{"feature_dim": 12, "num_tokens": 2, "latent_dim": 6, "width": 8, **arguments}
    )
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def features(num_frames: int, batch: int = 2, feature_dim: int = 12) -> torch.Tensor:
    return torch.randn(batch, num_frames, 10, feature_dim)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5, 10])
@pytest.mark.parametrize("num_frames", [1, 9, 25])
def test_shapes_and_unit_scale(num_tokens: int, num_frames: int) -> None:
    model = speech_ae(num_tokens=num_tokens, latent_dim=16)
    x = features(num_frames)
    latents = model.encode(10 * x)
    assert latents.shape == (2, (num_frames - 1) // 8 + 1, num_tokens, 16)
    assert torch.allclose(latents.mean(-1), torch.zeros(()), atol=1e-5)
    assert torch.allclose(latents.var(-1, unbiased=False), torch.ones(()), atol=1e-3)
    assert model(x).shape == x.shape


PIECES = [[1, 8, 8, 8, 8], [1, 24, 8], [1, 16, 16], [9, 24], [17, 8, 8], [33]]


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("num_tokens", [2, 4])
@pytest.mark.parametrize(("num_blocks", "kernel_size"), [(1, 3), (2, 2)])
def test_streamed_equals_whole_clip(
    pieces: list[int], num_tokens: int, num_blocks: int, kernel_size: int
) -> None:
    model = speech_ae(num_tokens=num_tokens, num_blocks=num_blocks, kernel_size=kernel_size)
    x = features(33)
    whole = model.encode(x)
    encoder, decoder = Stream(), Stream()
    latents, outputs = [], []
    for piece in x.split(pieces, dim=1):
        latents.append(model.encode(piece, encoder))
        outputs.append(model.decode(latents[-1], decoder))
    assert torch.allclose(torch.cat(latents, dim=1), whole, atol=1e-5)
    assert torch.allclose(torch.cat(outputs, dim=1), model.decode(whole), atol=1e-5)


def test_causal_by_prefix_and_by_gradient() -> None:
    model = speech_ae()
    x = features(33).requires_grad_()
    whole = model.encode(x)
    for i in range(5):
        last = 8 * i  # latent i ends with frame 8 i
        changed = x.detach().clone()
        changed[:, last + 1 :] = torch.randn_like(changed[:, last + 1 :])
        assert torch.equal(model.encode(changed)[:, : i + 1], whole[:, : i + 1])
        (gradient,) = torch.autograd.grad(
            whole[:, i].square().sum() + whole[:, i, 0, 0].sum(), x, retain_graph=True
        )
        assert (gradient[:, last + 1 :] == 0).all()
        assert (gradient[:, max(0, last - 7) : last + 1].abs().amax(dim=(2, 3)) > 0).all()
    reconstruction = model.decode(whole)
    (gradient,) = torch.autograd.grad(reconstruction[:, 8].sum(), whole)
    assert (gradient[:, 2:] == 0).all()


def test_snapshot_restore_and_constant_memory() -> None:
    model = speech_ae()
    x = features(1 + 8 * 12)
    stream = Stream()
    model.encode(x[:, :1], stream)
    model.encode(x[:, 1:25], stream)
    held, size = stream.snapshot(), num_bytes(stream)
    first = model.encode(x[:, 25:49], stream)
    model.encode(x[:, 49:97], stream)
    assert num_bytes(stream) == size
    stream.restore(held)
    assert torch.equal(model.encode(x[:, 25:49], stream), first)


def test_config_round_trip_through_json() -> None:
    model = speech_ae(num_tokens=4, num_blocks=2)
    again = SpeechAE.from_config(json.loads(json.dumps(model.config)))
    again.load_state_dict(model.state_dict())
    x = features(9)
    assert torch.equal(again(x), model(x))


def test_paper_and_embedded_shapes_and_sizes() -> None:
    with torch.device("meta"):
        paper, embedded = (
            SpeechAE(),
            SpeechAE(feature_dim=160, num_tokens=4, latent_dim=128, width=128),
        )
        assert paper.encode(torch.empty(1, 97, 10, 1920)).shape == (1, 13, 2, 2048)
        assert embedded.encode(torch.empty(1, 97, 10, 160)).shape == (1, 13, 4, 128)
    assert 1e6 < sum(parameter.numel() for parameter in embedded.parameters()) < 2e6


def test_learns_to_reconstruct() -> None:
    torch.manual_seed(0)
    model = SpeechAE(feature_dim=12, num_tokens=2, latent_dim=16, width=32)
    phase = torch.linspace(0, 12, 25)[None, :, None, None] + torch.randn(4, 1, 1, 12)
    x = torch.sin(phase + torch.linspace(0, 2, 10)[:, None])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        terms = speech_ae_loss(model(x), x)
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
        losses.append(terms.mse.item())
    assert losses[-1] < 0.4 * losses[0]
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_bad_input_is_named() -> None:
    model = speech_ae()
    with pytest.raises(UserError, match=r"\(B, F, 10, 12\), got \(2, 9, 10, 11\)"):
        model.encode(features(9, feature_dim=11))
    with pytest.raises(UserError, match=r"8n\+1 frames, got 8"):
        model.encode(features(8))
    stream = Stream()
    model.encode(features(1), stream)
    with pytest.raises(UserError, match="8n frames of speech after the first piece, got 9"):
        model.encode(features(9), stream)
    with pytest.raises(UserError, match="1 to 10 speech tokens per latent frame, got 11"):
        SpeechAE(num_tokens=11)


def shares(num: int, num_shares: int) -> list[list[int]]:
    """Which of ``num`` things fall, wholly or in part, into each of equal shares of their
    length.
    """
    cells = [(share / num_shares, (share + 1) / num_shares) for share in range(num_shares)]
    return [
        [i for i in range(num) if i / num < end - 1e-9 and (i + 1) / num > begin + 1e-9]
        for begin, end in cells
    ]


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 8, 10])
@pytest.mark.parametrize("num_latents", [1, 2, 4])
def test_pooling_is_means_and_a_linear_layer(num_tokens: int, num_latents: int) -> None:
    model = SpeechPooling(feature_dim=12, num_tokens=num_tokens, latent_dim=6)
    x = features(8 * (num_latents - 1) + 1)
    latents, reconstruction = model.encode(x), model(x)
    assert latents.shape == (2, num_latents, num_tokens, 6)
    assert reconstruction.shape == x.shape
    for i in range(num_latents):
        frames = [0] * 8 if i == 0 else list(range(8 * i - 7, 8 * i + 1))
        for token, share in enumerate(shares(8, num_tokens)):
            mean = x[:, [frames[k] for k in share]].mean(dim=(1, 2))
            y = (
                mean @ model.encoder_out.weight.T
                + model.encoder_out.bias
                + model.encoder_places[token]
            )
            y = (y - y.mean(-1, keepdim=True)) / (
                y.var(-1, unbiased=False, keepdim=True) + 1e-5
            ).sqrt()
            assert torch.allclose(latents[:, i, token], y, atol=1e-5)
        for k, share in enumerate(shares(num_tokens, 8)):
            if i or k == 7:
                decoded = (
                    latents[:, i, share].mean(1) @ model.decoder_out.weight.T
                    + model.decoder_out.bias
                )
                assert torch.allclose(
                    reconstruction[:, frames[k]], decoded[:, None] + model.decoder_places, atol=1e-5
                )
    model(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("num_tokens", [2, 3])
def test_streamed_pooling_equals_the_whole_clip(pieces: list[int], num_tokens: int) -> None:
    model = SpeechPooling(feature_dim=12, num_tokens=num_tokens, latent_dim=6)
    x = features(33)
    whole = model.encode(x)
    encoder, decoder = Stream(), Stream()
    latents = [model.encode(piece, encoder) for piece in x.split(pieces, dim=1)]
    outputs = [model.decode(piece, decoder) for piece in latents]
    assert torch.allclose(torch.cat(latents, dim=1), whole, atol=1e-6)
    assert torch.allclose(torch.cat(outputs, dim=1), model.decode(whole), atol=1e-6)
    assert num_bytes(encoder) == num_bytes(decoder) == 0
    with pytest.raises(UserError, match="8n frames of speech after the first piece, got 9"):
        model.encode(features(9), encoder)


def test_pooling_is_a_part_and_names_bad_input() -> None:
    model = SpeechPooling(feature_dim=12, num_tokens=3, latent_dim=6)
    again = build_part(json.loads(json.dumps(describe_part(model))))
    again.load_state_dict(model.state_dict())
    assert isinstance(again, SpeechPooling)
    x = features(9)
    assert torch.equal(again(x), model(x))
    with pytest.raises(UserError, match=r"\(B, F, 10, 12\), got \(2, 9, 10, 11\)"):
        model.encode(features(9, feature_dim=11))
    with pytest.raises(UserError, match="1 to 10 speech tokens per latent frame, got 0"):
        SpeechPooling(num_tokens=0)


@pytest.mark.parametrize("pieces", [[17], [1, 8, 8], [9, 8]])
def test_projection_is_one_linear_layer_over_raw_windows(pieces: list[int]) -> None:
    """READ's w/o SpeechAE: step by step, whole and streamed."""
    model = SpeechProjection(feature_dim=12, latent_dim=6)
    assert {name for name, _ in model.named_parameters() if name.startswith("encoder")} == {
        "encoder_out.weight",
        "encoder_out.bias",
    }
    features = torch.randn(2, 17, 10, 12)
    stream = Stream()
    latents = torch.cat([model.encode(x, stream) for x in features.split(pieces, 1)], 1)
    assert latents.shape == (2, 3, 80, 6)
    assert torch.allclose(latents, model.encode(features), atol=1e-6)
    for frame in range(1, 17):
        slot, place = (frame - 1) // 8 + 1, (frame - 1) % 8 * 10
        expected = model.encoder_out(features[:, frame])
        assert torch.allclose(latents[:, slot, place : place + 10], expected, atol=1e-6)
    assert torch.allclose(latents[:, 0, -10:], model.encoder_out(features[:, 0]), atol=1e-6)
    decoded = model.decode(latents)
    assert decoded.shape == features.shape
    expected = model.decoder_out(model.encoder_out(features))
    assert torch.allclose(decoded, expected, atol=1e-6)
    again = build_part(describe_part(model))
    assert type(again) is SpeechProjection
