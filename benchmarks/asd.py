"""Does a student with ASD come closer to its teacher than one without? The same start, steps and
seeds for both.

``python -m benchmarks.asd --teacher runs/embedded/teacher/final.ckpt --latents
runs/embedded/latents --steps 300``

Trains with `rest fit` (configs/embedded/asd.yaml, and configs/ablation/no_asd.yaml on top for the
other arm), then measures both on held-out clips at shared noise, noise levels and conditions. A run
that is done is not done again; one that was interrupted goes on. README.md explains every number.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from benchmarks._result import origin, write_result
from benchmarks.training_curves import curves_of
from rest_lightning import lightning_cli  # first: it makes lightning importable
from rest_lightning.config import read_config
from rest_lightning.data.module import TalkingHeadDataModule
from rest_lightning.data.window_cache import LatentsCache
from rest_lightning.diffusion.losses import asd_loss
from rest_lightning.errors import UserError, exit_code
from rest_lightning.media.files import sha256_of, write_text_atomic
from rest_lightning.parts import build_part, open_speech_encoder, read_part
from rest_lightning.tasks.a2v import Conditions, NoiseSettings
from rest_lightning.tasks.speech_ae import speech_features
from rest_lightning.tasks.student import ASDSettings, StudentModule

from lightning.pytorch import Callback, LightningModule, Trainer  # isort: skip

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
ARMS = {"asd": (), "no_asd": (CONFIGS / "ablation/no_asd.yaml",)}
METRICS = (
    "teacher_error",
    "relative_teacher_error",
    "teacher_error_shared_speech",
    "flow_loss",
    "contrastive",
    "smoothness",
)
DATA_KEYS = (
    *("num_frames", "batch_size", "audio_left_frames", "audio_right_frames", "size_px"),
    "reference",
)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return exit_code(lambda: run(parse(arguments)))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--teacher", type=Path, default=Path("runs/embedded/teacher/final.ckpt"), help="checkpoint"
    )
    parser.add_argument(
        "--start", type=Path, help=("checkpoint that both arms start from (default: the teacher)")
    )
    parser.add_argument(
        "--latents", type=Path, default=Path("runs/embedded/latents"), help="cache of `rest encode`"
    )
    parser.add_argument("--data", type=Path, default=Path("data/talkers"), help="prepared clips")
    parser.add_argument(
        "--steps", type=int, default=300, help=("optimiser steps of every run (default 300)")
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1, 2],
        help=("of noise and order (default 0 1 2)"),
    )
    parser.add_argument(
        "--draws", type=int, default=4, help=("noise draws per held-out clip (default 4)")
    )
    parser.add_argument(
        "--split", choices=("val", "test"), default="test", help=("held-out clips (default test)")
    )
    parser.add_argument(
        "--config",
        type=Path,
        action="append",
        default=[],
        help=("overlay for all runs; repeatable"),
    )
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs/benchmarks/asd"),
        help=("folder of the trained students"),
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/asd.json"))
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> int:
    """Train and measure what is missing, write after every run, print."""
    args.start = args.start or args.teacher
    for name in ("steps", "draws"):
        if getattr(args, name) < 1:
            raise UserError(f"expected --{name} of at least 1, got {getattr(args, name)}: raise it")
    for path in (args.teacher, args.start, *args.config):
        if not path.is_file():
            raise UserError(
                f"expected a file, got no such one: {path}; `rest train-embedded` trains a teacher"
            )
    LatentsCache(args.latents)  # an error now rather than after the first configuration is read
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    start = None
    for seed in args.seeds:
        for arm in ARMS:
            folder = args.runs / f"{arm}-seed{seed}"
            train(folder, arm, seed, args)
            start = start or measure(folder, args, args.start)
            row = {
                "arm": arm,
                "seed": seed,
                **measure(folder, args, folder / lightning_cli.FINAL_CHECKPOINT),
            }
            rows.append(row | {"training": curves_of(folder, 5)["curves"]})
            print(
                f"{arm}, seed {seed}: " + ", ".join(f"{name} {row[name]:.5f}" for name in METRICS),
                flush=True,
            )
            write(args, rows, start)
    print(table(summarise(rows), start or {}))
    print(f"wrote {args.out}")
    return 0


# -- training --------------------------------------------------------------------------------------


def train(folder: Path, arm: str, seed: int, args: argparse.Namespace) -> None:
    """One `rest fit`, in this process, unless its final checkpoint is there.

    Raises:
        UserError: the folder holds a run with other settings.
    """
    files = {
        "stage": CONFIGS / "embedded/asd.yaml",
        **{f"overlay {number}": path for number, path in enumerate([*args.config, *ARMS[arm]])},
    }
    texts = {name: json.dumps(read_config(path).content) for name, path in files.items()}
    settings = {
        "arm": arm,
        "seed": seed,
        "steps": args.steps,
        "data": sha256_of(args.latents / "index.json"),
        **{
            name: sha256_of(path)
            for name, path in {"teacher": args.teacher, "start": args.start}.items()
        },
        **{name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()},
    }
    note = folder / "settings.json"
    if note.is_file() and (before := json.loads(note.read_text(encoding="utf-8"))) != settings:
        name = next(key for key in {**before, **settings} if before.get(key) != settings.get(key))
        raise UserError(
            f"{folder}: expected a run of the same {name}, got another: name a new "
            "folder with --runs"
        )
    if (folder / lightning_cli.FINAL_CHECKPOINT).is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(note, json.dumps(settings))
    write_text_atomic(folder / "overlay.yaml", json.dumps(overlay(folder, seed, args), indent=2))
    configs = [files["stage"], *args.config, folder / "overlay.yaml", *ARMS[arm]]
    last = folder / "checkpoints" / "last.ckpt"
    resume = ["--ckpt_path", str(last)] if last.is_file() else []
    cli = lightning_cli.run(
        ["fit", *(word for path in configs for word in ("--config", str(path))), *resume]
    )
    if cli.trainer.interrupted:
        raise KeyboardInterrupt
    assert cli.trainer.global_step == args.steps


class SameDraws(Callback):
    """Seeds a run's first step: building the teacher took numbers from the generator that the other
    arm still has.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run goes on with the state of its checkpoint instead."""
        if trainer.global_step == 0:
            torch.manual_seed(torch.initial_seed())


def overlay(folder: Path, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """What the stage's configuration cannot know. YAML reads JSON."""
    initial = {part: str(args.start) for part in ("transformer", "speech_ae")}
    logger = {"save_dir": str(folder), "name": "", "version": ""}
    averaging = "rest_lightning.callbacks.averaging.MovingAverage"
    checkpoints = "lightning.pytorch.callbacks.ModelCheckpoint"
    return {
        "seed_everything": seed,
        "trainer": {
            "max_steps": args.steps,
            "default_root_dir": str(folder),
            "log_every_n_steps": min(10, max(1, args.steps // 10)),
            "check_val_every_n_epoch": args.steps + 1,
            "limit_val_batches": 1,
            "logger": {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": logger,
            },
            "callbacks": [
                {"class_path": "benchmarks.asd.SameDraws"},
                {"class_path": averaging, "init_args": {"decay": 0.99}},
                {
                    "class_path": checkpoints,
                    "init_args": {"save_last": True, "save_top_k": 1, "every_n_train_steps": 50},
                },
            ],
        },
        "model": {
            "init_args": {"vae": None, "initial": initial, "asd": {"teacher": str(args.teacher)}}
        },
        "data": {"data_dir": str(args.data), "latents_dir": str(args.latents), "seed": seed},
    }


# -- measuring -------------------------------------------------------------------------------------


@dataclass
class Pair:
    """A student and its teacher, each with a SpeechAE of its own, and the data that they were
    trained on.
    """

    student: StudentModule
    teacher_speech_ae: Any
    data: TalkingHeadDataModule

    @classmethod
    def load(cls, folder: Path, args: argparse.Namespace, weights: Path) -> Pair:
        """The student of a run in ``folder`` with the weights of a checkpoint, its own or the
        common start's.
        """
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        final = folder / lightning_cli.FINAL_CHECKPOINT
        parts = {}
        for name, source in (
            ("transformer", weights),
            ("speech_ae", weights),
            ("teacher_speech_ae", args.teacher),
        ):
            part = name.removeprefix("teacher_")
            parts[name] = build_part(read_part(part, args.teacher if name != part else final)[0])
            parts[name].load_state_dict(read_part(part, source)[1])
        noise = NoiseSettings(**config["model"]["init_args"]["noise"])
        student = StudentModule(
            parts["transformer"],  # type: ignore[arg-type]
            parts["speech_ae"],  # type: ignore[arg-type]
            open_speech_encoder(final),  # type: ignore[arg-type]
            noise=replace(noise, identity_dropout=0.0, audio_dropout=0.0, joint_dropout=0.0),
            asd=ASDSettings(str(args.teacher)),
        )
        options = {
            key: config["data"][key] for key in DATA_KEYS if config["data"].get(key) is not None
        }
        data = TalkingHeadDataModule(
            str(args.data), num_workers=0, progress=False, latents_dir=str(args.latents), **options
        )
        return cls(student.eval(), parts["teacher_speech_ae"].eval(), data)

    def draws(self, split: str, num_draws: int) -> Iterator[dict[str, Tensor]]:
        """Velocities and target of every batch and draw, which are the same for all students."""
        student, data = self.student, self.data
        loader = data.test_dataloader() if split == "test" else data.val_dataloader()
        for number, batch in enumerate(loader):
            latents = batch["latents"].float()
            features = speech_features(batch, student.speech_encoder)
            conditions = Conditions(latents, student.speech_ae.encode(features))
            for draw in range(num_draws):
                inputs = student.draw(
                    conditions, torch.Generator().manual_seed(1000 * number + draw)
                )
                noisy, sigma = inputs.path.noisy_latents, inputs.path.sigma
                yield {
                    "student": student(inputs),
                    "teacher": student.teacher(
                        noisy, sigma, self.teacher_speech_ae.encode(features)
                    ),
                    "teacher_shared_speech": student.teacher(noisy, sigma, inputs.speech_latents),
                    "target": inputs.path.velocity,
                }


@torch.no_grad()
def measure(folder: Path, args: argparse.Namespace, weights: Path) -> dict[str, Any]:
    """Every metric of :data:`METRICS`, averaged over clips and draws, in float32."""
    values: dict[str, list[float]] = {name: [] for name in (*METRICS, "teacher_flow_loss")}

    def distance(a: Tensor, b: Tensor | float) -> float:
        return float((a - b)[:, :, 1:].square().mean())

    for batch in Pair.load(folder, args, weights).draws(args.split, args.draws):
        for row in range(len(batch["student"])):
            clip = {name: tensor[row : row + 1] for name, tensor in batch.items()}
            student, teacher, target = clip["student"], clip["teacher"], clip["target"]
            terms = asd_loss(student, teacher, target)
            values["teacher_error"].append(distance(student, teacher))
            values["relative_teacher_error"].append(
                distance(student, teacher) / distance(teacher, 0.0)
            )
            values["teacher_error_shared_speech"].append(
                distance(student, clip["teacher_shared_speech"])
            )
            values["flow_loss"].append(distance(student, target))
            values["teacher_flow_loss"].append(distance(teacher, target))
            values["contrastive"].append(float(terms.contrastive))
            values["smoothness"].append(float(terms.smoothness))
    result: dict[str, Any] = {name: statistics.fmean(numbers) for name, numbers in values.items()}
    return result | {"num_clips": len(values["flow_loss"]) // args.draws, "num_draws": args.draws}


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and sd over seeds of both arms, and ASD minus no ASD seed by seed."""
    summary: dict[str, Any] = {}
    for name in METRICS:
        arms = {arm: {row["seed"]: row[name] for row in rows if row["arm"] == arm} for arm in ARMS}
        differences = {
            str(seed): value - arms["no_asd"][seed]
            for seed, value in arms["asd"].items()
            if seed in arms["no_asd"]
        }
        summary[name] = {
            **{arm: _spread(list(values.values())) for arm, values in arms.items()},
            "asd_minus_no_asd": {"per_seed": differences, **_spread(list(differences.values()))},
            "asd_lower_in": (
                f"{sum(value < 0 for value in differences.values())} of {len(differences)} seeds"
            ),
        }
    return summary


def _spread(values: list[float]) -> dict[str, float | None]:
    return {
        "mean": statistics.fmean(values) if values else None,
        "sd": statistics.stdev(values) if len(values) > 1 else None,
    }


def write(args: argparse.Namespace, rows: list[dict[str, Any]], start: dict[str, Any]) -> None:
    """The JSON so far, whole."""
    result = {
        "start": start,
        "runs": rows,
        "summary": summarise(rows),
        "checkpoints": {name: sha256_of(getattr(args, name)) for name in ("teacher", "start")},
        "latents": json.loads((args.latents / "index.json").read_text(encoding="utf-8"))[
            "fingerprint"
        ],
        **origin(args),
        "seeds": {"training": args.seeds, "measuring": "1000 * batch + draw"},
    }
    write_result(args.out, result)


def table(summary: dict[str, Any], start: dict[str, Any]) -> str:
    """The same for people."""
    lines = [f"\n{'':30}{'start':>10}{'ASD':>20}{'without':>20}   ASD lower in"]
    for name, row in summary.items():
        cells = [f"{row[arm]['mean']:.5f} ± {row[arm]['sd'] or math.nan:.5f}" for arm in ARMS]
        lines.append(
            f"{name:30}{start.get(name, math.nan):>10.5f}{cells[0]:>20}{cells[1]:>20}   "
            f"{row['asd_lower_in']}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
