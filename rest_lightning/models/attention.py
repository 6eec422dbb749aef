"""Rotary positions, and the contexts in which the A2V-DiT's self-attention runs.

A block hands its queries, keys and values, normalised but not yet rotated, to a *context*; the
contexts are

- `FullContext`: every token sees every token (the teacher),
- `ChunkedContext`: all chunks at once, each inside its own window (the student in training),
- `rest_lightning.models.cache.IDContextCache`: one chunk against cached keys and values (the
  student when it streams).
"""

from __future__ import annotations

import functools
import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

KeyValue = tuple[Tensor, Tensor]
_MOST_SCORES = 2**20  # of a head that are held at once


@dataclass(frozen=True)
class Rope:
    """3-D rotary embedding over the whole width, before the split into heads (LTX).

    Positions are seconds and pixels divided by the base sizes: a latent frame lasts ``frame_s``
    seconds (8 / fps) and a latent cell spans ``cell_px`` pixels. Latent frame i lies at
    ``i * frame_s`` (LTX-Video 0.9.0 and 0.9.1).

    Attributes:
        causal_ratio: r pixel frames per latent frame: latent frame i lies at its first pixel frame,
            ``max(0, r * i + 1 - r) * frame_s / r`` (LTX-Video 0.9.5 and later); None: as above.
        exact: phases in float64. LTX computes them in float32, which is what its weights have seen;
            far from the start of a stream that is too coarse.
    """

    dim: int
    frame_s: float = 8 / 25
    cell_px: float = 32.0
    base_frames: float = 20.0
    base_height: float = 2048.0
    base_width: float = 2048.0
    theta: float = 10000.0
    causal_ratio: int | None = None
    exact: bool = False

    def table(
        self, first: int, num_frames: int, height: int, width: int, device: torch.device
    ) -> Tensor:
        """Unit complex numbers ``(num_frames * height * width, dim / 2)`` of frames ``first, first
        + 1, ...``.
        """
        return _rope_table(self, first, num_frames, height, width, device)


@functools.lru_cache(maxsize=64)
def _rope_table(
    rope: Rope, first: int, num_frames: int, height: int, width: int, device: torch.device
) -> Tensor:
    # Inference tensors cannot be saved for a later backward pass, and a table may first be wanted
    # in inference mode.
    with torch.inference_mode(False), torch.no_grad():
        # In float32 by LTX's own order of operations: phases reach 16,000 rad, where another order
        # differs by 1e-3.
        dtype = torch.float64 if rope.exact else torch.float32

        def axis(start: int, length: int, scale: float, base: float) -> Tensor:
            return torch.arange(start, start + length, dtype=dtype, device=device) * scale / base

        if rope.causal_ratio is None:
            frames = axis(first, num_frames, rope.frame_s, rope.base_frames)
        else:
            ratio = rope.causal_ratio
            index = torch.arange(first, first + num_frames, dtype=dtype, device=device)
            pixel_frame = (ratio * index + 1 - ratio).clamp(min=0)
            frames = pixel_frame * (rope.frame_s / ratio) / rope.base_frames
        rows = axis(0, height, rope.cell_px, rope.base_height)
        columns = axis(0, width, rope.cell_px, rope.base_width)
        grid = torch.stack(torch.meshgrid(frames, rows, columns, indexing="ij"), -1).flatten(0, 2)
        exponents = torch.linspace(0.0, 1.0, rope.dim // 6, dtype=dtype, device=device)
        frequencies = rope.theta**exponents * math.pi / 2.0
        phases = (frequencies * (grid.unsqueeze(-1) * 2 - 1)).transpose(-1, -2).flatten(1)
        # channels beyond a multiple of 6 do not turn
        padding = phases.new_zeros(phases.shape[0], rope.dim % 6 // 2)
        phases = torch.cat([padding, phases], dim=-1)
        return torch.complex(phases.cos().float(), phases.sin().float())


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotates neighbouring channel pairs of ``x (..., T, D)`` by ``table (..., T, D / 2)``.

    Computes in float32 or better.
    """
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    if torch.compiler.is_compiling():  # the compiler has no complex arithmetic
        real, imag = wide.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = table.real, table.imag
        turned = torch.stack([real * cos - imag * sin, real * sin + imag * cos], dim=-1)
    else:  # one operation instead of six
        turned = torch.view_as_real(torch.view_as_complex(wide.unflatten(-1, (-1, 2))) * table)
    return turned.flatten(-2).to(x.dtype)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Returns ``(..., T, D)`` as a view ``(..., heads, T, D / heads)``."""
    return x.unflatten(-1, (num_heads, -1)).transpose(-3, -2)


def join_heads(x: Tensor) -> Tensor:
    """Returns ``(..., heads, T, D / heads)`` as ``(..., T, D)``, the inverse of `split_heads`."""
    return x.transpose(-3, -2).flatten(-2)


def attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int, mask: Tensor | None = None) -> Tensor:
    """Attention of ``(B, Tq, D)`` over ``(B, Tk, D)``; the result has the shape of ``q``."""
    q, k, v = (split_heads(x.to(v.dtype), num_heads) for x in (q, k, v))
    return attend_heads(q, k, v, mask)


def attend_heads(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The same of ``(B, heads, Tq, D / heads)`` over ``(B, heads, Tk, D / heads)``; autocast
    changes no type here.
    """
    if q.device.type != "cpu":
        return join_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    if q.dtype == torch.bfloat16 and q.shape[-2] * k.shape[-2] <= _MOST_SCORES:
        return join_heads(_by_products(q, k, v, mask))
    # Asked first, since entering takes longer than asking: a stream attends a hundred times a
    # chunk.
    plain = (
        torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()
    )
    with plain:
        return join_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def _by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention as two products in bfloat16 and a softmax in float32.

    On a CPU PyTorch's own kernel takes as long for a chunk of one stream, up to twice as long for
    those of several, and up to six times as long backwards.
    """
    queries, keys, values = (x.flatten(0, 1) for x in (q, k, v))
    nothing = queries.new_empty(1, 1, 1)  # what the product would be added to
    scores = torch.baddbmm(
        nothing, queries, keys.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5
    )
    if mask is not None:
        scores = (scores.unflatten(0, q.shape[:2]) + mask).flatten(0, 1)
    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    return torch.bmm(weights, values).unflatten(0, q.shape[:2])
