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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from rest_lightning.models.cache import IDContextCache
    from rest_lightning.models.cache_options import CacheOptions

KeyValue = tuple[Tensor, Tensor]


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
    """``(B, T, D) -> (B, heads, T, D / heads)``, a view."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int, mask: Tensor | None = None) -> Tensor:
    """Attention of ``(B, Tq, D)`` over ``(B, Tk, D)``; the result has the shape of ``q``."""
    q, k, v = (split_heads(x, num_heads) for x in (q.to(v.dtype), k.to(v.dtype), v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class AttentionContext(Protocol):
    """Where queries find their keys: rotates, widens the window if need be, and attends."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
        """``q, k, v (B, f * n, D)`` of block ``layer`` -> ``(B, f * n, D)``."""


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
        self.reference_table, self.previous_table, self.current_table = slots.split(
            [self.num_reference, self.num_chunk, self.num_chunk]
        )
        adjacent = options.first_chunk_slot == "adjacent"
        self.first_table = self.previous_table if adjacent else self.current_table
        if options.positions == "absolute":
            table = rope.table(0, num_frames, height, width, device)[self.num_reference :]
            self.absolute_table = table.unflatten(0, (self.num_chunks, self.num_chunk))

    def _cached(self, x: Tensor) -> Tensor:
        """What a later chunk reads of ``x``: the context stream, cut from the graph if the gradient is detached."""
        if self.two_streams:
            context = x[x.shape[0] // 2 :]
            x = torch.cat([context, context])
        return x.detach() if self.options.cache_gradient == "detached" else x

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
        options, n = self.options, self.num_reference
        q_ref, k_ref, v_ref = rotate(q[:, :n], self.reference_table), rotate(k[:, :n], self.reference_table), v[:, :n]
        q, k, v = (x[:, n:].unflatten(1, (self.num_chunks, self.num_chunk)) for x in (q, k, v))
        if options.positions == "absolute":
            q, k = rotate(q, self.absolute_table), rotate(k, self.absolute_table)
            q_first, k_first, q_later, k_later, k_previous = q[:, 0], k[:, 0], q[:, 1:], k[:, 1:], k[:, :-1]
        else:
            q_first, k_first = rotate(q[:, 0], self.first_table), rotate(k[:, 0], self.first_table)
            q_later, k_later = rotate(q[:, 1:], self.current_table), rotate(k[:, 1:], self.current_table)
            k_previous = rotate(k[:, :-1], self.previous_table) if options.use_context else k[:, :-1]
        v_first, v_later, v_previous = v[:, 0], v[:, 1:], v[:, :-1]

        k_sink, v_sink = self._cached(k_ref), self._cached(v_ref)
        if options.reference_attends == "self":
            out = [
                attend(q_ref, k_ref, v_ref, num_heads),
                attend(q_first, torch.cat([k_sink, k_first], 1), torch.cat([v_sink, v_first], 1), num_heads),
            ]
        else:
            joined = [torch.cat(pair, 1) for pair in ((q_ref, q_first), (k_ref, k_first), (v_ref, v_first))]
            out = [attend(joined[0], joined[1], joined[2], num_heads)]

        if self.num_chunks > 1:
            keys, values = [k_later], [v_later]
            if options.use_context:
                keys.insert(0, self._cached(k_previous))
                values.insert(0, self._cached(v_previous))
            if options.use_sink:
                keys.insert(0, k_sink.unsqueeze(1).expand(-1, self.num_chunks - 1, -1, -1))
                values.insert(0, v_sink.unsqueeze(1).expand(-1, self.num_chunks - 1, -1, -1))
            windows = torch.cat(keys, 2).flatten(0, 1), torch.cat(values, 2).flatten(0, 1)
            later = attend(q_later.flatten(0, 1), *windows, num_heads)
            out.append(later.unflatten(0, (-1, self.num_chunks - 1)).flatten(1, 2))
        return torch.cat(out, 1)
