"""The notebook: a newcomer's cells run from the first to the last, in an empty folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rest_lightning.media.video import VideoFile

NOTEBOOK = Path(__file__).resolve().parent.parent / "examples" / "quickstart.ipynb"


def cells() -> list[str]:
    """The code of each cell, without the lines that install."""
    content = json.loads(NOTEBOOK.read_text("utf-8"))
    texts = ["".join(each["source"]) for each in content["cells"] if each["cell_type"] == "code"]
    return [
        "\n".join(line for line in text.splitlines() if not line.startswith("%pip"))
        for text in texts
    ]


def test_the_notebook_is_stored_as_it_opens() -> None:
    content = json.loads(NOTEBOOK.read_text("utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in content["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in content["cells"]:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None


@pytest.mark.slow
def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skia", reason="skia-python (extra `synthetic`) draws the talkers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    shown: list[str] = []

    def show(path: str, **_: Any) -> None:
        assert Path(path).stat().st_size > 10_000
        shown.append(path)

    display = ModuleType("IPython.display")  # Jupyter brings it; the package does not need it
    display.__dict__.update(Image=show, Video=show)
    interactive = ModuleType("IPython")
    interactive.__dict__.update(version_info=(9, 0), get_ipython=lambda: None)  # matplotlib asks
    for name, module in (("IPython", interactive), ("IPython.display", display)):
        monkeypatch.setitem(sys.modules, name, module)
    space: dict[str, Any] = {"__name__": "__main__"}
    for number, text in enumerate(cells()):
        text = text.replace("NUM_STEPS = 60", "NUM_STEPS = 12")
        exec(compile(text, f"cell {number}", "exec"), space)
    assert shown == ["out.mp4", "sheet.png"]
    assert VideoFile("out.mp4").num_frames == 367
    assert len(space["frames"]) == 75
    points = space["curves"]["train/mse"]
    assert [step for step, _ in points] == list(range(12))
    assert points[-1][1] < points[0][1]
    assert space["curves"]["val/mse"]
