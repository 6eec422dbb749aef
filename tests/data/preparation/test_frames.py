"""Any rate becomes 25 fps, rotated phones stand upright, holes stay holes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from videos import level_of, levels, rotate, write_video

from rest_lightning.data.preparation.frames import FrameStream, SourceError, probe


def shown(path: Path, max_gap_s: float = 2.0) -> tuple[list[int], list[float]]:
    """Numbers and levels of the frames at 25 fps."""
    header = probe(path)
    stream = FrameStream(path, header, max_gap_s)
    pairs = [(f.index, level_of(f.picture(header.width, header.height))) for f in stream]
    assert stream.damage is None
    return [i for i, _ in pairs], [level for _, level in pairs]


@pytest.mark.parametrize("fps", [1, 12, 24, 25, 30, 50, 60, 240])
def test_every_rate_becomes_25_fps(tmp_path: Path, fps: int) -> None:
    num_frames = max(3, min(2 * fps, 180))
    path = write_video(tmp_path / "a.mp4", levels(num_frames), fps=fps)
    numbers, seen = shown(path)
    assert numbers == list(range(round(num_frames / fps * 25)))
    middles = (np.arange(len(numbers)) + 0.5) / 25
    expected = 20 + np.minimum(np.floor(middles * fps + 1e-6), num_frames - 1)
    np.testing.assert_allclose(seen, expected, atol=1.2 if fps > 1 else 2)


@pytest.mark.parametrize("seed", range(3))
def test_variable_rates_show_what_is_on_the_screen(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    # and the first frame is not at 0
    times = np.cumsum(rng.choice([1 / 60, 1 / 30, 1 / 15, 0.3], 40)) + 5.0
    path = write_video(tmp_path / "a.mkv", levels(40), fps=30, times_s=times.tolist())
    numbers, seen = shown(path)
    assert numbers == list(range(len(numbers)))
    assert abs(len(numbers) / 25 - (times[-1] - times[0])) < 0.1
    middles = (np.arange(len(numbers)) + 0.5) / 25 + times[0]
    expected = 20 + np.searchsorted(times, middles, side="right") - 1
    # mkv rounds to milliseconds
    near_edge = np.abs(middles[:, None] - times[None]).min(axis=1) < 0.002
    np.testing.assert_allclose(np.array(seen)[~near_edge], expected[~near_edge], atol=1.2)


def test_a_hole_leaves_numbers_out(tmp_path: Path) -> None:
    times = [*np.arange(10) / 25, *(np.arange(10) / 25 + 5.0)]
    path = write_video(tmp_path / "a.mkv", levels(20), times_s=times)
    assert shown(path, max_gap_s=2.0)[0] == [*range(10), *range(125, 135)]
    assert shown(path, max_gap_s=8.0)[0] == list(range(135))


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotated_phones_stand_upright(tmp_path: Path, degrees: int) -> None:
    frames = np.zeros((3, 48, 96, 3), np.uint8)
    frames[:, :24, :48] = (250, 20, 20)  # red is where the camera's top left was
    path = rotate(write_video(tmp_path / "a.mp4", frames), degrees)
    header = probe(path)
    assert (header.width, header.height) == ((96, 48) if degrees % 180 == 0 else (48, 96))
    picture = next(iter(FrameStream(path, header))).picture(header.width, header.height)
    assert picture.shape == (header.height, header.width, 3)
    turned = np.rot90(frames[0], -degrees // 90)  # clockwise
    assert np.abs(picture.astype(int) - turned).mean() < 6


@pytest.mark.parametrize(
    ("height", "width", "pix_fmt"),
    [
        (63, 95, "yuv444p"),
        (33, 33, "yuv444p"),
        (480, 854, "yuv420p10le"),
        (64, 96, "yuv444p10le"),
        (50, 98, "yuvj420p"),
    ],
)
def test_odd_sizes_and_depths(tmp_path: Path, height: int, width: int, pix_fmt: str) -> None:
    path = write_video(tmp_path / "a.mkv", levels(3, height, width), pix_fmt=pix_fmt)
    header = probe(path)
    assert (header.width, header.height) == (width, height)
    seen = shown(path)[1]
    np.testing.assert_allclose(seen, [20, 21, 22], atol=2.5)  # ten bits are cut to eight
    np.testing.assert_allclose(np.diff(seen), 1, atol=0.4)


def test_a_slow_video_is_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", levels(3), fps=1)
    with pytest.raises(SourceError, match="expected at least 10 frames per second, got 1"):
        probe(path, 10)
