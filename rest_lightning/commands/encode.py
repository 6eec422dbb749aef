"""Encode every clip of a dataset, once: its frames with a trained VAE, or its speech with the
frozen speech encoder.

A second run continues where the first one stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--model", type=Path, help=("frames: checkpoint of the VAE stage, or a model folder")
    )
    what.add_argument(
        "--speech-encoder",
        type=Path,
        help=("speech: a stage's configuration or checkpoint, or a model folder"),
    )
    parser.add_argument("--data", type=Path, required=True, help="prepared clips")
    parser.add_argument("--out", type=Path, required=True, help="folder of the latents or features")
    parser.add_argument(
        "--num-frames", type=int, default=97, help=("window length, 8n + 1 (default 97)")
    )
    parser.add_argument(
        "--windows-per-clip",
        type=int,
        default=0,
        help=("windows spread over each clip (default 0: as many as cover it)"),
    )
    parser.add_argument(
        "--references-per-clip", type=int, default=0, help=("single frames for random references")
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of the stored latents and of the encoder's products (default bfloat16)",
    )
    parser.add_argument("--batch-size", type=int, default=4, help="windows at once (default 4)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument(
        "--overwrite", action="store_true", help=("drop latents that were made in another way")
    )


def run(args: argparse.Namespace) -> int:
    """Encode what is missing."""
    from rest_lightning.parts import device_named
    from rest_lightning.processes import owned

    args.device = device_named(args.device)
    with owned(args.out, "rest encode"):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    shared = ("num_frames", "windows_per_clip", "device", "overwrite")
    options = {name: getattr(args, name) for name in shared}
    if args.speech_encoder is not None:
        return _run_speech(args, options)
    from rest_lightning.data.window_cache import encode_dataset
    from rest_lightning.parts import build_part, fingerprint_of, read_part

    description, state = read_part("vae", args.model)
    vae = build_part(description)
    vae.load_state_dict(state)
    vae.requires_grad_(False).eval().to(args.device)
    options |= {
        name: getattr(args, name) for name in ("references_per_clip", "dtype", "batch_size")
    }
    cache = encode_dataset(vae, args.data, args.out, fingerprint=fingerprint_of(vae), **options)  # type: ignore[arg-type]
    return _told(args, "latents", len(cache.index["clips"]))


def _run_speech(args: argparse.Namespace, options: dict[str, Any]) -> int:
    from rest_lightning.data.window_cache import encode_speech
    from rest_lightning.parts import fingerprint_of, open_speech_encoder

    encoder = open_speech_encoder(args.speech_encoder).requires_grad_(False).eval().to(args.device)
    fingerprint = fingerprint_of(encoder, with_config=True)
    cache = encode_speech(encoder, args.data, args.out, fingerprint=fingerprint, **options)  # type: ignore[arg-type]
    return _told(args, "speech features", len(cache.index["clips"]))


def _told(args: argparse.Namespace, what: str, num_clips: int) -> int:
    """The exit code; nothing made is no success."""
    print(f"{args.out}: {what} of {num_clips} clips")
    if num_clips:
        return 0
    print(
        f"expected clips of at least {args.num_frames} frames in {args.data}, got none: lower "
        "--num-frames, or prepare longer clips",
        file=sys.stderr,
    )
    return 1


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "--ltx",
        type=Path,
        required=True,
        help=("LTX-Video folder with text_encoder/ and tokenizer/"),
    )
    parser.add_argument(
        "--out", type=Path, default=Path("weights/prompt.safetensors"), help="file to write"
    )
    parser.add_argument("--text", help="another prompt (default: REST's)")
    parser.add_argument(
        "--unmasked",
        action="store_true",
        help="let T5 attend to the padding, as diffusers' LTX pipeline does (default: as REST)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file")
    parser.add_argument(
        "--length", type=int, default=128, help=("tokens with padding (default 128, as LTX-Video)")
    )


def run_prompt(args: argparse.Namespace) -> int:
    """Encode the fixed prompt with LTX-Video's T5, once: the file for `prompt` of models that read
    text.
    """
    from safetensors.torch import save_file

    from rest_lightning.media.files import check_output, whole_file
    from rest_lightning.models.ltx import PROMPT, encode_prompt

    args.out.parent.mkdir(parents=True, exist_ok=True)
    check_output(args.out, args.overwrite, ".safetensors")
    embeds, mask = encode_prompt(
        args.ltx, args.text or PROMPT, args.length, masked=not args.unmasked
    )
    with whole_file(args.out) as temporary:
        save_file(
            {"prompt_embeds": embeds.contiguous(), "prompt_mask": mask.contiguous()}, temporary
        )
    print(f"{args.out}: {int(mask.sum())} tokens of {len(mask)}, {embeds.shape[1]} channels")
    return 0
