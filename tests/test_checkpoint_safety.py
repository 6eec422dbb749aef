"""A checkpoint from a stranger must not run code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from rest_lightning.cli import main
from rest_lightning.errors import UserError
from rest_lightning.parts import PARTS_KEY, open_part, open_speech_encoder


class MakesFolder:
    """Makes a folder when it is unpickled, as an attacker's object would run a command."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("read", [lambda path: open_part("vae", path), open_speech_encoder])
def test_checkpoint_with_code_is_refused(read: Any, tmp_path: Path) -> None:
    path, folder = tmp_path / "stage.ckpt", tmp_path / "made"
    torch.save({PARTS_KEY: {"vae": MakesFolder(folder)}, "state_dict": {}}, path)
    with pytest.raises(UserError, match=r"tensors and plain values, got .*stage\.ckpt"):
        read(path)
    assert not folder.exists()
    torch.load(path, weights_only=False)  # the file does what it says: read in full, it acts
    assert folder.exists()


def test_it_is_read_where_the_user_trusts_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Old checkpoints; the switch holds for one command."""
    path, folder = tmp_path / "old.ckpt", tmp_path / "made"
    torch.save({PARTS_KEY: {"vae": MakesFolder(folder)}, "state_dict": {}}, path)
    words = ["export", str(path), "--vae", str(path), "--out", str(tmp_path / "model")]
    assert main(words) == 2 and not folder.exists()
    assert "`rest --trust-checkpoint ...` if you trust" in capsys.readouterr().err
    assert main(["--trust-checkpoint", *words]) == 2  # has no transformer
    assert folder.exists() and "tensors and plain values" not in capsys.readouterr().err
    folder.rmdir()
    assert main(words) == 2 and not folder.exists()


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_stages_refuse_it_too(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = tmp_path / "stage.ckpt", tmp_path / "made"
    torch.save({PARTS_KEY: {"vae": MakesFolder(folder)}, "state_dict": {}}, path)
    words = [command, "--config", "embedded/vae", "--config", "size/tiny/vae"]
    assert main([*words, "--ckpt_path", str(path)]) == 2
    assert "expected a checkpoint of tensors and plain values" in capsys.readouterr().err
    assert not folder.exists()
