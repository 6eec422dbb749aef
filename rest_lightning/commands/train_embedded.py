"""``rest train-embedded``: every stage of the embedded model, unattended, within a time budget,
resumable.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path

from rest_lightning.commands._runs import fit, rest, trainer_overlay, write_overlay
from rest_lightning.data.layout import manifest_path
from rest_lightning.errors import UserError

CONFIGS = ("configs/trainer/embedded.yaml",)
RESERVE_MIN = 4.0  # starts of the processes, last validations, export
# of guidance 1, 2, 3 the best lips and the least drift
SAMPLING = {"num-steps": 8, "guidance": 2.0, "shift": 1.0}


@dataclass(frozen=True)
class Stage:
    """One stage of the recipe.

    Attributes:
        name: of its folder and of ``configs/embedded/<config>.yaml``.
        share: of the time that is left after the data are rendered.
        initial: part -> stage whose final checkpoint it starts from.
        teacher: stage that ASD distils from, if any.
        uses_latents: whether it reads the latents that the ``encode`` step made.
    """

    name: str
    share: float
    initial: dict[str, str] = field(default_factory=dict)
    teacher: str | None = None
    uses_latents: bool = False


STAGES = (
    Stage("vae_start", 0.10),
    Stage("vae", 0.28, {"vae": "vae_start"}),
    Stage("vae_decoder", 0.10, {"vae": "vae"}),
    Stage("speech_ae", 0.03),
    Stage("teacher", 0.31, {"speech_ae": "speech_ae"}, uses_latents=True),
    Stage("student", 0.10, {"transformer": "teacher", "speech_ae": "teacher"}, uses_latents=True),
    Stage(
        "asd",
        0.08,
        {"transformer": "student", "speech_ae": "student"},
        "teacher",
        uses_latents=True,
    ),
)

VAE_STAGE = "vae_decoder"  # whose VAE makes the latents and is exported


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "--budget-min", type=float, default=100.0, help=("minutes of training in all (default 100)")
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/embedded"), help=("folder of checkpoints and logs")
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("data/talkers"),
        help=("synthetic talkers; rendered when absent"),
    )
    parser.add_argument(
        "--num-clips", type=int, default=1320, help=("clips to render when the data are absent")
    )
    parser.add_argument(
        "--export",
        type=Path,
        default=Path("rest_lightning/assets/embedded"),
        help="model folder to write (default: the embedded model itself)",
    )
    parser.add_argument(
        "--config",
        type=Path,
        action="append",
        default=[],
        help=("overlay for every stage; repeatable"),
    )


def run(args: argparse.Namespace) -> int:
    """Render, train stage after stage, export. A second run continues where the first one
    stopped.
    """
    started_s = time.monotonic()
    if not Path("configs/embedded").is_dir():
        raise UserError(
            "expected to run in a checkout of rest-lightning with configs/embedded, got another "
            "folder: cd there"
        )
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    synthesise(args.data, args.num_clips)
    for number, stage in enumerate(STAGES):
        if (out / stage.name / "final.ckpt").is_file():
            print(f"{stage.name}: done before", flush=True)
            continue
        if stage.uses_latents:
            encode(out, args.data)
        left_min = args.budget_min - (time.monotonic() - started_s) / 60 - RESERVE_MIN
        share = stage.share / sum(later.share for later in STAGES[number:])
        train(stage, out, args.data, max(0.5, left_min * share), args.config)
    export(out, args.export)
    return 0


def synthesise(data: Path, num_clips: int) -> None:
    """Render the clips unless they are there; an interrupted rendering goes on."""
    if not manifest_path(data).is_file():
        rest("synthesize", "--out", str(data), "--num-clips", str(num_clips))


def encode(out: Path, data: Path) -> None:
    """Latents of all clips, once, with the trained VAE."""
    target = out / "latents"
    rest(
        "encode",
        "--model",
        str(out / VAE_STAGE / "final.ckpt"),
        "--data",
        str(data),
        "--out",
        str(target),
    )


def export(out: Path, model: Path) -> None:
    """Write the model folder."""
    checkpoint, vae = out / STAGES[-1].name / "final.ckpt", out / VAE_STAGE / "final.ckpt"
    options = [word for name, value in SAMPLING.items() for word in (f"--{name}", str(value))]
    rest("export", str(checkpoint), "--vae", str(vae), "--out", str(model), "--overwrite", *options)


def train(stage: Stage, out: Path, data: Path, minutes: float, overlays: list[Path]) -> None:
    """One ``rest fit`` in a process of its own; continues from its last checkpoint."""
    folder = out / stage.name
    overlay = write_overlay(folder, stage_overlay(stage, out, data, minutes))
    print(f"{stage.name}: {minutes:.1f} minutes", flush=True)
    fit(folder, [*CONFIGS, f"configs/embedded/{stage.name}.yaml", *overlays, overlay])


def stage_overlay(stage: Stage, out: Path, data: Path, minutes: float) -> dict[str, object]:
    """What a stage's configuration file cannot know: folders, time and where its parts start. YAML
    reads JSON.
    """
    init_args: dict[str, object] = {}
    sources = {**stage.initial, **({"vae": VAE_STAGE} if stage.uses_latents else {})}
    if sources:
        init_args["initial"] = {
            part: str(out / source / "final.ckpt") for part, source in sources.items()
        }
    if stage.teacher:
        init_args["asd"] = {"teacher": str(out / stage.teacher / "final.ckpt")}
    overlay: dict[str, object] = {
        "trainer": trainer_overlay(out / stage.name, minutes),
        "data": {"data_dir": str(data)},
    }
    if init_args:
        overlay["model"] = {"init_args": init_args}
    if stage.uses_latents:
        overlay["data"] = {"data_dir": str(data), "latents_dir": str(out / "latents")}
    return overlay
