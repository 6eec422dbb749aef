"""Animated portraits in the prepared-clip layout: stills x speaking drivers -> mp4 and sidecar."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from rest_lightning.data import layout
from rest_lightning.data.making import (
    check_arguments,
    check_folder,
    check_sizes,
    is_finished,
    remove_dataset,
    run_clips,
)
from rest_lightning.errors import UserError
from rest_lightning.media.files import (
    rounded,
    sha256_of,
    swept,
    whole_file,
    write_text_atomic,
)

GENERATOR_VERSION = 2
"""Raised whenever the same seed gives other clips than before; a data set never mixes versions."""

_KIND = "animated portraits"
_PREFIX = "animated_"
_CRF = 16
_DRIVERS_IN_MEMORY = 12  # of each worker, about 15 MB each


@dataclass(frozen=True)
class Source:
    """One still that can be animated: its file, who it is taken for, its split, and what was wrong
    if anything was.
    """

    path: str
    identity: str
    split: str
    reason: str | None = None


def animate_dataset(
    portraits: Sequence[str | os.PathLike[str]],
    drivers: str | os.PathLike[str],
    out: str | os.PathLike[str],
    num_clips: int,
    size_px: int = 256,
    num_frames: int = 121,
    seed: int = 0,
    num_workers: int = 2,
    val_fraction: float = 0.05,
    test_fraction: float = 0.05,
    include_drivers: bool = False,
    overwrite: bool = False,
) -> dict[str, int]:
    """Makes training talkers of photographs.

    Clip i shows still i (modulo their number) of its split, driven by clips of one speaker of the
    same split: neither the people nor the speakers of validation and test are seen in training.
    Each clip starts with the still itself. Calling it again continues where it stopped; with a
    larger ``num_clips`` it adds clips.

    Args:
        portraits: folders of pictures of one face each.
        drivers: prepared clips with speech (`rest prepare`); a few minutes are enough.
        out: folder of the data set.
        num_clips: clips in all splits together, those of the drivers not counted.
        size_px: side of the frames, even.
        num_frames: F at 25 fps; 8n + 1 fits the autoencoder.
        seed: the same seed gives the same clips, whatever ``num_workers``.
        num_workers: processes, of one thread each.
        val_fraction, test_fraction: shares of the stills.
        include_drivers: whether the drivers' own clips, real faces in real motion, belong to the
            set too.
        overwrite: delete the animated data set in ``out`` first.

    Returns:
        How many stills were left out, by reason (also, file by file, in ``portraits.jsonl``).

    Raises:
        UserError: bad arguments, no still or no driver that can be used, or another data set in
            ``out``.
    """
    out, drivers = Path(out), Path(drivers)
    check_sizes(size_px, num_frames, least_px=64, least_frames=9)
    check_arguments(num_clips, num_workers, val_fraction, test_fraction)
    arguments = {
        "portraits": [os.fspath(folder) for folder in portraits],
        "drivers": os.fspath(drivers),
        "num_clips": num_clips,
        "size_px": size_px,
        "num_frames": num_frames,
        "seed": seed,
        "val_fraction": val_fraction,
        "test_fraction": test_fraction,
    }
    info = {"kind": _KIND, "generator_version": GENERATOR_VERSION, "arguments": arguments}
    rows = layout.read_manifest(drivers)
    if overwrite:
        remove_dataset(out, _KIND, _PREFIX)
    check_folder(out, _KIND, info)
    (out / "clips").mkdir(parents=True, exist_ok=True)
    layout.write_dataset_json(
        out, info
    )  # before the first clip: an interrupted run knows what it was
    sources = find_sources(portraits, out, seed, val_fraction, test_fraction)
    plans = plan_clips(sources, rows, num_clips, seed)
    todo = [plan for plan in plans if not is_finished(out, plan.clip_id, size_px, num_frames)]
    make = partial(
        _make_clip, out=out, drivers=drivers, size_px=size_px, num_frames=num_frames, seed=seed
    )
    with swept(out, out / "clips"):
        run_clips(make, todo, num_workers, num_clips)
    clip_ids = [plan.clip_id for plan in plans]
    if include_drivers:
        clip_ids += [_include(drivers, row, out, size_px) for row in rows]
    layout.finish_dataset(out, info, clip_ids)
    return dict(Counter(source.reason for source in sources if source.reason))


@dataclass(frozen=True)
class Plan:
    """What one clip is made of: a still and a speaker's clips, in the order in which they are
    joined.
    """

    index: int
    source: Source
    drivers: tuple[layout.ManifestRow, ...]

    @property
    def clip_id(self) -> str:
        """File stem of the clip."""
        return f"{_PREFIX}{self.index:06d}"


def plan_clips(
    sources: Sequence[Source], rows: Sequence[layout.ManifestRow], num_clips: int, seed: int
) -> list[Plan]:
    """Decides which still and which drivers make which clip: a pure function of its arguments.

    A quarter of the clips draws its speaker first and then a clip, so that voices with few clips
    are heard too.

    Raises:
        UserError: a split has stills but no drivers, or there are no training stills.
    """
    usable = [source for source in sources if source.reason is None]
    if not any(source.split == "train" for source in usable):
        reasons = Counter(source.reason for source in sources if source.reason)
        text = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
        raise UserError(
            f"expected stills to animate, got none of {len(sources)} ({text or 'no pictures'}): "
            "give photographs of "
            "one person each, facing the camera, lips together"
        )
    by_split: dict[str, dict[str, list[layout.ManifestRow]]] = {
        split: {} for split in layout.SPLITS
    }
    for row in rows:
        by_split[row.split].setdefault(row.identity, []).append(row)
    if not by_split["train"]:
        raise UserError("expected drivers in the training split, got none: prepare more clips")
    order = np.random.default_rng([seed, 0]).permutation(len(usable))
    plans = []
    for index in range(num_clips):
        source = usable[order[index % len(usable)]]
        # A small set of drivers has none to hold back: then only the people are unseen.
        speakers = by_split[source.split] or by_split["train"]
        rng = np.random.default_rng([seed, 1, index])
        names = sorted(speakers)
        sizes = np.array([len(speakers[name]) for name in names], float)
        weights = 0.75 * sizes / sizes.sum() + 0.25 / len(names)
        speaker = names[rng.choice(len(names), p=weights)]
        clips = speakers[speaker]
        chosen = [clips[i] for i in rng.permutation(len(clips))[:8]]
        plans.append(Plan(index, source, tuple(chosen)))
    return plans


def find_sources(
    portraits: Sequence[str | os.PathLike[str]],
    out: Path,
    seed: int,
    val_fraction: float,
    test_fraction: float,
) -> list[Source]:
    """Looks at every picture of the folders; what was found is kept in ``portraits.jsonl``, so that
    it is done once.
    """
    from rich.progress import track

    from rest_lightning.data.animated import portraits as stills
    from rest_lightning.data.animated.mesh import MeshTracker

    known = _read_sources(out / "portraits.jsonl")
    sources = []
    files = [
        (Path(folder), path) for folder in portraits for path in stills.list_stills(_folder(folder))
    ]
    with MeshTracker(video=False) as tracker:
        for folder, path in track(files, "stills", transient=True):
            key = sha256_of(path)
            source = known.get(key)
            if source is None:
                identity = f"{folder.name}/{path.relative_to(folder).with_suffix('')}"
                split = layout.split_of_identity(identity, val_fraction, test_fraction, seed)
                reason = None
                try:
                    picture = stills.read_still(path)
                    stills.check_mesh(stills.find_mesh(picture, tracker), picture.shape)
                except stills.PortraitRefused as error:
                    reason = str(error)
                source = Source(os.fspath(path), identity, split, reason)
                known[key] = source
            sources.append(source)
    lines = [json.dumps({"sha256": key, **vars(source)}) for key, source in known.items()]
    write_text_atomic(out / "portraits.jsonl", "".join(line + "\n" for line in lines))
    return sources


def draw_sheet(out: str | os.PathLike[str], num_clips: int = 12, num_frames: int = 8) -> Path:
    """Writes ``sheet.png``: frames of clips spread over the set, the still first. Look at it before
    training.
    """
    from PIL import Image

    from rest_lightning.media.video import read_frames

    out = Path(out)
    rows = [row for row in layout.read_manifest(out) if row.clip_id.startswith(_PREFIX)]
    lines = []
    for row in rows[:: max(1, len(rows) // num_clips)][:num_clips]:
        frames = read_frames(layout.clip_path(out, row.clip_id))
        opening = np.array(layout.read_sidecar(out, row.clip_id).mouth_opening)
        wide = np.argsort(-opening)[: len(opening) // 4 : max(1, len(opening) // 4 // 3)][:3]
        even = np.linspace(0, len(frames) - 1, num_frames - len(wide)).astype(int)
        lines.append(np.concatenate([frames[i] for i in (*even, *wide)], axis=1))
    path = out / "sheet.png"
    with whole_file(path) as temporary:
        Image.fromarray(np.concatenate(lines)).save(temporary)
    return path


def _make_clip(
    plan: Plan, out: Path, drivers: Path, size_px: int, num_frames: int, seed: int
) -> int:
    from rest_lightning.data.animated.animate import Style, animate
    from rest_lightning.data.animated.drivers import change_speed, cut, join, mirror
    from rest_lightning.data.animated.mesh import LEFT_EYE, OUTER_LIPS, RIGHT_EYE
    from rest_lightning.data.animated.portraits import (
        choose_framing,
        find_mesh,
        frame_portrait,
        read_still,
    )
    from rest_lightning.media.writer import Mp4Writer

    # One stream per part, so that a change of one part leaves the others as they were.
    looks, acting, timing = (
        np.random.default_rng([seed, 2 + part, plan.index]) for part in range(3)
    )
    tracker, segment = _models()
    still = read_still(plan.source.path)
    if looks.random() < 0.5:
        still = np.ascontiguousarray(still[:, ::-1])
    mesh = find_mesh(still, tracker)
    framing = choose_framing(mesh, still.shape, looks)
    portrait = frame_portrait(plan.source.identity, still, mesh, framing, size_px, segment)

    speed = float(np.clip(timing.normal(1.0, 0.06), 0.88, 1.15))
    needed = int(np.ceil(num_frames * speed)) + 2
    clips: list[Any] = []
    for row in itertools.cycle(plan.drivers):  # a speaker of one clip says it again
        clips.append(_driver(drivers, row, out))
        if sum(clip.num_frames - 5 for clip in clips) >= needed + 15:
            break
    first = clips[0]
    clips[0] = cut(first, start := int(timing.integers(0, 12)), first.num_frames - start)
    driver = cut(change_speed(join(clips, needed), speed), 0, num_frames)
    if timing.random() < 0.5:
        driver = mirror(driver)
    style = Style(
        lips=float(acting.uniform(0.95, 1.4)),
        brows=float(acting.uniform(0.6, 1.1)),
        # Moderate: speech does not tell how a head moves, and most of what changes is the head.
        head=float(acting.uniform(0.2, 1.0)),
        sway=float(acting.uniform(0.0, 0.6)),
        blinks_per_min=float(acting.uniform(8, 22)),
        brightness=float(looks.uniform(0.85, 1.12)),
        contrast=float(looks.uniform(0.9, 1.1)),
        saturation=float(looks.uniform(0.75, 1.2)),
        warmth=float(looks.normal(0, 0.03)),
    )
    clip = animate(portrait, driver, style, acting)
    points = {
        name: clip.mesh[:, which, :2].mean(axis=1) / size_px
        for name, which in (("mouth", OUTER_LIPS), ("left_eye", LEFT_EYE), ("right_eye", RIGHT_EYE))
    }
    sidecar = layout.Sidecar(
        clip_id=plan.clip_id,
        identity=plan.source.identity,
        source=f"{plan.source.path} driven by {driver.name}",
        num_frames=num_frames,
        size_px=size_px,
        split=plan.source.split,
        mouth_opening=rounded(clip.mouth_opening),
        landmarks=rounded(points),
        speech={"speaker": driver.identity, "speed": round(speed, 3), "lips": round(style.lips, 3)},
    )
    path = layout.clip_path(out, plan.clip_id)
    with Mp4Writer(path, size_px, crf=_CRF, overwrite=True) as writer:
        writer.write(clip.frames)
        writer.write_audio(driver.audio)
    layout.write_sidecar(out, sidecar)
    return plan.index


def _include(drivers: Path, row: layout.ManifestRow, out: Path, size_px: int) -> str:
    """Puts a driver's own clip into the set, with what its mesh tells; returns its id."""
    from rest_lightning.data.animated.mesh import mouth_opening

    if row.size_px != size_px:
        raise UserError(
            f"clip {row.clip_id}: expected drivers of {size_px} px to include them, got "
            f"{row.size_px}: prepare them "
            "again with that size, or leave include_drivers out"
        )
    target = layout.clip_path(out, row.clip_id)
    if not layout.is_complete(out, row.clip_id):
        driver = _driver(drivers, row, out)
        sidecar = layout.read_sidecar(drivers, row.clip_id)
        opening = rounded(mouth_opening(driver.mesh))
        source = layout.clip_path(drivers, row.clip_id)
        with whole_file(target) as temporary:
            try:
                os.link(source, temporary)
            except OSError:
                shutil.copyfile(source, temporary)
        layout.write_sidecar(out, layout.Sidecar(**{**vars(sidecar), "mouth_opening": opening}))
    return row.clip_id


@lru_cache(maxsize=_DRIVERS_IN_MEMORY)
def _driver(drivers: Path, row: layout.ManifestRow, out: Path) -> Any:
    from rest_lightning.data.animated.drivers import open_driver

    return open_driver(drivers, row, out / "meshes")


@cache
def _models() -> tuple[Any, Any]:
    from rest_lightning.data.animated.mesh import MeshTracker
    from rest_lightning.data.animated.portraits import PersonSegmenter

    return MeshTracker(video=False), PersonSegmenter()


def _read_sources(path: Path) -> dict[str, Source]:
    known = {}
    with suppress(FileNotFoundError):
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            key = entry.pop("sha256")
            known[key] = Source(**entry)
    return known


def _folder(folder: str | os.PathLike[str]) -> Path:
    if not Path(folder).is_dir():
        came = "a file" if Path(folder).exists() else "no such folder"
        raise UserError(f"expected a folder of portraits, got {came}: {folder}")
    return Path(folder)
