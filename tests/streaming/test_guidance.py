"""Guidance in the engine: each branch a row of its own, against a computation without any cache;
settings, errors.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rest_lightning.diffusion.sampling import Sampling, SamplingChanges
from rest_lightning.streaming.engine import ChunkEngine
from rest_lightning.streaming.packed import packed
from rest_lightning.talking_head import INDEX_FILE, TalkingHead

# guidance and reference_guidance: none, REST's, READ's
OFF, JOINT, SPLIT = (1.0, 0.0), (6.0, 0.0), (6.0, 2.0)


def settings(num_steps: int, weights: tuple[float, float], shift: float = 1.0) -> Sampling:
    return Sampling(num_steps, weights[0], shift, weights[1])


def inputs(
    head: TalkingHead, batch: int, num_chunks: int, seed: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    """Portraits (B, 3, H, W), noise (B, C, f, h, w) and speech latents (B, f, n, d), both without
    the reference.
    """
    generator = torch.Generator().manual_seed(seed)
    num_frames = num_chunks * head.transformer.cache_options.chunk_length
    portraits = torch.rand(batch, 3, 64, 64, generator=generator) * 2 - 1
    noise = torch.randn(batch, 4, num_frames, 2, 2, generator=generator)
    speech = torch.randn(batch, num_frames, 2, 8, generator=generator)
    return portraits, noise, speech


@torch.inference_mode()
def streamed(
    head: TalkingHead, sampling: Sampling, portraits: Tensor, noise: Tensor, speech: Tensor
) -> Tensor:
    engine = ChunkEngine(head, len(portraits), sampling)
    engine.switch_identity(portraits)
    length = engine.chunk_length
    chunks = zip(noise.split(length, dim=2), speech.split(length, dim=1), strict=True)
    return torch.cat([engine.denoise(*chunk) for chunk in chunks], dim=2)


@torch.inference_mode()
def uncached(
    head: TalkingHead, sampling: Sampling, portraits: Tensor, noise: Tensor, speech: Tensor
) -> Tensor:
    """The stream by REST's formula (sec. 3.5): each branch alone, every step a forward over all
    chunks so far, no cache.

    Earlier chunks stand in that forward as they were when their keys were made; which step's that
    is, ``cache_noise`` says.
    """
    model, length = head.transformer, head.transformer.cache_options.chunk_length
    kind = model.cache_options.cache_noise
    a, b = sampling.reference_guidance, sampling.guidance
    reference = head.vae.encode(portraits[:, :, None])
    none, silence = torch.zeros_like(reference), torch.zeros_like(speech)
    branches = [(b, reference, speech), (a, reference, silence), (1 - a - b, none, silence)]
    times = [1 - step / sampling.num_steps for step in range(sampling.num_steps + 1)]
    assert sampling.shift is not None
    table = [sampling.shift * time / (1 + (sampling.shift - 1) * time) for time in times]
    # per step: its input, chunk by chunk
    steps: list[list[Tensor]] = [[] for _ in range(sampling.num_steps)]
    clean: list[Tensor] = []
    for chunk in noise.split(length, dim=2):
        sample, num_past = chunk, length * len(clean)
        for step in range(sampling.num_steps):
            kept = step if kind == "per_step" else -1
            past, level = (clean, 0.0) if kind == "clean_pass" else (steps[kept], table[:-1][kept])
            sigma = torch.tensor([0.0] + [level] * num_past + [table[step]] * length).expand(
                len(noise), -1
            )
            velocity = torch.zeros_like(sample)
            for weight, sink, words in branches:
                rows = torch.cat([sink, *past[: len(clean)], sample], dim=2)
                said = torch.cat(
                    [torch.zeros_like(words[:, :1]), words[:, : num_past + length]], dim=1
                )
                context = (
                    torch.cat([sink, *clean, torch.zeros_like(sample)], dim=2)
                    if kind == "clean_pass"
                    else None
                )
                velocity += (
                    weight * model(rows, sigma, said, context_latents=context)[:, :, 1 + num_past :]
                )
            steps[step].append(sample)
            sample = sample + (table[step + 1] - table[step]) * velocity
        clean.append(sample)
    return torch.cat(clean, dim=2)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert float((actual - expected).abs().max()) <= tolerance * max(
        1.0, float(expected.abs().max())
    )


OPTIONS: list[dict[str, Any]] = [
    {},
    {"chunk_length": 1},
    {"chunk_length": 2, "first_chunk_slot": "adjacent"},
    {"cache_noise": "clean_pass"},
    {"cache_noise": "per_step"},
    {"reference_attends": "first_chunk"},
    {"reference_attends": "every_chunk"},
    {"positions": "absolute", "use_sink": False},
]


@pytest.mark.parametrize(
    ("options", "weights", "batch", "num_steps", "shift"),
    [
        *((options, weights, 2, 2, 3.0) for options in OPTIONS for weights in (OFF, JOINT, SPLIT)),
        *(({}, weights, 1, 1, 1.0) for weights in (SPLIT, (1.0, 0.5), (2.0, -1.0))),
        *(({"cache_noise": noise}, SPLIT, 3, 4, 1.0) for noise in ("last_step", "per_step")),
    ],
    ids=str,
)
def test_stream_equals_the_formula_without_a_cache(
    make: Callable[..., TalkingHead],
    options: dict[str, Any],
    weights: tuple[float, float],
    batch: int,
    num_steps: int,
    shift: float,
) -> None:
    head, sampling = make(**options), settings(num_steps, weights, shift)
    given = inputs(head, batch, num_chunks=3)
    assert_close(streamed(head, sampling, *given), uncached(head, sampling, *given))


@pytest.mark.parametrize("weights", [OFF, JOINT, SPLIT], ids=str)
def test_a_stream_of_a_batch_is_the_stream_alone(
    head: TalkingHead, weights: tuple[float, float]
) -> None:
    sampling = settings(2, weights)
    given = inputs(head, 3, num_chunks=3)
    together = streamed(head, sampling, *given)
    for row in range(3):
        assert_close(
            together[row : row + 1], streamed(head, sampling, *(x[row : row + 1] for x in given))
        )


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("num_steps", [1, 3])
@torch.inference_mode()
def test_joint_guidance_is_two_rows_and_a_lerp_bit_for_bit(
    head: TalkingHead, batch: int, num_steps: int
) -> None:
    # the kernels that a session uses
    sampling, model = settings(num_steps, JOINT), packed(head.transformer)
    portraits, noise, speech = inputs(head, batch, num_chunks=3)
    cache = model.new_cache(2 * batch, 2, 2)
    reference = packed(head.vae).encode(portraits[:, :, None])
    model.prefill(torch.cat([reference, torch.zeros_like(reference)]), cache)
    table = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64).float()
    chunks = []
    for sample, words in zip(noise.split(3, dim=2), speech.split(3, dim=1), strict=True):
        condition = model.project_speech(torch.cat([words, torch.zeros_like(words)]))
        for step in range(num_steps):
            level = head.transformer.embed_sigma(table[step].view(1, 1))
            conditional, unconditional = model(
                torch.cat([sample, sample]), level, condition, cache=cache
            ).chunk(2)
            sample = sample + (table[step + 1] - table[step]) * torch.lerp(
                unconditional, conditional, 6.0
            )
        cache.commit()
        chunks.append(sample)
    assert torch.equal(streamed(head, sampling, portraits, noise, speech), torch.cat(chunks, dim=2))


def frames_of(head: TalkingHead, num_frames: int = 50, **options: Any) -> np.ndarray:
    samples = np.random.default_rng(1).normal(scale=0.2, size=num_frames * 640).astype(np.float32)
    portrait = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    session = head.open(portrait, **options)
    first = session.push(samples[:30_000])
    state = session.snapshot()
    rest = np.concatenate([session.push(samples[30_000:]), session.flush()])
    session.restore(state)
    again = np.concatenate([session.push(samples[30_000:]), session.flush()])
    assert np.array_equal(again, rest)
    return np.concatenate([first, rest])


@pytest.mark.parametrize("reference_attends", ["self", "first_chunk"])
def test_session_takes_its_guidance(
    make: Callable[..., TalkingHead], reference_attends: str
) -> None:
    head = make(reference_attends=reference_attends)
    videos = [frames_of(head, guidance=a, reference_guidance=b) for a, b in (OFF, JOINT, SPLIT)]
    assert all(video.shape == (50, 64, 64, 3) for video in videos)
    assert len({video.tobytes() for video in videos}) == 3
    session = head.open(torch.zeros(3, 64, 64), guidance=6.0, reference_guidance=2.0, shift=2.0)
    assert session.engine.cache.rows == 3
    configuration = session.report().configuration
    expected = {"num_steps": 2, "guidance": 6.0, "reference_guidance": 2.0, "shift": 2.0}
    assert {name: configuration[name] for name in expected} == expected


def test_settings_travel_with_the_model(make: Callable[..., TalkingHead], tmp_path: Path) -> None:
    head = make()
    head.sampling = settings(3, SPLIT)
    head.save_pretrained(tmp_path / "model")
    loaded = TalkingHead.from_pretrained(tmp_path / "model")
    assert loaded.sampling == head.sampling
    assert np.array_equal(frames_of(loaded), frames_of(head))

    # as it was written before there was split guidance
    index_file = tmp_path / "model" / INDEX_FILE
    index = json.loads(index_file.read_text())
    del index["sampling"]["reference_guidance"]
    index_file.write_text(json.dumps(index))
    older = TalkingHead.from_pretrained(tmp_path / "model")
    assert older.sampling == replace(head.sampling, reference_guidance=0.0)
    assert np.array_equal(frames_of(older), frames_of(head, reference_guidance=0.0))


def test_changes_keep_what_they_do_not_name() -> None:
    own = settings(3, SPLIT, shift=2.0)
    assert SamplingChanges().of(own) == own
    assert SamplingChanges(guidance=1.0, reference_guidance=0.0).of(own) == settings(
        3, OFF, shift=2.0
    )
    assert SamplingChanges(num_steps=4, shift=1.0).of(own) == settings(4, SPLIT)
    by_speech = settings(3, (4.0, -3.0))
    assert SamplingChanges(guidance=2.5).of(by_speech) == settings(3, (2.5, -1.5))
    assert SamplingChanges(guidance=1.0).of(by_speech) == settings(3, OFF)
    assert SamplingChanges(guidance=6.0, reference_guidance=2.0).of(by_speech) == settings(3, SPLIT)
    assert SamplingChanges(guidance=6.0).of(settings(3, OFF)) == settings(3, JOINT)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_steps": 0}, r"expected 1 to 1000 denoising steps \(at least 1\), got 0: 8 is"),
        (
            {"guidance": float("nan")},
            "expected a finite guidance of at most 100, got nan: READ's are 6 and 2",
        ),
        (
            {"reference_guidance": float("inf")},
            "expected a finite reference_guidance of at most 100, got inf: READ's are 6 and 2",
        ),
        (
            {"shift": 0.0},
            r"expected a positive shift of the sigma table \(0.001 to 1000\), got 0.0: "
            "1 leaves it straight",
        ),
        (
            {"shift": float("nan")},
            r"expected a positive shift of the sigma table \(0.001 to 1000\), got nan",
        ),
    ],
)
def test_bad_settings(head: TalkingHead, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)
    with pytest.raises(ValueError, match=message):
        head.open(torch.zeros(3, 64, 64), **wrong)
