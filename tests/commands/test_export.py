from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from rest_lightning import Sampling, TalkingHead
from rest_lightning.cli import main
from rest_lightning.parts import PART_NAMES, PARTS_KEY, SAMPLING_KEY, describe_part


@pytest.fixture
def checkpoints(tiny_model: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Checkpoints of a student stage and of a VAE stage, with what the stages write into them."""
    head = TalkingHead.from_pretrained(tiny_model)

    def save(path: Path, *names: str) -> Path:
        parts = {name: getattr(head, name) for name in names}
        state = {
            f"{name}.{key}": value
            for name, part in parts.items()
            for key, value in part.state_dict().items()
        }
        frozen = {"speech_encoder": describe_part(head.speech_encoder)}
        content: dict[str, Any] = {
            PARTS_KEY: {name: describe_part(part) for name, part in parts.items()}
        }
        torch.save({"state_dict": state, "rest_frozen_parts": frozen, **content}, path)
        return path

    return save(tmp_path / "student.ckpt", "transformer", "speech_ae"), save(
        tmp_path / "vae.ckpt", "vae"
    )


def words_of(checkpoints: tuple[Path, Path], out: Path, *more: str) -> list[str]:
    return [
        "export",
        str(checkpoints[0]),
        "--vae",
        str(checkpoints[1]),
        "--out",
        str(out),
        "--size_px",
        "64",
        *more,
    ]


def test_exported_model_is_the_checkpoint(
    checkpoints: tuple[Path, Path],
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "my_model"
    more = ["--dtype", "float32", "--num_steps", "5", "--guidance", "2.5", "--shift", "1"]
    more += ["--reference_guidance", "0.5"]
    assert main(words_of(checkpoints, out, *more)) == 0
    assert "MB" in capsys.readouterr().out
    ours, source = TalkingHead.from_pretrained(out), TalkingHead.from_pretrained(tiny_model)
    assert (ours.size_px, ours.sampling) == (64, Sampling(5, 2.5, 1.0, 0.5))
    for name in PART_NAMES:
        state, expected = getattr(ours, name).state_dict(), getattr(source, name).state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in state)


@pytest.mark.parametrize(
    ("remembered", "options", "expected"),
    [
        ((2, 1.0, 1.0, 0.0, 8), [], Sampling(2, 1.0, 1.0, 0.0, 8)),
        ((8, 2.0, 1.0), [], Sampling(8, 2.0, 1.0)),
        ((8, 2.0, 1.0), ["--guidance", "3"], Sampling(8, 3.0, 1.0)),
        (None, [], Sampling()),  # a checkpoint of 0.1
    ],
)
def test_a_model_is_sampled_as_its_stage_was(
    checkpoints: tuple[Path, Path],
    remembered: tuple[Any, ...] | None,
    options: list[str],
    expected: Sampling,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = torch.load(checkpoints[0], weights_only=True)
    if remembered is not None:
        content[SAMPLING_KEY] = asdict(Sampling(*remembered))
    torch.save(content, checkpoints[0])
    assert main(words_of(checkpoints, tmp_path / "out", *options)) == 0
    assert TalkingHead.from_pretrained(tmp_path / "out").sampling == expected
    said = capsys.readouterr().out
    assert f"guidance {expected.guidance}" in said
    assert ("the checkpoint does not say" in said) == (remembered is None)


def test_a_remembered_sampling_is_checked(
    checkpoints: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(checkpoints[0], weights_only=True)
    for wrong in ({"guidance": float("nan")}, {"steps": 3}):
        torch.save({**content, SAMPLING_KEY: wrong}, checkpoints[0])
        assert main(words_of(checkpoints, tmp_path / "out")) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert str(checkpoints[0]) in line


def test_stored_in_bfloat16_by_default(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    assert main(words_of(checkpoints, tmp_path / "small")) == 0
    assert main(words_of(checkpoints, tmp_path / "large", "--dtype", "float32")) == 0
    small, large = (
        sum(file.stat().st_size for file in (tmp_path / name).rglob("*.safetensors"))
        for name in ("small", "large")
    )
    assert small < 0.65 * large


def test_speech_encoder_of_the_run(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    """A checkpoint without a description: the config.yaml of its run has it."""
    content = torch.load(checkpoints[0], weights_only=False)
    del content["rest_frozen_parts"]
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    torch.save(content, run / "checkpoints" / "last.ckpt")
    words = words_of((run / "checkpoints" / "last.ckpt", checkpoints[1]), tmp_path / "out")
    assert main(words) == 2
    encoder = {
        "class_path": "rest_lightning.models.speech.LogMelEncoder",
        "init_args": {"lookahead_frames": 1},
    }
    (run / "config.yaml").write_text(
        json.dumps({"model": {"init_args": {"speech_encoder": encoder}}})
    )
    assert main(words) == 0
    assert TalkingHead.from_pretrained(tmp_path / "out").speech_encoder.lookahead_frames == 1


def test_card_tells_what_the_run_recorded(
    checkpoints: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps, data, settings; what is not known is said; no path of the machine."""
    run, data = tmp_path / "run", tmp_path / "my_clips"
    run.mkdir()
    data.mkdir()
    content = torch.load(checkpoints[0], weights_only=False)
    content |= {
        "global_step": 12_345,
        "TalkingHeadDataModule": {"num_samples": 49_380, "seed": 0},
        "callbacks": {"Timer": {"time_elapsed": {"train": 5400.0}}},
    }
    torch.save(content, run / "final.ckpt")
    (data / "dataset.json").write_text(json.dumps({"kind": "prepared videos", "num_clips": 1500}))
    config = {
        "seed_everything": 7,
        "trainer": {"precision": "bf16-mixed"},
        "model": {
            "class_path": "rest_lightning.tasks.student.StudentModule",
            "init_args": {"optimizer": {"lr": 0.001}},
        },
        "data": {"data_dir": str(data), "batch_size": 4},
    }
    (run / "config.yaml").write_text(json.dumps(config))
    out = tmp_path / "head"
    words = words_of((run / "final.ckpt", checkpoints[1]), out, "--license", "CC-BY-4.0")
    assert main(words) == 0
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-4.0\nlibrary_name: rest_lightning\n")
    student = card.split("transformer:\n")[1].split("vae:\n")[0]
    for line in (
        "stage: StudentModule",
        "optimiser steps: 12,345",
        "training clips seen: 49,380",
        "time: 1.5 h",
        "data: my_clips, prepared videos, 1,500 clips",
        "batch size: 4",
        "learning rate: 0.001",
        "precision: bf16-mixed",
        "seed: 7",
    ):
        assert f"- {line}\n" in student
    assert "- optimiser steps: not recorded\n" in card.split("vae:\n")[1]
    assert "| vae | CompactVAE | " in card and str(tmp_path) not in card
    assert TalkingHead.from_pretrained(out).card == card
    assert main([*words[:-1], "free for: all", "--overwrite"]) == 2
    assert "expected a licence's identifier" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["file", "other", "model"])
def test_nothing_is_replaced_by_accident(
    kind: str,
    checkpoints: tuple[Path, Path],
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.touch()
    elif kind == "other":
        out.mkdir()
        (out / "letter.txt").write_text("dear")
    else:
        shutil.copytree(tiny_model, out)
    assert main(words_of(checkpoints, out)) == 2
    error = capsys.readouterr().err
    assert str(out) in error and len(error.splitlines()) == 1
    assert main(words_of(checkpoints, out, "--overwrite")) == (0 if kind == "model" else 2)
    assert kind != "other" or (out / "letter.txt").exists()


def test_wrong_checkpoints(
    checkpoints: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (
        words_of((tmp_path / "missing.ckpt", checkpoints[1]), tmp_path / "out"),
        words_of(checkpoints[::-1], tmp_path / "out"),
        ["export", str(checkpoints[0]), "--out", str(tmp_path / "out")],
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: expected") and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
