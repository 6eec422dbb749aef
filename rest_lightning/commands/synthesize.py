"""Render synthetic talkers in the prepared-clip layout, with their speech and true mouth opening.

Needs the extra: pip install 'rest_lightning[synthetic]'
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--out", type=Path, required=True, help="folder of the dataset")
    parser.add_argument("--num-clips", type=int, required=True, help="clips in all splits together; may grow later")
    parser.add_argument("--size-px", type=int, default=128, help="side of the frames (default 128)")
    parser.add_argument("--num-frames", type=int, default=113, help="frames per clip at 25 fps (default 113)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same clips (default 0)")
    parser.add_argument("--num-workers", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--val-fraction", type=float, default=0.05, help="share of validation clips (default 0.05)")
    parser.add_argument("--test-fraction", type=float, default=0.05, help="share of test clips (default 0.05)")
    parser.add_argument("--overwrite", action="store_true", help="delete the synthetic dataset in OUT first")


def run(args: argparse.Namespace) -> int:
    """Render what is missing."""
    from rest_lightning.data.synthetic.synthesize import synthesize

    folder = synthesize(**vars(args))
    print(f"{folder}: {args.num_clips} clips")
    return 0
