from __future__ import annotations

import json
from pathlib import Path

import pytest

from rest_lightning import TalkingHead
from rest_lightning.cli import main
from rest_lightning.commands import bench


def test_quick_bench(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "row.json"
    words = ["bench", "--quick", "--model", str(tiny_model), "--out", str(out)]
    assert main([*words, "--dtype", "float32"]) == 0
    table = capsys.readouterr().out
    assert "streams at once" in table and "x real time" in table
    row = json.loads(out.read_text())
    assert row["dtype"] == "float32" and row["size_px"] == 64 and row["num_steps"] == 1
    assert row["model"] == tiny_model.name and str(tiny_model) not in out.read_text()
    stages = row["chunk_stage_ms"]
    assert set(stages) == {"speech", "dit", "vae"}
    assert sum(each["mean"] for each in stages.values()) == pytest.approx(
        row["chunk_ms"]["mean"], rel=0.01
    )
    assert row["frames_per_second"] > 0 and row["first_frame_ms"]["p50"] > 0
    # How many it finds depends on the machine; where the search goes is tested below.
    trials = row["streams"]["trials"]
    kept_up = [each["num_streams"] for each in trials if each["max"] <= 960]
    assert trials[0]["num_streams"] == 1
    assert row["streams"]["at_once"] == max(kept_up, default=0)
    assert main(words) == 2  # the file is there
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("limit", "most"), [(0, 64), (1, 64), (2, 64), (5, 64), (22, 64), (64, 64)]
)
def test_search_finds_the_number(
    limit: int, most: int, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine that keeps up with ``limit`` streams."""

    def step(head: object, number: int, num_steps: int, chunk_s: float) -> list[float]:
        return [1.0, 1000 * chunk_s * (1.0 if number <= limit else 1.01)]

    monkeypatch.setattr(bench, "_step_together", step)
    head = TalkingHead.from_pretrained(tiny_model)
    found = bench.streams_at_once(head, bench.Budget(streams_s=1e9, most_streams=most))
    assert found["at_once"] == limit and found["is_limit"] is (limit < most)
    assert len(found["trials"]) < 14


def test_search_ends_with_its_time(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_step_together", lambda head, number, *more: [400.0 * number])
    head = TalkingHead.from_pretrained(tiny_model)
    found = bench.streams_at_once(head, bench.Budget(streams_s=10.0, num_steps=8))
    # A trial of 2 streams takes 10 chunks of 0.8 s, one of 4 streams twice as long.
    assert found["at_once"] == 2 and found["is_limit"] is False
