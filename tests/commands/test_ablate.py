"""`rest ablate`: the same budget for all, mean and spread in one table, nothing done twice."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from rest_lightning.cli import main
from rest_lightning.commands import _runs
from rest_lightning.errors import UserError
from rest_lightning.evaluation.row import read_rows


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that were run: here in this process, which has torch already."""
    seen: list[list[str]] = []

    def run(command: list[str], environment: dict[str, str]) -> int:
        seen.append(command[3:])
        return main(command[3:])

    monkeypatch.setattr(_runs, "run_child", run)
    return seen


def test_base_and_ablations(
    recipe: Any, tmp_path: Path, calls: list[list[str]], repository: Path
) -> None:
    import yaml

    protocol = yaml.safe_load((repository / "configs/protocol/synthetic.yaml").read_text())
    protocol |= {
        "name": "tiny",
        "num_clips": 1,
        "num_frames": 48,
        "size_px": 64,
        "min_clips": 1,
        "measures": ["talking"],
    }
    (tmp_path / "protocol.yaml").write_text(yaml.safe_dump(protocol))
    evaluation = {"protocol": str(tmp_path / "protocol.yaml")}
    content = {
        "base": "test",
        "data": {"data_dir": str(recipe.data), "num_frames": 57, "progress": False},
        "trainer": {
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "callbacks": [{"class_path": "Evaluation", "init_args": evaluation}],
        },
    }
    protocol_file = tmp_path / "tiny.yaml"
    protocol_file.write_text(yaml.safe_dump(content))
    runs = tmp_path / "runs"
    for stage in ("teacher", "student", recipe.vae_stage):
        (runs / stage).mkdir(parents=True)
        shutil.copy(recipe.final(stage), runs / stage)
    # a rehearsal's sampling
    own = tmp_path / "own.yaml"
    own.write_text(json.dumps({"sampling": {"num_steps": 1, "guidance": 1.0, "shift": 1.0}}))
    sampled = tmp_path / "two_steps.yaml"
    sampled.write_text("# Are two steps better?\nsampling: {num_steps: 2}\n")
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("# What does a mistake do?\nmodel: {init_args: {mouth_weight: -1}}\n")
    configs = ["embedded/student", "trainer/tiny", "model/tiny", "data/tiny"]
    words = [
        "ablate",
        "--base",
        *configs,
        str(own),
        "--runs",
        str(runs),
        "--stage",
        "student",
        "--data",
        str(recipe.data),
    ]
    words += [
        "--protocol",
        str(protocol_file),
        "--budget-steps",
        "1",
        "--out",
        str(tmp_path / "out"),
        "--seeds",
        "2",
    ]
    from rest_lightning.data.window_cache import encode_dataset
    from rest_lightning.parts import fingerprint_of, open_part

    trained_vae: Any = open_part("vae", recipe.final(recipe.vae_stage)).eval().requires_grad_(False)
    encode_dataset(
        trained_vae,
        recipe.data,
        runs / "latents",
        fingerprint=fingerprint_of(trained_vae),
        num_frames=49,
        references_per_clip=1,
        progress=False,
    )
    overlays = [f"{recipe.configs}/ablation/no_context_cache.yaml", str(sampled), str(wrong)]
    assert main([*words, "--overlays", *overlays]) == 1

    out = tmp_path / "out"
    # base, no_context_cache and the wrong one, twice
    assert [words[0] for words in calls].count("fit") == 6
    assert [words[0] for words in calls].count("test") == 6  # base, no_context_cache, two_steps
    table = (out / "ablation.md").read_text()
    rows = {
        name: [read_rows(out / name / f"seed-{i}" / "row.json")[0] for i in (0, 1)]
        for name in ("base", "two_steps")
    }
    assert [row.sampler["num_steps"] for row in rows["base"] + rows["two_steps"]] == [1, 1, 2, 2]
    assert [row.sampler["seed"] for row in rows["base"]] == [0, 1]
    assert "± " in table and "- **two_steps**: Are two steps better?" in table
    assert "- failed run: wrong seed 0 (exit code 2)" in table and "wrong seed 1" in table
    value = fmean(float(str(row.metrics["sharpness"])) for row in rows["base"])
    (line,) = (line for line in table.splitlines() if re.match(r"\| \S+ \| base", line))
    assert f"{value:.3f} ±" in line
    for _ in range(2):  # the second time its own JSON lies among the rows
        assert main(["leaderboard", str(out), "--out", str(out / "board")]) == 0
    board = json.loads((out / "board" / "leaderboard.json").read_text())
    assert "two_steps" in json.dumps(board)

    calls.clear()
    assert main([*words, "--overlays", *overlays[:2]]) == 0
    assert calls == [], "what is done is not done again"
    (out / "base" / "seed-1" / "row.json").unlink()
    assert main([*words, "--overlays", *overlays[:2]]) == 0
    assert [words[0] for words in calls] == ["test"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--base", "nowhere.yaml", "--budget-min", "1"], "nowhere.yaml does not exist"),
        (["--base", "BASE", "--budget-min", "0", "--vae", "x"], "a number of seeds above 0"),
        (
            ["--base", "BASE", "--budget-min", "1", "--seeds", "0", "--vae", "x"],
            ("a number of seeds above 0"),
        ),
        (["--base", "BASE", "--budget-min", "1"], "expected a VAE to score with"),
        (["--base", "BASE", "--budget-min", "1", "--budget-steps", "1"], "not allowed with"),
        (["--base", "BASE", "--budget-min", "1", "--runs", "x", "--stage", "vae"], "got 'vae'"),
        (
            ["--base", "BASE", "--overlays", "BASE", "BASE", "--budget-min", "1", "--vae", "x"],
            "twice",
        ),
    ],
)
def test_mistakes(
    words: list[str], message: str, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(repository / "configs/embedded/asd.yaml")
    assert main(["ablate", *(base if word == "BASE" else word for word in words)]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_another_recipe_under_the_same_folder_is_refused(tmp_path: Path) -> None:
    """What an overlay of another text has trained must not stand under this one's name; a failed
    one may be mended.
    """
    from rest_lightning.commands import ablate

    parser = argparse.ArgumentParser()
    ablate.add_arguments(parser)
    base, first, second = (tmp_path / f"{name}.yaml" for name in ("base", "first", "second"))
    for path in (base, first, second):
        path.write_text("# Why?\nmodel: {}\n")
    words = [
        "--base",
        str(base),
        "--budget-steps",
        "2",
        "--out",
        str(tmp_path / "out"),
        "--overlays",
        str(first),
    ]

    def check(*more: str) -> None:
        ablate._check_recipe(parser.parse_args([*words, *more]))

    check("--vae", "a.ckpt")
    check(str(second), "--vae", "a.ckpt")
    check("--vae", "a.ckpt")  # the overlays may come one by one
    first.write_text("# Why not?\nmodel: {}\n")
    check("--vae", "a.ckpt")
    row = tmp_path / "out" / "second" / "seed-0" / "row.json"
    row.parent.mkdir(parents=True)
    row.write_text("{}")
    second.write_text("# Why not?\nmodel: {}\n")
    for more, message in (
        ((str(second), "--vae", "a.ckpt"), "got another overlay second"),
        (("--vae", "b.ckpt"), "got another vae"),
        (("--vae", "a.ckpt", "--eval-data", "x"), "got another eval_data"),
        (("--vae", "a.ckpt", "--num-clips", "3"), "got another num_clips"),
    ):
        with pytest.raises(UserError, match=f"{message}: repeat it, or choose another --out"):
            check(*more)
