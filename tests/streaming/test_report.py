from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from rest_lightning.errors import UserError
from rest_lightning.streaming.report import STAGES, Distribution, StreamClock, peak_memory_mb


@pytest.mark.parametrize("count", [1, 2, 99, 10_000])
def test_quantiles_are_exact_for_a_usual_stream(count: int) -> None:
    values = np.random.default_rng(count).gamma(2.0, 30.0, count)
    distribution = Distribution()
    for value in values:
        distribution.add(float(value))
    for q in (0.0, 0.5, 0.95, 0.99, 1.0):
        assert distribution.quantile(q) == pytest.approx(np.quantile(values, q))
    assert distribution.summary()["mean"] == pytest.approx(values.mean(), abs=1e-3)


@pytest.mark.parametrize("scale", [0.01, 30.0, 5000.0])
def test_quantiles_of_a_day_are_close_and_bounded(scale: float) -> None:
    values = np.random.default_rng(0).gamma(2.0, scale, 60_000)
    distribution = Distribution(num_exact=1000)
    for value in values:
        distribution.add(float(value))
    for q in (0.01, 0.5, 0.95, 0.99):
        assert distribution.quantile(q) == pytest.approx(np.quantile(values, q), rel=0.01)
    assert len(distribution._values) == 1000 and len(distribution._bins) < 2000
    assert distribution.maximum == values.max()


def test_empty_and_zero() -> None:
    distribution = Distribution(num_exact=1)
    assert distribution.quantile(0.5) is None and distribution.summary()["count"] == 0
    for _ in range(3):
        distribution.add(0.0)
    assert distribution.quantile(0.5) == pytest.approx(0.0, abs=1e-5)


def test_clock_divides_the_time_among_stages_and_chunks() -> None:
    calls: list[int] = []
    clock = StreamClock(synchronize=lambda: calls.append(1))
    assert clock.time_to_first_frame_ms is None
    with clock.stage("speech"):
        time.sleep(0.01)
    clock.end_chunk(0)  # warming up: no frame yet
    for seconds in (0.02, 0.03):
        with clock.stage("dit"):
            time.sleep(seconds)
        clock.add("vae", 0.5)
        clock.end_chunk(24)
        with clock.stage("writing"):
            time.sleep(0.01)
    clock.stop()
    report = clock.report({"model": "tiny"})
    assert len(calls) == 2 * 5
    assert report.num_frames == 48 and report.video_s == 48 / 25
    assert report.stage_s["vae"] == 1.0 and list(report.stage_s) == list(STAGES)
    assert 0.05 <= report.stage_s["dit"] < 0.5 and 0.02 <= report.stage_s["writing"] < 0.5
    assert report.chunk_ms["count"] == 3 and report.chunk_ms["max"] == pytest.approx(530, abs=200)
    assert report.chunk_stage_ms["vae"]["p50"] == 500.0 and "writing" not in report.chunk_stage_ms
    assert report.time_to_first_frame_ms is not None and 30 <= report.time_to_first_frame_ms < 1000 * report.wall_s
    assert report.frames_per_second == pytest.approx(48 / report.wall_s)
    assert clock.wall_s == clock.wall_s  # stopped


def test_stage_counts_even_when_it_fails() -> None:
    clock = StreamClock()
    with pytest.raises(ZeroDivisionError), clock.stage("dit"):
        raise ZeroDivisionError
    assert clock.stage_s["dit"] > 0


def test_json_and_table_say_the_same(tmp_path: Path) -> None:
    clock = StreamClock()
    clock.add("dit", 0.25)
    clock.end_chunk(24)
    report = clock.report({"steps": 8})
    report.save(tmp_path / "a.json")
    saved = json.loads((tmp_path / "a.json").read_text())
    assert saved == json.loads(json.dumps(report.to_dict()))
    assert saved["chunk_ms"]["p95"] == 250.0 and saved["configuration"] == {"steps": 8}
    assert {"num_cores", "processor"} <= set(saved["hardware"]) and "python" in saved["versions"]
    assert 10 < saved["peak_memory_mb"] <= peak_memory_mb() + 1
    console = Console(record=True, width=100)
    console.print(report.table())
    text = console.export_text()
    for word in (
        "frames",
        "end to end",
        "time to first frame",
        "p50",
        "p95",
        "250.0 ms",
        "DiT",
        "writing",
        "peak memory",
    ):
        assert word in text
    with pytest.raises(UserError, match="choose a folder"):
        report.save(tmp_path / "missing" / "a.json")


def test_report_of_nothing() -> None:
    report = StreamClock().report()
    assert report.to_dict()["time_to_first_frame_ms"] is None
    Console(record=True, width=100).print(report.table())
