"""Processes that crash, folders that are taken, disks that fill up, runs that go on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from videos import levels, speech_like, write_video

from rest_lightning.cli import main
from rest_lightning.data import layout
from rest_lightning.data.preparation.rows import read_rows
from rest_lightning.errors import UserError
from rest_lightning.processes import LOCK_NAME, owned

HELPERS = str(Path(__file__).resolve().parents[2] / "helpers")
NO_LIMITS = ("max_hands", "min_sharpness", "max_text", "min_brightness", "max_flow", "min_face_px")
LOOSE = " ".join(f"--{name}=null" for name in NO_LIMITS)


def words(root: Path, out: Path, *more: str, workers: int = 1) -> list[str]:
    fixed = f"--size-px 128 --min-frames 10 {LOOSE} --quiet --num-workers {workers}".split()
    return ["prepare", str(root), "--out", str(out), *fixed, *more]


def content(out: Path) -> dict[str, bytes]:
    """All files but the lock and the report, which names the folder."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in (LOCK_NAME, "report.html")
    }


def make_videos(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        rng = np.random.default_rng(number)
        still = rng.integers(60, 200, (8, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        frames = np.tile(still, (20, 1, 1, 1)) + np.arange(20, dtype=np.uint8)[:, None, None, None]
        write_video(root / name, frames, [speech_like(0.8, seed=number)])
    return root


def test_crashes_and_bugs_are_rows_and_are_tried_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = make_videos(tmp_path / "in", "a.mp4", "crash.mp4", "raise.mp4", "memory.mp4", "z.mp4")
    out = tmp_path / "out"
    assert main(words(root, out, "--detector", "videos:Crashing")) == 0
    rows = {row.source: row for row in read_rows(out)}
    assert {name: row.status for name, row in rows.items()} == {
        "a.mp4": "kept",
        "crash.mp4": "failed",
        "memory.mp4": "failed",
        "raise.mp4": "failed",
        "z.mp4": "kept",
    }
    assert "ended by signal SIGSEGV" in (rows["crash.mp4"].reason or "")
    assert rows["raise.mp4"].reason == "unexpected ZeroDivisionError: a bug in a plug-in"
    assert (rows["memory.mp4"].reason or "").startswith("unexpected MemoryError")
    assert "2 clips" in capfd.readouterr().out
    # The crash alone is tried again; whoever has fixed the detector gets the clip.
    finished = {p: p.stat().st_mtime_ns for p in (out / "clips").iterdir()}
    (root / "crash.mp4").rename(root / "fixed.mp4")
    assert main(words(root, out, "--detector", "videos:Crashing", "--val-fraction", "0.5")) == 0
    assert {row.source for row in read_rows(out) if row.status == "kept"} == {
        "a.mp4",
        "fixed.mp4",
        "z.mp4",
    }
    assert all(p.stat().st_mtime_ns == then for p, then in finished.items() if p.suffix == ".mp4")
    assert len(layout.read_manifest(out)) == 3


def test_two_workers_give_what_one_gives_and_a_changed_video_is_done_again(tmp_path: Path) -> None:
    root = make_videos(tmp_path / "in", "a.mp4", "b.mp4", "c.mp4")
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(words(root, one, "--already-cropped")) == 0
    assert main(words(root, two, "--already-cropped", workers=2)) == 0
    assert content(one) == content(two)
    before = content(one)
    write_video(root / "b.mp4", levels(15), [speech_like(0.6)])  # shorter
    assert main(words(root, one, "--already-cropped")) == 0
    changed = {name for name, data in content(one).items() if before.get(name) != data}
    assert all(
        name.startswith(("clips/b-", "thumbs/b-", "sources/b-")) or "/" not in name
        for name in changed
    )
    assert next(row for row in read_rows(one) if row.source == "b.mp4").num_frames == 15


def test_a_second_run_on_one_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = make_videos(tmp_path / "in", "a.mp4"), tmp_path / "out"
    with owned(out, "rest prepare"):
        before = content(out)
        assert main(words(root, out, "--already-cropped")) == 2
        assert content(out) == before
    error = capsys.readouterr().err
    assert ("for this run alone, but another one works in it") in error and len(
        error.splitlines()
    ) == 1
    assert main(words(root, out, "--already-cropped")) == 0
    with (
        pytest.raises(UserError, match=("expected a folder to write to, got 'file exists'")),
        owned(root / "a.mp4", "rest prepare"),
    ):
        pass


def test_a_disk_that_fills_up_stops_in_one_line_and_goes_on(tmp_path: Path) -> None:
    """The limit on a file's size stands for the disk's: the system refuses the write in the same
    way.
    """
    root, out = make_videos(tmp_path / "in", "a.mp4", "b.mp4"), tmp_path / "out"
    program = (
        "import resource, sys; from rest_lightning.cli import main\n"
        "if __name__ == '__main__':\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, 6_000)); "
        "sys.exit(main(sys.argv[1:]))\n"
    )
    script = tmp_path / "limited.py"
    script.write_text(program)
    command = [sys.executable, str(script), *words(root, out, "--already-cropped")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert (
        result.stderr.startswith("error: expected room for ") or "free some space" in result.stderr
    )
    assert len(result.stderr.splitlines()) == 1
    assert not layout.manifest_path(out).exists()
    assert main(words(root, out, "--already-cropped")) == 0
    assert main(words(root, tmp_path / "other", "--already-cropped")) == 0
    assert content(out) == content(tmp_path / "other")


@pytest.mark.slow
def test_killed_at_ten_moments_and_resumed_it_is_as_if_nothing_had_happened(tmp_path: Path) -> None:
    root = make_videos(tmp_path / "in", *(f"{name}.mp4" for name in "abcdefgh"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([HELPERS, *sys.path])}
    detector = ("--detector", "videos:OneFace", "--keep-dropped")

    def start(out: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "rest_lightning", *words(root, out, *detector, workers=2)]
        return subprocess.Popen(
            command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL
        )

    def num_files(out: Path) -> int:
        return sum(1 for _ in out.rglob("*"))

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(whole).wait() == 0
    moments = random.Random(6)
    num_killed = num_between = 0
    while num_killed < 10:
        # begin again, so that the kills hit unfinished work
        if len(list(broken.glob("sources/*.json"))) > 6:
            for path in (*broken.glob("*/*"), *broken.glob("*.json*")):
                path.unlink()
        process = start(broken)
        # The moment is so many files later than now, temporary ones included, and some
        # milliseconds.
        target = num_files(broken) + moments.randint(0, 6)
        while process.poll() is None and num_files(broken) < target:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.1))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            num_killed += 1
        process.wait()
        num_between += 0 < len(list(broken.glob("sources/*.json"))) < 8
    assert num_between >= 3
    assert start(broken).wait() == 0
    assert content(broken) == content(whole)
    assert sum(row.status == "kept" for row in read_rows(broken)) == 8
