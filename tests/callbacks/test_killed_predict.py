"""`rest predict`, killed without a word and started again: done files stay, at most one is made
again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import wave
from pathlib import Path
from typing import Any

import killed_runs
import numpy as np
import pytest
from PIL import Image
from tiny_head import make_quick_head

# (moment, which time, videos that are whole then). Three pairs of 2 blocks and an end; a report and
# a video are renamed for each, the report first.
MOMENTS = (
    ("predict_batch_start", 5, 1),  # in the middle of the second video
    ("before_rename", 4, 1),  # the second report is there, its video is not
    ("after_rename", 4, 2),
    ("predict_batch_start", 9, 2),  # the last video lacks its end only
)
NAMES = [f"pair-{number}" for number in range(3)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    make_quick_head().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "face.png")
    with wave.open(str(tmp_path / "speech.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(rng.normal(scale=3000, size=20_000).astype("<i2").tobytes())
    rows = ["portrait,speech,name,crop", *(f"face.png,speech.wav,{name},centre" for name in NAMES)]
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    return tmp_path / "pairs.csv"


def run(jobs: list[dict[str, Any]], repository: Path) -> list[int]:
    paths = os.pathsep.join((str(repository), str(repository / "tests" / "helpers")))
    done = subprocess.run(
        [sys.executable, killed_runs.__file__],
        input=json.dumps(jobs),
        env=os.environ | {"PYTHONPATH": paths},
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    codes: list[int] = json.loads(done.stdout.rsplit("exit codes", 1)[1])
    assert set(codes) <= {0, -9}, done.stderr[-3000:]
    return codes


@pytest.mark.slow
def test_killed_runs_redo_one_file_at_most(
    tmp_path: Path, model: Path, pairs: Path, repository: Path
) -> None:
    def job(folder: Path, moment: str | None = None, count: int = 0) -> dict[str, Any]:
        sink = [
            {
                "class_path": "rest_lightning.callbacks.sink.VideoSink",
                "init_args": {"out_dir": str(folder)},
            }
        ]
        words = [
            "predict",
            "--config",
            str(repository / "configs/predict.yaml"),
            "--model.model",
            str(model),
        ]
        words += [
            "--model.dtype",
            "float32",
            "--data.predict_pairs",
            str(pairs),
            "--trainer.accelerator",
            "cpu",
        ]
        words += ["--trainer.callbacks", json.dumps(sink), "--trainer.enable_progress_bar", "false"]
        words += ["--trainer.default_root_dir", str(tmp_path / "run")]
        return {"words": words, "moment": moment, "count": count}

    folders = [tmp_path / f"{moment}-{count}" for moment, count, _ in MOMENTS]
    killed = [job(folder, *moment[:2]) for folder, moment in zip(folders, MOMENTS, strict=True)]
    assert run([*killed, job(tmp_path / "whole")], repository) == [*[-9] * len(MOMENTS), 0]
    before: list[dict[str, int]] = []
    for folder, (_, _, num_whole) in zip(folders, MOMENTS, strict=True):
        videos = {path.name: path.stat().st_mtime_ns for path in folder.glob("[!.]*.mp4")}
        assert sorted(videos) == [f"{name}.mp4" for name in NAMES[:num_whole]]
        before.append(videos)
    assert run([job(folder) for folder in folders], repository) == [0] * len(folders)
    expected = sorted(f"{name}{suffix}" for name in NAMES for suffix in (".json", ".mp4"))
    for folder, videos in zip(folders, before, strict=True):
        assert sorted(path.name for path in folder.iterdir()) == expected, (
            "nothing hidden is left behind"
        )
        for name in NAMES:
            whole = tmp_path / "whole" / f"{name}.mp4"
            assert (folder / f"{name}.mp4").read_bytes() == whole.read_bytes()
        for name, written_ns in videos.items():
            assert (folder / name).stat().st_mtime_ns == written_ns, (
                "a finished video was made again"
            )
