"""Trains the embedded extractors of the metrics on synthetic talkers, and writes what they are worth into a card.

``python -m rest_lightning.commands.train_extractors --data data/talkers --budget-min 15``
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rest_lightning.commands import extractor_card as cards
from rest_lightning.commands.extractor_data import Clips, read_clips
from rest_lightning.commands.extractor_training import (
    ImageTraining,
    SyncTraining,
    VideoTraining,
    factor_names,
    fit,
)
from rest_lightning.data.layout import read_dataset_json, read_manifest
from rest_lightning.errors import UserError, exit_code
from rest_lightning.metrics.extractors import ASSETS, COMMAND, EmbeddedImage, EmbeddedSync, EmbeddedVideo
from rest_lightning.metrics.weights import ShippedNetwork

# name -> network, its training, share of the training time, what its loss is
STAGES: dict[str, tuple[type[ShippedNetwork], Any, float, str]] = {
    "sync": (EmbeddedSync, SyncTraining, 0.5, "InfoNCE of lips and speech over the offsets of a clip"),
    "image": (EmbeddedImage, ImageTraining, 0.25, "smooth L1 of 13 face curves, blur, noise; InfoNCE of identity"),
    "video": (
        EmbeddedVideo,
        VideoTraining,
        0.25,
        "smooth L1 of motion, blur, noise, lost, shuffled; InfoNCE of identity",
    ),
}
_MAX_READING = 0.4  # of the budget


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--data", type=Path, default=Path("data/talkers"), help="synthetic talkers")
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder of the networks and their card")
    parser.add_argument("--budget-min", type=float, default=15.0, help="minutes of reading and training together")
    parser.add_argument(
        "--only", choices=list(STAGES), nargs="+", default=list(STAGES), help="train these, keep the others"
    )
    parser.add_argument(
        "--max-steps", type=int, default=1_000_000, help="of every network; the time may end it earlier"
    )
    parser.add_argument("--max-clips", type=int, default=None, help="use at most this many clips of each split")
    parser.add_argument("--frames-per-clip", type=int, default=12, help="of the image network, drawn from every clip")
    parser.add_argument("--batch-clips", type=int, default=24, help="clips in a batch")
    parser.add_argument("--acceptance-clips", type=int, default=66, help="unseen clips that FID and FVD are judged on")
    parser.add_argument("--threads", type=int, default=None, help="of torch; None leaves its choice")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Read, train, save, judge; the exit code is 1 when a network does not do what it must."""
    if args.budget_min <= 0 or args.batch_clips < 2:
        raise UserError("expected --budget-min above 0 and --batch-clips of at least 2: correct them")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    started_s = time.monotonic()
    rows = {split: read_manifest(args.data, split)[: args.max_clips] for split in ("train", "val", "test")}
    if any(len(each) < 2 for each in rows.values()):
        counts = {split: len(each) for split, each in rows.items()}
        raise UserError(f"expected at least 2 clips of each split in {args.data}, got {counts}: synthesize more")
    budget_s = 60.0 * args.budget_min
    rng = np.random.default_rng(args.seed)
    clips = read_clips(args.data, rows["train"], args.frames_per_clip, rng, _MAX_READING * budget_s)
    print(f"read {len(clips)} of {len(rows['train'])} training clips", flush=True)
    networks = train(args, clips, budget_s - (time.monotonic() - started_s))
    card = {
        "command": COMMAND,
        "minutes": args.budget_min,
        "data": {
            "dataset": read_dataset_json(args.data),
            "num_train_clips": len(clips),
            "frames_per_clip": args.frames_per_clip,
        },
        "networks": networks,
        "held_out": judge(args, rows),
        "seed": args.seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    cards.write_card(args.out, card)
    print(cards.markdown(card), flush=True)
    return 0 if all(card["held_out"][key]["accepted"] for key in ("sync", "frechet")) else 1


def train(args: argparse.Namespace, clips: Clips, seconds: float) -> dict[str, Any]:
    """Train and save the networks; what the card says of each. Those left out keep what the old card said."""
    old = args.out / "card.json"
    networks: dict[str, Any] = json.loads(old.read_text())["networks"] if old.is_file() else {}
    total = sum(STAGES[name][2] for name in args.only)
    for name in args.only:
        network, training, share, loss = STAGES[name]
        net = network()
        stage = training(net, clips, args.batch_clips, args.seed)
        parts = [net, *(part for part in vars(stage).values() if isinstance(part, torch.nn.Module) and part is not net)]
        steps, final = fit(name, parts, stage.loss, seconds * share / total, args.lr, args.max_steps)
        net.save_pretrained(args.out / name)
        networks[name] = {
            "num_parameters": sum(p.numel() for p in net.parameters()),
            "loss": loss,
            "num_steps": steps,
            "final_loss": final,
            "batch_clips": args.batch_clips,
            "lr": args.lr,
        }
        if name == "image":
            networks[name]["unit_of_curves"] = factor_names(stage.spread)
    return networks


def judge(args: argparse.Namespace, rows: dict[str, Any]) -> dict[str, Any]:
    """Everything on clips of people and sentences that training has not seen; from the saved files."""
    held_out = rows["test"] + rows["val"]
    clips = cards.read_held_out(args.data, held_out)
    count = min(args.acceptance_clips, len(rows["test"]))
    print(f"judging on {len(held_out)} unseen clips", flush=True)
    return {
        "sync": cards.sync_accuracy(args.out, clips, args.seed),
        "image": cards.image_accuracy(args.out, args.data, held_out, clips),
        "frechet": cards.frechet_answers(args.out, clips[:count], clips[len(rows["test"]) :], args.seed),
    }


def main(args: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_arguments(parser)
    return exit_code(lambda: run(parser.parse_args(args)))


if __name__ == "__main__":
    sys.exit(main())
