"""Prepared-clip layout: the one folder format of synthetic, HDTF, MEAD and users' own clips.

::

    <root>/clips/<clip_id>.mp4    H.264 yuv420p, 25 fps, square, with AAC 16 kHz mono audio
    <root>/clips/<clip_id>.json   sidecar (class `Sidecar`)
    <root>/manifest.jsonl         one row per clip (class `ManifestRow`), sorted by clip_id
    <root>/dataset.json           layout version and how the set was made

Splits are identity-disjoint: an identity lives in one of train, val, test (REST sec. 4.1).
Every file appears under its final name only when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rest_lightning.constants import FPS, SAMPLE_RATE
from rest_lightning.errors import UserError
from rest_lightning.media.files import PathLike, rounded, sha256_of, write_text_atomic

LAYOUT_VERSION = 1
SPLITS = ("train", "val", "test")
LANDMARKS = ("mouth", "left_eye", "right_eye")
WAY_OUT = (
    "make one with `rest synthesize --out FOLDER`, or bring clips of your own into this layout"
)

_CLIP_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Sidecar:
    """What is known of one clip beside its pixels and samples.

    Attributes:
        clip_id: file stem; letters, digits, ``.``, ``_`` and ``-`` only.
        identity: who is seen. Clips of one identity are always in one split.
        source: where the clip is from (a file name, or the renderer and its seed).
        num_frames: video frames F.
        size_px: side of the square frames in pixels.
        split: ``train``, ``val`` or ``test``.
        crop_box: ``[x, y, w, h]`` in pixels of the source video, or None.
        fps: frames per second, 25.
        sample_rate_hz: of the audio, 16000.
        quality: scores by name.
        mouth_opening: F values in [0, 1] (0 = lips touch), or None where unknown.
        landmarks: None, or centre points of ``mouth``, ``left_eye`` and ``right_eye``, each F x
            [x, y] in fractions of the image side (x right, y down).
        speech: optional: text, language, voice, words_per_minute, pitch.
    """

    clip_id: str
    identity: str
    source: str
    num_frames: int
    size_px: int
    split: str
    crop_box: Sequence[float] | None = None
    fps: int = FPS
    sample_rate_hz: int = SAMPLE_RATE
    quality: Mapping[str, float] = field(default_factory=dict)
    mouth_opening: Sequence[float] | None = None
    landmarks: Mapping[str, Sequence[Sequence[float]]] | None = None
    speech: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        _check_row(self, f"sidecar of {self.clip_id}")
        if self.mouth_opening is not None and len(self.mouth_opening) != self.num_frames:
            raise UserError(
                f"sidecar of {self.clip_id}: expected mouth_opening of {self.num_frames} values "
                "(num_frames), "
                f"got {len(self.mouth_opening)}: remake the clip"
            )
        if self.landmarks is not None:
            lengths = {name: len(self.landmarks.get(name, ())) for name in LANDMARKS}
            if set(lengths.values()) != {self.num_frames}:
                raise UserError(
                    f"sidecar of {self.clip_id}: expected landmarks {', '.join(LANDMARKS)} of "
                    f"{self.num_frames} points "
                    f"each, got {lengths}: remake the clip"
                )

    def to_json(self) -> str:
        """One line of JSON; arrays (numpy's too) as lists, numbers rounded to 4 decimals."""
        return (
            json.dumps(
                {f.name: rounded(getattr(self, f.name)) for f in fields(self)}, ensure_ascii=False
            )
            + "\n"
        )

    @classmethod
    def from_json(cls, text: str, name: str = "sidecar") -> Sidecar:
        """Parse `to_json`'s text; ``name`` is used in errors. Unknown keys are ignored. Raises
        UserError.
        """
        return cls(**_parse(cls, text, name))


@dataclass(frozen=True)
class ManifestRow:
    """One clip of manifest.jsonl; ``sha256`` is that of the mp4 file (hex)."""

    clip_id: str
    identity: str
    split: str
    num_frames: int
    size_px: int
    sha256: str

    def __post_init__(self) -> None:
        _check_row(self, f"manifest row {self.clip_id}")


def clip_path(root: PathLike, clip_id: str) -> Path:
    """``<root>/clips/<clip_id>.mp4``."""
    return Path(root) / "clips" / f"{clip_id}.mp4"


def sidecar_path(root: PathLike, clip_id: str) -> Path:
    """``<root>/clips/<clip_id>.json``."""
    return Path(root) / "clips" / f"{clip_id}.json"


def manifest_path(root: PathLike) -> Path:
    """``<root>/manifest.jsonl``."""
    return Path(root) / "manifest.jsonl"


def write_sidecar(root: PathLike, sidecar: Sidecar) -> Path:
    """Write ``<root>/clips/<clip_id>.json``. Write the mp4 first: a clip with a sidecar counts as
    complete.
    """
    path = sidecar_path(root, sidecar.clip_id)
    write_text_atomic(path, sidecar.to_json())
    return path


def read_sidecar(root: PathLike, clip_id: str) -> Sidecar:
    """Read the sidecar of one clip; UserError when it is absent or malformed."""
    path = sidecar_path(root, clip_id)
    return Sidecar.from_json(_read_text(path, f"sidecar {path}"), str(path))


def is_complete(root: PathLike, clip_id: str) -> bool:
    """Whether both files of a clip exist (a resumed `rest synthesize` skips these)."""
    return clip_path(root, clip_id).is_file() and sidecar_path(root, clip_id).is_file()


def complete_clip_ids(root: PathLike) -> list[str]:
    """Sorted ids of the clips whose two files exist."""
    folder = Path(root) / "clips"
    return sorted(
        p.stem
        for p in folder.glob("*.json")
        if not p.name.startswith(".") and is_complete(root, p.stem)
    )


def manifest_row(root: PathLike, sidecar: Sidecar) -> ManifestRow:
    """The manifest row of a finished clip; reads the mp4 for its checksum."""
    return ManifestRow(
        clip_id=sidecar.clip_id,
        identity=sidecar.identity,
        split=sidecar.split,
        num_frames=sidecar.num_frames,
        size_px=sidecar.size_px,
        sha256=sha256_of(clip_path(root, sidecar.clip_id)),
    )


def write_manifest(root: PathLike, rows: Iterable[ManifestRow]) -> Path:
    """Write manifest.jsonl, sorted by clip id; UserError when an identity is in two splits or an id
    comes twice.
    """
    rows = sorted(rows, key=lambda row: row.clip_id)
    check_rows(rows, str(manifest_path(root)))
    path = manifest_path(root)
    write_text_atomic(
        path, "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
    )
    return path


def read_manifest(root: PathLike, split: str | None = None) -> list[ManifestRow]:
    """Rows of ``<root>/manifest.jsonl``, those of one ``split`` if given.

    Raises:
        UserError: no such folder or manifest, unknown layout version, malformed row, identity in
            two splits.
    """
    path = manifest_path(root)
    if not path.is_file():
        came = "a folder without it" if Path(root).is_dir() else "no such folder"
        raise UserError(f"expected prepared clips with {path}, got {came}: {WAY_OUT}")
    read_dataset_json(root)
    rows = []
    for number, line in enumerate(_read_text(path, str(path)).splitlines(), 1):
        if line.strip():
            rows.append(ManifestRow(**_parse(ManifestRow, line, f"{path} line {number}")))
    check_rows(rows, str(path))
    if not rows:
        raise UserError(f"expected at least one clip in {path}, got an empty manifest: {WAY_OUT}")
    return [row for row in rows if split is None or row.split == split]


def check_rows(rows: Iterable[ManifestRow], name: str = "manifest") -> None:
    """UserError when a clip id comes twice or when an identity is in more than one split."""
    split_of: dict[str, str] = {}
    seen: set[str] = set()
    for row in rows:
        if row.clip_id in seen:
            raise UserError(
                f"{name}: expected every clip once, got {row.clip_id} twice: remake the manifest"
            )
        seen.add(row.clip_id)
        if split_of.setdefault(row.identity, row.split) != row.split:
            raise UserError(
                f"{name}: expected identity-disjoint splits, got {row.identity} in "
                f"{split_of[row.identity]} and "
                f"{row.split}: move its clips to one split"
            )


def write_dataset_json(root: PathLike, info: Mapping[str, Any]) -> Path:
    """Write dataset.json: ``info`` (how the set was made: command, seed, counts) plus the layout
    version.
    """
    path = Path(root) / "dataset.json"
    content = {
        **rounded(dict(info)),
        "layout_version": LAYOUT_VERSION,
        "fps": FPS,
        "sample_rate_hz": SAMPLE_RATE,
    }
    write_text_atomic(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return path


def read_dataset_json(root: PathLike) -> dict[str, Any]:
    """Content of dataset.json; UserError when it is absent, malformed or of another layout
    version.
    """
    path = Path(root) / "dataset.json"
    if not path.is_file():
        raise UserError(f"expected {path} beside the manifest, got none: {WAY_OUT}")
    content = _parse_object(_read_text(path, str(path)), str(path))
    version = content.get("layout_version")
    if version != LAYOUT_VERSION:
        raise UserError(
            f"{path}: expected layout version {LAYOUT_VERSION}, got {version!r}: {WAY_OUT}"
        )
    return content


def finish_dataset(
    root: PathLike, info: Mapping[str, Any], clip_ids: Iterable[str] | None = None
) -> list[ManifestRow]:
    """Write manifest.jsonl and dataset.json from the complete clips of ``root`` (or from
    ``clip_ids``).
    """
    ids = complete_clip_ids(root) if clip_ids is None else list(clip_ids)
    rows = [manifest_row(root, read_sidecar(root, clip_id)) for clip_id in ids]
    counts = {split: sum(row.split == split for row in rows) for split in SPLITS}
    write_dataset_json(root, {**info, "num_clips": len(rows), "num_clips_per_split": counts})
    write_manifest(root, rows)  # last: a folder with a manifest is a finished one
    return rows


def split_of_identity(
    identity: str, val_fraction: float, test_fraction: float, seed: int = 0
) -> str:
    """A split drawn from a hash of the identity's name: stable when clips are added, disjoint by
    construction.
    """
    digest = hashlib.sha256(f"{seed}/{identity}".encode()).digest()
    draw = int.from_bytes(digest[:8], "big") / 2**64
    if draw < test_fraction:
        return "test"
    return "val" if draw < test_fraction + val_fraction else "train"


def _check_row(row: Sidecar | ManifestRow, name: str) -> None:
    if not isinstance(row.clip_id, str) or not _CLIP_ID.fullmatch(row.clip_id):
        raise UserError(
            f"{name}: expected a clip_id of letters, digits, '.', '_' and '-', got "
            f"{row.clip_id!r}: rename the clip"
        )
    if row.split not in SPLITS:
        raise UserError(
            f"{name}: expected split {', '.join(SPLITS)}, got {row.split!r}: correct it"
        )
    for key, value in (("num_frames", row.num_frames), ("size_px", row.size_px)):
        if not isinstance(value, int) or value < 1:
            raise UserError(
                f"{name}: expected {key} as a whole number above 0, got {value!r}: remake the clip"
            )


def _read_text(path: Path, name: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"expected {name}, got no such file: {WAY_OUT}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"expected to read {name}, got {error}: {WAY_OUT}") from None


def _parse_object(text: str, name: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{name}: expected JSON, got {error}: remake it") from None
    if not isinstance(content, dict):
        raise UserError(f"{name}: expected a JSON object, got {type(content).__name__}: remake it")
    return content


def _parse(cls: type[Sidecar] | type[ManifestRow], text: str, name: str) -> dict[str, Any]:
    """The fields of ``cls`` in a JSON object; every field must be there but Sidecar's
    ``speech``.
    """
    content = _parse_object(text, name)
    known = [f.name for f in fields(cls)]
    missing = [key for key in known if key not in content and key != "speech"]
    if missing:
        raise UserError(
            f"{name}: expected the keys {', '.join(known)}, got none for "
            f"{', '.join(missing)}: {WAY_OUT}"
        )
    return {key: content[key] for key in known if key in content}
