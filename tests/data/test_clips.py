from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rest_lightning.constants import SAMPLES_PER_FRAME
from rest_lightning.data.augment import SpeechAugmentation
from rest_lightning.data.clips import ClipError, cut_audio
from rest_lightning.data.dataset import PreparedClips, WindowKey
from rest_lightning.data.layout import clip_path, read_sidecar, sidecar_path
from rest_lightning.errors import UserError
from rest_lightning.media.video import read_clip_audio, read_frames


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value.nan_to_num(-1), other[name].nan_to_num(-1)), name
        else:
            assert value == other[name], name


@pytest.mark.parametrize("num_frames", [1, 9, 33, 41])
@pytest.mark.parametrize(("left", "right"), [(0, 0), (8, 4), (50, 50)])
def test_window_is_exact(dataset_dir: Path, num_frames: int, left: int, right: int) -> None:
    clips = PreparedClips(
        dataset_dir,
        "train",
        num_frames,
        random_window=True,
        audio_left_frames=left,
        audio_right_frames=right,
    )
    for draw in range(4):
        sample = clips[WindowKey(2, draw)]
        path, start = clip_path(dataset_dir, "clip-002"), sample["start"]
        assert sample["clip_id"] == "clip-002"
        assert 0 <= start <= 41 - num_frames
        np.testing.assert_array_equal(
            sample["frames"].numpy(), read_frames(path, start, num_frames)
        )
        np.testing.assert_array_equal(sample["reference"], sample["frames"][0])
        zeros = np.zeros(60 * SAMPLES_PER_FRAME, np.float32)
        padded = np.concatenate([zeros, read_clip_audio(path, 41), zeros])
        begin = (60 + start - left) * SAMPLES_PER_FRAME
        assert sample["audio"].shape == ((left + num_frames + right) * SAMPLES_PER_FRAME,)
        np.testing.assert_array_equal(sample["audio"], padded[begin : begin + len(sample["audio"])])
        expected = np.arange(start, start + num_frames) / 1000
        np.testing.assert_allclose(sample["mouth_opening"], expected + 0.2, atol=1e-4)
        np.testing.assert_allclose(sample["landmarks"][:, 0, 0], expected, atol=1e-4)
        np.testing.assert_allclose(sample["landmarks"][:, 2, 1], expected + 0.5, atol=1e-4)


def test_unknown_values_are_nan(dataset_dir: Path) -> None:
    sample = PreparedClips(dataset_dir, "train", 9)[1]
    assert sample["mouth_opening"].isnan().all()
    assert sample["landmarks"].isnan().all()


@pytest.mark.parametrize("num_frames", [9, 33])
def test_fixed_windows_are_in_the_middle(dataset_dir: Path, num_frames: int) -> None:
    clips = PreparedClips(dataset_dir, "train", num_frames)
    assert [clips[i]["start"] for i in range(len(clips))] == [(41 - num_frames) // 2] * 4


def test_a_key_decides_the_sample(dataset_dir: Path) -> None:
    def samples(seed: int) -> list[int]:
        clips = PreparedClips(dataset_dir, "train", 9, random_window=True, seed=seed)
        return [clips[WindowKey(0, draw)]["start"] for draw in range(40)]

    assert samples(0) == samples(0)
    assert samples(0) != samples(1)
    assert len(set(samples(0))) > 15


def test_random_reference_is_a_frame_of_the_clip(dataset_dir: Path) -> None:
    clips = PreparedClips(dataset_dir, "train", 9, random_window=True, reference="random_frame")
    whole = read_frames(clip_path(dataset_dir, "clip-000"))
    found = set()
    for draw in range(12):
        sample = clips[WindowKey(0, draw)]
        matches = [i for i in range(41) if np.array_equal(whole[i], sample["reference"])]
        assert len(matches) == 1
        found.add(matches[0] - sample["start"])
        np.testing.assert_array_equal(
            sample["frames"], whole[sample["start"] : sample["start"] + 9]
        )
    assert len(found) > 6
    assert min(found) < 0 or max(found) > 8  # also frames outside the window


@pytest.mark.parametrize("reference", ["first_frame", "random_frame"])
@pytest.mark.parametrize("augmentation", [None, SpeechAugmentation(noise_probability=1.0)])
def test_memory_gives_the_same_samples(
    dataset_dir: Path, reference: Any, augmentation: Any
) -> None:
    online, cached = (
        PreparedClips(
            dataset_dir,
            "train",
            17,
            random_window=True,
            reference=reference,
            augmentation=augmentation,
        )
        for _ in range(2)
    )
    cached.load_into_memory(num_threads=2, progress=False)
    for draw in range(12):
        assert_same(online[WindowKey(draw % 4, draw)], cached[WindowKey(draw % 4, draw)])


def test_augmentation_changes_the_sound_alone(dataset_dir: Path) -> None:
    plain, loud = (
        PreparedClips(dataset_dir, "train", 17, random_window=True, augmentation=augmentation)[
            WindowKey(0, 5)
        ]
        for augmentation in (None, SpeechAugmentation(clean_probability=0))
    )
    assert not torch.equal(plain.pop("audio"), loud.pop("audio"))
    assert_same(plain, loud)


def test_without_frames(dataset_dir: Path) -> None:
    clips = PreparedClips(dataset_dir, "train", 17, with_frames=False)
    clips.load_into_memory(progress=False)
    assert clips[0].keys() == {"audio", "mouth_opening", "landmarks", "clip_id", "start"}


def test_cut_audio_is_a_copy() -> None:
    audio = np.arange(3 * SAMPLES_PER_FRAME, dtype=np.float32)
    cut = cut_audio(audio, 1, 1, 0, 0)
    np.testing.assert_array_equal(cut, audio[SAMPLES_PER_FRAME : 2 * SAMPLES_PER_FRAME])
    cut[:] = 0
    assert audio[SAMPLES_PER_FRAME] != 0
    assert not cut_audio(audio, 10, 1, 2, 2).any()


def test_splits_share_no_identity(dataset_dir: Path) -> None:
    names = [
        {row.identity for row in PreparedClips(dataset_dir, split, 9).rows}
        for split in ("train", "val", "test")
    ]
    assert sum(map(len, names)) == len(set.union(*names)) == 6


def test_short_clips_are_counted(make: Any, tmp_path: Path) -> None:
    root = make.dataset(tmp_path, num_frames=(41, 20, 9), splits=("train",) * 3)
    clips = PreparedClips(root, "train", 33)
    assert len(clips) == 1
    assert clips.skipped == {"shorter than 33 frames": 2}
    with pytest.raises(
        UserError,
        match=(
            r"expected train clips of 97 frames or more, got 3 shorter than 97 "
            r"frames: add"
        ),
    ):
        PreparedClips(root, "train", 97)
    with pytest.raises(UserError, match="expected val clips of 33 frames or more, got none"):
        PreparedClips(root, "val", 33)


@pytest.mark.parametrize("num_frames", [0, 2, 96, 98])
def test_window_length_is_8n_plus_1(dataset_dir: Path, num_frames: int) -> None:
    with pytest.raises(
        UserError, match=(f"num_frames: expected a clip of 8n\\+1 frames, got {num_frames}: use")
    ):
        PreparedClips(dataset_dir, "train", num_frames)


def damage(root: Path) -> None:
    """clip-000: cut in half; clip-001: bytes changed, which a decoder conceals; clip-002: no
    sidecar.
    """
    cut, changed = clip_path(root, "clip-000"), clip_path(root, "clip-001")
    cut.write_bytes(cut.read_bytes()[:2000])
    data = bytearray(changed.read_bytes())
    data[len(data) // 2] ^= 0xFF
    changed.write_bytes(data)
    sidecar_path(root, "clip-002").unlink()


@pytest.mark.parametrize("cached", [False, True])
def test_corrupt_clips_are_reported_and_replaced(make: Any, tmp_path: Path, cached: bool) -> None:
    root = make.dataset(tmp_path / "talkers")
    damage(root)
    report = tmp_path / "run" / "corrupt_clips.jsonl"
    clips = PreparedClips(root, "train", 9, max_corrupt=3, report_path=report)
    if cached:
        clips.load_into_memory(progress=False)
    assert [clips[i]["clip_id"] for i in range(4)] == ["clip-003"] * 4
    assert clips.corrupt_clip_ids == ["clip-000", "clip-001", "clip-002"]
    rows = [json.loads(line) for line in report.read_text().splitlines()]
    assert [row["clip_id"] for row in rows] == clips.corrupt_clip_ids
    for row, reason in zip(
        rows,
        (("checksum of the manifest"), "checksum of the manifest", "no such file"),
        strict=True,
    ):
        assert reason in row["reason"]


@pytest.mark.parametrize(("max_corrupt", "limit"), [(0, 0), (2, 2), (0.3, 1)])
def test_too_many_corrupt_clips(make: Any, tmp_path: Path, max_corrupt: float, limit: int) -> None:
    root = make.dataset(tmp_path)
    damage(root)
    clips = PreparedClips(root, "train", 9, max_corrupt=max_corrupt)
    message = (
        rf"expected at most {limit} unreadable train clips, got {limit + 1} of 4 "
        r"\(clip-000.*remake them or raise"
    )
    with pytest.raises(UserError, match=message):
        clips[0]


def test_wrong_rate_and_size_are_named(make: Any, tmp_path: Path) -> None:
    slow = make.dataset(tmp_path / "slow", fps=30)
    with pytest.raises(
        ClipError,
        match=(
            r"clip-000\.mp4: expected 25 frames per second, got 30: "
            r"encode"
        ),
    ):
        PreparedClips(slow, "train", 9, max_corrupt=4)[0]
    good = make.dataset(tmp_path / "good")
    with pytest.raises(UserError, match="clip clip-000: expected 64x64 pixels, got 32x32"):
        PreparedClips(good, "train", 9, size_px=64)
    make.mp4(clip_path(good, "clip-000"), make.frames(41, 64), make.speech(41 * SAMPLES_PER_FRAME))
    clips = PreparedClips(good, "train", 9)
    clips._verified.add(0)  # the checksum would speak first
    with pytest.raises(ClipError, match="expected 32x32 pixels as in the manifest, got 64x64"):
        clips[0]
    path = sidecar_path(good, "clip-001")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_rate_hz": 48_000}))
    assert read_sidecar(good, "clip-001").sample_rate_hz == 48_000
    with pytest.raises(
        ClipError,
        match=("clip clip-001: expected 25 frames per second and 16000 Hz, got 25 and 48000"),
    ):
        PreparedClips(good, "train", 9)[1]


def test_memory_that_is_not_there(dataset_dir: Path) -> None:
    clips = PreparedClips(dataset_dir, "train", 9)
    clips.size_px = 2**22
    with pytest.raises(
        UserError,
        match=(
            r"expected the decoded clips to fit into "
            r"memory.*cache_in_memory to false"
        ),
    ):
        clips.load_into_memory(progress=False)
