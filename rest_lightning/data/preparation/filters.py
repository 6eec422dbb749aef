"""Which clips stay: one threshold per score, asked in a fixed order; the first that fails is the
reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from rest_lightning.data.preparation.options import PrepareOptions


class Rule(NamedTuple):
    """A filter: its score must be at most, or at least, the option's value."""

    filter: str
    option: str
    kind: Literal["max", "min"]
    what: str


RULES = (
    Rule("short", "min_frames", "min", "frames"),
    Rule("small", "min_face_px", "min", "pixels of face"),
    Rule("faces", "max_other_faces", "max", "of the frames with another face in the box"),
    Rule("profile", "max_profile", "max", "eye distances from the nose to the middle"),
    Rule("blur", "min_sharpness", "min", "as variance of the Laplacian"),
    Rule("motion", "max_flow", "max", "percent of the side as optical flow"),
    Rule("still", "max_still_s", "max", "s without any movement"),
    Rule("dark", "min_brightness", "min", "of full brightness"),
    Rule("hands", "max_hands", "max", "of the frames with a hand over the face"),
    Rule("text", "max_text", "max", "of the frames with text in the lower third"),
    Rule("silence", "max_silence", "max", "of the clip silent"),
    Rule("sync", "max_offset_frames", "max", "frames between sound and lips"),
    Rule("sync", "min_sync_confidence", "min", "as confidence of the sync"),
)
_SCORE_OF = {"min_sync_confidence": "sync_confidence"}
EARLY = ("short", "small", "faces", "profile")
"""Known from the track alone: such clips are not encoded."""


def score_of_rule(rule: Rule) -> str:
    """Name of the score that a rule asks."""
    return _SCORE_OF.get(rule.option, rule.filter)


def first_failure(
    scores: Mapping[str, float], options: PrepareOptions, only: tuple[str, ...] | None = None
) -> tuple[str, str] | None:
    """Filter and one-line reason of the first rule that a clip breaks; None for a clip to keep.

    A score that was not taken breaks nothing.

    Args:
        scores: by name.
        options: the thresholds; None is off.
        only: ask these filters alone.
    """
    for rule in RULES:
        limit = getattr(options, rule.option)
        score = scores.get(score_of_rule(rule))
        if limit is None or score is None or (only is not None and rule.filter not in only):
            continue
        if score > limit if rule.kind == "max" else score < limit:
            bound = "at most" if rule.kind == "max" else "at least"
            return rule.filter, (
                f"expected {bound} {limit:g} {rule.what} ({rule.option}), got {score:.4g}"
            )
    return None
