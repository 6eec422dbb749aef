"""Two runs never work in one folder: the second one says who holds it, and touches nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from rest_lightning.cli import main
from rest_lightning.processes import LOCK_NAME, owned

COMMANDS = {
    "encode": ["--model", "m", "--data", "d", "--out", "OUT"],
    "synthesize": ["--out", "OUT", "--num-clips", "1"],
    "animate": ["--portraits", "p", "--drivers", "d", "--out", "OUT", "--num-clips", "1"],
    "prepare": ["in", "--out", "OUT", "--already-cropped"],
    "ablate": ["--base", "embedded/asd", "--vae", "v", "--budget-steps", "1", "--out", "OUT"],
    "train-embedded": ["--data", "in", "--whisper", "in", "--out", "OUT", "--export", "new"],
    "fit": [
        *("--config", "embedded/vae", "--config", "trainer/tiny", "--config", "model/tiny"),
        *("--config", "data/tiny", "--data.data_dir", "in"),
        *("--trainer.default_root_dir", "OUT"),
    ],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_second_run_says_who_holds_the_folder(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for name in ("a.mp4", "manifest.jsonl"):
        (tmp_path / "in" / name).touch()
    words = ["out" if word == "OUT" else word for word in COMMANDS[command]]
    with owned("out", "rest predict"):
        assert main([command, *words]) == 2
        assert [path.name for path in Path("out").iterdir()] == [LOCK_NAME]
    told = capsys.readouterr().err.splitlines()
    assert "another one works in it, `rest predict` (process" in told[-1]
    assert len([line for line in told if line.startswith("error")]) == 1
