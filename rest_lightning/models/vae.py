"""The spatiotemporal VAE: one interface, and the compact causal network of the embedded model.

32x32x8 compression with the first frame on its own (REST sec. 3.1, after LTX-Video). The LTX VAE
itself is wrapped in ``ltx_vae.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn

from rest_lightning.constants import SPATIAL_RATIO, TEMPORAL_RATIO, num_latent_frames
from rest_lightning.models.causal import (
    Downsample,
    ResBlock,
    RMSNorm,
    SpatialConv,
    Stream,
    Upsample,
    name_streams,
    patchify,
    unpatchify,
)
from rest_lightning.models.pretrained import PretrainedPart

# -- the linear path -------------------------------------------------------------------------------
# A linear path from pixels to latents and back, set to the data's principal components before
# training starts. Neither REST nor LTX-Video has it.
#
# A network that has to describe 8 frames of 32x32 pixels by a few numbers spends most of a short
# training on what a linear map does as well, and its latents stay of low rank. Here the linear map
# is computed in closed form and stays fixed, and the network learns the rest.


class PrincipalPath(nn.Module):
    """A square patch of one frame -> components -> 8 frames of components -> one latent; and back.
    All linear.

    The first frame counts as eight copies of itself, like everywhere in the causal VAE. Silent
    (zero) until :func:`fit_principal_path` has set it, and never trained: in a run that trained it
    along, at 1.5e-3, the weighted L1 rose from 0.110 at step 20 to 0.137 at step 40 and stayed
    there.

    Args:
        latent_channels: C.
        num_components: components kept of each patch.
        patch_size: pixels on the side of a patch; the VAE's is its spatial compression.

    Raises:
        ValueError: more components than a patch has values, or more channels than eight frames of
            components.
    """

    def __init__(
        self, latent_channels: int, num_components: int, patch_size: int = SPATIAL_RATIO
    ) -> None:
        super().__init__()
        patch_values = 3 * patch_size**2
        if not latent_channels / TEMPORAL_RATIO <= num_components <= patch_values:
            raise ValueError(
                f"expected between {math.ceil(latent_channels / TEMPORAL_RATIO)} and "
                f"{patch_values} principal "
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

    def decode_patches(
        self, latents: Tensor, patch_size: int, stream: Stream | None = None
    ) -> Tensor:
        """The same as patches of another size that divides this one's (B, F, H/p, W/p, 3*p*p), in
        one move.
        """
        x = self._patches(latents, stream)
        b, f, h, w, _ = x.shape
        n, p = self.patch_size // patch_size, patch_size
        x = x.view(b, f, h, w, 3, n, p, n, p).permute(0, 1, 2, 5, 3, 7, 4, 6, 8)
        return x.reshape(b, f, h * n, w * n, 3 * p * p)

    def _patches(self, latents: Tensor, stream: Stream | None) -> Tensor:
        # Contiguous, or torch copies the layer's weight for every frame (measured: 5 ms became
        # 300).
        patches: Tensor = self.patch_out(self.unfold(latents, stream).contiguous())
        return patches


@torch.no_grad()
def fit_principal_path(
    path: PrincipalPath,
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    whitening: float = 0.5,
    sum_over_devices: Callable[[Tensor], Tensor] = lambda x: x,
) -> float:
    """Set ``path`` to the principal components of the data: first of patches, then of eight frames
    of those.

    A patch counts with the mean weight of its pixels. The latents are the leading components,
    scaled by their variance to the power ``-whitening / 2``, to unit variance on average, and
    turned by a random rotation: 0 keeps the pixels' distances, so that noise on the latents is
    noise in the picture, 1 makes every component equally loud, down to the faintest. The rotation
    shares the variance among the channels; without it, normalising each channel for diffusion would
    whiten them anyhow.

    Args:
        path: what to set, in place.
        batches: a new pass over (frames (B, 3, 8n+1, H, W) in [-1, 1], pixel weights (B, 1, F, H,
            W)); called twice.
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
        weight = (
            _patch_weights(weights[:, :, 1:], path.patch_size)
            .unflatten(1, (-1, TEMPORAL_RATIO))
            .mean(2)
        )
        blocks.add(components.unflatten(1, (-1, TEMPORAL_RATIO)).movedim(2, -2).flatten(-2), weight)
    mean, variances, basis, lost_in_time = blocks.leading(
        path.fold.proj.out_features, sum_over_devices
    )
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

    def leading(
        self, count: int, sum_over_devices: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, float]:
        """Mean, the ``count`` largest variances, their directions as columns, and the variance that
        is left out.
        """
        weight, total, products = (
            sum_over_devices(value) for value in (self.weight, self.sum, self.products)
        )
        mean = total / weight
        variances, directions = torch.linalg.eigh(products / weight - mean[:, None] * mean)
        variances, directions = variances.flip(0).clamp(min=0.0), directions.flip(1)
        return mean, variances[:count], directions[:, :count], float(variances[count:].sum())


def _patch_weights(weights: Tensor, patch_size: int) -> Tensor:
    """Pixel weights (B, 1, F, H, W) -> mean of each patch (B, F, h, w)."""
    return patchify(weights, patch_size).mean(-1)


def _rotation(size: int) -> Tensor:
    """A random orthogonal matrix, the same at every call."""
    gaussian = torch.randn(
        size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    return torch.linalg.qr(gaussian)[0]


def _set(linear: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)


class VideoAutoencoder(PretrainedPart):
    """What every VAE offers: frames (B, 3, F, H, W) in [-1, 1] to normalised latents and back.

    Latents are (B, C, f, h, w).

    Slot 0 of a clip is image-like (one frame), the others video-like (eight frames): they are
    normalised with statistics of their own, a choice of this project. Row 0 of the buffers belongs
    to slot 0, row 1 to all others.

    Attributes:
        latent_channels: C.
        latents_mean, latents_std: buffers of shape (2, C).
        measures_statistics: whether training measures them anew; False where published ones rule
            (LTX).
    """

    measures_statistics = True

    latents_mean: Tensor
    latents_std: Tensor

    def __init__(self, latent_channels: int) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        self.register_buffer("latents_mean", torch.zeros(2, latent_channels))
        self.register_buffer("latents_std", torch.ones(2, latent_channels))

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, for ``config.json``."""
        raise NotImplementedError

    def encode_moments(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and log-variance of the raw latents, both (B, C, f, h, w)."""
        raise NotImplementedError

    def decode_raw(self, latents: Tensor, stream: Stream | None = None) -> Tensor:
        """Decodes raw latents to frames; with a stream, continues what it has seen."""
        raise NotImplementedError

    def encode(self, frames: Tensor) -> Tensor:
        """Encodes frames (B, 3, F, H, W) to normalised latents (B, C, f, h, w), the mean.

        F = 8 (f - 1) + 1.

        Raises:
            ValueError: a frame count other than 8n+1, or a side that is not a multiple of 32.
        """
        check_frames(frames)
        return self.normalise(self.encode_moments(frames)[0])

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes normalised latents of a whole clip, slot 0 first, to frames (B, 3, F, H, W)."""
        return self.decode_raw(self.denormalise(latents))

    def start_decode(self, reference_latent: Tensor) -> tuple[Tensor, Stream]:
        """Begins a streamed decode from slot 0, (B, C, 1, h, w).

        Returns:
            Its frame (B, 3, 1, H, W), and the stream.
        """
        stream = Stream()
        frames = self.decode_raw(self.denormalise(reference_latent), stream)
        return frames, stream

    def decode_chunk(self, latents: Tensor, stream: Stream) -> Tensor:
        """Decodes the next l latents (B, C, l, h, w) to 8 l frames (B, 3, 8 l, H, W).

        All chunks together equal :meth:`decode` of the whole clip.
        """
        return self.decode_raw(self.denormalise(latents, first_slot=1), stream)

    def decode_variant(self, stream: Stream) -> Hashable | None:
        """Returns a key for CUDA graphs of :meth:`decode_chunk`.

        With the same key and shapes the next call does the same on the device, so one captured
        graph serves. None: it depends on more, and must not be captured.
        """
        return stream.started

    def count_decoded(self, stream: Stream, num_latents: int) -> None:
        """Does the part of :meth:`decode_chunk` that runs on the host.

        Call it when a captured graph ran in its place.
        """

    def normalise(self, latents: Tensor) -> Tensor:
        """Brings raw latents of a whole clip to zero mean and unit variance per channel."""
        mean, std = self._statistics(latents, 0)
        return (latents - mean) / std

    def denormalise(self, latents: Tensor, first_slot: int = 0) -> Tensor:
        """The inverse of :meth:`normalise`; ``first_slot`` is 0 for a clip's start and 1 for what
        follows.
        """
        mean, std = self._statistics(latents, first_slot)
        return latents * std + mean

    def _statistics(self, latents: Tensor, first_slot: int) -> tuple[Tensor, Tensor]:
        if first_slot:  # one column serves any number of video-like slots
            mean, std = self.latents_mean[1:].T, self.latents_std[1:].T
        else:
            slots = torch.arange(latents.shape[2], device=latents.device).clamp(max=1)
            mean, std = self.latents_mean[slots].T, self.latents_std[slots].T
        return mean[None, :, :, None, None].to(latents.dtype), std[None, :, :, None, None].to(
            latents.dtype
        )


class CompactVAE(VideoAutoencoder):
    """A small causal VAE that trains and streams on a CPU, in place of REST's LTX-Video VAE.

    Its factorised convolutions follow R(2+1)D.

    Stages run from fine to coarse: patches of ``patch_size`` pixels, then ``strides`` of (time,
    space) between stages.

    Args:
        latent_channels: C.
        widths: channels of each stage, fine to coarse.
        encoder_blocks, decoder_blocks: residual blocks of each stage, fine to coarse.
        strides: (time, space) factor between neighbouring stages; with ``patch_size`` they multiply
            to 8 and 32.
        patch_size: pixels on the side of one patch.
        principal_components: components per 32x32 patch of a linear path beside the network. The
            network then starts silent and learns what the path leaves (see
            :class:`~rest_lightning.models.vae.PrincipalPath`); 0: no path. The decoder's finest
            stage sees the path's frames, so that it can smooth their jumps from one block of 8
            frames to the next.
    """

    def __init__(
        self,
        latent_channels: int = 64,
        widths: tuple[int, ...] = (64, 128, 256, 256),
        encoder_blocks: tuple[int, ...] = (1, 1, 2, 2),
        decoder_blocks: tuple[int, ...] = (2, 2, 3, 2),
        strides: tuple[tuple[int, int], ...] = ((2, 1), (2, 2), (2, 2)),
        patch_size: int = 8,
        principal_components: int = 0,
    ) -> None:
        super().__init__(latent_channels)
        time, space = 1, patch_size
        for stride in strides:
            time, space = time * stride[0], space * stride[1]
        if (time, space) != (TEMPORAL_RATIO, SPATIAL_RATIO):
            raise ValueError(
                f"expected patch_size and strides of {TEMPORAL_RATIO}x in time and "
                f"{SPATIAL_RATIO}x in space, "
                f"got {time}x and {space}x: change `strides` or `patch_size`"
            )
        if not len(widths) == len(encoder_blocks) == len(decoder_blocks) == len(strides) + 1:
            raise ValueError(
                "expected one width and block count per stage and one stride less, got "
                f"{len(widths)} widths, "
                f"{len(encoder_blocks)} and {len(decoder_blocks)} block counts, {len(strides)} "
                "strides"
            )
        self._config = {
            "latent_channels": latent_channels,
            "widths": tuple(widths),
            "encoder_blocks": tuple(encoder_blocks),
            "decoder_blocks": tuple(decoder_blocks),
            "strides": tuple((t, s) for t, s in strides),
            "patch_size": patch_size,
            "principal_components": principal_components,
        }
        self.patch_size = patch_size
        patch_channels = 3 * patch_size**2

        encoder: list[nn.Module] = [SpatialConv(patch_channels, widths[0], 1)]
        for i, width in enumerate(widths):
            encoder += [ResBlock(width) for _ in range(encoder_blocks[i])]
            if i < len(strides):
                encoder.append(Downsample(width, widths[i + 1], *strides[i]))
        self.encoder = nn.ModuleList(encoder)
        self.encoder_norm = RMSNorm(widths[-1])
        self.encoder_out = nn.Linear(widths[-1], 2 * latent_channels)
        # Little noise at the start: a decoder that first sees noise alone learns to ignore its
        # latents.
        nn.init.constant_(self.encoder_out.bias[latent_channels:], -5.0)

        decoder: list[nn.Module] = [SpatialConv(latent_channels, widths[-1])]
        for i in reversed(range(len(widths))):
            decoder += [ResBlock(widths[i]) for _ in range(decoder_blocks[i])]
            if i:
                decoder.append(Upsample(widths[i], widths[i - 1], *strides[i - 1]))
        self.decoder = nn.ModuleList(decoder)
        self.num_fine = decoder_blocks[0]
        self.decoder_norm = RMSNorm(widths[0])
        self.decoder_out = SpatialConv(widths[0], patch_channels)
        self.principal: PrincipalPath | None = None
        if principal_components:
            self.principal = PrincipalPath(latent_channels, principal_components)
            self.principal_in = SpatialConv(patch_channels, widths[0], 1)
            self.silence()
        name_streams(self)

    @torch.no_grad()
    def silence(self) -> None:
        """Makes the network add nothing to the principal path, until it is trained (again)."""
        for silent in (*self.principal_in.conv.parameters(), *self.decoder_out.conv.parameters()):
            nn.init.zeros_(silent)
        nn.init.zeros_(self.encoder_out.weight[: self.latent_channels])
        nn.init.zeros_(self.encoder_out.bias[: self.latent_channels])

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return dict(self._config)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an untrained network from :attr:`config` (lists are accepted for tuples: JSON has
        no tuples).
        """
        return cls(**{**config, "strides": tuple(tuple(stride) for stride in config["strides"])})

    def encode_moments(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`VideoAutoencoder.encode_moments`."""
        x = run(self.encoder, patchify(frames, self.patch_size), None)
        mean, log_variance = self.encoder_out(self.encoder_norm(x)).chunk(2, dim=-1)
        if self.principal is not None:
            mean = mean + self.principal.encode(frames)
        return mean.movedim(-1, 1), log_variance.movedim(-1, 1).clamp(-20.0, 10.0)

    def decode_raw(self, latents: Tensor, stream: Stream | None = None) -> Tensor:
        """See :meth:`VideoAutoencoder.decode_raw`."""
        latents = latents.movedim(1, -1).contiguous()
        layers = list(self.decoder)  # a slice of a ModuleList would be a new module at every call
        coarse, fine = layers[: len(layers) - self.num_fine], layers[len(layers) - self.num_fine :]
        x = run(coarse, latents, stream)
        linear = None  # patches
        if self.principal is not None:
            linear = self.principal.decode_patches(latents, self.patch_size, stream)
            x = x + self.principal_in(linear)
        x = run(fine, x, stream)
        patches = self.decoder_out(nn.functional.silu(self.decoder_norm(x)))
        if linear is not None:
            patches = patches + linear
        if stream is not None:
            stream.started = True
        return unpatchify(patches, self.patch_size)


def run(layers: Iterable[nn.Module], x: Tensor, stream: Stream | None) -> Tensor:
    """Apply ``layers`` in turn; those with a past or a first frame of their own read ``stream``."""
    for layer in layers:
        x = layer(x) if isinstance(layer, SpatialConv) else layer(x, stream)
    return x


def check_frames(frames: Tensor) -> None:
    """Raise a ValueError unless frames are (B, 3, 8n+1, 32a, 32b)."""
    if frames.ndim != 5 or frames.shape[1] != 3:
        raise ValueError(f"expected frames of shape (B, 3, F, H, W), got {tuple(frames.shape)}")
    num_latent_frames(frames.shape[2])
    if frames.shape[3] % SPATIAL_RATIO or frames.shape[4] % SPATIAL_RATIO:
        raise ValueError(
            f"expected frame sides that are multiples of {SPATIAL_RATIO}, got "
            f"{tuple(frames.shape[3:])}: "
            "resize the clips"
        )
