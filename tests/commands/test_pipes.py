"""`rest talk` between pipes, as real processes: live in, live out, and a reader that goes away."""

from __future__ import annotations

import array
import fcntl
import io
import os
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from rest_lightning.cli import main
from rest_lightning.commands.talk import TalkOptions, talk

MakeSpeech = Callable[..., Path]
FRAME_BYTES = 64 * 64 * 3


def start(portrait: Path, model: Path, *words: str) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "rest_lightning",
        "talk",
        str(portrait),
        "-",
        "-o",
        "-",
        "--model",
        str(model),
    ]
    pipe = subprocess.PIPE
    return subprocess.Popen([*command, *words], stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0)


def sound(num_frames: int) -> bytes:
    return np.random.default_rng(0).integers(-3000, 3000, num_frames * 640, dtype="<i2").tobytes()


def take(process: subprocess.Popen[bytes], num_bytes: int, timeout_s: float = 120) -> bytes:
    """So many bytes of stdout, or what came before the time was over."""
    assert process.stdout is not None
    data, deadline_s = b"", time.monotonic() + timeout_s
    while len(data) < num_bytes and (left_s := deadline_s - time.monotonic()) > 0:
        if select.select([process.stdout], [], [], left_s)[0]:
            data += (part := os.read(process.stdout.fileno(), num_bytes - len(data)))
            if not part:
                break
    return data


def test_frames_come_while_the_speech_still_goes_in_and_idle_goes_on(
    tiny_model: Path, portrait: Path
) -> None:
    """One process: idle frames before speech comes and behind it, until Ctrl-C."""
    process = start(portrait, tiny_model, "--format", "rgb24", "--live")
    assert process.stdin is not None
    for speech in (b"", sound(26)):
        process.stdin.write(speech)
        assert len(take(process, 48 * FRAME_BYTES)) == 48 * FRAME_BYTES
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)  # frames that are on their way want a reader
    assert process.returncode == 130, errors
    assert b"talking" in errors and b"interrupted: sent" in errors and b"rror" not in errors


def waiting_bytes(process: subprocess.Popen[bytes]) -> int:
    """In the pipe of stdout, for somebody to read."""
    assert process.stdout is not None
    count = array.array("i", [0])
    fcntl.ioctl(process.stdout, termios.FIONREAD, count)
    return count[0]


@pytest.mark.parametrize("words", [["--live"], ["--format", "rgb24"]], ids=["live", "at_the_end"])
def test_ctrl_c_ends_it_though_nobody_reads(
    tiny_model: Path, portrait: Path, words: list[str]
) -> None:
    """In the middle of a live video, and when all frames are there and wait for the reader."""
    process = start(portrait, tiny_model, *words)
    assert process.stdin is not None and process.stderr is not None
    process.stdin.write(sound(48))  # what a pipe takes at once
    if "--live" not in words:
        process.stdin.close()
    before, num_same, deadline_s = 0, 0, time.monotonic() + 120
    while num_same < 3:  # a pipe of 64 KiB is full with less where the pieces are odd
        assert time.monotonic() < deadline_s and process.poll() is None
        time.sleep(0.5)
        now = waiting_bytes(process)
        num_same = num_same + 1 if now == before > 20_000 else 0
        before = now
    process.send_signal(signal.SIGINT)
    try:
        # a second on a quiet machine; forever, before somebody let go of the reader
        assert process.wait(30) == 130
    finally:
        process.kill()
    errors = process.stderr.read()
    assert b"interrupted: sent" in errors and b"rror" not in errors and b"Trace" not in errors
    assert waiting_bytes(process) >= before


def test_a_live_video_holds_all_of_the_speech(
    tmp_path: Path, tiny_model: Path, portrait: Path
) -> None:
    out = tmp_path / "out.mp4"
    report = talk(
        TalkOptions(
            portrait,
            "-",
            out,
            model=tiny_model,
            stdin=io.BytesIO(sound(30)),
            live=True,
            quiet=True,
            num_steps=1,
        )
    )
    with av.open(str(out)) as container:
        num_frames = sum(1 for _ in container.decode(video=0))
        container.seek(0)
        heard = [frame.to_ndarray() for frame in container.decode(audio=0)]
    spoken = np.abs(np.concatenate(heard, axis=1)) > 0.01
    assert num_frames == report.num_frames >= 30 and report.configuration["live"]
    assert np.count_nonzero(spoken) > 0.5 * 30 * 640  # noise of up to 0.09
    assert report.chunk_ms["count"] and report.configuration["num_steps"] == 1


def test_pipe_holds_the_video_of_the_file(
    tmp_path: Path,
    tiny_model: Path,
    portrait: Path,
    make_speech: MakeSpeech,
    capsys: pytest.CaptureFixture[str],
) -> None:
    speech, pipe, raw = make_speech(40_000), io.BytesIO(), io.BytesIO()
    arguments = (portrait, str(speech))
    talk(TalkOptions(*arguments, tmp_path / "file.mp4", model=tiny_model, quiet=True))
    talk(
        TalkOptions(
            *arguments, Path("-"), model=tiny_model, stdout=pipe, report=tmp_path / "a.json"
        )
    )
    talk(
        TalkOptions(*arguments, Path("-"), model=tiny_model, stdout=raw, format="rgb24", quiet=True)
    )
    assert capsys.readouterr().out == ""
    exact = np.frombuffer(raw.getvalue(), np.uint8).reshape(-1, 64, 64, 3).astype(int)
    assert len(exact) == 63
    for source in (str(tmp_path / "file.mp4"), io.BytesIO(pipe.getvalue())):
        with av.open(source) as container:
            frames = np.stack(
                [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            )
        luma = (frames - exact) @ np.array([0.299, 0.587, 0.114])
        assert frames.shape == exact.shape and np.abs(luma).mean() < 8


def test_a_reader_that_goes_away_ends_it(tiny_model: Path, portrait: Path) -> None:
    process = start(portrait, tiny_model)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(sound(60))
    assert take(process, 2000)
    process.stdout.close()
    try:
        while process.poll() is None:
            process.stdin.write(sound(60))
    except BrokenPipeError:  # it has ended
        pass
    errors = process.stderr.read().decode()  # type: ignore[union-attr]
    assert process.wait(60) == 141, errors
    assert (
        ("the reader of stdout has gone after") in errors
        and "Traceback" not in errors
        and "rror" not in errors
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-o", "-", "--sheet", "a.png"], "expected a video file for --sheet, got a pipe"),
        (
            ["-o", "a.mp4", "--format", "rgb24"],
            ("expected a pipe for --format rgb24, got a.mp4: use -o - > FILE"),
        ),
        (["-o", "a.mp4", "--live"], r'expected a pipe ("-") for --live, got speech.wav'),
        (
            ["-o", "a.mp4", "--live", "--profile", "a.json"],
            'expected a pipe ("-") for --live, got speech.wav',
        ),
        (["-o", "a.mp4", "--profile", "a.txt"], "ends in .json, got a.txt"),
    ],
)
def test_what_does_not_go_together(
    words: list[str],
    message: str,
    portrait: Path,
    make_speech: MakeSpeech,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(make_speech(16_000).parent)
    assert main(["talk", str(portrait), "speech.wav", *words]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and len(printed.err.splitlines()) == 1 and not printed.out


def test_profile_says_where_the_time_goes(
    tmp_path: Path,
    tiny_model: Path,
    portrait: Path,
    make_speech: MakeSpeech,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import json

    trace = tmp_path / "trace.json"
    words = [
        "talk",
        str(portrait),
        str(make_speech(6 * 24 * 640)),
        "-o",
        str(tmp_path / "a.mp4"),
        "--profile",
        str(trace),
    ]
    assert main([*words, "--model", str(tiny_model)]) == 0
    names = {event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {
        "stage: speech",
        "stage: dit",
        "stage: vae",
        "aten::scaled_dot_product_attention",
    } <= names
    printed = capsys.readouterr().out
    for word in ("3 profiled", "dit", "vae", "aten::", "share"):
        assert word in printed
    words[2], words[4] = str(make_speech(16_000)), str(tmp_path / "b.mp4")
    assert main([*words, "--overwrite", "--model", str(tiny_model)]) == 2
    assert (
        "expected more than 2 chunks to profile, got 2: give it longer speech"
    ) in capsys.readouterr().err
