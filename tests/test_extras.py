"""A command whose optional package is missing names the extra before it begins."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from rest_lightning.cli import main
from rest_lightning.extras import MODULES, install_command

COMMANDS = {
    "synthesize --out out --num-clips 1": "synthetic",
    "animate --portraits in --drivers in --out out --num-clips 1": "prepare",
    "prepare in --out out": "prepare",
    "prepare in --out out --already-cropped --engine ray": "ray",
    "serve --port 0": "serve",
    "serve --port 0 --engine ray": "ray",
    "converse --realtime ws://127.0.0.1:9": "converse",
    "converse --realtime espeak": "synthetic",
}


@pytest.mark.parametrize(
    ("command", "module"),
    [(command, module) for command, extra in COMMANDS.items() for module in MODULES[extra]],
)
def test_missing_package_is_one_line_and_nothing_is_made(
    command: str,
    module: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_bytes(b"no video, but it is not looked at")
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    if command.startswith("prepare in --out out") and module == "cv2":
        pytest.skip("mediapipe brings it, and scores that need it are left out")
    assert main(command.split()) == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1
    assert module in told
    assert install_command(COMMANDS[command]) in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_extras_are_those_of_the_package(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text("utf-8"))["project"]
    assert set(MODULES) <= set(project["optional-dependencies"])


WHEEL: dict[str, Any] = {"archive_info": {}}
EDITABLE: dict[str, Any] = {"dir_info": {"editable": True}}
GIT: dict[str, Any] = {"vcs_info": {"vcs": "git", "commit_id": "abc123"}}


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        (EDITABLE | {"url": "file://HERE/the%20clone"}, "pip install -e 'HERE/the clone[ray]'"),
        (EDITABLE | {"url": "file://HERE"}, "pip install -e '.[ray]'"),
        ({"dir_info": {}, "url": "file://HERE/the%20clone"}, "pip install 'HERE/the clone[ray]'"),
        (WHEEL | {"url": "file://HERE/a.whl"}, "pip install 'HERE/a.whl[ray]'"),
        (WHEEL | {"url": "file://HERE/gone.whl"}, "pip install 'aiohttp>=3.10' 'ray[serve]>=2.60'"),
        (WHEEL | {"url": "https://a.b/a.whl"}, "pip install 'aiohttp>=3.10' 'ray[serve]>=2.60'"),
        (None, "pip install 'aiohttp>=3.10' 'ray[serve]>=2.60'"),
        (
            GIT | {"url": "https://a.b/c.git"},
            "pip install 'rest_lightning[ray] @ git+https://a.b/c.git@abc123'",
        ),
    ],
    ids=["clone", "in-the-clone", "folder", "wheel", "no-wheel", "address", "unknown", "git"],
)
def test_the_way_out_is_where_the_installation_came_from(
    origin: dict[str, Any] | None,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "the clone").mkdir()
    (tmp_path / "a.whl").touch()
    installed = tmp_path / "site" / "rest_lightning-9.dist-info"
    installed.mkdir(parents=True)
    lines = ["Metadata-Version: 2.4", "Name: rest_lightning", "Version: 9", "Requires-Dist: torch"]
    needs = [
        'rest_lightning[serve]; extra == "ray"',
        'aiohttp>=3.10; extra == "serve"',
        'ray[serve]>=2.60; python_version >= "3.11" and extra == "ray"',
        'older; python_version < "3" and extra == "ray"',
    ]
    lines += [f"Requires-Dist: {each}" for each in needs]
    (installed / "METADATA").write_text("\n".join(lines))
    if origin is not None:
        text = json.dumps(origin).replace("HERE", str(tmp_path))
        (installed / "direct_url.json").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.chdir(tmp_path)
    assert install_command("ray") == expected.replace("HERE", str(tmp_path))
    monkeypatch.setattr("rest_lightning.extras.ON_AN_INDEX", True)
    assert install_command("ray") == "pip install 'rest_lightning[ray]'"


def test_help_needs_no_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in {name for names in MODULES.values() for name in names}:
        monkeypatch.setitem(sys.modules, module, None)
    for command in {command.split()[0] for command in COMMANDS}:
        assert main([command, "--help"]) == 0
        assert re.search(rf"usage: rest {command}", capsys.readouterr().out)
