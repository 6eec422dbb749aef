"""A given box is what is cropped, without any detector; clips that a filter drops can be written
all the same.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from videos import speech_like, write_video

from rest_lightning.data import layout
from rest_lightning.data.preparation.clip import crop_square
from rest_lightning.data.preparation.finish import finish
from rest_lightning.data.preparation.options import PrepareOptions
from rest_lightning.data.preparation.work import prepare_video
from rest_lightning.media.video import read_frames

LIMITS = dict.fromkeys(("min_sharpness", "max_text", "max_flow", "min_brightness"))


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """320x240, a picture of soft blocks that gets brighter, 12 frames."""
    blocks = np.random.default_rng(3).integers(30, 190, (6, 8, 3), dtype=np.uint8)
    still = np.asarray(Image.fromarray(blocks).resize((320, 240), Image.Resampling.BICUBIC))
    frames = np.stack([still + np.uint8(2 * i) for i in range(12)])
    return write_video(tmp_path_factory.mktemp("raw") / "a.mp4", frames, [speech_like(0.48)])


@pytest.mark.parametrize("box", [(0, 0, 240, 240), (100, 30, 128, 128), (257, 177, 63, 63)])
def test_the_box_is_what_is_cropped(video: Path, tmp_path: Path, box: tuple[float, ...]) -> None:
    options = PrepareOptions(size_px=128, box=box, min_frames=5, **LIMITS)  # type: ignore[arg-type]
    (row,) = prepare_video(video, video.parent, tmp_path, options)
    assert row.status == "kept" and row.box == box and row.clip_id is not None
    seen = read_frames(layout.clip_path(tmp_path, row.clip_id)).astype(int)
    x, y, side, _ = (int(v) for v in box)
    for source, clip in zip(read_frames(video), seen, strict=True):
        expected = Image.fromarray(source[y : y + side, x : x + side]).resize(
            (128, 128), Image.Resampling.LANCZOS
        )
        assert np.abs(np.asarray(expected).astype(int) - clip).mean() < 3


def test_a_box_outside_is_a_row(video: Path, tmp_path: Path) -> None:
    options = PrepareOptions(box=(200, 0, 128, 128))
    (row,) = prepare_video(video, video.parent, tmp_path, options)
    assert (row.status, row.stage, row.reason) == (
        "failed",
        "track",
        "expected a box inside 320x240 pixels, got 200,0,128,128",
    )


def test_what_lies_outside_repeats_the_edge() -> None:
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    out = crop_square(picture, (-2, 1, 6, 6), 6)
    assert (
        (out[:, :3] == out[:, 2:3]).all()
        and (out[:3, 2] == picture[1:4, 0]).all()
        and (out[3:] == out[2]).all()
    )


@pytest.mark.parametrize("keep", [False, True])
def test_dropped_clips_are_written_on_request_and_stay_out_of_the_manifest(
    video: Path, tmp_path: Path, keep: bool
) -> None:
    # 12 frames are too short
    options = PrepareOptions(size_px=128, already_cropped=True, keep_dropped=keep, **LIMITS)
    (row,) = finish(tmp_path, prepare_video(video, video.parent, tmp_path, options), options)
    assert (row.status, row.filter) == ("dropped", "short") and row.clip_id is not None
    assert layout.is_complete(tmp_path, row.clip_id) == keep
    assert (tmp_path / (row.thumbnail or "")).is_file()
    assert layout.manifest_path(tmp_path).read_text() == ""


def test_neither_mediapipe_nor_torch_is_needed(video: Path, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "sys.modules['mediapipe'] = sys.modules['torch'] = None\n"  # their import fails
        "from rest_lightning.cli import main\n"
        "if __name__ == '__main__':\n"
        "    sys.exit(main(sys.argv[1:]))\n"
    )
    words = [
        str(video.parent),
        "--out",
        str(tmp_path / "out"),
        "--already-cropped",
        "--min-frames",
        "5",
        "--quiet",
        *(f"--{name}=null" for name in LIMITS),  # that a clip is kept: exit code 0
    ]
    (tmp_path / "bare.py").write_text(program)
    command = [sys.executable, str(tmp_path / "bare.py"), "prepare", *words, "--num-workers", "1"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "1 videos" in result.stdout and result.stderr == ""
    words[words.index("--already-cropped")] = "--val-fraction=0"
    command = [sys.executable, str(tmp_path / "bare.py"), "prepare", *words]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "expected mediapipe for faces: pip install" in result.stderr
