from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rest_lightning.constants import SAMPLES_PER_FRAME
from rest_lightning.errors import UserError
from rest_lightning.media.sheet import draw_contact_sheet, sound_envelope, summarise_video
from rest_lightning.media.writer import Mp4Writer

MakeVideo = Callable[..., tuple[Path, np.ndarray]]


def brightness(frames: np.ndarray) -> np.ndarray:
    """Stands for the mouth opening: the videos here carry it as brightness."""
    return frames.mean((1, 2, 3)) / 255


@pytest.fixture
def make_video(tmp_path: Path) -> MakeVideo:
    def make(num_frames: int, with_sound: bool = True) -> tuple[Path, np.ndarray]:
        curve = 0.5 + 0.4 * np.sin(np.arange(num_frames) / 5)
        frames = np.broadcast_to(
            (255 * curve).astype(np.uint8)[:, None, None, None], (num_frames, 64, 64, 3)
        )
        wave = np.repeat(curve, SAMPLES_PER_FRAME) * np.sin(
            np.arange(num_frames * SAMPLES_PER_FRAME) / 3
        )
        with Mp4Writer(tmp_path / "video.mp4", 64, audio=with_sound, overwrite=True) as writer:
            writer.write(frames)
            if with_sound:
                writer.write_audio(0.8 * wave)
        return tmp_path / "video.mp4", curve

    return make


@pytest.mark.parametrize("num_frames", [1, 2, 14, 64, 65, 200])
def test_summary_measures_every_frame_in_order(make_video: MakeVideo, num_frames: int) -> None:
    video, curve = make_video(num_frames)
    summary = summarise_video(video, brightness)
    assert summary.mouth_opening is not None
    np.testing.assert_allclose(summary.mouth_opening, curve, atol=0.03)
    assert len(summary.frames) == len(summary.frame_numbers) == min(15, num_frames)
    assert summary.frame_numbers[0] == 0 and summary.frame_numbers[-1] == num_frames - 1
    np.testing.assert_allclose(brightness(summary.frames), curve[summary.frame_numbers], atol=0.03)


def test_envelope_follows_the_sound(make_video: MakeVideo) -> None:
    video, curve = make_video(100)
    envelope = sound_envelope(video, 100)
    assert envelope.shape == (100,) and np.corrcoef(envelope, curve)[0, 1] > 0.99
    video, _ = make_video(10, with_sound=False)
    assert not sound_envelope(video, 10).any()


@pytest.mark.parametrize(
    ("num_frames", "kind"), [(1, "function"), (30, "none"), (30, "curve"), (100, "function")]
)
def test_sheet_is_drawn(tmp_path: Path, make_video: MakeVideo, num_frames: int, kind: str) -> None:
    video, curve = make_video(num_frames, with_sound=num_frames > 1)
    reference = np.full((64, 64, 3), (200, 30, 30), np.uint8)
    opening = {"function": brightness, "curve": curve, "none": None}[kind]
    draw_contact_sheet(
        tmp_path / "a.png", video, reference, opening, figures={"frames": str(num_frames)}
    )
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    assert pixels.shape[1] == 1600
    assert (np.abs(pixels - (200, 30, 30)).max(-1) < 5).sum() > 20_000, "the reference is shown"
    if num_frames > 1:
        num_red = (np.abs(pixels[-220:] - (194, 65, 45)).max(-1) < 20).sum()
        assert (num_red > 200) == (kind != "none"), "the mouth opening is a line"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "video.mp4"]


def test_errors_leave_no_file(tmp_path: Path, make_video: MakeVideo) -> None:
    video, curve = make_video(10)
    with pytest.raises(UserError, match=r"mouth opening per frame \(10,\), got \(9,\)"):
        draw_contact_sheet(tmp_path / "a.png", video, None, curve[:9])
    with pytest.raises(UserError, match=r"create|choose a folder"):
        draw_contact_sheet(tmp_path / "missing" / "a.png", video)
    assert [path.name for path in tmp_path.iterdir()] == ["video.mp4"]
