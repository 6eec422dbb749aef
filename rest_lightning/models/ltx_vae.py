"""The LTX-Video VAE with streamed decoding: published weights, whole clips bit-identical to
diffusers (REST sec. 3.1).

Encoder and decoder are diffusers' own. Two of the decoder's layers, the causal convolution and the
upsampler, are exchanged for layers of the same parameters that can also continue a stream.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import json
import math
import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rest_lightning.constants import SPATIAL_RATIO, TEMPORAL_RATIO
from rest_lightning.errors import UserError
from rest_lightning.models.causal import Stream, StreamedModule, is_first_piece, name_streams
from rest_lightning.models.vae import VideoAutoencoder

# Arguments of AutoencoderKLLTXVideo by version of LTX-Video, where they differ from diffusers'
# defaults. The later ones' vae/config.json is that of 0.9.5.
VERSIONS: dict[str, dict[str, Any]] = {
    "0.9.0": {},
    "0.9.1": {
        "decoder_block_out_channels": [256, 512, 1024],
        "decoder_layers_per_block": [5, 6, 7, 8],
        "decoder_spatio_temporal_scaling": [True, True, True],
        "decoder_inject_noise": [True, True, True, False],
        "upsample_residual": [True, True, True],
        "upsample_factor": [2, 2, 2],
        "timestep_conditioning": True,
    },
    "0.9.5": {
        "block_out_channels": [128, 256, 512, 1024, 2048],
        "down_block_types": ["LTXVideo095DownBlock3D"] * 4,
        "decoder_block_out_channels": [256, 512, 1024],
        "layers_per_block": [4, 6, 6, 2, 2],
        "decoder_layers_per_block": [5, 5, 5, 5],
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

# Keys of a stream beside the pasts of the convolutions.
# latents seen so far, (B,), on the CPU: reading it never waits for a device
NUM_LATENTS = "num_latents"
CONTEXT = "context"  # the last `halo` latents, (B, C, halo, h, w)


class LTXVideoVAE(VideoAutoencoder):
    """Diffusers' ``AutoencoderKLLTXVideo`` behind this project's interface.

    Streamed decoding of a causal decoder (``decoder_causal: true``) is exact. Stock LTX decoders
    look ahead: there a piece is decoded together with the last ``halo`` latents before it, whose
    frames are thrown away, and with its own last frame repeated in place of what follows. So every
    piece of l latents gives 8 l frames at once. The difference between :func:`streamed_decode` and
    :meth:`decode` is what that costs. A halo of zero decodes pieces without any context.

    With timestep conditioning latents are mixed with noise before they are decoded, as in
    diffusers' LTX pipeline. Diffusers draws that noise at random; here it is a fixed function of
    the latent's index in its clip, the same for every row, so that streamed and whole decoding, and
    a row alone or in a batch, see the same noise. For the same reason layers that inject noise of
    their own (``decoder_inject_noise``) draw the same noise at every call.

    Args:
        weights: a folder in diffusers format (the VAE's, or a pipeline's with ``vae/`` in it); a
            single safetensors file in the original format; or a hub id that lies in the hub's cache
            on this machine. Nothing is downloaded. None leaves the network untrained.
        ltx_config: arguments of ``AutoencoderKLLTXVideo``. Beside a folder they replace single
            entries of its configuration, as in ``{decoder_causal: true}``, which turns a stock
            decoder into a causal one to fine-tune. What is given neither here nor by a folder or
            ``version`` is diffusers' default, LTX-Video 0.9.0.
        version: ``0.9.0``, ``0.9.1`` (REST's: the first whose decoder is conditioned on timestep
            and noise) or ``0.9.5``: the arguments of that network, under those of ``ltx_config``. A
            single file needs it; a folder that is of another version is an error.
        decode_timestep: decode timestep in [0, 1]; only for networks with timestep conditioning.
        decode_noise_scale: share of noise in the decoded latents, in [0, 1]; only for those, too.
        halo: latents before a piece that are decoded again; only for decoders that are not causal.

    Attributes:
        ltx: the diffusers model. Its statistics are the initial :attr:`latents_mean` and
            :attr:`latents_std`, and are not used otherwise.

    Raises:
        UserError: no such weights, weights of another architecture, or a compression other than
            32x32x8.
    """

    measures_statistics = False

    def __init__(
        self,
        weights: str | None = None,
        ltx_config: dict[str, Any] | None = None,
        decode_timestep: float = 0.05,
        decode_noise_scale: float = 0.025,
        halo: int = 1,
        version: str | None = None,
    ) -> None:
        for name, value in (
            ("decode_timestep", decode_timestep),
            ("decode_noise_scale", decode_noise_scale),
        ):
            if not 0.0 <= value <= 1.0:
                raise UserError(
                    f"expected {name} in [0, 1], got {value}: LTX-Video uses 0.05 and 0.025"
                )
        if halo < 0:
            raise UserError(f"expected a halo of at least 0 latents, got {halo}")
        if version is not None and version not in VERSIONS:
            raise UserError(
                f"expected a version of {', '.join(VERSIONS)}, got {version!r}: 0.9.1 is REST's, "
                "and 0.9.5 has the network of all later ones"
            )
        of_version, changes = VERSIONS[version or "0.9.0"], ltx_config or {}
        if weights is None:
            ltx = build_ltx({**of_version, **changes})
        else:
            ltx = load_ltx_vae(weights, changes, of_version)
            if version is not None:
                _check_version(ltx, weights, version, changes)
        check_compression(ltx)
        super().__init__(ltx.config.latent_channels)
        self.ltx = ltx
        self.decode_timestep, self.decode_noise_scale, self.halo = (
            decode_timestep,
            decode_noise_scale,
            halo,
        )
        self._call = _Call()
        _exchange_layers(ltx.decoder, self._call)
        name_streams(self)
        # normalised = (z - mean) * scaling_factor / std (diffusers' LTX pipeline); both slots have
        # LTX's statistics.
        self.latents_mean.copy_(ltx.latents_mean)
        self.latents_std.copy_(ltx.latents_std / ltx.config.scaling_factor)

    @property
    def config(self) -> dict[str, Any]:
        """Everything that :meth:`from_config` needs for the same untrained network, ready for
        JSON.
        """
        entries = {
            name: value for name, value in self.ltx.config.items() if not name.startswith("_")
        }
        return {
            "ltx_config": {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in entries.items()
            },
            "decode_timestep": self.decode_timestep,
            "decode_noise_scale": self.decode_noise_scale,
            "halo": self.halo,
        }

    @property
    def decoder_causal(self) -> bool:
        """Whether streamed decoding is exact."""
        return bool(self.ltx.config.decoder_causal)

    def encode_moments(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`VideoAutoencoder.encode_moments`."""
        posterior = self.ltx.encode(frames).latent_dist
        return posterior.mean, posterior.logvar

    def decode_raw(self, latents: Tensor, stream: Stream | None = None) -> Tensor:
        """See :meth:`VideoAutoencoder.decode_raw`."""
        first = is_first_piece(stream)
        start = (
            torch.zeros(len(latents), dtype=torch.long)
            if stream is None or first
            else stream[NUM_LATENTS]
        )
        if self.ltx.config.timestep_conditioning and self.decode_noise_scale:
            noise = frame_noise(start, latents)
            latents = (1 - self.decode_noise_scale) * latents + self.decode_noise_scale * noise
        if stream is None:
            return self._decode(latents)
        if self.decoder_causal:
            with self._call.streaming(stream, first):
                frames = self._decode(latents)
        else:
            frames = self._decode_with_context(latents, start, stream)
        stream.remember(NUM_LATENTS, start + latents.shape[2])
        stream.started = True
        return frames

    def decode_variant(self, stream: Stream) -> Hashable | None:
        """See :meth:`VideoAutoencoder.decode_variant`: None where noise is mixed in, or rows have
        unequal context.
        """
        config = self.ltx.config
        if (config.timestep_conditioning and self.decode_noise_scale) or any(
            config.decoder_inject_noise
        ):
            return None
        if self.decoder_causal or not stream.started:
            return stream.started
        lengths = set(stream[NUM_LATENTS].clamp(max=self.halo + 1).tolist())
        return lengths.pop() if len(lengths) == 1 else None

    def count_decoded(self, stream: Stream, num_latents: int) -> None:
        """See :meth:`VideoAutoencoder.count_decoded`."""
        stream[NUM_LATENTS] += num_latents

    def _decode(self, latents: Tensor) -> Tensor:
        timestep = None
        if self.ltx.config.timestep_conditioning:
            timestep = latents.new_full((latents.shape[0],), self.decode_timestep)
        return self.ltx.decode(latents, timestep).sample

    def _decode_with_context(self, latents: Tensor, start: Tensor, stream: Stream) -> Tensor:
        """A piece of a decoder that looks ahead, with the latents before it as far as the halo and
        the clip reach.
        """
        num_new = latents.shape[2]
        nothing = latents.new_zeros(*latents.shape[:2], self.halo, *latents.shape[3:])
        context = stream[CONTEXT] if stream.started else nothing
        halo = context.shape[2]
        extended = torch.cat([context, latents], dim=2)
        stream.remember(CONTEXT, extended[:, :, num_new:])
        # Rows that restarted lately have less context; beyond the halo all rows are alike.
        lengths = start.clamp(max=halo + 1).tolist()
        pieces: dict[int, Tensor] = {}
        for length in sorted(set(lengths)):
            rows = [row for row, other in enumerate(lengths) if other == length]
            known = extended[:, :, halo - min(length, halo) :]
            # A context that reaches back to slot 0 is decoded as the clip's start that it is.
            with self._call.streaming(None, first=length <= halo):
                frames = self._decode(known if len(rows) == len(lengths) else known[rows])
            if length:
                frames = frames[:, :, -TEMPORAL_RATIO * num_new :]
            if len(rows) == len(lengths):
                return frames
            pieces.update(zip(rows, frames.split(1), strict=True))
        return torch.cat([pieces[row] for row in range(len(lengths))])


def streamed_decode(
    vae: LTXVideoVAE, latents: Tensor, chunk_length: int = 3, halo: int | None = None
) -> Tensor:
    """Decodes a whole clip piece by piece; returns frames (B, 3, F, H, W) in [-1, 1].

    The difference from :meth:`LTXVideoVAE.decode` is what streaming costs in exactness.

    Args:
        vae: the network.
        latents: normalised latents of a whole clip, slot 0 first, (B, C, f, h, w).
        chunk_length: latents per piece after slot 0; the last piece may be shorter.
        halo: used in place of the network's own; a causal decoder does not read it.
    """
    if halo is not None:
        vae = copy.copy(vae)  # the same weights, another halo
        vae.halo = halo
    first, stream = vae.start_decode(latents[:, :, :1])
    pieces = latents[:, :, 1:].split(chunk_length, dim=2) if latents.shape[2] > 1 else ()
    return torch.cat([first, *(vae.decode_chunk(piece, stream) for piece in pieces)], dim=2)


def frame_noise(start: Tensor, latents: Tensor) -> Tensor:
    """Returns unit Gaussian noise like ``latents`` (B, C, l, h, w), a fixed function of latent
    index, channel and place.

    A counter-based generator needs no state: 32-bit mixing steps of MurmurHash3, then the
    Box-Muller transform.

    Args:
        start: index of each row's first latent in its clip, (B,).
        latents: gives shape, type and device; its values are not read.
    """
    _, channels, num_frames, height, width = latents.shape
    device = latents.device
    index = start.to(device)[:, None] + torch.arange(num_frames, device=device)
    key = _mix(index + 0x9E3779B9)[:, None, :, None, None]
    place = torch.arange(channels * height * width, device=device).view(
        1, channels, 1, height, width
    )
    # 24 bits are what a float32 holds; the half keeps the logarithm away from zero.
    radius, angle = (((_mix(_mix(2 * place + i) ^ key) >> 8).float() + 0.5) / 2**24 for i in (0, 1))
    return (torch.sqrt(-2.0 * torch.log(radius)) * torch.cos(2.0 * math.pi * angle)).to(
        latents.dtype
    )


def _mix(x: Tensor) -> Tensor:
    """The final mix of MurmurHash3 on the low 32 bits of int64 values."""
    x = x & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)


class _Call(threading.local):
    """What the exchanged layers of one network have to know of the running call, for each thread
    apart.

    Diffusers' blocks hand no further argument down to their convolutions.
    """

    stream: Stream | None = None
    first = True

    @contextmanager
    def streaming(self, stream: Stream | None, first: bool) -> Iterator[None]:
        """Run with a stream for the convolutions, and as a clip's start or its continuation."""
        self.stream, self.first = stream, first
        try:
            yield
        finally:
            self.stream, self.first = None, True

    def __reduce__(self) -> tuple[type[_Call], tuple[()]]:
        return type(self), ()  # copies of the network get a call of their own


class _Conv(StreamedModule):
    """``LTXVideoCausalConv3d`` with the same parameters, able to continue a stream:
    (B, C, F, H, W).
    """

    def __init__(self, original: Any, call: _Call) -> None:
        super().__init__()
        self.conv = original.conv
        self.is_causal: bool = original.is_causal
        self._call = call

    def forward(self, x: Tensor) -> Tensor:
        num_past = self.conv.kernel_size[0] - 1
        if not self.is_causal:
            edges = (x[:, :, :1], x[:, :, -1:])
            left, right = (edge.expand(-1, -1, num_past // 2, -1, -1) for edge in edges)
            return self.conv(torch.cat([left, x, right], dim=2))
        if not num_past:
            return self.conv(x)
        stream, first = self._call.stream, self._call.first
        past = (
            x[:, :, :1].expand(-1, -1, num_past, -1, -1)
            if stream is None or first
            else stream[self.stream_name]
        )
        x = torch.cat([past.to(x.dtype), x], dim=2)
        if stream is not None:
            stream.remember(self.stream_name, x[:, :, -num_past:])
        return self.conv(x)


class _Upsampler(nn.Module):
    """``LTXVideoUpsampler3d`` with the same parameters; drops its first frames only at a clip's
    start.
    """

    def __init__(self, original: Any, call: _Call) -> None:
        super().__init__()
        self.conv = original.conv
        self.stride: tuple[int, int, int] = tuple(original.stride)
        self.residual: bool = original.residual
        self.num_repeats = math.prod(self.stride) // original.upscale_factor
        self._call = call

    def forward(self, x: Tensor) -> Tensor:
        y = self._unfold(self.conv(x))
        if self.residual:
            y = y + self._unfold(x).repeat(1, self.num_repeats, 1, 1, 1)
        return y[:, :, self.stride[0] - 1 :] if self._call.first else y

    def _unfold(self, x: Tensor) -> Tensor:
        """Channels to ``stride`` times the frames, rows and columns."""
        t, s, r = self.stride
        b, c, f, h, w = x.shape
        x = x.reshape(b, c // (t * s * r), t, s, r, f, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return x.reshape(b, c // (t * s * r), f * t, h * s, w * r)


def _exchange_layers(decoder: nn.Module, call: _Call) -> None:
    """Put the layers above in the places of diffusers' own, with the same names and parameters."""
    from diffusers.models.autoencoders import autoencoder_kl_ltx as ltx

    for old, new in ((ltx.LTXVideoCausalConv3d, _Conv), (ltx.LTXVideoUpsampler3d, _Upsampler)):
        for name, module in list(decoder.named_modules()):
            if isinstance(module, old):
                parent, _, child = name.rpartition(".")
                setattr(decoder.get_submodule(parent), child, new(module, call))
    blocks = [
        block
        for block in decoder.modules()
        if getattr(block, "per_channel_scale1", None) is not None
    ]
    for seed, block in enumerate(blocks):
        block.register_forward_pre_hook(partial(_fix_noise, seed=seed))


def _fix_noise(module: nn.Module, args: tuple[Any, ...], seed: int) -> tuple[Any, ...]:
    """Give a noise-injecting block, called with (hidden_states, temb, generator), a generator that
    starts anew.
    """
    x, temb = args[:2]
    if x.is_meta:  # nothing is drawn there, and it has no generator
        return x, temb, None
    return x, temb, torch.Generator(x.device).manual_seed(seed)


# -- weights ---------------------------------------------------------------------------------------
# Where the LTX-Video VAE's weights come from: diffusers folders, the hub's local cache, original
# single files.

HOW_TO_GET = (
    "get them with `hf download Lightricks/LTX-Video --include 'vae/*' --local-dir FOLDER` and "
    "name FOLDER as `weights`"
)


def _model_class() -> Any:
    from rest_lightning.torchvision_compat import ensure_torchvision

    ensure_torchvision()
    from diffusers.models.autoencoders.autoencoder_kl_ltx import AutoencoderKLLTXVideo

    return AutoencoderKLLTXVideo


def build_ltx(config: dict[str, Any]) -> Any:
    """An untrained ``AutoencoderKLLTXVideo`` from its arguments."""
    _check_names(config)
    try:
        return _model_class()(**config)
    except (TypeError, ValueError, IndexError) as error:
        raise UserError(
            f"expected an `ltx_config` that AutoencoderKLLTXVideo can build_ltx: {_line(error)}"
        ) from error


def check_compression(ltx: Any) -> None:
    """Raise a UserError unless encoder and decoder both compress 32x32x8."""
    encoder = [layer for block in ltx.encoder.down_blocks for layer in block.downsamplers or ()]
    decoder = [layer for block in ltx.decoder.up_blocks for layer in block.upsamplers or ()]
    patch = (ltx.config.patch_size_t, ltx.config.patch_size)
    for name, layers in (("encoder", encoder), ("decoder", decoder)):
        # A strided convolution keeps its stride inside, LTX's own samplers on themselves.
        strides = [getattr(layer, "stride", None) or layer.conv.stride for layer in layers]
        time, space = (patch[i] * math.prod(stride[i] for stride in strides) for i in (0, 1))
        if (time, space) != (TEMPORAL_RATIO, SPATIAL_RATIO) or patch[0] != 1:
            raise UserError(
                f"expected an LTX {name} of {TEMPORAL_RATIO}x in time and {SPATIAL_RATIO}x in "
                "space, patch_size_t 1, "
                f"got {time}x, {space}x and {patch[0]}: change `ltx_config`"
            )


def load_ltx_vae(
    weights: str, config: dict[str, Any], of_version: dict[str, Any] | None = None
) -> Any:
    """The ``AutoencoderKLLTXVideo`` of a folder, a single file or the hub's cache, in float32.

    ``config`` replaces entries of a folder's configuration, or of a single file's version.

    Raises:
        UserError: no such weights, or weights of another architecture.
    """
    _check_names(config)  # diffusers ignores names that it does not know
    path = Path(weights).expanduser()
    if path.is_file():
        return _load_single_file(path, {**(of_version or {}), **config})
    if path.is_dir():
        folder = path / "vae" if (path / "vae" / "config.json").is_file() else path
        _check_folder(folder)
        return _load_pretrained(str(folder), f"{folder.resolve()}", config)
    from huggingface_hub.constants import HF_HUB_CACHE

    where = str(path.absolute())
    if path.suffix == ".safetensors" or path.is_absolute() or weights.count("/") != 1:
        raise UserError(
            "expected LTX VAE weights (a diffusers folder or a safetensors file), looked in "
            f"{where}: {HOW_TO_GET}"
        )
    return _load_pretrained(
        weights, (f"{where} and the hub cache {HF_HUB_CACHE}"), config, subfolder="vae"
    )


def _check_version(ltx: Any, weights: str, version: str, changes: dict[str, Any]) -> None:
    """Raise a UserError where the configuration of a folder is not that of ``version``."""
    defaults = inspect.signature(_model_class().__init__).parameters
    for name in sorted({name for each in VERSIONS.values() for name in each} - changes.keys()):
        expected = VERSIONS[version].get(name, defaults[name].default)
        got = getattr(ltx.config, name)
        plain = [list(x) if isinstance(x, tuple) else x for x in (expected, got)]
        if plain[0] != plain[1]:
            raise UserError(
                f"expected an LTX VAE {version} in {weights}, got {name} {plain[1]} in place of "
                f"{plain[0]}: name the folder of that version, or set `version` to its own"
            )


def _check_names(config: dict[str, Any]) -> None:
    known = inspect.signature(_model_class().__init__).parameters
    unknown = sorted(config.keys() - known.keys())
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, 1)
        way_out = f"did you mean {close[0]}?" if close else "see its documentation"
        raise UserError(
            f"expected `ltx_config` to hold arguments of AutoencoderKLLTXVideo, got {unknown[0]}: "
            f"{way_out}"
        )


def _check_folder(folder: Path) -> None:
    name = "diffusion_pytorch_model"
    for names in (
        ("config.json",),
        (f"{name}.safetensors", f"{name}.safetensors.index.json", f"{name}.bin"),
    ):
        if not any((folder / each).is_file() for each in names):
            raise UserError(
                f"expected an LTX VAE with {names[0]}, looked in {folder.resolve()}: {HOW_TO_GET}"
            )
    found = json.loads((folder / "config.json").read_text()).get("_class_name")
    if found != "AutoencoderKLLTXVideo":
        raise UserError(
            f"expected an AutoencoderKLLTXVideo in {folder.resolve()}, got {found}: {HOW_TO_GET}"
        )


def _load_pretrained(source: str, where: str, config: dict[str, Any], **arguments: Any) -> Any:
    try:
        model, report = _model_class().from_pretrained(
            source,
            output_loading_info=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            **arguments,
            **config,
        )
    except OSError as error:
        wanted = "config.json and diffusion_pytorch_model.safetensors"
        raise UserError(
            f"expected LTX VAE weights {source} ({wanted}), looked in {where}: {HOW_TO_GET}"
        ) from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"expected weights of an AutoencoderKLLTXVideo in {where}: {_line(error)}"
        ) from error
    for what, key in (
        ("missing", "missing_keys"),
        ("left over", "unexpected_keys"),
        ("misshapen", "mismatched_keys"),
    ):
        if report[key]:
            raise UserError(
                f"expected the tensors of an LTX VAE in {where}, got {what}: "
                f"{sorted(report[key])[0]}"
            )
    return model


def _load_single_file(path: Path, config: dict[str, Any]) -> Any:
    """The original format: diffusers' own conversion of the names, into the network of
    ``config``.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            # A whole model's file holds its transformer too; a file of the VAE alone has no prefix.
            prefix = "vae." if any(name.startswith("vae.") for name in names) else ""
            original = {
                f"vae.{name.removeprefix(prefix)}": file.get_tensor(name)
                for name in names
                if prefix in name
            }
    except SafetensorError as error:
        raise UserError(
            f"expected an LTX VAE as safetensors in {path}: {_line(error)}; {HOW_TO_GET}"
        ) from error
    if "vae.encoder.conv_out.conv.weight" not in original:
        raise UserError(
            f"expected an LTX VAE in {path}, got no vae.encoder.conv_out.conv.weight: {HOW_TO_GET}"
        )
    model = build_ltx(config)
    own = model.state_dict()
    state = {name.removeprefix("vae."): value for name, value in original.items()}
    if state.keys() != own.keys():
        from diffusers.loaders.single_file_utils import convert_ltx_vae_checkpoint_to_diffusers

        state = convert_ltx_vae_checkpoint_to_diffusers(original)
    for what, wrong in (
        ("missing", own.keys() - state.keys()),
        ("left over", state.keys() - own.keys()),
        (
            "of another shape",
            {name for name in own.keys() & state.keys() if own[name].shape != state[name].shape},
        ),
    ):
        if wrong:
            raise UserError(
                f"expected the tensors of this `ltx_config` in {path}, got {len(wrong)} {what}: "
                f"{min(wrong)}; "
                "give the `ltx_config` of these weights (vae/config.json of their version)"
            )
    model.load_state_dict(state)
    return model


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
