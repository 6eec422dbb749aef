"""Lists of portraits and speech, and their blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rest_lightning.data.streams import PredictPair, SpeechStream, read_pairs
from rest_lightning.errors import UserError
from rest_lightning.media.audio import open_speech


@pytest.mark.parametrize("block_samples", [1000, 16_000, 24_000, 100_000])
def test_blocks_are_the_speech_and_their_number_is_known(
    pairs: list[dict[str, str]], block_samples: int
) -> None:
    stream = SpeechStream(read_pairs(pairs), block_samples)
    blocks = list(stream)
    assert len(blocks) == len(stream)
    for pair in stream.pairs:
        own = [block for block in blocks if block["pair"] == pair]
        assert [block["is_first"] for block in own] == [True] + [False] * (len(own) - 1)
        assert [block["is_end"] for block in own] == [False] * (len(own) - 1) + [True]
        joined = np.concatenate([block["samples"] for block in own])
        assert np.array_equal(joined, open_speech(pair.speech).read_all())
    assert [block["pair"] for block in blocks if block["is_end"]] == stream.pairs


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".csv"])
def test_lists_in_files_are_relative_to_them(tmp_path: Path, suffix: str) -> None:
    for name in ("a.png", "b.wav"):
        (tmp_path / name).write_bytes(b"x")
    rows = [
        {"portrait": "a.png", "speech": "b.wav"},
        {"portrait": "a.png", "speech": "b.wav", "name": "second"},
    ]
    text = (
        "portrait,speech,name\na.png,b.wav,\na.png,b.wav,second\n"
        if suffix == ".csv"
        else json.dumps(rows)
    )
    path = tmp_path / f"list{suffix}"
    path.write_text(text)
    portrait, speech = str(tmp_path / "a.png"), str(tmp_path / "b.wav")
    assert read_pairs(path) == [
        PredictPair(portrait, speech, "a-b"),
        PredictPair(portrait, speech, "second"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("absent.json", None, "no such file"),
        ("list.txt", "", r"expected a list of pairs in \.json, \.yaml or \.csv"),
        ("list.json", "{", "expected to read pairs"),
        ("list.json", "{}", "expected a list of pairs .* got dict"),
        ("list.yaml", "[a: b: c", "expected YAML"),
        ("list.json", "[]", "at least one pair"),
        ("list.json", '["a.png"]', "expected pairs of the form"),
        ("list.json", '[{"portrait": "a.png"}]', "expected pairs of the form"),
        (
            "list.json",
            ('[{"portrait": "a.png", "speech": "b.wav", "seed": 1}]'),
            "expected pairs of the form",
        ),
        (
            "list.json",
            ('[{"portrait": "a.png", "speech": "absent.wav"}]'),
            r"the speech .*absent\.wav",
        ),
        (
            "list.json",
            ('[{"portrait": "absent.png", "speech": "b.wav"}]'),
            r"the portrait .*absent\.png",
        ),
        (
            "list.json",
            ('[{"portrait": "a.png", "speech": "b.wav", "name": "../x"}]'),
            "without folders",
        ),
        ("list.csv", "portrait,speech\na.png,b.wav\na.png,b.wav\n", "a-b twice"),
    ],
)
def test_bad_lists(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    for file in ("a.png", "b.wav"):
        (tmp_path / file).write_bytes(b"x")
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_pairs(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("what", ["portrait", "speech"])
def test_a_bad_pair_is_left_out_before_the_first_block(
    pairs: list[Any], tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF")
    bad = {**pairs[0], what: str(broken), "name": "bad"}
    stream = SpeechStream(read_pairs([bad, *pairs]))
    assert [pair.name for pair, _ in stream.failed] == ["bad"]
    assert len(stream.pairs) == len(pairs) and len(list(stream)) == len(stream)
    assert "bad is left out" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"broken\.wav"):
        SpeechStream(read_pairs([bad]))
    with pytest.raises(UserError, match="block_samples of at least 1"):
        SpeechStream(read_pairs(pairs), 0)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("comma", [",", ";"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_csv_as_excel_saves_it(
    pairs: list[Any], tmp_path: Path, mark: str, comma: str, end: str
) -> None:
    rows = [("Portrait", " speech ", "name")] + [
        (pair["portrait"], pair["speech"], f"n{number}") for number, pair in enumerate(pairs)
    ]
    text = mark + "".join(comma.join(row) + end for row in rows)
    (tmp_path / "pairs.csv").write_bytes(text.encode())
    assert [pair.name for pair in read_pairs(tmp_path / "pairs.csv")] == [
        f"n{number}" for number in range(len(pairs))
    ]


@pytest.mark.parametrize("text", ["a.png,b.wav,a\n", "", "face;sound\n1;2\n", "portrait\na.png\n"])
def test_a_csv_without_its_columns_says_which(tmp_path: Path, text: str) -> None:
    (tmp_path / "pairs.csv").write_text(text)
    with pytest.raises(UserError, match=r"columns portrait,speech.*pairs\.csv") as info:
        read_pairs(tmp_path / "pairs.csv")
    assert "\n" not in str(info.value)
