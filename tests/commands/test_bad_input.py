"""Whatever a user gives wrongly: one line that names the file and the way out, exit code 2, and no
file left behind.
"""

from __future__ import annotations

import io
import resource
import wave
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image

from rest_lightning.cli import main

MakeSpeech = Callable[..., Path]
Make = Callable[[Path], None]


def sound(path: Path, samples: np.ndarray, codec: str = "pcm_s16le") -> None:
    """Encodes mono samples (n,) at 16 kHz."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            samples.astype(np.float32)[None], format="fltp", layout="mono"
        )
        frame.sample_rate, frame.pts, frame.time_base = 16_000, 0, Fraction(1, 16_000)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def tone() -> np.ndarray:
    return 0.3 * np.sin(np.arange(48_000) / 20)


def with_nan(path: Path) -> None:
    samples = tone()
    samples[24_000] = np.nan
    sound(path, samples, "pcm_f32le")


def no_samples(path: Path) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))


def silent_film(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = 64
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8))))
        container.mux(stream.encode(None))


def cut(make: Make, share: float) -> Make:
    def write(path: Path) -> None:
        make(path)
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))])

    return write


def coded(codec: str) -> Make:
    return lambda path: sound(path, tone(), codec)


def picture(width: int, height: int) -> Make:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return lambda path: Image.fromarray(pixels).save(path)


def text(content: str) -> Make:
    def write(path: Path) -> None:
        path.write_text(content)

    return write


BAD_PORTRAITS: dict[str, tuple[Make, str]] = {
    "missing.png": (lambda path: None, "does not exist: check the name"),
    "folder.png": (lambda path: path.mkdir(), "got the folder"),
    "zero.png": (lambda path: path.touch(), "empty file"),
    "text.jpg": (text("hello"), "export it as PNG or JPEG"),
    "cut.png": (cut(picture(200, 200), 0.5), "truncated or damaged: export it again"),
    "cut.jpg": (cut(picture(200, 200), 0.5), "truncated or damaged: export it again"),
    "one.png": (picture(1, 1), "of 1x1: use a larger image"),
    "thin.png": (picture(400, 8), "of 400x8: use a larger image"),
    "film.mp4": (silent_film, "of a video, save a frame"),
}
BAD_SPEECH: dict[str, tuple[Make, str]] = {
    "missing.wav": (lambda path: None, "does not exist: check the name"),
    "folder.wav": (lambda path: path.mkdir(), "got the folder"),
    "zero.wav": (lambda path: path.touch(), "empty file"),
    "none.wav": (no_samples, "has no samples"),
    "text.mp3": (text("hello"), "copy or export it again"),
    "film.mp4": (silent_film, "video tracks only: choose a file with sound"),
    "nan.wav": (with_nan, "at sample 24000 (1.500 s): export it again"),
    "cut.m4a": (
        cut(coded("aac"), 0.5),
        ("it is truncated or something else; copy or export it again"),
    ),
}
CUT_SPEECH: dict[str, tuple[str, str]] = {
    "cut.wav": ("pcm_s16le", "note: cut.wav: its header says 3.0 s, and 1.5 s are there"),
    "cut.mp3": ("libmp3lame", ""),  # its header promises no length that could be trusted
    "cut.flac": ("flac", "note: cut.flac: its header says 3.0 s, and 0.8 s are there"),
}
BAD_OUTPUTS: dict[str, tuple[Make, str]] = {
    "missing/out.mp4": (lambda path: None, "create it with mkdir -p"),
    "folder.mp4": (lambda path: path.mkdir(), "got the folder"),
    "exists.mp4": (text("old"), "choose another name or add --overwrite"),
    "out.avi": (lambda path: None, "ends in .mp4"),
    "file.txt/out.mp4": (lambda path: text("a file")(path.parent), "found a file there"),
}


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }


def assert_one_line(capsys: pytest.CaptureFixture[str], name: str, way_out: str) -> None:
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1 and printed.out == "", printed
    assert lines[0].startswith("error: expected "), lines[0]
    assert name in lines[0] and way_out in lines[0], lines[0]


@pytest.mark.parametrize("name", BAD_PORTRAITS)
def test_portrait(
    name: str, tmp_path: Path, make_speech: MakeSpeech, capsys: pytest.CaptureFixture[str]
) -> None:
    make, way_out = BAD_PORTRAITS[name]
    make(tmp_path / name)
    speech = make_speech(16_000)
    before = tree(tmp_path)
    assert main(["talk", str(tmp_path / name), str(speech), "-o", str(tmp_path / "out.mp4")]) == 2
    assert_one_line(capsys, name, way_out)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", BAD_SPEECH)
def test_speech(
    name: str, tmp_path: Path, portrait: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, way_out = BAD_SPEECH[name]
    make(tmp_path / name)
    before = tree(tmp_path)
    assert main(["talk", str(portrait), str(tmp_path / name), "-o", str(tmp_path / "out.mp4")]) == 2
    assert_one_line(capsys, name, way_out)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", CUT_SPEECH)
def test_cut_speech_is_spoken_as_far_as_it_goes(
    name: str,
    tmp_path: Path,
    tiny_model: Path,
    portrait: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    codec, note = CUT_SPEECH[name]
    cut(coded(codec), 0.5)(tmp_path / name)
    words = ["talk", str(portrait), str(tmp_path / name), "-o", str(tmp_path / "out.mp4")]
    assert main([*words, "--model", str(tiny_model), "--quiet"]) == 0
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == bool(note) and "".join(lines).startswith(note), lines
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert 15 <= sum(1 for _ in container.decode(video=0)) <= 40  # of 75


@pytest.mark.parametrize("name", BAD_OUTPUTS)
def test_output(
    name: str,
    tmp_path: Path,
    portrait: Path,
    make_speech: MakeSpeech,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make, way_out = BAD_OUTPUTS[name]
    make(tmp_path / name)
    speech = make_speech(16_000)
    before = tree(tmp_path)
    assert main(["talk", str(portrait), str(speech), "-o", str(tmp_path / name)]) == 2
    assert_one_line(capsys, name, way_out)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("option", "name"),
    [("--report", "out.txt"), ("--sheet", "out.jpg"), ("--report", "none/a.json")],
)
def test_other_outputs_are_checked_before_the_work(
    option: str,
    name: str,
    tmp_path: Path,
    portrait: Path,
    make_speech: MakeSpeech,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["talk", str(portrait), str(make_speech(16_000)), "-o", str(tmp_path / "out.mp4")]
    assert main([*words, option, str(tmp_path / name)]) == 2
    assert_one_line(capsys, name, "")
    assert not (tmp_path / "out.mp4").exists()


def test_an_input_is_never_overwritten(
    tmp_path: Path, portrait: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    film = tmp_path / "film.mp4"
    sound(film, tone(), "aac")
    before = tree(tmp_path)
    assert main(["talk", str(portrait), str(film), "-o", str(film), "--overwrite"]) == 2
    assert_one_line(capsys, "film.mp4", "choose another name")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("num_bytes", [100, 3000])
def test_full_disk(
    num_bytes: int,
    tmp_path: Path,
    tiny_model: Path,
    portrait: Path,
    make_speech: MakeSpeech,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A real lack of space: the operating system refuses to grow any file beyond so many bytes."""
    speech = make_speech(64_000)
    before = tree(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    words = [
        "talk",
        str(portrait),
        str(speech),
        "-o",
        str(tmp_path / "out.mp4"),
        "--model",
        str(tiny_model),
        "--quiet",
    ]
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        code = main(words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    assert_one_line(capsys, "out.mp4", "the disk is full: free some space")
    assert tree(tmp_path) == before


@pytest.mark.skipif(
    not Path("/sys/kernel").is_dir(), reason=("needs a folder that even root cannot write to")
)
def test_not_writable(
    tiny_model: Path, portrait: Path, make_speech: MakeSpeech, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "talk",
        str(portrait),
        str(make_speech(16_000)),
        "-o",
        "/sys/kernel/out.mp4",
        "--model",
        str(tiny_model),
    ]
    assert main([*words, "--quiet"]) == 2
    assert_one_line(capsys, "/sys/kernel", "choose a folder that you may write to")


@pytest.mark.parametrize(
    ("data", "way_out"),
    [(b"", "got none: try ffmpeg"), (b"RIFF\0\0\0\0WAVE", ("a whole sound file: try ffmpeg"))],
)
def test_pipe(
    data: bytes,
    way_out: str,
    tmp_path: Path,
    tiny_model: Path,
    portrait: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    before = tree(tmp_path)
    assert (
        main(
            [
                "talk",
                str(portrait),
                "-",
                "-o",
                str(tmp_path / "o.mp4"),
                "--model",
                str(tiny_model),
                "--quiet",
            ]
        )
        == 2
    )
    assert_one_line(capsys, "stdin", way_out)
    assert tree(tmp_path) == before


def test_no_model(
    tmp_path: Path, portrait: Path, make_speech: MakeSpeech, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["talk", str(portrait), str(make_speech(16_000)), "-o", str(tmp_path / "out.mp4")]
    assert main([*words, "--model", str(tmp_path / "nowhere")]) == 2
    assert_one_line(capsys, "nowhere", "rest export")
    assert main([*words, "--device", "toaster"]) == 2
    assert_one_line(capsys, "toaster", "--device cpu")


@pytest.mark.parametrize("option", ["guidance", "reference_guidance"])
def test_guidance_that_is_no_number(
    option: str,
    tmp_path: Path,
    tiny_model: Path,
    portrait: Path,
    make_speech: MakeSpeech,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [
        "talk",
        str(portrait),
        str(make_speech(16_000)),
        "-o",
        str(tmp_path / "o.mp4"),
        "--model",
        str(tiny_model),
    ]
    before = tree(tmp_path)
    assert main([*words, "--quiet", f"--{option}=.nan"]) == 2  # as YAML writes it
    told = f"error: --{option.replace('_', '-')}: expected a finite number, got nan"
    assert capsys.readouterr().err.splitlines() == [told]
    assert main([*words, "--quiet", f"--{option}=nan"]) == 2
    told = told.replace("a finite number", "a number")
    assert capsys.readouterr().err.splitlines() == [told]
    assert tree(tmp_path) == before


def test_silence_simply_works(tmp_path: Path, tiny_model: Path, portrait: Path) -> None:
    sound(tmp_path / "silence.wav", np.zeros(32_000))
    words = ["talk", str(portrait), str(tmp_path / "silence.wav"), "-o", str(tmp_path / "out.mp4")]
    assert main([*words, "--model", str(tiny_model), "--quiet"]) == 0
    assert (tmp_path / "out.mp4").stat().st_size > 0
