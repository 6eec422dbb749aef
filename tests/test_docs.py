"""README and docs are run: each code block has a mark that says how, or why not.

The line above a fence is its mark:

    <!-- test: NAME -->          the block is run; `<!-- test: NAME, slow -->` with the slow tests
    <!-- not run: REASON -->     it is not, for this reason

Blocks of make commands need none: their targets are looked up. Fences of ``text`` hold no code.
Shell blocks run line by line in a copy of the folder that a reader has, a checkout; Python blocks
run there as they stand. :data:`TINY` makes long commands short, and :data:`SPEECH_S` the bundled
speech.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import wave
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import drawn
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
# Pages whose blocks another test runs, and pages that a command writes.
ELSEWHERE = {"docs/agents.md": "tests/test_agents_page.py", "docs/leaderboard/leaderboard.md": ""}
PAGES = [
    path
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "examples" / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    )
    if path.relative_to(ROOT).as_posix() not in ELSEWHERE
]
NO_CODE = ("text", "")
MAX_README_WORDS = 700
MAX_COPIED_BYTES = 1_000_000
# Commands that a part of the tree brings, which a branch may not have yet: words -> file.
BROUGHT_BY = {
    "--config embedded/": "rest_lightning/config.py",
    "--config eval/": "rest_lightning/config.py",
    "--config predict": "rest_lightning/config.py",
}
# What is appended to a command that holds the words on the left, so that it takes seconds.
TINY = (
    ("rest serve", "--help"),
    ("rest app", "--help"),
    ("examples/stream_to_window.py", f"--model {drawn.FOLDER}"),
    ("examples/ablation.py", f"--model {drawn.FOLDER}"),
)
SPEECH = Path("rest_lightning/assets/speech.wav")
SPEECH_S = 3.0


@dataclass(frozen=True)
class Block:
    """A fenced block: page, line of its opening fence, language, text, and its mark."""

    page: str
    line: int
    language: str
    text: str
    name: str | None
    is_slow: bool
    why_not: str | None

    @property
    def place(self) -> str:
        return f"{self.page}, line {self.line}"


MARK = r"(?:^[ ]*<!-- (?:test: (?P<name>[\w-]+)(?P<slow>, slow)?|not run: (?P<why>[^>]+)) -->\n)?"
FENCE = r"^(?P<indent>[ ]*)```(?P<language>\w*)[^\n`]*\n(?P<text>.*?)^(?P=indent)```$"


def blocks_of(markdown: str, page: str = "page.md") -> list[Block]:
    blocks = []
    for match in re.finditer(MARK + FENCE, markdown, re.M | re.S):
        line = markdown[: match.start("language")].count("\n") + 1
        text = re.sub(f"^{match['indent']}", "", match["text"], flags=re.M)
        name, is_slow = match["name"], bool(match["slow"])
        blocks.append(Block(page, line, match["language"], text, name, is_slow, match["why"]))
    return blocks


BLOCKS = [
    block
    for path in PAGES
    for block in blocks_of(path.read_text("utf-8"), path.relative_to(ROOT).as_posix())
]


def commands(text: str) -> list[str]:
    """The commands of a shell block: comments go, lines that end in a backslash are joined."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if shlex.split(line, comments=True)]


def is_make(block: Block) -> bool:
    return block.language == "sh" and all(
        command.startswith("make ") for command in commands(block.text)
    )


def files_of_a_clone() -> list[Path]:
    """What git hands to a reader, from the root on; large weights, which the package reads where it
    is installed, are left out.
    """
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout: what a reader has is not known")
    paths = [Path(name) for name in listed.stdout.split("\0") if name]
    return [path for path in paths if (ROOT / path).is_file() and size(path) <= MAX_COPIED_BYTES]


def size(path: Path) -> int:
    return (ROOT / path).stat().st_size


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a reader has after `git clone`, as the current one; nothing is added."""
    for path in files_of_a_clone():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, tmp_path / path)
    shorten(tmp_path / SPEECH)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shorten(path: Path) -> None:
    """Keep the first `SPEECH_S` seconds of a wav."""
    with wave.open(str(path)) as file:
        parameters = file.getparams()
        samples = file.readframes(round(SPEECH_S * parameters.framerate))
    with wave.open(str(path), "wb") as file:
        file.setparams(parameters)
        file.writeframes(samples)


def tiny_arguments(command: str) -> list[str]:
    return [word for words, more in TINY if words in command for word in more.split()]


def run_shell(block: Block) -> None:
    """``rest`` and Python programs run in this process, everything else in a shell."""
    from rest_lightning.cli import main

    bin_folder = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    for command in commands(block.text):
        words = shlex.split(command, comments=True)
        is_plain = not set(words) & {"|", ">", "<", "&&"}
        if words[0] == "rest" and is_plain:
            code = main([*words[1:], *tiny_arguments(command)])
        elif words[0] == "python" and words[1].endswith(".py") and is_plain:
            code = run_program(words[1:])
        else:
            if words[0] in ("python", "python3"):
                command = command.replace(words[0], shlex.quote(sys.executable), 1)
                command = " ".join([command, *map(shlex.quote, tiny_arguments(command))])
            code = subprocess.run(["bash", "-euc", command], env=environment).returncode
        assert code == 0, f"{block.place}: {command}"


def run_program(words: list[str]) -> int:
    """The exit code of a Python file with its arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as request:
            return request.code if isinstance(request.code, int) else int(request.code is not None)
    return 0


def run_python(block: Block) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(block.text, block.place, "exec"), names)


def read_yaml(block: Block) -> None:
    assert isinstance(yaml.safe_load(block.text), dict), block.place


RUNNERS: dict[str, Callable[[Block], None]] = {
    "sh": run_shell,
    "python": run_python,
    "yaml": read_yaml,
}


def check_video(folder: Path) -> None:
    from rest_lightning.media.video import VideoFile

    video = VideoFile(str(folder / "out.mp4"))
    assert video.num_frames > 25
    assert video.fps == 25


# Blocks that speak with the bundled model, as a reader's do; the others with the drawn one.
BUNDLED_MODEL = ("readme-talk",)
# What a block must have done, beside running without an error.
CHECKS: dict[str, Callable[[Path], None]] = {"readme-talk": check_video}


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=block.name, marks=[pytest.mark.slow] if block.is_slow else [])
        for block in BLOCKS
        if block.name
    ],
)
def test_block_runs(block: Block, workplace: Path, request: pytest.FixtureRequest) -> None:
    if block.name not in BUNDLED_MODEL:
        request.getfixturevalue("drawn_by_default")
    for words, file in BROUGHT_BY.items():
        if words in block.text and not (ROOT / file).exists():
            pytest.skip(f"{file} is not there yet")
    RUNNERS[block.language](block)
    CHECKS.get(str(block.name), lambda folder: None)(workplace)


def test_every_block_is_run_or_says_why_not() -> None:
    bare = [
        f"{block.place}: a block of {block.language}"
        for block in BLOCKS
        if block.language not in NO_CODE
        and block.name is None
        and block.why_not is None
        and not is_make(block)
    ]
    assert not bare, "put <!-- test: NAME --> or <!-- not run: REASON --> above:\n" + "\n".join(
        bare
    )
    names = [block.name for block in BLOCKS if block.name]
    assert len(set(names)) == len(names), "two blocks share a name"
    assert {block.language for block in BLOCKS if block.name} <= set(RUNNERS)
    assert set(CHECKS) <= set(names)


def test_the_index_is_not_promised() -> None:
    """No index has the package: pages say how to install it from a clone."""
    pages = [*PAGES, *(ROOT / page for page in ELSEWHERE)]
    wrong = [
        f"{path.relative_to(ROOT)}: {line}"
        for path in pages
        if path.name != "releasing.md"  # about the day when an index has it
        for line in path.read_text("utf-8").splitlines()
        if re.search(r"pip install (?!.*-e )[^`]*rest[-_]lightning", line)
        and "no index has the package yet" not in line.lower()
    ]
    assert not wrong, "\n".join(wrong)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    named = [
        (block.place, shlex.split(command)[1])
        for block in BLOCKS
        if is_make(block)
        for command in commands(block.text)
    ]
    for path in PAGES:
        named += [(path.name, t) for t in re.findall(r"`make ([a-z-]+)", path.read_text("utf-8"))]
    missing = [f"{place}: make {target}" for place, target in named if target not in targets]
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_files(path: Path) -> None:
    text = re.sub(FENCE, "", path.read_text("utf-8"), flags=re.M | re.S)
    missing = []
    for link in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        is_page = target.exists() and target.suffix == ".md"
        if not target.exists() or (anchor and is_page and anchor not in anchors_of(target)):
            missing.append(link)
    assert not missing, f"{path.name} points to what is not there: {missing}"


def anchors_of(path: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(FENCE, "", path.read_text("utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }


def test_readme_is_short() -> None:
    words = len((ROOT / "README.md").read_text("utf-8").split())
    assert words <= MAX_README_WORDS, f"{words} words: move some to docs/"


def test_site_names_every_page() -> None:
    """Each page of docs/ is in the navigation, and nothing else is."""
    navigation = yaml.load((ROOT / "mkdocs.yml").read_text("utf-8"), Loader=yaml.BaseLoader)["nav"]

    def files(entry: Any) -> set[str]:
        if isinstance(entry, str):
            return {entry}
        entries = entry.values() if isinstance(entry, dict) else entry
        return {file for each in entries for file in files(each)}

    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert files(navigation) == there


PUBLIC = (
    "rest_lightning",
    *(
        f"rest_lightning.{name}"
        for name in (
            "avatar",
            "callbacks",
            "data",
            "diffusion",
            "evaluation",
            "media",
            "metrics",
            "models",
            "serve",
            "streaming",
            "tasks",
        )
    ),
)


@pytest.mark.parametrize("package", PUBLIC)
def test_reference_has_every_public_name(package: str) -> None:
    """And nothing that is not there: the site's build would fail."""
    pages = [path.read_text("utf-8") for path in (ROOT / "docs" / "reference").glob("*.md")]
    named = set(re.findall(r"^::: ([\w.]+)$", "\n".join(pages), re.M))
    module = importlib.import_module(package)
    public = {name: getattr(module, name) for name in module.__all__}
    homes = {name: each.__module__ for name, each in public.items() if hasattr(each, "__module__")}
    missing = {f"{home}.{name}" for name, home in homes.items()} - named
    assert not missing, f"add to docs/reference: {sorted(missing)}"


@pytest.mark.slow
def test_site_builds_strictly(tmp_path: Path) -> None:
    """Without network, and without a page that loads anything from elsewhere."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    unreachable = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    environment = {**os.environ, **unreachable, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in tmp_path.rglob("*.html"):
        loaded = r"<(?:script|link|img)\b[^>]*(?:src|href)=[\"']?(https?://[^\"' >]+)"
        outside = re.findall(loaded, page.read_text("utf-8"))
        assert not outside, f"{page.name} loads {outside}"


def test_blocks_are_parsed() -> None:
    first = "a\n<!-- test: one -->\n```sh\nrest talk a b \\\n  -o c  # out\n\n```\n\n"
    rest = "```python\nx = 1\n```\n\n<!-- not run: no network -->\n```sh\npip install a\n```\n"
    one, two, three = blocks_of(first + rest)
    assert (one.name, one.language, one.line, one.is_slow) == ("one", "sh", 3, False)
    assert [shlex.split(c, comments=True) for c in commands(one.text)] == [
        ["rest", "talk", "a", "b", "-o", "c"]
    ]
    assert (two.name, two.why_not, two.text) == (None, None, "x = 1\n")
    assert (three.name, three.why_not) == (None, "no network")
    (four,) = blocks_of("<!-- test: two, slow -->\n```text\n```\n")
    assert (four.name, four.is_slow) == ("two", True)
    assert tiny_arguments("rest talk") == []
    assert tiny_arguments("rest serve") == ["--help"]


def test_a_failing_block_is_a_failure() -> None:
    (block,) = blocks_of("<!-- test: bad -->\n```sh\nrest talk none.jpg none.wav -o out.mp4\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md, line 2: rest talk"), open_null():
        run_shell(block)


@contextlib.contextmanager
def open_null() -> Any:
    with Path(os.devnull).open("w") as null, contextlib.redirect_stderr(null):
        yield
