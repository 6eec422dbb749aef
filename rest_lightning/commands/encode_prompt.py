"""Encode the fixed prompt with LTX-Video's T5, once: the file for `prompt` of models that read text."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--ltx", type=Path, required=True, help="LTX-Video folder with text_encoder/ and tokenizer/")
    parser.add_argument("--out", type=Path, default=Path("weights/prompt.safetensors"), help="file to write")
    parser.add_argument("--text", help="another prompt (default: REST's)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file")
    parser.add_argument("--length", type=int, default=128, help="tokens with padding (default 128, as LTX-Video)")


def run(args: argparse.Namespace) -> int:
    """Encode and write, whole or not at all."""
    from safetensors.torch import save_file

    from rest_lightning.media.files import check_output, whole_file
    from rest_lightning.models.ltx import PROMPT, encode_prompt

    args.out.parent.mkdir(parents=True, exist_ok=True)
    check_output(args.out, args.overwrite, ".safetensors")
    embeds, mask = encode_prompt(args.ltx, args.text or PROMPT, args.length)
    with whole_file(args.out) as temporary:
        save_file({"prompt_embeds": embeds.contiguous(), "prompt_mask": mask.contiguous()}, temporary)
    print(f"{args.out}: {int(mask.sum())} tokens of {len(mask)}, {embeds.shape[1]} channels")
    return 0
