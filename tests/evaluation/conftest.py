"""Tiny embedded extractors with random weights, a protocol file that names them, true clips,
rows.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def extractors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the training command of the embedded networks writes it."""
    import torch

    from rest_lightning.metrics.extractors import EmbeddedImage, EmbeddedSync, EmbeddedVideo

    folder = tmp_path_factory.mktemp("extractors")
    torch.manual_seed(0)
    nets = {
        "image": EmbeddedImage((4, 4, 6, 6, 8), 4),
        "video": EmbeddedVideo((4, 4, 6, 6, 8, 8)),
        "sync": EmbeddedSync((4, 4, 6, 6, 8), 8),
    }
    for name, net in nets.items():
        with torch.no_grad():  # so large that features of different clips differ visibly
            for parameter in net.parameters():
                if parameter.ndim > 1:
                    torch.nn.init.kaiming_normal_(parameter).mul_(1.8)
        net.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def protocol_file(
    extractors: Path, repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The protocol `synthetic` for three clips of 48 frames of 64x64, seen by the tiny
    extractors.
    """
    import yaml

    protocol = yaml.safe_load((repository / "configs/protocol/synthetic.yaml").read_text())
    protocol |= {
        "name": "tiny",
        "num_clips": 3,
        "num_frames": 48,
        "size_px": 64,
        "extractors": str(extractors),
    }
    path = tmp_path_factory.mktemp("protocol") / "tiny.yaml"
    path.write_text(yaml.safe_dump(protocol))
    return path


@pytest.fixture(scope="session")
def truth(talkers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three synthetic talkers with their sidecars, as a plain folder of videos. Read only."""
    folder = tmp_path_factory.mktemp("truth")
    for path in sorted((talkers / "clips").glob("*.mp4"))[:3]:
        shutil.copy(path, folder)
        shutil.copy(path.with_suffix(".json"), folder)
    return folder


@pytest.fixture
def make_row() -> Callable[..., dict[str, Any]]:
    """A measured row as parsed JSON; keyword arguments replace its keys."""
    extractors = {"fid": {"name": "embedded-image", "sha256": "a" * 64}}

    def make(method: str = "ours", fid: float = 5.0, **changes: Any) -> dict[str, Any]:
        row: dict[str, Any] = {
            "protocol": "synthetic",
            "protocol_version": 1,
            "method": method,
            "measured": True,
            "metrics": {"fid": fid, "sync_c": 4.0, "background_drift_by_second": [0.5, 0.75, 1.0]},
            "ground_truth": {
                "fid": 0.0,
                "sync_c": 5.0,
                "background_drift_by_second": [0.25, 0.25, 0.25],
            },
            "num_clips": 8,
            "num_frames": 96,
            "failures": [],
            "extractors": extractors,
            "sampler": {"num_steps": 8, "seed": 0},
            "speed": {"frames_per_second": 100.0},
            "hardware": {"processor": "some"},
            "commit": "0123abc",
            "config": {"size_px": 128, "fps": 25, "notes": []},
            "date": "2026-01-01T00:00:00+00:00",
        }
        return json.loads(json.dumps(row | changes))

    return make
