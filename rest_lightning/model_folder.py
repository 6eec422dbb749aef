"""Reading a model folder that may be a stranger's: every file is checked before it is used, and
every fault is one line that names the file.

Nothing in a folder runs code: JSON and safetensors alone are read. Bounds: a JSON file has at most
1 MB; a whole number lies in -1 to 65,536 (of layers and blocks: 256), another number in -1e6 to
1e6; lists have at most 1024
entries, frames a side of 32 to 2048 pixels in steps of 32. A network is described before it is
built: its weights must have the shapes that the shards hold, so a folder takes as much memory as
its files are large, and no more. All weights must be finite.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from rest_lightning.errors import UserError

CONFIG_FILE = "config.json"
MAX_SHARD_BYTES = 5_000_000_000  # as Hugging Face's libraries
MAX_JSON_BYTES = 1_000_000
MAX_WHOLE_NUMBER = 65_536
MAX_NUMBER = 1e6
MAX_REPEATS = 256
MAX_ENTRIES, MAX_DEPTH, MAX_TEXT = 1024, 5, 10_000
_POINTER = b"version https://git-lfs"
_SHARD = re.compile(r".+-(\d{5})-of-(\d{5})\.safetensors")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, its numbers and sizes within bounds.

    Raises:
        UserError: no such file, too large, not JSON, no object, a number out of bounds.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        refuse(path, "a JSON file", (error.strerror or str(error)).lower())
    if len(data) > MAX_JSON_BYTES:
        refuse(path, f"at most {MAX_JSON_BYTES // 1_000_000} MB of JSON", "more")
    if data.startswith(_POINTER):
        _refuse_pointer(path)
    try:
        content = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        refuse(path, "JSON", " ".join(str(error).split())[:100])
    if not isinstance(content, dict):
        refuse(path, "a JSON object", type(content).__name__)
    _check_values(path, content, "")
    return content


def read_description(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a part: its ``class`` and the arguments (``config``) to build it.

    Raises:
        UserError: no such file, or one that :func:`read_json` refuses.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UserError(
            f"expected a model folder with {folder.name}/{CONFIG_FILE}, got {folder.parent}: make "
            "one with `rest export`"
        )
    description = read_json(path)
    if not isinstance(description.get("config"), dict):
        raise UserError(
            f"{path}: expected a class and its config, got "
            f"{', '.join(description)[:100] or 'nothing'}: make the folder with `rest export`"
        )
    return description


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors shards, floating ones as float32.

    Raises:
        UserError: a shard that is missing, damaged or a git-lfs pointer, or numbers that are not
            finite.
    """
    shards = sorted(folder.glob("*.safetensors"))
    _check_complete(folder, shards)
    weights: dict[str, Tensor] = {}
    for shard in shards:
        weights.update(read_shard(shard))
    return weights


def read_shard(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file; see :func:`read_weights`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with path.open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                _refuse_pointer(path)
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, MemoryError) as error:
        if isinstance(error, UserError):
            raise
        refuse(path, "whole safetensors weights", _one_line(error))
    for name, value in tensors.items():
        if not value.is_floating_point():
            continue
        tensors[name] = value = value.float()
        if not math.isfinite(float(value.sum(dtype=torch.float64))):
            raise UserError(
                f"{path}: expected finite weights, got NaN or infinity in {name}: the training "
                "diverged or the file is damaged; take another checkpoint"
            )
    return tensors


def build_checked(
    path: Path, build: Callable[[], nn.Module], weights: Mapping[str, Tensor]
) -> nn.Module:
    """The network that ``build`` makes, filled with ``weights``.

    It is built without memory first, and only made when the shapes are those of the weights.

    Args:
        path: of its description, for messages.
        build: makes it, from the description.
        weights: by name.

    Raises:
        UserError: a description that nothing can be built from, or weights that do not fit.
    """
    try:
        with torch.device("meta"):
            shapes = {name: value.shape for name, value in build().state_dict().items()}
    except Exception as error:  # constructors raise all kinds of errors on values they do not know
        refuse(path, "a description that a network can be built from", _one_line(error))
    missing, extra = sorted(shapes.keys() - weights.keys()), sorted(weights.keys() - shapes.keys())
    wrong = sorted(n for n in shapes.keys() & weights.keys() if shapes[n] != weights[n].shape)
    for problem, names in (("no", missing), ("an unknown", extra), ("another shape of", wrong)):
        if names:
            raise UserError(
                f"{path}: expected the weights of this network beside it, got {problem} {names[0]} "
                f"(and {len(names) - 1} more): fetch all files of one model again"
            )
    try:
        part = build()
        part.load_state_dict(dict(weights))
    except Exception as error:  # as above
        refuse(path, "a description that a network can be built from", _one_line(error))
    return part


def write_part(
    folder: Path,
    description: Mapping[str, Any],
    state: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes what :func:`read_description` and :func:`read_weights` read: ``config.json``, and
    ``model.safetensors`` or shards with the index of them that Hugging Face's libraries read.

    Args:
        folder: of the part; made here.
        description: class and config of the part.
        state: its weights by name. Statistics of latents stay float32.
        dtype: of the stored weights.
        max_shard_bytes: of the tensors of one file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n")
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for key, value in state.items():
        keep = not value.is_floating_point() or key in ("latents_mean", "latents_std")
        value = (value if keep else value.to(dtype)).contiguous().cpu()
        num_bytes = value.numel() * value.element_size()
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = value
        size += num_bytes
        total += num_bytes
    if not shards[0]:  # a part without weights
        return
    metadata = {"format": "pt"}
    if len(shards) == 1:
        _save(shards[0], folder / "model.safetensors", metadata)
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        _save(shard, folder / name, metadata)
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _save(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    save_file(dict(tensors), path, metadata)
    # safetensors lets nobody else read it; a server often runs as another user.
    path.chmod(stat.S_IMODE((path.parent / CONFIG_FILE).stat().st_mode))


def _check_values(path: Path, value: Any, name: str, depth: int = 0) -> None:
    what = name or "the file"
    if depth > MAX_DEPTH:
        refuse(path, f"at most {MAX_DEPTH} levels", f"more in {what}")
    if isinstance(value, dict | list) and len(value) > MAX_ENTRIES:
        refuse(path, f"at most {MAX_ENTRIES} entries in {what}", len(value))
    if isinstance(value, dict):
        for key, item in value.items():
            _check_values(path, item, str(key)[:60], depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_values(path, item, name, depth + 1)
    elif isinstance(value, str) and len(value) > MAX_TEXT:
        refuse(path, f"at most {MAX_TEXT} characters in {what}", len(value))
    elif type(value) is int:
        most = MAX_REPEATS if "layers" in name or "blocks" in name else MAX_WHOLE_NUMBER
        if not -1 <= value <= most:
            refuse(path, f"{what} from -1 to {most}", value)
    elif isinstance(value, float) and not abs(value) <= MAX_NUMBER:  # NaN too
        refuse(path, f"{what} from -{MAX_NUMBER:g} to {MAX_NUMBER:g}", value)


def _check_complete(folder: Path, shards: list[Path]) -> None:
    numbered = [match for shard in shards if (match := _SHARD.fullmatch(shard.name))]
    for match in numbered:
        present = {other[1] for other in numbered if other[2] == match[2]}
        total = int(match[2])
        if len(present) < total:
            missing = next(k for k in range(1, total + 1) if f"{k:05d}" not in present)
            raise UserError(
                f"{folder}: expected {total} shards of weights, got {len(present)} (number "
                f"{missing} is missing): fetch the whole folder again"
            )


def _refuse_pointer(path: Path) -> NoReturn:
    raise UserError(
        f"{path}: expected the file itself, got a pointer of git-lfs: run `git lfs pull` in its "
        "folder"
    )


def refuse(path: Path, expected: str, came: object) -> NoReturn:
    """Raises a UserError about a file of a model folder."""
    raise UserError(
        f"{path}: expected {expected}, got {_short(came)}: fetch the model again, or make it with "
        "`rest export`"
    )


def _short(value: object) -> str:
    try:
        text = " ".join(str(value).split())
    except ValueError:  # Python refuses to write numbers of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 160 else f"{text[:157]}..."


def _one_line(error: BaseException) -> str:
    return _short(error) or type(error).__name__
