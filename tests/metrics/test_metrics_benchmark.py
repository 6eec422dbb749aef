"""benchmarks/metrics.py measures what it says, on the project's own classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import metrics as benchmark


@pytest.mark.parametrize("name", ["fid", "sync", "identity"])
def test_a_metric_is_measured(name: str) -> None:
    row = benchmark.measure(name, 2, num_frames=12)
    assert row["num_clips"] == 2 and row["clips_per_s"] > 0 and row["peak_memory_mib"] > 50
    assert set(benchmark.METRICS) >= {name}


def test_whole_clips_and_windows_give_the_same_embeddings() -> None:
    row = benchmark.compare_sync(num_frames=12, width=0.05, repeats=1)
    assert row["largest_difference"] < 1e-4 and row["speed_up"] > 0


def test_fvd_is_compared_without_the_published_file_too() -> None:
    row = benchmark.compare_fvd(None, num_frames=10, repeats=1)
    assert row["network"] == "stand-in" and row["largest_difference"] < 1e-4 and row["speed_up"] > 0


def test_clips_differ() -> None:
    (a, sound_a), (b, sound_b) = benchmark.made_up_clips(2, 3)
    assert not torch.equal(a, b) and not torch.equal(sound_a, sound_b)


def test_bad_input_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "metrics.json"
    assert benchmark.main(["--num-clips", "1", "--out", str(out)]) == 2
    assert "at least 2" in capsys.readouterr().err and not out.exists()
