"""What a measurement says of its process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rest_lightning.machine import peak_memory_mb, resident_memory_mb

CODE = "from rest_lightning.machine import peak_memory_mb; print(peak_memory_mb())"
needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="only Linux has /proc"
)


@needs_proc
def test_the_peak_is_the_processes_own() -> None:
    held = np.ones(300_000_000 // 8)
    before_mb = peak_memory_mb()
    assert before_mb > resident_memory_mb() - 1 > 300
    child = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert 5 < float(child.stdout) < 200  # getrusage would tell ours
    resident_mb = resident_memory_mb()
    del held
    assert resident_memory_mb() < resident_mb - 250
    assert peak_memory_mb() > before_mb - 2  # the system counts in batches
