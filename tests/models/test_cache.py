"""The student: parallel form, cached form and its definition (conftest.py, float64) agree; the
cache's own promises.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks._differentiable_cache import DifferentiableCache
from rest_lightning.models.cache import CacheOptions
from rest_lightning.models.transformer import A2VDiT

OPTIONS = {
    "default": {},
    "absolute": {"positions": "absolute"},
    "no_sink": {"use_sink": False},
    "no_context": {"use_context": False},
    "no_sink_no_context": {"use_sink": False, "use_context": False},
    "first_chunk": {"reference_attends": "first_chunk"},
    "every_chunk": {"reference_attends": "every_chunk"},
    "every_chunk_clean_absolute": {
        "reference_attends": "every_chunk",
        "cache_noise": "clean_pass",
        "positions": "absolute",
    },
    "every_chunk_adjacent_no_context": {
        "reference_attends": "every_chunk",
        "first_chunk_slot": "adjacent",
        "use_context": False,
    },
    "clean_pass": {"cache_noise": "clean_pass"},
    "per_step": {"cache_noise": "per_step"},
    "detached": {"cache_gradient": "detached"},
    "adjacent": {"first_chunk_slot": "adjacent"},
    "first_chunk_clean_detached": {
        "reference_attends": "first_chunk",
        "cache_noise": "clean_pass",
        "cache_gradient": "detached",
    },
    "absolute_first_chunk_no_sink": {
        "positions": "absolute",
        "reference_attends": "first_chunk",
        "use_sink": False,
    },
    "adjacent_no_context": {"first_chunk_slot": "adjacent", "use_context": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize(
    ("num_chunks", "chunk_length", "height", "width", "speech", "text"),
    [
        (2, 1, 4, 4, True, True),
        (3, 2, 2, 3, False, False),
        (4, 3, 1, 2, True, False),
    ],
)
def test_parallel_cached_and_definition_agree(
    lab: SimpleNamespace,
    options: dict[str, Any],
    num_chunks: int,
    chunk_length: int,
    height: int,
    width: int,
    speech: bool,
    text: bool,
) -> None:
    model = lab.make_student(text=text, chunk_length=chunk_length, **options)
    clip = lab.make_clip(model, num_chunks, height, width, speech=speech)
    expected = lab.definition(model, clip)
    with torch.no_grad():
        lab.assert_close(lab.parallel(model, clip), expected)
        cache = model.new_cache(2, height, width)
        lab.assert_close(lab.sequential(model, clip, cache), expected[:, :, 1:])
        masked = model.new_cache(2, height, width, always_mask=True)
        lab.assert_close(lab.sequential(model, clip, masked), expected[:, :, 1:])
    model, clip = model.double(), {k: v if v is None else v.double() for k, v in clip.items()}
    with torch.no_grad():
        clip["sigma"] = clip["sigma"].float().double()
        lab.assert_close(lab.parallel(model, clip), expected, 1e-10)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize(
    ("num_chunks", "chunk_length", "height", "width", "speech", "text"),
    [
        (2, 3, 2, 3, False, True),
        (4, 2, 2, 3, True, False),
    ],
)
def test_gradients_of_parallel_and_sequential_agree(
    lab: SimpleNamespace,
    options: dict[str, Any],
    num_chunks: int,
    chunk_length: int,
    height: int,
    width: int,
    speech: bool,
    text: bool,
) -> None:
    model = lab.make_student(text=text, chunk_length=chunk_length, **options)
    clip = lab.make_clip(model, num_chunks, height, width, speech=speech)
    inputs = [
        clip[k].requires_grad_() for k in ("noisy_latents", "speech_latents") if clip[k] is not None
    ]
    weight = torch.randn(clip["noisy_latents"][:, :, 1:].shape)
    wanted = [*inputs, *model.parameters()]

    def gradients(velocity: Tensor) -> list[Tensor]:
        found = torch.autograd.grad((velocity * weight).mean(), wanted, allow_unused=True)
        return [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found, strict=True)]

    one, many = (
        lab.parallel(model, clip)[:, :, 1:],
        lab.sequential(model, clip, model.new_cache(2, height, width, kind=DifferentiableCache)),
    )
    lab.assert_close(many, one)
    for a, b in zip(gradients(one), gradients(many), strict=True):
        lab.assert_close(b, a)


@pytest.mark.parametrize("lengths", [[1, 3, 3], [3, 3, 1], [2], [1, 1, 2], [3, 1, 3]])
@pytest.mark.parametrize(
    "options", [{}, {"positions": "absolute"}, {"first_chunk_slot": "adjacent"}], ids=str
)
def test_short_chunks(lab: SimpleNamespace, lengths: list[int], options: dict[str, Any]) -> None:
    model = lab.make_student(**options)
    clip = lab.make_clip(model, 3)
    frames = 1 + sum(lengths)
    clip.update(
        noisy_latents=clip["noisy_latents"][:, :, :frames],
        sigma=torch.rand(2, frames) * (torch.arange(frames) > 0),
        speech_latents=clip["speech_latents"][:, :frames],
    )
    cache = model.new_cache(2, 2, 3)
    with torch.no_grad():
        lab.assert_close(
            lab.sequential(model, clip, cache, lengths),
            lab.definition(model, clip, lengths)[:, :, 1:],
        )


@pytest.mark.parametrize("chunk_length", [1, 2, 3])
def test_a_chunk_sees_itself_its_predecessor_and_the_reference(
    lab: SimpleNamespace, chunk_length: int
) -> None:
    # One block: deeper ones see further back, since the predecessor's keys have seen its own
    # predecessor.
    model = lab.make_student(num_layers=1, chunk_length=chunk_length)
    clip = lab.make_clip(model, 4)
    latents = clip["noisy_latents"].requires_grad_()
    velocity = lab.parallel(model, clip)
    for chunk in range(4):
        frames = slice(1 + chunk * chunk_length, 1 + (chunk + 1) * chunk_length)
        (gradient,) = torch.autograd.grad(
            velocity[:, :, frames].square().sum(), latents, retain_graph=True
        )
        seen = gradient.abs().sum((0, 1, 3, 4)) > 0
        chunks = [0, *[1 + frame // chunk_length for frame in range(4 * chunk_length)]]
        assert seen.tolist() == [c in (0, chunk, chunk + 1) for c in chunks]


@pytest.mark.parametrize("options", [{}, {"positions": "absolute"}, {"use_sink": False}], ids=str)
def test_rows_are_independent_streams(lab: SimpleNamespace, options: dict[str, Any]) -> None:
    model = lab.make_student(**options)
    clip = lab.make_clip(model, 3, batch=3)
    rows = [{k: v if v is None else v[i : i + 1] for k, v in clip.items()} for i in range(3)]
    with torch.no_grad():
        alone = [lab.sequential(model, row, model.new_cache(1, 2, 3)) for row in rows]
        together = lab.sequential(model, clip, model.new_cache(3, 2, 3))
        lab.assert_close(together, torch.cat(alone))

        # Row 1 starts anew after one chunk, with another reference; rows 0 and 2 go on.
        cache = model.new_cache(3, 2, 3)
        latents, sigma, speech = clip["noisy_latents"], clip["sigma"], clip["speech_latents"]
        model.prefill(latents[[0, 0, 2], :, :1], cache)
        for chunk in range(3):
            if chunk == 1:
                cache.reset_rows([1])
                model.prefill(latents[[1], :, :1], cache, rows=[1])
            shift = [chunk, chunk - 1 if chunk else 0, chunk]
            parts = [slice(1 + 3 * s, 4 + 3 * s) for s in shift]
            velocity = model(
                torch.stack([latents[i, :, p] for i, p in enumerate(parts)]),
                torch.stack([sigma[i, p] for i, p in enumerate(parts)]),
                torch.stack([speech[i, p] for i, p in enumerate(parts)]),
                cache=cache,
            )
            cache.commit()
            for i in (0, 2) if chunk == 0 else (0, 1, 2):
                lab.assert_close(velocity[i], alone[i][0, :, 3 * shift[i] : 3 * shift[i] + 3])


def test_copy_rows_moves_a_stream(lab: SimpleNamespace) -> None:
    model = lab.make_student(reference_attends="first_chunk")
    clip = lab.make_clip(model, 3, batch=2)
    rows = [{k: v if v is None else v[i : i + 1] for k, v in clip.items()} for i in range(2)]
    with torch.no_grad():
        expected = lab.sequential(model, clip, model.new_cache(2, 2, 3))
        shared = model.new_cache(2, 2, 3)
        for row in range(2):
            single = model.new_cache(1, 2, 3)
            first = {
                k: v if v is None else v[:, :, :4] if k == "noisy_latents" else v[:, :4]
                for k, v in rows[row].items()
            }
            lab.sequential(model, first, single)
            shared.copy_rows_([(row, single, 0)])
        frames = slice(4, 7)
        velocity = model(
            clip["noisy_latents"][:, :, frames],
            clip["sigma"][:, frames],
            clip["speech_latents"][:, frames],
            cache=shared,
        )
        lab.assert_close(velocity, expected[:, :, 3:6])


def test_snapshot_and_restore_are_bit_identical(lab: SimpleNamespace) -> None:
    model = lab.make_student()
    clip = lab.make_clip(model, 1)
    part = (clip["noisy_latents"][:, :, 1:], clip["sigma"][:, 1:], clip["speech_latents"][:, 1:])
    cache = model.new_cache(2, 2, 3)
    with torch.inference_mode():
        model.prefill(clip["noisy_latents"][:, :, :1], cache)
        model(*part, cache=cache)
        cache.commit()
        state = cache.snapshot()
        results = []
        for _ in range(2):
            for _ in range(2):
                velocity = model(*part, cache=cache)
                cache.commit()
            results.append(
                (velocity, cache.keys.clone(), cache.values.clone(), list(cache.num_frames))
            )
            cache.restore(state)
    assert all(torch.equal(a, b) for a, b in zip(results[0][:3], results[1][:3], strict=True))
    assert results[0][3] == results[1][3]
    assert cache.num_frames == [3, 3]
    with pytest.raises(ValueError, match="of another model or size"):
        model.new_cache(1, 2, 3).restore(state)


def test_chunk_10_and_chunk_1000_are_the_same_program(lab: SimpleNamespace) -> None:
    model = lab.make_student()
    clip = lab.make_clip(model, 1, batch=1)
    part = (clip["noisy_latents"][:, :, 1:], clip["sigma"][:, 1:], clip["speech_latents"][:, 1:])
    cache = model.new_cache(1, 2, 3)
    velocities, places = [], set()
    with torch.inference_mode():
        model.prefill(clip["noisy_latents"][:, :, :1], cache)
        # the same input for ever: each block forgets what came before the previous chunk
        for _ in range(60):
            velocities.append(model(*part, cache=cache))
            cache.commit()
            places.add(
                (
                    cache.keys.data_ptr(),
                    cache.values.data_ptr(),
                    cache.rotation.data_ptr(),
                    cache.nbytes,
                )
            )
        cache.restore({**cache.snapshot(), "num_frames": [3 * 999]})
        velocities.append(model(*part, cache=cache))
    assert torch.equal(velocities[9], velocities[59])
    assert torch.equal(velocities[9], velocities[60])
    assert len(places) == 1
    assert len(cache._views) == 2  # the first chunk's window, and that of all others


@pytest.mark.parametrize("num_steps", [2, 3])
def test_per_step_reads_the_previous_chunk_of_the_same_step(
    lab: SimpleNamespace, num_steps: int
) -> None:
    model = lab.make_student(cache_noise="per_step")
    clip = lab.make_clip(model, 2)
    sigmas = torch.linspace(1, 0.2, num_steps)
    cache = model.new_cache(2, 2, 3, num_steps=num_steps)
    with torch.no_grad():
        model.prefill(clip["noisy_latents"][:, :, :1], cache)
        for chunk in range(2):
            frames = slice(1 + 3 * chunk, 4 + 3 * chunk)
            for step, value in enumerate(sigmas):
                sigma = value.expand(2, 3)
                latents, speech = (
                    clip["noisy_latents"][:, :, frames] * value,
                    clip["speech_latents"][:, frames],
                )
                velocity = model(latents, sigma, speech, cache=cache, step=step)
                noisy = clip["noisy_latents"] * value
                noisy[:, :, 0] = clip["noisy_latents"][:, :, 0]
                whole = clip["sigma"].clone().fill_(value)
                whole[:, 0] = 0
                lab.assert_close(
                    velocity, model(noisy, whole, clip["speech_latents"])[:, :, frames]
                )
            cache.commit()
    with pytest.raises(ValueError, match=f"expected a step below {num_steps}, got {num_steps}"):
        model(latents, sigma, speech, cache=cache, step=num_steps)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"positions": "relative"},
            ("expected positions to be one of window, absolute, got 'relative'"),
        ),
        (
            {"cache_noise": "none"},
            ("expected cache_noise to be one of last_step, clean_pass, per_step"),
        ),
        ({"chunk_length": 0}, "expected chunk_length of at least 1, got 0"),
        (
            {"positions": "absolute", "first_chunk_slot": "adjacent"},
            ("expected first_chunk_slot `current`"),
        ),
    ],
)
def test_bad_options(lab: SimpleNamespace, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CacheOptions(**arguments)


def test_bad_use(lab: SimpleNamespace) -> None:
    model = lab.make_student()
    clip = lab.make_clip(model, 2)
    latents, sigma = clip["noisy_latents"], clip["sigma"]
    cache = model.new_cache(2, 2, 3)
    with pytest.raises(ValueError, match="expected a chunk before commit"):
        cache.commit()
    with pytest.raises(ValueError, match=r"expected torch.no_grad\(\)"):
        model(latents[:, :, 1:4], sigma[:, 1:4], cache=cache)
    with pytest.raises(ValueError, match="expected 1 to 3 latent frames of one chunk, got 4"):
        model(latents[:, :, :4], sigma[:, :4], cache=cache)
    with pytest.raises(ValueError, match=r"\(rows, h, w\) = \(2, 2, 3\), got \(1, 2, 3\)"):
        model(latents[:1, :, :3], sigma[:1, :3], cache=cache)
    with pytest.raises(ValueError, match="expected a row from 0 to 1, got 2"):
        cache.reset_rows([2])
    with pytest.raises(ValueError, match=r"expected a reference_latent of shape \(1, 6, 1, 2, 3\)"):
        model.prefill(latents[:, :, :1], cache, rows=[0])
    other = lab.make_student(use_sink=False)
    with pytest.raises(ValueError, match="expected a cache of this very model"):
        other(latents[:, :, 1:4], sigma[:, 1:4], cache=cache)
    with pytest.raises(ValueError, match="got another: allocate both alike"):
        cache.copy_rows_([(0, other.new_cache(1, 2, 3), 0)])
    teacher = A2VDiT.from_config({**model.config, "attention": "full"})
    with pytest.raises(ValueError, match=r"got a teacher: use teacher.to_student\(\)"):
        teacher.new_cache(2, 2, 3)
    joint = lab.make_student(reference_attends="first_chunk")
    with pytest.raises(ValueError, match="expected reference_attends=self for prefill"):
        joint.prefill(latents[:, :, :1], joint.new_cache(2, 2, 3))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("num_chunks", "chunk_length", "height", "width"), [(1, 3, 2, 3), (3, 2, 2, 3), (2, 1, 4, 4)]
)
def test_bfloat16_stays_near_the_definition(
    lab: SimpleNamespace, masked: bool, num_chunks: int, chunk_length: int, height: int, width: int
) -> None:
    model = lab.make_student(text=True, chunk_length=chunk_length).bfloat16()
    clip = lab.make_clip(model, num_chunks, height, width)
    clip = {k: v if v is None or k == "sigma" else v.bfloat16() for k, v in clip.items()}
    exact = lab.definition(
        model.double(), {k: v if v is None else v.double() for k, v in clip.items()}
    )[:, :, 1:]
    model.bfloat16()
    cache = model.new_cache(2, height, width, always_mask=masked)
    assert cache.keys.dtype == torch.bfloat16
    with torch.no_grad():
        found = lab.sequential(model, clip, cache)
    assert found.dtype == torch.bfloat16
    assert float((found.double() - exact).square().mean().sqrt() / exact.std()) < 0.03


@pytest.mark.parametrize(("num_chunks", "height", "width"), [(1, 2, 3), (3, 2, 3), (4, 4, 4)])
def test_autocast_stays_near_the_definition(
    lab: SimpleNamespace, num_chunks: int, height: int, width: int
) -> None:
    model = lab.make_student(text=True)
    clip = lab.make_clip(model, num_chunks, height, width)
    exact = lab.definition(model, clip)[:, :, 1:]
    with torch.autocast("cpu", torch.bfloat16):
        one = lab.parallel(model, clip)[:, :, 1:]
        many = lab.sequential(
            model, clip, model.new_cache(2, height, width, kind=DifferentiableCache)
        )
    for found in (one.detach(), many.detach()):
        assert float((found.double() - exact).square().mean().sqrt() / exact.std()) < 0.03
    gradients = [
        torch.autograd.grad(x.float().square().mean(), list(model.parameters()))
        for x in (one, many)
    ]
    for a, b in zip(*gradients, strict=True):
        assert float((a - b).norm()) <= 0.1 * float(a.norm()) + 1e-6
