"""stdin, stdout and stderr that are closed, full or gone, and disks that refuse, as real processes
of ``rest``.
"""

from __future__ import annotations

import io
import os
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rest_lightning.cli import main
from rest_lightning.errors import UserError
from rest_lightning.media import files
from rest_lightning.media.files import (
    explain_error,
    restore_folder,
    temporary_path,
    whole_file,
    whole_folder,
)

FULL = Path("/dev/full")
REST = f"{shlex.quote(sys.executable)} -m rest_lightning"


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(
    ("streams", "code", "told"),
    [
        ("", 0, ""),
        (">&-", 0, ""),
        ("2>&-", 0, ""),
        ("<&- >&- 2>&-", 0, ""),
        ("2>/dev/full", 0, ""),
        (">/dev/full", 2, "expected room for stdout"),
        (">/dev/full 2>/dev/full", 2, ""),
        (">/dev/full 2>&-", 2, ""),
        ("| true", 0, ""),
    ],
)
def test_what_cannot_be_told_spoils_nothing(
    tmp_path: Path, streams: str, code: int, told: str
) -> None:
    if "full" in streams and not FULL.exists():
        pytest.skip("no /dev/full")
    done = shell(f"{REST} --help {streams}", tmp_path)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert told in done.stderr and len(done.stderr.splitlines()) <= 1


@pytest.mark.parametrize("streams", ["2>&-", "2>/dev/full", ">&-", "<&- >&- 2>&-"])
def test_a_mistake_keeps_its_exit_code(tmp_path: Path, streams: str) -> None:
    assert shell(f"{REST} talk none.png none.wav -o a.mp4 {streams}", tmp_path).returncode == 2
    assert shell(f"{REST} nonsense {streams}", tmp_path).returncode == 2


def test_a_closed_stdout_is_no_place_for_a_video(tmp_path: Path) -> None:
    done = shell(f"{REST} talk none.png none.wav -o - >&-", tmp_path)
    assert done.returncode == 2 and "got a closed stdout" in done.stderr


# -- files and folders -----------------------------------------------------------------------------


def refuse_os(path: Path) -> None:
    path.write_bytes(b"half")
    raise OSError(28, "No space left on device")


def refuse_torch(path: Path) -> None:
    import torch

    with path.open("wb") as file, FULL.open("wb") as full:
        file.write(b"half")
        torch.save({"a": torch.zeros(1 << 20)}, full)


def refuse_safetensors(path: Path) -> None:
    """It does not write into devices: a limit on the size of files stands for the disk's."""
    import torch
    from safetensors.torch import save_file

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        save_file({"a": torch.zeros(1 << 20)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refuse_pillow(path: Path) -> None:
    from PIL import Image

    with FULL.open("wb") as full:
        Image.new("RGB", (256, 256)).save(full, "PNG")


def refuse_numpy(path: Path) -> None:
    import numpy as np

    with FULL.open("wb") as full:
        np.save(full, np.zeros(1 << 20))


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
@pytest.mark.parametrize(
    "write", [refuse_os, refuse_torch, refuse_safetensors, refuse_pillow, refuse_numpy]
)
def test_a_full_disk_is_one_line_whoever_writes(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    path = tmp_path / "out.bin"
    path.write_text("old")
    with pytest.raises(UserError) as told, whole_file(path) as temporary:
        write(temporary)
    assert len(str(told.value).splitlines()) == 1
    assert "the disk is full" in str(told.value), told.value
    assert [each.name for each in tmp_path.iterdir()] == ["out.bin"]
    assert path.read_text() == "old"


def test_faults_of_our_own_stay_visible(tmp_path: Path) -> None:
    with pytest.raises(KeyError), whole_file(tmp_path / "a"):
        raise KeyError("a fault")
    assert explain_error(OSError("a fault")) is None
    assert not list(tmp_path.iterdir())


def test_what_ended_processes_left_goes_at_the_next_write(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from rest_lightning.media.files import *\n"
        "temporary_path(sys.argv[1]).write_text('left')\n"
        "temporary_path(sys.argv[2]).mkdir()\n"
    )
    names = [str(tmp_path / name) for name in ("a.mp4", "model")]
    subprocess.run([sys.executable, "-c", program, *names], check=True)
    left = {path.name for path in tmp_path.iterdir()}
    assert len(left) == 2
    strange = ".a.mp4.part", f".b.{os.getpid()}.{'0' * 14}.part", ".c.99999999.abcdef12345678.part"
    for name in strange:  # of a user, of a process that lives, of another machine
        (tmp_path / name).touch()
    ours = temporary_path(tmp_path / "b.mp4")
    ours.touch()
    files._remove_orphans.cache_clear()  # as another process would
    temporary_path(tmp_path / "c.mp4")
    assert {path.name for path in tmp_path.iterdir()} == {*strange, ours.name}


@pytest.fixture(params=["exchange", "two renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "two renames":
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    return str(request.param)


def contents(path: Path) -> list[str]:
    return sorted(each.name for each in restore_folder(path).iterdir())


@pytest.mark.usefixtures("way")
def test_a_folder_is_the_old_one_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies before and after every rename, in turn."""
    path = tmp_path / "model"
    for name in ("first", "second"):
        with whole_folder(path) as folder:
            (folder / name).touch()
        assert contents(path) == [name]
    assert [each.name for each in tmp_path.iterdir()] == ["model"]
    with pytest.raises(KeyError), whole_folder(path) as folder:
        (folder / "half").touch()
        raise KeyError
    assert contents(path) == ["second"]
    for last in range(1, 7):
        child = os.fork()
        if child == 0:
            _die_at(last)
            with whole_folder(path) as folder:
                (folder / "third").touch()
            os._exit(0)
        os.waitpid(child, 0)
        assert contents(path) in (["second"], ["third"]), last
        with whole_folder(path) as folder:
            (folder / "second").touch()
    files._remove_orphans.cache_clear()
    temporary_path(path)
    assert [each.name for each in tmp_path.iterdir()] == ["model"]


def _die_at(last: int) -> None:
    """Ends this process at the ``last``-th moment before or after a rename or an exchange."""
    moments = 0

    def moment() -> None:
        nonlocal moments
        moments += 1
        if moments == last:
            os._exit(9)

    def with_moments(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: object) -> object:
            moment()
            result = call(*args)
            moment()
            return result

        return run

    os.replace = with_moments(os.replace)
    files._exchange = with_moments(files._exchange)


def test_stdout_that_fills_up_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    assert main(["--version"]) == 2
