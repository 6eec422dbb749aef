"""What streams and measures on a machine without PyAV, Lightning, decord and lpips."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MISSING = ("av", "lightning", "pytorch_lightning", "decord", "lpips")
BLOCK = f"""
import importlib.machinery, sys

plain = importlib.machinery.PathFinder.find_spec

@classmethod
def find_spec(cls, name, path=None, target=None):
    return None if name.split(".")[0] in {MISSING!r} else plain(name, path, target)

importlib.machinery.PathFinder.find_spec = find_spec
sys.path[:0] = ["."]
"""


def run(code: str, repository: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", BLOCK + code],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("module", MISSING)
def test_the_block_works(module: str, repository: Path) -> None:
    code = f"try:\n    import {module}\nexcept ImportError:\n    print('none')"
    assert run(code, repository).split() == ["none"]


def test_the_streaming_benchmark_measures(repository: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    names = (
        "first_frame",
        "cache",
        "decode",
        "batch",
        "backbone",
        "graphs",
        "device_memory",
        "writing",
    )
    words = ["--size", "tiny", "--device", "cpu", "--out", str(out), "--only", *names]
    code = f"from benchmarks.streaming import main\nassert main({words!r}) == 0"
    run(code, repository)
    text = out.read_text(encoding="utf-8")
    assert all(f'"{name}":' in text for name in names) and '"failures": []' in text


def test_a_model_of_paper_size_is_built(repository: Path) -> None:
    code = (
        "import torch\nfrom benchmarks._cost import read_student\n"
        "with torch.device('meta'):\n    parts, size_px = read_student('paper')\n"
        "print(size_px, sum(p.numel() for p in parts['transformer'].parameters()) > 1e9)"
    )
    assert run(code, repository).split() == ["512", "True"]


def test_tests_marked_gpu_are_collected_and_run(repository: Path) -> None:
    chosen = "order or gpu or cuda or rotate"
    files = ("tests/streaming/test_overlap.py", "tests/models/test_fused.py")
    code = (
        "import pytest\n"
        "words = ['-q', '-p', 'no:cacheprovider', '-m', 'not slow']\n"
        f"sys.exit(pytest.main([*words, '-k', {chosen!r}, *{files!r}]))"
    )
    found = run(code, repository)
    assert "passed" in found and "error" not in found
