"""benchmarks/people: what it measures of lips that are known."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from rest_lightning.constants import SAMPLES_PER_FRAME
from rest_lightning.data.animated.mesh import MeshTracker, mouth_opening

pytest.importorskip("mediapipe", reason="its mesh reads the lips (extra prepare)")
ROOT = Path(__file__).resolve().parent.parent
STILLS = ROOT / "tests" / "media" / "stills"


@pytest.fixture(scope="module")
def people() -> Iterator[ModuleType]:
    """benchmarks/people.py, which is not part of the package."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(ROOT))
    yield importlib.import_module("benchmarks.people")
    patch.undo()


def test_known_lips_are_measured(people: ModuleType) -> None:
    stills = []
    for path in sorted(STILLS.glob("sfhq*.jpg")):
        with Image.open(path) as image:
            stills.append(np.asarray(image.convert("RGB").resize((256, 256))))
    with MeshTracker() as tracker:
        found = [
            float(mouth_opening(points)) for points in tracker.track(stills) if points is not None
        ]
    assert len(found) == len(stills)
    low, high = int(np.argmin(found)), int(np.argmax(found))
    assert found[high] > found[low]
    # Speech, and lips that are open with it, in the frames of the pattern.
    pattern = np.array([0] * 10 + [1] * 5 + [0, 1] * 3)
    frames = np.stack([stills[high if each else low] for each in pattern])
    speech = np.repeat(0.5 * pattern, SAMPLES_PER_FRAME).astype(np.float32)
    score = people.measure(frames, speech, pattern.astype(float), 1.0 - pattern)
    assert score["face_found"] == 1
    # The mesh follows a face from frame to frame, so a jump takes it a moment.
    assert 0.8 < score["lips_correlation"] <= 1
    assert score["lips_correlation_with_another"] == pytest.approx(-score["lips_correlation"])
    assert score["loudness_rank_correlation"] > 0.6
    assert score["opening_in_silence"] < found[low] + 0.3 * (found[high] - found[low])
    assert score["opening_in_speech"] > score["opening_in_silence"]
    assert score["true_opening_sd"] == pytest.approx(pattern.std())


def test_data_without_held_out_clips_are_one_line(
    people: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "manifest.jsonl").write_text("")
    assert people.main(["--data", str(tmp_path)]) == 2
    assert "expected" in capsys.readouterr().err
