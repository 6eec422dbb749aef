"""Names, terminals, signals and devices of other people's machines, through the command line."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from rest_lightning.cli import main
from rest_lightning.errors import UserError
from rest_lightning.machine import peak_memory_mb
from rest_lightning.media.files import remove_leftovers, temporary_path
from rest_lightning.media.portrait import read_portrait
from rest_lightning.media.writer import Mp4Writer

MakeSpeech = Callable[..., Path]


@pytest.mark.parametrize(
    "stem", ["a" * 240, "\u540d" * 80, "12:30:05", "http:x", "a b\u00fc", "%03d", ".hidden"]
)
def test_every_name_that_the_disk_takes(
    tmp_path: Path,
    tiny_model: Path,
    portrait: Path,
    make_speech: MakeSpeech,
    monkeypatch: pytest.MonkeyPatch,
    stem: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["talk", str(portrait), str(make_speech(3000)), "-o", f"{stem}.mp4", "--quiet"]
    assert main([*words, "--model", str(tiny_model)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [f"{stem}.mp4", "portrait.png", "speech.wav"]
    )


@pytest.mark.parametrize("length", [1, 50, 99, 100, 101, 180, 250])
def test_temporary_names_fit_and_are_found_again(tmp_path: Path, length: int) -> None:
    path = tmp_path / f"{'n' * length}.mp4"
    temporary = temporary_path(path)
    temporary.touch()
    assert len(os.fsencode(temporary.name)) <= 255
    remove_leftovers(path)
    assert not temporary.exists()


def test_the_later_of_two_runs_stops(tmp_path: Path) -> None:
    """Both found the name free when they began."""
    frames = np.zeros((2, 32, 32, 3), np.uint8)
    writers = [Mp4Writer(tmp_path / "a.mp4", 32) for _ in range(2)]
    for writer in writers:
        writer.write(frames)
    writers[0].close()
    first = (tmp_path / "a.mp4").read_bytes()
    with pytest.raises(UserError, match="exists by now"):
        writers[1].close()
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == first


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252", "utf-8"])
def test_terminals_of_other_encodings(
    tmp_path: Path,
    tiny_model: Path,
    portrait: Path,
    make_speech: MakeSpeech,
    monkeypatch: pytest.MonkeyPatch,
    encoding: str,
) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding=encoding))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    words = ["talk", str(portrait), str(make_speech(3000)), "-o", str(tmp_path / "out.mp4")]
    assert main([*words, "--model", str(tiny_model)]) == 0
    sys.stdout.flush()
    assert b"frames" in shown.getvalue()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_leave_a_video_that_plays(
    tmp_path: Path,
    tiny_model: Path,
    portrait: Path,
    make_speech: MakeSpeech,
    capfd: pytest.CaptureFixture[str],
    number: int,
) -> None:
    """To a process of its own, as `docker stop` sends SIGTERM; the others to this process."""
    out = tmp_path / "out" / "a.mp4"
    out.parent.mkdir()
    speech = make_speech(16_000 * 900)
    words = ["talk", str(portrait), str(speech), "-o", str(out), "--quiet", "--steps", "40"]
    words += ["--model", str(tiny_model)]

    def send(pid: int) -> None:
        deadline = time.monotonic() + 300
        # The header comes first: only what follows it holds frames.
        while time.monotonic() < deadline and not any(
            path.stat().st_size > 20_000 for path in out.parent.iterdir()
        ):
            time.sleep(0.1)
        os.kill(pid, number)

    # nohup and "&" of a shell start this test with signals ignored, which a child inherits
    plain: Any = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, plain)
    try:
        if number == signal.SIGTERM:
            process = subprocess.Popen([sys.executable, "-m", "rest_lightning", *words])
            send(process.pid)
            code = process.wait(300)
        else:
            sender = threading.Thread(target=send, args=(os.getpid(),))
            sender.start()
            code = main(words)
            sender.join()
    finally:
        signal.signal(number, before)
    told = capfd.readouterr().err
    assert code == 128 + number
    assert len(told.strip().splitlines()) == 1 and "kept" in told, told
    assert [path.name for path in out.parent.iterdir()] == ["a.mp4"]
    with av.open(str(out)) as container:
        assert sum(1 for _ in container.decode(video=0)) >= 24


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_library_that_swallows_an_interrupt_hides_it_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    """torch's C++ code, interrupted while it reads weights, raises a TypeError without a cause."""

    def read_weights(words: list[str]) -> int:
        interrupted = False
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        except KeyboardInterrupt:
            interrupted = True
        assert interrupted
        raise UserError("expected whole weights, got something else: fetch them again")

    plain: Any = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, plain)
    monkeypatch.setattr("rest_lightning.cli._run", read_weights)
    try:
        assert main(["talk"]) == 128 + number
        assert signal.getsignal(number) == plain
    finally:
        signal.signal(number, before)
    assert capsys.readouterr().err == "interrupted: nothing was written\n"


@pytest.mark.parametrize("as_folder", [False, True])
def test_ctrl_c_before_anybody_knows_of_a_file_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_folder: bool
) -> None:
    def open_file(words: list[str]) -> int:
        path = temporary_path(tmp_path / "a.mp4")
        path.mkdir() if as_folder else path.write_bytes(b"half")
        raise KeyboardInterrupt

    (tmp_path / "b.mp4").write_bytes(b"whole")
    monkeypatch.setattr("rest_lightning.cli._run", open_file)
    assert main(["predict"]) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["b.mp4"]


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:99", "tpu", "cudaish", ""])
@pytest.mark.parametrize("command", ["talk", "score", "encode"])
def test_a_device_that_is_not_there_is_one_line(
    tmp_path: Path,
    portrait: Path,
    make_speech: MakeSpeech,
    capsys: pytest.CaptureFixture[str],
    command: str,
    device: str,
) -> None:
    import torch

    if torch.cuda.is_available() and device.startswith("cuda"):
        pytest.skip("there is one")
    root = Path(__file__).resolve().parents[2]
    words = {
        "talk": [str(portrait), str(make_speech(3000)), "-o", str(tmp_path / "o.mp4"), "--quiet"],
        "score": [
            *("--protocol", str(root / "configs" / "protocol" / "synthetic.yaml")),
            *("--generated", str(tmp_path), "--truth", str(tmp_path)),
            *("--out", str(tmp_path / "r.json")),
        ],
        "encode": ["--model", str(tmp_path), "--data", str(tmp_path), "--out", str(tmp_path / "l")],
    }[command]
    assert main([command, *words, "--device", device]) == 2
    told = capsys.readouterr().err.strip()
    assert "expected device auto, cpu or an available cuda" in told
    assert "\n" not in told


@pytest.mark.parametrize(("mode", "ending"), [("F", "tif"), ("I", "tif"), ("I;16", "png")])
def test_large_pictures_of_many_bits_take_bounded_memory(
    tmp_path: Path, mode: str, ending: str
) -> None:
    path = tmp_path / f"a.{ending}"
    values = np.zeros((6000, 6000), {"F": np.float32, "I": np.int32, "I;16": np.uint16}[mode])
    values[::2] = 1 if mode == "F" else 60_000
    Image.fromarray(values).save(path)
    del values
    before_mb = peak_memory_mb()
    pixels = read_portrait(path, 64, "centre")
    assert pixels.mean() > 90
    assert peak_memory_mb() - before_mb < 400
