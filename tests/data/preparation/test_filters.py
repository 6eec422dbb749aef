"""Every score tells the clips that its filter is for from those that it is not for; the first
failure is the reason.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from rest_lightning.data.preparation.filters import RULES, first_failure
from rest_lightning.data.preparation.options import PrepareOptions
from rest_lightning.data.preparation.rows import FILTERS
from rest_lightning.data.preparation.scores import ClipScores, has_text, to_grey
from rest_lightning.data.preparation.tracks import FIELDS, Track, others_in_box
from rest_lightning.media.faces import hands_over

pytest.importorskip("cv2")
OPTIONS = PrepareOptions(size_px=256)
FACE = (46.0, 51.0, 164.0, 164.0)
GOOD = {
    "short": 97,
    "small": 100,
    "faces": 0,
    "profile": 0.1,
    "blur": 200,
    "motion": 0.5,
    "dark": 0.4,
    "hands": 0,
}
GOOD |= {"text": 0, "silence": 0.2, "sync": 1, "sync_confidence": 5}


@pytest.fixture(scope="module")
def portraits() -> list[np.ndarray]:
    """Rendered faces, 256x256."""
    pytest.importorskip("skia")
    from rest_lightning.data.synthetic.face import neutral_track, render_clip
    from rest_lightning.data.synthetic.identity import sample_identity

    people = [sample_identity(np.random.default_rng(seed)) for seed in range(6)]
    return [render_clip(person, neutral_track(), 256).frames[0] for person in people]


def scored(frames: list[np.ndarray]) -> dict[str, float]:
    scores = ClipScores(OPTIONS, None)
    for frame in frames:
        scores.add(frame, FACE)
    return scores.result()


@pytest.mark.parametrize("size_px", [128, 256, 512])
def test_blur_does_not_depend_on_the_size(portraits: list[np.ndarray], size_px: int) -> None:
    face = tuple(v * size_px / 256 for v in FACE)
    for pixels in portraits:
        image = Image.fromarray(pixels).resize((size_px, size_px), Image.Resampling.LANCZOS)
        values = []
        for sigma in (0.0, 5.0):
            scores = ClipScores(OPTIONS, None)
            scores.add(
                np.asarray(image.filter(ImageFilter.GaussianBlur(sigma * size_px / 256))), face
            )  # type: ignore[arg-type]
            values.append(scores.result()["blur"])
        assert OPTIONS.min_sharpness is not None
        assert values[0] > 2 * OPTIONS.min_sharpness > OPTIONS.min_sharpness > values[1]


def test_enlarged_faces_are_less_sharp(portraits: list[np.ndarray]) -> None:
    for pixels in portraits:
        small = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BOX)
        enlarged = np.asarray(small.resize((256, 256), Image.Resampling.BICUBIC))
        assert scored([enlarged])["blur"] < 0.25 * scored([pixels])["blur"]


@pytest.mark.parametrize(
    ("text", "fill", "ground", "size_px", "top_px"),
    [
        ("and this is a line of subtitles", "white", (0, 0, 0), 14, 215),
        ("BREAKING NEWS FROM LONDON", "white", (180, 0, 0), 14, 215),
        ("a line of dark text below", "black", (250, 250, 250), 14, 205),
        ("two words and more", "yellow", (20, 20, 20), 20, 222),
    ],
)
def test_text_is_seen_where_it_is(
    portraits: list[np.ndarray], text: str, fill: str, ground: Any, size_px: int, top_px: int
) -> None:
    font: Any = ImageFont.load_default(size_px)
    seen = []
    for pixels in portraits:
        image = Image.fromarray(pixels)
        draw = ImageDraw.Draw(image)
        draw.rectangle((0, top_px - 3, 256, top_px + size_px + 4), fill=ground)
        draw.text((128 - draw.textlength(text, font=font) / 2, top_px), text, fill=fill, font=font)
        seen.append(has_text(to_grey(np.asarray(image))))
    assert all(seen)
    assert not any(has_text(to_grey(pixels)) for pixels in portraits)


def test_motion_darkness_and_repeats(portraits: list[np.ndarray]) -> None:
    still = portraits[0]
    shaken = [np.roll(still, (12 * (i % 2), 15 * (i % 3)), (0, 1)) for i in range(6)]
    assert scored([still] * 3)["motion"] < 0.1
    assert scored(shaken)["motion"] > 4 > scored([np.roll(still, i, 1) for i in range(4)])["motion"]
    assert scored([(still * 0.15).astype(np.uint8)])["dark"] < 0.12 < scored([still])["dark"]
    scores = ClipScores(OPTIONS, None)
    scores.add(still, FACE)
    scores.repeat()
    assert scores.result() == scored([still, still]) | {
        "motion": 0.0,
        "text": scores.result()["text"],
    }


def test_hands_cover_a_face_with_a_finger() -> None:
    face = (100.0, 100.0, 50.0, 60.0)
    away = np.stack([np.linspace(0, 90, 21), np.linspace(0, 90, 21)], axis=1)
    over = away.copy()
    over[:3] = [(110, 110), (120, 130), (149, 159)]
    assert not hands_over([], face) and not hands_over([away], face)
    assert hands_over([away, over], face)
    over[0] = (151, 110)
    assert not hands_over([over], face)


def track(x: float, num_frames: int, start: int = 0, nose: float = 0.5) -> Track:
    """A face of 100 pixels at x, 50, whose nose is at this share of the way from eye to eye."""
    one = [
        x,
        50,
        100,
        100,
        x,
        50,
        x + 100,
        150,
        x + 30,
        90,
        x + 70,
        90,
        x + 50,
        125,
        x + 30 + 40 * nose,
        105,
    ]
    return Track(start, np.tile(np.array(one, np.float32), (num_frames, 1)))


def test_scores_of_tracks() -> None:
    assert len(FIELDS) == track(0, 1).values.shape[1]
    assert track(0, 9).profile() == pytest.approx(0.0)
    assert track(0, 9, nose=1.25).profile() == pytest.approx(0.75)
    assert track(0, 9).face_px() == 100
    box = (0.0, 0.0, 200.0, 200.0)
    first, near, far = track(50, 10), track(150, 4, start=8), track(400, 10)
    assert others_in_box(first, box, [first, near, far]) == pytest.approx(0.2)
    assert others_in_box(first, box, [first, far]) == 0


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.option)
def test_every_rule_fails_at_its_threshold_and_not_before(rule: Any) -> None:
    options = PrepareOptions(min_sync_confidence=2.0)
    limit = float(getattr(options, rule.option))
    name = "sync_confidence" if rule.option == "min_sync_confidence" else rule.filter
    assert first_failure(GOOD, options) is None and rule.filter in FILTERS
    assert first_failure(GOOD | {name: limit}, options) is None
    worse = limit * 1.01 + 0.001 if rule.kind == "max" else limit * 0.99 - 0.001
    failure = first_failure(GOOD | {name: worse}, options)
    assert failure is not None and failure[0] == rule.filter
    assert rule.option in failure[1] and f"{limit:g}" in failure[1] and "\n" not in failure[1]
    if rule.option != "min_frames":  # the only one that cannot be switched off
        off = PrepareOptions(**{**vars(options), rule.option: None})
        assert first_failure(GOOD | {name: worse}, off) is None


def test_the_first_failure_is_the_reason() -> None:
    failure = first_failure(GOOD | {"dark": 0.0, "silence": 1.0, "small": 3.0}, OPTIONS)
    assert failure is not None and failure[0] == "small"
    assert first_failure({}, OPTIONS) is None
