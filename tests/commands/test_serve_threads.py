"""`rest serve` sets how long the model's threads spin while that can still be set: before torch is
loaded.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import os, sys
import rest_lightning.cli
from rest_lightning.commands.serve import spin_briefly
spin_briefly()
print(os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_threads_spin_briefly_unless_told_otherwise(given: dict[str, str], expected: str) -> None:
    ours = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(
        command, env=environment | given, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [expected, "False"]
