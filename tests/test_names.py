"""Short class names and names of release 0.1 in configuration files."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from rest_lightning import names
from rest_lightning.cli import main

CONFIG = """
model:
  class_path: {module}
  init_args:
    vae: {{class_path: {vae}}}
    speech_encoder: {{class_path: LogMelEncoder}}
    speech_ae: {{class_path: SpeechAE, init_args: {{feature_dim: 80}}}}
    transformer: {{class_path: A2VDiT, init_args: {{attention: chunked}}}}
trainer:
  callbacks:
    - class_path: SampleVideos
data: {{data_dir: clips}}
"""


def printed_config(tmp_path: Path, capsys: pytest.CaptureFixture[str], vae: str) -> tuple[str, str]:
    """What `rest fit --print_config` says on stdout and stderr."""
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG.format(module="StudentModule", vae=vae))
    assert main(["fit", "--config", str(file), "--print_config"]) == 0
    printed = capsys.readouterr()
    return printed.out, printed.err


def test_classes_that_packages_export_need_no_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, errors = printed_config(tmp_path, capsys, "CompactVAE")
    for name in (
        "tasks.StudentModule",
        "models.CompactVAE",
        "models.LogMelEncoder",
        "callbacks.SampleVideos",
    ):
        assert f"class_path: rest_lightning.{name}\n" in config
    assert "latent_channels" in config and errors == ""


def test_a_name_of_release_0_1_is_taken_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = "rest_lightning.models.autoencoder"
    monkeypatch.delitem(sys.modules, old, raising=False)
    names._tell.cache_clear()
    config, errors = printed_config(tmp_path, capsys, f"{old}.CompactVAE")
    assert "latent_channels" in config
    assert errors == f"note: {old}.CompactVAE is called rest_lightning.models.vae.CompactVAE now\n"


@pytest.mark.parametrize("old", names.MOVED)
def test_old_modules_lend_the_classes_of_the_new_ones(
    old: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    names.accept_old_names()
    names.accept_old_names()
    assert sum(isinstance(finder, names._Finder) for finder in sys.meta_path) == 1
    monkeypatch.delitem(sys.modules, old, raising=False)
    new = importlib.import_module(names.MOVED[old])
    classes = [
        name
        for name, value in vars(new).items()
        if getattr(value, "__module__", "") == new.__name__
    ]
    assert classes and all(
        getattr(importlib.import_module(old), name) is getattr(new, name) for name in classes
    )
    with pytest.raises(AttributeError):
        importlib.import_module(old).nothing  # noqa: B018


def test_modules_that_never_were_stay_unknown() -> None:
    names.accept_old_names()
    with pytest.raises(ModuleNotFoundError):
        __import__("rest_lightning.models.never")


@pytest.mark.parametrize("name", ["rest_lightning", "rest_lightning.media", "rest_lightning.tasks"])
def test_dir_shows_the_public_names_and_loads_none(name: str) -> None:
    code = f"import sys, {name} as package; before = set(sys.modules); print(*dir(package)); "
    code += "assert set(sys.modules) == before; assert set(package.__all__) <= set(dir(package))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = {word for word in done.stdout.split() if not word.startswith("__")}
    assert shown == set(importlib.import_module(name).__all__)
