"""Identities by HDTF's and MEAD's own names, by a mapping and by file; splits that share no
identity and stay.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rest_lightning.data.preparation.options import PrepareOptions
from rest_lightning.data.preparation.rows import Row
from rest_lightning.data.preparation.splits import assign_splits, identity_of, read_mapping
from rest_lightning.errors import UserError


def row(source: str, **changes: Any) -> Row:
    clip_id = source.replace("/", "_").removesuffix(".mp4")
    return replace(Row(source=source, clip_id=clip_id, status="kept", stage="encode"), **changes)


def options(**changes: Any) -> PrepareOptions:
    return replace(PrepareOptions(), **changes)


@pytest.mark.parametrize("rule", ["auto", "hdtf"])
@pytest.mark.parametrize(
    ("name", "person"),
    [
        ("RD_Radio1_000", "Radio1"),
        ("RD_Radio10_003", "Radio10"),
        ("RD_Radio59", "Radio59"),
        ("WDA_BarackObama_000", "BarackObama"),
        ("WDA_LucilleRoybal-Allard_001", "LucilleRoybal-Allard"),
        ("WDA_TerriSewell_000", "TerriSewell"),  # three videos of one person
        ("WDA_TerriSewell0_000", "TerriSewell"),
        ("WDA_TerriSewell1_004", "TerriSewell"),
        ("WRA_KevinBrady3", "KevinBrady"),
        ("WDA_WhipJimClyburn_000", "JamesClyburn"),
        ("WDA_JamesClyburn1_000", "JamesClyburn"),
    ],
)
def test_hdtf(name: str, person: str, rule: Any) -> None:
    assert identity_of(f"{name}.mp4", rule) == person
    assert identity_of(f"some/folder/{name}.mkv", rule) == person


@pytest.mark.parametrize("rule", ["auto", "mead"])
@pytest.mark.parametrize(
    ("source", "person"),
    [
        ("M003/video/front/angry/level_1/001.mp4", "M003"),
        ("MEAD/W009/video/left_30/surprised/level_3/027.mp4", "W009"),
        ("W040/front/neutral/level_1/040.mp4", "W040"),
        ("M003_front_angry_level_1_001.mp4", "M003"),
        ("clips/W021_disgusted_2_013.mp4", "W021"),
    ],
)
def test_mead(source: str, person: str, rule: Any) -> None:
    assert identity_of(source, rule) == person


def test_other_names_are_their_own_identity_or_an_error() -> None:
    for source in (
        "holiday.mp4",
        "a/holiday.mp4",
        "M003/holiday.mp4",
        "happy/me.mp4",
        "RD_Radio_000.mp4",
        "WDA_.mp4",
    ):
        assert identity_of(source, "auto") == identity_of(source, "file") == source
        with pytest.raises(UserError, match="expected a name of HDTF such as RD_Radio1_000"):
            identity_of(source, "hdtf")
        with pytest.raises(UserError, match="expected a path of MEAD with its person"):
            identity_of(source, "mead")
    assert identity_of("WDA_BarackObama_000.mp4", "file") == "WDA_BarackObama_000.mp4"
    # One person's folder of MEAD: by file, the face would be in all three splits.
    with pytest.raises(UserError, match="prepare the folder above, or give a mapping"):
        identity_of("video/front/angry/level_1/001.mp4", "auto")
    assert (
        identity_of("video/front/angry/level_1/001.mp4", "file")
        == "video/front/angry/level_1/001.mp4"
    )
    with pytest.raises(
        UserError, match=("expected an identity rule of auto, hdtf, mead, file, got 'vox'")
    ):
        identity_of("a.mp4", "vox")


def test_mappings(tmp_path: Path) -> None:
    as_json, as_csv = tmp_path / "people.json", tmp_path / "people.CSV"
    as_json.write_text(
        ('{"anna": "Anna", "anna/with bob.mp4": "Bob", "é \\"x\\".mp4": "Zoë"}'), encoding="utf-8"
    )
    as_csv.write_text(
        '\ufeffsource,identity,note\nanna/,Anna,\nanna/with bob.mp4,Bob,guest\n"é '
        '""x"".mp4",Zoë,\n',
        encoding="utf-8",
    )
    for path in (as_json, as_csv):
        mapping = read_mapping(path)
        assert mapping == {"anna": "Anna", "anna/with bob.mp4": "Bob", 'é "x".mp4': "Zoë"}
        people = [
            identity_of(s, "hdtf", mapping)
            for s in ("anna/1.mp4", "anna/deep/2.mp4", "anna/with bob.mp4")
        ]
        assert people == ["Anna", "Anna", "Bob"]
        with pytest.raises(
            UserError,
            match=(
                r"annabel\.mp4: expected its identity in the mapping, "
                r"got none: add"
            ),
        ):
            identity_of("annabel.mp4", "auto", mapping)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "[1]", "expected an object {source: identity}, got list"),
        ("a.json", "{", "expected JSON, got"),
        ("a.json", '{"a.mp4": ""}', "expected a source and an identity, got 'a.mp4' and ''"),
        ("a.json", '{"a.mp4": 3}', "expected a source and an identity, got 'a.mp4' and 3"),
        (
            "a.json",
            ('{"a.mp4": "A", "a.mp4": "B"}'),
            "expected one identity of a.mp4, got 'A' and 'B'",
        ),
        ("a.csv", "video,who\nx,y\n", "expected the columns source and identity, got"),
        ("a.csv", "source,identity\nx\n", "expected a source and an identity, got 'x' and None"),
    ],
)
def test_wrong_mappings_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_mapping(tmp_path / name)


def test_an_absent_mapping_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=(
            r"expected a mapping of videos to identities "
            r".*none\.json, "
            r"got"
        ),
    ):
        assign_splits([row("a.mp4")], options(identity_map=str(tmp_path / "none.json")))


def test_splits_share_no_identity_and_stay_when_videos_are_added() -> None:
    def videos(people: range) -> list[Row]:
        return [
            row(f"WDA_{chr(65 + p // 26)}{chr(97 + p % 26)}{v}_{v:03d}.mp4")
            for p in people
            for v in range(3)
        ]

    first = assign_splits(videos(range(400)), options(val_fraction=0.1, test_fraction=0.05))
    later = assign_splits(
        reversed(videos(range(500))), options(val_fraction=0.1, test_fraction=0.05)
    )
    where: dict[str, set[str]] = {}
    for each in (*first, *later):
        where.setdefault(str(each.identity), set()).add(str(each.split))
    assert len(where) == 500
    assert all(len(splits) == 1 for splits in where.values())
    shares = {
        split: sum(each.split == split for each in first) / len(first)
        for split in ("train", "val", "test")
    }
    assert shares["val"] == pytest.approx(0.1, abs=0.045)  # three standard deviations of 400 draws
    assert shares["test"] == pytest.approx(0.05, abs=0.033)


def test_an_unknown_identity_is_a_row_with_its_reason(tmp_path: Path) -> None:
    mapping = tmp_path / "people.json"
    mapping.write_text(json.dumps({"a.mp4": "A"}))
    broken = Row(source="c.mp4", clip_id=None, status="failed", stage="probe", reason="no video")
    done = assign_splits([row("a.mp4"), row("b.mp4"), broken], options(identity_map=str(mapping)))
    assert [each.status for each in done] == ["kept", "failed", "failed"]
    assert (done[0].identity, done[0].split is None) == ("A", False)
    assert done[1].reason == (
        "b.mp4: expected its identity in the mapping, got none: add the video or its folder"
    )
    assert (done[1].identity, done[1].split) == (None, None)
    assert done[2] == broken
