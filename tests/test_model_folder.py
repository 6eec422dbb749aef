"""Model folders of strangers: damaged, incomplete, absurd. Each is one line that names the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_head import make_head

from rest_lightning.errors import UserError
from rest_lightning.generation import load_generator
from rest_lightning.machine import peak_memory_mb
from rest_lightning.talking_head import ASSETS, TalkingHead, find_model, portraits_in


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_head().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refused(folder: Path, *words: str) -> None:
    before_mb = peak_memory_mb()
    with pytest.raises(UserError, match="expected") as info:
        TalkingHead.from_pretrained(folder)
    text = str(info.value)
    assert "\n" not in text and len(text) < 700
    for word in words:
        assert word in text
    assert peak_memory_mb() - before_mb < 300


def shard_of(folder: Path, part: str) -> Path:
    return next((folder / part).glob("*.safetensors"))


PARTS = ["vae", "speech_ae", "transformer"]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("empty", b"", ["whole safetensors"]),
        ("pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", ["git lfs"]),
        ("text", b"hello " * 100, ["whole safetensors"]),
        ("header of 2^63 bytes", b"\xff" * 8 + b"{}", ["whole safetensors"]),
        ("header that is no JSON", (4).to_bytes(8, "little") + b"abcd", ["whole safetensors"]),
    ],
)
def test_damaged_shards(folder: Path, part: str, name: str, data: bytes, words: list[str]) -> None:
    shard = shard_of(folder, part)
    shard.write_bytes(data)
    refused(folder, str(shard), *words)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_shards_that_are_cut_off(folder: Path, part: str, share: float) -> None:
    shard = shard_of(folder, part)
    data = shard.read_bytes()
    shard.write_bytes(data[: int(share * len(data))])
    refused(folder, shard.name)


@pytest.mark.parametrize("part", PARTS)
def test_missing_shards(folder: Path, part: str) -> None:
    shard = shard_of(folder, part)
    shard.rename(shard.with_name("model-00002-of-00003.safetensors"))
    refused(folder, part, "3 shards", "number 1 is missing")
    for file in (folder / part).glob("*.safetensors"):
        file.unlink()
    refused(folder, part)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(folder: Path, part: str, value: float) -> None:
    shard = shard_of(folder, part)
    tensors = load_file(shard)
    name = sorted(k for k, v in tensors.items() if v.is_floating_point())[0]
    tensors[name].flatten()[-1:].fill_(value)
    save_file(tensors, shard)
    refused(folder, shard.name, name, "NaN or infinity")


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_weights_of_another_network(folder: Path, change: str) -> None:
    shard = shard_of(folder, "transformer")
    tensors = load_file(shard)
    name = sorted(tensors)[0]
    if change == "missing":
        del tensors[name]
    elif change == "extra":
        tensors["surprise"] = torch.zeros(3)
    else:
        tensors[name] = torch.zeros(1, 2, 3)
    save_file(tensors, shard)
    refused(folder, "transformer", "surprise" if change == "extra" else name)


@pytest.mark.parametrize("file", ["model_index.json", "transformer/config.json", "vae/config.json"])
@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", '"x"', "\ufeff{}", "[" * 100_000, '{"a": ' * 50_000, "\0", "{}"],
)
def test_broken_json(folder: Path, file: str, text: str) -> None:
    (folder / file).write_text(text, encoding="utf-8")
    refused(folder, Path(file).name)


def test_json_of_many_megabytes(folder: Path) -> None:
    (folder / "model_index.json").write_text(json.dumps({"x": "y" * 3_000_000}))
    refused(folder, "model_index.json", "1 MB")


SIZES = [-64, 0, 1, 63, 100, 2080, 10**9, 10**30, 64.0, "64", None, True, [64]]


@pytest.mark.parametrize("size_px", SIZES)
def test_sizes(folder: Path, size_px: Any) -> None:
    edit(folder / "model_index.json", lambda index: index.update(size_px=size_px))
    refused(folder, "model_index.json", "size_px")


@pytest.mark.parametrize(
    "sampling",
    [
        None,
        [],
        {"num_steps": 0},
        {"num_steps": 10**12},
        {"num_steps": "8"},
        {"guidance": float("nan")},
        {"guidance": float("inf")},
        {"guidance": 1e38},
        {"shift": -1.0},
        {"surprise": 1},
    ],
)
def test_sampling(folder: Path, sampling: Any) -> None:
    edit(folder / "model_index.json", lambda index: index.update(sampling=sampling))
    refused(folder, "model_index.json")


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("transformer", {"surprise": 1}),
        ("transformer", {"num_layers": -1}),
        ("transformer", {"num_layers": 60_000}),
        ("transformer", {"num_layers": 10**9}),
        ("transformer", {"num_attention_heads": 65_536, "attention_head_dim": 65_536}),
        ("transformer", {"num_attention_heads": "2"}),
        ("transformer", {"attention_head_dim": 0}),
        ("transformer", {"rope_theta": float("nan")}),
        ("transformer", {"cache_options": {"chunk_length": -3}}),
        ("transformer", {"cache_options": {"surprise": 1}}),
        ("vae", {"widths": [65_536, 65_536, 65_536]}),
        ("vae", {"widths": []}),
        ("vae", {"widths": None}),
        ("vae", {"patch_size": 0}),
        ("vae", {"latent_channels": 2**40}),
        ("speech_ae", {"width": 65_536, "num_tokens": 65_536}),
        ("speech_ae", {"feature_dim": -1}),
    ],
)
def test_descriptions_that_no_network_has(folder: Path, part: str, changes: dict[str, Any]) -> None:
    path = folder / part / "config.json"
    edit(path, lambda description: description["config"].update(changes))
    refused(folder, part)


@pytest.mark.parametrize("name", [None, 3, [], {}, "os.system", "A2VDiT.__init__", "x" * 10_000])
def test_classes(folder: Path, name: Any) -> None:
    edit(folder / "vae" / "config.json", lambda description: description.update({"class": name}))
    refused(folder)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 99999999999999999999999])
def test_seeds_beyond_64_bits(seed: int) -> None:
    with pytest.raises(UserError, match="seed of 64 bits"):
        make_head().open(torch.zeros(3, 64, 64), seed=seed)


def test_a_good_folder_gives_the_same_weights(folder: Path) -> None:
    head, loaded = make_head(), TalkingHead.from_pretrained(folder)
    for name, value in head.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


def test_the_bundled_model_and_the_one_that_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_model() == find_model("people") == find_model(Path("people")) == ASSETS / "people"
    assert portraits_in(tmp_path) == portraits_in(find_model())  # of a folder without its own
    said = (
        r"^expected a model, got 'embedded': .* left the package; .* tests/assets/drawn of a clone$"
    )
    for load in (TalkingHead.from_pretrained, load_generator):
        with pytest.raises(UserError, match=said):
            load("embedded")
    for name in ("people", "embedded"):  # a folder of the reader's own comes first
        Path(name).mkdir()
        assert find_model(name) == Path(name)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
