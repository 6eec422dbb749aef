"""A stranger's package in a folder of its own: everything of docs/extend.md, by class path."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_head import make_head
from torch import nn

from rest_lightning.cli import main
from rest_lightning.errors import UserError
from rest_lightning.models import CompactVAE, LogMelEncoder
from rest_lightning.names import IMPORTED
from rest_lightning.parts import build_part, describe_part, open_speech_encoder

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


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the package ``my_talker``, as the current one; nothing of it stays loaded."""
    package = tmp_path / "my_talker"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "networks.py").write_text(textwrap.dedent(NETWORKS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", ".")])
    monkeypatch.delenv(IMPORTED, raising=False)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_talker"]:
        del sys.modules[name]


def networks(folder: Path) -> Any:
    import importlib

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
