from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rest_lightning.data import layout
from rest_lightning.data.layout import ManifestRow, Sidecar
from rest_lightning.errors import UserError
from rest_lightning.media.files import sha256_of


def sidecar(**changes: Any) -> Sidecar:
    values: dict[str, Any] = {
        "clip_id": "a-1",
        "identity": "anna",
        "source": "renderer 0",
        "num_frames": 3,
        "size_px": 64,
        "split": "train",
        "crop_box": [1, 2, 30, 30],
        "quality": {"sharpness": 0.5},
        "mouth_opening": [0.0, 0.5, 1.0],
        "landmarks": {name: [[0.1, 0.2]] * 3 for name in layout.LANDMARKS},
        "speech": {"text": "Grüße", "language": "de"},
    }
    return Sidecar(**(values | changes))


def row(clip_id: str = "a-1", identity: str = "anna", split: str = "train") -> ManifestRow:
    return ManifestRow(clip_id, identity, split, 3, 64, "00")


def test_sidecar_round_trip(tmp_path: Path) -> None:
    for one in (sidecar(), sidecar(mouth_opening=None, landmarks=None, speech=None, crop_box=None)):
        layout.write_sidecar(tmp_path, one)
        assert layout.read_sidecar(tmp_path, "a-1") == one
    assert [p.name for p in (tmp_path / "clips").iterdir()] == ["a-1.json"]


def test_arrays_are_rounded_to_four_decimals() -> None:
    opening = np.array([0.123456, 1 / 3, np.nan], np.float32)
    text = sidecar(mouth_opening=opening, quality={"snr": np.float32(1 / 3)}).to_json()
    content = json.loads(text)
    assert content["mouth_opening"] == [0.1235, 0.3333, None]
    assert content["quality"] == {"snr": 0.3333}


def test_sidecar_errors() -> None:
    with pytest.raises(UserError, match=r"expected mouth_opening of 3 values.*got 2"):
        sidecar(mouth_opening=[0, 1])
    with pytest.raises(
        UserError, match=("expected landmarks mouth, left_eye, right_eye of 3 points")
    ):
        sidecar(landmarks={"mouth": [[0, 0]] * 3})
    with pytest.raises(UserError, match="expected split train, val, test, got 'dev'"):
        sidecar(split="dev")
    with pytest.raises(UserError, match=r"expected a clip_id of letters.*got '\.\./x'"):
        sidecar(clip_id="../x")
    content = json.loads(sidecar().to_json())
    del content["identity"], content["crop_box"]
    with pytest.raises(
        UserError,
        match=(
            r"side: expected the keys .* got none for identity, "
            r"crop_box"
        ),
    ):
        Sidecar.from_json(json.dumps(content), "side")
    for text in ("{", "[]"):
        with pytest.raises(UserError, match="side: expected"):
            Sidecar.from_json(text, "side")
    with pytest.raises(UserError, match="expected num_frames as a whole number above 0, got '3'"):
        sidecar(num_frames="3")


def test_dataset_round_trip(dataset_dir: Path) -> None:
    rows = layout.read_manifest(dataset_dir)
    assert [r.clip_id for r in rows] == [f"clip-{i:03d}" for i in range(6)]
    assert all(r.sha256 == sha256_of(layout.clip_path(dataset_dir, r.clip_id)) for r in rows)
    assert [r.clip_id for r in layout.read_manifest(dataset_dir, "val")] == ["clip-004"]
    info = layout.read_dataset_json(dataset_dir)
    assert info["made_by"] == "tests"
    assert info["num_clips_per_split"] == {"train": 4, "val": 1, "test": 1}
    assert layout.complete_clip_ids(dataset_dir) == [r.clip_id for r in rows]


def test_missing_and_unknown(tmp_path: Path) -> None:
    for folder, came in ((tmp_path / "none", "no such folder"), (tmp_path, "a folder without it")):
        with pytest.raises(
            UserError,
            match=(
                f"manifest.jsonl, got {came}: make one with `rest synthesize.*, or "
                "bring clips of your own"
            ),
        ):
            layout.read_manifest(folder)
    layout.write_manifest(tmp_path, [row()])
    with pytest.raises(UserError, match=r"dataset\.json beside the manifest, got none"):
        layout.read_manifest(tmp_path)
    (tmp_path / "dataset.json").write_text('{"layout_version": 99}')
    with pytest.raises(UserError, match="expected layout version 1, got 99: make one with"):
        layout.read_manifest(tmp_path)
    layout.write_dataset_json(tmp_path, {})
    assert layout.read_manifest(tmp_path) == [row()]
    layout.manifest_path(tmp_path).write_text("")
    with pytest.raises(UserError, match="expected at least one clip"):
        layout.read_manifest(tmp_path)
    with pytest.raises(UserError, match=r"expected sidecar .*b\.json, got no such file"):
        layout.read_sidecar(tmp_path, "b")


def test_splits_are_identity_disjoint(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=("expected identity-disjoint splits, got anna in train and val")
    ):
        layout.write_manifest(tmp_path, [row("a"), row("b", split="val")])
    with pytest.raises(UserError, match="got a twice"):
        layout.write_manifest(tmp_path, [row("a"), row("a")])
    assert not layout.manifest_path(tmp_path).exists()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_split_of_identity_is_stable_and_has_its_fractions(seed: int) -> None:
    names = [f"person-{i}" for i in range(4000)]
    splits = [layout.split_of_identity(name, 0.1, 0.2, seed) for name in names]
    assert splits == [layout.split_of_identity(name, 0.1, 0.2, seed) for name in names]
    assert abs(splits.count("val") / 4000 - 0.1) < 0.02
    assert abs(splits.count("test") / 4000 - 0.2) < 0.02
