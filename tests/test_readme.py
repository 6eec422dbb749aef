"""The README is run: blocks under ``<!-- test: NAME -->`` are executed, the others checked against
the tree.

Shell blocks run command by command, in process, in a temporary folder that holds ``portrait.png``,
``speech.wav``; ``TINY`` appends what makes a command small. Python
blocks run as they stand.
"""

from __future__ import annotations

import re
import shlex
import wave
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "rest_lightning" / "assets"
# Blocks whose parts are not in the tree yet: name -> what is missing. Delete an entry to have its
# block executed.
PENDING: dict[str, str] = {}
# What is appended to every command that holds the words on the left, so that it takes seconds.
TINY = (
    (
        "rest synthesize",
        ("--num_clips 6 --size_px 64 --num_frames 57 --val_fraction 0.17 --test_fraction 0.17"),
    ),
    (
        "rest fit",
        "--config trainer/tiny --config model/tiny --config data/tiny --data.data_dir data/talkers",
    ),
)
# Local files that the README links to and that are made later.
PENDING_FILES: set[str] = set()


@dataclass(frozen=True)
class Block:
    """A fenced block: its test name or None, its language, its text and the line of its opening
    fence.
    """

    name: str | None
    language: str
    text: str
    line: int


def blocks_of(markdown: str) -> list[Block]:
    marker = r"(?:^<!-- test: (?P<name>[\w-]+) -->\n)?"
    pattern = re.compile(marker + r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
    return [
        Block(m["name"], m["language"], m["text"], markdown[: m.start("language")].count("\n") + 1)
        for m in pattern.finditer(markdown)
    ]


README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = blocks_of(README)
MARKED = {block.name: block for block in BLOCKS if block.name}


def commands(text: str) -> list[list[str]]:
    """The commands of a shell block; comments go, lines that end in a backslash are joined."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def tiny_arguments(words: list[str]) -> list[str]:
    line = " ".join(words)
    return [word for fragment, arguments in TINY if fragment in line for word in arguments.split()]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a reader has it after the two commands."""
    (tmp_path / "portrait.png").symlink_to(ASSETS / "portrait.png")
    (tmp_path / "speech.wav").symlink_to(ASSETS / "speech.wav")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_shell(block: Block) -> None:
    from rest_lightning.cli import main

    for words in commands(block.text):
        assert words[0] == "rest", (
            f"README line {block.line}: only `rest` commands are executed, got {words[0]}"
        )
        assert main([*words[1:], *tiny_arguments(words)]) == 0, (
            f"README line {block.line}: {' '.join(words)}"
        )


def run_python(block: Block) -> None:
    with wave.open("speech.wav") as file:
        samples = (
            np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 32768
        )
    shown: list[np.ndarray] = []
    names: dict[str, Any] = {
        "audio_blocks": np.array_split(samples[: 16_000 * 3], 7),
        "show": shown.append,
    }
    exec(compile(block.text, f"README.md line {block.line}", "exec"), names)
    assert sum(len(frames) for frames in shown) == 75, "three seconds of speech are 75 frames"
    assert all(
        frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[3] == 3 for frames in shown
    )


RUNNERS: dict[str, Callable[[Block], None]] = {"sh": run_shell, "python": run_python}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n == "train" else []) for n in sorted(MARKED)],
)
def test_block_runs(name: str, request: pytest.FixtureRequest) -> None:
    if name in PENDING:
        pytest.skip(f"not there yet: {PENDING[name]}")
    request.getfixturevalue("workplace")
    RUNNERS[MARKED[name].language](MARKED[name])


def test_nothing_stays_pending_without_its_block() -> None:
    assert set(PENDING) <= set(MARKED)
    assert {block.language for block in MARKED.values()} <= set(RUNNERS)
    assert len(MARKED) == sum(block.name is not None for block in BLOCKS), "two blocks share a name"


def test_unmarked_blocks_only_run_make() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    for block in BLOCKS:
        if block.name is None and block.language in RUNNERS:
            for words in commands(block.text):
                assert words[0] == "make", (
                    f"README line {block.line}: put <!-- test: NAME --> above the block"
                )
                assert words[1] in targets, (
                    f"README line {block.line}: the Makefile has no target {words[1]}"
                )
    for target in re.findall(r"`make ([a-z-]+)", README):
        assert target in targets, f"the README names make {target}, which the Makefile lacks"


def test_links_and_folders_exist() -> None:
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", README)
    folders = re.findall(r"^\| `([\w/]+/)`", README, re.M)
    assert folders, "the layout table is gone"
    missing = [
        path
        for path in [*links, *folders]
        if path not in PENDING_FILES and not (ROOT / path).exists()
    ]
    assert not missing, f"the README points to what is not there: {missing}"
    there = sorted(path for path in PENDING_FILES if (ROOT / path).exists())
    assert not there, f"take {there} out of PENDING_FILES"


def test_named_configs_exist() -> None:
    for path in sorted(set(re.findall(r"configs/[\w/.-]+\.yaml", README))):
        assert (ROOT / path).is_file(), f"the README names {path}, which is not there"
    for name in sorted(set(re.findall(r"--config ([\w/-]+)", README))):
        assert (ROOT / f"configs/{name}.yaml").is_file(), f"the README names {name}: not there"


def test_blocks_are_parsed() -> None:
    text = (
        "a\n<!-- test: one -->\n```sh\nrest talk a b \\\n  -o c  # out\n\n```\n\n```python\nx "
        "= "
        "1\n```\n"
    )
    first, second = blocks_of(text)
    assert (first.name, first.language, first.line) == ("one", "sh", 3)
    assert commands(first.text) == [["rest", "talk", "a", "b", "-o", "c"]]
    assert (second.name, second.language, second.text) == (None, "python", "x = 1\n")
    assert tiny_arguments(["rest", "fit", "embedded/vae"])[1:4:2] == ["trainer/tiny", "model/tiny"]
    assert tiny_arguments(["rest", "talk"]) == []
