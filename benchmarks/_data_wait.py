"""How much of a training step is waiting for its batch: the stages of `rest train-embedded`, timed
by Lightning.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rest_lightning.cli import main as rest
from rest_lightning.commands._runs import trainer_overlay, write_overlay
from rest_lightning.commands.train_embedded import STAGES, VAE_STAGE, Stage, stage_overlay
from rest_lightning.data.layout import (
    read_dataset_json,
    read_manifest,
    write_dataset_json,
    write_manifest,
)
from rest_lightning.errors import UserError

STAGE_NAMES = tuple(stage.name for stage in STAGES)
TARGET_WAIT_SHARE = 0.05
WARM_UP_STEPS = 5  # the first batches wait for the loader's processes to start
_NEXT, _STEP = "[_TrainingEpochLoop].train_dataloader_next", "run_training_batch"


def measure_waits(
    names: Sequence[str], size: str, data: Path, folder: Path, num_steps: int, num_clips: int
) -> Iterator[dict[str, Any]]:
    """A row per stage: mean time of a step and of waiting for its batch, in ms, and its share.

    Args:
        names: stages to time; those that others start from run for one step.
        size: ``embedded``, or ``tiny``.
        data: clips to train on, the first ``num_clips`` of its training split.
        folder: for checkpoints.
        num_steps: timed steps.
    """
    if not names:
        return
    clips, out = subset(data, folder / "data", num_clips), folder / "runs"
    for stage in STAGES:
        if stage.name not in needed(names):
            continue
        if stage.uses_latents and not (out / "latents").exists():
            words = ["encode", "--model", str(out / VAE_STAGE / "final.ckpt"), "--data", str(clips)]
            words += ["--references-per-clip", "1"]  # the stages begin with a clip's first frame
            window = "49" if size == "tiny" else "121"
            if rest([*words, "--out", str(out / "latents"), "--num-frames", window]):
                raise UserError(
                    "expected latents of the training clips, got none: see the line above"
                )
        timed = stage.name in names
        durations = train(stage, size, clips, out, WARM_UP_STEPS + num_steps if timed else 1)
        if timed:
            wait, step = (
                1000 * sum(durations[key][WARM_UP_STEPS:]) / num_steps for key in (_NEXT, _STEP)
            )
            share = wait / (wait + step)
            yield {
                "stage": stage.name,
                "num_steps": num_steps,
                "step_ms": wait + step,
                "wait_ms": wait,
                "wait_share": share,
            }


def needed(names: Sequence[str]) -> set[str]:
    """The stages and those that they start from, as far as they need a checkpoint."""
    stages = {stage.name: stage for stage in STAGES}
    found, todo = set(), list(names)
    while todo:
        stage = stages[todo.pop()]
        found.add(stage.name)
        todo += [
            *stage.initial.values(),
            *filter(None, [stage.teacher, stage.source]),
            *([VAE_STAGE] if stage.uses_latents else []),
        ]
    return found


def train(
    stage: Stage, size: str, clips: Path, out: Path, num_steps: int
) -> dict[str, list[float]]:
    """Durations that Lightning's profiler recorded, in s, by action."""
    from rest_lightning import lightning_cli

    tiny = ("trainer/tiny", "model/tiny", "data/tiny") if size == "tiny" else ()
    words = ["fit", *(word for file in (stage.config, *tiny) for word in ("--config", file))]
    changes = stage_overlay(stage, out, clips)
    changes["data"].pop("speech_dir", None)
    changes["trainer"] = trainer_overlay(out / stage.name)
    path = write_overlay(out / stage.name, changes)
    words += [
        "--config",
        str(path),
        f"--trainer.max_steps={num_steps}",
        "--trainer.profiler=simple",
    ]
    trainer = lightning_cli.run(words).trainer
    return dict(trainer.profiler.recorded_durations)


def subset(data: Path, out: Path, num_clips: int) -> Path:
    """A data set of the first training clips and some of the others; the clips' files stay where
    they are.
    """
    rows = read_manifest(data)
    chosen = [row for row in rows if row.split == "train"][:num_clips]
    chosen += [row for row in rows if row.split == "val"][:4]
    out.mkdir(parents=True)
    (out / "clips").symlink_to((data / "clips").absolute(), target_is_directory=True)
    write_dataset_json(out, read_dataset_json(data))
    write_manifest(out, chosen)
    return out
