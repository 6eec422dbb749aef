"""Production of synthetic clips: determinism, resuming, exact sizes, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest

from rest_lightning.data import layout
from rest_lightning.data.synthetic.synthesize import (
    clip_id_of,
    split_of_index,
    synthesize,
    synthesize_clip,
    write_clip,
)
from rest_lightning.errors import UserError
from rest_lightning.media.files import sha256_of

pytest.importorskip("espeakng_loader")

SMALL = {"size_px": 64, "num_frames": 9, "val_fraction": 0.25, "test_fraction": 0.25}


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Frames and samples of an mp4, decoded by PyAV."""
    with av.open(str(path)) as container:
        frames = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    with av.open(str(path)) as container:
        samples = np.concatenate([f.to_ndarray()[0] for f in container.decode(audio=0)])
    return frames, samples


def content(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(tmp_path_factory.mktemp("talkers") / "one", 4, seed=5, num_workers=1, **SMALL)  # type: ignore[arg-type]


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    for name, data in content(dataset).items():
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(data)
    return tmp_path / "set"


def test_layout_is_complete_and_splits_are_disjoint(dataset: Path) -> None:
    rows = layout.read_manifest(dataset)
    assert [row.clip_id for row in rows] == [clip_id_of(i) for i in range(4)]
    assert [row.split for row in rows].count("train") == 2
    assert {row.split for row in rows} == {"train", "val", "test"}
    assert len({row.identity for row in rows}) == 4
    assert all(sha256_of(layout.clip_path(dataset, row.clip_id)) == row.sha256 for row in rows)
    info = layout.read_dataset_json(dataset)
    assert info["arguments"]["seed"] == 5
    assert info["num_clips_per_split"] == {"train": 2, "val": 1, "test": 1}
    assert not list(dataset.rglob("*.part*"))


def test_the_number_of_workers_changes_nothing(dataset: Path, tmp_path: Path) -> None:
    other = synthesize(tmp_path / "other", 4, seed=5, num_workers=3, **SMALL)  # type: ignore[arg-type]
    assert content(other) == content(dataset)


def test_a_clip_is_a_pure_function_of_its_arguments() -> None:
    first = synthesize_clip(3, seed=7, size_px=64, num_frames=25)
    synthesize_clip(4, seed=7, size_px=64, num_frames=9)
    again = synthesize_clip(3, seed=7, size_px=64, num_frames=25)
    np.testing.assert_array_equal(first.audio, again.audio)
    np.testing.assert_array_equal(first.frames, again.frames)
    assert first.sidecar == again.sidecar
    assert not np.array_equal(
        first.audio, synthesize_clip(3, seed=8, size_px=64, num_frames=25).audio
    )
    assert (
        first.sidecar.speech
        != synthesize_clip(3, seed=7, split="val", size_px=64, num_frames=25).sidecar.speech
    )


@pytest.mark.parametrize("num_frames", [1, 9, 33, 201])
def test_sizes_are_exact(tmp_path: Path, num_frames: int) -> None:
    (tmp_path / "clips").mkdir()
    clip = synthesize_clip(1, size_px=64, num_frames=num_frames)
    assert clip.frames.shape == (num_frames, 64, 64, 3)
    assert clip.frames.dtype == np.uint8
    assert clip.audio.shape == (640 * num_frames,)
    assert clip.audio.dtype == np.float32
    write_clip(tmp_path, clip)
    frames, samples = read(layout.clip_path(tmp_path, clip.sidecar.clip_id))
    assert frames.shape == clip.frames.shape
    assert len(samples) >= 640 * num_frames
    if num_frames > 1:
        assert np.abs(frames.astype(float) - clip.frames).mean() < 6.0
        length = 640 * num_frames
        similar = [
            np.corrcoef(samples[k : k + length], clip.audio)[0, 1]
            for k in (0, 1024)
            if k + length <= len(samples)
        ]
        assert max(similar) > 0.9
    sidecar = layout.read_sidecar(tmp_path, clip.sidecar.clip_id)
    assert sidecar.num_frames == len(sidecar.mouth_opening or ()) == num_frames
    np.testing.assert_allclose(sidecar.mouth_opening, clip.track.mouth_opening, atol=1e-4)  # type: ignore[arg-type]


def test_the_true_opening_is_seen_in_the_frames() -> None:
    clip = synthesize_clip(5, size_px=128, num_frames=113)
    assert clip.track.mouth_opening.max() > 0.6
    mouth = np.array(clip.sidecar.landmarks["mouth"])  # type: ignore[index]
    darkest = []
    for frame, (x, y) in zip(clip.frames, np.round(mouth * 128).astype(int), strict=True):
        darkest.append(
            float(np.sort(frame[y - 8 : y + 12, x - 5 : x + 6].mean(axis=2).ravel())[:30].mean())
        )
    assert np.corrcoef(darkest, clip.track.mouth_opening)[0, 1] < -0.5


def test_resuming_makes_only_what_is_missing_or_broken(dataset: Path, copy: Path) -> None:
    layout.sidecar_path(copy, clip_id_of(0)).unlink()
    layout.clip_path(copy, clip_id_of(1)).write_bytes(
        layout.clip_path(dataset, clip_id_of(1)).read_bytes()[:-700]
    )
    layout.clip_path(copy, clip_id_of(2)).unlink()
    kept = layout.clip_path(copy, clip_id_of(3))
    before = kept.stat().st_mtime_ns
    (copy / "clips" / ".talker_000002.1-2.part.mp4").write_bytes(b"left by a killed run")
    synthesize(copy, 4, seed=5, num_workers=1, **SMALL)  # type: ignore[arg-type]
    assert content(copy) == content(dataset)
    assert kept.stat().st_mtime_ns == before


def test_more_clips_extend_a_dataset_and_other_arguments_are_refused(
    dataset: Path, copy: Path
) -> None:
    synthesize(copy, 5, seed=5, num_workers=1, **SMALL)  # type: ignore[arg-type]
    assert [row.split for row in layout.read_manifest(copy)][:4] == [
        row.split for row in layout.read_manifest(dataset)
    ]
    assert len(layout.read_manifest(copy)) == 5
    with pytest.raises(
        UserError,
        match=(
            r"it has size_px 64 \(now 32\), seed 5 \(now 6\); repeat "
            r"them, choose another"
        ),
    ):
        synthesize(copy, 5, seed=6, num_workers=1, **{**SMALL, "size_px": 32})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"num_clips 5 \(now 3\)"):
        synthesize(copy, 3, seed=5, num_workers=1, **SMALL)  # type: ignore[arg-type]
    synthesize(copy, 1, seed=6, num_workers=1, overwrite=True, **SMALL)  # type: ignore[arg-type]
    assert len(layout.complete_clip_ids(copy)) == 1


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="expected a new or empty folder"):
        synthesize(tmp_path, 1, overwrite=True)
    layout.write_dataset_json(tmp_path, {"kind": "recorded"})
    with pytest.raises(UserError, match="got another dataset"):
        synthesize(tmp_path, 1, overwrite=True)
    with pytest.raises(UserError, match="got the file"):
        synthesize(tmp_path / "letter.txt", 1)
    assert json.loads((tmp_path / "dataset.json").read_text())["kind"] == "recorded"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_clips": 0}, "expected num_clips of at least 1, got 0"),
        ({"num_clips": 1, "size_px": 63}, "expected an even size_px of at least 32, got 63"),
        ({"num_clips": 1, "num_frames": 0}, "expected num_frames of at least 1, got 0"),
        ({"num_clips": 1, "num_workers": 0}, "expected num_workers of at least 1, got 0"),
        ({"num_clips": 1, "val_fraction": 0.7, "test_fraction": 0.7}, "got 0.7 and 0.7"),
    ],
)
def test_bad_arguments_are_told(tmp_path: Path, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        synthesize(tmp_path / "none", **arguments)
    assert not (tmp_path / "none").exists()


def test_bad_split_is_told() -> None:
    with pytest.raises(UserError, match="expected split train, val or test, got 'dev'"):
        synthesize_clip(0, split="dev")


@pytest.mark.parametrize(
    ("val", "test"), [(0.05, 0.05), (0.1, 0.2), (0.0, 0.1), (0.5, 0.5), (0.0, 0.0)]
)
def test_splits_have_their_shares_and_stay_when_clips_are_added(val: float, test: float) -> None:
    splits = [split_of_index(i, val, test) for i in range(1000)]
    assert abs(splits.count("val") - 1000 * val) <= 1
    assert abs(splits.count("test") - 1000 * test) <= 1
