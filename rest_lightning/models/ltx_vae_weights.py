"""Where the LTX-Video VAE's weights come from: diffusers folders, the hub's local cache, original single files."""

from __future__ import annotations

import difflib
import inspect
import json
import math
from pathlib import Path
from typing import Any

from rest_lightning.constants import SPATIAL_RATIO, TEMPORAL_RATIO
from rest_lightning.errors import UserError

HOW_TO_GET = (
    "get them with `hf download Lightricks/LTX-Video --include 'vae/*' --local-dir FOLDER` and name FOLDER as `weights`"
)


def _model_class() -> Any:
    from rest_lightning.torchvision_compat import ensure_torchvision

    ensure_torchvision()
    from diffusers.models.autoencoders.autoencoder_kl_ltx import AutoencoderKLLTXVideo

    return AutoencoderKLLTXVideo


def build(config: dict[str, Any]) -> Any:
    """An untrained ``AutoencoderKLLTXVideo`` from its arguments."""
    _check_names(config)
    try:
        return _model_class()(**config)
    except (TypeError, ValueError, IndexError) as error:
        raise UserError(f"expected an `ltx_config` that AutoencoderKLLTXVideo can build: {_line(error)}") from error


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
                f"expected an LTX {name} of {TEMPORAL_RATIO}x in time and {SPATIAL_RATIO}x in space, patch_size_t 1, "
                f"got {time}x, {space}x and {patch[0]}: change `ltx_config`"
            )


def load(weights: str, config: dict[str, Any]) -> Any:
    """The ``AutoencoderKLLTXVideo`` of a folder, a single file or the hub's cache, in float32.

    Raises:
        UserError: no such weights, or weights of another architecture.
    """
    _check_names(config)  # diffusers ignores names that it does not know
    path = Path(weights).expanduser()
    if path.is_file():
        return _load_single_file(path, config)
    if path.is_dir():
        folder = path / "vae" if (path / "vae" / "config.json").is_file() else path
        _check_folder(folder)
        return _load_pretrained(str(folder), f"{folder.resolve()}", config)
    from huggingface_hub.constants import HF_HUB_CACHE

    where = str(path.absolute())
    if path.suffix == ".safetensors" or path.is_absolute() or weights.count("/") != 1:
        raise UserError(
            f"expected LTX VAE weights (a diffusers folder or a safetensors file), looked in {where}: {HOW_TO_GET}"
        )
    return _load_pretrained(weights, f"{where} and the hub cache {HF_HUB_CACHE}", config, subfolder="vae")


def _check_names(config: dict[str, Any]) -> None:
    known = inspect.signature(_model_class().__init__).parameters
    unknown = sorted(config.keys() - known.keys())
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, 1)
        way_out = f"did you mean {close[0]}?" if close else "see its documentation"
        raise UserError(
            f"expected `ltx_config` to hold arguments of AutoencoderKLLTXVideo, got {unknown[0]}: {way_out}"
        )


def _check_folder(folder: Path) -> None:
    name = "diffusion_pytorch_model"
    for names in (("config.json",), (f"{name}.safetensors", f"{name}.safetensors.index.json", f"{name}.bin")):
        if not any((folder / each).is_file() for each in names):
            raise UserError(f"expected an LTX VAE with {names[0]}, looked in {folder.resolve()}: {HOW_TO_GET}")
    found = json.loads((folder / "config.json").read_text()).get("_class_name")
    if found != "AutoencoderKLLTXVideo":
        raise UserError(f"expected an AutoencoderKLLTXVideo in {folder.resolve()}, got {found}: {HOW_TO_GET}")


def _load_pretrained(source: str, where: str, config: dict[str, Any], **arguments: Any) -> Any:
    try:
        model, report = _model_class().from_pretrained(
            source, output_loading_info=True, local_files_only=True, low_cpu_mem_usage=False, **arguments, **config
        )
    except OSError as error:
        wanted = "config.json and diffusion_pytorch_model.safetensors"
        raise UserError(f"expected LTX VAE weights {source} ({wanted}), looked in {where}: {HOW_TO_GET}") from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"expected weights of an AutoencoderKLLTXVideo in {where}: {_line(error)}") from error
    for what, key in (("missing", "missing_keys"), ("left over", "unexpected_keys"), ("misshapen", "mismatched_keys")):
        if report[key]:
            raise UserError(f"expected the tensors of an LTX VAE in {where}, got {what}: {sorted(report[key])[0]}")
    return model


def _load_single_file(path: Path, config: dict[str, Any]) -> Any:
    """The original format: diffusers' own conversion of the names, into the network of ``config``."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            # A whole model's file holds its transformer too; a file of the VAE alone has no prefix.
            prefix = "vae." if any(name.startswith("vae.") for name in names) else ""
            original = {f"vae.{name.removeprefix(prefix)}": file.get_tensor(name) for name in names if prefix in name}
    except SafetensorError as error:
        raise UserError(f"expected an LTX VAE as safetensors in {path}: {_line(error)}; {HOW_TO_GET}") from error
    if "vae.encoder.conv_out.conv.weight" not in original:
        raise UserError(f"expected an LTX VAE in {path}, got no vae.encoder.conv_out.conv.weight: {HOW_TO_GET}")
    model = build(config)
    own = model.state_dict()
    state = {name.removeprefix("vae."): value for name, value in original.items()}
    if state.keys() != own.keys():
        from diffusers.loaders.single_file_utils import convert_ltx_vae_checkpoint_to_diffusers

        state = convert_ltx_vae_checkpoint_to_diffusers(original)
    for what, wrong in (
        ("missing", own.keys() - state.keys()),
        ("left over", state.keys() - own.keys()),
        ("of another shape", {name for name in own.keys() & state.keys() if own[name].shape != state[name].shape}),
    ):
        if wrong:
            raise UserError(
                f"expected the tensors of this `ltx_config` in {path}, got {len(wrong)} {what}: {min(wrong)}; "
                "give the `ltx_config` of these weights (vae/config.json of their version)"
            )
    model.load_state_dict(state)
    return model


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
