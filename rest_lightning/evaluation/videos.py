"""Folders of videos as pairs of a generated and a true clip, read piece by piece; every fault names
its file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rest_lightning.constants import FPS, SAMPLE_RATE
from rest_lightning.data.layout import Sidecar, manifest_path, read_manifest
from rest_lightning.errors import UserError
from rest_lightning.evaluation.faces import FaceFinder, MediapipeFaces, SidecarFaces
from rest_lightning.evaluation.protocol import Protocol
from rest_lightning.evaluation.scorer import ClipPair, Scorer
from rest_lightning.media.audio import open_speech, sound_on_clock
from rest_lightning.media.video import VideoFile, first_picture_s, read_clip_audio

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
PIECE_FRAMES = 128
AUDIO_TOLERANCE_S = 0.2  # the padding of a codec's last packet is no speech
Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class PairedFiles:
    """What two folders hold.

    Attributes:
        pairs: name, generated file (None where there is none) and true file, in the order of the
            names.
        unpaired: generated files without a true one.
    """

    pairs: list[tuple[str, Path | None, Path]]
    unpaired: list[Path]

    def frame_source(self) -> dict[str, str]:
        """Kinds of files that the frames of both sides come from, for result rows: codecs move
        FID.
        """
        sides = {
            "generated": [made for _, made, _ in self.pairs if made],
            "truth": [true for _, _, true in self.pairs],
        }
        return {
            side: ", ".join(sorted({p.suffix[1:].lower() for p in paths}))
            for side, paths in sides.items()
        }


def pair_folders(generated: Path, truth: Path, num_clips: int) -> PairedFiles:
    """Pairs of two folders by file name without its ending: the first ``num_clips`` true clips,
    each with its file.

    Args:
        generated: folder of a method's videos.
        truth: prepared clips (of their split ``test`` where they have one), or a folder of videos.
        num_clips: at most.

    Raises:
        UserError: no such folder, no videos in one, two of one name, or not a single pair.
    """
    made, true = _videos(generated), _true_videos(truth)
    names = sorted(true)[:num_clips]
    pairs = [(name, made.get(name), true[name]) for name in names]
    if not any(path for _, path, _ in pairs):
        raise UserError(
            f"expected videos in {generated} with the names of those in {truth} ({names[0]}, ...), "
            "got "
            f"{min(made)}, ...: name each video after its true clip"
        )
    return PairedFiles(pairs, [made[name] for name in sorted(set(made) - set(true))])


def score_folders(scorer: Scorer, files: PairedFiles) -> Iterator[tuple[str, bool]]:
    """Score all pairs, one at a time; yields each name with whether it counts."""
    for name, made, true in files.pairs:
        if made is None:
            scorer.fail(name, "expected a generated video of this name, got none")
            yield name, False
            continue
        try:
            pair = open_pair(name, made, true, scorer.protocol)
        except UserError as error:
            scorer.fail(name, _without_folders(str(error), made, true))
            yield name, False
            continue
        yield name, scorer.add(pair)


def open_pair(name: str, made: Path, true: Path, protocol: Protocol) -> ClipPair:
    """Check both files and read their sound; the frames are read when they are scored.

    Raises:
        UserError: a file that does not decode, of another frame rate, too short, without sound, or
            with more of it than pictures.
    """
    for path in (made, true):
        _check_video(path, protocol)
    sidecar = _sidecar(true.with_suffix(".json"))
    opening = None if sidecar is None else sidecar.mouth_opening
    with VideoFile(true) as video:
        reference = video.read(0, 1)[0]
    return ClipPair(
        name=name,
        pieces=_pieces(made, true, protocol.num_frames),
        audio=_sound(made, protocol.num_frames),
        true_audio=_sound(true, protocol.num_frames),
        reference=reference,
        true_opening=None if opening is None else np.asarray(opening, dtype=np.float64),
        faces=_faces(protocol, sidecar),
    )


def _sidecar(path: Path) -> Sidecar | None:
    if not path.is_file():
        return None
    try:
        return Sidecar.from_json(path.read_text(encoding="utf-8"), path.name)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path.name}: expected the true clip's sidecar, got {error}: make it again"
        ) from None


def _without_folders(reason: str, *paths: Path) -> str:
    """Rows travel: the files are named, not where they lie on this machine."""
    for path in paths:
        reason = reason.replace(str(path), path.name)
    return reason


def _check_video(path: Path, protocol: Protocol) -> None:
    with VideoFile(path) as video:
        num_frames, fps = video.num_frames, video.fps
    if abs(fps - FPS) > 0.01:
        raise UserError(
            f"{path}: expected {FPS} frames per second, got {fps:g}: encode it at {FPS} fps"
        )
    if num_frames < protocol.num_frames:
        raise UserError(
            f"{path}: expected {protocol.num_frames} frames, got {num_frames}: too "
            "short for the protocol"
        )
    duration_s = open_speech(path, level=False).duration_s
    assert duration_s is not None
    video_s, needed_s = num_frames / FPS, protocol.num_frames / FPS
    if duration_s > video_s + AUDIO_TOLERANCE_S:
        raise UserError(
            f"{path}: expected sound as long as the video's {video_s:.2f} s, got {duration_s:.2f} "
            "s: frames are missing, or the sound is too long; cut it: "
            f"ffmpeg -i {path.name} -c copy -shortest OUT.mp4"
        )
    if duration_s < needed_s - AUDIO_TOLERANCE_S:
        raise UserError(
            f"{path}: expected {needed_s:.2f} s of sound, got {duration_s:.2f} s: too short for "
            "the protocol"
        )


def _sound(path: Path, num_frames: int) -> NDArray[np.float32]:
    """The sound of all pictures and more, each block at its time stamp."""
    source = open_speech(path, level=False)
    if (source.sample_rate_hz, source.num_channels) == (SAMPLE_RATE, 1):
        return read_clip_audio(path, num_frames)
    blocks = list(sound_on_clock(path, [first_picture_s(path)], source.mix))
    samples = np.zeros(max(0, *(start + len(block) for start, block in blocks)), np.float32)
    for start, block in blocks:
        low = max(start, 0)
        if low < start + len(block):
            samples[low : start + len(block)] = block[low - start :]
    return samples


def _pieces(made: Path, true: Path, num_frames: int) -> Iterator[tuple[Frames, Frames]]:
    try:
        with VideoFile(made) as generated, VideoFile(true) as truth:
            for start in range(0, num_frames, PIECE_FRAMES):
                count = min(PIECE_FRAMES, num_frames - start)
                yield generated.read(start, count), truth.read(start, count)
    except UserError as error:
        raise UserError(_without_folders(str(error), made, true)) from None


def _faces(protocol: Protocol, sidecar: Sidecar | None) -> FaceFinder | None:
    if protocol.faces == "mediapipe":
        return MediapipeFaces()
    if protocol.faces == "sidecar":
        return SidecarFaces(None if sidecar is None else sidecar.landmarks)
    return None


def _true_videos(folder: Path) -> dict[str, Path]:
    if not manifest_path(folder).is_file():
        return _videos(folder / "clips" if (folder / "clips").is_dir() else folder)
    rows = read_manifest(folder, "test") or read_manifest(folder)
    return {row.clip_id: folder / "clips" / f"{row.clip_id}.mp4" for row in rows}


def _videos(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError(f"expected a folder of videos, got {folder}: check the name")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
            continue
        if path.stem in found:
            raise UserError(
                f"expected one video of the name {path.stem}, got {found[path.stem]} and {path}: "
                "remove one"
            )
        found[path.stem] = path
    if not found:
        raise UserError(
            f"expected videos ({', '.join(SUFFIXES)}) in {folder}, got none: check the name"
        )
    return found
