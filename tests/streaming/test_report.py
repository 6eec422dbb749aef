from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from rest_lightning.errors import UserError
from rest_lightning.machine import peak_memory_mb
from rest_lightning.streaming.report import STAGES, Distribution, StreamClock


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
    clock = StreamClock()
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
    assert report.num_frames == 48 and report.video_s == 48 / 25
    assert report.stage_s["vae"] == 1.0 and list(report.stage_s) == list(STAGES)
    assert 0.05 <= report.stage_s["dit"] < 0.5 and 0.02 <= report.stage_s["writing"] < 0.5
    assert report.chunk_ms["count"] == 3 and report.chunk_ms["max"] == pytest.approx(530, abs=200)
    assert report.chunk_stage_ms["vae"]["p50"] == 500.0 and "writing" not in report.chunk_stage_ms
    assert (
        report.time_to_first_frame_ms is not None
        and 30 <= report.time_to_first_frame_ms < 1000 * report.wall_s
    )
    assert report.frames_per_second == pytest.approx(48 / report.wall_s)
    assert clock.wall_s == clock.wall_s  # stopped


class Moment:
    """A moment of a device that is always ``late_s`` behind the host, and that says when somebody
    waits for it.
    """

    late_s = 0.05
    num_waits = 0

    def record(self) -> None:
        self.at_s = time.perf_counter() + self.late_s

    def synchronize(self) -> None:
        if (wait_s := self.at_s - time.perf_counter()) > 0:
            Moment.num_waits += 1
            time.sleep(wait_s)

    def elapsed_time(self, end: Moment) -> float:
        return 1000.0 * (end.at_s - self.at_s)


def test_stages_of_a_device_are_read_when_their_chunk_is_ready() -> None:
    Moment.num_waits = 0
    clock = StreamClock()
    marks = []
    for seconds in (0.01, 0.03):  # two chunks are queued before the first is fetched
        with clock.stage("dit", Moment):
            time.sleep(seconds)
        marks.append(clock.mark())
    time.sleep(0.06)
    clock.end_chunk(24, marks[0])
    assert Moment.num_waits == 0
    assert 10 <= clock.chunk_ms.maximum < 30
    assert clock.end_chunk(24, marks[1]) >= 30
    with clock.paused(), clock.stage("dit", Moment):
        time.sleep(0.05)
    with clock.stage("vae", Moment):
        pass
    assert 0.04 <= clock.report().stage_s["dit"] < 0.08 and Moment.num_waits == 1
    assert len(clock._unread) == 0


def test_first_frame_counts_from_the_last_sample_that_it_needs() -> None:
    clock = StreamClock()
    assert clock.first_frame_compute_ms is None
    time.sleep(0.02)
    clock.input_complete()
    time.sleep(0.01)
    clock.end_chunk(24)
    clock.input_complete()  # of later chunks: nothing
    assert clock.first_frame_compute_ms is not None and clock.time_to_first_frame_ms is not None
    assert 10 <= clock.first_frame_compute_ms <= clock.time_to_first_frame_ms - 20
    assert clock.report().to_dict()["first_frame_compute_ms"] == pytest.approx(
        clock.first_frame_compute_ms, abs=1e-3
    )


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
