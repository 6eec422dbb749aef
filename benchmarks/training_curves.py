"""Did the loss of every stage fall? Start and end of each training run, from its TensorBoard files.

``python -m benchmarks.training_curves runs/embedded --out benchmarks/results/training_curves.json``

FOLDER holds a folder per stage, as `rest train-embedded` leaves them. README.md explains every
number.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._result import origin, write_result
from rest_lightning.commands.train_embedded import STAGES
from rest_lightning.errors import UserError, exit_code

LOSS = "train/loss"
PREFIXES = ("train/", "val/")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return exit_code(lambda: run(parse(arguments)))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "folder", type=Path, nargs="?", default=Path("runs/embedded"), help="of the stages' folders"
    )
    parser.add_argument(
        "--stages", nargs="+", default=[stage.name for stage in STAGES], help="(default: all)"
    )
    parser.add_argument(
        "--points", type=int, default=5, help=("logged values that start and end are the mean of")
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/training_curves.json"))
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> int:
    """Read every stage, write, print. Exit code 1 when a loss did not fall."""
    if args.points < 1:
        raise UserError(f"expected --points of at least 1, got {args.points}: raise it")
    stages = {name: curves_of(args.folder / name, args.points) for name in args.stages}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "stages": stages,
        "all_losses_fell": all(stage["loss_fell"] for stage in stages.values()),
        **origin(args),
    }
    write_result(args.out, result)
    for name, stage in stages.items():
        loss = stage["curves"][LOSS]
        print(
            f"{name:12} {LOSS} {loss['start']:10.4f} -> {loss['end']:10.4f} (lowest "
            f"{loss['lowest']:.4f}) in "
            f"{loss['last_step'] + 1} steps, {stage['minutes']:.1f} "
            f"min{'' if stage['loss_fell'] else ': DID NOT FALL'}"
        )
    print(f"wrote {args.out}")
    return 0 if result["all_losses_fell"] else 1


def curves_of(folder: Path, num_points: int) -> dict[str, Any]:
    """Start and end of every scalar of one stage; a run that was resumed has several files, which
    continue each other.

    Raises:
        UserError: no event files, no training loss, or too few values of it to tell a start from an
            end.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not any(folder.glob("events.out.tfevents.*")):
        raise UserError(
            f"expected TensorBoard's event files of a stage in {folder}, got none: "
            "train that stage first"
        )
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})  # 0 keeps every value
    events.Reload()
    curves: dict[str, dict[str, Any]] = {}
    seconds: list[float] = []
    for tag in events.Tags()["scalars"]:
        if not tag.startswith(PREFIXES):
            continue
        # a resumed run logs some steps again
        points = {event.step: event for event in events.Scalars(tag)}
        values = np.array([points[step].value for step in sorted(points)])
        seconds += [event.wall_time for event in points.values()]
        if not np.isfinite(values).all():
            raise UserError(
                f"{folder}: expected finite values of {tag}, got {values[~np.isfinite(values)][0]}"
            )
        count = min(num_points, max(1, len(values) // 2))
        curves[tag] = {
            "start": round(float(values[:count].mean()), 6),
            "end": round(float(values[-count:].mean()), 6),
            "lowest": round(float(values.min()), 6),
            "num_values": len(values),
            "num_averaged": count,
            "first_step": min(points),
            "last_step": max(points),
        }
    if LOSS not in curves or curves[LOSS]["num_values"] < 2:
        raise UserError(
            f"{folder}: expected two values of {LOSS} or more, got "
            f"{curves.get(LOSS, {}).get('num_values', 0)}: "
            "lower trainer.log_every_n_steps"
        )
    fell = curves[LOSS]["end"] < curves[LOSS]["start"]
    minutes = round((max(seconds) - min(seconds)) / 60, 2)
    return {"loss_fell": fell, "minutes": minutes, "curves": dict(sorted(curves.items()))}


if __name__ == "__main__":
    sys.exit(main())
