"""The compact VAE and the causal blocks: streaming equals whole clips, causality, statistics,
errors.
"""

from __future__ import annotations

import json

import pytest
import torch

from rest_lightning.models.causal import Stream, patchify, unpatchify
from rest_lightning.models.vae import CompactVAE


def tiny_vae(seed: int = 0, principal_components: int = 0) -> CompactVAE:
    """A few thousand parameters, with random values where a network starts at zero, so that every
    part matters.
    """
    torch.manual_seed(seed)
    vae = CompactVAE(
        4, (8, 16, 16), (1, 1, 1), (1, 1, 2), ((4, 2), (2, 2)), 8, principal_components
    )
    for name, parameter in vae.named_parameters():
        if "temporal.conv" in name:
            torch.nn.init.normal_(parameter, std=0.3)
        elif not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    vae.latents_mean.normal_()
    vae.latents_std.uniform_(0.5, 2.0)
    return vae.eval().requires_grad_(False)


@pytest.mark.parametrize("pieces", [(1, 1, 1, 1, 1, 1), (3, 3), (2, 2, 2), (2, 3, 1), (6,), (5, 1)])
@pytest.mark.parametrize("size", [(32, 32), (64, 96)])
@pytest.mark.parametrize("principal", [0, 8])
def test_streamed_decode_equals_whole_clip(
    pieces: tuple[int, ...], size: tuple[int, int], principal: int
) -> None:
    vae = tiny_vae(principal_components=principal)
    latents = torch.randn(2, 4, 1 + sum(pieces), size[0] // 32, size[1] // 32)
    whole = vae.decode(latents)
    first, stream = vae.start_decode(latents[:, :, :1])
    frames = [
        first,
        *(vae.decode_chunk(piece, stream) for piece in latents[:, :, 1:].split(pieces, dim=2)),
    ]
    assert whole.shape == (2, 3, 8 * sum(pieces) + 1, *size)
    torch.testing.assert_close(torch.cat(frames, dim=2), whole, atol=1e-5, rtol=0)


def test_first_latent_depends_on_the_first_frame_alone() -> None:
    vae = tiny_vae()
    frames = torch.rand(1, 3, 17, 32, 32) * 2 - 1
    torch.testing.assert_close(
        vae.encode(frames)[:, :, :1], vae.encode(frames[:, :, :1]), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("changed", [1, 2, 3])
@pytest.mark.parametrize("principal", [0, 8])
def test_encoder_and_decoder_are_causal(changed: int, principal: int) -> None:
    vae = tiny_vae(principal_components=principal)
    frames = torch.rand(1, 3, 33, 32, 32) * 2 - 1
    other = frames.clone()
    other[:, :, 8 * (changed - 1) + 1 :] = 0.0
    before, after = vae.encode(frames), vae.encode(other)
    assert torch.equal(before[:, :, :changed], after[:, :, :changed])
    assert not torch.equal(before[:, :, changed], after[:, :, changed])
    decoded, decoded_other = vae.decode(before), vae.decode(after)
    assert torch.equal(
        decoded[:, :, : 8 * (changed - 1) + 1], decoded_other[:, :, : 8 * (changed - 1) + 1]
    )


def test_past_reaches_later_frames() -> None:
    vae = tiny_vae().requires_grad_(True)
    latents = torch.randn(1, 4, 3, 1, 1, requires_grad=True)
    vae.decode(latents)[:, :, 9:].sum().backward()
    assert latents.grad is not None
    assert (latents.grad[:, :, 1] != 0).any()


def test_slot_zero_has_statistics_of_its_own() -> None:
    vae = tiny_vae()
    raw = torch.randn(2, 4, 3, 1, 1)
    normal = vae.normalise(raw)
    expected_first = (raw[:, :, 0, 0, 0] - vae.latents_mean[0]) / vae.latents_std[0]
    expected_last = (raw[:, :, 2, 0, 0] - vae.latents_mean[1]) / vae.latents_std[1]
    torch.testing.assert_close(normal[:, :, 0, 0, 0], expected_first)
    torch.testing.assert_close(normal[:, :, 2, 0, 0], expected_last)
    torch.testing.assert_close(vae.denormalise(normal), raw)
    torch.testing.assert_close(vae.denormalise(normal[:, :, 1:], first_slot=1), raw[:, :, 1:])


def test_snapshot_restores_bit_for_bit() -> None:
    vae = tiny_vae()
    latents = torch.randn(1, 4, 5, 2, 2)
    _, stream = vae.start_decode(latents[:, :, :1])
    vae.decode_chunk(latents[:, :, 1:2], stream)
    saved = stream.snapshot()
    once = vae.decode_chunk(latents[:, :, 2:4], stream)
    vae.decode_chunk(latents[:, :, 4:], stream)
    stream.restore(saved)
    assert torch.equal(vae.decode_chunk(latents[:, :, 2:4], stream), once)


def test_stream_keeps_its_addresses_and_size() -> None:
    vae = tiny_vae()
    _, stream = vae.start_decode(torch.randn(1, 4, 1, 1, 1))
    vae.decode_chunk(torch.randn(1, 4, 3, 1, 1), stream)
    addresses = {name: past.data_ptr() for name, past in stream.items()}
    for _ in range(3):
        vae.decode_chunk(torch.randn(1, 4, 3, 1, 1), stream)
    assert addresses == {name: past.data_ptr() for name, past in stream.items()}


def test_rows_of_a_batch_are_streams_of_their_own() -> None:
    vae = tiny_vae()
    latents = torch.randn(2, 4, 5, 1, 1)
    _, stream = vae.start_decode(latents[:, :, :1])
    single: Stream = vae.start_decode(latents[1:, :, :1])[1]
    together = vae.decode_chunk(latents[:, :, 1:4], stream)
    torch.testing.assert_close(
        vae.decode_chunk(latents[1:, :, 1:4], single), together[1:], atol=1e-5, rtol=0
    )
    stream.copy_row(0, single)  # row 0 goes on as the other stream did
    ahead = vae.decode_chunk(latents[1:, :, 4:].expand(2, -1, -1, -1, -1), stream)
    torch.testing.assert_close(ahead[0], ahead[1], atol=1e-5, rtol=0)


def test_config_survives_json() -> None:
    vae = tiny_vae()
    copy = CompactVAE.from_config(json.loads(json.dumps(vae.config)))
    copy.load_state_dict(vae.state_dict())
    frames = torch.rand(1, 3, 9, 32, 32)
    assert torch.equal(copy.eval().encode(frames), vae.encode(frames))


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_unpatchify_inverts_patchify(patch_size: int) -> None:
    frames = torch.rand(2, 3, 3, 8, 16)
    assert torch.equal(unpatchify(patchify(frames, patch_size), patch_size), frames)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 10, 32, 32), "expected a clip of 8n.1 frames, got 10: use 9 or 17"),
        ((1, 3, 9, 48, 32), "multiples of 32, got .48, 32.: resize the clips"),
        ((1, 1, 9, 32, 32), "expected frames of shape .B, 3, F, H, W."),
    ],
)
def test_frames_that_do_not_fit_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_vae().encode(torch.zeros(shape))


def test_wrong_ratios_are_refused() -> None:
    with pytest.raises(ValueError, match="32x in space, got 4x and 32x: change `strides`"):
        CompactVAE(4, (8, 8), (1, 1), (1, 1), ((4, 4),), patch_size=8)
    with pytest.raises(ValueError, match="one width and block count per stage"):
        CompactVAE(4, (8, 8), (1, 1), (1, 1), ((4, 2), (2, 2)), patch_size=8)
