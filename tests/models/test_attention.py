"""Attention in bfloat16 on a CPU, by products, against float64; the rotation, against its
definition.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rest_lightning.models import attention
from rest_lightning.models.attention import Rope, attend, join_heads, split_heads


def exact(q: Tensor, k: Tensor, v: Tensor, num_heads: int, mask: Tensor | None) -> Tensor:
    """Softmax attention, written out."""
    q, k, v = (x.view(*x.shape[:2], num_heads, -1) for x in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    weights = (scores if mask is None else scores + mask).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("batch", "num_queries", "num_keys", "num_heads", "width"),
    [
        (1, 1, 1, 1, 8),
        (2, 48, 112, 4, 64),
        (3, 5, 7, 2, 10),
        (8, 48, 112, 4, 64),
        (2, 208, 208, 4, 64),
    ],
)
def test_attention_and_its_gradients(
    batch: int,
    num_queries: int,
    num_keys: int,
    num_heads: int,
    width: int,
    dtype: torch.dtype,
    is_masked: bool,
) -> None:
    torch.manual_seed(0)
    shapes = [(batch, count, num_heads * width) for count in (num_queries, num_keys, num_keys)]
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    mask = None
    if is_masked and num_keys > 1:
        mask = torch.zeros(batch, 1, 1, num_keys).masked_fill(
            torch.rand(batch, 1, 1, num_keys) < 0.3, -torch.inf
        )
        mask[..., 0] = 0.0
    wide = [x.double().requires_grad_() for x in inputs]
    narrow = [x.clone().requires_grad_() for x in inputs]
    (q, k, v), (wide_q, wide_k, wide_v) = narrow, wide
    expected = exact(wide_q, wide_k, wide_v, num_heads, None if mask is None else mask.double())
    found = attend(q, k, v, num_heads, None if mask is None else mask.to(dtype))
    assert found.dtype == dtype
    weight = torch.randn(expected.shape)
    pairs = [(found, expected)]
    gradients = [
        torch.autograd.grad(y, x, weight.to(y.dtype))
        for y, x in ((found, narrow), (expected, wide))
    ]
    pairs += list(zip(*gradients, strict=True))
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5
    for got, wanted in pairs:
        error = (got.detach().double() - wanted.detach()).norm()
        assert error <= tolerance * wanted.detach().norm() + (1e-2 if num_keys == 1 else 0.0)


def test_long_sequences_hold_no_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit PyTorch's kernel runs: the same but for rounding."""
    q, k, v = (torch.randn(2, count, 32).bfloat16() for count in (9, 30, 30))
    by_products = attend(q, k, v, 2)
    monkeypatch.setattr(attention, "_MOST_SCORES", 9 * 30 - 1)
    torch.testing.assert_close(attend(q, k, v, 2), by_products, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("shape", [(1, 4), (2, 3, 12), (2, 5, 3, 6)])
def test_heads_split_and_join(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    for num_heads in (1, 2):
        heads = split_heads(x, num_heads)
        assert heads.shape == (*shape[:-2], num_heads, shape[-2], shape[-1] // num_heads)
        assert torch.equal(join_heads(heads), x)


@pytest.mark.parametrize("causal_ratio", [None, 8])
def test_exact_rotations_keep_their_distance_far_from_the_start(causal_ratio: int | None) -> None:
    """A day into a stream neighbouring frames are turned against each other as at its start;
    in float32 they are not.
    """
    far = 270_000
    for exact, tolerance in ((True, 1e-5), (False, None)):
        rope = Rope(24, causal_ratio=causal_ratio, exact=exact)
        near, late = (rope.table(first, 2, 1, 1, torch.device("cpu")) for first in (1, far))
        turns = [table[1] * table[0].conj() for table in (near, late)]
        error = float((turns[1] - turns[0]).abs().max())
        assert error < tolerance if tolerance else error > 1e-2


def test_causal_positions_are_the_times_of_first_pixel_frames() -> None:
    """0, 1/25, 9/25, 17/25 s: one wave of a period of 40 s for each dimension, no position in
    space.
    """
    rope = Rope(6, causal_ratio=8, exact=True)
    table = rope.table(0, 4, 1, 1, torch.device("cpu"))[:, 0]
    times = torch.tensor([0.0, 1 / 25, 9 / 25, 17 / 25], dtype=torch.float64)
    phases = math.pi / 2 * (2 * times / 20 - 1)
    assert torch.allclose(table.real.double(), phases.cos(), atol=1e-6)
    assert torch.allclose(table.imag.double(), phases.sin(), atol=1e-6)
