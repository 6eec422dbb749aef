"""Every file that people have gives rows with reasons; no file stops the others."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from videos import levels, speech_like, write_video

from rest_lightning.data import layout
from rest_lightning.data.preparation.engine_local import find_videos, run
from rest_lightning.data.preparation.finish import finish
from rest_lightning.data.preparation.options import PrepareOptions
from rest_lightning.data.preparation.rows import Row, read_rows
from rest_lightning.data.preparation.work import prepare_video
from rest_lightning.errors import UserError
from rest_lightning.media.video import VideoFile, read_clip_audio
from rest_lightning.processes import owned

OPTIONS = PrepareOptions(
    size_px=128,
    already_cropped=True,
    min_frames=5,
    min_sharpness=None,
    max_text=None,
    min_brightness=None,
)
VOICE = speech_like(1.0)


def good(path: Path, **kwargs: object) -> Path:
    return write_video(path, levels(25), [VOICE], **kwargs)  # type: ignore[arg-type]


def cut(path: Path, share: float, **kwargs: object) -> Path:
    data = good(path, **kwargs).read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def damaged(path: Path) -> Path:
    data = bytearray(good(path, options={"movflags": "+faststart"}).read_bytes())
    middle = len(data) // 2
    data[middle : len(data) - 100] = np.random.default_rng(0).bytes(len(data) - 100 - middle)
    path.write_bytes(bytes(data))
    return path


def sound_only(path: Path) -> Path:
    whole = good(path.with_name("whole.mkv"))
    import av

    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        track = target.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(source.streams.audio[0]):
            if packet.dts is not None:
                packet.stream = track
                target.mux(packet)
    whole.unlink()
    return path


def image(path: Path) -> Path:
    Image.fromarray(levels(1)[0]).save(path, format="PNG")
    return path


def looped(path: Path) -> Path:
    path.symlink_to(path.name)
    return path


def text(path: Path) -> Path:
    path.write_text("<html>404 not found</html>" * 50)
    return path


def empty(path: Path) -> Path:
    path.touch()
    return path


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


# What to make, the status of the (first) row, its stage, and a part of its reason.
BAD: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "zero bytes": (empty, "probe", "an empty file of zero bytes"),
    "no moov": (lambda p: cut(p, 0.5), "probe", "expected a video, got 'invalid data"),
    "text": (text, "probe", "expected a video, got 'invalid data"),
    "sound only": (sound_only, "probe", "expected a video stream, got sound only"),
    "image": (image, "probe", "got a still image"),
    "link loop": (looped, "probe", "got 'too many levels of symbolic links'"),
    "pipe": (pipe, "probe", "got a pipe, a device or a folder"),
    "1 fps": (lambda p: write_video(p, levels(6), fps=1), "probe", "frames per second, got 1"),
    "tiny": (
        lambda p: write_video(p, levels(25, 16, 16)),
        "probe",
        ("at least 32 pixels on each side, got 16x16"),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_a_row_with_a_reason(tmp_path: Path, name: str) -> None:
    make, stage, reason = BAD[name]
    path = make(tmp_path / "in.mp4")
    rows = prepare_video(path, tmp_path, tmp_path / "out", OPTIONS)
    assert [(row.status, row.stage, row.clip_id) for row in rows] == [("failed", stage, None)]
    assert (
        reason in (rows[0].reason or "").lower()
        if reason.islower()
        else reason in (rows[0].reason or "")
    )
    assert "\n" not in (rows[0].reason or "")
    assert not list((tmp_path / "out" / "clips").iterdir())


@pytest.mark.parametrize("share", [0.6, 0.9])
def test_a_truncated_video_gives_what_is_whole_and_says_what_is_not(
    tmp_path: Path, share: float
) -> None:
    path = write_video(
        tmp_path / "a.mp4", levels(100), [speech_like(4.0)], options={"movflags": "+faststart"}
    )
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    rows = prepare_video(path, tmp_path, tmp_path / "out", OPTIONS)
    clips, failed = [r for r in rows if r.clip_id], [r for r in rows if r.status == "failed"]
    assert len(clips) == 1 and 5 <= (clips[0].num_frames or 0) < 100
    assert len(failed) == (share < 0.8) or "truncated" in (failed[0].reason or "")
    assert not failed or failed[0].stage == "decode"


def test_a_damaged_middle_gives_rows_and_no_exception(tmp_path: Path) -> None:
    rows = prepare_video(damaged(tmp_path / "a.mp4"), tmp_path, tmp_path / "out", OPTIONS)
    assert rows and all(row.reason for row in rows if row.status != "kept")


GOOD: dict[str, Callable[[Path], Path]] = {
    "plain.mp4": good,
    "10 bit.mkv": lambda p: good(p, pix_fmt="yuv420p10le"),
    "two tracks.mkv": lambda p: write_video(p, levels(25), [VOICE, -VOICE]),
    "surround.mkv": lambda p: write_video(p, levels(25), [np.tile(VOICE, (6, 1))], layout="5.1"),
    "odd.mkv": lambda p: write_video(p, levels(25, 63, 95), [VOICE], pix_fmt="yuv444p"),
    "240.mp4": lambda p: write_video(p, levels(24).repeat(10, axis=0), [VOICE], fps=240),
    'it\'s a "quote".mp4': good,
    "a:b?c&d=%20#.mp4": good,
    "emoji 🙂 ñ.mp4": good,
    "x" * 246 + ".mp4": good,
    "-rf.mp4": good,
}


def test_good_files_of_all_kinds_are_kept_beside_bad_ones(tmp_path: Path) -> None:
    """One run over all of them, with links in a circle, the output inside the input, and a file of
    another kind.
    """
    root, out = tmp_path / "raw videos", tmp_path / "raw videos" / "out"
    (root / "deep" / "er").mkdir(parents=True)
    for name, make in GOOD.items():
        make(root / "deep" / name)
    write_video(root / "mute.mp4", levels(25))
    empty(root / "empty.MP4")
    (root / "deep" / "er" / "up").symlink_to(root)
    (root / "notes.txt").write_text("no video")
    options = PrepareOptions(**{**vars(OPTIONS), "max_duplicate_distance": 0, "val_fraction": 0.3})
    with owned(out, "rest prepare"):
        sources = find_videos(root, out)
        assert len(sources) == len(GOOD) + 2
        rows = finish(out, run(sources, root, out, options, num_workers=1, progress=False), options)
    by_name = {row.source: row for row in rows}
    assert len(by_name) == len(rows) == len(GOOD) + 2 and rows == read_rows(out)
    assert by_name["empty.MP4"].status == "failed"
    assert (by_name["mute.mp4"].status, by_name["mute.mp4"].filter) == ("dropped", "silence")
    clips = [by_name[f"deep/{name}"] for name in GOOD]
    # one picture and sound
    assert {(r.status, r.filter) for r in clips} <= {("kept", None), ("dropped", "duplicate")}
    kept = [row for row in clips if row.status == "kept"]
    assert kept and [m.clip_id for m in layout.read_manifest(out)] == sorted(
        r.clip_id for r in kept if r.clip_id
    )
    for row in clips:
        assert row.clip_id is not None and row.num_frames == 25
        with VideoFile(layout.clip_path(out, row.clip_id)) as video:
            assert (video.num_frames, video.size, video.fps) == (25, (128, 128), 25)
        heard = read_clip_audio(layout.clip_path(out, row.clip_id), 25)
        assert np.corrcoef(heard, VOICE)[0, 1] > 0.9 or "two" in row.source
        sidecar = layout.read_sidecar(out, row.clip_id)
        assert (sidecar.source, sidecar.num_frames, sidecar.split) == (row.source, 25, row.split)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_an_unreadable_file_is_a_row(tmp_path: Path) -> None:
    path = good(tmp_path / "a.mp4")
    path.chmod(0)
    (row,) = prepare_video(path, tmp_path, tmp_path / "out", OPTIONS)
    assert isinstance(row, Row) and row.reason == (
        "expected a readable file, got 'permission denied'"
    )


def test_a_folder_without_videos_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="got none: check the folder"):
        find_videos(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="expected a folder of videos, got no such folder"):
        find_videos(tmp_path / "no", tmp_path / "out")
