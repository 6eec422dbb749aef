"""benchmarks/asd.py, reading.py, training_curves.py and training_step.py from end to end at tiny
size.
"""

from __future__ import annotations

import importlib
import itertools
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import av
import numpy as np
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from rest_lightning.cli import main as rest
from rest_lightning.data.dataset import PreparedClips
from rest_lightning.data.window_cache import LatentsCache
from rest_lightning.errors import UserError
from rest_lightning.models.speech import LogMelEncoder
from rest_lightning.parts import build_part, read_part
from rest_lightning.tasks.a2v import Conditions, NoiseSettings
from rest_lightning.tasks.student import ASDSettings, StudentModule


@pytest.fixture(scope="module")
def benchmark(repository: Path) -> Any:
    """Imports a benchmark, which is not part of the package."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(repository))
    yield lambda name: importlib.import_module(f"benchmarks.{name}")
    patch.undo()


@pytest.fixture(scope="module")
def asd_run(
    recipe: Any, benchmark: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ModuleType, Path, list[str]]:
    """The benchmark after two steps with each of two seeds, its folder, and its command line."""
    folder = tmp_path_factory.mktemp("asd")
    vae = str(recipe.final(recipe.vae_stage))
    words = ["encode", "--model", vae, "--data", str(recipe.data), "--out", str(folder / "latents")]
    words += ["--num-frames", "49", "--windows-per-clip", "2", "--references-per-clip", "1"]
    assert rest(words) == 0
    module = benchmark("asd")
    words = [
        "--teacher",
        str(recipe.final("teacher")),
        "--latents",
        str(folder / "latents"),
        "--data",
        str(recipe.data),
    ]
    words += ["--steps", "2", "--seeds", "0", "5", "--draws", "3", "--runs", str(folder / "runs")]
    for file in ("trainer/tiny", "model/tiny", "data/tiny"):
        words += ["--config", str(recipe.configs / f"{file}.yaml")]
    words += ["--out", str(folder / "asd.json")]
    assert module.main(words) == 0
    return module, folder, words


def test_both_arms_differ_in_the_loss_alone(asd_run: Any) -> None:
    _, folder, _ = asd_run
    result = json.loads((folder / "asd.json").read_text())
    assert [(row["arm"], row["seed"]) for row in result["runs"]] == [
        ("asd", 0), ("no_asd", 0), ("asd", 5), ("no_asd", 5),
    ]  # fmt: skip
    runs = {(row["arm"], row["seed"]): row for row in result["runs"]}
    assert all("train/contrastive" in runs["asd", seed]["training"] for seed in (0, 5))
    assert all("train/contrastive" not in runs["no_asd", seed]["training"] for seed in (0, 5))
    assert len({row["teacher_error"] for row in (*runs.values(), result["start"])}) == 5
    for seed in (0, 5):  # the first step: the same weights, clips, noise and levels
        first = [
            runs[arm, seed]["training"][key]["start"]
            for arm, key in (("asd", "train/flow"), ("no_asd", "train/loss"))
        ]
        assert first[0] == pytest.approx(first[1], rel=1e-5)
    teacher = {row["teacher_flow_loss"] for row in (*runs.values(), result["start"])}
    assert len(teacher) == 1, "the teacher, its noise and its conditions are the same for all"
    summary = result["summary"]["teacher_error"]
    gap = runs["asd", 5]["teacher_error"] - runs["no_asd", 5]["teacher_error"]
    assert summary["asd_minus_no_asd"]["per_seed"]["5"] == pytest.approx(gap)
    assert summary["asd"]["mean"] == pytest.approx(
        (runs["asd", 0]["teacher_error"] + runs["asd", 5]["teacher_error"]) / 2
    )


def test_errors_are_those_of_the_definition(asd_run: Any, recipe: Any) -> None:
    """Clip by clip from the checkpoints and the clip's own latents and audio, without the
    benchmark's code.
    """
    _, folder, _ = asd_run
    final = folder / "runs/no_asd-seed5/final.ckpt"

    def load(part: str, source: Path) -> Any:
        description, state = read_part(part, source)
        network = build_part(description)
        network.load_state_dict(state)
        return network.eval()

    student, teacher = load("transformer", final), load("transformer", recipe.final("teacher"))
    latents = LatentsCache(folder / "latents")
    clips = PreparedClips(recipe.data, "test", 49, latents=latents, reference="clip_start")
    errors, flows = [], []
    noise = NoiseSettings(
        chunk_lengths=(1, 2, 3), mean=1.0, std=1.0, identity_dropout=0.0, audio_dropout=0.0
    )
    stage = StudentModule(
        student,
        load("speech_ae", final),
        LogMelEncoder(2),
        noise=noise,
        asd=ASDSettings(str(recipe.final("teacher"))),
    )
    assert len(clips) == 1
    latents, audio = clips[0]["latents"][None], clips[0]["audio"]
    features = LogMelEncoder(2)(audio[None, (8 - 3) * 640 : -(4 - 2) * 640])
    with torch.no_grad():
        for draw in range(3):
            conditions = Conditions(latents, stage.speech_ae.encode(features))
            inputs = stage.draw(conditions, torch.Generator().manual_seed(draw))
            path, chunked = inputs.path, student.with_chunk_length(inputs.chunk_length)
            own = chunked(path.noisy_latents, path.sigma, conditions.speech_latents)[:, :, 1:]
            theirs = teacher(
                path.noisy_latents,
                path.sigma,
                load("speech_ae", recipe.final("teacher")).encode(features),
            )
            errors.append(float((own - theirs[:, :, 1:]).square().mean()))
            flows.append(float((own - path.velocity[:, :, 1:]).square().mean()))
    (row,) = (
        r
        for r in json.loads((folder / "asd.json").read_text())["runs"]
        if (r["arm"], r["seed"]) == ("no_asd", 5)
    )
    assert row["teacher_error"] == pytest.approx(sum(errors) / 3, rel=1e-4)
    assert row["flow_loss"] == pytest.approx(sum(flows) / 3, rel=1e-4)


def test_done_runs_are_kept_and_other_settings_refused(
    asd_run: Any, tmp_path: Path, capsys: Any
) -> None:
    module, folder, words = asd_run
    finals = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*.ckpt")}
    assert module.main([*words, "--out", str(tmp_path / "again.json")]) == 0
    assert finals == {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*.ckpt")}
    first, again = (
        json.loads(path.read_text())["runs"]
        for path in (folder / "asd.json", tmp_path / "again.json")
    )
    assert first == again
    assert module.main([*words, "--steps", "3"]) == 2
    assert (
        "expected a run of the same steps, got another: name a new folder with --runs"
    ) in capsys.readouterr().err
    assert module.main([*words, "--teacher", str(tmp_path / "none.ckpt")]) == 2
    assert "expected a file, got no such one" in capsys.readouterr().err


def test_curves_tell_start_and_end(benchmark: Any, tmp_path: Path, capsys: Any) -> None:
    module = benchmark("training_curves")
    losses = {"falls": [5.0, 4.0, 3.0, 2.0, 1.0, 0.5], "rises": [1.0, 1.0, 2.0, 3.0]}
    for stage, values in losses.items():
        # a resumed run: its file repeats one step
        for first, part in ((0, values[:3]), (2, values[2:])):
            with SummaryWriter(str(tmp_path / stage), filename_suffix=f".{first}") as writer:
                for step, value in enumerate(part, first):
                    writer.add_scalar("train/loss", value, step)
                    writer.add_scalar("lr", 0.1, step)
    words = [str(tmp_path), "--points", "2", "--out", str(tmp_path / "curves.json")]
    assert module.main([*words, "--stages", "falls"]) == 0
    assert module.main([*words, "--stages", "falls", "rises"]) == 1
    stages = json.loads((tmp_path / "curves.json").read_text())["stages"]
    falls = stages["falls"]["curves"]["train/loss"]
    assert (falls["start"], falls["end"], falls["lowest"]) == (4.5, 0.75, 0.5)
    assert (falls["num_values"], falls["first_step"], falls["last_step"]) == (6, 0, 5)
    assert not stages["rises"]["loss_fell"]
    assert "DID NOT FALL" in capsys.readouterr().out
    assert module.main([*words, "--stages", "absent"]) == 2
    assert "expected TensorBoard's event files of a stage" in capsys.readouterr().err


def test_a_training_step_that_fails_keeps_the_rows_before(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = benchmark("training_step")
    out = tmp_path / "step.json"
    measured: list[int] = []

    def measure(student: Any, batch_size: int, *rest: Any) -> dict[str, Any]:
        assert (
            len(json.loads(out.read_text())["rows"]) == len(measured)
            if measured
            else not out.exists()
        )
        if measured:
            raise torch.OutOfMemoryError("CUDA out of memory")
        measured.append(batch_size)
        return {"time_ratio": 0.4, "memory_ratio": 1.0}

    monkeypatch.setattr(module, "measure", measure)
    with pytest.raises(torch.OutOfMemoryError):
        module.run(module.parse(["--batch", "1", "2", "--out", str(out)]))
    result = json.loads(out.read_text())
    assert [row["batch_size"] for row in result["rows"]] == measured == [1]
    assert result["target"]["reached"] == [True]


def test_gradients_of_one_form_alone_are_kept(benchmark: Any) -> None:
    module = benchmark("training_step")
    weights = [torch.nn.Parameter(torch.ones(1000)) for _ in range(2)]

    def step(factor: float) -> None:
        sum(factor * weight.square().sum() for weight in weights).backward()

    with module.LiveBytes([*weights]) as live:
        found = module.gradient_difference(
            weights, [lambda f=f: step(f) for f in (*[1.0] * 6, 1.5, 1.0)]
        )  # type: ignore[misc]
    assert found == pytest.approx(1 / 3)
    assert (
        live.peak < 6 * 4 * 1000 * 2
    )  # the copy, the gradients, and what computes them: not one copy a form


@pytest.mark.slow
def test_training_step_compares_equal_gradients(benchmark: Any, tmp_path: Path) -> None:
    module = benchmark("training_step")
    words = ["--batch", "1", "--num-chunks", "2", "--repeats", "1", "--precision", "float32"]
    words += ["--compile"]
    assert module.main([*words, "--out", str(tmp_path / "step.json")]) == 0
    (row,) = json.loads((tmp_path / "step.json").read_text())["rows"]
    assert 0 < row["gradient_difference"] < 1e-4
    for form in ("parallel", "sequential"):
        # More than the saved input of each layer's feed-forward (4 x 256 wide, 16 tokens, 7
        # frames), of six layers.
        assert row[form]["peak_bytes"] > 6 * 7 * 16 * 1024 * 4
        # timed in other steps, on a shared machine
        assert 0 < row[form]["products_ms"] < 3 * row[form]["step_ms"]
    assert row["time_ratio"] == pytest.approx(
        row["parallel"]["step_ms"] / row["sequential"]["step_ms"], rel=1e-3
    )
    assert "time_ratio_compiled" in row and "compiled" in row
    assert row["time_ratio_floor"] == pytest.approx(
        row["parallel"]["products_ms"] / row["sequential"]["step_ms"], rel=1e-3
    )
    with pytest.raises(UserError, match="expected --batch of at least 1, got 0"):
        module.run(module.parse(["--batch", "0"]))


def test_reading_compares_equal_windows(benchmark: Any, talkers: Path, tmp_path: Path) -> None:
    module = benchmark("reading")
    words = [
        "--data",
        str(talkers),
        "--sizes",
        "64",
        "--key-frames",
        "5",
        "50",
        "--num-clips",
        "2",
        "--workers",
        "0",
        "1",
    ]
    words += [
        "--clip-frames",
        "60",
        "--window",
        "17",
        "--seconds",
        "0.05",
        "--readers",
        "decord",
        "pyav",
        "--stages",
    ]
    assert module.main([*words, "--out", str(tmp_path / "reading.json")]) == 0
    result = json.loads((tmp_path / "reading.json").read_text())
    readers = [name for name in ("decord", "pyav") if result["readers"][name] is True]
    assert len(result["reading"]) == 2 * 2 * len(readers)
    assert all(row["windows_per_s"] > 0 for row in result["reading"])
    near, far = (row["mb_per_minute"] for row in result["clips"])
    assert near > far, "more key frames, larger files"
    assert {row["key_frame_every"] for row in result["fastest"]} == {5, 50}

    (path,) = module.make_clips(tmp_path, module.parse([*words, "--num-clips", "1"]), 64, 5)
    with av.open(str(path)) as container:
        keys = [
            i
            for i, packet in enumerate(container.demux(video=0))
            if packet.size and packet.is_keyframe
        ]
    assert max(b - a for a, b in itertools.pairwise(keys)) <= 5
    windows = [module.read(path, name, 31, 17) for name in readers]
    assert all(np.array_equal(windows[0], other) for other in windows)
    assert windows[0].shape == (17, 64, 64, 3)
    with pytest.raises(UserError, match="expected --clip-frames of at least --window 97, got 60"):
        module.run(module.parse(["--clip-frames", "60"]))


@pytest.mark.slow
def test_reading_times_the_stages_that_train(benchmark: Any, talkers: Path, tmp_path: Path) -> None:
    module = benchmark("reading")
    words = [
        "--data",
        str(talkers),
        "--size",
        "tiny",
        "--steps",
        "3",
        "--stages",
        "vae",
        "teacher",
    ]
    words += [
        "--sizes",
        "64",
        "--key-frames",
        "9",
        "--readers",
        "pyav",
        "--workers",
        "0",
        "--num-clips",
        "1",
    ]
    words += ["--clip-frames", "20", "--window", "9", "--seconds", "0.01"]
    assert module.main([*words, "--out", str(tmp_path / "reading.json")]) == 0
    result = json.loads((tmp_path / "reading.json").read_text())
    assert [row["stage"] for row in result["data_wait"]] == ["vae", "teacher"]
    for row in result["data_wait"]:
        assert 0 < row["wait_ms"] < row["step_ms"]
        assert row["wait_share"] == pytest.approx(row["wait_ms"] / row["step_ms"])
    assert set(result["targets"]["met"]) == {"vae", "teacher"}


@pytest.mark.slow
def test_preparation_measures_files_of_any_length(
    benchmark: Any, tmp_path: Path, capsys: Any
) -> None:
    for package in ("mediapipe", "skia", "espeakng_loader"):
        pytest.importorskip(package)
    module = benchmark("preparation")
    out = tmp_path / "preparation.json"
    words = [
        "--heights",
        "360",
        "--minutes",
        "0.14",
        "0.4",
        "--fps",
        "10",
        "--size-px",
        "128",
        "--out",
        str(out),
    ]
    assert module.main(words) == 0
    short, long = json.loads(out.read_text())["files"]
    # one and three groups of 8 s, at 25 fps
    assert (short["num_frames"], long["num_frames"]) == (200, 600)
    assert short["num_kept"] == long["num_kept"] == 1 and not long["reasons"]
    assert 0 < max(long["memory_mb_over_time"]) <= long["peak_memory_mb"]
    assert "360p" in capsys.readouterr().out
    assert module.main(["--minutes", "0.1"]) == 2
    assert "expected --minutes of at least 0.13" in capsys.readouterr().err
    assert (
        len(module.thinned([float(value) for value in range(999)])) == module.NUM_SAMPLES_OF_MEMORY
    )


def test_a_group_is_repeated_without_a_gap(benchmark: Any, tmp_path: Path) -> None:
    pytest.importorskip("espeakng_loader")
    path = tmp_path / "raw" / "a.mkv"
    benchmark("preparation").make_video(path, 180, 16 / 60, 10)
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        assert [round(frame.time * 10) for frame in frames] == list(range(160))
        pictures = [frame.to_ndarray(format="rgb24") for frame in frames]
    assert all(np.array_equal(pictures[i], pictures[i + 80]) for i in range(80))
    assert not np.array_equal(pictures[0], pictures[40])
    with av.open(str(path)) as container:
        sound = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    assert (
        len(sound) == 256_000 and np.array_equal(sound[:128_000], sound[128_000:]) and sound.any()
    )
