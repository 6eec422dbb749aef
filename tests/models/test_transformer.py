"""A2V-DiT: configuration, conditions, shared work, and what it says about wrong input."""

from __future__ import annotations

import copy
import json
import pickle
from types import SimpleNamespace
from typing import Any

import jsonargparse
import pytest
import torch

from rest_lightning.models.attention import Rope, rotate
from rest_lightning.models.blocks import precondition
from rest_lightning.models.cache import CacheOptions
from rest_lightning.models.transformer import A2VDiT

TINY: dict[str, Any] = {
    "in_channels": 6,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "caption_channels": None,
    "speech_dim": 10,
}


def test_config_round_trip() -> None:
    options = CacheOptions(chunk_length=2, use_sink=False)
    model = A2VDiT(
        **TINY, spatial_embedding=(2, 3), attention="chunked", cache_options=options, fps=24
    )
    config = json.loads(json.dumps(model.config))
    again = A2VDiT.from_config(config)
    assert again.config == model.config
    assert again.cache_options == options
    again.load_state_dict(model.state_dict())
    with pytest.raises(TypeError, match="unknown"):
        A2VDiT.from_config({**config, "unknown": 1})


def test_the_command_line_can_build_it() -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--model", type=A2VDiT)
    arguments = {
        **TINY,
        "spatial_embedding": [2, 3],
        "cache_options": {"chunk_length": 1, "cache_gradient": "detached"},
    }
    text = json.dumps(
        {"class_path": "rest_lightning.models.transformer.A2VDiT", "init_args": arguments}
    )
    model = parser.instantiate(parser.parse_args([f"--model={text}"])).model
    assert model.cache_options == CacheOptions(chunk_length=1, cache_gradient="detached")
    assert model.spatial_size == (2, 3)
    with pytest.raises(jsonargparse.ArgumentError, match="positions"):
        parser.parse_args([f"--model={text}", "--model.cache_options.positions=relative"])


def test_published_size_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = A2VDiT()
    names = set(model.state_dict())
    assert len(model.transformer_blocks) == 28
    assert model.dim == 2048
    assert "transformer_blocks.27.speech_attn.to_out.0.weight" in names
    ltx = sum(p.numel() for name, p in model.named_parameters() if "speech" not in name)
    assert ltx == 1_923_385_472  # LTX-Video 2B


@pytest.mark.parametrize("spatial", [None, (2, 3)])
def test_speech_attention_starts_at_zero_and_learns(
    lab: SimpleNamespace, spatial: tuple[int, int] | None
) -> None:
    torch.manual_seed(0)
    model = A2VDiT(**TINY, spatial_embedding=spatial)
    latents, sigma, speech = torch.randn(2, 6, 4, 2, 3), torch.rand(2, 4), torch.randn(2, 4, 2, 10)
    assert torch.equal(model(latents, sigma, speech), model(latents, sigma))
    model(latents, sigma, speech).square().mean().backward()
    for block in model.transformer_blocks:
        gradient = block.get_parameter("speech_attn.to_out.0.weight").grad
        assert gradient is not None
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("attention", ["full", "chunked"])
def test_frames_hear_their_own_speech_and_the_reference_none(
    attention: str, lab: SimpleNamespace
) -> None:
    model = A2VDiT.from_config({**lab.make_student(num_layers=1).config, "attention": attention})
    torch.nn.init.normal_(model.get_parameter("transformer_blocks.0.speech_attn.to_out.0.weight"))
    clip = lab.make_clip(model, 2)
    speech = clip["speech_latents"].requires_grad_()
    velocity = model(**clip)
    for frame in range(7):
        (gradient,) = torch.autograd.grad(
            velocity[:, :, frame].square().sum(), speech, retain_graph=True
        )
        heard = gradient.abs().sum((0, 2, 3)) > 0
        assert heard.tolist() == [frame == other and frame > 0 for other in range(7)]
    assert torch.equal(
        model(**{**clip, "speech_latents": None}), model(**{**clip, "speech_latents": 0 * speech})
    )


def test_a_student_starts_as_its_teacher(lab: SimpleNamespace) -> None:
    student = lab.make_student()
    teacher = A2VDiT.from_config({**student.config, "attention": "full"})
    teacher.load_state_dict(student.state_dict())
    again = teacher.to_student(CacheOptions(first_chunk_slot="adjacent"))
    clip = lab.make_clip(student, 1)
    with torch.no_grad():
        assert not torch.equal(teacher(**clip), again(**clip))
        # One chunk next to the reference, computed together with it: the teacher's own window.
        options = CacheOptions(first_chunk_slot="adjacent", reference_attends="first_chunk")
        lab.assert_close(teacher.to_student(options)(**clip), teacher(**clip))


def test_embedded_sigmas_and_projected_conditions_give_the_same(lab: SimpleNamespace) -> None:
    model = lab.make_student(text=True)
    clip = lab.make_clip(model, 1)
    latents, speech = clip["noisy_latents"][:, :, 1:], clip["speech_latents"][:, 1:]
    with torch.no_grad():
        text = model.project_text(clip["text_embeds"], clip["text_mask"])
        caches = [model.new_cache(2, 2, 3) for _ in range(2)]
        for cache in caches:
            model.prefill(clip["noisy_latents"][:, :, :1], cache, text_embeds=text)
        sigma = torch.full((2, 3), 0.4)
        plain = model(
            latents, sigma, speech, clip["text_embeds"], clip["text_mask"], cache=caches[0]
        )
        shared = model.embed_sigma(torch.tensor([[0.4]]))  # one level for all rows and frames
        prepared = model(latents, shared, model.project_speech(speech), text, cache=caches[1])
    lab.assert_close(prepared, plain, 1e-6)


def test_preconditioning_is_the_best_linear_guess() -> None:
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 200_000, generator=generator, dtype=torch.float64)
    for level in (0.0, 0.1, 0.5, 0.8, 1.0):
        noisy, velocity = (1 - level) * latents + level * noise, noise - latents
        slope = (noisy @ velocity) / (noisy @ noisy)  # least squares
        left = (velocity - slope * noisy).std()
        of_input, of_output = precondition(torch.tensor(level, dtype=torch.float64))
        assert float(of_input) == pytest.approx(float(slope), abs=0.02)
        assert float(of_output) == pytest.approx(float(left), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_preconditioned_network_adds_its_input(lab: SimpleNamespace, dtype: torch.dtype) -> None:
    plain = lab.make_student().to(dtype)
    model = A2VDiT.from_config({**plain.config, "preconditioned": True}).to(dtype)
    model.load_state_dict(plain.state_dict())
    clip = lab.make_clip(plain, 2)
    clip = {k: v if v is None or k == "sigma" else v.to(dtype) for k, v in clip.items()}
    with torch.no_grad():
        layers = plain(**clip)
        a, b = (x.to(dtype)[:, None] for x in precondition(clip["sigma"][:, :, None, None]))
        expected = a * clip["noisy_latents"] + b * layers
        assert model(**clip).dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        lab.assert_close(model(**clip), expected, tolerance)
        cache = model.new_cache(2, 2, 3)
        lab.assert_close(lab.sequential(model, clip, cache), expected[:, :, 1:], tolerance)


@pytest.mark.parametrize("attention", ["full", "chunked"])
def test_gradient_checkpointing_changes_nothing(attention: str, lab: SimpleNamespace) -> None:
    config = {**lab.make_student().config, "attention": attention}
    models = [
        A2VDiT.from_config({**config, "gradient_checkpointing": value}) for value in (False, True)
    ]
    models[1].load_state_dict(models[0].state_dict())
    clip = lab.make_clip(models[0], 2)
    losses = [model(**clip).square().mean() for model in models]
    for loss in losses:
        loss.backward()
    assert torch.equal(losses[0], losses[1])
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("attention", ["full", "chunked"])
def test_bfloat16(attention: str, lab: SimpleNamespace) -> None:
    model = A2VDiT.from_config({**lab.make_student().config, "attention": attention})
    clip = lab.make_clip(model, 2)
    expected = model(**clip)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(**clip)
        mixed.float().mean().backward()
        if attention == "chunked":
            cache = model.new_cache(2, 2, 3, dtype=torch.bfloat16)
            with torch.no_grad():
                streamed = lab.sequential(model, clip, cache)
            lab.assert_close(streamed.float(), expected[:, :, 1:], 0.05)
    lab.assert_close(mixed.float(), expected, 0.05)
    pure = model.bfloat16()(**{k: v if v is None else v.bfloat16() for k, v in clip.items()})
    lab.assert_close(pure.float(), expected, 0.1)


def test_rotation_compiles_and_keeps_lengths() -> None:
    table = Rope(dim=20).table(3, 2, 2, 3, torch.device("cpu"))
    x = torch.randn(4, 12, 20)
    turned = rotate(x, table)
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
    assert torch.equal(turned[..., :2], x[..., :2])  # 20 = 3 * 6 + 2: two channels do not turn
    compiled = torch.compile(rotate, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x, table), turned, atol=1e-6)


def test_tables_made_in_inference_mode_serve_training(lab: SimpleNamespace) -> None:
    model = lab.make_student()
    clip = lab.make_clip(model, 1, height=5, width=1)  # a size that no other test uses
    with torch.inference_mode():
        model(**clip)
    model(**clip).mean().backward()


def test_copies_and_pickles(lab: SimpleNamespace) -> None:
    model = lab.make_student()
    clip = lab.make_clip(model, 1)
    with torch.no_grad():
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(**clip), model(**clip))


def test_bad_input(lab: SimpleNamespace) -> None:
    model = lab.make_student()
    clip = lab.make_clip(model, 2)
    latents, sigma, speech = clip["noisy_latents"], clip["sigma"], clip["speech_latents"]
    cases: list[tuple[tuple[Any, ...], str]] = [
        (
            (latents[:, :5], sigma),
            (
                r"expected noisy_latents of shape \(B, 6, f, h, w\), got \(2, "
                r"5, "
                r"7, 2, 3\)"
            ),
        ),
        ((latents, sigma[:, :6]), r"expected sigma of shape \(B, f\) = \(2, 7\), got \(2, 6\)"),
        ((latents, sigma[:, 0]), r"expected sigma of shape \(B, f\) = \(2, 7\), got \(2,\)"),
        ((latents[:, :, :6], sigma[:, :6]), r"expected 1 \+ K \* 3 latent frames .* got 6"),
        ((latents[:, :, :1], sigma[:, :1]), r"expected 1 \+ K \* 3 latent frames .* got 1"),
        (
            (latents, sigma, speech[:, :6]),
            (
                r"expected speech_latents of shape \(2, 7, n, 10\), got "
                r"\(2, 6, 2, 10\)"
            ),
        ),
        (
            (latents, sigma, speech[..., :9]),
            (
                r"expected speech_latents of shape \(B, f, n, 10\), "
                r"got \(2, 7, 2, 9\)"
            ),
        ),
        (
            (latents, sigma, speech, torch.randn(2, 5, 12)),
            ("expected no text with caption_channels=None"),
        ),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            model(*arguments)
    with pytest.raises(ValueError, match="expected text_embeds, got None"):
        lab.make_student(text=True)(latents, sigma)
    with pytest.raises(
        ValueError, match=("expected context_latents with cache_noise=clean_pass, got None")
    ):
        lab.make_student(cache_noise="clean_pass")(latents, sigma)
    with pytest.raises(
        ValueError, match=("expected one sigma for all chunks of a clip with cache_noise=per_step")
    ):
        lab.make_student(cache_noise="per_step")(latents, sigma)
    with pytest.raises(ValueError, match="expected context_latents of shape"):
        model(latents, sigma, context_latents=latents[:1])
    with pytest.raises(ValueError, match="expected no speech latents with speech_dim=None"):
        A2VDiT(**{**TINY, "speech_dim": None})(latents, sigma, speech)
    with pytest.raises(ValueError, match=r"expected latents of 4x4 \(spatial_embedding\), got 2x3"):
        A2VDiT(**TINY, spatial_embedding=(4, 4))(latents, sigma)
    with pytest.raises(ValueError, match="expected attention `full`"):
        A2VDiT(**TINY, attention="causal")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected an even attention_head_dim"):
        A2VDiT(**{**TINY, "attention_head_dim": 9})
