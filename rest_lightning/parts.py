"""The parts of a talking head (VAE, speech encoder, SpeechAE, transformer, detail): how they are
described, built, and read from checkpoints and model folders.

A part is a network whose ``config`` property holds its constructor's arguments. The checkpoint of
a stage carries the configuration of its parts under :data:`PARTS_KEY`, so that it can be read
without the run's config file.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import pickle
import re
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import torch
from torch import nn

from rest_lightning.config import find_class, find_config, network_of, read_config, shipped_names
from rest_lightning.constants import SPATIAL_RATIO
from rest_lightning.errors import UserError
from rest_lightning.media.files import is_trusted
from rest_lightning.model_folder import (
    build_checked,
    read_description,
    read_json,
    read_weights,
    refuse,
)
from rest_lightning.names import import_package, imported_packages

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rest_lightning.diffusion.sampling import Sampling
    from rest_lightning.models.detail import DetailTransfer
    from rest_lightning.models.speech import SpeechEncoder
    from rest_lightning.models.speech_ae import SpeechAE
    from rest_lightning.models.transformer import A2VDiT
    from rest_lightning.models.vae import VideoAutoencoder

# Keys of a stage's checkpoint.
PARTS_KEY = "rest_parts"  # the trained parts: name -> description, see `describe_part`
FROZEN_PARTS_KEY = "rest_frozen_parts"  # the same of frozen parts, whose weights are elsewhere
SAMPLING_KEY = "rest_sampling"  # how the trained model is to be sampled
SIZES_PX = range(SPATIAL_RATIO, 2048 + 1, SPATIAL_RATIO)
PART_NAMES = ("vae", "speech_encoder", "speech_ae", "transformer")
OPTIONAL_PART_NAMES = ("detail",)
PART_CLASSES = {
    "CompactVAE": "rest_lightning.models.vae",
    "LTXVideoVAE": "rest_lightning.models.ltx_vae",
    "LogMelEncoder": "rest_lightning.models.speech",
    "WhisperEncoder": "rest_lightning.models.speech",
    "SpeechAE": "rest_lightning.models.speech_ae",
    "SpeechPooling": "rest_lightning.models.speech_ae",
    "SpeechProjection": "rest_lightning.models.speech_ae",
    "A2VDiT": "rest_lightning.models.transformer",
    "AgreementDetail": "rest_lightning.models.detail",
    "LearnedDetail": "rest_lightning.models.detail",
    "PatchDiscriminator": "rest_lightning.models.discriminator",
}

_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


class TalkingParts(Protocol):
    """What streaming needs of a talking head: its parts, its sampling, its device and its type.

    Attributes:
        vae, speech_encoder, speech_ae, transformer: the parts; the transformer is a student.
        detail: adds the portrait's detail to decoded frames; None where the model has no such part.
        sampling: steps, guidance and shift that the model was trained for.
        size_px: side of the square frames.
    """

    vae: VideoAutoencoder
    speech_encoder: SpeechEncoder
    speech_ae: SpeechAE
    transformer: A2VDiT
    detail: DetailTransfer | None
    sampling: Sampling
    size_px: int

    @property
    def device(self) -> torch.device:
        """Returns the device of the weights."""

    @property
    def dtype(self) -> torch.dtype:
        """Returns the type of the transformer's weights."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Returns an iterator over all weights."""


def describe_part(part: nn.Module) -> dict[str, Any]:
    """Returns the class and the configuration of a part, ready for JSON.

    A class of this package is named as in :data:`PART_CLASSES`, any other by its import path.

    Raises:
        UserError: a class that no other program could import, or one without ``config`` and
            ``from_config``.
    """
    return {"class": _class_name(type(part)), "config": part.config}


def build_part(description: dict[str, Any]) -> nn.Module:
    """Returns the network that :func:`describe_part` described, without its trained weights.

    A class from outside this package must be in a module that is loaded already, or in a package
    that ``rest --import`` names. A model folder or a checkpoint never causes an import by itself.

    Raises:
        UserError: an unknown class.
    """
    return _class_of(description).from_config(description["config"])


def _class_of(description: Mapping[str, Any]) -> Any:
    name = description.get("class")
    if isinstance(name, str) and name in PART_CLASSES:
        return getattr(importlib.import_module(PART_CLASSES[name]), name)
    return _foreign_class(name)


def _class_name(cls: type[nn.Module]) -> str:
    """The name of a part's class in files."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and issubclass(cls, fsdp.FSDPModule):
        # FSDP2 gives a sharded part a new class, derived from the original one.
        cls = cls.__mro__[cls.__mro__.index(fsdp.FSDPModule) + 1]
    module, name = cls.__module__, cls.__qualname__
    if PART_CLASSES.get(name) == module:
        return name
    if module == "__main__" or getattr(sys.modules.get(module), name, None) is not cls:
        raise UserError(
            f"expected a part of a class that other programs can import, got {module}.{name}: move "
            "it to the top level of a module beside your script"
        )
    if not _is_part(cls):
        raise UserError(
            f"expected a part with a property `config` and a class method `from_config`, got "
            f"{module}.{name}: add them (docs/extend.md)"
        )
    return f"{module}.{name}"


def _foreign_class(path: object) -> Any:
    """The class of an import path; imports only packages that the user has named."""
    if not (isinstance(path, str) and len(path) <= 200 and _IMPORT_PATH.fullmatch(path)):
        raise UserError(
            f"expected a part of class {', '.join(PART_CLASSES)}, got {str(path)[:60]!r}: update "
            "rest-lightning"
        )
    module, _, name = path.rpartition(".")
    if module.partition(".")[0] in imported_packages():
        import_package(module)
    cls = getattr(sys.modules.get(module), name, None)
    if not _is_part(cls):
        raise UserError(
            f"expected a part of class {', '.join(PART_CLASSES)}, or of a package that you trust, "
            f"got {path}: put --import {module.partition('.')[0]} before the command's name, as in "
            f"rest --import {module.partition('.')[0]} talk"
        )
    return cls


def _is_part(cls: Any) -> bool:
    return (
        isinstance(cls, type)
        and issubclass(cls, nn.Module)
        and all(hasattr(cls, each) for each in ("config", "from_config"))
    )


def fingerprint_of(part: nn.Module, with_config: bool = False) -> str:
    """Returns the class name and a hash of all weights.

    Caches store it: latents are only valid for exactly the VAE that made them.

    Args:
        part: the network.
        with_config: whether the configuration counts, too. A speech encoder needs that, since the
            same weights with another look-ahead give other features.
    """
    digest = hashlib.sha256()
    if with_config:
        digest.update(json.dumps(part.config, sort_keys=True).encode())
    for key, value in sorted(part.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return f"{type(part).__name__}-{digest.hexdigest()[:16]}"


def load_part(part: nn.Module | None, name: str, source: str | Path) -> None:
    """Loads the weights of the part ``name`` into ``part``.

    Args:
        part: the network; None is an error.
        name: of :data:`PART_NAMES` or :data:`OPTIONAL_PART_NAMES`.
        source: checkpoint of a stage, or a model folder. A transformer may also start from
            LTX-Video's weights (REST sec. 4.1), in a diffusers folder or a single file.

    Raises:
        UserError: a missing file, a source without that part, or weights of another shape.
    """
    if part is None:
        raise UserError(
            f"expected a part of this stage to initialise, got {name!r}: remove it from `initial`"
        )
    if name == "transformer":
        from rest_lightning.models.ltx import is_ltx, load_ltx
        from rest_lightning.models.transformer import A2VDiT

        if isinstance(part, A2VDiT) and is_ltx(source):
            load_ltx(part, source)
            return
    description, state = read_part(name, source)
    own_class = _class_name(type(part))
    if description["class"] != own_class:
        raise UserError(
            f"expected {name} of class {own_class}, got {description['class']} in {source}"
        )
    own = part.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    wrong = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    for problem, keys in (("missing", missing), ("unexpected", extra), ("another shape in", wrong)):
        if keys:
            raise UserError(
                f"expected the weights of this {name}, got {source} with {problem} {keys[0]} "
                f"(and {len(keys) - 1} more): "
                f"use the same {name} configuration as that run"
            )
    part.load_state_dict(state)


def read_part(name: str, source: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Returns the description and the weights of one part.

    Args:
        name: of the part.
        source: checkpoint of a stage (.ckpt), or a model folder.

    Raises:
        UserError: no such file, or one without that part.
    """
    path = Path(source)
    if path.is_dir():
        return _read_folder_part(name, path)
    if not path.is_file():
        way_out = "train that stage first"
        if name == "transformer":
            from rest_lightning.models.ltx import HOW_TO_GET

            way_out += f", or start from LTX-Video's weights: {HOW_TO_GET}"
        raise UserError(
            f"expected a checkpoint or a model folder for {name}, got no such file: {path}; "
            f"{way_out}"
        )
    checkpoint = read_checkpoint(path)
    parts = checkpoint.get(PARTS_KEY, {}) if isinstance(checkpoint, dict) else {}
    if name not in parts:
        raise UserError(
            f"expected a checkpoint that holds {name}, got {path} with "
            f"{sorted(parts) or 'none of ours'}"
        )
    prefix = name + "."
    state = {
        key.removeprefix(prefix): value
        for key, value in checkpoint["state_dict"].items()
        if key.startswith(prefix)
    }
    return parts[name], state


def check_index(path: Path, index: Mapping[str, Any]) -> tuple[int, Sampling]:
    """Returns the frame size in pixels and the sampling of a ``model_index.json``.

    Args:
        path: of the file, for the errors.
        index: its content.

    Raises:
        UserError: a size or a sampling that is missing or out of bounds.
    """
    from rest_lightning.diffusion.sampling import Sampling

    size_px, sampling = index.get("size_px"), index.get("sampling")
    if type(size_px) is not int or size_px not in SIZES_PX:
        refuse(
            path,
            f"size_px from {SIZES_PX[0]} to {SIZES_PX[-1]} in steps of {SPATIAL_RATIO}",
            size_px,
        )
    if not isinstance(sampling, dict):
        refuse(path, "sampling with num_steps, guidance and shift", sampling)
    if not isinstance(index.get("parts", {}), dict):
        refuse(path, "parts with their classes", index["parts"])
    try:
        return size_px, Sampling(**sampling)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except TypeError as error:
        refuse(path, "sampling of num_steps, guidance, shift and reference_guidance", error)


def read_sampling(source: str | Path) -> Sampling | None:
    """Returns the sampling that a stage's checkpoint or a model folder asks for.

    None where the file does not say, as in checkpoints of release 0.1.

    Raises:
        UserError: an unreadable file, or values out of bounds.
    """
    from rest_lightning.diffusion.sampling import Sampling

    path = Path(source)
    if path.is_dir():
        index = path / "model_index.json"
        return check_index(index, read_json(index))[1]
    found = read_checkpoint(path).get(SAMPLING_KEY)
    if found is None:
        return None
    try:
        return Sampling(**found)
    except (UserError, TypeError) as error:
        raise UserError(f"{path}: {error}; give the sampling on the command line") from None


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Returns a stage's checkpoint, which holds tensors and plain values and no pickled code.

    The file is memory-mapped, so that entries which nobody uses (the optimiser's states) are never
    read from disk.

    Raises:
        UserError: no checkpoint, half of one, or a file that holds other objects, which could run
            code when they are read, and is not trusted.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=not is_trusted(), mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"expected a checkpoint of tensors and plain values, got {path} with other objects, "
            "which could run code: train that stage again, take a model folder, or read it with "
            "`rest --trust-checkpoint ...` if you trust who made it"
        ) from error
    except (RuntimeError, EOFError, KeyError) as error:  # not a zip archive, or not a whole one
        raise UserError(
            f"expected a whole checkpoint, got {path}, which is damaged or something else: take "
            "another checkpoint of that run, or train the stage again"
        ) from error
    if not isinstance(found, dict):
        raise UserError(
            f"expected the checkpoint of a stage, got {path} with a {type(found).__name__}: name "
            "a final.ckpt or last.ckpt"
        )
    return found


def _read_folder_part(name: str, folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return read_description(folder / name), read_weights(folder / name)


def open_part(name: str, source: str | Path) -> nn.Module:
    """Returns a part with its weights; arguments and errors as those of :func:`read_part`."""
    description, state = read_part(name, source)
    path = Path(source)
    described = path / name / "config.json" if path.is_dir() else path
    try:
        cls = _class_of(description)
    except UserError as error:
        raise UserError(f"{described}: {error}") from None
    return build_checked(described, partial(cls.from_config, description["config"]), state)


def open_speech_encoder(source: str | Path) -> nn.Module:
    """Returns the speech encoder of a model folder, a stage's configuration or its checkpoint.

    A stage's checkpoint describes its frozen parts but does not hold their weights. The log-mel
    encoder has none; the path of Whisper's weights is in the run's config.yaml.

    Raises:
        UserError: no speech encoder that can be built from the source.
    """
    if not Path(source).exists() and str(source) in shipped_names():
        source = find_config(source)
    source = Path(source)
    if source.suffix in (".yaml", ".yml") and source.is_file():
        found = _described_in(source)
        if found is None:
            raise UserError(f"expected a stage's configuration with a speech_encoder, got {source}")
        find_class(found["class"], "speech_encoder", source)  # a configuration is a program
        return build_part(found)
    if source.is_dir() or not source.is_file():
        return open_part("speech_encoder", source)
    checkpoint = read_checkpoint(source)
    if "speech_encoder" in checkpoint.get(PARTS_KEY, {}):
        return open_part("speech_encoder", source)
    for description in (
        checkpoint.get(FROZEN_PARTS_KEY, {}).get("speech_encoder"),
        _described_by_run(source),
    ):
        if description is not None:
            part = build_part(description)
            if description["config"].get("weights") or not any(True for _ in part.parameters()):
                return part
    raise UserError(
        f"expected a speech encoder described in {source} or in a config.yaml beside it, got none "
        "with weights: "
        "name a model folder with --speech-encoder"
    )


def _described_by_run(checkpoint: Path) -> dict[str, Any] | None:
    return next((found for file in run_configs(checkpoint) if (found := _described_in(file))), None)


def run_configs(checkpoint: Path) -> list[Path]:
    """Returns the config.yaml files of the run that wrote a checkpoint, nearest first."""
    folders = checkpoint.resolve().parents[:4]
    return [folder / "config.yaml" for folder in folders if (folder / "config.yaml").is_file()]


def _described_in(file: Path) -> dict[str, Any] | None:
    found = network_of(read_config(file).content, "speech_encoder")
    if not found:
        return None
    module, _, name = found["class_path"].rpartition(".")
    is_ours = name in PART_CLASSES and module.partition(".")[0] in ("", "rest_lightning")
    return {
        "class": name if is_ours else found["class_path"],
        "config": found.get("init_args") or {},
    }


# -- number types ----------------------------------------------------------------------------------

DtypeName = Literal["auto", "float32", "bfloat16"]


def natural_dtype(capabilities: Mapping[str, Any]) -> str:
    """Returns ``bfloat16`` for a CPU that multiplies it natively, else ``float32``.

    Any other CPU converts bfloat16 for every operation, which costs more time than it saves.

    Args:
        capabilities: of the CPU, as ``torch.cpu.get_capabilities`` names them.
    """
    is_native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return "bfloat16" if is_native else "float32"


def device_named(name: str) -> str:
    """Returns a checked device name; ``auto`` becomes ``cuda`` where there is one, else ``cpu``.

    Raises:
        UserError: an unknown name, or a CUDA device that is not there.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    is_there = name == "cpu" or (
        kind == "cuda"
        and torch.cuda.is_available()
        and (not number or (number.isdecimal() and int(number) < torch.cuda.device_count()))
    )
    if not is_there:
        raise UserError(
            f"expected device auto, cpu or an available cuda, got {name}: try --device cpu"
        )
    return name


def dtype_on(name: str, device: str) -> torch.dtype:
    """Returns the type of that name.

    Args:
        name: of :data:`DtypeName`; ``auto`` takes bfloat16 where the device multiplies it natively.
        device: ``cpu``, ``cuda`` or another type of device.

    Raises:
        UserError: another name.
    """
    if name not in get_args(DtypeName):
        raise UserError(
            f"expected a dtype of {', '.join(get_args(DtypeName))}, got {name!r}: choose one"
        )
    if name == "auto" and device == "cuda":
        name = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    elif name == "auto":
        known = device == "cpu" and hasattr(torch.cpu, "get_capabilities")
        name = natural_dtype(torch.cpu.get_capabilities() if known else {})
    found: torch.dtype = getattr(torch, name)
    return found
