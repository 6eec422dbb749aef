"""Models on the hub, against a fake of its HTTP interface; the client is huggingface_hub itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_hub import FakeHub, serve
from tiny_head import make_head

from rest_lightning import TalkingHead, UserError
from rest_lightning.cli import main
from rest_lightning.hub import licence_of
from rest_lightning.models import A2VDiT, CompactVAE, LogMelEncoder, SpeechAE
from rest_lightning.models.pretrained import PretrainedPart
from rest_lightning.talking_head import ModelOptions

CARD = b"---\nlicense: cc-by-4.0\n---\n# A head\n"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    with serve() as hub:
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """A model in shards with a card, and things that must never be fetched."""
    head = make_head()
    head.card = CARD.decode()
    folder = tmp_path / "made"
    head.save_pretrained(folder, max_shard_bytes=40_000)
    assert len({file.stat().st_mode for file in folder.rglob("*") if file.is_file()}) == 1
    found = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert "transformer/model.safetensors.index.json" in found
    return found | {"model.bin": b"pickle", "vae/pytorch_model.bin": b"x", "modeling.py": b"1/0"}


def assert_same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    weights = other.state_dict()
    assert len(weights) > 0 or not one.state_dict()
    for name, value in one.state_dict().items():
        assert torch.equal(value, weights[name]), name


def refused(words: tuple[str, ...], source: str, **hub: object) -> None:
    with pytest.raises(UserError) as info:
        TalkingHead.from_pretrained(source, **hub)
    text = str(info.value)
    assert "\n" not in text and len(text) < 400, text
    assert all(word in text for word in ("expected", *words)), text


def test_fetched_cached_and_offline(
    hub: FakeHub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = hub.commit("org/head", files)
    head = TalkingHead.from_pretrained("org/head")
    assert_same(make_head(), head)
    assert head.card == CARD.decode()
    fetched = {line.split(f"{first}/")[1] for line in hub.asked if line.startswith("GET /org")}
    never = {"model.bin", "vae/pytorch_model.bin", "modeling.py"}
    assert fetched == set(files) - never

    hub.asked.clear()
    assert_same(head, TalkingHead.from_pretrained("org/head"))
    assert not [line for line in hub.asked if "resolve" in line]  # all from the cache

    hub.shutdown()
    hub.server_close()  # no network: what is cached is used
    assert_same(head, TalkingHead.from_pretrained("org/head", local_files_only=True))
    assert_same(head, TalkingHead.from_pretrained("org/head"))
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_same(head, TalkingHead.from_pretrained("org/head"))
    refused(("org/other", "HF_HUB_OFFLINE is set"), "org/other")


def test_revisions(hub: FakeHub, files: dict[str, bytes], tmp_path: Path) -> None:
    old = hub.commit("org/head", files)
    newer = make_head(seed=1)
    newer.card = CARD.decode()
    newer.save_pretrained(tmp_path / "newer")
    data = (tmp_path / "newer/speech_ae/model.safetensors").read_bytes()
    hub.commit("org/head", {"speech_ae/model.safetensors": data})
    assert_same(TalkingHead.from_pretrained("org/head").speech_ae, newer.speech_ae)
    for head in (
        TalkingHead.from_pretrained("org/head", revision=old),
        TalkingHead.from_pretrained(Path(f"org/head@{old}")),
        ModelOptions(Path(f"org/head@{old}"), device="cpu", dtype="float32").load(),
    ):
        assert_same(head, make_head())
    refused(("org/head", "got v9"), "org/head", revision="v9")
    refused(("one revision",), "org/head@v9", revision="v8")
    refused(("leave the revision out",), str(tmp_path / "newer"), revision="v8")


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (CompactVAE, "vae"),
        (SpeechAE, "speech_ae"),
        (A2VDiT, "transformer"),
        (LogMelEncoder, "speech_encoder"),
    ],
)
def test_single_parts(
    cls: type[PretrainedPart], name: str, hub: FakeHub, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.commit("org/head", files)
    part = cls.from_pretrained("org/head", subfolder=name)
    assert_same(part, getattr(make_head(), name))
    assert not part.training
    fetched = [line for line in hub.asked if line.startswith("GET /org")]
    assert fetched and all(f"/{name}/" in line for line in fetched)
    assert type(cls.from_pretrained(tmp_path / "made", subfolder=name)) is cls
    part.save_pretrained(tmp_path / "alone")
    assert_same(cls.from_pretrained(tmp_path / "alone"), part)


def test_parts_of_another_class(tmp_path: Path) -> None:
    make_head().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="expected the class SpeechAE, got CompactVAE"):
        SpeechAE.from_pretrained(tmp_path, subfolder="vae")
    with pytest.raises(UserError, match="name the part of a model folder with subfolder="):
        SpeechAE.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no-such/config.json"):
        SpeechAE.from_pretrained(tmp_path, subfolder="no-such")


def test_what_is_not_there(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    refused(("org/none", "neither is there", "hf auth login"), "org/none")
    refused(("model_index.json",), "no/such/folder")
    hub.commit("org/empty", {"README.md": CARD})
    refused(("model_index.json",), "org/empty")
    words = ["bench", "--quick", "--model", "org/none"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: expected a model folder or a model on the hub")
    assert len(error.splitlines()) == 1


def test_no_network(hub: FakeHub) -> None:
    hub.shutdown()
    hub.server_close()
    refused(("org/head", "no answer from the hub"), "org/head")
    refused(("org/head", "only local files"), "org/head", local_files_only=True)


def test_shards_that_are_damaged_on_the_way(hub: FakeHub, files: dict[str, bytes]) -> None:
    name = next(name for name in files if name.startswith("vae/model-00002-of"))
    hub.commit("org/head", files)
    hub.damaged.add(name)
    refused((name, "damaged", "fetch it again"), "org/head")
    hub.damaged.clear()
    assert_same(TalkingHead.from_pretrained("org/head"), make_head())  # the bad one is gone


def test_shards_that_are_damaged_on_the_hub(hub: FakeHub, files: dict[str, bytes]) -> None:
    name = "speech_ae/model.safetensors"
    hub.commit("org/head", files | {name: files[name][:-100]})
    refused((name, "whole safetensors"), "org/head")


def test_a_card_without_a_licence_is_told(
    hub: FakeHub, files: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    hub.commit("org/head", files | {"README.md": b"# A head\n"})
    TalkingHead.from_pretrained("org/head")
    assert "note: the card of org/head names no licence" in capsys.readouterr().err
    hub.commit("org/head", {"README.md": b"---\nlicense: [\n---\n"})
    refused(("README.md", "YAML"), "org/head")


def test_push_and_fetch(hub: FakeHub, tmp_path: Path) -> None:
    head = make_head()
    with pytest.raises(UserError, match="expected a licence in the model's card, got none"):
        head.push_to_hub("me/head", token="hf_good")
    with pytest.raises(UserError, match="expected a licence's identifier"):
        head.push_to_hub("me/head", token="hf_good", license="do what you: like")
    assert hub.asked == []
    with pytest.raises(UserError, match="hf auth login"):
        head.push_to_hub("me/head", token="hf_bad", license="cc-by-4.0")
    url = head.push_to_hub("me/head", token="hf_good", license="CC-BY-4.0", max_shard_bytes=40_000)
    assert url.startswith(f"{hub.url}/me/head/commit/")
    tree = hub.trees[hub.commits["me/head"]["main"]]
    assert "transformer/model.safetensors.index.json" in tree
    assert b"license: cc-by-4.0" in tree["README.md"]
    # A second commit in one file a part: the shards of the first are gone.
    fetched = TalkingHead.from_pretrained("me/head")
    assert_same(fetched, head)
    other = make_head(seed=1)
    other.card = fetched.card
    other.push_to_hub("me/head", token="hf_good", revision="next")
    tree = hub.trees[hub.commits["me/head"]["next"]]
    assert not [name for name in tree if "index.json" in name and "model." in name]
    assert_same(TalkingHead.from_pretrained("me/head", revision="next"), other)
    assert_same(TalkingHead.from_pretrained("me/head"), head)
    with pytest.raises(UserError, match="such as org/name"):
        head.push_to_hub("head", license="mit")


def test_licences(tmp_path: Path) -> None:
    head = make_head()
    head.save_pretrained(tmp_path / "a")
    assert licence_of(tmp_path / "a") is None
    head.card = "---\ntags:\n- a\n---\n# Head\n"
    head.save_pretrained(tmp_path / "b")
    assert licence_of(tmp_path / "b") is None
    assert TalkingHead.from_pretrained(tmp_path / "b").card == head.card
