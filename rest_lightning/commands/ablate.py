r"""Train a base and its ablations within the same budget, score each, and put mean and spread into
one table.

  rest ablate --base embedded/asd --runs runs/embedded \
    --overlays ablation/no_asd ablation/no_context_cache --budget-min 10 --seeds 3

Every run has a folder OUT/<name>/seed-<n> with its checkpoint and its result row. A second call
does only what is missing. An overlay with `sampling` alone is not trained: it samples the base's
checkpoints. A run that fails is told at the end, and the others go on. `rest leaderboard OUT` shows
the rows.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rest_lightning.commands._runs import FINAL, fit, rest, trainer_overlay, write_overlay
from rest_lightning.commands.train_embedded import STAGES, VAE_STAGE, stage_overlay
from rest_lightning.config import find_config, read_config
from rest_lightning.errors import UserError
from rest_lightning.processes import owned

BASE = "base"
RECIPE = "recipe.json"


@dataclass(frozen=True)
class Variant:
    """One line of the table: a name, and the overlay that makes it (None: the base)."""

    name: str
    overlay: Path | None = None

    @property
    def is_sampled(self) -> bool:
        """Whether it says how to sample, and nothing of the training."""
        return self.overlay is not None and set(_read(self.overlay)) == {"sampling"}

    @property
    def question(self) -> str:
        """The overlay's first comment."""
        if self.overlay is None:
            return "the recipe itself"
        return self.overlay.read_text(encoding="utf-8").splitlines()[0].removeprefix("#").strip()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "--base", type=Path, nargs="+", required=True, help=("configuration files of the base run")
    )
    parser.add_argument(
        "--overlays",
        type=Path,
        nargs="*",
        default=[],
        help=("configuration files of the ablations"),
    )
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--budget-min", type=float, help="minutes of training of every run")
    budget.add_argument("--budget-steps", type=int, help="optimiser steps of every run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each (default 3)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/ablate"), help=("folder of the runs and the table")
    )
    parser.add_argument(
        "--runs",
        type=Path,
        help=("runs of `rest train-embedded` to start from: its VAE, teacher, latents"),
    )
    parser.add_argument(
        "--stage",
        default=STAGES[-1].name,
        help=("stage of these runs that the base is (default asd)"),
    )
    parser.add_argument(
        "--data", type=Path, help="clips to train on (default: those of the base's data.data_dir)"
    )
    parser.add_argument(
        "--vae",
        type=Path,
        help=("checkpoint or folder of the VAE to score with (default: that of --runs)"),
    )
    parser.add_argument(
        "--protocol", default="synthetic", help="evaluation: a name of configs/eval, or a file"
    )
    parser.add_argument(
        "--eval-data",
        type=Path,
        help=("true clips of the protocol (default: those that its file names)"),
    )
    parser.add_argument("--num-clips", type=int, help="score fewer clips than the protocol's")


def run(args: argparse.Namespace) -> int:
    """Train, score, tabulate. Exit code 1 when a run failed."""
    variants = plan(args)
    with owned(args.out, "rest ablate"):
        _check_recipe(args)
        return _run(args, variants)


def _run(args: argparse.Namespace, variants: list[Variant]) -> int:
    failed = []
    clips = args.data or "the clips that the base names (data.data_dir)"
    print(f"training on {clips}", flush=True)
    for seed in range(args.seeds):
        for variant in variants:
            try:
                if not (row := _folder(args, variant, seed) / "row.json").is_file():
                    _train(args, variant, seed)
                    _score(args, variant, seed, row)
            except SystemExit as error:
                failed.append(f"{variant.name} seed {seed} (exit code {error.code})")
                print(f"{failed[-1]} failed", flush=True)
        tabulate(args, variants, failed)
    return 1 if failed else 0


def plan(args: argparse.Namespace) -> list[Variant]:
    """The base and its ablations.

    Raises:
        UserError: files that are not there, two of one name, a budget or number of seeds below one.
    """
    args.base = [find_config(path) for path in args.base]
    args.overlays = [find_config(path) for path in args.overlays]
    if args.seeds < 1 or (args.budget_min or args.budget_steps or 0) <= 0:
        raise UserError("expected a budget and a number of seeds above 0: raise them")
    if args.runs is None and args.vae is None:
        raise UserError(
            "expected a VAE to score with, got neither --vae nor --runs: name one of them"
        )
    if args.runs is not None and args.stage not in {
        stage.name for stage in STAGES if stage.uses_latents
    }:
        raise UserError(
            "expected a stage of the A2V-DiT (teacher, student, asd), got "
            f"{args.stage!r}: choose one"
        )
    variants = [Variant(BASE), *(Variant(path.stem, path) for path in args.overlays)]
    names = [variant.name for variant in variants]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"expected overlays of different names, got {twice[0]!r} twice: rename one")
    return variants


def tabulate(args: argparse.Namespace, variants: list[Variant], failed: list[str]) -> None:
    """Write OUT/ablation.md and OUT/ablation.json from the rows so far."""
    from rest_lightning.evaluation.leaderboard import make_board, to_json, to_markdown
    from rest_lightning.evaluation.row import read_rows
    from rest_lightning.media.files import whole_file

    files = [
        _folder(args, variant, seed) / "row.json"
        for variant in variants
        for seed in range(args.seeds)
    ]
    rows = [row for file in files if file.is_file() for row in read_rows(file)]
    if not rows:
        return
    groups = make_board(rows)
    budget = f"{args.budget_min:g} minutes" if args.budget_min else f"{args.budget_steps} steps"
    text = to_markdown(
        groups, (f"Ablations: {budget} of training each, mean ± spread of up to {args.seeds} seeds")
    )
    text += "\n" + "".join(f"- **{variant.name}**: {variant.question}\n" for variant in variants)
    text += "".join(f"- failed run: {name}\n" for name in failed)
    for name, content in (
        ("ablation.md", text),
        (
            "ablation.json",
            json.dumps({**to_json(groups), "failed_runs": failed}, indent=2, ensure_ascii=False)
            + "\n",
        ),
    ):
        with whole_file(args.out / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    print(f"{args.out / 'ablation.md'}: {len(rows)} rows", flush=True)


def _train(args: argparse.Namespace, variant: Variant, seed: int) -> None:
    """One run of ``rest fit``, unless it is done or needs none."""
    folder = _checkpoint(args, variant, seed).parent
    if (folder / FINAL).is_file():
        return
    if variant.is_sampled:
        variant = Variant(BASE)
    overlay: dict[str, Any] = {"data": {"data_dir": str(args.data)}}
    if args.runs is not None:
        (stage,) = (stage for stage in STAGES if stage.name == args.stage)
        overlay = stage_overlay(stage, args.runs, args.data)
        if not (args.runs / "speech").is_dir():
            overlay["data"].pop("speech_dir")
    if args.data is None:
        del overlay["data"]["data_dir"]
    overlay["trainer"] = trainer_overlay(folder, args.budget_min, args.budget_steps)
    overlay["seed_everything"] = seed
    overlay["data"]["seed"] = seed
    configs = [*args.base, write_overlay(folder, overlay)]
    print(f"{variant.name} seed {seed}: training", flush=True)
    fit(folder, configs if variant.overlay is None else [*configs, variant.overlay])


def _score(args: argparse.Namespace, variant: Variant, seed: int, out: Path) -> None:
    """``rest test`` under the protocol, with the sampling of the base and of the overlay."""
    folder = _folder(args, variant, seed)
    sampling: dict[str, Any] = {}
    for path in [*args.base, *([] if variant.overlay is None else [variant.overlay])]:
        sampling |= _read(path).get("sampling") or {}
    overlay: dict[str, Any] = {
        "sampling": sampling,
        "model": {
            "init_args": {
                "model": str(_checkpoint(args, variant, seed)),
                "vae": str(args.vae or args.runs / VAE_STAGE / FINAL),
                "seed": seed,
            }
        },
        "trainer": {"default_root_dir": str(folder / "test")},
    }
    if args.eval_data is not None:
        overlay["data"] = {"data_dir": str(args.eval_data)}
    words = [f"--trainer.callbacks.out={out}", f"--trainer.callbacks.method={variant.name}"]
    if args.num_clips is not None:
        words.append(f"--trainer.callbacks.num_clips={args.num_clips}")
    evaluation = find_config(args.protocol, "eval", what="an evaluation")
    configs = [evaluation, write_overlay(folder, overlay, "score.yaml")]
    print(f"{variant.name} seed {seed}: scoring", flush=True)
    rest("test", *(word for config in configs for word in ("--config", str(config))), *words)


def _folder(args: argparse.Namespace, variant: Variant, seed: int) -> Path:
    return args.out / variant.name / f"seed-{seed}"


def _checkpoint(args: argparse.Namespace, variant: Variant, seed: int) -> Path:
    return _folder(args, Variant(BASE) if variant.is_sampled else variant, seed) / FINAL


def _check_recipe(args: argparse.Namespace) -> None:
    """Runs of another recipe under the same folder would end up in one table."""
    recipe: dict[str, Any] = {
        "base": [path.read_text(encoding="utf-8") for path in args.base],
        "budget_min": args.budget_min,
        "budget_steps": args.budget_steps,
        "runs": args.runs and str(args.runs),
        "stage": args.stage if args.runs else None,
        "data": args.data and str(args.data),
        "protocol": args.protocol,
        "num_clips": args.num_clips,
        "eval_data": args.eval_data and str(args.eval_data),
        "vae": args.vae and str(args.vae),
        "overlays": {path.stem: path.read_text(encoding="utf-8") for path in args.overlays},
    }
    path = args.out / RECIPE
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        overlays = before.get("overlays", {})
        recipe["overlays"] = overlays | recipe["overlays"]  # more of them may come
        different = [
            key
            for key, value in recipe.items()
            if key != "overlays" and before.get(key, value) != value
        ]
        changed = [name for name, text in overlays.items() if recipe["overlays"][name] != text]
        different += [f"overlay {name}" for name in changed if _has_begun(args.out / name)]
        if different:
            raise UserError(
                f"expected the recipe that {args.out} was begun with, got another {different[0]}: "
                "repeat it, or choose "
                "another --out"
            )
    write_overlay(args.out, recipe, RECIPE)


def _has_begun(folder: Path) -> bool:
    """Whether a run left something that another overlay of the same name would go on from."""
    return any(path.suffix == ".ckpt" or path.name == "row.json" for path in folder.rglob("*"))


def _read(path: Path) -> dict[str, Any]:
    return read_config(path).content
