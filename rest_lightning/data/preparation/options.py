"""What a person may choose about a preparation, in one frozen class that YAML files and the command
line fill.
"""

from __future__ import annotations

import types
import typing
from dataclasses import dataclass, fields
from typing import Any, Literal

from rest_lightning.errors import UserError

SIZES_PX = (128, 256, 512)
FINISHING = (
    "identity_rule",
    "identity_map",
    "val_fraction",
    "test_fraction",
    "max_duplicate_distance",
)
"""Read when all videos are done: a change of these redoes no video."""


@dataclass(frozen=True)
class PrepareOptions:
    """Sizes, thresholds and rules.

    None as a threshold switches its filter off; the score is stored all the same.

    Attributes:
        size_px: side of the clips: 128, 256 or 512.
        crf: constant rate factor of x264.
        detector: mediapipe, or package.module:Class, the import path of a FaceDetector.
        min_confidence: of a detection, 0 to 1.
        detection_px: longer side of the frames that faces are looked for in.
        box: ``[x, y, w, h]`` in pixels of the upright source: no faces are looked for, this square
            is every clip.
        already_cropped: the largest centred square is every clip, no faces are looked for.
        margin: added on every side of the landmarks' extremes, as a share of their larger side.
        margin_top: added above them in place of ``margin``: landmarks end at the brows' height of
            the forehead.
        min_frames, max_frames: of a clip; longer tracks are cut into equal parts of at most
            ``max_frames``.
        max_gap_frames: a face may be lost for so long within a track.
        min_iou: overlap of the boxes of one face in consecutive frames.
        min_fps: videos with fewer frames per second on average are refused.
        max_gap_s: frames further apart than this are a hole in the video, where clips end.
        scene_threshold: least difference of two frames at a scene cut, of 255.
        scene_ratio: how many times the differences around it a cut has.
        min_face_px: filter ``small``: larger side of the landmarks' extremes, in source pixels,
            median over the clip.
        max_other_faces: filter ``faces``: share of frames in which another face reaches into the
            box.
        max_profile: filter ``profile``: distance of the nose from the middle between the eyes, in
            eye distances, 90th percentile: 0 is frontal, about 0.6 a head turned by 45 degrees.
        min_sharpness: filter ``blur``: variance of the Laplacian of the grey face at 64x64, median.
        max_flow: filter ``motion``: mean optical flow per frame, in percent of the side, 95th
            percentile.
        max_still_s: filter ``still``: longest stretch without any movement in the crop, in seconds
            (a frozen picture, a photograph under speech).
        min_brightness: filter ``dark``: mean luma of the crop, 0 to 1.
        max_hands: filter ``hands``: share of looked-at frames with a hand over the face.
        max_text: filter ``text``: share of looked-at frames with a line of text in the lower third.
        max_silence: filter ``silence``: share of the clip below ``silence_db``; 1 where there is no
            sound.
        silence_db: loudness of a frame's sound, dB of full scale, below which it is silence.
        sync_weights: filter ``sync``: a file of published SyncNet weights, ``published``,
            ``embedded``, or None.
        max_offset_frames: of sound against lips.
        min_sync_confidence: below it the offset means nothing, and the filter ``sync`` drops the
            clip.
        look_every_frames: hands and text are looked for in every so many frames.
        max_duplicate_distance: bits in which two hashes of duplicates may differ, 0 to 32; None
            keeps duplicates.
        keep_dropped: write the clips that a filter drops too; they stay out of manifest.jsonl.
        identity_rule, identity_map, val_fraction, test_fraction: who is seen, and the splits.
    """

    size_px: int = 256
    crf: int = 16
    detector: str = "mediapipe"
    min_confidence: float = 0.5
    detection_px: int = 960
    box: tuple[float, float, float, float] | None = None
    already_cropped: bool = False
    margin: float = 0.2
    margin_top: float = 0.35
    min_frames: int = 97
    max_frames: int = 750
    max_gap_frames: int = 5
    min_iou: float = 0.4
    min_fps: float = 10.0
    max_gap_s: float = 2.0
    scene_threshold: float = 18.0
    scene_ratio: float = 3.0
    min_face_px: float | None = 64.0
    max_other_faces: float | None = 0.1
    max_profile: float | None = 0.5
    min_sharpness: float | None = 30.0
    max_flow: float | None = 4.0
    max_still_s: float | None = 3.0
    min_brightness: float | None = 0.12
    max_hands: float | None = 0.1
    max_text: float | None = 0.3
    max_silence: float | None = 0.9
    silence_db: float = -50.0
    sync_weights: str | None = None
    max_offset_frames: float | None = 3.0
    min_sync_confidence: float | None = None
    look_every_frames: int = 5
    max_duplicate_distance: int | None = 6
    keep_dropped: bool = False
    identity_rule: Literal["auto", "hdtf", "mead", "file"] = "auto"
    identity_map: str | None = None
    val_fraction: float = 0.05
    test_fraction: float = 0.0

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in fields(self):
            object.__setattr__(
                self, field.name, _checked(field.name, getattr(self, field.name), hints[field.name])
            )
        if self.size_px not in SIZES_PX:
            raise UserError(
                f"expected size_px of 128, 256 or 512, got {self.size_px}: choose one of them"
            )
        if self.box is not None and (
            min(self.box[:2]) < 0 or min(self.box[2:]) < 16 or self.box[2] != self.box[3]
        ):
            raise UserError(
                f"expected a square box x,y,w,h of at least 16 pixels, got {self.box}: correct it"
            )
        if self.box is not None and self.already_cropped:
            raise UserError("expected box or already_cropped, got both: give one of them")
        if not 1 <= self.min_frames <= self.max_frames:
            raise UserError(
                f"expected 1 <= min_frames <= max_frames, got {self.min_frames} and "
                f"{self.max_frames}: correct them"
            )
        positive = (
            "detection_px",
            "look_every_frames",
            "max_gap_s",
            "scene_ratio",
            "scene_threshold",
        )
        for name in positive:
            if getattr(self, name) <= 0:
                raise UserError(
                    f"expected {name} above 0, got {getattr(self, name)}: leave it "
                    "out "
                    "for its default"
                )
        for name in ("margin", "margin_top", "max_gap_frames"):
            if getattr(self, name) < 0:
                raise UserError(
                    f"expected {name} of at least 0, got {getattr(self, name)}: leave it out"
                )
        bits = self.max_duplicate_distance
        if bits is not None and not 0 <= bits <= 32:
            raise UserError(
                f"expected max_duplicate_distance of 0 to 32 bits, got {bits}: null keeps "
                "duplicates, 6 is the default"
            )
        if (
            self.val_fraction < 0
            or self.test_fraction < 0
            or self.val_fraction + self.test_fraction > 1
        ):
            raise UserError(
                "expected val_fraction and test_fraction of 0 to 1 together, "
                f"got {self.val_fraction} and {self.test_fraction}: use 0.05 and 0"
            )

    @property
    def finds_faces(self) -> bool:
        """Whether a detector runs."""
        return self.box is None and not self.already_cropped


def _checked(name: str, value: Any, hint: Any) -> Any:
    """``value`` as its type: whole numbers pass as floats, lists as tuples; anything else is a
    mistake.
    """
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    kind = next(kind for kind in kinds if kind is not type(None))
    if typing.get_origin(kind) is tuple:
        num = len(typing.get_args(kind))
        if (
            isinstance(value, (list, tuple))
            and len(value) == num
            and all(_is_number(item) for item in value)
        ):
            return tuple(float(item) for item in value)
        raise UserError(f"expected {name} of {num} numbers, got {value!r}: write [0, 0, 256, 256]")
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value in choices:
            return value
        raise UserError(
            f"expected {name} of {', '.join(choices)}, got {value!r}: choose one of them"
        )
    if kind is float and _is_number(value):
        return float(value)
    if type(value) is kind and kind is not float:  # not isinstance: True is no number
        return value
    raise UserError(f"expected {name} as {kind.__name__}, got {value!r}: correct it")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
