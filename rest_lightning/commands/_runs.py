"""What the commands that train several runs share: a command in a process of its own, a stage's fit
that resumes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rest_lightning.media.files import write_text_atomic
from rest_lightning.processes import run_child

FINAL = "final.ckpt"
LAST = Path("checkpoints") / "last.ckpt"


def rest(*arguments: str) -> None:
    """Run a command of this package in a process of its own, which ends with this one; a failure
    ends the recipe with its exit code.
    """
    # spinning threads halve the speed of two processes
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    code = run_child([sys.executable, "-m", "rest_lightning", *arguments], environment)
    if code:
        raise SystemExit(code)


def fit(folder: Path, configs: Sequence[str | Path]) -> None:
    """``rest fit`` with the configuration files, from the last checkpoint in the run's folder where
    there is one.
    """
    resume = ["--ckpt_path", str(folder / LAST)] if (folder / LAST).is_file() else []
    if resume:
        print(f"{folder}: resumed", flush=True)
    rest("fit", *(word for config in configs for word in ("--config", str(config))), *resume)


def write_overlay(folder: Path, content: dict[str, Any], name: str = "overlay.yaml") -> Path:
    """A configuration file of a run's own; YAML reads JSON."""
    path = folder / name
    write_text_atomic(path, json.dumps(content, indent=2))
    return path


def trainer_overlay(
    folder: Path, minutes: float | None = None, max_steps: int | None = None
) -> dict[str, Any]:
    """The trainer of a run: its folder with a TensorBoard log, and its budget in time or in
    steps.
    """
    trainer: dict[str, Any] = {
        "default_root_dir": str(folder),
        "logger": {
            "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
            "init_args": {"save_dir": str(folder), "name": "", "version": ""},
        },
    }
    if minutes is not None:
        seconds = round(minutes * 60)
        trainer["max_time"] = (
            f"00:{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
        )
    if max_steps is not None:
        trainer["max_steps"] = max_steps
    return trainer
