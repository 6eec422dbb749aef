"""Model folders with faults: a model that can speak comes out, or one line."""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

from mutations import mutated
from tries import loop

from rest_lightning.talking_head import TalkingHead

WHOLE = Path(sys.argv[4])
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 3, 2**31, 2**63, 10**400, 1e308, float("nan"), "", "x" * 20_000),
    *([], {}, [1, [2, [3, [4, [5, [6, [7]]]]]]], "os.system", "../../etc", {"a": None}, 0.5, -64),
)


def one(seed: int) -> None:
    """One folder: a value of a JSON file, or bytes of any file."""
    rng = random.Random(seed)
    folder = Path("model")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(WHOLE, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = rng.choice([each for each in files if each.suffix == ".json"] if seed % 2 else files)
    if seed % 2:
        content = json.loads(path.read_text())
        _change(rng, content)
        path.write_text(json.dumps(content))
    elif rng.random() < 0.1:
        path.unlink()
    else:
        path.write_bytes(mutated(path.read_bytes(), seed))
    TalkingHead.from_pretrained(folder)


def _change(rng: random.Random, content: Any) -> None:
    while True:
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        key = rng.choice(keys)
        if isinstance(content[key], dict | list) and content[key] and rng.random() < 0.7:
            content = content[key]
            continue
        if isinstance(content, dict) and rng.random() < 0.2:
            content[rng.choice(("unknown", "__class__", "x" * 300))] = content.pop(key)
        else:
            content[key] = rng.choice(VALUES)
        return


loop(one)
