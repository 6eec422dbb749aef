"""Configuration files: names, bases, networks, and mistakes in one line. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rest_lightning.config import (
    configs_root,
    find_config,
    merge,
    nearest,
    network_of,
    read_config,
    read_dataclass,
    shipped_names,
)
from rest_lightning.errors import UserError
from rest_lightning.evaluation.protocol import Protocol, read_protocol


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, without a checkout around it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


@pytest.mark.parametrize("name", shipped_names())
def test_every_shipped_name_is_found_and_read_from_any_folder(elsewhere: Path, name: str) -> None:
    path = find_config(name)
    assert path == find_config(f"{name}.yaml") == configs_root() / f"{name}.yaml"
    config = read_config(name)
    assert config.sources[-1][0] == path and "base" not in config.content


def test_an_existing_file_wins_over_a_shipped_name(elsewhere: Path) -> None:
    (elsewhere / "embedded").mkdir()
    (elsewhere / "embedded" / "asd").write_text("seed_everything: 3\n")
    assert find_config("embedded/asd") == Path("embedded/asd")
    assert read_config("embedded/asd").content == {"seed_everything": 3}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("embedded/ads", r"one of embedded/.*got 'embedded/ads': did you mean embedded/asd\?"),
        ("embeded/teacher", r"got 'embeded/teacher': did you mean embedded/teacher\?"),
        ("teacher", r"did you mean \w+/teacher\?"),
        ("mine.yaml", r"the file mine.yaml does not exist: check the path"),
        ("configs/embedded/asd.yaml", "does not exist: .*take the shipped embedded/asd"),
        ("zzzz", "one of .*embedded.*got 'zzzz': check the name"),
    ],
)
def test_an_unknown_name_gets_the_nearest(elsewhere: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_config(name)
    assert "\n" not in str(caught.value)


def test_bases_are_read_first_and_beside_the_file(elsewhere: Path) -> None:
    folder = elsewhere / "mine"
    folder.mkdir()
    write(folder, one="a: {b: 1, c: 1}\nlist: [1]\n", two="base: one.yaml\na: {c: 2}\n")
    write(folder, three="base: [two.yaml, data/tiny]\na: {d: 3}\nlist: [2]\n")
    config = read_config(folder / "three.yaml")
    assert config.content["a"] == {"b": 1, "c": 2, "d": 3}
    assert config.content["list"] == [2]
    assert config.content["data"]["size_px"] == 64
    assert [path.stem for path, _ in config.sources] == ["one", "two", "tiny", "three"]
    assert config.source_of(("a", "c")) == folder / "two.yaml"
    assert config.source_of(("a", "b")) == folder / "one.yaml"
    assert config.source_of(("nothing",)) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: mine.yaml\n", "builds on itself"),
        ("base: {a: 1}\n", "expected names of configurations as base"),
        ("base: nowhere\n", "a base of mine.yaml"),
        ("a: [1\n", "expected YAML in mine.yaml"),
        ("- 1\n", "expected names and values in mine.yaml, got list"),
    ],
)
def test_files_that_cannot_be_read(elsewhere: Path, text: str, message: str) -> None:
    write(elsewhere, mine=text)
    with pytest.raises(UserError, match=message) as caught:
        read_config("mine.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("into", "content", "merged"),
    [
        ({"a": {"b": 1}}, {"a": {"c": 2}}, {"a": {"b": 1, "c": 2}}),
        ({"a": [1]}, {"a": [2]}, {"a": [2]}),
        ({"a": [1]}, {"a+": [2]}, {"a": [1, 2]}),
        ({"a+": [1]}, {"a+": 2}, {"a+": [1, 2]}),
        ({"a": {"b": 1}}, {"a": None}, {"a": None}),
        ({"a": None}, {"a": {"b": 1}}, {"a": {"b": 1}}),
        (
            {"class_path": "x.A", "init_args": {"p": 1}},
            {"class_path": "A", "init_args": {"q": 2}},
            {"class_path": "A", "init_args": {"p": 1, "q": 2}},
        ),
        (
            {"class_path": "x.A", "init_args": {"p": 1}},
            {"class_path": "x.B", "init_args": {"q": 2}},
            {"class_path": "x.B", "init_args": {"q": 2}},
        ),
    ],
)
def test_merging(into: Any, content: Any, merged: Any) -> None:
    assert merge(into, content) == merged


def test_a_network_stands_in_one_file(elsewhere: Path) -> None:
    for stage in ("teacher", "student", "asd", "distill"):
        for size in ("embedded", "paper"):
            if f"{size}/{stage}" not in shipped_names():
                continue
            content = read_config(f"{size}/{stage}").content
            for part in ("vae", "speech_encoder", "speech_ae"):
                given = network_of(read_config(f"model/{size}").content, part)
                assert network_of(content, part) == given
            attention = network_of(content, "transformer")["init_args"]["attention"]
            assert attention == ("full" if stage == "teacher" else "chunked")


def test_nearest() -> None:
    assert nearest("num_frame", ["num_frames", "size_px"]) == "num_frames"
    assert nearest("ads", ["embedded/asd", "paper/vae"]) is None
    assert nearest("asd", ["embedded/asd", "paper/vae"]) == "embedded/asd"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_frame": 3}, "mine: expected a known key, got num_frame: did you mean num_frames?"),
        ({"num_frames": "many"}, "mine: num_frames: expected a whole number, got many"),
        ({"measures": 3}, "mine: measures: .*3"),
        ({"faces": "drawn"}, "expected faces of prepared, sidecar, mediapipe, got 'drawn'"),
        ({"num_clips": 0}, "expected num_clips of at least 1, got 0"),
        ({"version": None}, "mine: .*version"),
    ],
)
def test_a_protocol_is_checked(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        **{"name": "p", "version": 1, "num_clips": 2, "num_frames": 96, "size_px": 64},
        **change,
    }
    with pytest.raises(UserError, match=message) as caught:
        read_dataclass(Protocol, given, "mine")
    assert "\n" not in str(caught.value)


def test_a_protocol_is_read(elsewhere: Path) -> None:
    write(elsewhere, mine="name: p\nversion: 1\nnum_clips: 2\nnum_frames: 96\nsize_px: 64\n")
    assert read_protocol("mine.yaml") == Protocol("p", 1, 2, 96, 64)
    with pytest.raises(UserError, match=r"mine.yaml: .*version"):
        write(elsewhere, mine="name: p\n")
        read_protocol("mine.yaml")
    with pytest.raises(
        UserError, match=r"one of long, .*got 'synthetics': did you mean synthetic\?"
    ):
        read_protocol("synthetics")
