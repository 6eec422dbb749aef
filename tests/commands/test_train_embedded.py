"""`rest train-embedded`: checked before it begins, every stage from shipped files, resumable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rest_lightning.cli import main
from rest_lightning.commands import _runs, train_embedded
from rest_lightning.commands.train_embedded import STAGES, VAE_STAGE, write_stage
from rest_lightning.config import network_of, read_config


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, without a checkout around it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_stage_starts_from_earlier_ones() -> None:
    seen: set[str] = set()
    for stage in STAGES:
        before = {*stage.initial.values(), stage.teacher, stage.source} - {None}
        assert before <= seen, f"{stage.name} starts from a stage that comes later"
        assert not stage.uses_latents or VAE_STAGE in seen
        seen.add(stage.name)
    assert sum(stage.share for stage in STAGES) == pytest.approx(1.0)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_stage_is_the_shipped_file_with_the_folders_of_this_run(
    elsewhere: Path, stage: Any
) -> None:
    own = elsewhere / "own.yaml"
    own.write_text("data: {batch_size: 3}\n")
    path = write_stage(stage, elsewhere / "runs", elsewhere / "data", Path("w"), ["own.yaml"])
    config = read_config(path)
    shipped = read_config(stage.config).content
    assert config.content["model"]["class_path"] == shipped["model"]["class_path"]
    assert config.content["data"]["batch_size"] == 3
    assert config.content["data"]["data_dir"] == str(elsewhere / "data")
    encoder = network_of(config.content, "speech_encoder")
    assert encoder["init_args"]["weights"] == str(elsewhere / "w")
    assert encoder["init_args"]["lookahead_frames"] == 2
    for part, source in (shipped["model"]["init_args"].get("initial") or {}).items():
        assert source.startswith("runs/embedded/")
        given = config.content["model"]["init_args"]["initial"][part]
        assert given == str(elsewhere / "runs" / source.removeprefix("runs/embedded/"))


def test_clips_are_made_of_photographs_and_videos(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[tuple[str, ...]] = []
    monkeypatch.setattr(train_embedded, "rest", lambda *words: said.append(words))
    train_embedded.make_data(
        [Path("a"), Path("b")], Path("videos"), Path("data"), 7, elsewhere / "runs"
    )
    prepare, animate = said
    assert prepare[:4] == ("prepare", "videos", "--out", str(elsewhere / "runs/drivers"))
    assert animate[:5] == ("animate", "--portraits", "a", "--portraits", "b")
    assert animate[animate.index("--drivers") + 1] == str(elsewhere / "runs/drivers")
    assert animate[animate.index("--num-clips") + 1] == "7"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --portraits FOLDER and --drivers FOLDER"),
        (["--portraits", "nowhere", "--drivers", "."], "expected a folder, got nowhere"),
        (["--portraits", ".", "--drivers", "."], "expected Whisper in the folder weights/"),
        (["--portraits", ".", "--drivers", ".", "--whisper", "x"], "in the folder x, got none"),
        (
            ["--portraits", ".", "--drivers", ".", "--config", "model/tyny"],
            "did you mean model/tiny?",
        ),
        (["--portraits", ".", "--drivers", ".", "--export", "."], "holds something else"),
    ],
)
def test_mistakes_are_told_before_the_work(
    elsewhere: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (elsewhere / "a.txt").touch()
    assert main(["train-embedded", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert [path.name for path in elsewhere.iterdir()] == ["a.txt"]


@pytest.mark.slow
def test_the_whole_recipe_at_tiny_size(
    elsewhere: Path, talkers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From clips to an exported model, in any folder; a second call does nothing again."""
    calls: list[str] = []

    def run(command: list[str], environment: dict[str, str]) -> int:
        calls.append(command[3])
        return main(command[3:])

    monkeypatch.setattr(_runs, "run_child", run)
    tiny = [word for name in ("trainer", "model", "data") for word in ("--config", f"{name}/tiny")]
    words = ["train-embedded", "--data", str(talkers), "--budget-min", "10", *tiny]
    assert main(words) == 0
    assert calls.count("fit") == len(STAGES) and calls[-1] == "export"
    model = Path("runs/embedded/model")
    assert (model / "model_index.json").is_file() and (model / "detail").is_dir()
    calls.clear()
    assert main(words) == 0
    assert calls == ["export"]
