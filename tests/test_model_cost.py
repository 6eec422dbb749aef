"""benchmarks/model_cost: counted FLOPs against formulas and layers, fake bytes against those of
real tensors.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_ltx import make_vae
from torch import Tensor, nn

from rest_lightning.models.cache import CacheOptions
from rest_lightning.models.speech import LogMelEncoder, WhisperEncoder
from rest_lightning.models.speech_ae import SpeechAE
from rest_lightning.models.transformer import A2VDiT
from rest_lightning.models.vae import CompactVAE

ROOT = Path(__file__).resolve().parent.parent
SPEECH_DIM, SPEECH_TOKENS = 10, 2


@pytest.fixture(scope="module")
def model_cost() -> Iterator[ModuleType]:
    """benchmarks/model_cost.py, which is not part of the package."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(ROOT))
    yield importlib.import_module("benchmarks.model_cost")
    patch.undo()


@pytest.fixture(scope="module")
def tools(model_cost: ModuleType) -> ModuleType:
    return importlib.import_module("benchmarks._cost")


def make_model(**changes: Any) -> A2VDiT:
    shape = {"in_channels": 6, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 10}
    return A2VDiT(**{**shape, "speech_dim": SPEECH_DIM, "caption_channels": None, **changes})


GRID: list[tuple[dict[str, Any], int, int, int]] = [
    ({}, 1, 4, 6),
    ({"attention": "chunked"}, 1, 4, 6),
    ({"attention": "chunked"}, 2, 13, 6),
    ({"gradient_checkpointing": True}, 2, 7, 4),
    (
        {
            "attention": "chunked",
            "gradient_checkpointing": True,
            "caption_channels": 12,
            "prompt_length": 5,
        },
        2,
        10,
        6,
    ),
    ({"caption_channels": 12, "prompt_length": 9, "num_layers": 3}, 3, 4, 2),
    (
        {
            "attention": "chunked",
            "cache_options": CacheOptions(chunk_length=2),
            "attention_head_dim": 6,
        },
        1,
        9,
        6,
    ),
    ({"num_attention_heads": 5, "in_channels": 3, "out_channels": 4}, 1, 7, 6),
]


@pytest.mark.parametrize(("changes", "batch", "num_frames", "cells"), GRID)
def test_training_formula(
    tools: ModuleType, changes: dict[str, Any], batch: int, num_frames: int, cells: int
) -> None:
    with torch.device("meta"):
        model = make_model(**changes)
        latents = torch.empty(batch, model.in_channels, num_frames, 2, cells // 2)
        speech = torch.empty(batch, num_frames, SPEECH_TOKENS, SPEECH_DIM, requires_grad=True)
        sigma = torch.empty(batch, num_frames)
    counted = tools.count_flops(lambda: model(latents, sigma, speech).sum().backward())
    length = tools.prompt_length(model)
    assert counted == tools.training_formula(model, batch, num_frames, cells, SPEECH_TOKENS, length)


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize(("rows", "length", "cells"), [(1, 3, 6), (2, 3, 4), (2, 1, 6), (3, 2, 2)])
def test_step_formula(tools: ModuleType, rows: int, length: int, cells: int, text: bool) -> None:
    prompt = {"caption_channels": 12, "prompt_length": 5} if text else {}
    with torch.device("meta"), torch.no_grad():
        model = make_model(
            attention="chunked", cache_options=CacheOptions(chunk_length=length), **prompt
        )
        cache = model.new_cache(rows, 2, cells // 2)
        own, sigma = model.project_prompt(rows), model.embed_sigma(torch.empty(1, 1))
        model.prefill(torch.empty(rows, 6, 1, 2, cells // 2), cache, text_embeds=own)
        speech = model.project_speech(torch.empty(rows, length, SPEECH_TOKENS, SPEECH_DIM))
        chunk = torch.empty(rows, 6, length, 2, cells // 2)
        for num_chunks in (0, 1, 1):  # what lies before: nothing, then always one chunk
            counted = tools.count_flops(lambda: model(chunk, sigma, speech, own, cache=cache))
            cache.commit()
            windows = [(length * cells, (1 + (1 + num_chunks) * length) * cells)]
            terms = tools.transformer_flops(
                model, rows, length, cells, windows, SPEECH_TOKENS, 5 if text else 0
            )
            assert counted == terms["blocks"] + terms["ends"]


def layer_flops(call: Callable[[], object]) -> int:
    """Two for every weight and every place that it is applied to, layer by layer."""
    total = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.ConvTranspose1d):
            total += 2 * inputs[0].numel() * module.weight[0].numel()
        elif isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            total += 2 * output.numel() * module.weight[0].numel()

    handle = nn.modules.module.register_module_forward_hook(count)
    try:
        call()
    finally:
        handle.remove()
    return total


@torch.no_grad()
def test_other_parts_layer_by_layer(tools: ModuleType) -> None:
    frames, features = torch.randn(2, 3, 9, 64, 32), torch.randn(2, 17, 10, 12)
    ae = SpeechAE(feature_dim=12, num_tokens=2, latent_dim=8, width=6)
    compact = CompactVAE(4, (8, 12, 16), (1, 1, 1), (1, 2, 1), ((4, 2), (2, 2)), patch_size=8)
    ltx = make_vae("0.9.0")
    for call in (
        lambda: ae.decode(ae.encode(features)),
        lambda: compact.decode(compact.encode(frames)),
        lambda: ltx.decode(ltx.encode(frames)),
    ):
        assert tools.count_flops(call) == layer_flops(call) > 0


@torch.no_grad()
@pytest.mark.parametrize("num_frames", [1, 9, 24])
def test_speech_encoders(tools: ModuleType, num_frames: int) -> None:
    shape = {
        "d_model": 12,
        "encoder_layers": 2,
        "encoder_attention_heads": 3,
        "encoder_ffn_dim": 16,
        "num_mel_bins": 8,
    }
    # on the CPU attention is a fused kernel that the counter does not know
    with torch.device("meta"):
        whisper = WhisperEncoder(None, left_context_frames=6, whisper_config=shape)
        audio = torch.empty(1, 640 * (6 + num_frames + 2))
    pieces = [1] * (num_frames % 8) + [8] * (num_frames // 8)  # frame 0 is a block of its own
    steps = [2 * (6 + piece + 2) for piece in pieces]
    attended, mels = (
        sum(2 * 4 * n**2 * 12 for n in steps),
        sum(2 * (2 * n) * 201 * 8 for n in steps),
    )
    counted = tools.count_flops(lambda: whisper.features(audio))
    assert counted == layer_flops(lambda: whisper.features(audio)) + attended + mels
    log_mel = LogMelEncoder(lookahead_frames=2)
    audio = torch.zeros(1, 640 * (3 + num_frames + 2))
    assert tools.count_flops(lambda: log_mel.features(audio)) == 2 * 4 * (num_frames + 4) * 257 * 80


def make_size(model_cost: ModuleType, checkpointing: bool) -> Any:
    """A size of a few thousand parameters, as `read_size` makes them."""
    student = make_model(
        attention="chunked",
        gradient_checkpointing=checkpointing,
        in_channels=4,
        caption_channels=12,
        prompt_length=5,
    )
    whisper = {
        "d_model": 4,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 8,
        "num_mel_bins": 8,
    }
    encoder = WhisperEncoder(None, left_context_frames=4, whisper_config=whisper)
    parts = {
        "vae": make_vae("0.9.0").requires_grad_(True),
        "speech_encoder": encoder,
        "speech_ae": SpeechAE(
            feature_dim=encoder.feature_dim, num_tokens=2, latent_dim=SPEECH_DIM, width=6
        ),
        "transformer": student,
    }
    teacher = A2VDiT.from_config({**student.config, "attention": "full"})
    own = SpeechAE.from_config(parts["speech_ae"].config)
    counts = {"batch_size": 2, "vae_batch": 1, "accumulate": 4}
    return model_cost.Size(parts, teacher, 64, 49, 9, **counts, teacher_speech_ae=own)


@pytest.mark.parametrize("stage", ["vae", "speech_ae", "teacher", "student", "asd"])
def test_fake_bytes_are_real_bytes(model_cost: ModuleType, tools: ModuleType, stage: str) -> None:
    expected = model_cost.training_memory(make_size(model_cost, True), stage)
    size = make_size(model_cost, True)
    frozen = model_cost.frozen_parts(size, "asd").values()
    with tools.fake_tensors(*size.parts.values(), size.teacher, *frozen):
        assert model_cost.training_memory(size, stage) == pytest.approx(expected, rel=0.005)
    names = {"vae": ["vae"], "speech_ae": ["speech_ae", "speech_encoder"]}.get(
        stage, list(size.parts)
    )
    stored = sum(
        tensor.nbytes for name in names for tensor in size.parts[name].state_dict().values()
    )
    if stage == "asd":
        for network in (size.teacher, size.teacher_speech_ae):
            stored += sum(tensor.nbytes for tensor in network.state_dict().values())
    # Whisper's, in no checkpoint
    windows_and_filters = 4 * (400 + 201 * 8) if "speech_encoder" in names else 0
    assert expected["weights"] == stored + windows_and_filters
    is_dit = stage in ("teacher", "student", "asd")
    trained = sum(
        p.numel()
        for part in model_cost.trained_parts(size, stage).values()
        for name, p in part.named_parameters()
        if not (is_dit and name.startswith("decoder"))
    )
    assert expected["gradients"] == expected["average"] == expected["optimizer"] / 2 == 4 * trained
    assert expected["total"] == expected["weights"] + 16 * trained + max(
        expected["encoders_peak"], expected["activations_peak"]
    )


@pytest.mark.parametrize("attention", ["full", "chunked"])
def test_held_bytes_are_what_autograd_saves(tools: ModuleType, attention: str) -> None:
    model = make_model(attention=attention)
    latents, sigma, speech = (
        torch.randn(2, 6, 7, 2, 3),
        torch.rand(2, 7),
        torch.randn(2, 7, 2, SPEECH_DIM),
    )
    model(latents, sigma, speech)  # makes the tables of rotations, which stay
    tables = [
        model.rope.table(0, count, 2, 3, torch.device("cpu"))
        for count in (7, model.cache_options.num_slots)
    ]
    given = [latents, sigma, speech, *tables, *model.parameters()]
    known = {tensor.untyped_storage()._cdata for tensor in given}
    saved: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        velocity = model(latents, sigma, speech)
    own = velocity.untyped_storage()
    expected = (
        sum(storage.nbytes() for key, storage in saved.items() if key != own._cdata) + own.nbytes()
    )
    with tools.LiveBytes(given) as live:
        velocity = model(latents, sigma, speech)
        held = live.now
        velocity.sum().backward()
    assert held == expected
    assert live.peak > held


def test_checkpointing_holds_less_and_computes_more(model_cost: ModuleType) -> None:
    plain, checkpointed = (make_size(model_cost, value) for value in (False, True))
    for stage in ("teacher", "student"):
        held = [
            model_cost.training_memory(size, stage)["activations_held"]
            for size in (plain, checkpointed)
        ]
        assert held[1] < 0.5 * held[0]
        flops = [
            model_cost.training_flops(size, stage)["transformer"] for size in (plain, checkpointed)
        ]
        assert 1.2 < flops[1] / flops[0] < 1.34


@pytest.mark.slow
def test_command_writes_every_size(
    model_cost: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results/cost.json"
    assert model_cost.main(["--size", "embedded", "--tflops", "2", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    cost = result["sizes"]["embedded"]
    assert set(cost["training"]) == set(model_cost.STAGES)
    streaming = cost["streaming"]
    assert streaming["denoising_step"] == streaming["denoising_step_formula"]
    assert streaming["chunk"]["total"] == pytest.approx(streaming["chunk_s"] * 2e12)
    assert streaming["chunk"]["denoising"] == 8 * streaming["denoising_step"]
    for stage in ("teacher", "student", "asd"):
        flops = cost["training"][stage]["flops"]
        assert flops["transformer"] == flops["transformer_formula"]
        parts = ("frozen_encoders", "speech_ae", "transformer", "loss_and_teacher")
        assert flops["total"] == sum(flops[part] for part in parts)
    parameters = cost["parameters"]
    assert parameters["transformer"] == sum(
        n for name, n in parameters.items() if name.startswith("transformer.")
    )
    assert "denoising step" in capsys.readouterr().out
    assert torch.equal(torch.ones(2) + 1, torch.full((2,), 2.0))  # no fake tensor is left behind


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--size", "huge"],
            (
                r"^expected a size of embedded, .*paper \(folders of configs/\), got "
                r"'huge'"
            ),
        ),
        (["--tflops", "0"], "^expected --tflops above 0, got 0.0: an A100"),
    ],
)
def test_bad_input(
    model_cost: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    assert model_cost.main([*words, "--out", str(tmp_path / "cost.json")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(message, line)
    assert not (tmp_path / "cost.json").exists()


@pytest.mark.parametrize("stage", ["vae", "speech_ae", "teacher", "student", "asd"])
def test_units_hold_every_weight_once(model_cost: ModuleType, stage: str) -> None:
    """What FSDP2 spreads and gathers, against the networks themselves."""
    size = make_size(model_cost, True)
    parts = model_cost.everything_sharded(size, stage)
    kinds = sorted(type(part).__name__ for part in parts)
    expected = {"teacher": 1, "student": 1, "asd": 2}.get(stage, 0)  # of each of the two kinds
    assert kinds == ["A2VDiT"] * expected + ["SpeechAE"] * expected
    for part in parts:
        units = model_cost.sharding_units(part)
        assert sorted(id(p) for unit in units for p in unit) == sorted(map(id, part.parameters()))
        if isinstance(part, A2VDiT):
            assert len(units) == 4 * part.num_layers + 1


def test_memory_per_gpu(model_cost: ModuleType) -> None:
    memory = {
        "total": 1000, "gradients": 100, "optimizer": 200, "average": 100,
        "sharded_weights": 160, "largest_unit": 10,
    }  # fmt: skip
    assert [model_cost.memory_per_gpu(memory, count, False) for count in (1, 8, 64)] == [1000] * 3
    assert model_cost.memory_per_gpu(memory, 1, True) == 1000
    # 560 bytes are spread, 440 are not, and three units of 10 are whole for a moment
    assert model_cost.memory_per_gpu(memory, 8, True) == 440 + 70 + 30
    assert model_cost.memory_per_gpu(memory, 64, True) == 440 + 9 + 30
    unspread = {**memory, "sharded_weights": 0}
    assert model_cost.memory_per_gpu(unspread, 64, True) == 1000


def test_committed_table_is_that_of_the_code(model_cost: ModuleType) -> None:
    """Weights, gradients, moments and averages of every stage at paper size, counted anew on the
    meta device.
    """
    committed = json.loads((ROOT / "benchmarks/results/model_cost.json").read_text())
    with torch.device("meta"):
        size = importlib.import_module("benchmarks._cost").read_size("paper")
    for stage, step in committed["sizes"]["paper"]["training"].items():
        memory = step["bytes"]
        with model_cost.frozen_as_trained(size, stage):
            trained = sum(
                parameter.numel()
                for part in model_cost.trained_parts(size, stage).values()
                for parameter in part.parameters()
                if parameter.requires_grad
            )
        assert memory["gradients"] == memory["average"] == 4 * trained
        assert memory["optimizer"] == 8 * trained
        for strategy, sizes in step["bytes_per_gpu"].items():
            for count, number in sizes.items():
                is_sharded = strategy == "fsdp"
                assert number == model_cost.memory_per_gpu(memory, int(count), is_sharded)
