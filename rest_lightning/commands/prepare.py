"""Raw videos become prepared clips: 25 fps, 16 kHz, one static square around each face, filtered
and split.

Needs the extra `prepare`, but not with --box or --already-cropped; rest doctor says how to install
it. Run it again after an interruption, or when videos were added: what is done stays. A threshold
of null switches its filter off. --config reads options from a file; data/prepare has the defaults.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rest_lightning.errors import Terminated, UserError
from rest_lightning.processes import owned

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of the command: where, how, and every option of ``PrepareOptions``."""
    from rest_lightning.data.preparation.options import PrepareOptions

    parser.add_argument("videos", type=Path, nargs="?", help="folder of videos, or one video")
    parser.add_argument("--out", type=Path, help="folder of the dataset")
    parser.add_argument(
        "--inspect", type=Path, metavar="OUT", help=("print what a prepared folder holds, and stop")
    )
    parser.add_argument("--num-workers", type=int, default=2, help="processes (default 2)")
    parser.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="where the work runs"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument(
        "--box",
        type=_numbers,
        metavar="X,Y,W,H",
        help=("this square of every video; finds no faces"),
    )
    parser.add_argument(
        "--already-cropped",
        action="store_true",
        help=("the centred square of every video; finds no faces"),
    )
    parser.add_argument("--keep-dropped", action="store_true", help="write filtered clips too")
    parser.add_class_arguments(PrepareOptions, skip={"box", "already_cropped", "keep_dropped"})


def run(args: argparse.Namespace) -> int:
    """Prepare, or inspect. Exit code 1 when no clip was kept."""
    if args.inspect is not None:
        from rest_lightning.data.preparation.summary import inspect

        print(inspect(args.inspect), end="")
        return 0
    if args.videos is None or args.out is None:
        raise UserError("expected VIDEOS and --out FOLDER, got less: see rest prepare --help")
    from rest_lightning.data.preparation.options import PrepareOptions

    names = [field.name for field in fields(PrepareOptions)]
    options = PrepareOptions(**{name: getattr(args, name) for name in names})
    from rest_lightning.data.preparation.engine_local import find_videos
    from rest_lightning.data.preparation.finish import finish

    root = args.videos if args.videos.is_dir() else args.videos.parent
    sources = [args.videos] if args.videos.is_file() else find_videos(args.videos, args.out)
    _check_packages(options)
    from rest_lightning.media.files import swept

    parts = [args.out, *(args.out / name for name in ("clips", "thumbs", "sources"))]
    with owned(args.out, "rest prepare"), swept(*parts):
        try:
            rows = _engine(args.engine)(
                sources, root, args.out, options, args.num_workers, not args.quiet
            )
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(
                f"interrupted: the same command goes on where {args.out} stopped"
            ) from (interrupt if isinstance(interrupt, Terminated) else None)
        rows = finish(args.out, rows, options)
    _summarise(args.out, len(sources), rows)
    return 0 if any(row.status == "kept" for row in rows) else 1  # nothing made is no success


def _engine(name: str) -> Any:
    if name == "ray":
        from rest_lightning.data.preparation import engine_ray

        return engine_ray.run
    from rest_lightning.data.preparation import engine_local

    return engine_local.run


def _numbers(given: str | list[float] | None) -> list[float] | None:
    """``0,0,256,256`` of the command line; a file has a list."""
    if not isinstance(given, str):
        return given
    try:
        return [float(part) for part in given.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected four numbers x,y,w,h, got {given!r}") from None


def _check_packages(options: Any) -> None:
    """What no video could be prepared without is told before the first one."""
    if options.finds_faces:
        from rest_lightning.media.faces import check_detector

        check_detector(options.detector)
    if options.sync_weights is not None:
        from rest_lightning.data.preparation.sync import load_sync

        load_sync(options.sync_weights)
    if options.identity_map is not None:
        from rest_lightning.data.preparation.splits import read_mapping

        read_mapping(options.identity_map)


def _summarise(out: Path, num_videos: int, rows: list[Any]) -> None:
    status = Counter(row.status for row in rows)
    filters = Counter(row.filter for row in rows if row.status == "dropped")
    hours = sum(row.num_frames or 0 for row in rows if row.status == "kept") / 25 / 3600
    why = ", ".join(
        f"{name} {count} ({_options_of(name)})" for name, count in filters.most_common()
    )
    print(f"{out}: {status['kept']} clips ({hours:.2f} h) of {num_videos} videos")
    if filters:
        print(f"dropped {status['dropped']}: {why}")
    if status["failed"]:
        print(f"failed {status['failed']}: the reasons are in {out / 'prepare.jsonl'}")


def _options_of(name: str | None) -> str:
    """The options of a filter, as they are written."""
    from rest_lightning.data.preparation.filters import RULES

    options = [rule.option for rule in RULES if rule.filter == name]
    options += ["max_duplicate_distance"] if name == "duplicate" else []
    return ", ".join(f"--{option}" for option in options)


def add_synthesize_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--out", type=Path, required=True, help="folder of the dataset")
    parser.add_argument(
        "--num-clips",
        type=int,
        required=True,
        help=("clips in all splits together; may grow later"),
    )
    parser.add_argument("--size-px", type=int, default=128, help="side of the frames (default 128)")
    parser.add_argument(
        "--num-frames", type=int, default=113, help=("frames per clip at 25 fps (default 113)")
    )
    parser.add_argument(
        "--seed", type=int, default=0, help=("the same seed gives the same clips (default 0)")
    )
    parser.add_argument("--num-workers", type=int, default=2, help="processes (default 2)")
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=0.05,
        help=("share of validation clips (default 0.05)"),
    )
    parser.add_argument(
        "--test-fraction", type=float, default=0.05, help=("share of test clips (default 0.05)")
    )
    parser.add_argument(
        "--overwrite", action="store_true", help=("delete the synthetic dataset in OUT first")
    )


def run_synthesize(args: argparse.Namespace) -> int:
    """Render synthetic talkers in the prepared-clip layout, with their speech and true mouth
    opening.

    Needs the extra `synthetic`; rest doctor says how to install it.
    """
    from rest_lightning.data.synthetic.synthesize import synthesize

    with owned(args.out, "rest synthesize"):
        folder = synthesize(**vars(args))
    print(f"{folder}: {args.num_clips} clips")
    return 0
