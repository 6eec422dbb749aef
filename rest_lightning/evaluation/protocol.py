"""Protocols: what is measured on how many clips of which length, and through which networks. Needs
no torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from rest_lightning.config import find_config, read_dataclass, read_yaml
from rest_lightning.constants import FPS
from rest_lightning.errors import UserError

MEASURES = ("fid", "fvd", "fvd_videomae", "sync", "e_fid", "identity", "talking")
PIECEWISE = ("fid", "e_fid", "identity", "talking")  # a video of any length in bounded memory
FACES = ("prepared", "sidecar", "mediapipe")
MAX_WHOLE_FRAMES = 3000  # two minutes: what the measures that need a whole clip may hold


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
    """Returns a protocol of ``configs/protocol`` by its name, or that of a file.

    Raises:
        UserError: no such file, an unknown key, a value of another kind.
    """
    path = find_config(name, "protocol", what="a protocol")
    return read_dataclass(Protocol, read_yaml(path), str(path))
