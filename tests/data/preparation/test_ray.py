"""Ray on a cluster of two workers gives what the local engine gives, crashes included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rest_lightning.cli import main
from rest_lightning.constants import SAMPLES_PER_FRAME

pytest.importorskip("ray", reason="ray (extra `ray`) is the engine under test")

# Starts take long where other programs have the cores.
PATIENT = {"RAY_worker_register_timeout_seconds": "200"}
FILES = ("prepare.jsonl", "manifest.jsonl", "dataset.json", "clips/*", "thumbs/*")


@pytest.fixture(scope="module")
def videos(make: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five good ones of 20 to 36 frames, two over which processes end, one that is none."""
    root = tmp_path_factory.mktemp("raw")
    names = ("a.mp4", "b c's é.mp4", "deep/c.mp4", "d.mp4", "lost.mp4", "crash.mp4")
    for number, name in enumerate(names):
        num_frames = 20 + 4 * number
        frames = make.frames(num_frames, 96, seed=number)
        make.mp4(root / name, frames, make.speech(num_frames * SAMPLES_PER_FRAME, seed=number))
    (root / "empty.mp4").touch()
    return root


def words(videos: Path, out: Path, *more: str) -> list[str]:
    options = [
        "--min-frames",
        "9",
        "--size-px",
        "128",
        "--detector",
        "ray_prepare:Crashing",
        "--quiet",
    ]
    limits = [
        word
        for name in ("min_face_px", "min_sharpness", "max_flow", "max_hands")
        for word in (f"--{name}", "null")
    ]
    return ["prepare", str(videos), "--out", str(out), *options, *limits, *more]


def content(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for pattern in FILES
        for path in sorted(out.glob(pattern))
    }


def on_ray(
    arguments: Sequence[str], repository: Path, script: str = "ray_prepare.py", **more: str
) -> Any:
    helpers = repository / "tests/helpers"
    paths = os.pathsep.join(
        filter(None, [str(repository), str(helpers), os.environ.get("PYTHONPATH", "")])
    )
    environment = {
        **os.environ,
        "PYTHONPATH": paths,
        "RAY_USAGE_STATS_ENABLED": "0",
        **PATIENT,
        **more,
    }
    command = [
        sys.executable,
        *([str(helpers / script)] if script else ["-m", "rest_lightning"]),
        *arguments,
    ]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_two_machines_give_what_one_process_gives(
    videos: Path, tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray, local = tmp_path / "ray", tmp_path / "local"
    marker = tmp_path / "marker"
    done = on_ray(words(videos, ray, "--engine", "ray"), repository, MARKER=str(marker))
    assert done.returncode == 0, done.stderr
    assert marker.exists(), "a worker was lost on the way"
    helpers = str(repository / "tests/helpers")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([helpers, os.environ.get("PYTHONPATH", "")]))
    assert main(words(videos, local, "--num-workers", "1")) == 0
    assert content(ray) == content(local)

    rows = {
        row["source"]: row
        for row in map(json.loads, (ray / "prepare.jsonl").read_text().splitlines())
    }
    assert len(rows) == 7
    assert {name for name, row in rows.items() if row["status"] == "kept"} == {
        "a.mp4", "b c's é.mp4", "deep/c.mp4", "d.mp4", "lost.mp4",
    }  # fmt: skip
    assert "ended by signal SIGKILL" in rows["crash.mp4"]["reason"]
    assert (rows["empty.mp4"]["status"], rows["empty.mp4"]["stage"]) == ("failed", "probe")
    assert f"{ray}: 5 clips" in done.stdout

    # Again, with a cluster of its own: what is done stays as it is, the crash is tried again.
    before = {path: path.stat().st_mtime_ns for path in (ray / "clips").glob("*.mp4")}
    assert len(before) == 5
    again = on_ray(
        words(videos, ray, "--engine", "ray", "--num-workers", "1"), repository, script=""
    )
    assert again.returncode == 0, again.stderr
    assert before == {path: path.stat().st_mtime_ns for path in (ray / "clips").glob("*.mp4")}
    assert content(ray) == content(local)


@pytest.mark.slow
def test_mistakes_are_one_line(videos: Path, tmp_path: Path, repository: Path) -> None:
    # The port of no service.
    done = on_ray(
        words(videos, tmp_path / "a", "--engine", "ray"), repository, "", RAY_ADDRESS="127.0.0.1:1"
    )
    assert done.returncode == 2
    assert "expected a Ray cluster at RAY_ADDRESS=127.0.0.1:1, got" in done.stderr.splitlines()[-1]
    missing = words(
        videos,
        tmp_path / "b",
        "--engine",
        "ray",
        "--detector",
        "ray_prepare:Absent",
        "--num-workers",
        "1",
    )
    done = on_ray(missing, repository, "")
    assert done.returncode == 2
    assert "expected the detector ray_prepare:Absent, got" in done.stderr.splitlines()[-1]
