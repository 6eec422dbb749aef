"""`rest talk`, `demo` and `serve` set how long the model's threads spin while that can still be
set: before torch is loaded.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import os, sys
from rest_lightning.cli import main
if sys.argv[1] == "serve":  # its first line; what follows loads torch
    from rest_lightning.commands.serve import spin_briefly
    spin_briefly()
else:
    main(sys.argv[1:])
print(os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules)
"""
# Each ends at its first look at an argument.
TALK = ("talk", "no.png", "no.wav", "-o", "no.mp4")


@pytest.mark.parametrize(
    ("words", "given", "expected"),
    [
        (TALK, {}, "10000"),
        (("demo", "--out", __file__), {}, "10000"),
        (("serve",), {}, "10000"),
        (TALK, {"GOMP_SPINCOUNT": "7"}, "7"),
        (TALK, {"OMP_WAIT_POLICY": "ACTIVE"}, "None"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_threads_spin_briefly_unless_told_otherwise(
    words: tuple[str, ...], given: dict[str, str], expected: str
) -> None:
    ours = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    command = [sys.executable, "-c", CODE, *words]
    done = subprocess.run(
        command, env=environment | given, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [expected, "False"]
