"""What tells about the installation: `rest doctor`, `rest completion`."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from rest_lightning.cli import COMMANDS, STAGE_COMMANDS, main
from rest_lightning.commands import doctor


def test_doctor_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "--seconds", "0.1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == []
    assert found["codecs"]["encode libx264"] and found["codecs"]["decode opus"]
    assert found["speed"]["frames_per_second"] > 0
    assert found["threads"]["usable_cores"] >= 1
    assert found["versions"]["rest_lightning"]


def test_doctor_names_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here a package that cannot be imported, an encoder that FFmpeg lacks, an old extra."""
    monkeypatch.setattr(doctor, "NEEDED", (*doctor.NEEDED, "no_such_package"))
    monkeypatch.setattr(doctor, "ENCODERS", ("libx264", "no_such_encoder"))
    version = doctor.metadata.version

    def without_aiohttp(name: str) -> str:
        if name == "prometheus_client":
            return "0.1"
        if name == "aiohttp":
            raise doctor.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor.metadata, "version", without_aiohttp)
    assert main(["doctor"]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "no_such_package cannot be imported" in text and "no encoder no_such_encoder" in text
    needs = "rest serve: needs aiohttp, prometheus_client >=0.20 (here 0.1)"
    assert f"{needs}: pip install" in text and "[serve]" in text
    assert "rest converse: needs aiohttp" in text


def test_doctor_finds_an_old_version_beside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "rest_lightning-0.0.9.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.4\nName: rest_lightning\nVersion: 0.0.9\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["doctor", "--json", "--seconds", "0"]) == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert "0.0.9 is installed, too: pip uninstall" in problem


def test_doctor_refuses_a_long_test(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--seconds", "-1"]) == 2
    assert "expected --seconds from 0 to 600, got -1" in capsys.readouterr().err


def test_completion_knows_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """bash itself is asked what it would offer."""
    if (bash := shutil.which("bash")) is None:
        pytest.skip("no bash")
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "rest.bash"
    script.write_text(capsys.readouterr().out)

    def offered(*words: str) -> set[str]:
        line = " ".join(f"'{word}'" for word in ("rest", *words))
        ask = f"COMP_WORDS=({line}); COMP_CWORD={len(words)}; _shtab_rest"
        text = f"source {script}; {ask}; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        done = subprocess.run([bash, "-c", text], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return set(done.stdout.split())

    assert offered("") >= {*COMMANDS, *STAGE_COMMANDS}
    assert offered("talk", "--re") == {"--report", "--reference-guidance"}
    assert offered("talk", "--dtype", "") == {"auto", "float32", "bfloat16"}
    assert offered("fit", "--trainer.fast") == {"--trainer.fast_dev_run"}
    assert offered("talk", "rest.b") == {"rest.bash"}


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_of_other_shells(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS)
    interpreter = shutil.which(shell)
    if interpreter is not None:
        done = subprocess.run([interpreter, "-n"], input=script, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
