"""Who is seen in a video, by its name or a mapping, and the split that this person belongs to.

Splits are identity-disjoint (REST sec. 4.1) and drawn from a hash of the identity's name, so that
they stay where they are when videos are added.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath

from rest_lightning.data.layout import split_of_identity
from rest_lightning.data.preparation.options import PrepareOptions
from rest_lightning.data.preparation.rows import Row
from rest_lightning.errors import UserError

RULES = ("auto", "hdtf", "mead", "file")

# RD_Radio34_009: speaker 34, clip 9. WRA_KevinBrady2_000: the third video of Kevin Brady, clip 0.
_HDTF_SPEAKER = re.compile(r"RD_(Radio\d+)(?:_\d+)*")
_HDTF_NAME = re.compile(r"(?:WDA|WRA)_([A-Za-z][A-Za-z-]*?)\d*(?:_\d+)*")
_HDTF_SAME = {"WhipJimClyburn": "JamesClyburn"}  # one person under two names
_MEAD_PERSON = re.compile(r"[MW]\d{3}")
_MEAD_EMOTION = re.compile(
    r"(?:^|[/_])(?:angry|contempt|disgusted|fear|happy|neutral|sad|surprised)(?=[/_])"
)


def identity_of(source: str, rule: str = "auto", mapping: Mapping[str, str] | None = None) -> str:
    """Who is seen in a video.

    Args:
        source: path relative to the input's root, with forward slashes.
        rule: ``hdtf`` reads names like ``WDA_AmyKlobuchar1_000.mp4`` (trailing digits number a
            person's videos), ``mead`` paths like ``M003/video/front/angry/level_1/001.mp4``,
            ``file`` takes every video for a person of its own, ``auto`` whichever of the three
            fits.
        mapping: source or folder -> identity; with it, the rule is not asked. The longest name
            wins.

    Raises:
        UserError: the mapping does not name the source, or its name does not follow the rule.
    """
    if mapping is not None:
        return _mapped(source, mapping)
    if rule not in RULES:
        raise UserError(
            f"expected an identity rule of {', '.join(RULES)}, got {rule!r}: choose one of them"
        )
    if rule in ("auto", "hdtf") and (person := _hdtf(source)) is not None:
        return person
    if rule in ("auto", "mead") and (person := _mead(source)) is not None:
        return person
    if rule == "hdtf":
        raise UserError(
            f"{source}: expected a name of HDTF such as RD_Radio1_000.mp4 or "
            "WDA_BarackObama_000.mp4, got another: "
            "rename it, or give a mapping"
        )
    # MEAD's folders below the person's: by file, one face would be in all splits.
    if rule == "mead" or (rule == "auto" and _MEAD_EMOTION.search(source) and "/level_" in source):
        raise UserError(
            f"{source}: expected a path of MEAD with its person, such as "
            "M003/video/front/angry/level_1/001.mp4, got "
            "none: prepare the folder above, or give a mapping"
        )
    return source


def assign_splits(rows: Iterable[Row], options: PrepareOptions) -> list[Row]:
    """The rows with ``identity`` and ``split``; clips whose identity cannot be told become failed
    rows.

    Rows without a clip keep both empty. Order and number of the other rows change nothing.

    Raises:
        UserError: the mapping's file cannot be read.
    """
    mapping = None if options.identity_map is None else read_mapping(options.identity_map)
    out = []
    for row in rows:
        if row.clip_id is None:
            out.append(replace(row, identity=None, split=None))
            continue
        try:
            identity = identity_of(row.source, options.identity_rule, mapping)
        except UserError as error:
            out.append(
                replace(
                    row,
                    status="failed",
                    stage="filter",
                    reason=str(error),
                    identity=None,
                    split=None,
                )
            )
            continue
        split = split_of_identity(identity, options.val_fraction, options.test_fraction)
        out.append(replace(row, identity=identity, split=split))
    return out


def read_mapping(path: str | os.PathLike[str]) -> dict[str, str]:
    """A mapping of videos or folders to identities.

    Args:
        path: JSON with one object {source: identity}, or CSV with the columns ``source`` and
            ``identity``. Sources are relative to the input's root, with forward slashes.

    Raises:
        UserError: no such file, another format, an empty identity, or one source with two
            identities.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"expected a mapping of videos to identities {path}, got {error}: check the name"
        ) from None
    pairs = _csv_pairs(path, text) if path.suffix.lower() == ".csv" else _json_pairs(path, text)
    mapping: dict[str, str] = {}
    for source, identity in pairs:
        if (
            not isinstance(source, str)
            or not isinstance(identity, str)
            or not source.strip()
            or not identity.strip()
        ):
            raise UserError(
                f"{path}: expected a source and an identity, got {source!r} and "
                f"{identity!r}: fill both in"
            )
        source = PurePosixPath(source.strip()).as_posix()
        if mapping.setdefault(source, identity.strip()) != identity.strip():
            raise UserError(
                f"{path}: expected one identity of {source}, got {mapping[source]!r} "
                f"and {identity!r}"
            )
    return mapping


def _hdtf(source: str) -> str | None:
    stem = PurePosixPath(source).stem
    if match := _HDTF_SPEAKER.fullmatch(stem):
        return match[1]
    if match := _HDTF_NAME.fullmatch(stem):
        return _HDTF_SAME.get(match[1], match[1])
    return None


def _mead(source: str) -> str | None:
    """``M003`` of a path with a folder or a name that begins with it, and with one of MEAD's
    emotions.
    """
    if not _MEAD_EMOTION.search(source):
        return None
    *folders, name = PurePosixPath(source).parts
    for part in (name.split("_")[0], *reversed(folders)):
        if _MEAD_PERSON.fullmatch(part):
            return part
    return None


def _mapped(source: str, mapping: Mapping[str, str]) -> str:
    path = PurePosixPath(source)
    for name in (path, *path.parents):
        if (identity := mapping.get(name.as_posix())) is not None:
            return identity
    raise UserError(
        f"{source}: expected its identity in the mapping, got none: add the video or its folder"
    )


def _json_pairs(path: Path, text: str) -> list[tuple[object, object]]:
    try:
        # a dictionary would keep the last of two silently
        content = json.loads(text, object_pairs_hook=list)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: expected JSON, got {error}: correct it") from None
    if not text.lstrip().startswith("{"):
        raise UserError(
            f"{path}: expected an object {{source: identity}}, got "
            f"{type(content).__name__}: correct it"
        )
    return list(content)


def _csv_pairs(path: Path, text: str) -> list[tuple[object, object]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if not {"source", "identity"} <= set(reader.fieldnames or ()):
        raise UserError(
            f"{path}: expected the columns source and identity, got "
            f"{reader.fieldnames}: name them so"
        )
    return [(line["source"], line["identity"]) for line in reader]
