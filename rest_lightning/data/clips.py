"""Reads prepared clips: frames, audio and values per frame, checked against the manifest."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rest_lightning.constants import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME
from rest_lightning.data.augment import Samples
from rest_lightning.data.layout import LANDMARKS, ManifestRow, clip_path, read_sidecar
from rest_lightning.errors import UserError
from rest_lightning.media.files import sha256_of
from rest_lightning.media.video import Backend, Frames, VideoFile, read_clip_audio

Reference = Literal["first_frame", "random_frame", "clip_start"]

_log = logging.getLogger(__name__)


class ClipError(UserError):
    """A user's error that keeps its one line when a data loader's worker raises it.

    torch rebuilds a worker's exception from its printed traceback; only the last line is for the
    user.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rstrip().rpartition(f"{type(self).__name__}: ")[2])


class CorruptClip(UserError):
    """One clip cannot be read; the data set leaves it out."""


@dataclass
class ClipTracks:
    """Audio and per-frame values of one clip: audio (640 F,), mouth_opening (F,), landmarks (F, 3,
    2); NaN unknown.
    """

    audio: Samples
    mouth_opening: NDArray[np.float32]
    landmarks: NDArray[np.float32]


def select_rows(
    rows: Sequence[ManifestRow], num_frames: int, size_px: int | None = None
) -> tuple[list[ManifestRow], dict[str, int]]:
    """Clips that are long enough, and how many were left out for which reason.

    Raises:
        UserError: a clip is not ``size_px`` pixels wide (None: as wide as the first one).
    """
    for row in rows:
        size_px = size_px or row.size_px
        if row.size_px != size_px:
            raise UserError(
                f"clip {row.clip_id}: expected {size_px}x{size_px} pixels, got "
                f"{row.size_px}x{row.size_px}: "
                "prepare all clips at one size, and set size_px to it"
            )
    chosen = [row for row in rows if row.num_frames >= num_frames]
    num_short = len(rows) - len(chosen)
    return chosen, {f"shorter than {num_frames} frames": num_short} if num_short else {}


def check_clip_file(root: str | os.PathLike[str], row: ManifestRow) -> None:
    """CorruptClip when a clip's file is not the one of the manifest: decoders conceal damage,
    checksums do not.
    """
    path = clip_path(root, row.clip_id)
    if path.is_file() and sha256_of(path) != row.sha256:
        raise CorruptClip(
            f"{path}: expected the checksum of the manifest, got another: remake the clip"
        )


def load_frames(
    root: str | os.PathLike[str],
    row: ManifestRow,
    ranges: Sequence[tuple[int, int]] | None = None,
    backend: Backend | None = None,
) -> list[Frames]:
    """Decoded (start, count) ``ranges`` of a clip, each uint8 (count, H, W, 3); the whole clip
    without ``ranges``.

    Raises:
        CorruptClip: it cannot be read, or has fewer frames than its manifest row says.
        ClipError: frame rate or size is not what the layout promises, which no other clip will
            mend.
    """
    path = clip_path(root, row.clip_id)
    try:
        with VideoFile(path, backend) as video:
            if abs(video.fps - FPS) > 0.01:
                raise ClipError(
                    f"{path}: expected {FPS} frames per second, got {video.fps:g}: encode it at "
                    f"{FPS} fps"
                )
            if video.num_frames < row.num_frames:
                raise CorruptClip(
                    f"{path}: expected {row.num_frames} frames as in the manifest, got "
                    f"{video.num_frames}"
                )
            pieces = [video.read(start, count) for start, count in ranges or [(0, row.num_frames)]]
    except (CorruptClip, ClipError):
        raise
    except UserError as error:
        raise CorruptClip(str(error)) from None
    height, width = pieces[0].shape[1:3]
    if (height, width) != (row.size_px, row.size_px):
        raise ClipError(
            f"{path}: expected {row.size_px}x{row.size_px} pixels as in the manifest, got "
            f"{width}x{height}: "
            "remake the data set"
        )
    return pieces


def load_tracks(root: str | os.PathLike[str], row: ManifestRow) -> ClipTracks:
    """Audio, mouth opening and landmarks of a whole clip. Raises CorruptClip or ClipError like
    `load_frames`.
    """
    try:
        sidecar = read_sidecar(root, row.clip_id)
        if (sidecar.fps, sidecar.sample_rate_hz) != (FPS, SAMPLE_RATE):
            raise ClipError(
                f"clip {row.clip_id}: expected {FPS} frames per second and {SAMPLE_RATE} Hz, got "
                f"{sidecar.fps} and "
                f"{sidecar.sample_rate_hz}: encode its sound as 16 kHz mono"
            )
        if sidecar.num_frames != row.num_frames:
            raise CorruptClip(
                f"clip {row.clip_id}: expected {row.num_frames} frames as in the manifest, got "
                f"{sidecar.num_frames}"
            )
        audio = read_clip_audio(clip_path(root, row.clip_id), row.num_frames)
    except (CorruptClip, ClipError):
        raise
    except UserError as error:
        raise CorruptClip(str(error)) from None
    mouth = np.full(row.num_frames, np.nan, np.float32)
    landmarks = np.full((row.num_frames, len(LANDMARKS), 2), np.nan, np.float32)
    if sidecar.mouth_opening is not None:
        mouth[:] = np.array(sidecar.mouth_opening, np.float32)
    if sidecar.landmarks is not None:
        for i, name in enumerate(LANDMARKS):
            landmarks[:, i] = np.array(sidecar.landmarks[name], np.float32)
    return ClipTracks(audio, mouth, landmarks)


def cut_audio(
    audio: Samples, start_frame: int, num_frames: int, left_frames: int, right_frames: int
) -> Samples:
    """Samples of frames [start - left, start + num_frames + right), zeros where the clip has none.

    Args:
        audio: (640 * clip frames,).
        start_frame, num_frames: the window.
        left_frames, right_frames: margins.

    Returns:
        A copy, (640 * (left_frames + num_frames + right_frames),).
    """
    begin = (start_frame - left_frames) * SAMPLES_PER_FRAME
    out = np.zeros((left_frames + num_frames + right_frames) * SAMPLES_PER_FRAME, np.float32)
    low, high = max(begin, 0), min(begin + len(out), len(audio))
    if low < high:
        out[low - begin : high - begin] = audio[low:high]
    return out
