"""How the engine runs a chunk: graphs, compilation, packed weights, overlap, warm-up, first chunk."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from rest_lightning.constants import SPATIAL_RATIO
from rest_lightning.errors import UserError
from rest_lightning.models.packed import can_pack

if TYPE_CHECKING:
    from rest_lightning.talking_head import SamplingSettings, TalkingHead

GRAPHS_VARIABLE = "REST_CUDA_GRAPHS"
ATTENTION: dict[str, SDPBackend | None] = {
    "auto": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class EngineOptions:
    """Switches of the engine. All but ``float8`` and ``first_chunk_length`` change speed and memory alone.

    Attributes:
        graphs: capture the denoising steps and the decoding as CUDA graphs. None: on CUDA; ``REST_CUDA_GRAPHS=0`` in
            the environment turns them off whatever stands here.
        compile: ``torch.compile`` the transformer's blocks, once for all of them, in a copy that shares the weights.
            Costs up to a minute at the first chunk.
        pack: lay the weights out once for the CPU's kernels, instead of at every call. None: on the CPU, where torch
            can. Packed weights lie beside the others, once for all sessions of a model. Not with ``compile``.
        fuse: run the transformer and an LTX decoder on the Triton kernels of :mod:`rest_lightning.models.fused`; needs
            CUDA and Triton. Joined and re-ordered weights lie beside the others, once for all sessions of a model. Off
            until a GPU has measured it. Not with ``compile`` or ``pack``.
        float8: with ``fuse`` and a bfloat16 model, multiply self-attention's projections and the feed-forward layers in
            float8, with a factor for every row. The one switch here that costs accuracy; needs compute capability 8.9.
        attention: the back end of ``scaled_dot_product_attention`` on CUDA that is tried first, ``flash``, ``cudnn``,
            ``efficient`` or ``math``; the others follow where it cannot. ``auto``: torch's own order.
        overlap: on CUDA decode a chunk, and copy it to the host, while the next one is denoised.
        warm_up: run dummy chunks when a session opens, so that the first real one is as fast as the others (and every
            graph is captured); frames are the same, bit for bit. None: where graphs are captured.
        first_chunk_length: latents of a stream's first chunk, 1 to chunk_length: a short one needs less speech before
            the first frame. None takes chunk_length.
        reuse: keep the engine of a session that is closed for the next one that is opened alike, at most two a model:
            its graphs need not be captured again, and its memory stays taken. None: where graphs are captured.
    """

    graphs: bool | None = None
    compile: bool = False
    pack: bool | None = None
    fuse: bool = False
    float8: bool = False
    attention: Literal["auto", "flash", "cudnn", "efficient", "math"] = "auto"
    overlap: bool = True
    warm_up: bool | None = None
    first_chunk_length: int | None = None
    reuse: bool | None = None

    def captures(self, device: torch.device) -> bool:
        """Whether graphs are captured on ``device``.

        Raises:
            UserError: graphs asked for without CUDA, or a value of the variable other than 0 and 1.
        """
        variable = os.environ.get(GRAPHS_VARIABLE, "1")
        if variable not in ("0", "1"):
            raise UserError(f"expected {GRAPHS_VARIABLE}=0 or 1, got {variable!r}: 0 turns CUDA graphs off")
        if self.graphs and device.type != "cuda":
            raise UserError(f"expected a model on a CUDA device for graphs, got {device}: leave graphs at None")
        return device.type == "cuda" and variable == "1" and self.graphs is not False

    def packs(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether a model of that type on ``device`` streams with packed weights.

        Raises:
            UserError: asked for where torch has no such kernels, or together with ``compile``.
        """
        possible = can_pack(device, dtype) and not self.compile and not self.fuse
        if self.pack and not possible:
            raise UserError(
                f"expected an uncompiled float32 or bfloat16 model on a CPU with oneDNN for pack, got {dtype} on "
                f"{device}{' with compile' if self.compile else ''}: leave pack at None"
            )
        return possible and self.pack is not False

    def fuses(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether a model of that type on ``device`` streams on fused kernels.

        Raises:
            UserError: asked for where they do not run, together with other forms of the weights, or float8 without it.
        """
        if self.float8 and not (self.fuse and dtype == torch.bfloat16):
            given = "a model of that type" if self.fuse else "fuse=False"
            raise UserError(f"expected fuse=True and a bfloat16 model for float8, got {given} ({dtype}): set both")
        if not self.fuse:
            return False
        if self.compile or self.pack:
            raise UserError("expected fuse without compile and pack, got both: leave the others out")
        if importlib.util.find_spec("triton") is None:
            raise UserError("expected Triton for fuse, got none: pip install triton, or leave fuse out")
        from rest_lightning.models.fused import can_fuse

        if not can_fuse(device):
            raise UserError(f"expected a model on a CUDA device for fuse, got {device}: leave fuse out")
        return True

    def attention_order(self, device: torch.device) -> AbstractContextManager[None]:
        """The context in which attention runs: see the attribute.

        Raises:
            UserError: a name that is none.
        """
        if self.attention not in ATTENTION:
            raise UserError(f"expected attention to be one of {', '.join(ATTENTION)}, got {self.attention!r}")
        first = ATTENTION[self.attention]
        if first is None or device.type != "cuda":
            return nullcontext()
        others = [kind for kind in ATTENTION.values() if kind not in (None, first)]
        return sdpa_kernel([first, *others], set_priority=True)

    def warms_up(self, device: torch.device) -> bool:
        """Whether a session on ``device`` runs dummy chunks when it opens."""
        return self.captures(device) if self.warm_up is None else self.warm_up

    def reuses(self, device: torch.device) -> bool:
        """Whether closed sessions on ``device`` leave their engines to later ones."""
        return self.captures(device) if self.reuse is None else self.reuse

    def first_length(self, chunk_length: int) -> int:
        """Latents of the first chunk.

        Raises:
            UserError: none, or more than the other chunks have.
        """
        length = chunk_length if self.first_chunk_length is None else self.first_chunk_length
        if not 1 <= length <= chunk_length:
            raise UserError(f"expected a first_chunk_length from 1 to {chunk_length} latents, got {length}")
        return length


@contextmanager
def explain_out_of_memory(model: TalkingHead, batch: int, sampling: SamplingSettings) -> Iterator[None]:
    """Turns a device's (or the CPU allocator's) out-of-memory error into one line.

    Raises:
        UserError: what was needed, and which settings lower it.
    """
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        branches = sampling.branches.num_branches
        weights_gb = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
        cache_gb = cache_num_bytes(model, batch * branches, sampling.num_steps) / 1e9
        raise UserError(
            f"expected memory on {model.device} for {batch} stream(s) of {model.size_px}x{model.size_px} pixels: "
            f"{weights_gb:.2f} GB of weights, {cache_gb:.2f} GB of cache, and frames beside, got out of memory: lower "
            f"the number of streams or size_px, load the model with dtype bfloat16, or set guidance to 1 (the cache "
            f"then has 1 instead of {branches} rows a stream)"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that caused it, says that a device or the CPU's allocator had no memory left."""
    words = ("DefaultCPUAllocator", "CUDA out of memory", "Storage size calculation overflowed")
    seen: BaseException | None = error
    while seen is not None:  # ending a capture that ran out of memory raises an error of its own on top
        if isinstance(seen, torch.OutOfMemoryError) or any(word in str(seen) for word in words):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def cache_num_bytes(model: TalkingHead, rows: int, num_steps: int) -> int:
    """Bytes of the keys and values of ``rows`` rows: what an ID-Context Cache of this model holds."""
    transformer, options = model.transformer, model.transformer.cache_options
    side = model.size_px // SPATIAL_RATIO
    slots = 1 + options.chunk_length * (2 if options.use_context else 1)
    kept = num_steps if options.cache_noise == "per_step" else 1
    size = model.dtype.itemsize
    return 2 * kept * transformer.num_layers * rows * slots * side * side * transformer.dim * size
