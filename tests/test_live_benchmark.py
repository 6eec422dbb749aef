"""benchmarks/live: what it makes of the page's measurements, and targets that tell the truth."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("aiohttp", reason="aiohttp (extra `serve`) serves the page")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def modules() -> Iterator[tuple[ModuleType, ...]]:
    """benchmarks/live.py, its scenarios and the marked model, which are not part of the package."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(ROOT))
    yield tuple(
        map(
            importlib.import_module,
            ("benchmarks.live", "benchmarks._live_scenarios", "benchmarks._marked_model"),
        )
    )
    patch.undo()


def measurements(late_ms: float, latency_s: float, missing: tuple[int, ...] = ()) -> dict[str, Any]:
    """200 frames from 10 s on; a beep every 47 frames, 100 samples inside; the page's clock is 3 s
    behind `time`.
    """
    frames = [
        {
            "index": k,
            "drawn": 1000 * (10 + k / 25) + late_ms,
            "time": 13 + k / 25 + late_ms / 1000,
            "latency": latency_s,
        }
        for k in range(200)
        if k not in missing
    ]
    beeps = range(5, 200, 47)
    return {
        "frames": frames,
        "began": 9_990,
        "ended": 18_000,
        "sent": [{"index": k, "onset": 100} for k in beeps],
        "heard": [{"leaves": 1000 * (10 + k / 25 + 100 / 16_000)} for k in beeps],
        "spoken": [
            {"time": 13 + k / 25 + late_ms / 1000 - latency_s + 100 / 16_000} for k in beeps
        ],
    }


def test_beeps_give_offset_and_latency(modules: tuple[ModuleType, ...]) -> None:
    scenarios = modules[1]
    for late_ms, latency_s in ((12.0, 1.3), (-30.0, 1.9), (80.0, 2.2)):
        found = measurements(late_ms, latency_s)
        pairs = scenarios.heard_and_seen(found)
        assert [pair["offset_ms"] for pair in pairs] == pytest.approx([late_ms] * 5)
        assert [pair["latency_s"] for pair in pairs] == pytest.approx(
            [latency_s - 100 / 16_000] * 5
        )
        assert scenarios.offsets(found)["mean_abs"] == pytest.approx(abs(late_ms))
        assert scenarios.offsets(found)["sd"] == pytest.approx(0, abs=1e-6)


def test_lost_frames_and_gaps(modules: tuple[ModuleType, ...]) -> None:
    found = measurements(0, 1.3, missing=(50, 51, 120))
    assert modules[1].num_lost(found) == 3
    assert max(modules[1].gaps_ms(found)) == pytest.approx(120)
    # it stood still
    assert max(modules[1].gaps_ms(found | {"ended": 18_960})) == pytest.approx(1000)
    assert modules[1].gaps_ms(found | {"frames": []}) == [8010]
    assert len(modules[1].heard_and_seen(measurements(0, 1.3, missing=(5,)))) == 4


def test_targets_tell_what_was_measured(modules: tuple[ModuleType, ...]) -> None:
    live = modules[0]
    result = {
        "model": "embedded",
        "scenarios": {
            "sessions_1": {"latency_p95_ms": 1300.0, "largest_gap_ms": 130.0},
            "sessions_3": {
                "refused": ("this address has 3 of 3 sessions: end one"),
                "num_in_real_time": 2,
            },
            "long": {"minutes": 3.0, "drift_ms": 1.0, "growth_mb": 0.0},
        },
    }
    met = {row["what"]: row["met"] for row in live.targets(result)}
    assert met["microphone to picture, one session, p95, ms"] is True
    assert met["largest gap between frames in 60 s, ms"] is False
    assert met["sessions in real time of three"] is False
    assert met["the fourth session is refused in words"] is True
    assert met["60 minutes: drift of the offset, ms"] == "not measured"  # three minutes are no hour
    assert met["interruption: sound gone, slowest, ms"] == "not measured"
    assert {row["met"] for row in live.targets(result | {"model": "marked"})} <= {
        "rehearsal",
        "not measured",
        True,
    }
    result["scenarios"]["long"]["minutes"] = 60.0
    assert {row["what"]: row["met"] for row in live.targets(result)}[
        ("60 minutes: drift of the offset, ms")
    ] is True


@pytest.mark.parametrize("size_px", [32, 64, 256])
def test_marked_frames_say_where_a_beep_begins(
    modules: tuple[ModuleType, ...], size_px: int
) -> None:
    marked = modules[2]
    batch = marked.MarkedModel(size_px, lookahead_frames=2).open_batch(1)
    batch.start(0, -np.ones((3, 8, 8)))
    speech = np.zeros(48 * 640, np.int16)
    for onset in (3 * 640 + 250, 30 * 640 + 630):
        speech[onset : onset + 900] = 9000
    frames: list[Any] = []
    for start in range(0, len(speech), 700):
        batch.push(0, speech[start : start + 700])
        frames.extend(batch.step().get(0, []))
    assert len(frames) == 24  # the second chunk lacks its lookahead
    batch.push(0, np.zeros(2 * 640, np.int16))
    frames.extend(batch.step()[0])
    said = [marked.read(frame) for frame in frames]
    assert [one["number"] for one in said] == list(range(48))
    assert {one["number"]: one["onset"] for one in said if one["onset"] is not None} == {
        3: 250,
        30: 630,
    }
    assert not any(one["is_bright"] for one in said)
    assert marked.read(np.full((size_px, size_px, 3), 128, np.uint8)) is None
