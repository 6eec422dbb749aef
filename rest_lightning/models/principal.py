"""A linear path from pixels to latents and back, set to the data's principal components before training starts.

A network that has to find a few numbers for 32x32 pixels of 8 frames by gradient descent spends most of a short
training on what a linear map does as well, and its latents stay of low rank. Here the linear map comes in closed form
and stays as it is, and the network learns what is left (decided here; neither REST nor LTX-Video has it).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from rest_lightning.constants import SPATIAL_RATIO, TEMPORAL_RATIO
from rest_lightning.models.causal import Downsample, Stream, Upsample, patchify, unpatchify


class PrincipalPath(nn.Module):
    """A square patch of one frame -> components -> 8 frames of components -> one latent; and back. All linear.

    The first frame counts as eight copies of itself, like everywhere in the causal VAE. Silent (zero) until
    :func:`fit_principal_path` has set it, and never trained: in a run that trained it along, at 1.5e-3, the weighted L1
    rose from 0.110 at step 20 to 0.137 at step 40 and stayed there.

    Args:
        latent_channels: C.
        num_components: components kept of each patch.
        patch_size: pixels on the side of a patch; the VAE's is its spatial compression.

    Raises:
        ValueError: more components than a patch has values, or more channels than eight frames of components.
    """

    def __init__(self, latent_channels: int, num_components: int, patch_size: int = SPATIAL_RATIO) -> None:
        super().__init__()
        patch_values = 3 * patch_size**2
        if not latent_channels / TEMPORAL_RATIO <= num_components <= patch_values:
            raise ValueError(
                f"expected between {math.ceil(latent_channels / TEMPORAL_RATIO)} and {patch_values} principal "
                f"components for {latent_channels} latent channels, got {num_components}"
            )
        self.patch_size = patch_size
        self.patch_in = nn.Linear(patch_values, num_components)
        self.fold = Downsample(num_components, latent_channels, TEMPORAL_RATIO)
        self.unfold = Upsample(latent_channels, num_components, TEMPORAL_RATIO)
        self.patch_out = nn.Linear(num_components, patch_values)
        for parameter in self.requires_grad_(False).parameters():
            nn.init.zeros_(parameter)

    def encode(self, frames: Tensor) -> Tensor:
        """Frames (B, 3, F, H, W) -> raw latents, channels last (B, f, h, w, C)."""
        x: Tensor = self.fold(self.patch_in(patchify(frames, self.patch_size).contiguous()))
        return x

    def decode(self, latents: Tensor, stream: Stream | None = None) -> Tensor:
        """Raw latents, channels last (B, f, h, w, C) -> frames (B, 3, F, H, W)."""
        return unpatchify(self._patches(latents, stream), self.patch_size)

    def decode_patches(self, latents: Tensor, patch_size: int, stream: Stream | None = None) -> Tensor:
        """The same as patches of another size that divides this one's (B, F, H/p, W/p, 3*p*p), in one move."""
        x = self._patches(latents, stream)
        b, f, h, w, _ = x.shape
        n, p = self.patch_size // patch_size, patch_size
        x = x.view(b, f, h, w, 3, n, p, n, p).permute(0, 1, 2, 5, 3, 7, 4, 6, 8)
        return x.reshape(b, f, h * n, w * n, 3 * p * p)

    def _patches(self, latents: Tensor, stream: Stream | None) -> Tensor:
        # Contiguous, or torch copies the layer's weight for every frame (measured: 5 ms became 300).
        patches: Tensor = self.patch_out(self.unfold(latents, stream).contiguous())
        return patches


@torch.no_grad()
def fit_principal_path(
    path: PrincipalPath,
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    whitening: float = 0.5,
    sum_over_devices: Callable[[Tensor], Tensor] = lambda x: x,
) -> float:
    """Set ``path`` to the principal components of the data: first of patches, then of eight frames of those.

    A patch counts with the mean weight of its pixels. The latents are the leading components, scaled by their variance
    to the power ``-whitening / 2``, to unit variance on average, and turned by a random rotation: 0 keeps the pixels'
    distances, so that noise on the latents is noise in the picture, 1 makes every component equally loud, down to the
    faintest. The rotation shares the variance among the channels; without it, normalising each channel for diffusion
    would whiten them anyhow.

    Args:
        path: what to set, in place.
        batches: a new pass over (frames (B, 3, 8n+1, H, W) in [-1, 1], pixel weights (B, 1, F, H, W)); called twice.
        whitening: 0 .. 1.
        sum_over_devices: adds a tensor up over all processes.

    Returns:
        PSNR in dB that the path alone reaches on these frames, weighted, for range 2.
    """
    device = path.patch_in.weight.device
    patches = _Moments(path.patch_in.in_features, device)
    for frames, weights in batches():
        patches.add(patchify(frames, path.patch_size), _patch_weights(weights, path.patch_size))
    mean, variances, basis, lost = patches.leading(path.patch_in.out_features, sum_over_devices)
    _set(path.patch_in, basis.T, -basis.T @ mean)
    _set(path.patch_out, basis, mean)

    blocks = _Moments(TEMPORAL_RATIO * path.patch_in.out_features, device)
    for frames, weights in batches():
        components = path.patch_in(patchify(frames[:, :, 1:], path.patch_size))
        weight = _patch_weights(weights[:, :, 1:], path.patch_size).unflatten(1, (-1, TEMPORAL_RATIO)).mean(2)
        blocks.add(components.unflatten(1, (-1, TEMPORAL_RATIO)).movedim(2, -2).flatten(-2), weight)
    mean, variances, basis, lost_in_time = blocks.leading(path.fold.proj.out_features, sum_over_devices)
    variances = variances.clamp(min=1e-9 * float(variances[0]) + 1e-12)  # still pictures have none
    scale = variances ** (-whitening / 2)
    scale /= (variances * scale.square()).mean().sqrt()
    rotation = _rotation(len(variances)).to(basis)
    into = rotation @ (scale[:, None] * basis.T)
    _set(path.fold.proj, into, -into @ mean)
    _set(path.unfold.proj, (basis / scale) @ rotation.T, mean)
    mean_square_error = (lost + lost_in_time / TEMPORAL_RATIO) / path.patch_in.in_features
    return 10 * math.log10(4 / max(mean_square_error, 1e-12))


class _Moments:
    """Weighted sums of vectors and of their products, in float64."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.weight = torch.zeros((), dtype=torch.float64, device=device)
        self.sum = torch.zeros(size, dtype=torch.float64, device=device)
        self.products = torch.zeros(size, size, dtype=torch.float64, device=device)

    def add(self, vectors: Tensor, weights: Tensor) -> None:
        """Take in vectors (..., size) with weights (...)."""
        vectors, weights = vectors.flatten(0, -2).float(), weights.flatten().float()
        self.weight += weights.sum()
        self.sum += weights @ vectors
        self.products += (vectors * weights[:, None]).T @ vectors

    def leading(self, count: int, sum_over_devices: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor, float]:
        """Mean, the ``count`` largest variances, their directions as columns, and the variance that is left out."""
        weight, total, products = (sum_over_devices(value) for value in (self.weight, self.sum, self.products))
        mean = total / weight
        variances, directions = torch.linalg.eigh(products / weight - mean[:, None] * mean)
        variances, directions = variances.flip(0).clamp(min=0.0), directions.flip(1)
        return mean, variances[:count], directions[:, :count], float(variances[count:].sum())


def _patch_weights(weights: Tensor, patch_size: int) -> Tensor:
    """Pixel weights (B, 1, F, H, W) -> mean of each patch (B, F, h, w)."""
    return patchify(weights, patch_size).mean(-1)


def _rotation(size: int) -> Tensor:
    """A random orthogonal matrix, the same at every call."""
    gaussian = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.linalg.qr(gaussian)[0]


def _set(linear: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)
