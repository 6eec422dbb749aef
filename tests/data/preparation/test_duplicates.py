"""Duplicates are found among clips that were really encoded again, and clips of one session are not
taken for them.
"""

from __future__ import annotations

import itertools
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rest_lightning.constants import SAMPLES_PER_FRAME
from rest_lightning.data.preparation.duplicates import (
    MAX_SOUND_DISTANCE,
    mark_duplicates,
    phash,
    sound_hash,
)
from rest_lightning.data.preparation.options import PrepareOptions
from rest_lightning.data.preparation.rows import Row
from rest_lightning.media.video import read_clip_audio, read_frames

OPTIONS = PrepareOptions()


def row(source: str, **changes: Any) -> Row:
    plain = Row(
        source=source, clip_id=source.split(".")[0], status="kept", stage="encode", num_frames=100
    )
    plain = replace(plain, box=[0, 0, 200, 200], start_s=0.0, phash="0" * 16, sound_hash="0" * 16)
    return replace(plain, **changes)


def pictures_of(seed: int, num_frames: int) -> np.ndarray:
    """Coloured patches in slow motion, uint8 (F, 64, 64, 3); a smooth picture has no bits to
    compare.
    """
    patches = np.random.default_rng(seed).integers(0, 255, (12, 12, 3), dtype=np.uint8)
    still = np.asarray(Image.fromarray(patches).resize((64, 64), Image.Resampling.BICUBIC))
    return np.stack([np.roll(still, f // 8, axis=1) for f in range(num_frames)])


def distance(one: str | None, other: str | None) -> int:
    assert one is not None and other is not None
    return (int(one, 16) ^ int(other, 16)).bit_count()


def flipped(digits: str, bits: list[int]) -> str:
    return f"{int(digits, 16) ^ sum(1 << bit for bit in bits):016x}"


def dropped(rows: list[Row]) -> set[str | None]:
    return {each.clip_id for each in rows if each.status == "dropped"}


@pytest.mark.parametrize("seed", range(6))
def test_picture_hash_is_opencvs(make: Any, seed: int) -> None:
    """OpenCV reduces pictures in another way, so the same 32 x 32 grey picture goes to both."""
    cv2 = pytest.importorskip("cv2")
    if not hasattr(cv2, "img_hash"):
        pytest.skip("this OpenCV has no img_hash")
    grey = np.asarray(Image.fromarray(make.frames(9, 64, seed)[seed]).convert("L").resize((32, 32)))
    theirs = cv2.img_hash.PHash.create().compute(grey)[0]
    # a byte per row, the lowest bit on the left
    bits = [[byte >> i & 1 for i in range(8)] for byte in theirs]
    assert phash(np.repeat(grey[..., None], 3, axis=2)) == np.packbits(bits).tobytes().hex()


def test_clips_encoded_again_are_found(make: Any, tmp_path: Path) -> None:
    """The same talk in another size, worse quality, another level, cut a frame later, against other
    talks.
    """
    num_frames, rows = 113, []
    for seed, (size_px, crf, late) in enumerate(
        [(64, 30, 0), (32, 20, 1), (48, 34, 0), (96, 24, 1)]
    ):
        frames, audio = (
            pictures_of(seed, num_frames + 1),
            make.speech((num_frames + 1) * SAMPLES_PER_FRAME, seed),
        )
        resized = np.stack(
            [np.asarray(Image.fromarray(frame).resize((size_px, size_px))) for frame in frames]
        )
        variants = [
            ("first", frames[:-1], audio, 12),
            ("again", resized[late:][:num_frames], 0.4 * audio, crf),
        ]
        for name, pictures, samples, quality in variants:
            path = tmp_path / f"{seed}-{name}.mp4"
            first = late * SAMPLES_PER_FRAME if name == "again" else 0
            make.mp4(path, pictures, samples[first:][: num_frames * SAMPLES_PER_FRAME], crf=quality)
            picture, sound = (
                read_frames(path, num_frames // 2, 1)[0],
                read_clip_audio(path, num_frames),
            )
            side = 200 if name == "first" else 100
            found = row(path.name, num_frames=num_frames, box=[3, 4, side, side])
            rows.append(replace(found, phash=phash(picture), sound_hash=sound_hash(sound)))
    for one, other in itertools.combinations(rows, 2):
        same = one.source[0] == other.source[0]
        assert (distance(one.sound_hash, other.sound_hash) <= MAX_SOUND_DISTANCE) == same
        assert not same or distance(one.phash, other.phash) <= OPTIONS.max_duplicate_distance
    assert dropped(mark_duplicates(rows, OPTIONS)) == {f"{seed}-again" for seed in range(4)}


def test_one_session_is_not_full_of_duplicates(make: Any) -> None:
    """A person before a wall, filmed all day: the same picture, the same length, other words."""
    frame = make.frames(2, 64)[0]
    speech = make.speech(20 * 100 * SAMPLES_PER_FRAME).reshape(20, -1)
    rows = [
        row(
            "day.mp4",
            clip_id=f"clip{i}",
            start_s=4.0 * i,
            phash=phash(frame),
            sound_hash=sound_hash(samples),
        )
        if i % 2
        else row(f"take{i}.mp4", phash=phash(frame), sound_hash=sound_hash(samples))
        for i, samples in enumerate(speech)
    ]
    assert not dropped(mark_duplicates(rows, OPTIONS))
    again = replace(rows[7], source="upload.mp4", clip_id="upload")
    assert dropped(mark_duplicates([again, *rows], OPTIONS)) == {"upload"}


def test_silence_has_no_sound_hash(make: Any) -> None:
    assert sound_hash(np.zeros(16_000, np.float32)) is None
    assert sound_hash(make.speech(1000)) is None
    speech = make.speech(48_000)
    assert sound_hash(speech) == sound_hash(0.01 * speech) is not None
    mute = [
        row("a.mp4", clip_id="a0", sound_hash=None),
        row("a.mp4", clip_id="a1", start_s=9.0, sound_hash=None),
        row("b.mp4", sound_hash=None),
        row("c.mp4"),
    ]
    assert dropped(mark_duplicates(mute, OPTIONS)) == {"b"}, (
        "of another video, and of the same silence alone"
    )


@pytest.mark.parametrize(
    ("changes", "is_duplicate"),
    [
        # one bit in six of the seven pieces
        ({"phash": flipped("0" * 16, [0, 9, 18, 27, 36, 63])}, True),
        ({"phash": flipped("0" * 16, [0, 9, 18, 27, 36, 45, 63])}, False),
        ({"phash": flipped("0" * 16, [58, 59, 60, 61, 62, 63])}, True),
        ({"sound_hash": flipped("0" * 16, list(range(12)))}, True),
        ({"sound_hash": flipped("0" * 16, list(range(13)))}, False),
        ({"num_frames": 103}, True),
        ({"num_frames": 104}, False),
        ({"status": "failed", "reason": "broken"}, False),
        ({"phash": None}, False),
    ],
)
def test_thresholds(changes: dict[str, Any], is_duplicate: bool) -> None:
    rows = [row("a.mp4"), replace(row("b.mp4"), **changes)]
    marked = mark_duplicates(rows, OPTIONS)
    assert bool(dropped(marked)) == is_duplicate
    if not is_duplicate:
        assert marked == rows


def test_the_best_stays_in_any_order_and_at_every_call() -> None:
    rows = [
        row("small.mp4", box=[0, 0, 90, 90]),
        row("z.mp4", box=[9, 9, 300, 300]),
        row("b.mp4", box=[0, 0, 300, 300]),
        row("short.mp4", box=[0, 0, 300, 300], num_frames=99),
        row("other.mp4", sound_hash="f" * 16),
    ]
    expected = {each.source: each for each in mark_duplicates(rows, OPTIONS)}
    assert {source for source, each in expected.items() if each.status == "kept"} == {
        "b.mp4",
        "other.mp4",
    }
    worst = expected["small.mp4"]
    assert (worst.stage, worst.filter) == ("filter", "duplicate")
    assert worst.reason == "the same picture, sound and length as clip b of b.mp4"
    for seed in range(8):
        shuffled = random.Random(seed).sample(rows, len(rows))
        once = mark_duplicates(shuffled, OPTIONS)
        assert {each.source: each for each in once} == expected
        assert [each.source for each in once] == [each.source for each in shuffled]
        assert mark_duplicates(once, OPTIONS) == once
    better = row("best.mp4", box=[0, 0, 400, 400])
    later = {each.source: each for each in mark_duplicates([*expected.values(), better], OPTIONS)}
    assert {source for source, each in later.items() if each.status == "kept"} == {
        "best.mp4",
        "other.mp4",
    }


def test_many_clips_equal_a_comparison_of_all_pairs() -> None:
    """1,500 clips around 40 pictures and 10 sounds: each against each, by their definition."""
    rng = random.Random(1)
    pictures, sounds = ([f"{rng.getrandbits(64):016x}" for _ in range(n)] for n in (40, 10))

    def near(digits: str, most: int) -> str:
        return flipped(digits, rng.sample(range(64), rng.randrange(most)))

    rows = [
        row(
            f"v{i:04d}.mp4",
            num_frames=rng.choice((50, 53, 200, 204, 205)),
            phash=near(rng.choice(pictures), 6),
            sound_hash=near(rng.choice(sounds), 9),
        )
        for i in range(1500)
    ]
    marked = {each.source: each.status for each in mark_duplicates(rows, OPTIONS)}
    kept: list[Row] = []
    for each in sorted(rows, key=lambda r: (-(r.num_frames or 0), r.source)):
        copies = any(
            distance(each.phash, other.phash) <= 6
            and distance(each.sound_hash, other.sound_hash) <= 12
            and (other.num_frames or 0) - (each.num_frames or 0)
            <= max(3, 0.02 * (each.num_frames or 0))
            for other in kept
        )
        assert marked[each.source] == ("dropped" if copies else "kept")
        kept += [] if copies else [each]
    assert 100 < len(kept) < 1400


def test_work_grows_with_the_clips_and_not_with_their_pairs() -> None:
    rng = random.Random(2)

    def seconds(count: int) -> float:
        rows = [
            row(
                f"{i}.mp4",
                num_frames=rng.randrange(75, 1500),
                phash=f"{rng.getrandbits(64):016x}",
                sound_hash=f"{rng.getrandbits(64):016x}",
            )
            for i in range(count)
        ]
        begin = time.process_time()
        assert not dropped(mark_duplicates(rows, OPTIONS))
        return time.process_time() - begin

    small, large = seconds(2000), seconds(16_000)
    assert large < 24 * small, "eight times the clips; all pairs would be 64 times the work"
