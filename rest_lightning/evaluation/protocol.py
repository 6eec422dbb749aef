"""Protocols: what is measured on how many clips of which length, and through which networks. Needs
no torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from rest_lightning.constants import FPS
from rest_lightning.errors import UserError

MEASURES = ("fid", "fvd", "fvd_videomae", "sync", "e_fid", "identity", "talking")
PIECEWISE = ("fid", "e_fid", "identity", "talking")  # a video of any length in bounded memory
FACES = ("prepared", "sidecar", "mediapipe")
MAX_WHOLE_FRAMES = 3000  # two minutes: what the measures that need a whole clip may hold
FOLDER = Path("configs") / "eval"
_CALLBACK = "Evaluation"


@dataclass(frozen=True)
class Protocol:
    """Everything that moves a number. Change one thing, raise ``version``.

    Attributes:
        name, version: of the rows.
        num_clips: so many of the true clips, in the order of their names.
        num_frames: frames of each, from the first one that a method generates.
        size_px: frames of another size are resized to it.
        measures: of ``fid``, ``fvd``, ``fvd_videomae``, ``sync``, ``e_fid``, ``identity`` and
            ``talking``.
        extractors: ``embedded``, ``published``, or a folder that the embedded networks' training
            wrote; a measure may have its own in ``extractors_of``.
        extractors_of: measure -> the same, or a file of published weights.
        faces: where the face of SyncNet's crops is: ``prepared`` (the clips are prepared ones,
            whose extractors know the mouth's place), ``sidecar`` (landmarks of the true clip) or
            ``mediapipe`` (found in every frame).
        min_clips: fewer usable clips are an error, not a row.
    """

    name: str
    version: int
    num_clips: int
    num_frames: int
    size_px: int
    measures: list[str] = field(
        default_factory=lambda: ["fid", "fvd", "sync", "e_fid", "identity", "talking"]
    )
    extractors: str = "embedded"
    extractors_of: dict[str, str] = field(default_factory=dict)
    faces: str = "prepared"
    min_clips: int = 2

    def __post_init__(self) -> None:
        for key in ("version", "num_clips", "num_frames", "size_px", "min_clips"):
            value = getattr(self, key)
            if not isinstance(value, int) or value < 1:
                raise UserError(
                    f"protocol {self.name}: expected {key} of at least 1, got {value!r}: correct it"
                )
        wrong = [
            measure for measure in (*self.measures, *self.extractors_of) if measure not in MEASURES
        ]
        if wrong or not self.measures:
            raise UserError(
                f"protocol {self.name}: expected measures of {', '.join(MEASURES)}, got "
                f"{(wrong or ['none'])[0]!r}: "
                "correct it"
            )
        if self.faces not in FACES:
            raise UserError(
                f"protocol {self.name}: expected faces of {', '.join(FACES)}, got {self.faces!r}: "
                "correct it"
            )
        whole = [measure for measure in self.measures if measure not in PIECEWISE]
        if whole and self.num_frames > MAX_WHOLE_FRAMES:
            raise UserError(
                f"protocol {self.name}: expected at most {MAX_WHOLE_FRAMES} frames with "
                f"{', '.join(whole)}, which hold "
                f"a whole clip, got {self.num_frames}: leave them out"
            )

    @property
    def fps(self) -> int:
        """Frames per second of every protocol."""
        return FPS

    def source_of(self, measure: str) -> str:
        """What ``load_extractor`` is given."""
        return self.extractors_of.get(measure, self.extractors)


def read_protocol(name: str | os.PathLike[str]) -> Protocol:
    """The protocol of a file under ``configs/eval``, by its stem or its path: what its evaluation
    callback is given.

    Raises:
        UserError: no such file, or one without a protocol.
    """
    path = find_protocol(name)
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"expected a protocol in {path}, got {' '.join(str(error).split())}: correct it"
        ) from None
    try:
        callbacks = content["trainer"]["callbacks"]
        named = (each for each in callbacks if each["class_path"].rsplit(".", 1)[-1] == _CALLBACK)
        (found,) = (each["init_args"]["protocol"] for each in named)
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"expected trainer.callbacks with one {_CALLBACK} and its protocol in {path}, got "
            f"none: see {FOLDER}"
        ) from None
    return make_protocol(found, str(path))


def make_protocol(content: dict[str, Any], name: str) -> Protocol:
    """A protocol from parsed YAML; ``name`` is used in errors."""
    known = {f.name for f in fields(Protocol)}
    if unknown := sorted(set(content) - known):
        raise UserError(
            f"{name}: expected the keys {', '.join(sorted(known))}, got {unknown[0]!r}: correct it"
        )
    needed = ("name", "version", "num_clips", "num_frames", "size_px")
    if missing := [key for key in needed if key not in content]:
        raise UserError(f"{name}: expected the key {missing[0]!r} of a protocol, got none: add it")
    return Protocol(**content)


def find_protocol(name: str | os.PathLike[str]) -> Path:
    """The file of a protocol, by its stem (in configs/eval) or its path; UserError when there is
    none.
    """
    name = os.fspath(name)
    if name.endswith((".yaml", ".yml")) or os.sep in name:
        if Path(name).is_file():
            return Path(name)
        raise UserError(f"expected a protocol file, but {name} does not exist: check the name")
    # In a checkout, wherever it was started from; an installed package has no configs/.
    folders = [FOLDER, Path(__file__).resolve().parents[2] / FOLDER]
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    raise UserError(
        f"expected a protocol ({', '.join(known) or 'none here'}), got {name!r}: name one, or give "
        "its file"
    )
