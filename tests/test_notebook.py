"""The notebook: stored without what it prints, and its code is Python."""

from __future__ import annotations

import json
from pathlib import Path

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


def test_every_cell_compiles() -> None:
    """They are run by ``tools/newcomer.sh notebook``, with the package from its wheel."""
    texts = cells()
    assert len(texts) > 5
    for number, text in enumerate(texts):
        compile(text, f"cell {number}", "exec")
