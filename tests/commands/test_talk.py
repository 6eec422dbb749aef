from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import drawn
import numpy as np
import pytest
import torch
from PIL import Image

from rest_lightning.cli import main
from rest_lightning.commands.talk import TalkOptions, talk
from rest_lightning.constants import SAMPLES_PER_FRAME
from rest_lightning.errors import UserError

MakeSpeech = Callable[..., Path]


def lengths(path: Path) -> tuple[int, int]:
    """Frames, and samples of sound without the padding of the last AAC packet."""
    with av.open(str(path)) as container:
        num_frames = sum(1 for _ in container.decode(video=0))
        sound = container.streams.audio[0]
        assert sound.duration is not None and sound.time_base is not None
        return num_frames, round(sound.duration * sound.time_base * 16_000)


@pytest.mark.parametrize("num_samples", [1, 640, 641, 16_000, 24 * 640, 24 * 640 + 1, 40_000])
def test_video_is_as_long_as_the_speech(
    tmp_path: Path, tiny_model: Path, portrait: Path, make_speech: MakeSpeech, num_samples: int
) -> None:
    out = tmp_path / "out.mp4"
    words = ["talk", str(portrait), str(make_speech(num_samples)), "-o", str(out), "--quiet"]
    assert main([*words, "--model", str(tiny_model)]) == 0
    num_frames, num_sound = lengths(out)
    assert num_frames == -(-num_samples // SAMPLES_PER_FRAME)
    assert 0 <= num_frames * SAMPLES_PER_FRAME - num_sound < SAMPLES_PER_FRAME
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "out.mp4",
        "portrait.png",
        "speech.wav",
    ]


def test_report_sheet_and_table(
    tmp_path: Path,
    tiny_model: Path,
    portrait: Path,
    make_speech: MakeSpeech,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["talk", str(portrait), str(make_speech(40_000)), "-o", str(tmp_path / "out.mp4")]
    words += ["--model", str(tiny_model)]
    words += [
        "--report",
        str(tmp_path / "out.json"),
        "--sheet",
        str(tmp_path / "out.png"),
        "--seed=3",
        "--steps",
        "2",
    ]
    words += ["--guidance", "6", "--reference_guidance", "2"]
    assert main(words) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert (
        report["num_frames"] == 63
        and report["video_s"] == 2.52
        and report["chunk_ms"]["count"] == 3
    )
    assert (
        set(report["stage_s"]) == {"speech", "dit", "vae", "writing"}
        and min(report["stage_s"].values()) > 0
    )
    assert report["configuration"]["num_steps"] == 2 and report["configuration"]["seed"] == 3
    assert (
        report["configuration"]["guidance"] == 6
        and report["configuration"]["reference_guidance"] == 2
    )
    assert report["configuration"]["model"] == str(tiny_model)
    assert Image.open(tmp_path / "out.png").width == 1600
    printed = capsys.readouterr()
    for word in (
        "frames",
        "end to end",
        "time to first frame",
        "p50",
        "p95",
        "DiT",
        "writing",
        "peak memory",
    ):
        assert word in printed.out


def test_pipe_gives_the_video_of_the_file(
    tmp_path: Path, tiny_model: Path, portrait: Path, make_speech: MakeSpeech
) -> None:
    speech = make_speech(20_000)
    options = {"model": tiny_model, "quiet": True, "seed": 5}
    talk(TalkOptions(portrait, str(speech), tmp_path / "file.mp4", **options))
    pipe = io.BytesIO(speech.read_bytes()[44:])
    talk(TalkOptions(portrait, "-", tmp_path / "pipe.mp4", stdin=pipe, **options))
    assert (tmp_path / "file.mp4").read_bytes() == (tmp_path / "pipe.mp4").read_bytes()


def test_the_seed_decides(tiny_model: Path, portrait: Path, make_speech: MakeSpeech) -> None:
    """Frames as they leave the model: x264 was seen to encode the same frames in two ways, once in
    three runs or so.
    """
    speech, videos = make_speech(20_000), []
    for seed in (0, 0, 1):
        raw = io.BytesIO()
        pipe = {"stdout": raw, "format": "rgb24", "quiet": True}
        talk(TalkOptions(portrait, str(speech), Path("-"), model=tiny_model, seed=seed, **pipe))
        videos.append(raw.getvalue())
    a, b, c = videos
    assert len(a) == 32 * 64 * 64 * 3 and a == b != c


def test_twice_the_size(
    tmp_path: Path,
    tiny_model: Path,
    portrait: Path,
    make_speech: MakeSpeech,
    capsys: pytest.CaptureFixture[str],
) -> None:
    speech, out = make_speech(2_000), tmp_path / "out.mp4"
    words = ["talk", str(portrait), str(speech), "-o", str(out), "--model", str(tiny_model)]
    assert main([*words, "--size", "100"]) == 2 and not out.exists()
    assert "expected a size of 64 or 128 pixels for this model, got 100" in capsys.readouterr().err
    assert main([*words, "--size", "128", "--crop", "0,0,70"]) == 0
    assert "a square of 70 pixels in its photograph" in " ".join(capsys.readouterr().err.split())
    with av.open(str(out)) as container:
        assert (container.streams.video[0].width, container.streams.video[0].height) == (128, 128)


def test_interrupt_keeps_a_playable_video(tmp_path: Path, tiny_model: Path, portrait: Path) -> None:
    """Speech that never ends comes from a pipe; Ctrl-C, pressed twice, leaves what was done. Once:
    in test_hard_cases.py.
    """
    out = tmp_path / "out.mp4"
    words = ["talk", str(portrait), "-", "-o", str(out), "--model", str(tiny_model)]
    command = [sys.executable, "-m", "rest_lightning", *words]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # a suite in the background ignores it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdin is not None
    sound = np.random.default_rng(0).integers(-3000, 3000, 60 * 640, dtype="<i2").tobytes()
    process.stdin.write(sound)
    process.stdin.flush()
    part_size = 0
    while part_size < 1000 and process.poll() is None:  # the first chunks are being written
        process.stdin.write(sound)
        process.stdin.flush()
        parts = list(tmp_path.glob(".out.*.mp4"))
        part_size = parts[0].stat().st_size if parts else 0
    for _ in range(2):
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    last = errors.decode().strip().splitlines()[-1]
    assert last.startswith("interrupted: kept ") and str(out) in last and b"Traceback" not in errors
    num_frames, num_sound = lengths(out)
    assert num_frames >= 24 and num_sound == num_frames * SAMPLES_PER_FRAME
    assert f"kept {num_frames / 25:.2f} s" in last
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.mp4", "portrait.png"]


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, "bfloat16"),
        ({"amx_bf16": True}, "bfloat16"),
        ({"avx512_bf16": False, "avx2": True, "architecture": "x86_64"}, "float32"),
        ({}, "float32"),
    ],
)
def test_bfloat16_only_where_the_processor_computes_it(
    capabilities: dict[str, Any], expected: str
) -> None:
    from rest_lightning.parts import natural_dtype

    assert natural_dtype(capabilities) == expected


def test_types_by_name_and_device() -> None:
    from rest_lightning.parts import dtype_on, natural_dtype

    assert dtype_on("float32", "cpu") is dtype_on("float32", "cuda") is torch.float32
    assert dtype_on("bfloat16", "cpu") is torch.bfloat16
    assert dtype_on("auto", "cpu") is getattr(torch, natural_dtype(torch.cpu.get_capabilities()))
    with pytest.raises(
        UserError, match=("expected a dtype of auto, float32, bfloat16, got 'float16': choose one")
    ):
        dtype_on("float16", "cpu")


def test_bfloat16_gives_the_same_video_to_a_few_grey_levels() -> None:
    """The drawn model, 3 s: sampled latents stay close, since every step is computed from
    float32 noise levels.
    """
    from rest_lightning import TalkingHead

    samples = np.random.default_rng(0).normal(scale=0.1, size=48_000).astype(np.float32)
    frames = []
    for dtype in (torch.float32, torch.bfloat16):
        head = TalkingHead.from_pretrained(drawn.FOLDER, dtype=dtype)
        session = head.open(head.portraits[0])
        frames.append(np.concatenate([session.push(samples), session.flush()]).astype(int))
    assert frames[0].shape == frames[1].shape == (75, 128, 128, 3)
    assert np.abs(frames[0] - frames[1]).mean() < 1.0
    assert np.abs(np.diff(frames[0], axis=0)).mean() > 0.2  # something moves
