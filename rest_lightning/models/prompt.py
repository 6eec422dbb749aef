"""The fixed text that the A2V-DiT reads: encoded once by LTX-Video's T5, then kept with the weights (REST)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rest_lightning.errors import UserError

PROMPT = "A person is speaking, and his head moves rhythmically in a small range to follow the sound"  # REST sec. 4.1
PROMPT_LENGTH = 128  # tokens with padding, as in LTX-Video's pipeline
HOW_TO_GET = (
    "get it with `hf download Lightricks/LTX-Video --include 'text_encoder/*' 'tokenizer/*' --local-dir FOLDER` "
    "and name FOLDER"
)


def start_of_prompt(
    file: str | None, length: int | None, channels: int | None
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Embeddings ``(L, channels)`` and mask ``(L,)`` of a file, zeros of ``length`` to be filled, or nothing.

    Raises:
        UserError: a text for a model that reads none, no such file, or embeddings of another width or length.
    """
    if file is None and length is None:
        return None, None
    if channels is None:
        raise UserError("expected no prompt with caption_channels=None, got one: set caption_channels (LTX: 4096)")
    if length is not None and length < 1:
        raise UserError(f"expected a prompt_length of at least 1, got {length}: LTX-Video's is {PROMPT_LENGTH}")
    if file is None:
        return torch.zeros(length or 0, channels), torch.ones(length or 0)
    embeds, mask = read_prompt(file)
    if embeds.shape[1] != channels or length not in (None, len(embeds)):
        raise UserError(
            f"expected a prompt of shape ({length or 'L'}, {channels}), got {tuple(embeds.shape)} in {file}: "
            "encode it with the T5 of these LTX weights, or set caption_channels and prompt_length to its shape"
        )
    return embeds, mask


def read_prompt(file: str | Path) -> tuple[Tensor, Tensor]:
    """Embeddings ``(L, C)`` and mask ``(L,)``, 1 = token and 0 = padding, of a file of `rest encode-prompt`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(
            f"expected the text embedding of the prompt, got no such file: {path}; make it once with "
            f"`rest encode-prompt --ltx FOLDER --out {path}`"
        )
    try:
        state = load_file(path)
        return state["prompt_embeds"].float(), state["prompt_mask"].float()
    except (SafetensorError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"expected prompt_embeds and prompt_mask in {path}, got {reason}: make it with `rest encode-prompt`"
        ) from error


@torch.no_grad()
def encode_prompt(folder: str | Path, text: str = PROMPT, length: int = PROMPT_LENGTH) -> tuple[Tensor, Tensor]:
    """What LTX-Video's pipeline computes for ``text``: T5 over the padded tokens, without a mask inside T5.

    Args:
        folder: of an LTX-Video pipeline in diffusers format (``text_encoder/`` and ``tokenizer/``).
        text: the prompt.
        length: tokens with padding; longer texts are refused, not cut.

    Returns:
        Embeddings ``(length, C)``, float32, and mask ``(length,)``.

    Raises:
        UserError: no such folder, or a text that is too long.
    """
    tokenizer, model = _load_t5(Path(folder).expanduser())
    num_tokens = len(tokenizer(text).input_ids)
    if num_tokens > length:
        raise UserError(f"expected a prompt of at most {length} tokens, got {num_tokens}: shorten it or raise --length")
    tokens = tokenizer(text, padding="max_length", max_length=length, return_tensors="pt")
    return model(tokens.input_ids)[0][0].float(), tokens.attention_mask[0].float()


def _load_t5(folder: Path) -> tuple[Any, Any]:
    from rest_lightning.torchvision_compat import ensure_torchvision

    ensure_torchvision()
    from transformers import AutoTokenizer, T5EncoderModel

    for name in ("text_encoder", "tokenizer"):
        if not (folder / name).is_dir():
            raise UserError(f"expected LTX-Video's T5 with {name}/, looked in {folder.resolve()}: {HOW_TO_GET}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        model = T5EncoderModel.from_pretrained(folder / "text_encoder", local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"expected a T5 that transformers can load in {folder.resolve()}: {reason}") from error
    return tokenizer, model.eval()
