"""Weights laid out once for the CPU's kernels, instead of at every call.

oneDNN multiplies from a blocked layout of its own, and ``nn.Linear`` and ``nn.Conv2d`` bring their
weights there at every call. With the few tokens and frames of one chunk that, and fetching the
weights twice, is a good part of the time. TorchInductor's freezing removes it, at the price of
compiling; this uses the same operators of torch without it.
"""

from __future__ import annotations

import copy
import weakref
import zlib
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from rest_lightning.models import blocks, causal

_OPERATORS = (
    "_linear_pointwise",
    "_reorder_linear_weight",
    "_convolution_pointwise",
    "_reorder_convolution_weight",
    "_is_mkldnn_bf16_supported",
)
# Layouts are chosen for inputs of about this size, and are right for any: tokens of a chunk,
# (N, H, W) of a chunk.
_NUM_TOKENS, _PLACES = 96, (8, 16, 16)
Network = TypeVar("Network", bound=nn.Module)
_packed: weakref.WeakKeyDictionary[nn.Module, tuple[Hashable, Any]] = weakref.WeakKeyDictionary()


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build of torch and this processor have the operators for weights of that
    kind.
    """
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not all(hasattr(torch.ops.mkldnn, name) for name in _OPERATORS):
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def packed(network: Network) -> Network:
    """A copy for inference with packed linear layers and convolutions; everything else is shared.

    It computes what ``network`` computes, up to rounding, and keeps to the weights of now. Packed
    weights take as much memory as the weights; copies of the same weights are one. What
    :func:`can_pack` refuses comes back as it is.
    """
    weight = next(network.parameters(), None)
    if weight is None or not can_pack(weight.device, weight.dtype):
        return network
    state = _state(network)
    known = _packed.get(network)
    if known is None or known[0] != state:
        _packed[network] = known = (state, _copy(network))
    return cast(Network, known[1])


def _state(network: nn.Module) -> Hashable:
    """Changes whenever an optimizer, a checkpoint or ``to`` changes the weights."""
    found: list[Hashable] = []
    for parameter in network.parameters():
        version = 0 if parameter.is_inference() else parameter._version
        # Writing to `.data` leaves the version alone: some values are looked at too.
        some = parameter.detach().flatten()[:64].float().cpu().numpy().tobytes()
        found.append((parameter.data_ptr(), version, zlib.crc32(some)))
    return tuple(found)


def _copy(module: nn.Module) -> nn.Module:
    twin = copy.copy(module)
    twin._modules = {name: child and _copy(child) for name, child in module._modules.items()}
    forward: Callable[[Tensor], Tensor] | None = None
    if type(module) is nn.Linear:
        forward = _linear(module)
    elif (
        type(module) is nn.Conv2d
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    ):
        forward = _convolution(module)
    elif isinstance(module, blocks.GELUProjection):
        forward = _linear(module.proj, "gelu", "tanh")
    elif isinstance(module, blocks.RMSNorm | causal.RMSNorm):
        forward = _norm(module)
    if forward is not None:
        twin.forward = forward
    if isinstance(module, blocks.Block):
        attention = cast(blocks.Attention, twin._modules["attn1"])
        attention.queries_keys_values = _queries_keys_values(module.attn1)  # type: ignore[assignment,method-assign]
        # The three alone are not called any more: packed ones would only take memory.
        attention._modules |= {
            name: module.attn1._modules[name] for name in ("to_q", "to_k", "to_v")
        }
    return twin


@torch.no_grad()
def _queries_keys_values(
    layer: blocks.Attention,
) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Self-attention's three projections as one: a chunk has so few tokens that every call
    counts.
    """
    parts, has_bias = (layer.to_q, layer.to_k, layer.to_v), layer.to_q.bias is not None
    joined = nn.Linear(1, 1, bias=has_bias)
    joined.weight = nn.Parameter(torch.cat([part.weight for part in parts]))
    if has_bias:
        joined.bias = nn.Parameter(torch.cat([part.bias for part in parts]))
    project = _linear(joined)
    scales = [
        norm.weight.detach() for norm in (layer.norm_q, layer.norm_k) if norm.weight is not None
    ]
    normalise = _norm_with(torch.stack(scales), layer.norm_q.eps)

    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        both, v = project(x).unflatten(-1, (3, -1)).tensor_split((2,), dim=-2)
        q, k = normalise(both).unbind(-2)
        return q, k, v.squeeze(-2)

    return forward


@torch.no_grad()
def _linear(
    layer: nn.Linear, activation: str = "none", algorithm: str = ""
) -> Callable[[Tensor], Tensor]:
    weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), _NUM_TOKENS)
    run, bias = torch.ops.mkldnn._linear_pointwise.default, layer.bias

    def forward(x: Tensor) -> Tensor:
        y: Tensor = run(x, weight, bias, activation, [], algorithm)
        return y

    return forward


@torch.no_grad()
def _convolution(layer: nn.Conv2d) -> Callable[[Tensor], Tensor]:
    num, *places = _PLACES
    geometry = ([*layer.padding], [*layer.stride], [*layer.dilation], layer.groups)
    size = [num, layer.in_channels, *places]
    weight = torch.ops.mkldnn._reorder_convolution_weight(layer.weight.detach(), *geometry, size)
    run, bias = torch.ops.mkldnn._convolution_pointwise.default, layer.bias

    def forward(x: Tensor) -> Tensor:
        y: Tensor = run(x, weight, bias, *geometry, "none", [], "")
        return y

    return forward


def _norm(layer: blocks.RMSNorm | causal.RMSNorm) -> Callable[[Tensor], Tensor]:
    return _norm_with(layer.weight, layer.eps)


def _norm_with(weight: Tensor | None, eps: float) -> Callable[[Tensor], Tensor]:
    floor = torch.tensor(eps)

    def forward(x: Tensor) -> Tensor:
        # reads x once
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(floor, norm, norm, value=1 / x.shape[-1]).rsqrt_()
        y = x * scale.to(x.dtype)
        return y if weight is None else y.mul_(weight)

    return forward
