"""What the tests of the A2V-DiT share: tiny students, clips, and the student written out once
more.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rest_lightning.models.cache import CacheOptions, IDContextCache
from rest_lightning.models.transformer import A2VDiT
from rest_lightning.torchvision_compat import ensure_torchvision

SPEECH_DIM, TEXT_DIM, CHANNELS = 10, 12, 6


def make_student(seed: int = 0, num_layers: int = 2, text: bool = False, **options: Any) -> A2VDiT:
    """A tiny student with random weights everywhere, so that no path is hidden behind a zero
    start.
    """
    torch.manual_seed(seed)
    model = A2VDiT(
        in_channels=CHANNELS,
        num_layers=num_layers,
        num_attention_heads=2,
        attention_head_dim=10,
        caption_channels=TEXT_DIM if text else None,
        speech_dim=SPEECH_DIM,
        attention="chunked",
        cache_options=CacheOptions(**options),
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def make_clip(
    model: A2VDiT,
    num_chunks: int,
    height: int = 2,
    width: int = 3,
    batch: int = 2,
    speech: bool = True,
) -> dict[str, Any]:
    """Random inputs of a whole clip; one sigma per chunk, 0 for the reference."""
    length = model.cache_options.chunk_length
    frames = 1 + num_chunks * length
    shared = model.cache_options.cache_noise == "per_step"
    sigma = (
        torch.rand(batch, 1 if shared else num_chunks)
        .expand(-1, num_chunks)
        .repeat_interleave(length, 1)
    )
    has_text = model.caption_channels is not None
    return {
        "noisy_latents": torch.randn(batch, CHANNELS, frames, height, width),
        "sigma": torch.cat([torch.zeros(batch, 1), sigma], 1),
        "speech_latents": torch.randn(batch, frames, 2, SPEECH_DIM) if speech else None,
        "text_embeds": torch.randn(batch, 5, TEXT_DIM) if has_text else None,
        "text_mask": (torch.arange(5) < torch.tensor([[3]] * batch)).float() if has_text else None,
    }


def clean_latents(clip: dict[str, Any]) -> Tensor:
    """Some context that shares the reference with the noisy clip."""
    clean = torch.randn(clip["noisy_latents"].shape, generator=torch.Generator().manual_seed(7))
    clean[:, :, 0] = clip["noisy_latents"][:, :, 0].float()
    return clean.to(clip["noisy_latents"].dtype)


def parallel(model: A2VDiT, clip: dict[str, Any]) -> Tensor:
    """All chunks in one forward."""
    clean = clean_latents(clip) if model.cache_options.cache_noise == "clean_pass" else None
    return model(**clip, context_latents=clean)


def sequential(
    model: A2VDiT,
    clip: dict[str, Any],
    cache: IDContextCache,
    lengths: list[int] | None = None,
    prefill: bool = True,
) -> Tensor:
    """Chunk after chunk through a cache; returns the velocities of all frames but the reference."""
    options = model.cache_options
    latents, sigma, speech = clip["noisy_latents"], clip["sigma"], clip["speech_latents"]
    text = {"text_embeds": clip["text_embeds"], "text_mask": clip["text_mask"]}
    clean = clean_latents(clip)
    together = options.reference_attends != "self"
    if not together and prefill:
        model.prefill(latents[:, :, :1], cache, **text)
    out, start = [], 1
    for length in lengths or [options.chunk_length] * (
        (latents.shape[2] - 1) // options.chunk_length
    ):
        has_reference = cache.reference_expected
        frames = [0] * has_reference + list(range(start, start + length))
        condition = None if speech is None else speech[:, frames]
        velocity = model(latents[:, :, frames], sigma[:, frames], condition, **text, cache=cache)
        out.append(velocity[:, :, 1:] if has_reference else velocity)
        if options.cache_noise == "clean_pass":
            model(
                clean[:, :, frames],
                torch.zeros_like(sigma[:, frames]),
                condition,
                **text,
                cache=cache,
            )
        cache.commit()
        start += length
    return torch.cat(out, 2)


def exact_rotations(dim: int, frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """LTX's rotations in float64: cosines and sines ``(frames * height * width, dim)``."""
    axes = [
        torch.arange(count, dtype=torch.float64) * scale / base
        for count, scale, base in ((frames, 8 / 25, 20), (height, 32, 2048), (width, 32, 2048))
    ]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)
    exponents = torch.linspace(0.0, 1.0, dim // 6, dtype=torch.float64)
    phases = (10000.0**exponents * math.pi / 2)[:, None] * (2 * grid[:, None] - 1)
    phases = phases.flatten(1).repeat_interleave(2, 1)
    phases = torch.cat([phases.new_zeros(len(phases), dim % 6), phases], 1)
    return phases.cos().float().double(), phases.sin().float().double()  # as tables are kept


def definition(model: A2VDiT, clip: dict[str, Any], lengths: list[int] | None = None) -> Tensor:  # noqa: C901  # the whole network
    """The student by REST sec. 3.4, window by window and head by head, from nothing but the
    weights.
    """
    ensure_torchvision()
    from diffusers.models.embeddings import get_timestep_embedding
    from diffusers.models.transformers.transformer_ltx import LTXVideoRotaryPosEmbed

    options, heads, dim = model.cache_options, model.num_heads, model.dim
    weights = {name: value.double() for name, value in model.state_dict().items()}
    batch, _, num_frames, height, width = clip["noisy_latents"].shape
    n, chunk = height * width, options.chunk_length
    lengths = lengths or [chunk] * ((num_frames - 1) // chunk)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[name + ".weight"].T + weights[name + ".bias"]

    def rms(x: Tensor, eps: float, name: str | None = None) -> Tensor:
        normed = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        return normed if name is None else normed * weights[name + ".weight"]

    if options.positions == "absolute":
        cos, sin = exact_rotations(dim, num_frames + 2 * chunk, height, width)
    else:
        cos, sin = LTXVideoRotaryPosEmbed(dim)(
            torch.zeros(1), num_frames + 2 * chunk, height, width, (8 / 25, 32, 32)
        )
        cos, sin = cos[0].double(), sin[0].double()
    cos, sin = (x.unflatten(0, (-1, n)) for x in (cos, sin))

    def turn(x: Tensor, positions: list[int]) -> Tensor:
        """x (B, frames, n, dim) -> the same at the given positions."""
        swapped = torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2)
        return x * cos[positions] + swapped * sin[positions]

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
        """One head after the other over (B, tokens, dim)."""
        out, width = [], dim // heads
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            scores = q[..., part] @ k[..., part].transpose(-1, -2) / math.sqrt(width) + bias
            out.append(scores.softmax(-1) @ v[..., part])
        return torch.cat(out, -1)

    # Windows: for each chunk its frames and positions, and those of the frames that it reads from
    # the cache.
    starts = [1 + sum(lengths[:i]) for i in range(len(lengths))]
    absolute, together = options.positions == "absolute", options.reference_attends != "self"
    every, num_given = options.reference_attends == "every_chunk", num_frames
    if every:  # further copies of the reference behind the clip, one for each later chunk
        order = [*range(num_frames), *[0] * (len(lengths) - 1)]
        clean = clean_latents(clip)[:, :, order]
        clip = {
            name: value if value is None or name.startswith("text") else value[:, order]
            for name, value in {
                **clip,
                "noisy_latents": clip["noisy_latents"].transpose(1, 2),
            }.items()
        }
        clip["noisy_latents"] = clip["noisy_latents"].transpose(1, 2)
        num_frames = len(order)
    else:
        clean = clean_latents(clip)
    windows = []
    for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        own = list(range(start, start + length))
        first = 1 if options.first_chunk_slot == "adjacent" and i == 0 else 1 + chunk
        places = own if absolute else list(range(first, first + length))
        cached, cached_places = [], []
        if options.use_sink or i == 0:
            cached, cached_places = [0], [0]
        if options.use_context and i > 0:
            before = list(range(starts[i - 1], start))
            cached += before
            cached_places += before if absolute else list(range(1 + chunk - len(before), 1 + chunk))
        if together and (every or i == 0):
            own, places = [num_given + i - 1 if i else 0, *own], [0, *places]
            cached, cached_places = cached[1:], cached_places[1:]
        windows.append((own, places, cached, cached_places))
    if not together:
        windows.insert(0, ([0], [0], [], []))

    streams = [(clip["noisy_latents"], clip["sigma"])]
    if options.cache_noise == "clean_pass":
        streams.append((clean, torch.zeros_like(clip["sigma"])))
    xs, moods, finals = [], [], []
    for latents, sigma in streams:
        waves = get_timestep_embedding(
            (1000 * sigma).flatten(), 256, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        silu = torch.nn.functional.silu
        time = linear(waves.double(), "time_embed.emb.timestep_embedder.linear_1")
        time = linear(silu(time), "time_embed.emb.timestep_embedder.linear_2").unflatten(
            0, (batch, num_frames)
        )
        moods.append(linear(silu(time), "time_embed.linear").unflatten(-1, (6, dim)))
        finals.append(time)
        xs.append(linear(latents.double().flatten(3).permute(0, 2, 3, 1), "proj_in"))
    speech = clip["speech_latents"]
    speech = torch.zeros(batch, num_frames, 1, SPEECH_DIM) if speech is None else speech.clone()
    speech = speech.double()
    speech[:, [0, *range(num_given, num_frames)]] = 0
    text = clip["text_embeds"]
    if text is not None:
        text = torch.nn.functional.gelu(
            linear(text.double(), "caption_projection.linear_1"), approximate="tanh"
        )
        text = linear(text, "caption_projection.linear_2")
        text_bias = torch.where(clip["text_mask"].bool(), 0.0, -1e4)[:, None]

    for layer in range(model.num_layers):
        block = f"transformer_blocks.{layer}."
        mods = [
            (weights[block + "scale_shift_table"] + mood).unsqueeze(3).unbind(2) for mood in moods
        ]
        queries, keys, values = [], [], []
        for x, m in zip(xs, mods, strict=True):
            normed = rms(x, 1e-6) * (1 + m[1]) + m[0]
            queries.append(rms(linear(normed, block + "attn1.to_q"), 1e-5, block + "attn1.norm_q"))
            keys.append(rms(linear(normed, block + "attn1.to_k"), 1e-5, block + "attn1.norm_k"))
            values.append(linear(normed, block + "attn1.to_v"))
        for s, m in enumerate(mods):
            attended = torch.zeros_like(xs[s])
            for own, places, cached, cached_places in windows:
                context = keys[-1], values[-1]  # of the clean stream if there is one
                if cached == [0] and not together:
                    context = keys[s], values[s]  # the same: the reference sees itself only
                k = torch.cat(
                    [turn(context[0][:, cached], cached_places), turn(keys[s][:, own], places)], 1
                )
                v = torch.cat([context[1][:, cached], values[s][:, own]], 1)
                q = turn(queries[s][:, own], places)
                out = attention(*(z.flatten(1, 2) for z in (q, k, v)))
                attended[:, own] = out.unflatten(1, (len(own), n))
            x = xs[s] + linear(attended, block + "attn1.to_out.0") * m[2]
            if text is not None:
                q = rms(linear(x.flatten(1, 2), block + "attn2.to_q"), 1e-5, block + "attn2.norm_q")
                k = rms(linear(text, block + "attn2.to_k"), 1e-5, block + "attn2.norm_k")
                out = attention(q, k, linear(text, block + "attn2.to_v"), text_bias)
                x = x + linear(out, block + "attn2.to_out.0").view(x.shape)
            q = rms(
                linear(rms(x, 1e-6), block + "speech_attn.to_q"), 1e-5, block + "speech_attn.norm_q"
            )
            k = rms(linear(speech, block + "speech_attn.to_k"), 1e-5, block + "speech_attn.norm_k")
            x = x + linear(
                attention(q, k, linear(speech, block + "speech_attn.to_v")),
                block + "speech_attn.to_out.0",
            )
            hidden = linear(rms(x, 1e-6) * (1 + m[4]) + m[3], block + "ff.net.0.proj")
            hidden = torch.nn.functional.gelu(hidden, approximate="tanh")
            xs[s] = x + linear(hidden, block + "ff.net.2") * m[5]
    shift, scale = (weights["scale_shift_table"] + finals[0][:, :, None]).unsqueeze(3).unbind(2)
    x = torch.nn.functional.layer_norm(xs[0], (dim,), eps=1e-6) * (1 + scale) + shift
    velocity = linear(x, "proj_out")[:, :num_given]
    return velocity.permute(0, 3, 1, 2).unflatten(-1, (height, width))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    scale = max(1.0, float(expected.detach().abs().max()))
    assert float((actual - expected).detach().abs().max()) <= tolerance * scale


@pytest.fixture(scope="session")
def lab() -> SimpleNamespace:
    """The functions above (test files cannot import from each other)."""
    functions = (make_student, make_clip, parallel, sequential, definition, assert_close)
    return SimpleNamespace(**{function.__name__: function for function in functions})
