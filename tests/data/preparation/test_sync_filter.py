"""The filter of offsets gives what the metric gives on the clip that it looks at."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from videos import speech_like, write_video

from rest_lightning.data import layout
from rest_lightning.data.preparation.options import PrepareOptions
from rest_lightning.data.preparation.sync import sync_scores
from rest_lightning.data.preparation.work import prepare_video
from rest_lightning.metrics.extractors import EmbeddedSync, load_extractor
from rest_lightning.metrics.sync import sync_of_clip


def test_offset_and_confidence_are_those_of_the_metric(tmp_path: Path) -> None:
    torch.manual_seed(0)
    EmbeddedSync().save_pretrained(tmp_path / "net" / "sync")
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (30, 4, 4, 3), dtype=np.uint8).repeat(32, 1).repeat(32, 2)
    video = write_video(tmp_path / "a.mp4", frames, [speech_like(1.2)])
    limits = dict.fromkeys(
        ("min_sharpness", "max_text", "max_flow", "min_brightness", "max_offset_frames")
    )
    options = PrepareOptions(
        size_px=128,
        already_cropped=True,
        min_frames=10,
        sync_weights=str(tmp_path / "net"),
        **limits,
    )
    (row,) = prepare_video(video, tmp_path, tmp_path / "out", options)
    assert row.status == "kept" and {"sync", "sync_offset", "sync_confidence"} <= set(row.scores), (
        row.reason
    )
    assert row.scores["sync"] == abs(row.scores["sync_offset"])
    # The same crops by hand: the source is 128x128 already.
    from rest_lightning.data.preparation.frames import FrameStream, probe
    from rest_lightning.data.preparation.sound import decode_sound, read_sound

    header = probe(video)
    crops = np.stack([frame.picture(128, 128) for frame in FrameStream(video, header)])
    assert decode_sound(video, tmp_path / "raw", 30 * 640, [Fraction(0)]) is None
    sync = sync_of_clip(
        crops, read_sound(tmp_path / "raw", 0, 30), load_extractor("sync", tmp_path / "net")
    )
    assert row.scores["sync_offset"] == sync.offset_frames
    assert row.scores["sync_confidence"] == pytest.approx(sync.confidence, abs=1e-4)
    assert (
        layout.read_sidecar(tmp_path / "out", row.clip_id or "").quality["sync"]
        == row.scores["sync"]
    )
    short = sync_scores(list(crops[:3]), None, np.zeros(3 * 640, np.float32), str(tmp_path / "net"))
    assert short == {}
    strict = PrepareOptions(**{**vars(options), "min_sync_confidence": sync.confidence + 1})
    (row,) = prepare_video(video, tmp_path, tmp_path / "out", strict)
    assert (row.status, row.filter) == ("dropped", "sync") and not list(
        (tmp_path / "out" / "clips").iterdir()
    )
