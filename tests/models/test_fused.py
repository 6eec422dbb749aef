"""The Triton kernels against the eager code: in Triton's interpreter, or on CUDA."""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_ltx import assert_close, make_vae, random_latents
from torch import Tensor

from rest_lightning.models.attention import rotate, split_heads
from rest_lightning.models.cache import CacheOptions
from rest_lightning.models.ltx_vae import LTXVideoVAE, streamed_decode
from rest_lightning.models.transformer import A2VDiT

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton, which has wheels for Linux", allow_module_level=True)

from rest_lightning.models import fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if not fused.can_fuse(torch.device(DEVICE)):
    pytest.skip(
        "Triton was imported without TRITON_INTERPRET=1 and there is no CUDA device",
        allow_module_level=True,
    )

DTYPES = [torch.float32, torch.bfloat16]
SLACK = 1.1 if DEVICE == "cuda" else 3.0  # the interpreter cuts bfloat16 off where a GPU rounds it
SIZES = [(32, 2, 3), (48, 3, 5), (128, 2, 1)]  # width, heads, tokens; 48 is no power of two


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def check(found: Tensor, exact: Tensor, eager: Tensor) -> None:
    """float32: equal up to rounding; bfloat16: about as far from exact as the eager code is."""
    assert found.shape == eager.shape and found.dtype == eager.dtype
    error, allowed = (float((x.double() - exact).norm() / exact.norm()) for x in (found, eager))
    assert error <= 1e-6 if found.dtype == torch.float32 else error <= SLACK * allowed + 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "heads", "tokens"), SIZES)
@pytest.mark.parametrize("adds", ["nothing", "plain", "gated"])
@pytest.mark.parametrize("modulates", [True, False])
def test_norm_modulate(
    dim: int, heads: int, tokens: int, dtype: torch.dtype, adds: str, modulates: bool
) -> None:
    x, added, gate, shift, scale = (
        randn(*shape, dtype=dtype) for shape in ((2, tokens, dim),) * 2 + ((dim,),) * 3
    )
    before = x.clone()

    def eager(
        x: Tensor, added: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        if adds != "nothing":
            x = torch.addcmul(x, added, gate if adds == "gated" else torch.ones_like(gate))
        normed = F.rms_norm(x, (dim,), None, 1e-6)
        return x, torch.addcmul(shift, normed, scale) if modulates else normed

    arguments = (x, added, gate, shift, scale)
    wanted, exact = eager(*arguments), eager(*(value.double() for value in arguments))
    total, (out, factor) = fused.norm_modulate(
        x,
        1e-6,
        shift if modulates else None,
        scale if modulates else None,
        None if adds == "nothing" else added,
        gate if adds == "gated" else None,
    )
    check(total, exact[0], wanted[0])
    check(out, exact[1], wanted[1])
    assert factor is None and torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "heads", "tokens"), SIZES)
def test_rotate_store(dim: int, heads: int, tokens: int, dtype: torch.dtype) -> None:
    qkv, norm_q, norm_k = (
        randn(2, tokens, 3 * dim, dtype=dtype),
        randn(dim, dtype=dtype),
        randn(dim, dtype=dtype),
    )
    table = torch.polar(
        torch.ones(2, tokens + 4, dim // 2), torch.randn(2, tokens + 4, dim // 2)
    ).to(DEVICE)
    part = table[:, :tokens]  # as the cache hands out the rotations of a short chunk
    keys, values = (
        torch.zeros(3, heads, 7 + tokens, dim // heads, dtype=dtype, device=DEVICE)
        for _ in range(2)
    )
    slots = keys[:2, :, 4 : 4 + tokens], values[:2, :, 4 : 4 + tokens]
    q = fused.rotate_store(qkv, norm_q, norm_k, part, *slots, 1e-5)

    def eager(
        qkv: Tensor, norm_q: Tensor, norm_k: Tensor, part: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.unflatten(-1, (3, -1)).unbind(-2)
        q, k = (rotate(F.rms_norm(x, (dim,), w, 1e-5), part) for x, w in ((q, norm_q), (k, norm_k)))
        return q, split_heads(k, heads), split_heads(v, heads)

    wanted = eager(qkv, norm_q, norm_k, part)
    exact = eager(qkv.double(), norm_q.double(), norm_k.double(), part.to(torch.complex128))
    for found, precise, rounded in zip((q, *slots), exact, wanted, strict=True):
        check(found, precise, rounded)
    for buffer in (keys, values):  # nothing beside the slots is written
        assert (
            not buffer[2].any()
            and not buffer[:, :, :4].any()
            and not buffer[:, :, 4 + tokens :].any()
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "heads", "tokens"), SIZES)
@pytest.mark.parametrize("num_keys", [1, 2, 3, 8])
def test_few_key_weights(
    dim: int, heads: int, tokens: int, num_keys: int, dtype: torch.dtype
) -> None:
    q, weight, keys = (
        randn(*shape, dtype=dtype) for shape in ((2, tokens, dim), (dim,), (2, num_keys, dim))
    )

    def eager(q: Tensor, weight: Tensor, keys: Tensor) -> Tensor:
        q, k = (split_heads(x, heads) for x in (F.rms_norm(q, (dim,), weight, 1e-5), keys))
        scores = q @ k.transpose(-1, -2) * (dim // heads) ** -0.5
        return scores.softmax(-1).transpose(1, 2).flatten(2)

    found = fused.few_key_weights(q, weight, keys, heads, 1e-5)
    check(found, eager(q.double(), weight.double(), keys.double()), eager(q, weight, keys))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "channels"), [(1, 8), (2, 24), (2, 128)])
@pytest.mark.parametrize("modulates", [True, False])
def test_norm_silu(batch: int, channels: int, dtype: torch.dtype, modulates: bool) -> None:
    x = randn(batch, 3, 5, 7, channels, dtype=dtype)
    shift, scale = randn(batch, channels, dtype=dtype), randn(batch, channels, dtype=dtype)
    buffer = torch.zeros(batch, 5, 5, 7, channels, dtype=dtype, device=DEVICE)
    fused.norm_silu(x, buffer[:, 2:], 1e-8, *((shift, scale) if modulates else ()))

    def eager(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        y = F.rms_norm(x, (channels,), None, 1e-8)
        if modulates:
            y = y * scale[:, None, None, None] + shift[:, None, None, None]
        return F.silu(y)

    check(buffer[:, 2:], eager(x.double(), shift.double(), scale.double()), eager(x, shift, scale))
    assert not buffer[:, :2].any()


# -- float8 ----------------------------------------------------------------------------------------


def dequantised(rows: fused.Rows) -> Tensor:
    values, factor = rows
    assert values.dtype == fused.FLOAT8 and factor is not None
    return values.float() * factor


def test_rows_are_quantised_to_nearest() -> None:
    x = randn(7, 96) * torch.logspace(-6, 6, 7, device=DEVICE)[:, None]
    values, factor = fused.quantise_rows(x)
    assert torch.equal(values.float().abs().amax(-1), torch.full((7,), 448.0, device=DEVICE))
    # e4m3: half a step of 2^-3 for normal numbers, half of 2^-9 below them
    error = (values.float() - x / factor).abs()
    assert bool(
        (error <= torch.maximum(2**-4 * (x / factor).abs(), x.new_tensor(2**-10)) + 1e-6).all()
    )
    assert not fused.quantise_rows(torch.zeros(2, 8))[0].float().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_quantise_as_torch_does(dtype: torch.dtype) -> None:
    x, added, shift, scale = (
        randn(*shape, dtype=dtype) for shape in ((3, 5, 96), (3, 5, 96), (96,), (96,))
    )
    total, (normed, _) = fused.norm_modulate(
        x.float(), 1e-6, shift.float(), scale.float(), added.float()
    )
    found = fused.norm_modulate(
        x.float(), 1e-6, shift.float(), scale.float(), added.float(), float8=True
    )
    assert torch.equal(found[0], total)
    hidden = randn(4, 80, dtype=dtype)
    for rows, plain in (
        (found[1], normed),
        (fused.gelu_quantise(hidden), F.gelu(hidden.float(), approximate="tanh")),
    ):
        values, factor = fused.quantise_rows(plain)
        torch.testing.assert_close(rows[1], factor, rtol=1e-5, atol=0)
        same = rows[0].float() == values.float()
        normal = values.float().abs() >= 2**-6
        assert float(same[normal].float().mean()) > 0.99  # but for values at the edge of two
        assert float((dequantised(rows) - plain).abs().max()) <= 1.001 * float(
            (2**-4 * plain.abs()).max()
        )


@pytest.mark.parametrize("num_layers", [1, 3])
def test_products_in_float8_are_those_of_the_quantised_numbers(num_layers: int) -> None:
    layers = [torch.nn.Linear(64, 32).to(DEVICE, torch.bfloat16) for _ in range(num_layers)]
    x = randn(5, 16, 64)
    rows = fused.quantise_rows(x)
    found = fused._Product(layers, float8=True)(rows)
    weight = torch.cat([layer.weight for layer in layers])
    bias = torch.cat([layer.bias for layer in layers]).float()
    emulated = dequantised(rows) @ dequantised(fused.quantise_rows(weight)).T + bias
    assert found.dtype == torch.bfloat16 and found.shape == emulated.shape
    found, emulated = found.detach(), emulated.detach()
    assert (
        float((found.float() - emulated).norm() / emulated.norm()) < 4e-3
    )  # bfloat16 of the result
    exact = (x @ weight.float().T + bias).detach()
    assert 1e-3 < float((emulated - exact).norm() / exact.norm()) < 0.05  # what float8 itself costs


# -- whole networks --------------------------------------------------------------------------------


def student(
    dtype: torch.dtype = torch.float32, caption_channels: int | None = 12, **options: Any
) -> A2VDiT:
    shape = {"num_layers": 2, "num_attention_heads": 3, "attention_head_dim": 16}
    network = A2VDiT(
        in_channels=4, caption_channels=caption_channels, speech_dim=8, attention="chunked",
        cache_options=CacheOptions(chunk_length=2, **options), **shape,
    )  # fmt: skip
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 0.5)
    return network.to(DEVICE, dtype).requires_grad_(False)


def stream(
    network: A2VDiT, num_tokens: int = 2, num_chunks: int = 3, rows: int = 2
) -> list[Tensor]:
    """Velocities of some chunks of two steps each, the first a short one; then the cache."""
    generator = torch.Generator().manual_seed(0)
    dtype = network.proj_in.weight.dtype

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    found = []
    with torch.inference_mode():
        cache = network.new_cache(rows, 1, 2, num_steps=2)
        text = network.project_text(draw(rows, 5, 12)) if network.caption_channels else None
        reference = draw(rows, 4, 1, 1, 2)
        if cache.options.reference_attends == "self":
            network.prefill(reference, cache, text_embeds=text)
        for chunk in range(num_chunks):
            frames = 2 if chunk else 1
            given = cache.reference_expected
            latents, speech = draw(rows, 4, frames, 1, 2), draw(rows, frames, num_tokens, 8)
            if given:
                latents, speech = (
                    torch.cat([reference, latents], 2),
                    torch.cat([speech[:, :1] * 0, speech], 1),
                )
            condition = network.project_speech(speech)
            for step in range(2):
                level = torch.full(
                    (rows, latents.shape[2]) if given else (1, 1), 0.9 - 0.4 * step, device=DEVICE
                )
                embedding = network.embed_sigma(level)
                found.append(
                    network(latents, embedding, condition, text, cache=cache, step=step).clone()
                )
            cache.commit()
        return [*found, cache.keys.clone(), cache.values.clone()]


@pytest.mark.parametrize(
    ("options", "caption_channels", "num_tokens", "dtype"),
    [
        ({}, 12, 2, torch.float32),
        ({}, 12, 2, torch.bfloat16),
        ({}, None, 3, torch.float32),
        ({"reference_attends": "first_chunk"}, 12, 2, torch.float32),
        ({"cache_noise": "per_step", "positions": "absolute"}, None, 9, torch.float32),
        ({"cache_noise": "per_step", "positions": "absolute"}, None, 9, torch.bfloat16),
        ({"use_sink": False, "first_chunk_slot": "adjacent"}, 12, 1, torch.float32),
        ({"use_context": False}, 12, 2, torch.float32),
    ],
    ids=str,
)
def test_a_fused_transformer_streams_what_the_eager_one_does(
    options: dict[str, Any], caption_channels: int | None, num_tokens: int, dtype: torch.dtype
) -> None:
    network = student(caption_channels=caption_channels, **options)
    num_chunks = 2 if options else 3  # from the third on a chunk leaves the cache
    exact = stream(copy.deepcopy(network).double(), num_tokens, num_chunks)
    network = network.to(dtype)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    twin = fused.fused_transformer(network)
    for found, precise, eager in zip(
        stream(twin, num_tokens, num_chunks),
        exact,
        stream(network, num_tokens, num_chunks),
        strict=True,
    ):
        error, allowed = (
            float((x.double() - precise).norm() / precise.norm()) for x in (found, eager)
        )
        assert found.shape == eager.shape and precise.norm() > 0
        assert error <= 1e-5 if dtype == torch.float32 else error <= SLACK * allowed
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_the_kernels_are_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, int] = {}

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return function(*args, **kwargs)

        return call

    for name in ("norm_modulate", "rotate_store", "few_key_weights"):
        monkeypatch.setattr(fused, name, counted(name, getattr(fused, name)))
    stream(fused.fused_transformer(student()))
    # 3 chunks of 2 steps through 2 blocks; the prefill's two calls are the speech attention's alone
    assert calls == {"norm_modulate": 3 * 12, "rotate_store": 12, "few_key_weights": 12 + 2}


def test_weights_are_shared_with_the_eager_transformer() -> None:
    network = student()
    twin = fused.fused_transformer(network)
    own = {value.data_ptr() for value in network.state_dict().values()}
    assert {value.data_ptr() for value in twin.state_dict().values()} == own


def test_float8_costs_what_its_rounding_costs() -> None:
    network = student(torch.bfloat16)
    exact, eager = stream(copy.deepcopy(network).double()), stream(network)
    found = stream(fused.fused_transformer(network, float8=True))
    for rounded, precise, plain in list(zip(found, exact, eager, strict=True))[:6]:
        error, bfloat16 = (
            float((x.double() - precise).norm() / precise.norm()) for x in (rounded, plain)
        )
        assert bfloat16 < error < 0.25


@pytest.mark.parametrize("version", ["0.9.0", "0.9.1", "0.9.5"])
@pytest.mark.parametrize(("dtype", "batch"), [(torch.float32, 2), (torch.bfloat16, 1)], ids=str)
def test_a_fused_vae_decodes_what_the_eager_one_does(
    version: str, dtype: torch.dtype, batch: int
) -> None:
    vae = make_vae(version).to(DEVICE, dtype)
    twin = fused.fused_vae(vae)
    latents = random_latents(vae, 4, batch).to(DEVICE, dtype)
    with torch.inference_mode():
        for decode in (LTXVideoVAE.decode, partial(streamed_decode, chunk_length=2)):
            found, eager = decode(twin, latents), decode(vae, latents)
            if dtype == torch.float32:
                assert_close(found, eager, 3e-5)
            else:
                exact = decode(copy.deepcopy(vae).float(), latents.float())
                error, allowed = (float((x.float() - exact).norm()) for x in (found, eager))
                assert error <= SLACK * allowed
    blocks = [
        m
        for m in twin.ltx.decoder.modules()
        if isinstance(m.__dict__.get("forward"), fused._ResnetBlock)
    ]
    assert len(blocks) >= 3 and not any("forward" in m.__dict__ for m in vae.ltx.decoder.modules())
    weights = [m.weight for m in twin.ltx.decoder.modules() if isinstance(m, torch.nn.Conv3d)]
    assert all(weight.is_contiguous(memory_format=torch.channels_last_3d) for weight in weights)


def test_decoders_that_look_ahead_or_inject_noise_keep_their_eager_blocks() -> None:
    for vae in (make_vae("0.9.0", causal=False), make_vae("0.9.1", decode_noise_scale=0.1)):
        twin = fused.fused_vae(vae)
        latents = random_latents(vae, 3, 1)
        with torch.inference_mode():
            assert_close(twin.decode(latents), vae.decode(latents), 3e-5)


@pytest.mark.slow
def test_kernels_compile_for_a_gpu_that_is_not_there(repository: Path) -> None:
    script = repository / "tests" / "helpers" / "compile_kernels.py"
    environment = {**os.environ, "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = [line.split() for line in done.stdout.splitlines()]
    assert len(compiled) == 10 and len({name for name, _ in compiled}) == 5
    assert all(int(num_bytes) > 1000 for _, num_bytes in compiled)
