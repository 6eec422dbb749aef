"""Files of strangers: portraits, sound and video, model folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_head import make_head

Attack = Callable[..., Any]


@pytest.mark.parametrize(
    ("name", "module", "count"),
    [("mutated portraits", "portraits", 500), ("mutated sound and video", "media", 500)],
)
def test_mutated_files(
    name: str, module: str, count: int, attack: Attack, tally: Callable[..., None]
) -> None:
    found = attack(module, count)
    seen = f"{found.refused} refused in one line, the others read; {found.peak_mb:.0f} MB at most"
    tally(name, found.tried, found.faults, seen)


def test_model_folders(tmp_path: Path, attack: Attack, tally: Callable[..., None]) -> None:
    make_head(1).save_pretrained(tmp_path / "whole")
    found = attack("models", 100, str(tmp_path / "whole"))
    seen = f"{found.refused} refused in one line, the others read; {found.peak_mb:.0f} MB at most"
    tally("hostile model folders", found.tried, found.faults, seen)
