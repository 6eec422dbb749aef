"""Building blocks of the A2V-DiT: attention, feed-forward layer, modulation by the noise level, and
the block of all three (REST sec. 3.2), named as in diffusers' ``LTXVideoTransformer3DModel``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rest_lightning.models.attention import KeyValue, attend_heads, split_heads
from rest_lightning.models.cache import (
    AttentionContext,
)

Modulation = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class SigmaEmbedding:
    """`A2VDiT.embed_sigma`: shift, 1 + scale and gate of every block, and shift, 1 + scale of the
    output.

    All are ``(B, f, 1, D)``; with B = f = 1 they serve any batch and any number of frames.
    ``skip``: factors of the input and of the layers' output, ``(B, f, 1, 1)``, in a
    preconditioned network.
    """

    blocks: list[Modulation]
    out: tuple[Tensor, Tensor]
    skip: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Condition:
    """Keys and values of speech or text for every block, computed once for all denoising steps by
    `A2VDiT.project_speech` or `project_text`.
    """

    blocks: list[KeyValue]
    mask: Tensor | None = None

    def expand(self, batch: int) -> Condition:
        """The condition of one row for ``batch`` rows, as views."""
        blocks = [
            (k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1)) for k, v in self.blocks
        ]
        return Condition(blocks, None if self.mask is None else self.mask.expand(batch, -1, -1, -1))

    def repeat(self, batch: int) -> Condition:
        """The condition of one row for ``batch`` rows, each in memory of its own."""
        blocks = [(k.repeat(batch, 1, 1, 1), v.repeat(batch, 1, 1, 1)) for k, v in self.blocks]
        return Condition(blocks, None if self.mask is None else self.mask.repeat(batch, 1, 1, 1))

    def first(self, batch: int) -> Condition:
        """The first ``batch`` rows, as views."""
        blocks = [(k[:batch], v[:batch]) for k, v in self.blocks]
        return Condition(blocks, None if self.mask is None else self.mask[:batch])

    def twice(self) -> Condition:
        """The condition of a batch, repeated once as [batch | batch]."""
        blocks = [(torch.cat([k, k]), torch.cat([v, v])) for k, v in self.blocks]
        return Condition(blocks, None if self.mask is None else torch.cat([self.mask, self.mask]))


class RMSNorm(nn.Module):
    """RMS norm over the last axis; the weight is absent where there is none (LTX blocks), and
    follows autocast.
    """

    def __init__(self, dim: int, eps: float, elementwise_affine: bool = True) -> None:
        super().__init__()
        self.shape, self.eps = (dim,), eps
        self.weight = nn.Parameter(torch.ones(dim)) if elementwise_affine else None

    def forward(self, x: Tensor) -> Tensor:
        """Returns the layer's output for ``x (..., D)``."""
        weight = self.weight.to(x.dtype) if self.weight is not None else None
        return F.rms_norm(x, self.shape, weight, self.eps)


class Attention(nn.Module):
    """Projections of one attention: RMS norm of queries and keys across heads (LTX
    ``rms_norm_across_heads``).
    """

    def __init__(
        self, dim: int, num_heads: int, context_dim: int, bias: bool = True, out_bias: bool = True
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_q = RMSNorm(dim, eps=1e-5)
        self.norm_k = RMSNorm(dim, eps=1e-5)
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(context_dim, dim, bias=bias)
        self.to_v = nn.Linear(context_dim, dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim, bias=out_bias)])

    def self_attention(self, x: Tensor, layer: int, context: AttentionContext) -> Tensor:
        """``x (B, f * n, D)`` attends inside ``context``."""
        q, k, v = self.queries_keys_values(x)
        out = context.attend(layer, q, k, v, self.num_heads)
        if isinstance(out, Tensor):
            return self.to_out[0](out)
        # Joined behind the projection: the graph keeps each of the pieces, and would keep a copy of
        # all of them.
        return torch.cat([self.to_out[0](piece) for piece in out], 1)

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``x (B, f * n, D)`` to normalised queries and keys, and values, all of that shape."""
        return self.norm_q(self.to_q(x)), self.norm_k(self.to_k(x)), self.to_v(x)

    def project(self, context: Tensor) -> KeyValue:
        """Keys and values ``(N, heads, m, D / heads)`` of a condition ``(N, m, context_dim)``."""
        k, v = self.norm_k(self.to_k(context)), self.to_v(context)
        # So few keys are faster in float32 on a CPU, and they are brought there once for all
        # denoising steps.
        dtype = torch.float32 if v.dtype == torch.bfloat16 and v.device.type == "cpu" else v.dtype
        return split_heads(k.to(dtype), self.num_heads), split_heads(v.to(dtype), self.num_heads)

    def cross_attention(self, x: Tensor, key_value: KeyValue, mask: Tensor | None = None) -> Tensor:
        """``x (N, T, D)`` attends to projected keys and values; no positions."""
        k, v = key_value
        q = self.norm_q(self.to_q(x))
        out = attend_heads(split_heads(q.to(v.dtype), self.num_heads), k, v, mask)
        return self.to_out[0](out.to(q.dtype))


class SpeechAttention(Attention):
    """Attention of a frame's tokens to its speech tokens.

    Its output starts at zero, so that LTX's weights give LTX's output before any training.
    """

    def __init__(self, dim: int, num_heads: int, speech_dim: int) -> None:
        super().__init__(dim, num_heads, speech_dim)
        output = nn.Linear(dim, dim)
        nn.init.zeros_(output.weight)
        nn.init.zeros_(output.bias)
        self.to_out[0] = output


class GELUProjection(nn.Module):
    """Linear layer and tanh-approximated GELU (diffusers ``GELU``)."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the layer's output for ``x (..., D)``."""
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """Two layers, four times as wide in between; names as in diffusers (``net.0.proj``,
    ``net.2``).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            GELUProjection(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Returns the layer's output for ``x (..., D)``."""
        return self.net(x)


class TimestepEmbedder(nn.Module):
    """Sinusoids of 1000 * sigma through two linear layers (LTX, after PixArt-alpha)."""

    def __init__(self, dim: int, num_frequencies: int = 128) -> None:
        super().__init__()
        self.num_frequencies = num_frequencies
        self.linear_1 = nn.Linear(2 * num_frequencies, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, sigma: Tensor) -> Tensor:
        """Returns the embedding ``(B, f, D)`` of noise levels ``sigma (B, f)``."""
        exponents = torch.arange(self.num_frequencies, dtype=torch.float32, device=sigma.device)
        frequencies = torch.exp(-math.log(10000.0) * exponents / self.num_frequencies)
        phases = (1000.0 * sigma).float().unsqueeze(-1) * frequencies
        waves = torch.cat([phases.cos(), phases.sin()], dim=-1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(waves)))


class AdaLayerNormSingle(nn.Module):
    """Shared AdaLN (PixArt-alpha): one embedding, and six modulation vectors that every block
    offsets by its table.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.emb = nn.ModuleDict({"timestep_embedder": TimestepEmbedder(dim)})
        self.linear = nn.Linear(dim, 6 * dim)

    def forward(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """``sigma (B, f)`` -> modulation ``(B, f, 6 * D)`` and embedding ``(B, f, D)``."""
        embedding = self.emb["timestep_embedder"](sigma)
        return self.linear(F.silu(embedding)), embedding


class CaptionProjection(nn.Module):
    """Text embeddings to the width of the network (PixArt-alpha)."""

    def __init__(self, caption_channels: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(caption_channels, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, text: Tensor) -> Tensor:
        """Returns ``text (B, L, caption_channels)`` as ``(B, L, D)``."""
        return self.linear_2(F.gelu(self.linear_1(text), approximate="tanh"))


class Block(nn.Module):
    """Self-attention, text attention (``attn2``), speech attention, feed-forward; tokens are ``(B,
    f, n, D)``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        has_text: bool,
        speech_dim: int | None,
        attention_bias: bool,
        attention_out_bias: bool,
        norm_eps: float,
        norm_elementwise_affine: bool,
    ) -> None:
        super().__init__()
        bias, out_bias = attention_bias, attention_out_bias
        self.norm1 = RMSNorm(dim, norm_eps, norm_elementwise_affine)
        self.attn1 = Attention(dim, num_heads, dim, bias, out_bias)
        self.attn2 = Attention(dim, num_heads, dim, bias, out_bias) if has_text else None
        self.speech_norm = RMSNorm(dim, norm_eps, norm_elementwise_affine)
        self.speech_attn = (
            SpeechAttention(dim, num_heads, speech_dim) if speech_dim is not None else None
        )
        self.norm2 = RMSNorm(dim, norm_eps, norm_elementwise_affine)
        self.ff = FeedForward(dim)
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    def modulation(self, embedding: Tensor) -> Modulation:
        """Shift, 1 + scale, gate of both halves, each ``(B, f, 1, D)``, from ``(B, f, 6, 1,
        D)``.
        """
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (
            self.scale_shift_table[:, None] + embedding
        ).unbind(2)
        return shift_1, 1 + scale_1, gate_1, shift_2, 1 + scale_2, gate_2

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
        """Returns the tokens ``x (B, f, n, D)`` after this block."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation
        normed = torch.addcmul(shift_1, self.norm1(x), scale_1)
        attended = self.attn1.self_attention(normed.flatten(1, 2), layer, context)
        x = torch.addcmul(x, attended.view(x.shape), gate_1)
        if self.attn2 is not None and text is not None:
            x = x + self.attn2.cross_attention(x.flatten(1, 2), text, text_mask).view(x.shape)
        if self.speech_attn is not None and speech is not None:
            x = x + self.speech_attn.cross_attention(
                self.speech_norm(x).flatten(0, 1), speech
            ).view(x.shape)
        normed = torch.addcmul(shift_2, self.norm2(x), scale_2)
        return torch.addcmul(x, self.ff(normed), gate_2)


def precondition(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the factors ``a, b`` of ``velocity = a * noisy + b * layers``.

    They give the layers a target of unit variance at every ``sigma``, for latents of unit variance.

    For ``noisy = (1 - sigma) * latents + sigma * noise`` the best linear guess of ``noise -
    latents`` is ``a = (2 sigma - 1) / d`` times ``noisy``, with ``d = (1 - sigma)^2 + sigma^2``;
    what is left has the variance ``b^2 = 1 / d``. That is EDM's preconditioning (Karras et al.,
    arXiv 2206.00364, sec. 5) for flow matching. At sigma = 1 the layers predict the negative
    latents, at sigma = 0 the noise.
    """
    variance = (1 - sigma).square() + sigma.square()
    return (2 * sigma - 1) / variance, variance.rsqrt()


def run_block(block: nn.Module, *arguments: Any) -> Tensor:
    """Runs a block; as a plain function it is compiled once for all blocks."""
    out: Tensor = block(*arguments)
    return out
