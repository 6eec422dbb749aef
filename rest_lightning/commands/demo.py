"""Stream the bundled portrait and speech to OUT/demo.mp4, with a report (demo.json) and a contact sheet (demo.png)."""

from __future__ import annotations

import argparse
from pathlib import Path

from rest_lightning.commands.talk import TalkOptions, add_model_arguments, talk
from rest_lightning.errors import UserError

ASSETS = Path(__file__).resolve().parent.parent / "assets"
PORTRAIT, SPEECH = ASSETS / "portrait.png", ASSETS / "speech.wav"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder (default outputs)")
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Make the three files; older ones are replaced."""
    options = vars(args)
    folder: Path = options.pop("out")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"expected a folder for the demo, got the file {folder}: choose another name with --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"expected to make {folder}, got '{error.strerror}': choose another --out") from error
    video, report, sheet = (folder / f"demo{suffix}" for suffix in (".mp4", ".json", ".png"))
    talk(TalkOptions(PORTRAIT, str(SPEECH), video, overwrite=True, report=report, sheet=sheet, **options))
    print("\n".join(f"wrote {path}" for path in (video, report, sheet)))
    return 0
