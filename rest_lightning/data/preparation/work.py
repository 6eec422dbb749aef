"""The whole work on one video: the unit that engines hand out, and that is done again after a
kill.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from rest_lightning.constants import FPS, SAMPLES_PER_FRAME
from rest_lightning.data.layout import clip_path, sidecar_path
from rest_lightning.data.preparation.clip import ClipMaker, centre_box, thumbnail_path
from rest_lightning.data.preparation.frames import (
    Frame,
    FrameStream,
    Probe,
    SourceError,
    probe,
)
from rest_lightning.data.preparation.options import FINISHING, PrepareOptions
from rest_lightning.data.preparation.rows import Row, sort_rows
from rest_lightning.data.preparation.scenes import FaceChanges, scene_cuts, small_picture
from rest_lightning.data.preparation.sound import decode_sound, read_sound
from rest_lightning.data.preparation.tracks import (
    FIELDS,
    Seen,
    Track,
    face_values,
    link_tracks,
    others_in_box,
    static_box,
)
from rest_lightning.errors import UserError
from rest_lightning.media.container import reason_of
from rest_lightning.media.faces import Box, FaceDetector, HandFinder, make_detector
from rest_lightning.media.files import is_disk_full, rounded, write_text_atomic

PREPARE_VERSION = 2
"""Raised whenever the same video and options give other clips than before."""

_NAME_CHARS = 48  # of a video's name in the names of its clips


def prepare_video(path: Path, root: Path, out: Path, options: PrepareOptions) -> list[Row]:
    """Probe, find faces, cut, score, crop and encode one video; write its clips and
    ``sources/<key>.json``.

    The same video and options give the same bytes, in any process. A video that is done already is
    not touched: done means that its record is there, with the same options, file size and time of
    change, and all its clips.

    Args:
        path: the video.
        root: folder of the input; the video's name in the rows is relative to it.
        out: folder of the dataset.
        options: sizes and thresholds.

    Returns:
        One row per track, or one row that says why there is none. Whatever is wrong with the video
        is a row.

    Raises:
        UserError: ``out`` cannot be written (a full disk), or a package is missing: nothing else
            could be done either.
    """
    key, source, stamp = source_key(path, root), source_name(path, root), fingerprint(path, options)
    done = read_record(out, key, stamp)
    if done is not None:
        return done
    for folder in ("clips", "thumbs", "sources"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    remove_clips(out, key)
    try:
        rows = _Preparation(path, source, key, out, options).run()
    except SourceError as error:
        rows = [Row(source, None, "failed", error.stage, str(error))]
    except UserError:
        raise
    except (Exception, MemoryError) as error:  # one broken video never stops the run
        # FFmpeg's errors are OSErrors too: what it refuses inside a video is that video's fault.
        is_writing = isinstance(error, OSError) and not isinstance(error, av.FFmpegError)
        if is_disk_full(error) or is_writing:
            raise UserError(
                f"expected to write {out}, got '{reason_of(error)}': free some space"
            ) from error
        remove_clips(out, key)
        reason = f"unexpected {type(error).__name__}: {reason_of(error)}"
        if isinstance(error, av.FFmpegError):
            reason = f"expected a video that FFmpeg converts, got '{reason_of(error)}'"
        rows = [Row(source, None, "failed", "decode", reason)]
    write_record(out, key, stamp, rows)
    return rows


def source_name(path: Path, root: Path) -> str:
    """Path below the root with forward slashes; bytes that are no UTF-8 as ``\\xNN``."""
    name = os.path.relpath(path, root).replace(os.sep, "/")
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def source_key(path: Path, root: Path) -> str:
    """Readable and unique: letters of the name, and a hash of the path below the root."""
    relative = os.path.relpath(path, root)
    stem = (
        re.sub(r"[^A-Za-z0-9]+", "-", Path(relative).stem).strip("-")[:_NAME_CHARS].strip("-")
        or "video"
    )
    return f"{stem}-{hashlib.sha256(os.fsencode(relative)).hexdigest()[:10]}"


def fingerprint(path: Path, options: PrepareOptions) -> str:
    """Hash of all that decides a video's clips: version, options, file size and time of change."""
    try:
        info = path.stat()
        file = [info.st_size, info.st_mtime_ns]
    except OSError as error:
        file = [-1, error.errno or 0]
    chosen = {name: value for name, value in asdict(options).items() if name not in FINISHING}
    text = json.dumps([PREPARE_VERSION, file, chosen], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def record_path(out: Path, key: str) -> Path:
    """``<out>/sources/<key>.json``."""
    return out / "sources" / f"{key}.json"


def read_record(out: Path, key: str, stamp: str) -> list[Row] | None:
    """Rows of a video that is done; None where it is not, or where a clip of it is gone."""
    try:
        content = json.loads(record_path(out, key).read_text(encoding="utf-8"))
        if content["fingerprint"] != stamp:
            return None
        rows = [Row.from_dict(row, key) for row in content["rows"]]
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None
    for row in rows:
        if row.status == "kept" and row.clip_id is not None:
            files = (
                clip_path(out, row.clip_id),
                sidecar_path(out, row.clip_id),
                thumbnail_path(out, row.clip_id),
            )
            if not all(file.is_file() for file in files):
                return None
    return rows


def write_record(out: Path, key: str, stamp: str, rows: list[Row]) -> None:
    """Write ``sources/<key>.json``: from now on the video is done."""
    content = {"fingerprint": stamp, "rows": [rounded(asdict(row)) for row in sort_rows(rows)]}
    try:
        write_text_atomic(
            record_path(out, key), json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        )
    except OSError as error:
        raise UserError(
            f"expected to write {out}, got '{reason_of(error)}': free some space"
        ) from error


def remove_clips(out: Path, key: str) -> None:
    """Remove what an earlier or killed work on a video left; clips are numbered, so no folder is
    listed.
    """
    record_path(out, key).unlink(missing_ok=True)
    number, num_missing = 0, 0
    while num_missing < 64:  # clips that a filter dropped leave holes
        clip_id = clip_id_of(key, number)
        files = (sidecar_path(out, clip_id), clip_path(out, clip_id), thumbnail_path(out, clip_id))
        num_missing = 0 if any(file.exists() for file in files) else num_missing + 1
        for file in files:
            file.unlink(missing_ok=True)
        number += 1


def clip_id_of(key: str, number: int) -> str:
    """Name of a video's clip."""
    return f"{key}_{number:04d}"


@dataclass(frozen=True)
class _Analysis:
    """What the first pass saw: faces, places where clips end, frames in all."""

    seen: Seen
    breaks: NDArray[np.int64]
    num_frames: int
    damage: str | None
    origins_s: list[Fraction]


class _Preparation:
    """Two passes over one video: faces of all frames, then the clips."""

    def __init__(
        self, path: Path, source: str, key: str, out: Path, options: PrepareOptions
    ) -> None:
        self.path, self.source, self.key, self.out, self.options = path, source, key, out, options

    def run(self) -> list[Row]:
        options = self.options
        header = probe(self.path, options.min_fps)
        analysis = self._analyse(header)
        tracks = self._tracks(analysis)
        if not tracks:
            stage = "decode" if analysis.damage else "face"
            raise SourceError(
                stage,
                analysis.damage or (f"expected a face, found none in {analysis.num_frames} frames"),
            )
        with self._sound(header, analysis) as sound:
            rows = self._clips(header, tracks, sound)
        if analysis.damage:
            rows.append(
                Row(
                    self.source,
                    None,
                    "failed",
                    "decode",
                    analysis.damage,
                    start_s=analysis.num_frames / FPS,
                )
            )
        return rows

    def _analyse(self, header: Probe) -> _Analysis:
        options = self.options
        scale = min(1.0, options.detection_px / max(header.width, header.height))
        size = max(2, round(header.width * scale)), max(2, round(header.height * scale))
        scale_x = header.width / size[0]
        numbers, values, differences, indices = array("q"), array("f"), array("f"), array("q")
        stream = FrameStream(self.path, header, options.max_gap_s)
        last: NDArray[np.float32] | None = None
        face_changes = FaceChanges()
        found: list[NDArray[np.float32]] = []
        with self._detector() as detector:
            for frame in stream:
                indices.append(frame.index)
                if frame.is_repeat and last is not None:
                    differences.append(0.0)
                    face_changes.repeat()
                else:
                    picture = frame.picture(*size)
                    small = small_picture(picture)
                    differences.append(0.0 if last is None else float(np.abs(small - last).mean()))
                    last = small
                    if detector is not None:
                        faces = detector.detect(picture, frame.index / FPS)
                        found = [face_values(face, scale_x) for face in faces]
                        face_changes.add(picture, [face.box for face in faces])
                for face in found:
                    numbers.append(frame.index)
                    values.extend(face.tolist())
        placed = np.frombuffer(indices, np.int64) if indices else np.empty(0, np.int64)
        cuts = scene_cuts(
            np.frombuffer(differences, np.float32), options.scene_threshold, options.scene_ratio
        )
        cuts = np.union1d(cuts, face_changes.cuts(options.scene_threshold, options.scene_ratio))
        holes = np.flatnonzero(np.diff(placed) > 1) + 1
        breaks = placed[np.union1d(cuts, holes).astype(np.int64)]
        seen = Seen(
            np.array(numbers, np.int64),
            np.array(values, np.float32).reshape(-1, len(FIELDS)),
        )
        num_frames = int(placed[-1]) + 1 if len(placed) else 0
        if not options.finds_faces:
            # The frames that are there, as one "face" in each.
            seen = Seen(placed.copy(), np.zeros((len(placed), len(FIELDS)), np.float32))
        return _Analysis(seen, breaks, num_frames, stream.damage, stream.origins_s)

    def _tracks(self, analysis: _Analysis) -> list[Track]:
        # Without a detector every box is the same one, whose overlap with itself is not asked.
        options = self.options if self.options.finds_faces else replace(self.options, min_iou=0.0)
        return link_tracks(analysis.seen, analysis.breaks, options)

    def _clips(self, header: Probe, tracks: list[Track], sound: Path | None) -> list[Row]:
        """Second pass: every track's frames go to its clip as they come."""
        rows: list[Row] = []
        making: list[ClipMaker] = []
        waiting = list(enumerate(tracks))
        stream = FrameStream(self.path, header, self.options.max_gap_s)
        try:
            with self._hands() as hands:
                for frame in stream:
                    while waiting and waiting[0][1].start <= frame.index:
                        number, track = waiting.pop(0)
                        making.append(self._maker(number, track, tracks, header, hands))
                    if making:
                        _feed(making, frame, header)
                        for maker in [m for m in making if m.num_frames == m.track.num_frames]:
                            making.remove(maker)
                            rows.append(maker.finish(self._samples(sound, maker)))
                    if not making and not waiting:
                        break
        finally:
            for maker in making:
                maker.abort()
        return rows

    def _maker(
        self,
        number: int,
        track: Track,
        tracks: list[Track],
        header: Probe,
        hands: HandFinder | None,
    ) -> ClipMaker:
        options = self.options
        scores = {"short": float(track.num_frames)}
        if options.box is not None:
            box = _checked_box(options.box, header)
        elif options.already_cropped:
            box = centre_box(header)
        else:
            box = static_box(track, header.width, header.height, options)
            scores |= {
                "small": track.face_px(),
                "faces": others_in_box(track, box, tracks),
                "profile": track.profile(),
            }
        return ClipMaker(
            self.out, self.source, clip_id_of(self.key, number), track, box, scores, options, hands
        )

    def _samples(self, sound: Path | None, maker: ClipMaker) -> NDArray[np.float32] | None:
        return None if sound is None else read_sound(sound, maker.track.start, maker.num_frames)

    @contextmanager
    def _sound(self, header: Probe, analysis: _Analysis) -> Iterator[Path | None]:
        """The decoded sound in a file beside the record, for as long as the clips are made."""
        if not header.num_audio_tracks:
            yield None
            return
        file = self.out / "sources" / f".{self.key}.sound.part"
        try:
            num_samples = analysis.num_frames * SAMPLES_PER_FRAME
            damage = decode_sound(self.path, file, num_samples, analysis.origins_s)
            yield None if damage and not _has_samples(file) else file
        finally:
            with suppress(OSError):
                file.unlink()

    @contextmanager
    def _detector(self) -> Iterator[FaceDetector | None]:
        if not self.options.finds_faces:
            yield None
            return
        detector = make_detector(self.options.detector, self.path, self.options.min_confidence)
        try:
            yield detector
        finally:
            detector.close()

    @contextmanager
    def _hands(self) -> Iterator[HandFinder | None]:
        if (
            not self.options.finds_faces
            or self.options.max_hands is None
            or find_spec("mediapipe") is None
        ):
            yield None
            return
        hands = HandFinder()
        try:
            yield hands
        finally:
            hands.close()


def _feed(making: list[ClipMaker], frame: Frame, header: Probe) -> None:
    needs = [maker for maker in making if not frame.is_repeat or maker.num_frames == 0]
    picture = frame.picture(header.width, header.height) if needs else None
    for maker in making:
        maker.add(frame, picture if maker in needs else None)


def _checked_box(box: Box, header: Probe) -> Box:
    x, y, width, height = box
    if x + width > header.width or y + height > header.height:
        raise SourceError(
            "track",
            (
                f"expected a box inside {header.width}x{header.height} pixels, got "
                f"{x:g},{y:g},{width:g},{height:g}"
            ),
        )
    return box


def _has_samples(file: Path) -> bool:
    return file.is_file() and bool(np.fromfile(file, np.int16, 16_000_000).any())
