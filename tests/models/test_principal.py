"""The principal path: exact on data of low rank, as good as numpy's components, streamed like
everything else.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from rest_lightning.models.causal import patchify, unpatchify
from rest_lightning.models.vae import CompactVAE, PrincipalPath, fit_principal_path

PATCH = 8  # of the VAE 32; eigenvectors of 3 * 32 * 32 values would take minutes here


def smooth_frames(batch: int, num_frames: int, size: tuple[int, int]) -> Tensor:
    noise = torch.randn(batch, 3, num_frames, *size)
    return torch.nn.functional.avg_pool3d(noise, 5, 1, 2, count_include_pad=False) * 4


def psnr_db(error: Tensor) -> float:
    return float(-10 * torch.log10(error.square().mean() / 4))


@pytest.mark.parametrize("whitening", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("num_components", "channels"), [(8, 6), (40, 24)])
def test_fit_is_as_good_as_the_components_of_numpy(
    num_components: int, channels: int, whitening: float
) -> None:
    torch.manual_seed(0)
    frames = smooth_frames(3, 17, (16, 24))
    path = PrincipalPath(channels, num_components, PATCH)
    reported = fit_principal_path(
        path, lambda: iter([(frames, torch.ones(3, 1, 17, 16, 24))]), whitening
    )

    patches = patchify(frames, PATCH).double().numpy().reshape(-1, 192)
    centre = patches.mean(0)
    basis = np.linalg.svd(patches - centre, full_matrices=False)[2][:num_components]
    parts = (patchify(frames[:, :, 1:], PATCH).double().numpy() - centre) @ basis.T
    blocks = (
        parts.reshape(3, 2, 8, 2, 3, num_components)
        .transpose(0, 1, 3, 4, 2, 5)
        .reshape(-1, 8 * num_components)
    )
    mean = blocks.mean(0)
    turn = np.linalg.svd(blocks - mean, full_matrices=False)[2][:channels]
    kept = ((blocks - mean) @ turn.T @ turn + mean).reshape(3, 2, 2, 3, 8, num_components)
    expected = (
        kept.transpose(0, 1, 4, 2, 3, 5).reshape(3, 16, 2, 3, num_components) @ basis + centre
    )

    with torch.no_grad():
        latents = path.encode(frames)
        decoded = path.decode(latents)
    np.testing.assert_allclose(patchify(decoded[:, :, 1:], PATCH).numpy(), expected, atol=2e-3)
    assert reported == pytest.approx(psnr_db(decoded[:, :, 1:] - frames[:, :, 1:]), abs=0.5)
    assert float(latents[:, 1:].flatten(0, 3).var(0, correction=0).mean()) == pytest.approx(
        1.0, rel=1e-2
    )


def test_whitening_makes_components_equally_loud() -> None:
    torch.manual_seed(0)
    frames = smooth_frames(6, 17, (16, 16))
    spreads = []
    for whitening in (0.0, 0.5, 1.0):
        path = PrincipalPath(6, 8, PATCH)
        fit_principal_path(path, lambda: iter([(frames, torch.ones(6, 1, 17, 16, 16))]), whitening)
        with torch.no_grad():
            latents = path.encode(frames)[:, 1:].flatten(0, 3)
        variances = torch.linalg.eigvalsh(torch.cov(latents.T))
        spreads.append(float(variances[-1] / variances[0]))
    assert spreads[2] == pytest.approx(1.0, rel=0.02)
    assert spreads[1] == pytest.approx(spreads[0] ** 0.5, rel=0.02)


def test_weights_decide_what_is_kept() -> None:
    """With room for one component only, the patch that weighs more is kept."""
    torch.manual_seed(0)
    left, right = torch.randn(2, 3, 1, 8, 8)
    frames = torch.zeros(16, 3, 9, 8, 16)
    frames[..., :8] = torch.randn(16, 1, 1, 1, 1) * left
    frames[..., 8:] = torch.randn(16, 1, 1, 1, 1) * right
    for heavy in (0, 1):
        weights = torch.ones(16, 1, 9, 8, 16)
        weights[..., 8 * heavy : 8 * heavy + 8] = 20.0
        path = PrincipalPath(1, 1, PATCH)
        fit_principal_path(path, lambda weights=weights: iter([(frames, weights)]))  # type: ignore[misc]
        with torch.no_grad():
            error = (
                (path.decode(path.encode(frames)) - frames)[:, :, 1:].square().unflatten(-1, (2, 8))
            )
        by_patch = error.mean(dim=(0, 1, 2, 3, 5))
        assert by_patch[heavy] < 0.05 * by_patch[1 - heavy]


def test_two_devices_fit_what_one_fits() -> None:
    torch.manual_seed(0)
    frames, weights = smooth_frames(4, 9, (8, 16)), torch.rand(4, 1, 9, 8, 16) + 0.5
    together = PrincipalPath(5, 8, PATCH)
    fit_principal_path(together, lambda: iter([(frames, weights)]))

    rows, barrier, sums = (
        (slice(0, 1), slice(1, None)),
        threading.Barrier(2),
        [torch.empty(0), torch.empty(0)],
    )

    def fit(device: int) -> PrincipalPath:
        def sum_over_devices(value: Tensor) -> Tensor:
            sums[device] = value
            barrier.wait()
            total = sums[0] + sums[1]
            barrier.wait()
            return total

        path = PrincipalPath(5, 8, PATCH)
        batch = (frames[rows[device]], weights[rows[device]])
        fit_principal_path(path, lambda: iter([batch]), sum_over_devices=sum_over_devices)
        return path

    with ThreadPoolExecutor(2) as pool:
        apart = list(pool.map(fit, range(2)))
    for path in apart:  # components may differ in sign, what they span may not
        torch.testing.assert_close(
            path.decode(path.encode(frames)),
            together.decode(together.encode(frames)),
            atol=1e-4,
            rtol=0,
        )


def test_network_starts_as_its_principal_path() -> None:
    torch.manual_seed(0)
    vae = CompactVAE(
        6, (8, 16, 16), (1, 1, 1), (1, 1, 1), ((4, 2), (2, 2)), 8, principal_components=8
    ).eval()
    assert vae.principal is not None
    for parameter in vae.principal.parameters():
        parameter.normal_(std=0.1)
    frames = smooth_frames(2, 17, (64, 32))
    with torch.no_grad():
        latents = vae.encode_moments(frames)[0]
        torch.testing.assert_close(latents.movedim(1, -1), vae.principal.encode(frames))
        torch.testing.assert_close(
            vae.decode_raw(latents), vae.principal.decode(latents.movedim(1, -1))
        )


@pytest.mark.parametrize(("channels", "components"), [(64, 7), (64, 4000)])
def test_impossible_sizes_are_refused(channels: int, components: int) -> None:
    with pytest.raises(
        ValueError,
        match=(f"between 8 and 3072 principal components for 64 latent .* got {components}"),
    ):
        PrincipalPath(channels, components)


@pytest.mark.parametrize("patch_size", [4, 8, 16, 32])
@pytest.mark.parametrize(
    ("num_latents", "height", "width"), [(1, 32, 32), (2, 64, 32), (3, 32, 96)]
)
def test_patches_of_another_size_hold_the_same_frames(
    patch_size: int, num_latents: int, height: int, width: int
) -> None:
    torch.manual_seed(patch_size)
    path = PrincipalPath(8, 4)
    for parameter in path.parameters():
        torch.nn.init.normal_(parameter)
    latents = torch.randn(2, num_latents, height // 32, width // 32, 8)
    assert torch.equal(
        unpatchify(path.decode_patches(latents, patch_size), patch_size), path.decode(latents)
    )
