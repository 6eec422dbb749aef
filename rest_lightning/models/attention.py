"""Rotary positions, and the contexts in which the A2V-DiT's self-attention runs.

A block hands its queries, keys and values, normalised but not yet rotated, to a *context*; the contexts are

- `FullContext`: every token sees every token (the teacher),
- `ChunkedContext`: all chunks at once, each inside its own window (the student in training),
- `rest_lightning.models.cache.IDContextCache`: one chunk against cached keys and values (the student when it streams).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from rest_lightning.models.cache import IDContextCache
    from rest_lightning.models.cache_options import CacheOptions

KeyValue = tuple[Tensor, Tensor]
_MOST_SCORES = 2**20  # of a head that are held at once


@dataclass(frozen=True)
class Rope:
    """3-D rotary embedding over the whole width, before the split into heads (LTX).

    Positions are seconds and pixels divided by the base sizes: a latent frame lasts ``frame_s`` seconds (8 / fps) and a
    latent cell spans ``cell_px`` pixels.
    """

    dim: int
    frame_s: float = 8 / 25
    cell_px: float = 32.0
    base_frames: float = 20.0
    base_height: float = 2048.0
    base_width: float = 2048.0
    theta: float = 10000.0

    def table(self, first: int, num_frames: int, height: int, width: int, device: torch.device) -> Tensor:
        """Unit complex numbers ``(num_frames * height * width, dim / 2)`` of frames ``first, first + 1, ...``."""
        return _rope_table(self, first, num_frames, height, width, device)


@functools.lru_cache(maxsize=64)
def _rope_table(rope: Rope, first: int, num_frames: int, height: int, width: int, device: torch.device) -> Tensor:
    # Inference tensors cannot be saved for a later backward pass, and a table may first be wanted in inference mode.
    with torch.inference_mode(False), torch.no_grad():
        # float32 in LTX's own order of operations: phases reach 16,000 rad, where another order differs by 1e-3.
        def axis(start: int, length: int, scale: float, base: float) -> Tensor:
            return torch.arange(start, start + length, dtype=torch.float32, device=device) * scale / base

        frames = axis(first, num_frames, rope.frame_s, rope.base_frames)
        rows = axis(0, height, rope.cell_px, rope.base_height)
        columns = axis(0, width, rope.cell_px, rope.base_width)
        grid = torch.stack(torch.meshgrid(frames, rows, columns, indexing="ij"), -1).flatten(0, 2)
        exponents = torch.linspace(0.0, 1.0, rope.dim // 6, dtype=torch.float32, device=device)
        frequencies = rope.theta**exponents * math.pi / 2.0
        phases = (frequencies * (grid.unsqueeze(-1) * 2 - 1)).transpose(-1, -2).flatten(1)
        padding = phases.new_zeros(phases.shape[0], rope.dim % 6 // 2)  # channels beyond a multiple of 6 do not turn
        phases = torch.cat([padding, phases], dim=-1)
        return torch.complex(phases.cos(), phases.sin())


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn neighbouring channel pairs of ``x (..., T, D)`` by ``table (..., T, D / 2)``, in float32 or better."""
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    if torch.compiler.is_compiling():  # the compiler has no complex arithmetic
        real, imag = wide.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = table.real, table.imag
        turned = torch.stack([real * cos - imag * sin, real * sin + imag * cos], dim=-1)
    else:  # one operation instead of six
        turned = torch.view_as_real(torch.view_as_complex(wide.unflatten(-1, (-1, 2))) * table)
    return turned.flatten(-2).to(x.dtype)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """``(..., T, D) -> (..., heads, T, D / heads)``, a view."""
    return x.unflatten(-1, (num_heads, -1)).transpose(-3, -2)


def join_heads(x: Tensor) -> Tensor:
    """``(..., heads, T, D / heads) -> (..., T, D)``, the inverse of `split_heads`."""
    return x.transpose(-3, -2).flatten(-2)


def attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int, mask: Tensor | None = None) -> Tensor:
    """Attention of ``(B, Tq, D)`` over ``(B, Tk, D)``; the result has the shape of ``q``."""
    q, k, v = (split_heads(x.to(v.dtype), num_heads) for x in (q, k, v))
    return attend_heads(q, k, v, mask)


def attend_heads(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The same of ``(B, heads, Tq, D / heads)`` over ``(B, heads, Tk, D / heads)``; autocast changes no type here."""
    if q.device.type != "cpu":
        return join_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    if q.dtype == torch.bfloat16 and q.shape[-2] * k.shape[-2] <= _MOST_SCORES:
        return join_heads(_by_products(q, k, v, mask))
    # Asked first, since entering takes longer than asking: a stream attends a hundred times a chunk.
    plain = torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()
    with plain:
        return join_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def _by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention as two products in bfloat16 and a softmax in float32.

    On a CPU PyTorch's own kernel takes as long for a chunk of one stream, up to twice as long for those of several, and
    up to six times as long backwards.
    """
    queries, keys, values = (x.flatten(0, 1) for x in (q, k, v))
    nothing = queries.new_empty(1, 1, 1)  # what the product would be added to
    scores = torch.baddbmm(nothing, queries, keys.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5)
    if mask is not None:
        scores = (scores.unflatten(0, q.shape[:2]) + mask).flatten(0, 1)
    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    return torch.bmm(weights, values).unflatten(0, q.shape[:2])


class AttentionContext(Protocol):
    """Where queries find their keys: rotates, widens the window if need be, and attends."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor | list[Tensor]:
        """``q, k, v (B, f * n, D)`` of block ``layer`` -> ``(B, f * n, D)``, or its pieces in order of their tokens."""


class FullContext:
    """Every token sees every token (teacher, REST sec. 3.3). ``table``: rotations of all tokens."""

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
        return attend(rotate(q, self.table), rotate(k, self.table), v, num_heads)


class SinkContext:
    """The reference alone: it sees itself, and its keys and values become the sink of some rows."""

    def __init__(self, cache: IDContextCache, rows: Sequence[int] | None, table: Tensor) -> None:
        self.cache, self.rows, self.table = cache, rows, table

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
        k = rotate(k, self.table)
        self.cache.write_sink(layer, k, v, self.rows)
        return attend(rotate(q, self.table), k, v, num_heads)


class ChunkedContext:
    """All chunks in parallel, chunk i over [reference | chunk i-1 | chunk i] (REST sec. 3.4), without any mask.

    The windows are gathered instead of masked: the queries of chunks 2..K form one batch of windows of equal length,
    and chunk 1, which has no predecessor, is attended to on its own. With ``window`` positions a key is rotated once
    per slot in which it appears.

    With ``two_streams`` the batch holds ``[noisy; context]``: the second half feeds the cache of both halves.
    """

    def __init__(
        self, options: CacheOptions, rope: Rope, size: tuple[int, int, int], device: torch.device, two_streams: bool
    ) -> None:
        num_frames, height, width = size
        length = options.chunk_length
        self.options = options
        self.two_streams = two_streams
        self.num_reference = height * width
        self.num_chunk = length * height * width
        self.num_chunks = (num_frames - 1) // length
        slots = rope.table(0, options.num_slots, height, width, device)
        reference, previous, current = slots.split([self.num_reference, self.num_chunk, self.num_chunk])
        if options.positions == "absolute":
            table = rope.table(0, num_frames, height, width, device)
            self.start_table, later = table.tensor_split([self.num_reference + self.num_chunk])
            self.later_table = later.unflatten(0, (self.num_chunks - 1, self.num_chunk))
            self.previous_table = table[self.num_reference : -self.num_chunk].view_as(self.later_table)
        else:
            first = previous if options.first_chunk_slot == "adjacent" else current
            self.start_table = torch.cat([reference, first])
            self.later_table, self.previous_table = current, previous

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> list[Tensor]:
        n, chunk, num_later = self.num_reference, self.num_chunk, self.num_chunks - 1
        # Split, not indexed: a single concatenation takes the gradients of the pieces back.
        (q_start, q_later), (k_start, k_later), (v_start, v_later) = (
            x.split([n + chunk, num_later * chunk], 1) for x in (q, k, v)
        )
        q_start, k_start = rotate(q_start, self.start_table), rotate(k_start, self.start_table)
        v_start = v_start.clone()  # the graph keeps it: a view would keep the values of all chunks
        if self.options.reference_attends == "self":
            q_ref, q_first = q_start.split([n, chunk], 1)
            out = [
                attend(q_ref, k_start[:, :n], v_start[:, :n], num_heads),
                attend(q_first, self._first_window(k_start), self._first_window(v_start), num_heads),
            ]
        else:
            out = [attend(q_start, k_start, v_start, num_heads)]
        if num_later:
            q_later, k_later, v_later = (x.unflatten(1, (num_later, chunk)) for x in (q_later, k_later, v_later))
            k_previous, v_previous = (x[:, n:-chunk].unflatten(1, (num_later, chunk)) for x in (k, v))
            if self.options.use_context:
                k_previous = rotate(k_previous, self.previous_table)
            keys = self._windows(k_start[:, :n], k_previous, rotate(k_later, self.later_table))
            values = self._windows(v_start[:, :n], v_previous, v_later)
            later = attend(rotate(q_later, self.later_table).flatten(0, 1), keys, values, num_heads)
            out.append(later.unflatten(0, (-1, num_later)).flatten(1, 2))
        return out

    def _first_window(self, start: Tensor) -> Tensor:
        """What the first chunk reads: keys or values ``(B, (1 + l) * n, D)`` of the reference and of itself."""
        if not self.two_streams and self.options.cache_gradient == "full":
            return start
        return torch.cat([self._cached(start[:, : self.num_reference]), start[:, self.num_reference :]], 1)

    def _windows(self, reference: Tensor, previous: Tensor, current: Tensor) -> Tensor:
        """What chunks 2 to K read, each its window of keys or values: ``(B * (K - 1), tokens, D)``."""
        pieces = [current]
        if self.options.use_context:
            pieces.insert(0, self._cached(previous))
        if self.options.use_sink:
            pieces.insert(0, self._cached(reference).unsqueeze(1).expand(-1, current.shape[1], -1, -1))
        return torch.cat(pieces, 2).flatten(0, 1)

    def _cached(self, x: Tensor) -> Tensor:
        """What a later chunk reads of ``x``: the context stream, cut from the graph if the gradient is detached."""
        if self.two_streams:
            context = x[x.shape[0] // 2 :]
            x = torch.cat([context, context])
        return x.detach() if self.options.cache_gradient == "detached" else x
