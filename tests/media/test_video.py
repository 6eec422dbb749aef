from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from rest_lightning.constants import SAMPLES_PER_FRAME
from rest_lightning.errors import UserError
from rest_lightning.media.video import Backend, VideoFile, has_decord, read_clip_audio, read_frames

needs_decord = pytest.mark.skipif(not has_decord(), reason="decord has no wheel here")
BACKENDS: list[Backend] = ["decord", "pyav"] if has_decord() else ["pyav"]


@needs_decord
@pytest.mark.parametrize(
    ("num_frames", "size_px", "b_frames"), [(17, 32, 0), (41, 64, 2), (113, 128, 3)]
)
def test_backends_give_the_same_frames(
    make: Any, tmp_path: Path, num_frames: int, size_px: int, b_frames: int
) -> None:
    path = tmp_path / "clip.mp4"
    truth = make.frames(num_frames, size_px, seed=num_frames)
    make.mp4(path, truth, make.speech(num_frames * SAMPLES_PER_FRAME), max_b_frames=b_frames)
    for start, count in [(0, num_frames), (3, 9), (num_frames - 5, 5), (num_frames - 1, 1)]:
        ours, theirs = (read_frames(path, start, count, backend) for backend in ("decord", "pyav"))
        assert ours.shape == (count, size_px, size_px, 3)
        assert ours.dtype == np.uint8
        np.testing.assert_array_equal(ours, theirs)
        assert np.abs(ours.astype(int) - truth[start : start + count]).mean() < 4


@pytest.mark.parametrize(
    ("key_frame_every", "b_frames"), [(1, 0), (2, 1), (7, 0), (12, 3), (25, 2), (500, 2)]
)
def test_leaping_to_key_frames_changes_nothing(
    make: Any, tmp_path: Path, key_frame_every: int, b_frames: int
) -> None:
    """Any window, in any order, of one reader: the frames that decoding all of them gives."""
    path = tmp_path / "clip.mp4"
    truth = make.frames(61, 32, seed=b_frames)
    make.mp4(
        path, truth, make.speech(61 * 640), max_b_frames=b_frames, key_frame_every=key_frame_every
    )
    whole = read_frames(path, backend="pyav")
    with VideoFile(path, "pyav") as video:
        for start in [60, 0, *np.random.default_rng(0).permutation(60)]:
            count = min(1 + start % 13, 61 - start)
            np.testing.assert_array_equal(
                video.read(int(start), int(count)), whole[start : start + count]
            )
    if has_decord():
        np.testing.assert_array_equal(read_frames(path, 31, 17, "decord"), whole[31:48])


@pytest.mark.parametrize("suffix", [".mkv", ".ts"])
def test_other_containers_are_read_exactly(make: Any, tmp_path: Path, suffix: str) -> None:
    """With coarse time stamps, or an imprecise seek: never another frame than counting gives."""
    path, other = tmp_path / "clip.mp4", tmp_path / f"clip{suffix}"
    make.mp4(path, make.frames(41, 32), None, key_frame_every=8)
    whole = read_frames(path, backend="pyav")
    with av.open(str(path)) as source, av.open(str(other), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    with VideoFile(other, "pyav") as video:
        num_frames = video.num_frames
        for start in (20, 3, 33, 8):
            np.testing.assert_array_equal(
                video.read(start, num_frames - start), whole[start:num_frames]
            )


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_reader_serves_many_windows(make: Any, tmp_path: Path, backend: Backend) -> None:
    path = tmp_path / "clip.mp4"
    make.mp4(path, make.frames(41, 64), None)
    with VideoFile(path, backend) as video:
        assert (video.num_frames, video.size, video.fps) == (41, (64, 64), 25.0)
        whole = video.read()
        for start, count in [(20, 10), (0, 5), (33, 8), (7, 1)]:
            np.testing.assert_array_equal(video.read(start, count), whole[start : start + count])
        for start, count in [(-1, 3), (40, 2), (0, 0)]:
            with pytest.raises(UserError, match=r"expected frames within 0\.\.40"):
                video.read(start, count)


@pytest.mark.parametrize("size_px", [16, 48, 50])
def test_sizes_that_decord_cannot_read(make: Any, tmp_path: Path, size_px: int) -> None:
    path = tmp_path / "clip.mp4"
    make.mp4(path, make.frames(9, size_px), None)
    with VideoFile(path) as video:
        assert video.size == (size_px, size_px)
        np.testing.assert_array_equal(video.read(2, 5), read_frames(path, 2, 5, "pyav"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_broken_files_are_named(make: Any, tmp_path: Path, backend: Backend) -> None:
    with pytest.raises(UserError, match=r"absent\.mp4, got no such file"):
        VideoFile(tmp_path / "absent.mp4", backend)
    good, cut, text, empty = (tmp_path / f"{name}.mp4" for name in ("good", "cut", "text", "empty"))
    make.mp4(good, make.frames(41, 64), make.speech(41 * SAMPLES_PER_FRAME))
    cut.write_bytes(good.read_bytes()[: good.stat().st_size // 2])  # the index at the end is lost
    text.write_text("not a video")
    empty.touch()
    for path in (cut, text, empty):
        with pytest.raises(UserError, match=f"{path.name}: expected a readable video"):
            VideoFile(path, backend)
        with pytest.raises(UserError, match=f"{path.name}: expected decodable audio"):
            read_clip_audio(path, 41)


@pytest.mark.parametrize("num_frames", [25, 41, 113])
def test_audio_is_aligned_to_the_sample(make: Any, tmp_path: Path, num_frames: int) -> None:
    """A known signal and an impulse come back where they were put: the AAC encoder's delay is
    accounted for.
    """
    path = tmp_path / "clip.mp4"
    num_samples = num_frames * SAMPLES_PER_FRAME
    sent = make.speech(num_samples, seed=num_frames)
    impulse_at = num_samples // 2 + 77
    sent[impulse_at - 800 : impulse_at + 800] = 0
    sent[impulse_at] = 0.9
    make.mp4(path, make.frames(num_frames, 32), sent)
    got = read_clip_audio(path, num_frames)
    assert got.shape == (num_samples,)
    assert got.dtype == np.float32
    assert abs(int(np.abs(got).argmax()) - impulse_at) <= 2
    spectrum = np.fft.rfft(got, 2 * num_samples) * np.conj(np.fft.rfft(sent, 2 * num_samples))
    assert int(np.fft.irfft(spectrum).argmax()) == 0
    assert np.corrcoef(got, sent)[0, 1] > 0.95


def test_audio_of_another_length_is_cut_or_filled(make: Any, tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    sent = make.speech(20 * SAMPLES_PER_FRAME)
    make.mp4(path, make.frames(30, 32), sent)
    long, short = read_clip_audio(path, 30), read_clip_audio(path, 10)
    np.testing.assert_array_equal(long[: len(short)], short)
    assert np.abs(long[22 * SAMPLES_PER_FRAME :]).max() == 0


def test_wrong_audio_is_named(make: Any, tmp_path: Path) -> None:
    silent, fast = tmp_path / "silent.mp4", tmp_path / "fast.mp4"
    make.mp4(silent, make.frames(9, 32), None)
    make.mp4(fast, make.frames(9, 32), make.speech(20_000), sample_rate=48_000)
    with pytest.raises(UserError, match=r"silent\.mp4: expected an audio stream, got none"):
        read_clip_audio(silent, 9)
    with pytest.raises(UserError, match=r"fast\.mp4: expected 16000 Hz mono audio, got 48000 Hz"):
        read_clip_audio(fast, 9)
