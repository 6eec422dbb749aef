"""The model card that goes with a model folder: what the run itself knows, and nothing else.

Markdown with a head of YAML, as the Hugging Face hub reads it. What a run did not record is said to
be unknown. Of data only names and counts appear, never paths of the machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rest_lightning.constants import FPS, TEMPORAL_RATIO, VERSION
from rest_lightning.errors import UserError
from rest_lightning.parts import OPTIONAL_PART_NAMES, PART_NAMES, read_checkpoint, run_configs

if TYPE_CHECKING:
    from rest_lightning.parts import TalkingParts

UNKNOWN = "not recorded"
_USE = """```python
from rest_lightning import TalkingHead

model = TalkingHead.from_pretrained("{name}")
with model.open("portrait.png") as session:
    for frames in session.stream(audio_blocks):  # float32 blocks at 16 kHz
        ...  # uint8 frames (n, H, W, 3)
```

```sh
rest talk portrait.png speech.wav -o out.mp4 --model {name}
```"""
_LIMITS = """Videos of this model are synthetic. Show a person's likeness only with that person's
consent, and say that the video is generated where others see it. Only `model_index.json`,
`config.json` and safetensors files are read: nothing in this folder is code."""


def make_card(
    head: TalkingParts,
    *,
    name: str,
    licence: str | None = None,
    runs: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """Returns the card of a talking head.

    Args:
        head: the model.
        name: of the model, as users write it: a folder or ``org/name``.
        licence: identifier of the hub, such as ``cc-by-4.0``; None leaves it out.
        runs: part -> what :func:`run_facts` found about the run that trained it.
    """
    lines = ["---"]
    if licence is not None:
        lines.append(f"license: {_checked(licence)}")
    tags = ["talking-head", "audio-driven", "streaming", "diffusion", "pytorch-lightning"]
    lines += ["library_name: rest_lightning", "pipeline_tag: image-to-video", "tags:"]
    lines += [*(f"- {tag}" for tag in tags), "---", "", f"# {name.rpartition('/')[2]}", ""]
    chunk = head.transformer.cache_options.chunk_length
    lines += [
        f"A streaming talking head (REST, arXiv:2512.11229) for rest_lightning {VERSION}: a "
        f"portrait and speech become {head.size_px}x{head.size_px} video at {FPS} fps, in chunks "
        f"of {chunk * TEMPORAL_RATIO / FPS:g} s, with {head.sampling.num_steps} Euler steps a "
        f"chunk and guidance {head.sampling.guidance:g}.",
        "",
        "## Use",
        "",
        _USE.format(name=name),
        "",
        "## Parts",
        "",
        "| part | class | parameters |",
        "| --- | --- | --- |",
    ]
    for part_name in (*PART_NAMES, *OPTIONAL_PART_NAMES):
        part = getattr(head, part_name)
        if part is not None:
            number = sum(each.numel() for each in part.parameters())
            lines.append(f"| {part_name} | {type(part).__name__} | {number:,} |")
    lines += ["", "## Training", ""]
    for part_name, facts in (runs or {}).items():
        lines += [f"{part_name}:", "", *(f"- {key}: {value}" for key, value in facts.items()), ""]
    if not runs:
        lines += [f"How the parts were trained is {UNKNOWN}.", ""]
    return "\n".join([*lines, "## Limits", "", _LIMITS, ""])


def with_licence(card: str, licence: str) -> str:
    """Returns a card whose head names a licence, in the place of the one that it named."""
    entry = f"license: {_checked(licence)}"
    lines = card.splitlines()
    if not lines or lines[0].strip() != "---":
        return "\n".join(["---", entry, "---", "", card])
    end = next((i for i, line in enumerate(lines[1:], 1) if line.strip() == "---"), None)
    if end is None:
        raise UserError("expected a card whose head ends with ---, got none: write the card anew")
    kept = [line for line in lines[1:end] if not line.startswith("license:")]
    return "\n".join(["---", entry, *kept, *lines[end:], ""])


def run_facts(checkpoint: Path) -> dict[str, Any]:
    """Returns what a checkpoint and the configuration beside it tell of the run, in words for the
    card; empty for a model folder, which tells nothing.
    """
    if not checkpoint.is_file():
        return {}
    from rest_lightning.config import read_yaml

    content = read_checkpoint(checkpoint)
    facts: dict[str, Any] = {}
    config: dict[str, Any] = {}
    for file in run_configs(checkpoint):
        config = read_yaml(file)
        break
    model, data = _tree(config, "model"), _tree(config, "data")
    trainer, settings = _tree(config, "trainer"), _tree(model, "init_args")
    facts["stage"] = str(model.get("class_path", UNKNOWN)).rpartition(".")[2]
    facts["optimiser steps"] = _number(content.get("global_step"))
    samples = _tree(content, "TalkingHeadDataModule").get("num_samples")
    facts["training clips seen"] = _number(samples)
    seconds = _tree(_tree(_tree(content, "callbacks"), "Timer"), "time_elapsed").get("train")
    if isinstance(seconds, int | float):
        facts["time"] = f"{seconds / 3600:.1f} h"
    facts["data"] = _data(data)
    facts["batch size"] = _number(data.get("batch_size"))
    facts["learning rate"] = _tree(settings, "optimizer").get("lr", UNKNOWN)
    facts["precision"] = trainer.get("precision", UNKNOWN)
    facts["seed"] = config.get("seed_everything", UNKNOWN)
    return facts


def _data(options: Mapping[str, Any]) -> str:
    """Name and size of the training data, from its own dataset.json where that is still there."""
    folder = options.get("data_dir")
    if not folder:
        return UNKNOWN
    path, told = Path(str(folder)), [Path(str(folder)).name]
    try:
        info = json.loads((path / "dataset.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        info = None
    if isinstance(info, dict):
        told += [str(info[key]) for key in ("kind",) if key in info]
        if isinstance(info.get("num_clips"), int):
            told.append(f"{info['num_clips']:,} clips")
    return ", ".join(told)


def _tree(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = content.get(key)
    return found if isinstance(found, dict) else {}


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else UNKNOWN


def _checked(licence: str) -> str:
    if not licence or not all(char.isalnum() or char in "-._+" for char in licence):
        raise UserError(
            f"expected a licence's identifier, such as cc-by-4.0 or apache-2.0, got {licence!r}"
        )
    return licence.lower()
