"""Train the embedded model, a person at 256x256, from photographs and videos of speech.

  rest train-embedded --portraits photographs --drivers videos --whisper weights/whisper-tiny.en

Photographs are animated by the faces of the speaking drivers; then all stages follow each other
unattended, each within its share of --budget-min, and the model is exported. Run the same command
again after an interruption: what is done stays. Stages are configs/embedded/STAGE of the package.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rest_lightning.commands._runs import FINAL, fit, rest, trainer_overlay, write_overlay
from rest_lightning.config import Config, Tree, find_config, merge, network_of, read_config
from rest_lightning.data.layout import manifest_path
from rest_lightning.errors import UserError
from rest_lightning.processes import owned

RESERVE_MIN = 4.0  # for starts of processes, last validations and the export


@dataclass(frozen=True)
class Stage:
    """One stage of the recipe.

    Attributes:
        name: of its folder and of its configuration in ``configs/embedded``.
        share: of the time that is left when the data are there.
        initial: part -> stage whose final checkpoint it starts from.
        teacher: stage that ASD distils from, if any.
        source: stage whose guidance and steps are distilled, if any.
        uses_latents: whether it reads latents made once by the VAE of :data:`VAE_STAGE`.
        uses_speech: whether it reads speech features made once by the frozen encoder.
    """

    name: str
    share: float
    initial: dict[str, str] = field(default_factory=dict)
    teacher: str | None = None
    source: str | None = None
    uses_latents: bool = False
    uses_speech: bool = False

    @property
    def config(self) -> str:
        """Name of its configuration."""
        return f"embedded/{self.name}"


def _dit(name: str, share: float, before: str, **more: str) -> Stage:
    """A stage of the A2V-DiT that goes on from another one."""
    initial = {"transformer": before, "speech_ae": before}
    return Stage(name, share, initial, uses_latents=True, uses_speech=True, **more)  # type: ignore[arg-type]


STAGES = (
    Stage("vae", 0.30),
    Stage("vae_whole", 0.05, {"vae": "vae"}),
    Stage("vae_decoder", 0.05, {"vae": "vae_whole"}),
    Stage("detail", 0.05, {"vae": "vae_decoder"}),
    Stage("speech_ae", 0.03, uses_speech=True),
    Stage("teacher", 0.22, {"speech_ae": "speech_ae"}, uses_latents=True, uses_speech=True),
    _dit("student", 0.14, "teacher"),
    _dit("asd", 0.09, "student", teacher="teacher"),
    _dit("distill", 0.07, "asd", source="asd"),
)
VAE_STAGE = "vae_decoder"  # whose VAE makes the latents and is exported
DETAIL_STAGE = "detail"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "--portraits",
        type=Path,
        action="append",
        default=[],
        help="folder of photographs, one face each; repeatable",
    )
    parser.add_argument(
        "--drivers", type=Path, help="folder of videos of speech, or of clips by rest prepare"
    )
    parser.add_argument(
        "--whisper", type=Path, help="folder of Whisper (default: that of configs/model/embedded)"
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("data/people"),
        help="clips to train on; made when absent (default data/people)",
    )
    parser.add_argument("--num-clips", type=int, default=2000, help="clips to make (default 2000)")
    parser.add_argument(
        "--budget-min", type=float, default=100.0, help="minutes of training in all (default 100)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/embedded"),
        help="folder of checkpoints and logs (default runs/embedded)",
    )
    parser.add_argument(
        "--export", type=Path, help="model folder to write (default: OUT/model, replaced)"
    )
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        help="overlay for every stage: a shipped name or a file; repeatable",
    )


def run(args: argparse.Namespace) -> int:
    """Make the data, train stage after stage, export. A second run goes on where the first one
    stopped.
    """
    started_s = time.monotonic()
    out: Path = args.out
    check(args)
    with owned(out, "rest train-embedded"):
        _run(args, out, started_s)
    return 0


def _run(args: argparse.Namespace, out: Path, started_s: float) -> None:
    make_data(args.portraits, args.drivers, args.data, args.num_clips, out)
    for number, stage in enumerate(STAGES):
        if (out / stage.name / FINAL).is_file():
            print(f"{stage.name}: done before", flush=True)
            continue
        config = write_stage(stage, out, args.data, args.whisper, args.config)
        if stage.uses_speech:
            encode_speech(config, out, args.data)
        if stage.uses_latents:
            encode_latents(config, out, args.data)
        left_min = args.budget_min - (time.monotonic() - started_s) / 60 - RESERVE_MIN
        share = stage.share / sum(later.share for later in STAGES[number:])
        train(stage, config, out, max(0.5, left_min * share))
    export(out, args.export or out / "model")


def check(args: argparse.Namespace) -> None:
    """Looks at everything that can be wrong before hours of work begin.

    Raises:
        UserError: no data and nothing to make them of, no Whisper, an unknown overlay, an export
            folder that holds something else than a model.
    """
    from rest_lightning.commands.export import check_folder

    if not manifest_path(args.data).is_file():
        if not args.portraits or args.drivers is None:
            raise UserError(
                f"expected clips in {args.data}, or photographs and videos of speech to make them "
                "of: give --portraits FOLDER and --drivers FOLDER"
            )
        for folder in (*args.portraits, args.drivers):
            if not folder.is_dir():
                raise UserError(f"expected a folder, got {folder}: check the name")
    check_folder(args.export or args.out / "model", overwrite=True)
    overlays = [find_config(name) for name in args.config]
    content: Tree = {}
    for path in (find_config("model/embedded"), *overlays):
        merge(content, read_config(path).content)
    encoder = network_of(content, "speech_encoder")
    if encoder["class_path"].endswith("WhisperEncoder"):
        weights = args.whisper or Path(encoder["init_args"]["weights"])
        if not weights.is_dir():
            raise UserError(
                f"expected Whisper in the folder {weights}, got none: hf download "
                "openai/whisper-tiny.en, and name its folder with --whisper"
            )


def make_data(
    portraits: Sequence[Path], drivers: Path | None, data: Path, num_clips: int, out: Path
) -> None:
    """Prepare the drivers and animate the photographs, unless the clips are there."""
    if manifest_path(data).is_file() or drivers is None:
        return
    if not manifest_path(drivers).is_file():
        prepared = out / "drivers"
        rest("prepare", str(drivers), "--out", str(prepared), "--min-frames", "73")
        drivers = prepared
    folders = [word for folder in portraits for word in ("--portraits", str(folder))]
    words = ("--drivers", str(drivers), "--out", str(data), "--num-clips", str(num_clips))
    rest("animate", *folders, *words, "--include-drivers")


def write_stage(
    stage: Stage, out: Path, data: Path, whisper: Path | None, overlays: Sequence[str]
) -> Path:
    """Write what a stage is configured by into its folder: its file, then Whisper's folder, then
    the overlays, then the folders of this run.
    """
    bases = [str(find_config(stage.config).resolve())]
    if whisper is not None:
        encoder = {"init_args": {"weights": str(whisper.resolve())}}
        file = write_overlay(out, {"networks": {"speech_encoder": encoder}}, "whisper.yaml")
        bases.append(str(file.resolve()))
    bases += [str(find_config(name).resolve()) for name in overlays]
    content = {"base": bases, **stage_overlay(stage, out, data)}
    return write_overlay(out / stage.name, content, "stage.yaml")


def encode_latents(config: Path, out: Path, data: Path) -> None:
    """Make the latents of all clips with the trained VAE; what is done stays."""
    words = ["--model", str(out / VAE_STAGE / FINAL), "--data", str(data)]
    words += ["--references-per-clip", "1"]  # a clip's first frame: data.reference is clip_start
    rest("encode", *words, "--out", str(out / "latents"), *_windows(read_config(config)))


def encode_speech(config: Path, out: Path, data: Path) -> None:
    """Make the features of all speech with the frozen encoder; what is done stays."""
    words = ("--speech-encoder", str(config), "--data", str(data))
    rest("encode", *words, "--out", str(out / "speech"), *_windows(read_config(config)))


def train(stage: Stage, config: Path, out: Path, minutes: float) -> None:
    """Run ``rest fit`` in a process of its own, from its last checkpoint where there is one."""
    folder = out / stage.name
    budget = write_overlay(folder, {"trainer": trainer_overlay(folder, minutes)}, "budget.yaml")
    print(f"{stage.name}: {minutes:.1f} minutes", flush=True)
    fit(folder, [config, budget])


def export(out: Path, model: Path) -> None:
    """Write the model folder."""
    checkpoint, vae = out / STAGES[-1].name / FINAL, out / VAE_STAGE / FINAL
    detail = ("--detail", str(out / DETAIL_STAGE / FINAL))
    words = ("--vae", str(vae), *detail, "--out", str(model), "--overwrite")
    rest("export", str(checkpoint), *words)


def stage_overlay(stage: Stage, out: Path, data: Path) -> dict[str, Any]:
    """Returns what a stage's file cannot know: folders, and where its parts start."""
    model: dict[str, Any] = {}
    sources = {**stage.initial, **({"vae": VAE_STAGE} if stage.uses_latents else {})}
    if sources:
        model["initial"] = {part: str(out / name / FINAL) for part, name in sources.items()}
    if stage.teacher:
        model["asd"] = {"teacher": str(out / stage.teacher / FINAL)}
    if stage.source:
        model["distill"] = {"source": str(out / stage.source / FINAL)}
    folders = {"data_dir": str(data)}
    if stage.uses_latents:
        folders["latents_dir"] = str(out / "latents")
    if stage.uses_speech:
        folders["speech_dir"] = str(out / "speech")
    overlay: dict[str, Any] = {"data": folders}
    if model:
        overlay["model"] = {"init_args": model}
    return overlay


def _windows(config: Config) -> tuple[str, ...]:
    """Length of a stage's windows, for ``rest encode``."""
    return "--num-frames", str(config.content["data"]["num_frames"])
