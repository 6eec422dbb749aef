"""LTX-Video weights into the A2V-DiT: every tensor by name, nothing left over, nothing missing
(REST sec. 4.1).

Only the speech attention and the spatial embedding are new; they keep their own start.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rest_lightning.errors import UserError

NEW_PARTS = ("speech_attn.", "speech_norm.", "spatial_embedding", "prompt_embeds", "prompt_mask")
ORIGINAL_PREFIX = "model.diffusion_model."
# What the original files state about the transformer: keys that must have one value here ...
FIXED_KEYS: dict[str, Any] = {
    "activation_fn": "gelu-approximate",
    "adaptive_norm": "single_scale_shift",
    "attention_type": "default",
    "double_self_attention": False,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "positional_embedding_type": "rope",
    "qk_norm": "rms_norm",
    "standardization_norm": "rms_norm",
    "timestep_scale_multiplier": 1000,
    "upcast_attention": False,
}
# ... keys that the tensors say as well, or that change nothing ...
IDLE_KEYS = {
    "_class_name",
    "_diffusers_version",
    "_name_or_path",
    "attention_bias",
    "attention_head_dim",
    "caption_channels",
    "cross_attention_dim",
    "dropout",
    "in_channels",
    "norm_elementwise_affine",
    "norm_num_groups",
    "num_attention_heads",
    "num_embeds_ada_norm",
    "num_layers",
    "out_channels",
    "project_to_2d_pos",
    "sample_size",
    "use_linear_projection",
    "use_tpu_flash_attention",
}
# ... and keys that are arguments of A2VDiT: norm_eps, positional_embedding_theta,
# positional_embedding_max_pos and this one, which is absent before 0.9.5.
CAUSAL_KEY = "causal_temporal_positioning"
WHICH_VERSION = "false for LTX-Video 0.9.0 and 0.9.1, true for 0.9.5 to 0.9.8"
HOW_TO_GET = (
    "get them with `hf download Lightricks/LTX-Video --include 'transformer/*' --local-dir FOLDER` "
    "and name FOLDER"
)
# REST sec. 4.1
PROMPT = (
    "A person is speaking, and his head moves rhythmically in a small range to follow the sound"
)
PROMPT_LENGTH = 128  # tokens with padding, as in LTX-Video's pipeline
HOW_TO_GET_T5 = (
    "get it with `hf download Lightricks/LTX-Video --include 'text_encoder/*' 'tokenizer/*' "
    "--local-dir FOLDER` "
    "and name FOLDER"
)


def read_ltx(
    source: str | Path | nn.Module, causal_positions: bool | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns arguments of `A2VDiT` and all tensors of LTX weights.

    Args:
        source: an ``LTXVideoTransformer3DModel``; a folder in diffusers format (the transformer's,
            or a pipeline's with ``transformer/`` in it); a single file in the original format; or a
            hub id.
        causal_positions: whether these weights place frames at 0, 1/25, 9/25 s, ... (LTX-Video
            0.9.5 and later) or at 0, 8/25, 16/25 s, ... (before). The tensors do not tell; of all
            sources only an original file does. None takes its word.

    Raises:
        UserError: no such weights; an architecture, or a stated setting, that A2VDiT does not
            cover; or a source that does not say where it places frames, or says otherwise.
    """
    config, state = _read(source)
    stated = config.pop("causal_positions", None)
    if causal_positions is None and stated is None:
        raise UserError(
            f"expected causal_positions with LTX weights of {_name(source)}, which do not say "
            f"where they place frames, got none: {WHICH_VERSION}"
        )
    if None not in (causal_positions, stated) and causal_positions != stated:
        raise UserError(
            f"expected causal_positions {stated}, as {_name(source)} states, got "
            f"{causal_positions}: leave it out or change it ({WHICH_VERSION})"
        )
    causal = stated if causal_positions is None else causal_positions
    return {**_arguments(config), "causal_positions": causal}, state


def load_ltx(model: nn.Module, source: str | Path | nn.Module) -> None:
    """Fill ``model`` with LTX weights, in place; its new parts keep their start. ``source``: see
    `read_ltx`.

    Raises:
        UserError: no such weights, another architecture than the model's, a tensor left over or
            missing, or frames at other positions than the model's ``causal_positions``.
    """
    own: dict[str, Any] = model.config  # type: ignore[assignment]
    arguments, state = read_ltx(source, own["causal_positions"])
    if own["causal_positions"] is None:
        arguments["causal_positions"] = (
            arguments["causal_positions"] or None
        )  # None: as before 0.9.5
    for name, value in arguments.items():
        if own[name] != value and not (name == "out_channels" and value is None):
            raise UserError(
                f"expected LTX weights for {name} {own[name]}, got {value}: "
                f"set {name} of the transformer to {value}, or use other weights than "
                f"{_name(source)}"
            )
    fill_from_ltx(model, state, "change the transformer's configuration")


def _name(source: str | Path | nn.Module) -> str:
    return type(source).__name__ if isinstance(source, nn.Module) else str(source)


def is_ltx(source: str | Path) -> bool:
    """Whether ``source`` holds an LTX transformer: a diffusers folder, or a single file in the
    original format.
    """
    path = Path(source)
    if path.is_file():
        return path.suffix == ".safetensors"
    for config_file in (path / "transformer" / "config.json", path / "config.json"):
        if config_file.is_file():
            return (
                json.loads(config_file.read_text()).get("_class_name")
                == "LTXVideoTransformer3DModel"
            )
    return False


def fill_from_ltx(model: nn.Module, state: dict[str, Tensor], way_out: str) -> None:
    """Load the tensors of :func:`read_ltx`; parameters that LTX has no word for keep their start.

    Raises:
        UserError: a tensor left over, missing or of another shape; ``way_out`` ends its message.
    """
    own = model.state_dict()
    new = {name for name in own if any(part in name for part in NEW_PARTS)}
    problems = {
        "missing": sorted(own.keys() - new - state.keys()),
        "left over": sorted(state.keys() - own.keys()),
        "of another shape": sorted(
            name for name in own.keys() & state.keys() if own[name].shape != state[name].shape
        ),
    }
    for what, names in problems.items():
        if names:
            raise UserError(
                f"expected the tensors of an LTX transformer, got {len(names)} {what}: "
                f"{', '.join(names[:5])}"
                f"{', ...' if len(names) > 5 else ''}; use weights of the same architecture, or "
                f"{way_out}"
            )
    model.load_state_dict({**{name: own[name] for name in new}, **state})


def _arguments(config: dict[str, Any]) -> dict[str, Any]:
    """A2VDiT's arguments from a diffusers configuration; an unknown architecture is an error."""
    only = {
        "patch_size": 1,
        "patch_size_t": 1,
        "activation_fn": "gelu-approximate",
        "qk_norm": "rms_norm_across_heads",
    }
    for name, value in only.items():
        if config.get(name, value) != value:
            raise UserError(
                f"expected an LTX transformer with {name}={value}, got {config[name]}: not covered"
            )
    names = (
        "in_channels",
        "out_channels",
        "num_layers",
        "num_attention_heads",
        "attention_head_dim",
        "caption_channels",
        "attention_bias",
        "attention_out_bias",
        "norm_eps",
        "norm_elementwise_affine",
        "rope_theta",
        "rope_base_frames",
        "rope_base_height",
        "rope_base_width",
    )
    return {name: config[name] for name in names if name in config}


def _read(source: str | Path | nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if isinstance(source, nn.Module):
        config = getattr(source, "config", None)
        if type(source).__name__ != "LTXVideoTransformer3DModel" or config is None:
            raise UserError(
                f"expected an LTXVideoTransformer3DModel, got {type(source).__name__}: pass "
                "diffusers' model"
            )
        return dict(config), source.state_dict()
    path = Path(source)
    if path.is_file():
        return _read_single_file(path)
    if path.is_dir():
        folder = path / "transformer" if (path / "transformer" / "config.json").is_file() else path
        if not (folder / "config.json").is_file():
            raise UserError(
                f"expected a folder with config.json or transformer/config.json, got {path}"
            )
        return _read_pretrained(folder)
    if path.suffix or path.is_absolute() or str(source).count("/") != 1:
        raise UserError(
            "expected LTX weights (a diffusers folder, a single file or a hub id), got no such "
            f"path: {path}; "
            f"{HOW_TO_GET}"
        )
    return _read_pretrained(str(source), subfolder="transformer")


def _read_pretrained(
    source: str | Path, **arguments: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from rest_lightning.torchvision_compat import ensure_torchvision

    ensure_torchvision()
    from diffusers.models.transformers.transformer_ltx import LTXVideoTransformer3DModel

    try:
        model, report = LTXVideoTransformer3DModel.from_pretrained(
            source, output_loading_info=True, **arguments
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"expected LTX weights in diffusers format, got {source}: {reason}"
        ) from error
    for what, key in (
        ("missing", "missing_keys"),
        ("left over", "unexpected_keys"),
        ("wrong", "mismatched_keys"),
    ):
        if report[key]:
            raise UserError(
                f"expected the tensors of an LTX transformer in {source}, got {what}: "
                f"{report[key][0]}"
            )
    return dict(model.config), model.state_dict()


def _read_single_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The original format: diffusers' own conversion of the names, and the sizes from the
    tensors.
    """
    from safetensors import SafetensorError, safe_open

    from rest_lightning.torchvision_compat import ensure_torchvision

    ensure_torchvision()
    from diffusers.loaders.single_file_utils import convert_ltx_transformer_checkpoint_to_diffusers

    try:
        with safe_open(path, framework="pt") as file:
            names, metadata = list(file.keys()), file.metadata() or {}
            prefix = (
                ORIGINAL_PREFIX if any(name.startswith(ORIGINAL_PREFIX) for name in names) else ""
            )
            original = {
                name: file.get_tensor(name)
                for name in names
                if name.startswith(prefix) and "vae" not in name
            }
    except SafetensorError as error:
        raise UserError(f"expected LTX weights as safetensors, got {path}: {error}") from error
    state = convert_ltx_transformer_checkpoint_to_diffusers(original)
    layers = {int(name.split(".")[1]) for name in state if name.startswith("transformer_blocks.")}
    for name in ("proj_in.weight", "proj_out.weight", "caption_projection.linear_1.weight"):
        if name not in state or not layers:
            raise UserError(
                f"expected an LTX transformer in {path}, got no {name}: use LTX-Video's own weights"
            )
    dim, in_channels = state["proj_in.weight"].shape
    # The number of heads leaves no trace in the shapes: newer files say it, all published sizes
    # have 32.
    stated = json.loads(metadata.get("config", "{}")).get("transformer")
    num_heads = (stated or {}).get("num_attention_heads", 32)
    config = {
        "in_channels": in_channels,
        "out_channels": state["proj_out.weight"].shape[0],
        "num_layers": max(layers) + 1,
        "num_attention_heads": num_heads,
        "attention_head_dim": dim // num_heads,
        "caption_channels": state["caption_projection.linear_1.weight"].shape[1],
        "attention_bias": "transformer_blocks.0.attn1.to_q.bias" in state,
        "attention_out_bias": "transformer_blocks.0.attn1.to_out.0.bias" in state,
        "norm_elementwise_affine": "transformer_blocks.0.norm1.weight" in state,
    }
    return {**config, **({} if stated is None else _stated_arguments(stated, path))}, state


def _stated_arguments(stated: dict[str, Any], path: Path) -> dict[str, Any]:
    """What an original file says about its transformer and the tensors do not; see the keys above.

    Raises:
        UserError: a setting that A2VDiT does not cover, or does not know.
    """
    for name, value in FIXED_KEYS.items():
        if stated.get(name, value) != value:
            raise UserError(
                f"expected an LTX transformer with {name} {value} in {path}, got {stated[name]}: "
                "not covered"
            )
    arguments: dict[str, Any] = {"causal_positions": bool(stated.get(CAUSAL_KEY, False))}
    if "norm_eps" in stated:
        arguments["norm_eps"] = stated["norm_eps"]
    if "positional_embedding_theta" in stated:
        arguments["rope_theta"] = stated["positional_embedding_theta"]
    sizes = stated.get("positional_embedding_max_pos", [20, 2048, 2048])
    if len(sizes) != 3:
        raise UserError(
            f"expected 3 numbers as positional_embedding_max_pos in {path}, got {sizes}: not "
            "covered"
        )
    names = ("rope_base_frames", "rope_base_height", "rope_base_width")
    arguments |= dict(zip(names, sizes, strict=True))
    ours = {CAUSAL_KEY, "norm_eps", "positional_embedding_theta", "positional_embedding_max_pos"}
    unknown = sorted(stated.keys() - FIXED_KEYS.keys() - IDLE_KEYS - ours)
    if unknown:
        raise UserError(
            f"expected settings of an LTX transformer 0.9.0 to 0.9.8 in {path}, got {unknown[0]}: "
            "not covered"
        )
    return arguments


# -- the fixed text --------------------------------------------------------------------------------


@torch.no_grad()
def encode_prompt(
    folder: str | Path, text: str = PROMPT, length: int = PROMPT_LENGTH, masked: bool = True
) -> tuple[Tensor, Tensor]:
    """T5's embedding of ``text``, with the tokens' mask inside T5 (REST sec. 4.1).

    Args:
        folder: of an LTX-Video pipeline in diffusers format (``text_encoder/`` and ``tokenizer/``).
        text: the prompt.
        length: tokens with padding; longer texts are refused, not cut.
        masked: False lets tokens attend to the padding too, as diffusers' LTX pipeline does: for
            models that were trained on such an embedding and did not keep it.

    Returns:
        Embeddings ``(length, C)``, float32, and mask ``(length,)``.

    Raises:
        UserError: no such folder, or a text that is too long.
    """
    tokenizer, model = _load_t5(Path(folder).expanduser())
    num_tokens = len(tokenizer(text).input_ids)
    if num_tokens > length:
        raise UserError(
            f"expected a prompt of at most {length} tokens, got {num_tokens}: shorten "
            "it or raise --length"
        )
    tokens = tokenizer(text, padding="max_length", max_length=length, return_tensors="pt")
    mask = tokens.attention_mask
    return model(tokens.input_ids, mask if masked else None)[0][0].float(), mask[0].float()


def _load_t5(folder: Path) -> tuple[Any, Any]:
    from rest_lightning.torchvision_compat import ensure_torchvision

    ensure_torchvision()
    from transformers import AutoTokenizer, T5EncoderModel

    for name in ("text_encoder", "tokenizer"):
        if not (folder / name).is_dir():
            raise UserError(
                f"expected LTX-Video's T5 with {name}/, looked in {folder.resolve()}: "
                f"{HOW_TO_GET_T5}"
            )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        model = T5EncoderModel.from_pretrained(folder / "text_encoder", local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"expected a T5 that transformers can load in {folder.resolve()}: {reason}"
        ) from error
    return tokenizer, model.eval()
