"""Fused Triton kernels for streaming on CUDA: an option; the eager code is its reference.

A chunk at paper size reads and writes 93.5 GB in norms, rotations, copies and activations when
every one of them is an operation of its own. The networks that :func:`fused_transformer` and
:func:`fused_vae` return do the same arithmetic in fewer passes over memory:

- the residual sum, the RMS norm and the modulation that follows are one kernel, which can also
  quantise to float8;
- self-attention's three projections are one product; one kernel then normalises queries and keys,
  rotates both, and writes keys and values to their slots of the ID-Context Cache;
- the tanh GELU is computed in the epilogue of its product;
- attention to a frame's few speech tokens is one kernel for the weights and one small product: what
  a token adds to the output is known before the denoising steps, so the output projection is not
  computed per video token;
- the VAE decoder's norm, modulation and SiLU are one kernel in channels-last memory, which writes
  behind the past frames of the convolution that follows.

Sums, norms and rotations are computed in float32 whatever the type, and rounded once where the
eager code rounds after every operation. ``TRITON_INTERPRET=1``, set before Triton is imported, runs
the kernels on a CPU: so they are tested.
"""

from __future__ import annotations

import copy
import math
import os
import weakref
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from rest_lightning.models.attention import KeyValue, attend_heads, split_heads
from rest_lightning.models.blocks import Attention, Block, Modulation, SpeechAttention
from rest_lightning.models.cache import AttentionContext, IDContextCache
from rest_lightning.models.ltx_vae import LTXVideoVAE, _Conv, _Upsampler
from rest_lightning.models.transformer import A2VDiT

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0
MOST_KEYS = 8  # of a frame's speech, for the kernel that holds them all at once

VAE = TypeVar("VAE", bound=nn.Module)
Rows = tuple[
    Tensor, Tensor | None
]  # values (..., D), and in float8 what each row is to be multiplied by (..., 1)


def can_fuse(device: torch.device) -> bool:
    """Whether the kernels run on ``device``: CUDA, or a CPU with Triton's interpreter."""
    return device.type == "cuda" or (
        device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    )


# -- kernels ---------------------------------------------------------------------------------------


@triton.jit
def _to_float8(x):  # type: ignore[no-untyped-def]
    """float32 within +-448 to float8 (e4m3), to nearest even.

    Rounded to the three bits of its mantissa first: Triton's interpreter loses the carry of its own
    rounding.
    """
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    return bits.to(tl.float32, bitcast=True).to(tl.float8e4nv)


@triton.jit
def _norm_modulate_kernel(  # type: ignore[no-untyped-def]
    x_ptr, added_ptr, gate_ptr, sum_ptr, shift_ptr, scale_ptr, out_ptr, factor_ptr, dim, eps,
    ADD: tl.constexpr, GATE: tl.constexpr, MODULATE: tl.constexpr, QUANTISE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: sum = x + added * gate, out = rms_norm(sum) * scale + shift."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    keep = i < dim
    x = tl.load(x_ptr + row * dim + i, mask=keep, other=0.0).to(tl.float32)
    if ADD:
        added = tl.load(added_ptr + row * dim + i, mask=keep, other=0.0).to(tl.float32)
        if GATE:
            added = added * tl.load(gate_ptr + i, mask=keep, other=0.0).to(tl.float32)
        rounded = (x + added).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * dim + i, rounded, mask=keep)
        x = rounded.to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / dim + eps)
    if MODULATE:
        scale = tl.load(scale_ptr + i, mask=keep, other=0.0).to(tl.float32)
        y = y * scale + tl.load(shift_ptr + i, mask=keep, other=0.0).to(tl.float32)
    if QUANTISE:
        y = tl.where(keep, y, 0.0)
        factor = tl.maximum(tl.max(tl.abs(y), 0), 1e-12) / 448.0
        tl.store(factor_ptr + row, factor)
        tl.store(out_ptr + row * dim + i, _to_float8(y / factor), mask=keep)
    else:
        tl.store(out_ptr + row * dim + i, y.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _rotate_store_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr, q_weight_ptr, k_weight_ptr, table_ptr, q_ptr, k_ptr, v_ptr,
    tokens, dim, head_dim, table_stride, slot_stride_row, slot_stride_head, slot_stride_token, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One token: norms of q and k over all heads, their rotation, and the slots of k and v."""
    token, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i = tl.arange(0, BLOCK)
    keep = i < dim
    qkv_ptr += (row * tokens + token) * 3 * dim
    table = tl.load(table_ptr + row * table_stride + token * dim + i, mask=keep, other=0.0)
    cos, sin = tl.split(tl.reshape(table, (BLOCK // 2, 2)))
    slot = row * slot_stride_row + (i // head_dim) * slot_stride_head
    slot += token * slot_stride_token + i % head_dim
    for part in tl.static_range(2):
        weight_ptr = q_weight_ptr if part == 0 else k_weight_ptr
        x = tl.load(qkv_ptr + part * dim + i, mask=keep, other=0.0).to(tl.float32)
        x = x * tl.rsqrt(tl.sum(x * x, 0) / dim + eps)
        x = x * tl.load(weight_ptr + i, mask=keep, other=0.0).to(tl.float32)
        real, imag = tl.split(tl.reshape(x, (BLOCK // 2, 2)))
        turned = tl.reshape(tl.join(real * cos - imag * sin, real * sin + imag * cos), (BLOCK,))
        if part == 0:
            at = (row * tokens + token) * dim + i
            tl.store(q_ptr + at, turned.to(q_ptr.dtype.element_ty), mask=keep)
        else:
            tl.store(k_ptr + slot, turned.to(k_ptr.dtype.element_ty), mask=keep)
    v = tl.load(qkv_ptr + 2 * dim + i, mask=keep, other=0.0)
    tl.store(v_ptr + slot, v.to(v_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _few_keys_kernel(  # type: ignore[no-untyped-def]
    q_ptr, weight_ptr, keys_ptr, out_ptr, tokens, heads, head_dim, num_keys, eps, temperature,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One token: the norm of its query over all heads, and its weights over the keys of its row."""
    token, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    dim = heads * head_dim
    head, channel = tl.arange(0, HEADS), tl.arange(0, HEAD_DIM)
    keep = (head[:, None] < heads) & (channel[None, :] < head_dim)
    i = head[:, None] * head_dim + channel[None, :]
    q = tl.load(q_ptr + (row * tokens + token) * dim + i, mask=keep, other=0.0).to(tl.float32)
    q = q * tl.rsqrt(tl.sum(tl.sum(q * q, 1), 0) / dim + eps)
    q = q * tl.load(weight_ptr + i, mask=keep, other=0.0).to(tl.float32)
    key = tl.arange(0, KEYS)
    known = key[:, None, None] < num_keys
    at = (row * num_keys + key[:, None, None]) * dim + i[None, :, :]
    keys = tl.load(keys_ptr + at, mask=known & keep[None, :, :], other=0.0).to(tl.float32)
    scores = tl.sum(keys * q[None, :, :], 2) * temperature
    scores = tl.where(key[:, None] < num_keys, scores, -float("inf"))
    weights = tl.exp(scores - tl.max(scores, 0)[None, :])
    weights = weights / tl.sum(weights, 0)[None, :]
    place = (row * tokens + token) * heads * num_keys + head[None, :] * num_keys + key[:, None]
    kept = (head[None, :] < heads) & (key[:, None] < num_keys)
    tl.store(out_ptr + place, weights.to(out_ptr.dtype.element_ty), mask=kept)


@triton.jit
def _gelu_quantise_kernel(x_ptr, out_ptr, factor_ptr, dim, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row: tanh GELU, then float8."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    keep = i < dim
    x = tl.load(x_ptr + row * dim + i, mask=keep, other=0.0).to(tl.float32)
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    y = x / (1.0 + tl.exp(-2.0 * u))  # x * (1 + tanh(u)) / 2
    factor = tl.maximum(tl.max(tl.abs(y), 0), 1e-12) / 448.0
    tl.store(factor_ptr + row, factor)
    tl.store(out_ptr + row * dim + i, _to_float8(y / factor), mask=keep)


@triton.jit
def _norm_silu_kernel(  # type: ignore[no-untyped-def]
    x_ptr, scale_ptr, shift_ptr, out_ptr, places, channels, out_stride, eps,
    MODULATE: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some places of a row: silu(rms_norm(x) * scale + shift) over the channels."""
    row = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0).to(tl.int64) * PLACES + tl.arange(0, PLACES)
    i = tl.arange(0, BLOCK)
    keep = (place < places)[:, None] & (i < channels)[None, :]
    at = place[:, None] * channels + i[None, :]
    x = tl.load(x_ptr + row * places * channels + at, mask=keep, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 1) / channels + eps)[:, None]
    if MODULATE:
        scale = tl.load(scale_ptr + row * channels + i, mask=i < channels, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + row * channels + i, mask=i < channels, other=0.0).to(tl.float32)
        y = y * scale[None, :] + shift[None, :]
    y = y / (1.0 + tl.exp(-y))
    tl.store(out_ptr + row * out_stride + at, y.to(out_ptr.dtype.element_ty), mask=keep)


# -- the kernels as functions ----------------------------------------------------------------------


def norm_modulate(
    x: Tensor,
    eps: float,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    added: Tensor | None = None,
    gate: Tensor | None = None,
    float8: bool = False,
) -> tuple[Tensor, Rows]:
    """The sum ``x + added * gate``, and ``rms_norm(sum) * scale + shift``.

    Args:
        x, added: contiguous ``(..., D)``; without ``added`` the sum is ``x`` itself.
        eps: of the norm.
        shift, scale, gate: ``D`` values each, or None.
        float8: return the second as float8 with one factor a row.
    """
    dim = x.shape[-1]
    total = x if added is None else torch.empty_like(x)
    out = torch.empty_like(x, dtype=FLOAT8 if float8 else x.dtype)
    factor = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32) if float8 else None
    block = triton.next_power_of_2(dim)
    _norm_modulate_kernel[(x.numel() // dim,)](
        x, x if added is None else added, x if gate is None else gate, total,
        x if shift is None else shift, x if scale is None else scale, out,
        x if factor is None else factor, dim, eps, ADD=added is not None, GATE=gate is not None,
        MODULATE=scale is not None, QUANTISE=float8, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return total, (out, factor)


def rotate_store(
    qkv: Tensor,
    norm_q: Tensor,
    norm_k: Tensor,
    table: Tensor,
    key_slot: Tensor,
    value_slot: Tensor,
    eps: float,
) -> Tensor:
    """Queries ``(rows, T, D)``, normalised and rotated; keys and values go to their slots.

    Args:
        qkv: ``(rows, T, 3 * D)``, contiguous: queries, keys and values of one product.
        norm_q, norm_k: weights ``(D,)`` of the RMS norms.
        table: rotations ``(rows, T, D / 2)``, complex.
        key_slot, value_slot: ``(rows, heads, T, D / heads)``, of equal strides.
        eps: of the norms.
    """
    rows, tokens, width = qkv.shape
    dim, head_dim = width // 3, key_slot.shape[-1]
    angles = torch.view_as_real(table)  # (rows, T, D / 2, 2)
    assert (
        key_slot.stride() == value_slot.stride()
        and key_slot.stride(3) == 1
        and angles.stride(1) == dim
    )
    q = qkv.new_empty(rows, tokens, dim)
    block = triton.next_power_of_2(dim)
    _rotate_store_kernel[(tokens, rows)](
        qkv, norm_q, norm_k, angles, q, key_slot, value_slot, tokens, dim, head_dim,
        angles.stride(0), key_slot.stride(0), key_slot.stride(1), key_slot.stride(2), eps,
        BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return q


def few_key_weights(q: Tensor, norm_q: Tensor, keys: Tensor, num_heads: int, eps: float) -> Tensor:
    """Attention weights ``(N, T, heads * m)`` of raw queries ``(N, T, D)`` over ``keys (N, m,
    D)``.
    """
    batch, tokens, dim = q.shape
    num_keys, head_dim = keys.shape[1], dim // num_heads
    out = q.new_empty(batch, tokens, num_heads * num_keys)
    sizes = [triton.next_power_of_2(size) for size in (num_heads, head_dim, num_keys)]
    _few_keys_kernel[(tokens, batch)](
        q, norm_q, keys, out, tokens, num_heads, head_dim, num_keys, eps, head_dim**-0.5,
        HEADS=sizes[0], HEAD_DIM=sizes[1], KEYS=sizes[2], num_warps=_warps(math.prod(sizes)),
    )  # fmt: skip
    return out


def gelu_quantise(x: Tensor) -> Rows:
    """Tanh GELU of contiguous ``x (..., D)`` in float8, with one factor a row."""
    dim = x.shape[-1]
    out, factor = (
        torch.empty_like(x, dtype=FLOAT8),
        x.new_empty(*x.shape[:-1], 1, dtype=torch.float32),
    )
    block = triton.next_power_of_2(dim)
    _gelu_quantise_kernel[(x.numel() // dim,)](
        x, out, factor, dim, BLOCK=block, num_warps=_warps(block)
    )
    return out, factor


def norm_silu(
    x: Tensor, out: Tensor, eps: float, shift: Tensor | None = None, scale: Tensor | None = None
) -> None:
    """Write ``silu(rms_norm(x) * scale + shift)`` to ``out``.

    Args:
        x: ``(B, F, H, W, C)``, contiguous.
        out: of the same shape; each row of the batch contiguous.
        eps: of the norm.
        shift, scale: ``(B, C)``, contiguous, or None.
    """
    batch, channels = x.shape[0], x.shape[-1]
    places = x[0].numel() // channels
    block = triton.next_power_of_2(channels)
    per_program = max(1, 2048 // block)
    _norm_silu_kernel[(triton.cdiv(places, per_program), batch)](
        x, x if scale is None else scale, x if shift is None else shift, out, places, channels,
        out.stride(0), eps, MODULATE=scale is not None, PLACES=per_program, BLOCK=block,
        num_warps=4,
    )  # fmt: skip


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x (..., D)`` as float8, its largest value at 448, and float32 factors ``(..., 1)``."""
    wide = x.float()
    factor = wide.abs().amax(-1, keepdim=True).clamp_min(1e-12) / FLOAT8_MAX
    return (wide / factor).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8), factor


def _warps(block: int) -> int:
    return 4 if block <= 1024 else 8


# -- the transformer -------------------------------------------------------------------------------


class _Product:
    """A linear layer, or several of one input; in float8 with a factor for each row and output."""

    @torch.no_grad()
    def __init__(self, layers: list[nn.Linear], float8: bool) -> None:
        weights = [layer.weight.detach() for layer in layers]
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        self.bias = None if not biases else biases[0] if len(biases) == 1 else torch.cat(biases)
        self.factor: Tensor | None = None
        if float8:
            self.weight, self.factor = quantise_rows(self.weight)

    def __call__(self, rows: Rows) -> Tensor:
        x, factor = rows
        if self.factor is None or factor is None:
            return F.linear(x, self.weight, self.bias)
        flat = torch._scaled_mm(
            x.flatten(0, -2), self.weight.t(), scale_a=factor.flatten(0, -2),
            scale_b=self.factor.t(), bias=self.bias, out_dtype=torch.bfloat16,
            use_fast_accum=x.is_cuda,
        )  # fmt: skip
        return flat.unflatten(0, x.shape[:-1])

    def gelu(self, x: Tensor) -> Tensor:
        """The product with the tanh GELU; on CUDA in its epilogue (cublasLt)."""
        if not x.is_cuda or self.bias is None:
            return F.gelu(F.linear(x, self.weight, self.bias), approximate="tanh")
        flat = torch._addmm_activation(self.bias, x.flatten(0, -2), self.weight.t(), use_gelu=True)
        return flat.unflatten(0, x.shape[:-1])


class _FewKeys(SpeechAttention):
    """Speech attention on keys ``(N, m, D)`` and what each adds to the output.

    The condition is a pair of both, the second of shape ``(N, heads * m, D)``.
    """

    def project(self, context: Tensor) -> KeyValue:
        if context.shape[1] > MOST_KEYS:
            return super().project(context)
        values = split_heads(self.to_v(context), self.num_heads)  # (N, heads, m, D / heads)
        out = cast(nn.Linear, self.to_out[0])
        weight = out.weight.unflatten(1, (self.num_heads, -1))  # (D, heads, D / heads)
        products = torch.einsum("nhmc,dhc->nhmd", values, weight)
        return self.norm_k(self.to_k(context)).contiguous(), products.flatten(1, 2)

    def cross_attention(self, x: Tensor, key_value: KeyValue, mask: Tensor | None = None) -> Tensor:
        keys, products = key_value
        if keys.ndim == 4:
            return super().cross_attention(x, key_value, mask)
        norm, out = self.norm_q, cast(nn.Linear, self.to_out[0])
        assert norm.weight is not None
        weights = few_key_weights(self.to_q(x), norm.weight, keys, self.num_heads, norm.eps)
        return torch.baddbmm(out.bias, weights, products)


class _FusedBlock(Block):
    """A block whose streaming chunks run on the kernels; whatever else comes runs as in `Block`."""

    _qkv: _Product
    _up: _Product
    _down: _Product
    _float8: bool

    def forward(
        self,
        x: Tensor,
        layer: int,
        modulation: Modulation,
        context: AttentionContext,
        text: KeyValue | None,
        text_mask: Tensor | None,
        speech: KeyValue | None,
    ) -> Tensor:
        # One noise level for all tokens: not the first chunk of reference_attends=first_chunk, nor
        # a prefill.
        streams = type(context) is IDContextCache and modulation[0].numel() == x.shape[-1]
        if not streams or self.norm1.weight is not None:
            return super().forward(x, layer, modulation, context, text, text_mask, speech)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation
        x = x.contiguous()
        _, normed = norm_modulate(x, self.norm1.eps, shift_1, scale_1, float8=self._float8)
        attended = self._attend(normed, layer, cast(IDContextCache, context)).view(x.shape)
        added, gate = attended, cast("Tensor | None", gate_1)
        if self.attn2 is not None and text is not None:
            x = torch.addcmul(x, attended, gate_1)
            added = self.attn2.cross_attention(x.flatten(1, 2), text, text_mask).view(x.shape)
            gate = None
        if self.speech_attn is not None and speech is not None:
            x, (rows, _) = norm_modulate(x, self.speech_norm.eps, added=added, gate=gate)
            added = self.speech_attn.cross_attention(rows.flatten(0, 1), speech).view(x.shape)
            gate = None
        x, normed = norm_modulate(x, self.norm2.eps, shift_2, scale_2, added, gate, self._float8)
        return torch.addcmul(x, self._feed_forward(normed), gate_2)

    def _feed_forward(self, normed: Rows) -> Tensor:
        if self._float8:
            return self._down(gelu_quantise(self._up(normed)))
        return self._down((self._up.gelu(normed[0]), None))

    def _attend(self, normed: Rows, layer: int, cache: IDContextCache) -> Tensor:
        attention: Attention = self.attn1
        qkv = self._qkv(normed).flatten(1, 2)
        key_slot, value_slot, keys, values = cache.slots(layer)
        norm_q, norm_k, eps = attention.norm_q.weight, attention.norm_k.weight, attention.norm_q.eps
        assert norm_q is not None and norm_k is not None
        q = rotate_store(qkv, norm_q, norm_k, cache.current_rotation, key_slot, value_slot, eps)
        queries = split_heads(q, attention.num_heads)
        out: Tensor = attention.to_out[0](attend_heads(queries, keys, values, cache.window_mask))
        return out


_twins: weakref.WeakKeyDictionary[nn.Module, dict[bool, tuple[Hashable, Any]]] = (
    weakref.WeakKeyDictionary()
)


def _twin(network: nn.Module, make: Callable[[], Any], float8: bool = False) -> Any:
    """The one copy of ``network`` for its weights of now, made where there is none."""
    state = tuple(
        (x.data_ptr(), 0 if x.is_inference() else x._version) for x in network.parameters()
    )
    known = _twins.setdefault(network, {})
    if float8 not in known or known[float8][0] != state:
        known[float8] = state, make()
    return known[float8][1]


def fused_transformer(network: A2VDiT, float8: bool = False) -> A2VDiT:
    """A copy of ``network`` for streaming that runs on the kernels and shares its weights.

    Only the joined projections are weights beside the others, 6 * D^2 bytes a block in bfloat16
    (0.7 GB at paper size). It keeps to the weights of now; all sessions of a network share one
    copy.

    Args:
        network: a student.
        float8: multiply self-attention's projections and the feed-forward layer in float8 (e4m3),
            with one factor for every row of the input and of the weight (``torch._scaled_mm``);
            takes 11 * D^2 bytes a block instead, and changes what is computed by the rounding to 3
            bits of mantissa.
    """
    return cast(A2VDiT, _twin(network, partial(_fused_transformer, network, float8), float8))


def _fused_transformer(network: A2VDiT, float8: bool) -> A2VDiT:
    twin = copy.copy(network)
    blocks = [_fused_block(cast(Block, block), float8) for block in network.transformer_blocks]
    twin._modules = {**network._modules, "transformer_blocks": nn.ModuleList(blocks)}
    return twin


def _fused_block(block: Block, float8: bool) -> Block:
    twin = copy.copy(block)
    twin.__class__ = _FusedBlock
    assert isinstance(twin, _FusedBlock)
    twin._modules = dict(block._modules)
    if block.speech_attn is not None:
        speech = copy.copy(block.speech_attn)
        speech.__class__ = _FewKeys
        twin._modules["speech_attn"] = speech
    attention, up, down = (
        block.attn1,
        cast(Any, block.ff.net[0]).proj,
        cast(nn.Linear, block.ff.net[2]),
    )
    twin._qkv = _Product([attention.to_q, attention.to_k, attention.to_v], float8)
    twin._up, twin._down, twin._float8 = _Product([up], float8), _Product([down], float8), float8
    return twin


# -- the VAE ---------------------------------------------------------------------------------------


class _LastUpsampler(_Upsampler):
    """The upsampler in channels-last memory: one copy, in the next convolution's order."""

    def _unfold(self, x: Tensor) -> Tensor:
        t, s, r = self.stride
        b, c, f, h, w = x.shape
        x = (
            x.permute(0, 2, 3, 4, 1)
            .reshape(b, f, h, w, c // (t * s * r), t, s, r)
            .permute(0, 1, 5, 2, 6, 3, 7, 4)
        )
        return x.reshape(b, f * t, h * s, w * r, -1).permute(0, 4, 1, 2, 3)


def fused_vae(vae: VAE) -> VAE:
    """A copy of ``vae`` whose decoder runs on the kernel, in channels-last memory.

    The decoder's convolutions are weights beside the others; it keeps to the weights of now, and
    all sessions share it. A VAE other than LTX-Video's comes back as it is.
    """
    return cast(VAE, _twin(vae, partial(_fused_vae, vae))) if isinstance(vae, LTXVideoVAE) else vae


def _fused_vae(vae: LTXVideoVAE) -> LTXVideoVAE:
    twin, ltx = copy.copy(vae), copy.copy(vae.ltx)
    ltx._modules = {**vae.ltx._modules, "decoder": _fused_decoder(vae.ltx.decoder)}
    twin._modules = {**vae._modules, "ltx": ltx}
    return twin


@torch.no_grad()
def _fused_decoder(module: nn.Module) -> nn.Module:
    from diffusers.models.autoencoders.autoencoder_kl_ltx import LTXVideoResnetBlock3d

    twin = copy.copy(module)
    twin._modules = {
        name: child and _fused_decoder(child) for name, child in module._modules.items()
    }
    if isinstance(twin, nn.Conv3d):
        weight = twin.weight.detach().to(memory_format=torch.channels_last_3d, copy=True)
        twin._parameters = {
            **module._parameters,
            "weight": nn.Parameter(weight, requires_grad=False),
        }
    elif isinstance(twin, _Upsampler):
        twin.__class__ = _LastUpsampler
    elif isinstance(twin, LTXVideoResnetBlock3d) and _can_fuse_block(twin):
        twin.forward = _ResnetBlock(twin)
    return twin


def _can_fuse_block(block: Any) -> bool:
    plain = (
        block.norm1.weight is None
        and block.norm2.weight is None
        and block.per_channel_scale1 is None
    )
    return (
        plain and isinstance(block.conv1, _Conv) and block.conv1.is_causal and block.conv2.is_causal
    )


class _ResnetBlock:
    """Forward of diffusers' ``LTXVideoResnetBlock3d``; the kernel does what precedes its
    convolutions.
    """

    def __init__(self, block: Any) -> None:
        self.block = block

    def __call__(
        self, x: Tensor, temb: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        block = self.block
        shift_1 = scale_1 = shift_2 = scale_2 = None
        if block.scale_shift_table is not None and temb is not None:
            # temb (B, 4 * C, 1, 1, 1)
            levels = temb.flatten(1).unflatten(1, (4, -1)) + block.scale_shift_table
            shift_1, scale_1, shift_2, scale_2 = (level.contiguous() for level in levels.unbind(1))
            scale_1, scale_2 = 1 + scale_1, 1 + scale_2
        y = _normed_convolution(x, block.norm1.eps, shift_1, scale_1, block.conv1)
        y = _normed_convolution(y, block.norm2.eps, shift_2, scale_2, block.conv2)
        if block.norm3 is not None:
            x = block.norm3(x.movedim(1, -1)).movedim(-1, 1)
        if block.conv_shortcut is not None:
            x = block.conv_shortcut(x)
        return y + x


def _normed_convolution(
    x: Tensor, eps: float, shift: Tensor | None, scale: Tensor | None, conv: _Conv
) -> Tensor:
    """Norm, modulation and SiLU of ``x (B, C, F, H, W)``, behind the past, and the convolution."""
    stream, first = conv._call.stream, conv._call.first
    num_past = conv.conv.kernel_size[0] - 1
    last = x.permute(0, 2, 3, 4, 1).contiguous()
    batch, num_frames, *place = last.shape
    padded = last.new_empty(batch, num_past + num_frames, *place)
    norm_silu(last, padded[:, num_past:], eps, shift, scale)
    video = padded.permute(0, 4, 1, 2, 3)
    if stream is None or first:
        padded[:, :num_past] = padded[:, num_past : num_past + 1]
    else:
        video[:, :, :num_past] = stream[conv.stream_name]
    if stream is not None:
        stream.remember(conv.stream_name, video[:, :, num_frames:])
    out: Tensor = conv.conv(video)
    return out
