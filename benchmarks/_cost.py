"""What model_cost.py counts with: sizes without weights, FLOPs by counter and by formula, bytes of
fake tensors.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jsonargparse
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from rest_lightning.config import find_class, network_of, read_config, shipped_names
from rest_lightning.constants import SPATIAL_RATIO
from rest_lightning.errors import UserError
from rest_lightning.models import attention
from rest_lightning.models.ltx import PROMPT_LENGTH
from rest_lightning.models.speech import SpeechEncoder
from rest_lightning.models.speech_ae import SpeechAE
from rest_lightning.models.transformer import A2VDiT
from rest_lightning.models.vae import VideoAutoencoder
from rest_lightning.talking_head import TalkingHead

PARTS = {
    "vae": VideoAutoencoder,
    "speech_encoder": SpeechEncoder,
    "speech_ae": SpeechAE,
    "transformer": A2VDiT,
}


@dataclass(frozen=True)
class Size:
    """The parts of one size on the current device, and how they are trained and sampled.

    Attributes:
        parts: the four networks; the transformer is the student.
        teacher: the same transformer with full attention.
        size_px, num_frames, vae_frames: side and frames of a training clip, and of the VAE's
            shorter ones.
        batch_size, vae_batch: clips of one forward.
        accumulate: forwards per optimiser step.
        num_steps, guided: of the sampler.
        trains_encoder: whether the VAE's stage trains its encoder.
        teacher_speech_ae: the SpeechAE through which ASD's teacher hears; None: the student's.
    """

    parts: dict[str, Any]
    teacher: A2VDiT
    size_px: int
    num_frames: int
    vae_frames: int
    batch_size: int
    vae_batch: int
    accumulate: int
    num_steps: int = 8
    guided: bool = True
    trains_encoder: bool = True
    teacher_speech_ae: SpeechAE | None = None

    @property
    def cells(self) -> int:
        """Latent cells on one side."""
        return self.size_px // SPATIAL_RATIO

    @property
    def chunk_length(self) -> int:
        """New latent frames per chunk."""
        return int(self.parts["transformer"].cache_options.chunk_length)


def read_size(name: str) -> Size:
    """Build a size from configs/<name>/student.yaml and vae.yaml, on the current device and without
    any weights.

    Raises:
        UserError: no such configuration files.
    """
    stage, vae = _read_configs(name, "student", "vae")
    parts = _build_parts(stage)
    model: A2VDiT = parts["transformer"]
    data, vae_data = stage["data"], vae["data"]
    return Size(
        parts=parts,
        teacher=A2VDiT.from_config({**model.config, "attention": "full"}),
        size_px=_size_px(stage, model),
        num_frames=data["num_frames"],
        vae_frames=vae_data.get("num_frames_train") or vae_data["num_frames"],
        batch_size=data["batch_size"],
        vae_batch=vae_data["batch_size"],
        accumulate=stage["trainer"].get("accumulate_grad_batches", 1),
        trains_encoder=vae["model"]["init_args"].get("train_encoder", True),
        teacher_speech_ae=type(parts["speech_ae"]).from_config(parts["speech_ae"].config),
    )


def read_student(name: str) -> tuple[dict[str, Any], int]:
    """The four untrained parts of a size on the current device, and the side of its frames in
    pixels.
    """
    (stage,) = _read_configs(name, "student")
    parts = _build_parts(stage)
    return parts, _size_px(stage, parts["transformer"])


def _read_configs(name: str, *stages: str) -> list[dict[str, Any]]:
    known = [each.removesuffix("/student") for each in shipped_names() if each.endswith("/student")]
    if name not in known:
        raise UserError(
            f"expected a size of {', '.join(known)} (folders of configs/), got {name!r}: choose one"
        )
    # Not place_networks: it imports the stage's class, which needs Lightning.
    return [read_config(f"{name}/{stage}").content for stage in stages]


def _size_px(stage: dict[str, Any], model: A2VDiT) -> int:
    return int(
        SPATIAL_RATIO * model.spatial_size[0] if model.spatial_size else stage["data"]["size_px"]
    )


def _build_parts(stage: dict[str, Any]) -> dict[str, Any]:
    given = {part: network_of(stage, part) for part in PARTS}
    for part in given.values():
        find_class(part["class_path"], "class_path", None)  # jsonargparse knows loaded names
        part.get("init_args", {}).pop("weights", None)
    if "Whisper" in given["speech_encoder"]["class_path"]:
        given["speech_encoder"]["init_args"]["weights"] = None
    if given["transformer"]["init_args"].pop("prompt", None):
        given["transformer"]["init_args"]["prompt_length"] = PROMPT_LENGTH
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    for name, base in PARTS.items():
        parser.add_argument(f"--{name}", type=base)
    parts: dict[str, Any] = parser.instantiate(parser.parse_object(given)).as_dict()
    parts["speech_encoder"].requires_grad_(False)
    return parts


def count_flops(call: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and convolutions of ``call`` (a multiply-add
    is two).
    """
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def transformer_flops(
    model: A2VDiT,
    rows: int,
    num_frames: int,
    cells: int,
    windows: list[tuple[int, int]],
    num_speech: int = 0,
    num_text: int = 0,
) -> dict[str, int]:
    """The same for the A2V-DiT, by formula.

    Args:
        windows: (queries, keys) in tokens, for every attention call of one row.
        num_speech: speech tokens per latent frame.
        num_text: text tokens; the model's own prompt, projected once for all rows.

    Returns:
        ``blocks`` (what gradient checkpointing computes again), ``ends`` (input and output
        projections), ``sigma``, ``speech`` and ``text`` (keys and values of the conditions),
        ``inputs`` (the part of the first layers: its share of the backward pass is not needed, for
        nothing before it learns).
    """
    dim, depth, tokens = model.dim, model.num_layers, rows * num_frames * cells
    block = 4 * 2 * tokens * dim**2 + rows * sum(
        4 * queries * keys * dim for queries, keys in windows
    )
    block += 2 * 2 * tokens * dim * 4 * dim
    if model.speech_dim is not None:
        block += 2 * 2 * tokens * dim**2 + 4 * tokens * num_speech * dim
    if model.caption_channels is not None:
        block += 2 * 2 * tokens * dim**2 + 4 * tokens * num_text * dim
    frames, caption = rows * num_frames, model.caption_channels or 0
    proj_in, wave = 2 * tokens * model.in_channels * dim, 2 * frames * 256 * dim
    return {
        "blocks": depth * block,
        "ends": proj_in + 2 * tokens * dim * model.config["out_channels"],
        "sigma": wave + 2 * frames * 7 * dim**2,
        "speech": depth * 2 * 2 * frames * num_speech * (model.speech_dim or 0) * dim,
        "text": 2 * num_text * (caption * dim + dim**2 + depth * 2 * dim**2) if caption else 0,
        "inputs": proj_in + wave + 2 * num_text * caption * dim,
    }


def clip_flops(head: TalkingHead, num_chunks: int) -> int:
    """FLOPs of the backbone when a clip of so many chunks is streamed, guidance included."""
    model, sampling, side = head.transformer, head.sampling, head.size_px // SPATIAL_RATIO
    rows, cells = sampling.branches.num_branches, side * side
    length, num_speech = int(model.cache_options.chunk_length), head.speech_ae.num_tokens
    total = 0
    for i in range(num_chunks):
        window = (length * cells, (1 + (1 + (i > 0)) * length) * cells)
        num_text = num_prompt_tokens(model)
        terms = transformer_flops(model, rows, length, cells, [window], num_speech, num_text)
        total += sampling.num_steps * (terms["blocks"] + terms["ends"])
    return total


def num_prompt_tokens(model: A2VDiT) -> int:
    """Tokens of the model's own text that a stream attends to: those that are no padding."""
    return (
        0 if model.prompt_mask is None else int(model.prompt_mask.sum()) or len(model.prompt_mask)
    )


def training_windows(model: A2VDiT, num_frames: int, cells: int) -> list[tuple[int, int]]:
    """Queries and keys of one row in training: everything at once, or reference, first chunk and
    later chunks.
    """
    if model.attention == "full":
        return [(num_frames * cells, num_frames * cells)]
    chunk = model.cache_options.chunk_length * cells
    later = (num_frames - 1) // model.cache_options.chunk_length - 1
    return [(cells, cells), (chunk, cells + chunk), *[(chunk, cells + 2 * chunk)] * later]


def training_formula(
    model: A2VDiT, rows: int, num_frames: int, cells: int, num_speech: int, num_text: int
) -> int:
    """FLOPs of forward and backward of the transformer alone, with the recomputation of
    checkpointed blocks.
    """
    windows = training_windows(model, num_frames, cells)
    terms = transformer_flops(model, rows, num_frames, cells, windows, num_speech, num_text)
    inputs, forward = terms["inputs"], sum(terms.values()) - terms["inputs"]
    return 3 * forward - inputs + (terms["blocks"] if model.gradient_checkpointing else 0)


def prompt_length(model: A2VDiT) -> int:
    """Tokens of the model's own text."""
    return 0 if model.prompt_embeds is None else model.prompt_embeds.shape[0]


class LiveBytes(TorchDispatchMode):
    """Bytes of everything that is allocated inside and still referenced: ``now`` and ``peak``.

    What exists before (``known``: weights, gradients) does not count, nor do views of it.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._sizes:
            return
        self._sizes[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, storage._cdata)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


@contextmanager
def fake_tensors(*parts: nn.Module) -> Iterator[None]:
    """CPU tensors without values, and ``parts`` turned into such, in place: they allocate what real
    ones would.

    The tables of rotations that all networks share are neither read nor left behind.
    """
    attention._rope_table.cache_clear()
    try:
        with FakeTensorMode():
            for module in {module for part in parts for module in part.modules()}:
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        module._parameters[name] = nn.Parameter(
                            _like(parameter), parameter.requires_grad
                        )
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[name] = _like(buffer)
            yield
    finally:
        attention._rope_table.cache_clear()


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
