"""Turn a student's checkpoint into a model folder: model_index.json, a config and safetensors per
part, and a model card (README.md) of what the runs recorded.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from rest_lightning.errors import UserError

UNKNOWN = "the paper's where no option was given: the checkpoint does not say"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("checkpoint", type=Path, help="checkpoint of a student stage")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument(
        "--vae", type=Path, help="checkpoint or model folder with the VAE (default: the checkpoint)"
    )
    parser.add_argument(
        "--speech-ae", type=Path, help="the same for the SpeechAE (default: the checkpoint)"
    )
    parser.add_argument(
        "--speech-encoder", type=Path, help="the same for the speech encoder (default: of the run)"
    )
    parser.add_argument(
        "--detail",
        type=Path,
        help="checkpoint or model folder with the detail (default: without one)",
    )
    parser.add_argument(
        "--size-px", type=int, help="side of the frames (default: that of the training, or 512)"
    )
    parser.add_argument(
        "--num-steps",
        type=int,
        help="Euler steps per chunk to remember as default (this and the following ones: as the "
        "stage samples)",
    )
    parser.add_argument("--guidance", type=float, help="guidance to remember as default")
    parser.add_argument(
        "--shift", type=float, help="shift of the sigma table to remember as default"
    )
    parser.add_argument(
        "--table-steps",
        type=int,
        help="of a distilled student: steps of the sigma table that its source began with",
    )
    parser.add_argument(
        "--reference-guidance", type=float, help="the same for the reference alone (split guidance)"
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the stored weights"
    )
    parser.add_argument(
        "--max-shard-mb",
        type=float,
        default=5000.0,
        help="larger parts are cut into several files (default 5000; 11.5 for the repository)",
    )
    parser.add_argument(
        "--license", help="for the card, such as cc-by-4.0; a model on the hub needs one"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model folder")


def run(args: argparse.Namespace) -> int:
    """Collect the parts and write the folder."""
    check_folder(args.out, args.overwrite)
    import torch

    from rest_lightning.diffusion.sampling import Sampling, SamplingChanges
    from rest_lightning.model_card import make_card, run_facts
    from rest_lightning.parts import open_part, open_speech_encoder, read_sampling
    from rest_lightning.talking_head import TalkingHead

    changes = SamplingChanges(
        args.num_steps, args.guidance, args.shift, args.reference_guidance, args.table_steps
    )
    sources = {"transformer": args.checkpoint, "speech_ae": args.speech_ae, "vae": args.vae}
    parts = {name: open_part(name, source or args.checkpoint) for name, source in sources.items()}
    parts["speech_encoder"] = open_speech_encoder(args.speech_encoder or args.checkpoint)
    if args.detail is not None:
        parts["detail"] = open_part("detail", args.detail)
    remembered = read_sampling(args.checkpoint)
    sampling = changes.of(remembered or Sampling())
    head = TalkingHead(**parts, sampling=sampling, size_px=args.size_px)  # type: ignore[arg-type]
    used = {name: source or args.checkpoint for name, source in sources.items()}
    if args.detail is not None:
        used["detail"] = args.detail
    runs = {name: facts for name, source in used.items() if (facts := run_facts(source))}
    head.card = make_card(head, name=args.out.name, licence=args.license, runs=runs)
    dtype = getattr(torch, args.dtype)
    head.save_pretrained(args.out, dtype, max_shard_bytes=round(1e6 * args.max_shard_mb))
    size_mb = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file()) / 1e6
    sampled = ", ".join(f"{name} {value}" for name, value in asdict(sampling).items())
    print(f"sampling: {sampled}" + ("" if remembered else f" ({UNKNOWN})"))
    print(
        f"{args.out}: {size_mb:.1f} MB; try rest talk portrait.png speech.wav -o out.mp4 --model "
        f"{args.out}"
    )
    return 0


def check_folder(out: Path, overwrite: bool) -> None:
    """Raises a UserError when ``out`` cannot become a model folder; never lets anything but a model
    be replaced.
    """
    if out.is_file():
        raise UserError(
            f"expected a folder name for the model, got the file {out}: choose another name"
        )
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / "model_index.json").is_file():
        raise UserError(
            f"expected a new or empty folder, but {out} holds something else: choose another name"
        )
    if not overwrite:
        raise UserError(
            f"expected a new folder, but {out} holds a model: choose another name or add "
            "--overwrite"
        )
