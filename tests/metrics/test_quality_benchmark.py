"""The quality benchmark from end to end at tiny size: untrained weights, real talkers."""

from __future__ import annotations

import importlib.util
import json
import sys
import wave
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from stills import face
from tiny_head import make_quick_head

from rest_lightning.talking_head import TalkingHead

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def quality() -> ModuleType:
    """benchmarks/quality.py, which is not part of the package."""
    pytest.importorskip("espeakng_loader")
    spec = importlib.util.spec_from_file_location(
        "quality_benchmark", ROOT / "benchmarks" / "quality.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and a folder of one speech file and one portrait."""
    root = tmp_path_factory.mktemp("quality")
    make_quick_head().save_pretrained(root / "model")
    (root / "real").mkdir()
    speech = (
        (np.random.default_rng(0).normal(size=16000 * 3) * 3000).clip(-32768, 32767).astype("<i2")
    )
    speech[16000:32000] = 0
    with wave.open(str(root / "real" / "speech.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(speech.tobytes())
    face(80, 80).save(root / "real" / "portrait.png")
    return root


def arguments(folder: Path, *more: str) -> list[str]:
    out = ["--model", str(folder / "model"), "--out", str(folder / "out" / "quality.json")]
    return [*out, "--seconds", "4", "--seed", "7100", *more]


def test_from_talkers_to_json(
    quality: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = folder / "out" / "sheet.png"
    sweep = ("--num-talkers", "2", "--guidance", "1", "1.5")
    code = quality.main(
        arguments(folder, *sweep, "--sheet", str(sheet), "--real", str(folder / "real"))
    )
    assert code == 0, capsys.readouterr().err
    result: dict[str, Any] = json.loads((folder / "out" / "quality.json").read_text())
    keys = {
        "protocol",
        "protocol_version",
        "method",
        "measured",
        "metrics",
        "ground_truth",
        "num_clips",
        "num_frames",
    }
    keys |= {
        "failures",
        "extractors",
        "hardware",
        "commit",
        "config",
        "date",
        "vae",
        "runs",
        "real",
        "seeds",
    }
    assert keys <= result.keys()
    assert result["num_clips"] == 2 and result["num_frames"] == 100 and not result["failures"]
    assert [run["sampler"]["guidance"] for run in result["runs"]] == [1.0, 1.5]
    assert result["runs"][0]["metrics"] == result["metrics"]
    assert result["extractors"]["mouth_opening"]["name"] == "embedded-mouth"
    truth = result["ground_truth"]
    assert truth["lip_correlation"]["mean"] > 0.9
    assert truth["background_drift"]["max"] < 0.5
    assert truth["jump_ratio_latent"]["mean"] == pytest.approx(1.0, abs=0.4)
    assert abs(truth["lip_best_lag_frames"]["mean"]) <= 1
    assert result["vae"]["psnr_db"]["mean"] < 25  # it is untrained
    assert {
        "lip_correlation_mismatched",
        "lip_correlation_q4",
        "loudness_rank_correlation",
    } <= result["metrics"].keys()
    assert "lip_correlation_mismatched" not in result["runs"][1]["metrics"]
    assert len(result["real"]) % 2 == 0 and {"speech.wav"} == {
        row["speech"] for row in result["real"]
    }
    assert result["real"][-1]["portrait"] == "portrait.png"
    assert result["real"][-1]["metrics"]["silent_share"] == pytest.approx(1 / 3, abs=0.02)
    assert {target["what"] for target in result["targets"]} >= {"lip correlation", "VAE PSNR, dB"}
    assert Image.open(sheet).width == 9 * 64
    assert "MISSED" in capsys.readouterr().out


def test_reconstruction_equals_the_whole_decode(quality: ModuleType, folder: Path) -> None:
    args = quality.parse(arguments(folder))
    model = TalkingHead.from_pretrained(folder / "model")
    benchmark = quality.Benchmark(model, [], args)
    frames = np.random.default_rng(0).integers(0, 256, (60, 64, 64, 3), dtype=np.uint8)
    video = torch.from_numpy(frames[:57]).permute(3, 0, 1, 2)[None] / 127.5 - 1
    with torch.inference_mode():
        whole = model.vae.decode(model.vae.encode(video))[0].permute(1, 2, 3, 0)
    expected = ((whole + 1) * 127.5).round().clamp(0, 255).numpy()
    rebuilt = benchmark.reconstruct(frames)
    assert rebuilt.shape == expected.shape
    assert np.abs(rebuilt - expected).max() <= 1


def test_a_failing_clip_is_named(quality: ModuleType, folder: Path) -> None:
    benchmark = quality.Benchmark(
        TalkingHead.from_pretrained(folder / "model"),
        [quality.Sampler(1, 1.0)],
        quality.parse(arguments(folder)),
    )

    def fail() -> None:
        raise ValueError("no face")

    benchmark.attempt("talker 3", fail)
    assert benchmark.result()["failures"] == [{"clip": "talker 3", "reason": "ValueError: no face"}]


def test_the_sheet_shows_closed_and_open_mouths_in_turn(quality: ModuleType) -> None:
    opening = np.abs(np.sin(np.arange(90) / 3))
    shown = quality.sheet_frames(opening)
    assert len(shown) == 9 and (np.diff(shown) > 0).all()
    assert opening[shown[1::2]].min() > opening[shown[::2]].max()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "nowhere"], "expected a model folder with model_index.json"),
        (["--num-talkers", "0", "--real", "nowhere"], "expected a folder with speech for --real"),
    ],
)
def test_bad_arguments_are_one_line(
    quality: ModuleType,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    assert quality.main(arguments(folder, *more)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
