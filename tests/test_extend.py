"""A stranger's package in a folder of its own: everything of docs/extend.md, by class path."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_head import make_head
from torch import nn

from rest_lightning import lightning_cli
from rest_lightning.cli import main
from rest_lightning.commands.score import own_metric
from rest_lightning.config import place_data, read_config
from rest_lightning.errors import UserError
from rest_lightning.evaluation.protocol import Protocol
from rest_lightning.evaluation.scorer import ClipPair, Scorer
from rest_lightning.lightning_cli import data_class_of
from rest_lightning.models import CompactVAE, LogMelEncoder, SpeechAE
from rest_lightning.names import IMPORTED
from rest_lightning.parts import FROZEN_PARTS_KEY, build_part, describe_part, open_speech_encoder
from rest_lightning.tasks import SpeechAEModule

# Networks of the names of ours, and one of no known name.
NETWORKS = """
    import torch
    from rest_lightning import models

    class CompactVAE(models.CompactVAE):
        def decode(self, *args, **kwargs):
            return super().decode(*args, **kwargs).flip(-1)

    class LoudEncoder(models.LogMelEncoder):
        def features(self, audio):
            return super().features(2 * audio)
"""

# A data module that makes up its clips; a metric, a noise schedule, an optimiser, a callback.
TRAINING = """
    import lightning
    import torch
    from torchmetrics import Metric
    from rest_lightning.diffusion.noise import SigmaSchedule

    class Clips(lightning.LightningDataModule):
        def __init__(self, folder: str, num_clips: int = 4, num_frames: int = 49):
            super().__init__()
            self.folder, self.num_clips, self.num_frames = folder, num_clips, num_frames

        def loader(self):
            return make_loader(self.num_clips, self.num_frames)

        def train_dataloader(self):
            return self.loader()

        def val_dataloader(self):
            return self.loader()

    def make_loader(num_clips, num_frames, left=3, right=2):
        generator = torch.Generator().manual_seed(0)
        clips = [
            {
                "frames": torch.rand(3, num_frames, 64, 64, generator=generator) * 2 - 1,
                "audio": torch.randn(640 * (left + num_frames + right), generator=generator) * 0.1,
            }
            for _ in range(num_clips)
        ]
        return torch.utils.data.DataLoader(clips, batch_size=2)

    class OneLevel(SigmaSchedule):
        def __init__(self, place: float = 0.5):
            self.place = place

        def __call__(self, batch, num_chunks, chunk_length, table, motion_dropout, *, generator):
            level = table[int(self.place * (len(table) - 1))]
            sigma = level.expand(batch, 1 + num_chunks * chunk_length).clone()
            sigma[:, 0] = 0.0
            return sigma

    class Sign(torch.optim.Optimizer):
        num_steps = 0

        def __init__(self, params, lr: float = 1.0, scale: float = 1.0):
            super().__init__(params, {"lr": lr, "scale": scale})

        @torch.no_grad()
        def step(self, closure=None):
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            Sign.num_steps += 1
            for group in self.param_groups:
                for each in group["params"]:
                    if each.grad is not None:
                        each -= group["lr"] * group["scale"] * each.grad.sign()
            return loss

    class MeanRed(Metric):
        full_state_update = False

        def __init__(self):
            super().__init__()
            self.add_state("red", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

        def update(self, frames):
            assert frames.dtype == torch.uint8 and frames.shape[-1] == 3
            self.red += frames[..., 0].double().mean()
            self.count += 1

        def compute(self):
            return self.red / self.count

    class Count(lightning.Callback):
        num_batches = 0

        def on_train_batch_end(self, *args, **kwargs):
            Count.num_batches += 1
"""
CONFIG = """
base: [embedded/student, trainer/tiny, model/tiny]
networks:
  speech_encoder: {class_path: my_talker.networks.LoudEncoder, init_args: {lookahead_frames: 2}}
  vae: {class_path: my_talker.networks.CompactVAE}
model:
  init_args:
    initial: null
    noise: {schedule: {class_path: my_talker.training.OneLevel, init_args: {place: 0.25}}}
    optimizer:
      lr: 1.0e-3
      algorithm: {class_path: my_talker.training.Sign, init_args: {scale: 0.5}}
data:
  class_path: my_talker.training.Clips
  init_args: {folder: somewhere}
trainer:
  max_steps: 2
  callbacks+: [{class_path: my_talker.training.Count}]
"""


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the package ``my_talker``, as the current one; nothing of it stays loaded."""
    package = tmp_path / "my_talker"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "networks.py").write_text(textwrap.dedent(NETWORKS))
    (package / "training.py").write_text(textwrap.dedent(TRAINING))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", ".")])
    monkeypatch.delenv(IMPORTED, raising=False)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_talker"]:
        del sys.modules[name]


def networks(folder: Path) -> Any:
    sys.path.append(str(folder))
    return importlib.import_module("my_talker.networks")


def tiny_vae(cls: type[CompactVAE]) -> CompactVAE:
    return cls(4, (8, 16, 16), (1, 1, 1), (1, 1, 1), ((4, 2), (2, 2)), patch_size=8)


def test_a_class_of_ones_own_is_stored_by_its_import_path(elsewhere: Path) -> None:
    mine = networks(elsewhere)
    for part, name in (
        (tiny_vae(mine.CompactVAE), "my_talker.networks.CompactVAE"),
        (mine.LoudEncoder(), "my_talker.networks.LoudEncoder"),
        (tiny_vae(CompactVAE), "CompactVAE"),
        (LogMelEncoder(), "LogMelEncoder"),
    ):
        description = json.loads(json.dumps(describe_part(part)))
        assert description["class"] == name
        assert type(build_part(description)) is type(part)


def test_a_class_that_nobody_could_import_is_refused() -> None:
    class Hidden(CompactVAE):
        pass

    class NoConfig(nn.Module):
        pass

    NoConfig.__qualname__ = "NoConfig"
    module = sys.modules[__name__]
    with pytest.raises(UserError, match=r"can import, got .*Hidden: move it to the top level"):
        describe_part(tiny_vae(Hidden))
    module.NoConfig = NoConfig  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="a property `config` and a class method `from_config`"):
        describe_part(NoConfig())


def test_a_model_folder_makes_nothing_be_imported(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless its package is named; and then another network runs."""
    folder = elsewhere / "model"
    make_head().save_pretrained(folder)
    config = folder / "vae" / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "class": "my_talker.networks.CompactVAE"}))
    words = ["export", str(folder), "--out", "again", "--size-px", "64"]
    (elsewhere / "my_talker" / "__init__.py").write_text("open('was_run', 'w').close()\n")
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "put --import my_talker before the command's name" in line
    assert not Path("was_run").exists() and "my_talker" not in sys.modules
    assert main(["--import", "my_talker", *words]) == 0
    assert os.environ[IMPORTED] == "my_talker"  # for child processes
    assert Path("was_run").exists()
    again = json.loads(Path("again/vae/config.json").read_text())
    assert again["class"] == "my_talker.networks.CompactVAE"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--import"], "expected a package behind --import, got none"),
        (["--import", "--help"], "expected a package behind --import, got none"),
        (["--import", "no_such", "talk"], "got no_such: check the name and the folder"),
        (["--import=broken", "talk"], "got broken, which needs no_such: check"),
    ],
)
def test_packages_that_are_not_there(
    elsewhere: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("broken.py").write_text("import no_such\n")
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_an_encoder_of_a_configuration_is_the_one_that_it_names(elsewhere: Path) -> None:
    mine = "my_talker.networks.LoudEncoder"
    encoder = {"class_path": mine, "init_args": {"lookahead_frames": 1}}
    Path("stage.yaml").write_text(json.dumps({"networks": {"speech_encoder": encoder}}))
    found = open_speech_encoder("stage.yaml")
    assert f"{type(found).__module__}.{type(found).__name__}" == mine


def test_the_current_folder_is_importable_behind_what_is_installed(elsewhere: Path) -> None:
    """From the installed command, whose own folder is another one."""
    Path("json.py").write_text("raise SystemExit('shadowed')\n")
    command = [str(Path(sys.executable).parent / "rest"), "--import", "my_talker", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("rest_lightning "), done.stderr


def test_a_stage_trains_on_parts_data_noise_and_optimiser_of_ones_own(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the checkpoint becomes a model that runs them, in another program."""
    Path("mine.yaml").write_text(CONFIG)
    # Another --config behind it, and arguments of the data module on the command line.
    Path("more.yaml").write_text("data: {init_args: {num_clips: 6}}")
    words = ["--config", "mine.yaml", "--config", "more.yaml", "--data.num_frames", "25"]
    words += ["--trainer.default_root_dir", "run"]
    cli = lightning_cli.run(["fit", *words])
    assert cli.trainer.global_step == 2
    training = sys.modules["my_talker.training"]
    assert type(cli.datamodule) is training.Clips
    assert vars(cli.datamodule)["num_clips"] == 6 and cli.datamodule.num_frames == 25
    assert training.Sign.num_steps == training.Count.num_batches == 2
    assert type(cli.model.optimizers().optimizer) is training.Sign
    assert cli.model.optimizers().param_groups[0]["scale"] == 0.5
    level = cli.model.noise_table[int(0.25 * 999)]
    sigma = cli.model.draw(cli.model.conditions(first_batch(cli))).path.sigma
    assert torch.equal(sigma[:, 1:], level.expand_as(sigma[:, 1:]))

    content = torch.load("run/final.ckpt", weights_only=True)
    assert content[FROZEN_PARTS_KEY]["vae"]["class"] == "my_talker.networks.CompactVAE"
    export = ["export", "run/final.ckpt", "--vae", "vae", "--out", "model", "--size-px", "64"]
    cls = sys.modules["my_talker.networks"].CompactVAE
    head = make_head()
    head.vae = tiny_vae(cls)
    head.save_pretrained("vae")
    for name in [name for name in sys.modules if name.startswith("my_talker")]:
        del sys.modules[name]
    assert main(export) == 2
    assert "put --import my_talker" in capsys.readouterr().err
    assert main(["--import", "my_talker", *export]) == 0
    described = json.loads(Path("model/speech_encoder/config.json").read_text())
    assert described["class"] == "my_talker.networks.LoudEncoder"


def first_batch(cli: Any) -> Any:
    return next(iter(cli.datamodule.train_dataloader()))


def test_a_loader_of_a_script_trains_a_stage(elsewhere: Path) -> None:
    """Lightning's Trainer, plain data loaders, batches of frames and sound alone."""
    import lightning

    networks(elsewhere)
    training = importlib.import_module("my_talker.training")
    loader = training.make_loader(2, 9)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(accelerator="cpu", max_steps=1, **options)
    stage = SpeechAEModule(
        SpeechAE(feature_dim=160, num_tokens=2, latent_dim=8, width=8), LogMelEncoder()
    )
    trainer.fit(stage, loader, loader)
    assert trainer.global_step == 1 and "val/mse" in trainer.callback_metrics


def test_a_metric_of_ones_own_stands_in_the_row(elsewhere: Path) -> None:
    protocol = Protocol("mine", 1, 2, 50, 32, ["talking"], min_clips=1)
    scorer = Scorer(protocol, metrics=[own_metric("my_talker.training.MeanRed")])
    sound = np.zeros(50 * 640, np.float32)
    for made, real in ((10, 20), (30, 40)):
        frames = [np.full((25, 32, 32, 3), value, np.uint8) for value in (made, real)]
        pair = ClipPair(str(made), [tuple(frames)] * 2, sound, sound, frames[1][0])  # type: ignore[list-item]
        assert scorer.add(pair), scorer.failures
    row = scorer.row("method")
    assert (row.metrics["mean_red"], row.ground_truth["mean_red"]) == (20, 30)
    again = Scorer(protocol, metrics=[own_metric("my_talker.training.MeanRed")])
    again.load_state_dict(scorer.state_dict())
    assert again.row("method").metrics == row.metrics


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_talker.training.Clips", "expected a class derived from torchmetrics.Metric"),
        ("my_talker.training.Nothing", "expected a class at --metric, got 'my_talker.training."),
    ],
)
def test_metrics_that_are_none(elsewhere: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        own_metric(name)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            "{class_path: my_talker.training.Clips, init_args: {folder: a, num_clip: 2}}",
            "mine.yaml: expected a known key, got data.init_args.num_clip: did you mean num_clips?",
        ),
        ("{class_path: my_talker.training.Clps}", "expected a class at data.class_path, got"),
        ("{class_path: TalkingHeadDataModul}", "did you mean TalkingHeadDataModule?"),
    ],
)
def test_mistakes_about_the_data_are_told_in_one_line(
    elsewhere: Path, data: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.yaml").write_text(f"base: [embedded/student, model/tiny]\ndata: {data}\n")
    assert main(["fit", "--config", "mine.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_the_projects_own_data_module_may_be_named(elsewhere: Path) -> None:
    """Arguments beside the class path go to it, too."""
    name = "TalkingHeadDataModule"
    Path("mine.yaml").write_text(f"base: data/tiny\ndata: {{class_path: {name}, seed: 3}}\n")
    config = read_config("mine.yaml")
    data = place_data(config, config.content, name)["data"]
    assert data["class_path"] == name
    assert (data["init_args"]["num_frames"], data["init_args"]["seed"]) == (49, 3)
    assert data_class_of(["fit", "--config", "mine.yaml", "--data.class_path=mine.Other"]) == (
        "mine.Other"
    )
    assert data_class_of(["fit", "-c", "mine.yaml", "--config=data/tiny"]) == name
    assert data_class_of(["fit", "--config", "data/tiny", "--data.seed", "1"]) is None
