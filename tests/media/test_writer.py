from __future__ import annotations

import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import pytest

from rest_lightning.constants import SAMPLES_PER_FRAME
from rest_lightning.errors import UserError
from rest_lightning.media.writer import Mp4Writer


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Frames (F, H, W, 3) and mono samples as any player would see them."""
    with av.open(str(path)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    with av.open(str(path)) as container:
        if not container.streams.audio:
            return frames, np.zeros(0, np.float32)
        return frames, np.concatenate(
            [frame.to_ndarray()[0] for frame in container.decode(audio=0)]
        )


def noise(num_frames: int, size_px: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(
        0, 256, (num_frames, size_px, size_px, 3), dtype=np.uint8
    )


@contextmanager
def file_limit(num_bytes: int) -> Iterator[None]:
    """A real lack of space: the operating system refuses to grow any file beyond ``num_bytes``."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("frames_per_write", [1, 24, 250])
@pytest.mark.parametrize("audio_first", [True, False])
def test_flashes_and_clicks_stay_together(
    tmp_path: Path, frames_per_write: int, audio_first: bool
) -> None:
    """The encoder's priming must not move the speech: a click in frame k is found in frame k, to
    the sample.
    """
    flashes, num_frames = [0, 3, 50, 101, 249], 250
    frames = np.full((num_frames, 64, 64, 3), (40, 120, 200), np.uint8)
    speech = np.zeros(num_frames * SAMPLES_PER_FRAME, np.float32)
    for flash in flashes:
        frames[flash] = 255
        speech[flash * SAMPLES_PER_FRAME + 100 : flash * SAMPLES_PER_FRAME + 110] = 0.9
    path = tmp_path / "clicks.mp4"
    with Mp4Writer(path, 64) as writer:
        for start in range(0, num_frames, frames_per_write):
            stop = start + frames_per_write
            for turn in (audio_first, not audio_first):
                if turn:
                    writer.write_audio(speech[start * SAMPLES_PER_FRAME : stop * SAMPLES_PER_FRAME])
                else:
                    writer.write(frames[start:stop])
    read_frames, read_speech = read(path)
    assert len(read_frames) == num_frames
    assert np.flatnonzero(read_frames.mean((1, 2, 3)) > 200).tolist() == flashes
    clicks = np.flatnonzero(np.abs(read_speech) > 0.4)
    starts = clicks[np.flatnonzero(np.diff(clicks, prepend=-1000) > 100)]
    assert np.abs(starts - (np.array(flashes) * SAMPLES_PER_FRAME + 100)).max() <= 2
    with av.open(str(path)) as container:
        assert container.duration == 10_000_000
        assert [stream.codec_context.name for stream in container.streams] == ["h264", "aac"]
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"
        assert container.streams.video[0].average_rate == 25
        assert container.streams.audio[0].rate == 16_000


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (34, 62)])
@pytest.mark.parametrize("num_frames", [1, 2, 7, 24])
def test_every_frame_arrives_in_colour(
    tmp_path: Path, size: tuple[int, int], num_frames: int
) -> None:
    colours = np.random.default_rng(1).integers(30, 226, (num_frames, 1, 1, 3), dtype=np.uint8)
    frames = np.broadcast_to(colours, (num_frames, *size, 3))
    with Mp4Writer(tmp_path / "a.mp4", size, crf=8) as writer:
        writer.write(frames)
    read_frames, read_speech = read(tmp_path / "a.mp4")
    assert read_frames.shape == frames.shape
    assert np.abs(read_frames.astype(int) - frames).max() <= 8
    assert read_speech.size == 0


def test_index_comes_first(tmp_path: Path) -> None:
    with Mp4Writer(tmp_path / "a.mp4", 64) as writer:
        writer.write(noise(3, 64))
    data = (tmp_path / "a.mp4").read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


def test_final_name_appears_only_at_close(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    writer = Mp4Writer(path, 64)
    writer.write(noise(30, 64))
    assert not path.exists() and len(list(tmp_path.iterdir())) == 1
    writer.close()
    writer.close()
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match="expected an open writer"):
        writer.write(noise(1, 64))


def test_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), Mp4Writer(path, 64, overwrite=True) as writer:
        writer.write(noise(5, 64))
        raise ZeroDivisionError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_interrupt_keeps_a_playable_video(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with pytest.raises(KeyboardInterrupt), Mp4Writer(path, 64) as writer:
        writer.write(noise(40, 64))
        writer.write_audio(np.zeros(40 * SAMPLES_PER_FRAME, np.float32))
        raise KeyboardInterrupt
    assert len(read(path)[0]) == 40 and list(tmp_path.iterdir()) == [path]


def test_interrupt_before_the_first_frame_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Mp4Writer(tmp_path / "a.mp4", 64):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_signals_at_any_moment_leave_a_playable_video(tmp_path: Path) -> None:
    """A process is interrupted for real, twice, while it writes as fast as it can."""
    path = tmp_path / "a.mp4"
    program = (
        "import sys, numpy as np\n"
        "from rest_lightning.media.writer import Mp4Writer\n"
        "frames = np.random.default_rng(0).integers(0, 256, (24, 64, 64, 3), dtype=np.uint8)\n"
        "with Mp4Writer(sys.argv[1], 64) as writer:\n"
        "    for chunk in range(100000):\n"
        "        writer.write(frames)\n"
        "        if chunk == 3: print('go', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a suite in the background ignores it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None and process.stdout.readline() == "go\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    frames, _ = read(path)
    assert len(frames) >= 4 * 24 and len(frames) % 24 == 0
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("num_bytes", [0, 20_000, 200_000])
def test_full_disk(tmp_path: Path, num_bytes: int) -> None:
    full = pytest.raises(UserError, match="the disk is full: free some space")
    with full, file_limit(num_bytes), Mp4Writer(tmp_path / "a.mp4", 64, crf=1) as writer:
        for _ in range(20):
            writer.write(noise(24, 64))
            writer.write_audio(np.zeros(24 * SAMPLES_PER_FRAME, np.float32))
    assert not list(tmp_path.iterdir())


def test_full_disk_at_the_last_moment(tmp_path: Path) -> None:
    """The file fits but for its index, which is written at close."""
    with Mp4Writer(tmp_path / "whole.mp4", 64, crf=1) as writer:
        writer.write(noise(100, 64))
    size = (tmp_path / "whole.mp4").stat().st_size
    (tmp_path / "whole.mp4").unlink()
    for missing in (1, 200, 1500):
        full = pytest.raises(UserError, match="the disk is full")
        with full, file_limit(size - missing), Mp4Writer(tmp_path / "a.mp4", 64, crf=1) as writer:
            writer.write(noise(100, 64))
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "missing/a.mp4",
            (
                "expected a folder .*missing for .*a.mp4, found nothing there: create "
                "it "
                "with mkdir -p"
            ),
        ),
        ("file/a.mp4", "found a file there"),
        ("folder", "got the folder"),
        ("a.avi", r"ends in \.mp4, got .*a\.avi: try .*a\.mp4"),
        ("there.mp4", "there.mp4 exists: choose another name or add --overwrite"),
    ],
)
def test_bad_names(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "there.mp4").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message) as info:
        Mp4Writer(tmp_path / name, 64)
    assert "\n" not in str(info.value) and sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(
    not Path("/sys/kernel").is_dir(), reason=("needs a folder that even root cannot write to")
)
def test_not_writable() -> None:
    with pytest.raises(UserError, match="choose a folder that you may write to"):
        Mp4Writer("/sys/kernel/a.mp4", 64)


def test_bad_frames(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"even frame sides for H\.264, got 63x64"):
        Mp4Writer(tmp_path / "a.mp4", (63, 64))
    with Mp4Writer(tmp_path / "a.mp4", 64, audio=False) as writer:
        writer.write(noise(1, 64))
        with pytest.raises(
            UserError,
            match=(
                r"expected uint8 frames \(n, 64, 64, 3\), got uint8 "
                r"\(1, 32, 32, 3\)"
            ),
        ):
            writer.write(noise(1, 32))
        with pytest.raises(UserError, match="got float32"):
            writer.write(noise(1, 64).astype(np.float32))
        with pytest.raises(UserError, match="audio track"):
            writer.write_audio(np.zeros(640, np.float32))
        writer.write(np.zeros((0, 64, 64, 3), np.uint8))
    assert len(read(tmp_path / "a.mp4")[0]) == 1
    with pytest.raises(UserError, match="at least one frame"), Mp4Writer(tmp_path / "b.mp4", 64):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize("key_frame_every", [1, 7, None])
def test_distance_of_key_frames(tmp_path: Path, key_frame_every: int | None) -> None:
    frames = (
        np.random.default_rng(0).integers(0, 255, (1, 64, 64, 3), dtype=np.uint8).repeat(20, axis=0)
    )
    with Mp4Writer(tmp_path / "a.mp4", 64, key_frame_every=key_frame_every) as writer:
        writer.write(frames)
    with av.open(str(tmp_path / "a.mp4")) as container:
        packets = [
            packet for packet in container.demux(video=0) if packet.size and packet.is_keyframe
        ]
        keys = sorted(packet.pts for packet in packets if packet.pts is not None)
        frame_pts = 1 / (25 * float(container.streams.video[0].time_base))
    assert [round(pts / frame_pts) for pts in keys] == list(range(0, 20, key_frame_every or 20))
