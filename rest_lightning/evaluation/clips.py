"""One row per clip beside a result row: where a method fails, and how sure its means are."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from rest_lightning.evaluation.leaderboard import METRICS
from rest_lightning.media.files import whole_file

SORT_ORDER = ("sync_c", "lip_correlation", "identity_similarity")
NUM_RESAMPLES = 2000
NUM_WORST = 8
NUM_THUMBNAILS, THUMBNAIL_PX, _CAPTION_PX = 6, 96, 22
ClipScores = Mapping[str, Any]
Frames = NDArray[np.uint8]


def sort_key(clips: Sequence[ClipScores]) -> str | None:
    """Returns the first of :data:`SORT_ORDER` that clips have."""
    return next((name for name in SORT_ORDER if any(name in clip for clip in clips)), None)


def worst_first(clips: Sequence[ClipScores]) -> list[ClipScores]:
    """Returns clips sorted by the first of :data:`SORT_ORDER` that they have: the worst one first,
    those without a number last.
    """
    key = sort_key(clips)
    if key is None:
        return list(clips)

    def place(clip: ClipScores) -> tuple[bool, float]:
        value = clip.get(key)
        return value is None, 0.0 if value is None else -METRICS[key].badness(value)

    return sorted(clips, key=place)


def intervals(
    clips: Sequence[ClipScores], share: float = 0.95, seed: int = 0
) -> dict[str, list[float]]:
    """Returns bootstrap confidence intervals of the means: clips are drawn again with replacement
    (percentile method: Efron, Ann. Statist. 7, 1979).

    Args:
        clips: scores of each; None where a number is not defined.
        share: of the means of resamples that an interval holds.
        seed: of the resamples.

    Returns:
        Metric -> [low, high]; only metrics that two clips or more have.
    """
    found: dict[str, list[float]] = {}
    for key in _columns(clips)[1:]:
        values = np.array([clip[key] for clip in clips if clip.get(key) is not None])
        if len(values) < 2:
            continue
        drawn = np.random.default_rng(seed).integers(len(values), size=(NUM_RESAMPLES, len(values)))
        means = values[drawn].mean(axis=1)
        found[key] = [float(v) for v in np.quantile(means, [(1 - share) / 2, (1 + share) / 2])]
    return found


def write_clips(clips: Sequence[ClipScores], row_file: Path) -> list[Path]:
    """Writes one row per clip beside a result row, the worst first: ``row.clips.csv``, and
    ``row.clips.parquet`` where pyarrow is installed.

    Returns:
        The files; none without clips.

    Raises:
        UserError: when the operating system refuses.
    """
    if not clips:
        return []
    names, rows = _columns(clips), worst_first(clips)
    written = [row_file.with_suffix(".clips.csv")]
    with whole_file(written[0]) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        return written
    table = pa.table({name: [row.get(name) for row in rows] for name in names})
    written.append(row_file.with_suffix(".clips.parquet"))
    with whole_file(written[1]) as temporary:
        parquet.write_table(table, temporary)
    return written


def thumbnails(generated: Frames, truth: Frames) -> Frames:
    """Returns frames of a generated and a true clip, uint8 (n, H, W, 3) each, as they are kept for
    :func:`write_worst`: uint8 (2, n, 96, 96, 3), the true ones first.
    """
    size = (THUMBNAIL_PX, THUMBNAIL_PX)
    small = [
        np.asarray(Image.fromarray(each).resize(size))
        for frames in (truth, generated)
        for each in frames
    ]
    return np.array(small, np.uint8).reshape(2, len(truth), *size, 3)


def write_worst(worst: Sequence[tuple[ClipScores, Frames]], row_file: Path) -> Path | None:
    """Draws thumbnails of the worst clips beside a result row, ``row.worst.png``: for each its name
    and score, frames of the true clip and below them those of the generated one.

    Args:
        worst: scores of a clip and its :func:`thumbnails`.
        row_file: file of the row.

    Returns:
        The picture; None without clips.

    Raises:
        UserError: when the operating system refuses.
    """
    if not worst:
        return None
    key = sort_key([clip for clip, _ in worst])
    height = _CAPTION_PX + 2 * THUMBNAIL_PX
    sheet = Image.new("RGB", (NUM_THUMBNAILS * THUMBNAIL_PX, height * len(worst)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for number, (clip, frames) in enumerate(worst):
        top, value = number * height, clip.get(key or "")
        score = "" if key is None or value is None else f"   {METRICS[key].label} {value:.3g}"
        draw.text((4, top + 3), f"{clip['clip']}{score}   true, generated", "black", font)
        for line, pictures in enumerate(frames):
            for column, picture in enumerate(pictures):
                place = column * THUMBNAIL_PX, top + _CAPTION_PX + line * THUMBNAIL_PX
                sheet.paste(Image.fromarray(picture), place)
    path = row_file.with_suffix(".worst.png")
    with whole_file(path) as temporary:
        sheet.save(temporary, format="PNG")
    return path


def _columns(clips: Sequence[ClipScores]) -> list[str]:
    """``clip``, then metrics in the order of the leaderboard, then others."""
    present = {name for clip in clips for name in clip} - {"clip"}
    known = [name for name in METRICS if name in present]
    return ["clip", *known, *sorted(present - set(known))]
