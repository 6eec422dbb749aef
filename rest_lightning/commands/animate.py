"""Photographs become training talkers: the face of a speaking driver moves each of them.

A model of faces of your own needs photographs of them and a few minutes of anybody's speech on
video (rest prepare). Needs the extra `prepare`; rest doctor says how to install it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rest_lightning.processes import owned


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "--portraits",
        type=Path,
        required=True,
        action="append",
        help="folder of stills; repeatable",
    )
    parser.add_argument(
        "--drivers", type=Path, required=True, help="prepared clips with speech, of rest prepare"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the dataset")
    parser.add_argument(
        "--num-clips", type=int, required=True, help="clips in all splits together; may grow later"
    )
    parser.add_argument("--size-px", type=int, default=256, help="side of the frames (default 256)")
    parser.add_argument(
        "--num-frames", type=int, default=121, help="frames per clip at 25 fps (default 121)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="the same seed gives the same clips (default 0)"
    )
    parser.add_argument("--num-workers", type=int, default=2, help="processes (default 2)")
    parser.add_argument(
        "--val-fraction", type=float, default=0.05, help="share of the photographs (default 0.05)"
    )
    parser.add_argument(
        "--test-fraction", type=float, default=0.05, help="share of the photographs (default 0.05)"
    )
    parser.add_argument(
        "--include-drivers",
        action="store_true",
        help="the drivers' own clips belong to the set, too",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="delete the animated dataset in OUT first"
    )


def run(args: argparse.Namespace) -> int:
    """Animate what is missing."""
    from rest_lightning.data.animated.dataset import animate_dataset, draw_sheet

    with owned(args.out, "rest animate"):
        refused = animate_dataset(**vars(args))
        sheet = draw_sheet(args.out)
    if refused:
        reasons = ", ".join(
            f"{reason} {count}"
            for reason, count in sorted(refused.items(), key=lambda item: -item[1])
        )
        print(f"left out: {reasons} (each in {args.out / 'portraits.jsonl'})")
    print(f"{args.out}: {args.num_clips} clips; look at {sheet}")
    return 0
