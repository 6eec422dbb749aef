"""Folders that a run owns, and children that end with their parent; real processes, no torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import alive, descendants

from rest_lightning.errors import UserError
from rest_lightning.processes import LOCK_NAME, owned

HOLD = """
import sys, time
from rest_lightning.processes import owned
with owned(sys.argv[1], "rest fit"):
    print("held", flush=True)
    time.sleep(60)
"""
# A run that starts a command of its own, which starts a worker.
FAMILY = """
import os, subprocess, sys, time
from rest_lightning.processes import end_with_parent, run_child
depth = int(sys.argv[1])
end_with_parent()
print("begun", flush=True)
if depth:
    words = [sys.executable, sys.argv[0], str(depth - 1)]
    {signals}
    sys.exit(run_child(words, dict(os.environ)))
time.sleep(60)
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_lock_names_its_holder_and_dies_with_it(tmp_path: Path, number: int) -> None:
    folder = tmp_path / "run"
    process = hold(folder)
    said = rf"`rest fit` \(process {process.pid} on .*, since .*\)"
    with pytest.raises(UserError, match=said), owned(folder, "rest encode"):
        pass
    process.send_signal(number)
    process.wait(20)
    with owned(folder, "rest encode"):
        assert json.loads((folder / LOCK_NAME).read_text())["command"] == "rest encode"
    assert not (folder / LOCK_NAME).exists()


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    """DataLoader's workers are forks: a lock that they kept would outlive a run that is killed."""
    read, write = os.pipe()
    with owned(tmp_path, "rest fit"):
        child = os.fork()
        if child == 0:
            os.close(write)
            os.read(read, 1)  # until the test is done
            os._exit(0)
    os.close(read)
    try:
        with owned(tmp_path, "rest fit"):
            pass
    finally:
        os.close(write)
        os.waitpid(child, 0)


def test_what_was_made_for_nothing_goes_and_what_was_there_stays(tmp_path: Path) -> None:
    with pytest.raises(UserError), owned(tmp_path / "new", "rest fit"):
        raise UserError("a mistake that is found later")
    (tmp_path / "old").mkdir()
    with owned(tmp_path / "old", "rest fit"), pytest.raises(UserError, match="which has not said"):
        (tmp_path / "old" / LOCK_NAME).write_text("")
        with owned(tmp_path / "old", "rest fit"):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="'file exists'"), owned(tmp_path / "file", "rest fit"):
        pass


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_children_and_theirs_end_with_their_parent(tmp_path: Path, number: int) -> None:
    program = tmp_path / "family.py"
    program.write_text(FAMILY.replace("{signals}", ""))
    process = subprocess.Popen(
        [sys.executable, str(program), "2"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(3)] == ["begun\n"] * 3
    below = descendants(process.pid)
    assert len(below) == 2
    process.send_signal(number)
    process.wait(20)
    end_s = time.monotonic() + 10
    while alive(below) and time.monotonic() < end_s:
        time.sleep(0.02)
    assert not alive(below)
