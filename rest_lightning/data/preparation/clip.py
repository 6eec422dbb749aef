"""One clip in the making: crop, resize, encode and score, frame by frame."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rest_lightning.constants import FPS, SAMPLES_PER_FRAME
from rest_lightning.data.layout import Sidecar, clip_path, write_sidecar
from rest_lightning.data.preparation.duplicates import phash, sound_hash
from rest_lightning.data.preparation.filters import EARLY, first_failure
from rest_lightning.data.preparation.frames import Frame, Probe
from rest_lightning.data.preparation.options import PrepareOptions
from rest_lightning.data.preparation.rows import Row
from rest_lightning.data.preparation.scores import ClipScores
from rest_lightning.data.preparation.sound import silent_share
from rest_lightning.data.preparation.sync import MAX_FRAMES, sync_scores
from rest_lightning.data.preparation.tracks import Track
from rest_lightning.media.faces import Box, HandFinder, Picture
from rest_lightning.media.files import rounded, whole_file
from rest_lightning.media.writer import Mp4Writer

THUMBNAIL_PX = 128
# of 97 random frames of a long clip, about 109 are decoded; with x264's 250 about 210
KEY_FRAME_EVERY = 25
PROVISIONAL_SPLIT = "train"  # of a sidecar until all videos are done and the splits are known


class ClipMaker:
    """Takes the frames of one track in order and writes its clip, or only its scores and thumbnail.

    Args:
        out: folder of the dataset.
        source: name of the video.
        clip_id: of the clip.
        track: frame numbers and landmarks; of ``--box`` and ``--already-cropped`` without values.
        box: the crop in source pixels.
        scores: of the track.
        options: size, thresholds.
        hands: finds hands, or None.
    """

    def __init__(
        self,
        out: Path,
        source: str,
        clip_id: str,
        track: Track,
        box: Box,
        scores: dict[str, float],
        options: PrepareOptions,
        hands: HandFinder | None,
    ) -> None:
        self.out, self.source, self.clip_id, self.track, self.box = out, source, clip_id, track, box
        self.scores, self.options = scores, options
        self.num_frames = 0
        self._frame_scores = ClipScores(options, hands)
        self._crop: Picture | None = None
        self._phash: str | None = None
        self._kept_frames: list[Picture] = []
        dropped = first_failure(scores, options, EARLY) is not None
        path = clip_path(out, clip_id)
        encodes = not dropped or options.keep_dropped
        self._writer: Mp4Writer | None = None
        if encodes:
            self._writer = Mp4Writer(
                path,
                options.size_px,
                crf=options.crf,
                overwrite=True,
                key_frame_every=KEY_FRAME_EVERY,
                generated=False,
            )

    def add(self, frame: Frame, picture: Picture | None) -> None:
        """The next frame; ``picture`` is the whole upright picture, None when it repeats the one
        before.
        """
        if picture is not None:
            self._crop = crop_square(picture, self.box, self.options.size_px)
            self._frame_scores.add(self._crop, self._face())
        else:
            self._frame_scores.repeat()
        assert self._crop is not None
        if self.num_frames == self.track.num_frames // 2:
            self._phash = phash(self._crop)
            write_thumbnail(thumbnail_path(self.out, self.clip_id), self._crop)
        if self._writer is not None:
            self._writer.write(self._crop)
        if self.options.sync_weights is not None and len(self._kept_frames) < MAX_FRAMES:
            self._kept_frames.append(self._crop)
        self.num_frames += 1

    def finish(self, samples: NDArray[np.float32] | None) -> Row:
        """Close the clip with its sound, samples (640 * num_frames,) or None for none, and say what
        became of it.
        """
        options = self.options
        self.scores |= self._frame_scores.result()
        self.scores["silence"] = (
            1.0 if samples is None else silent_share(samples, options.silence_db)
        )
        if self._kept_frames and samples is not None and self.scores["silence"] < 1:
            self.scores |= self._sync(samples)
        failure = first_failure(self.scores, options)
        if self._writer is not None:
            if failure is None or options.keep_dropped:
                silence = np.zeros(self.num_frames * SAMPLES_PER_FRAME, np.float32)
                self._writer.write_audio(silence if samples is None else samples)
                self._writer.close()
                write_sidecar(self.out, self._sidecar())
            else:
                self._writer.abort()
        return Row(
            source=self.source,
            clip_id=self.clip_id,
            status="kept" if failure is None else "dropped",
            stage="encode" if failure is None else "filter",
            reason=None if failure is None else failure[1],
            filter=None if failure is None else failure[0],
            start_s=self.track.start / FPS,
            end_s=(self.track.start + self.num_frames) / FPS,
            num_frames=self.num_frames,
            box=self.box,
            scores=rounded(self.scores),
            phash=self._phash,
            sound_hash=None if samples is None else sound_hash(samples),
            thumbnail=thumbnail_path(Path(), self.clip_id).as_posix(),
        )

    def abort(self) -> None:
        """Give up; nothing stays."""
        if self._writer is not None:
            self._writer.abort()

    def _face(self) -> Box | None:
        """Extremes of this frame's landmarks in pixels of the crop."""
        if not self.options.finds_faces:
            return None
        left, top, right, bottom = self.track.values[self.num_frames, 4:8].tolist()
        scale = self.options.size_px / self.box[2]
        return (
            (left - self.box[0]) * scale,
            (top - self.box[1]) * scale,
            (right - left) * scale,
            (bottom - top) * scale,
        )

    def _sync(self, samples: NDArray[np.float32]) -> dict[str, float]:
        weights = self.options.sync_weights
        assert weights is not None
        boxes = None
        if self.options.finds_faces:
            values = self.track.values[: len(self._kept_frames), :4].astype(np.float64)
            corners = np.hstack([values[:, :2], values[:, :2] + values[:, 2:]])
            boxes = (corners - np.tile(self.box[:2], 2)) * (self.options.size_px / self.box[2])
        return sync_scores(
            self._kept_frames, boxes, samples[: len(self._kept_frames) * SAMPLES_PER_FRAME], weights
        )

    def _sidecar(self) -> Sidecar:
        return Sidecar(
            clip_id=self.clip_id,
            identity=self.source,
            source=self.source,
            num_frames=self.num_frames,
            size_px=self.options.size_px,
            split=PROVISIONAL_SPLIT,
            crop_box=self.box,
            quality=self.scores,
            landmarks=rounded(self.track.points(self.box)) if self.options.finds_faces else None,
        )


def crop_square(picture: Picture, box: Box, size_px: int) -> Picture:
    """The box of a picture at ``size_px``: Lanczos over areas; what lies outside repeats the
    picture's edge.
    """
    from PIL import Image

    height, width = picture.shape[:2]
    x, y, side = round(box[0]), round(box[1]), round(box[2])
    part = picture[max(0, y) : max(0, y + side), max(0, x) : max(0, x + side)]
    outside = (
        (max(0, -y), max(0, y + side - height)),
        (max(0, -x), max(0, x + side - width)),
        (0, 0),
    )
    if any(any(pair) for pair in outside):
        part = np.pad(part, outside, mode="edge")
    image = Image.fromarray(np.ascontiguousarray(part))
    return np.asarray(image.resize((size_px, size_px), Image.Resampling.LANCZOS))


def centre_box(probe: Probe) -> Box:
    """The largest centred square."""
    side = min(probe.width, probe.height)
    return (
        float((probe.width - side) // 2),
        float((probe.height - side) // 2),
        float(side),
        float(side),
    )


def thumbnail_path(out: Path, clip_id: str) -> Path:
    """``<out>/thumbs/<clip_id>.jpg``."""
    return out / "thumbs" / f"{clip_id}.jpg"


def write_thumbnail(path: Path, crop: Picture) -> None:
    """A JPEG of 128x128; whole or not at all."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        Image.fromarray(crop).resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BOX).save(
            temporary, quality=85
        )
