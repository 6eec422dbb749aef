"""Score any folder of videos, whoever made them, under a protocol: one result row, and one row
per clip beside it (OUT.clips.csv, and .parquet where pyarrow is installed), the worst first, with
thumbnails of the worst (OUT.worst.png).

Videos are paired with the true clips by file name. A video shows the first frame of its true clip
speaking that clip's sound, frame k of the one belongs to frame k of the other, and it carries its
own sound. What cannot be scored is named in the row's `failures`, and counts nowhere.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rest_lightning.errors import UserError

if TYPE_CHECKING:
    from torchmetrics import Metric

    from rest_lightning.evaluation.row import ResultRow


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--protocol", required=True, help="name of configs/protocol, or a file")
    parser.add_argument("--generated", type=Path, required=True, help="folder of videos")
    parser.add_argument(
        "--truth", type=Path, required=True, help=("prepared clips, or a folder of videos")
    )
    parser.add_argument("--out", type=Path, required=True, help="row to write, .json")
    parser.add_argument("--method", help="name in the row (default: the folder's)")
    parser.add_argument(
        "--num-clips", type=int, help=("fewer than the protocol's: the row is ranked apart")
    )
    parser.add_argument(
        "--num-frames",
        type=int,
        help=("other frames per clip than the protocol's: ranked apart, too"),
    )
    parser.add_argument(
        "--chunk-frames",
        type=int,
        default=24,
        help=("frames per chunk, for the seam ratio (default 24)"),
    )
    metric = (
        "class path of a metric of your own, beside the protocol's (docs/extend.md); repeatable"
    )
    parser.add_argument("--metric", action="append", default=[], help=metric)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--overwrite", action="store_true", help="replace the row")


def run(args: argparse.Namespace) -> int:
    """Score all pairs and write the row. Exit code 1 when a clip failed."""
    from rest_lightning.evaluation.protocol import read_protocol
    from rest_lightning.media.files import check_output
    from rest_lightning.parts import device_named

    protocol = read_protocol(args.protocol)
    args.device = device_named(args.device)
    if args.chunk_frames < 1:
        raise UserError(
            f"expected --chunk-frames of at least 1, got {args.chunk_frames}: 24 is usual"
        )
    if args.num_frames is not None:
        protocol = replace(protocol, num_frames=args.num_frames)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    check_output(args.out, args.overwrite, ".json")
    if args.num_clips is not None and args.num_clips < 1:
        raise UserError(
            f"expected --num-clips of at least 1, got {args.num_clips}: leave it out "
            "for the protocol's"
        )

    metrics = [own_metric(name) for name in args.metric]
    from rest_lightning.evaluation.clips import write_clips, write_worst
    from rest_lightning.evaluation.row import write_row
    from rest_lightning.evaluation.scorer import Scorer
    from rest_lightning.evaluation.videos import pair_folders, score_folders

    files = pair_folders(
        args.generated, args.truth, min(protocol.num_clips, args.num_clips or protocol.num_clips)
    )
    for path in files.unpaired:
        print(f"{path}: no true clip of this name, left out", flush=True)
    scorer = Scorer(protocol, args.chunk_frames, args.device, metrics=metrics)
    from tqdm import tqdm

    with tqdm(
        score_folders(scorer, files), "scoring", len(files.pairs), unit="clip", disable=None
    ) as bar:
        for name, counts in bar:
            if not counts:
                bar.write(f"{name} failed: {scorer.failures[-1]['reason']}")
    scorer.remarks += [
        (f"left out: {path.name}, no true clip of this name") for path in files.unpaired
    ]
    config = {
        "command": "score",
        "chunk_frames": args.chunk_frames,
        "unpaired": [path.name for path in files.unpaired],
        "frame_source": files.frame_source(),
    }
    row = scorer.row(args.method or args.generated.resolve().name, config=config)
    write_row(row, args.out)
    write_clips(scorer.clips(), args.out)
    write_worst(scorer.worst(), args.out)
    print(f"{args.out}: {row.num_clips} clips, {len(row.failures)} failed")
    print_numbers(row)
    return 1 if row.failures else 0


def print_numbers(row: ResultRow) -> None:
    """Prints the numbers of a row beside those of the true clips; curves are in the file."""
    from rest_lightning.evaluation.leaderboard import metric_of

    for key, value in row.metrics.items():
        if isinstance(value, list):
            continue
        metric, truth = metric_of(key), row.ground_truth.get(key)
        cells = ["-" if each is None else f"{each:.4g}" for each in (value, truth)]
        label = f"{metric.label} {metric.arrow}".strip()
        print(f"  {label:<32}{cells[0]:>10}   true clips {cells[1]:>10}")


def own_metric(class_path: str) -> Metric:
    """Returns a metric by the import path of its class.

    Raises:
        UserError: no such class, or one that is no metric of torchmetrics.
    """
    from rest_lightning.config import find_class
    from rest_lightning.torchvision_compat import ensure_torchvision

    ensure_torchvision()  # torchmetrics imports torchvision
    from torchmetrics import Metric

    cls = find_class(class_path, "--metric", None)
    if not (isinstance(cls, type) and issubclass(cls, Metric)):
        raise UserError(
            f"expected a class derived from torchmetrics.Metric at --metric, got {class_path}: "
            "see docs/extend.md"
        )
    return cls()
