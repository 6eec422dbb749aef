"""benchmarks/streaming: rehearsed at tiny size; its ratios compare what they say, and targets tell
the truth.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def streaming() -> Iterator[ModuleType]:
    """benchmarks/streaming.py, which is not part of the package."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(ROOT))
    yield importlib.import_module("benchmarks.streaming")
    patch.undo()


def test_tiny_rehearsal(
    streaming: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results" / "a.json"
    names = [
        "first_frame",
        "cache",
        "diffusers",
        "decode",
        "batch",
        "halo",
        "backbone",
        "graphs",
        "device_memory",
        "long_stream",
    ]
    words = [
        "--size",
        "tiny",
        "--minutes",
        "0.2",
        "--out",
        str(out),
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    assert streaming.main([*words, "--only", *names]) == 0
    result = json.loads(out.read_text())
    assert (
        list(result["scenarios"]) == names
        and not result["failures"]
        and result["weights"] == "random"
    )
    rows = result["scenarios"]
    assert rows["diffusers"]["difference"] < 1e-4  # the same function was timed
    assert rows["long_stream"]["num_frames"] == 288 and rows["long_stream"]["chunk_ms"]["num"] == 12
    assert rows["first_frame"]["first_frame_ms"]["min"] > 0
    short = rows["first_frame"]["short"]
    assert short["first_chunk_length"] == 1 and short["first_frame_ms"]["min"] > 0
    assert rows["graphs"] == {"not_measured": "no CUDA device"}
    for name, first, second, times in (
        ("cache", "cached", "recomputed", "chunk_ms"),
        ("diffusers", "ours", "diffusers", "forward_ms"),
        ("decode", "streamed", "whole", "clip_ms"),
        ("batch", "batch", "one_after_another", "chunk_ms"),
    ):
        taken = rows[name][times]
        assert rows[name]["ratio"] == pytest.approx(
            taken[first]["p50"] / taken[second]["p50"], rel=1e-3
        )
    for decoder in {row["decoder"] for row in rows["halo"]["rows"]}:
        errors = [row["mean_error"] for row in rows["halo"]["rows"] if row["decoder"] == decoder]
        assert len(errors) == 4 and errors[0] > errors[1] > errors[3] > 0
    met = {row["what"]: row["met"] for row in result["targets"]}
    assert met["backbone for 121 frames, s"] == met["peak device memory, GB"] == "not measured"
    assert met["captured graph / eager"] == "not measured"
    # too short a stream
    assert met["time per chunk, last minute / second minute"] == "not measured"
    assert met["cached chunk / recomputing without a cache"] == "no target here"
    assert Image.open(tmp_path / "results" / "a.png").width == 1000
    assert "4 rows as a batch" in capsys.readouterr().out


def test_long_streams_are_summed_up_by_minute(streaming: ModuleType) -> None:
    scenarios = importlib.import_module("benchmarks._scenarios")
    models = importlib.import_module("benchmarks._models")
    import torch

    head, _ = models.load_head("tiny", "cpu", torch.float32)
    row = scenarios.LongStream(minutes=3).run(scenarios.Bench(head, "tiny", "cpu"))
    assert row["num_frames"] == 3 * 60 * 25 - 12  # the last half chunk waits for more
    assert [entry["minute"] for entry in row["by_minute"]] == [1, 2, 3]
    assert row["last_over_second_minute"] == pytest.approx(
        row["by_minute"][2]["chunk_ms_p50"] / row["by_minute"][1]["chunk_ms_p50"], rel=1e-3
    )
    turns = row["against_young"]
    assert all(spread["num"] in (62, 63) for spread in turns["chunk_ms"].values())  # 60 s of 0.96
    old, young = (turns["chunk_ms"][name]["p50"] for name in ("old", "young"))
    assert turns["ratio"] == pytest.approx(old / young, rel=1e-3)
    grown = row["by_minute"][2]["resident_mb"] - row["by_minute"][1]["resident_mb"]
    assert row["resident_growth_mb"] == pytest.approx(grown, abs=0.01) and grown < 5


def test_targets_are_met_only_where_they_count(streaming: ModuleType) -> None:
    def met(size: str, device: str, **scenarios: dict[str, float]) -> dict[str, bool | str]:
        result = {"size": size, "device": device, "scenarios": scenarios}
        return {row["what"]: row["met"] for row in streaming.targets(result)}

    fast = {"cache": {"ratio": 0.5}, "long_stream": {"frames_per_second": 120.0}}
    slow = {"cache": {"ratio": 0.6}, "long_stream": {"frames_per_second": 60.0}}
    cached, fps = "cached chunk / recomputing without a cache", "frames per second, end to end"
    assert (met("people", "cpu", **fast)[cached], met("people", "cpu", **fast)[fps]) == (
        True,
        True,
    )
    assert (met("people", "cpu", **slow)[cached], met("people", "cpu", **slow)[fps]) == (
        False,
        False,
    )
    on_gpu = met("paper", "cuda", **slow)
    assert on_gpu["frames per second with VAE and copies"] is False and fps not in on_gpu
    assert on_gpu["captured graph / eager"] == "not measured"
    assert set(met("people", "cpu").values()) == {"not measured"}


def test_speech_repeats_without_gaps(streaming: ModuleType) -> None:
    scenarios = importlib.import_module("benchmarks._scenarios")
    from rest_lightning.media.audio import open_speech

    recording = open_speech(scenarios.SPEECH).read_all()
    joined = np.concatenate(list(scenarios.speech(45.3)))
    assert len(joined) == round(45.3 * 16_000) > 2 * len(recording)
    assert np.array_equal(joined, np.resize(recording, len(joined)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "toaster"], "expected device auto, cpu or an available cuda, got toaster"),
        (["--minutes", "0"], "expected --minutes above 0, got 0.0"),
        (["--only", "speed"], "expected scenarios of first_frame, cache, "),
        (["--plot", "a.jpg"], "ends in .png"),
    ],
)
def test_bad_input(
    streaming: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    assert streaming.main(["--size", "tiny", "--out", str(tmp_path / "a.json"), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not list(tmp_path.iterdir())
