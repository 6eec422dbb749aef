"""benchmarks/gpu_job.py: what it records survives steps that fail, die and hang; every step can
be rehearsed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def job(repository: Path, out: Path, *words: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, results.json and output of a rehearsal on the CPU."""
    file = repository / "benchmarks" / "gpu_job.py"
    command = [
        sys.executable,
        str(file),
        "--device",
        "cpu",
        "--size",
        "mini",
        "--out",
        str(out),
        *words,
    ]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, env=environment)
    return (
        done.returncode,
        json.loads((out / "results.json").read_text("utf-8")),
        done.stdout + done.stderr,
    )


def test_steps_that_die_or_hang_do_not_stop_the_others(repository: Path, tmp_path: Path) -> None:
    only = ("--only", "env,attention,convolutions,command")
    code, result, output = job(
        repository, tmp_path, *only, "--break-at", "attention", "--hang-at", "convolutions"
    )
    status = {name: entry["status"] for name, entry in result["steps"].items()}
    assert status == {"env": "done", "attention": "died", "convolutions": "died", "command": "done"}
    assert code == 1 and "its process ended with 9" in output
    found = result["steps"]["env"]["result"]
    assert (
        found["matmul_tflops"] > 0 and found["versions"]["torch"] and found["hardware"]["num_cores"]
    )
    assert result["steps"]["command"]["result"] == {"not_measured": "GPU_JOB_TRAIN is not set"}
    before = result["steps"]["env"]

    code, result, _ = job(repository, tmp_path, *only)  # a second call measures nothing twice
    assert result["steps"]["env"] == before and len(result["calls"]) == 2
    code, result, _ = job(repository, tmp_path, "--only", "attention", "--again")
    assert (
        code == 0
        and result["steps"]["attention"]["status"] == "done"
        and result["steps"]["env"] == before
    )
    assert result["steps"]["attention"]["result"]["self, steady"]["auto"]["error"] < 1e-5
    assert not list(tmp_path.glob(".*"))  # nothing half written


def test_a_step_that_fails_keeps_its_error_and_time_is_kept(
    repository: Path, tmp_path: Path
) -> None:
    code, result, _ = job(repository, tmp_path, "--only", "convolutions", "--budget", "5")
    assert result["steps"] == {} and code == 0  # not begun with less than --least-s
    (tmp_path / "train.txt").mkdir()  # where the step wants to write
    os.environ["GPU_JOB_TRAIN"] = "true"
    try:
        code, result, output = job(repository, tmp_path, "--only", "command")
    finally:
        del os.environ["GPU_JOB_TRAIN"]
    assert code == 1 and result["steps"]["command"]["status"] == "failed"
    assert "IsADirectoryError" in result["steps"]["command"]["error"] and "Traceback" in output + (
        tmp_path / "log.txt"
    ).read_text("utf-8")


def test_unknown_steps_are_refused(repository: Path, tmp_path: Path) -> None:
    file = repository / "benchmarks" / "gpu_job.py"
    command = [sys.executable, str(file), "--out", str(tmp_path), "--only", "paper.speed"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "expected steps of env, fused, attention" in done.stderr


@pytest.mark.slow
def test_every_step_can_be_rehearsed(repository: Path, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    code, result, output = job(repository, tmp_path, "--budget", "900")
    assert code == 0 and "not begun" not in output, output[-3000:]
    steps = {name: entry["result"] for name, entry in result["steps"].items()}
    for name in ("fused", "fused_flash", "flash", "cudnn"):
        assert (
            steps[f"options.{name}"]["off_from_plain"] < 1e-5
            and steps[f"options.{name}"]["frames_off"]["largest"] <= 1
        )
    assert 1e-4 < steps["options.fused_float8"]["off_from_plain"] < 0.1
    assert steps["paper.equal"]["latents, captured to the plain loop"] < 1e-5
    assert all(row["error"] < 1e-6 for row in steps["fused"].values())
    assert steps["tests"]["code"] == 0 and "passed" in steps["tests"]["last"]
    assert steps["compiled"]["off_from_plain"] < 1e-5
    assert steps["training.paper"]["batch 1, parallel"]["tflops"] > 0
    assert "captured, denoise" in (tmp_path / "kernels.txt").read_text("utf-8")
