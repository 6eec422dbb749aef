"""Runs of `rest fit` and `rest predict` that die at a chosen moment, each in a fork of this
process.

For tests/tasks/test_resume.py and tests/callbacks/test_killed_predict.py.

Reads JSON from standard input: a list of {"words": command line, "moment": name or null, "count":
which time}. A run goes on from its --ckpt_path where that file exists, and starts anew where it
does not.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from rest_lightning import lightning_cli  # first: it makes lightning importable
from rest_lightning.tasks import student as _student  # noqa: F401  # here and not in every fork

from lightning.pytorch import Callback  # isort: skip


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(moment: str, count: int) -> None:  # noqa: C901  # one moment after another
    """End this process without a word when ``moment`` comes for the ``count``-th time."""
    calls = 0

    def arrived(name: str) -> bool:
        nonlocal calls
        calls += name == moment
        return name == moment and calls == count

    save = torch.save

    def killing(rename: Any) -> Any:
        def killing_rename(*args: Any, **kwargs: Any) -> None:
            if arrived("before_rename"):
                die()
            rename(*args, **kwargs)
            if arrived("after_rename"):
                die()

        return killing_rename

    def killing_save(obj: Any, file: Any, **kwargs: Any) -> None:
        if arrived("half_written"):
            file.write(b"half of a checkpoint")
            file.flush()
            die()
        save(obj, file, **kwargs)

    # a file that must not replace another gets its final name by a link
    os.replace, os.link = killing(os.replace), killing(os.link)
    torch.save = killing_save  # type: ignore[assignment]

    class Kill(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            if arrived("batch_start"):
                die()

        def on_before_optimizer_step(self, *args: Any) -> None:
            if arrived("before_optimizer_step"):
                die()

        def on_train_batch_end(self, *args: Any) -> None:
            # before ModelCheckpoint, which Lightning calls last
            if arrived("after_optimizer_step"):
                die()

        def on_validation_start(self, *args: Any) -> None:
            if arrived("validation"):
                die()

        def on_predict_batch_start(self, *args: Any) -> None:
            if arrived("predict_batch_start"):
                die()

    def with_kill(run: Any) -> Any:
        @functools.wraps(run)  # LightningCLI reads the signature
        def run_with_kill(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            trainer.callbacks.insert(0, Kill())
            return run(trainer, *args, **kwargs)

        return run_with_kill

    for name in ("fit", "predict"):
        setattr(lightning_cli.Trainer, name, with_kill(getattr(lightning_cli.Trainer, name)))


def run(words: list[str], moment: str | None, count: int) -> int:
    """Exit code of a forked process that runs the command line: minus the signal if it was
    killed.
    """
    child = os.fork()
    if child == 0:
        try:
            if moment is not None:
                kill_at(moment, count)
            if "--ckpt_path" in words and not Path(words[words.index("--ckpt_path") + 1]).is_file():
                words = (
                    words[: words.index("--ckpt_path")] + words[words.index("--ckpt_path") + 2 :]
                )
            lightning_cli.run(words)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    codes = [run(job["words"], job["moment"], job["count"]) for job in json.load(sys.stdin)]
    print("exit codes", json.dumps(codes))
