from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import rest_lightning
from rest_lightning.cli import COMMANDS, STAGE_COMMANDS, main


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in [*COMMANDS, *STAGE_COMMANDS])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    printed = capsys.readouterr().out
    assert f"usage: rest {name}" in printed and "--quiet" in printed


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"rest_lightning {rest_lightning.__version__}\n"


@pytest.mark.parametrize("words", [[], ["--quiet"]])
def test_quiet_prints_nothing_and_does_the_work(
    words: list[str], repository: Path, tmp_path: Path
) -> None:
    """Looked at from outside: a child process that a command starts is quiet, too."""
    rows = repository / "benchmarks" / "leaderboard" / "embedded.json"
    command = [sys.executable, "-m", "rest_lightning", "leaderboard", str(rows)]
    done = subprocess.run(
        [*command, "--out", str(tmp_path), *words], capture_output=True, text=True
    )
    assert done.returncode == 0 and (tmp_path / "leaderboard.md").is_file()
    assert (done.stdout == "") == bool(words) and done.stderr == ""
    wrong = subprocess.run([*command, "no.json", *words], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: ")


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tlak", "a.png"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert "got 'tlak'" in printed.err and all(
        name in printed.err for name in [*COMMANDS, *STAGE_COMMANDS]
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["talk"],
            "expected PORTRAIT, SPEECH, --out: see rest talk --help",
        ),
        (
            ["talk", "a.png", "a.wav", "-o", "a.mp4", "--steps", "0"],
            "expected a number of at least 1, got '0'",
        ),
        (
            ["talk", "a.png", "a.wav", "-o", "a.mp4", "--crop", "1,2"],
            "expected auto, centre, x,y,size",
        ),
        (["talk", "a.png", "a.wav", "-o", "a.mp4", "--nope"], "got --nope: see rest talk --help"),
        (["talk", "a.png", "a.wav", "--ou", "a.mp4"], "got --ou: did you mean --out?"),
        (
            ["synthesize", "--out", "x", "--num_clips", "many"],
            "--num-clips: expected a whole number, got many",
        ),
    ],
)
def test_wrong_arguments(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("words", [["--num-clips", "0"], ["--num_clips", "0"], ["--num_clips=0"]])
def test_dashes_and_underscores_are_the_same(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["synthesize", "--out", str(tmp_path / "x"), *words]) == 2
    error = capsys.readouterr().err
    assert "got 0" in error and "required" not in error and len(error.splitlines()) == 1


def test_quick_commands_do_not_load_torch() -> None:
    """Help, a wrong command and a wrong file name answer before the large packages are imported."""
    program = (
        "import sys\n"
        "from rest_lightning.cli import main\n"
        "for words in (['--help'], ['frob'], ['talk', 'no.png', 'no.wav', '-o', 'no.mp4'], "
        "['talk', '--help']):\n"
        "    main(words)\n"
        "loaded = {'torch', 'lightning', 'diffusers', 'transformers', 'matplotlib'} & "
        "set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_module_is_the_command(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "rest_lightning",
        "talk",
        str(tmp_path / "no.png"),
        "no.wav",
        "-o",
        "no.mp4",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert (
        result.stderr.startswith("error: expected a portrait image")
        and len(result.stderr.splitlines()) == 1
    )
