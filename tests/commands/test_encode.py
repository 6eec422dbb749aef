from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rest_lightning import TalkingHead
from rest_lightning.cli import main
from rest_lightning.constants import SAMPLES_PER_FRAME
from rest_lightning.data.layout import Sidecar, clip_path, finish_dataset, write_sidecar
from rest_lightning.data.window_cache import LatentsCache, SpeechCache
from rest_lightning.media.writer import Mp4Writer
from rest_lightning.parts import fingerprint_of


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Three clips of 17 frames, 64x64."""
    root = tmp_path / "talkers"
    for index, split in enumerate(("train", "train", "val")):
        clip_id = f"clip-{index}"
        clip_path(root, clip_id).parent.mkdir(parents=True, exist_ok=True)
        with Mp4Writer(clip_path(root, clip_id), 64) as writer:
            writer.write(
                np.random.default_rng(index).integers(0, 256, (17, 64, 64, 3), dtype=np.uint8)
            )
            writer.write_audio(np.zeros(17 * SAMPLES_PER_FRAME, np.float32))
        sidecar = Sidecar(
            clip_id=clip_id, identity=clip_id, source="test", num_frames=17, size_px=64, split=split
        )
        write_sidecar(root, sidecar)
    finish_dataset(root, {"made_by": "tests"})
    return root


def test_encode_and_continue(
    dataset: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "encode",
        "--model",
        str(tiny_model),
        "--data",
        str(dataset),
        "--out",
        str(tmp_path / "latents"),
    ]
    words += ["--num_frames", "17", "--dtype", "float32"]
    assert main(words) == 0
    files = {
        path.name: path.stat().st_mtime_ns for path in (tmp_path / "latents").glob("*.safetensors")
    }
    assert main(words) == 0
    assert {
        path.name: path.stat().st_mtime_ns for path in (tmp_path / "latents").glob("*.safetensors")
    } == files
    vae = TalkingHead.from_pretrained(tiny_model).vae
    cache = LatentsCache(tmp_path / "latents", 17, fingerprint_of(vae))
    assert cache.window("clip-2", 0).shape == (4, 3, 2, 2)
    assert "latents of 3 clips" in capsys.readouterr().out


def test_fingerprint_is_that_of_the_weights(tiny_model: Path) -> None:
    vae = TalkingHead.from_pretrained(tiny_model).vae
    same = TalkingHead.from_pretrained(tiny_model).vae
    assert fingerprint_of(vae) == fingerprint_of(same)
    with torch.no_grad():
        next(same.parameters()).view(-1)[0] += 1e-3
    assert fingerprint_of(vae) != fingerprint_of(same)


def test_wrong_inputs(
    dataset: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for model, data in ((tmp_path / "nowhere", dataset), (tiny_model, tmp_path / "nowhere")):
        words = [
            "encode",
            "--model",
            str(model),
            "--data",
            str(data),
            "--out",
            str(tmp_path / "latents"),
        ]
        assert main(words) == 2
        error = capsys.readouterr().err
        assert "nowhere" in error and len(error.splitlines()) == 1


def test_encode_speech_and_continue(
    dataset: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The encoder of a model folder, and the same one of a stage's configuration file."""
    config = tmp_path / "stage.yaml"
    encoder = (
        "{class_path: rest_lightning.models.speech.LogMelEncoder, init_args: {lookahead_frames: 2}}"
    )
    config.write_text(f"model: {{init_args: {{speech_encoder: {encoder}}}}}")
    words = [
        "encode",
        "--data",
        str(dataset),
        "--out",
        str(tmp_path / "speech"),
        "--num_frames",
        "17",
    ]
    assert main([*words, "--speech-encoder", str(tiny_model)]) == 0
    files = {
        path.name: path.stat().st_mtime_ns for path in (tmp_path / "speech").glob("*.safetensors")
    }
    assert main([*words, "--speech-encoder", str(config)]) == 0
    assert {
        path.name: path.stat().st_mtime_ns for path in (tmp_path / "speech").glob("*.safetensors")
    } == files
    loaded = TalkingHead.from_pretrained(tiny_model).speech_encoder
    cache = SpeechCache(tmp_path / "speech", 17, fingerprint_of(loaded, with_config=True))
    assert torch.equal(cache.window("clip-2", 0), torch.full((2 * (17 + 4), 160), -1.0))  # silence
    assert "speech features of 3 clips" in capsys.readouterr().out
    config.write_text(config.read_text().replace("2}", "1}"))
    assert main([*words, "--speech-encoder", str(config)]) == 2
    assert "expected a speech features cache with fingerprint" in capsys.readouterr().err
    config.write_text("model: {}")
    assert main([*words, "--speech-encoder", str(config)]) == 2
    assert "expected a stage's configuration with a speech_encoder" in capsys.readouterr().err
    assert main(words) == 2
    assert "--speech-encoder is required" in capsys.readouterr().err
