"""Synthetic talkers in the prepared-clip layout: text -> speech -> face track -> frames -> mp4 and
sidecar.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rest_lightning.data import layout
from rest_lightning.data.making import (
    check_arguments,
    check_folder,
    check_sizes,
    is_finished,
    remove_dataset,
    run_clips,
)
from rest_lightning.data.synthetic.motion import head_motion
from rest_lightning.data.synthetic.script import Script, sample_script
from rest_lightning.data.synthetic.track import FaceTrack
from rest_lightning.data.synthetic.visemes import mouth_curves
from rest_lightning.errors import UserError
from rest_lightning.media.files import rounded, swept

GENERATOR_VERSION = 1
"""Raised whenever the same seed gives other clips than before; a dataset never mixes versions."""

_KIND = "synthetic talkers"
_CRF = 16


@dataclass(frozen=True)
class SyntheticClip:
    """One clip in memory.

    Attributes:
        frames: uint8 (F, size, size, 3), RGB.
        audio: float32 (640 * F,), 16 kHz mono.
        sidecar: true mouth opening, landmarks, text and split.
        track: the curves that drove the face.
    """

    frames: NDArray[np.uint8]
    audio: NDArray[np.float32]
    sidecar: layout.Sidecar
    track: FaceTrack


def face_track(rng: np.random.Generator, script: Script, num_frames: int) -> FaceTrack:
    """Curves of a face that speaks ``script`` and moves as drawn from ``rng``."""
    mouth = mouth_curves(script.phonemes, script.speech, num_frames)
    motion = head_motion(rng, num_frames, script.phonemes)
    return FaceTrack(
        mouth_opening=mouth.opening,
        mouth_width=mouth.width,
        lip_rounding=mouth.rounding,
        tongue=mouth.tongue,
        **vars(motion),
    )


def synthesize_clip(
    index: int, seed: int = 0, split: str = "train", size_px: int = 128, num_frames: int = 113
) -> SyntheticClip:
    """Make clip ``index`` of a seed: its own identity, words and motion.

    A pure function: the same arguments give the same bits, in any process and order. Longer clips
    hold several sentences with pauses.

    Args:
        index: number of the clip, which is also its identity.
        seed: of the dataset.
        split: ``train``, or ``val`` and ``test``, whose words never occur in training clips.
        size_px: side of the frames, even.
        num_frames: F at 25 fps.

    Raises:
        UserError: an argument out of its range, or the package espeakng-loader is missing.
    """
    from rest_lightning.data.synthetic.face import render_clip
    from rest_lightning.data.synthetic.identity import sample_identity

    check_sizes(size_px, num_frames, least_px=32, least_frames=1)
    if split not in layout.SPLITS:
        raise UserError(f"expected split train, val or test, got {split!r}: choose one of them")
    # One stream per part, so that a change of one part leaves the others as they were.
    words, motion, looks = (np.random.default_rng([seed, index, part]) for part in range(3))
    script = sample_script(words, num_frames, held_out=split != "train")
    track = face_track(motion, script, num_frames)
    rendered = render_clip(sample_identity(looks), track, size_px)
    sidecar = layout.Sidecar(
        clip_id=clip_id_of(index),
        identity=f"synthetic-{seed}-{index:06d}",
        source=f"rest_lightning synthetic talkers v{GENERATOR_VERSION}, seed {seed}, index {index}",
        num_frames=num_frames,
        size_px=size_px,
        split=split,
        mouth_opening=rounded(track.mouth_opening),
        landmarks=rounded(rendered.landmarks),
        speech=script.info,
    )
    return SyntheticClip(frames=rendered.frames, audio=script.audio, sidecar=sidecar, track=track)


def clip_id_of(index: int) -> str:
    """File stem of clip ``index``."""
    return f"talker_{index:06d}"


def split_of_index(index: int, val_fraction: float, test_fraction: float) -> str:
    """Split of clip ``index``: held-out clips are spread evenly, and stay where they are when clips
    are added.
    """
    fraction = val_fraction + test_fraction
    # The small constant keeps 0.1 + 0.2 and the like from losing a clip to rounding.
    number = math.floor(index * fraction + 1e-9)
    if math.floor((index + 1) * fraction + 1e-9) == number:
        return "train"
    share = val_fraction / fraction
    is_val = math.floor((number + 1) * share + 1e-9) > math.floor(number * share + 1e-9)
    return "val" if is_val else "test"


def synthesize(
    out: str | os.PathLike[str],
    num_clips: int,
    size_px: int = 128,
    num_frames: int = 113,
    seed: int = 0,
    num_workers: int = 2,
    val_fraction: float = 0.05,
    test_fraction: float = 0.05,
    overwrite: bool = False,
) -> Path:
    """Make a dataset of synthetic talkers in the prepared-clip layout, one identity per clip.

    Calling it again continues where it stopped: finished clips are checked and kept. With a larger
    ``num_clips`` it adds clips. Any other change of the arguments is refused, because the clips
    would not fit together.

    Args:
        out: folder of the dataset.
        num_clips: clips in all splits together.
        size_px: side of the frames in pixels, even.
        num_frames: frames per clip at 25 fps; 8n + 1 fits the autoencoder.
        seed: the same seed gives the same clips, whatever ``num_workers``.
        num_workers: processes, of one thread each; 1 works in this process.
        val_fraction: share of the clips in the validation split (words never heard in training).
        test_fraction: share of the clips in the test split (words never heard in training).
        overwrite: delete the synthetic dataset in ``out`` first.

    Returns:
        The folder.

    Raises:
        UserError: bad arguments, a folder with something else in it, or a dataset made with other
            arguments.
    """
    out = Path(out)
    arguments = {
        "num_clips": num_clips,
        "size_px": size_px,
        "num_frames": num_frames,
        "seed": seed,
        "val_fraction": val_fraction,
        "test_fraction": test_fraction,
    }
    check_sizes(size_px, num_frames, least_px=32, least_frames=1)
    check_arguments(num_clips, num_workers, val_fraction, test_fraction)
    info = {"kind": _KIND, "generator_version": GENERATOR_VERSION, "arguments": arguments}
    if overwrite:
        remove_dataset(out, _KIND, "talker_")
    check_folder(out, _KIND, info)
    (out / "clips").mkdir(parents=True, exist_ok=True)
    layout.write_dataset_json(
        out, info
    )  # before the first clip: an interrupted run knows what it was

    indices = [
        i for i in range(num_clips) if not is_finished(out, clip_id_of(i), size_px, num_frames)
    ]
    make = partial(
        _make_clip,
        out=out,
        seed=seed,
        size_px=size_px,
        num_frames=num_frames,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
    )
    with swept(out, out / "clips"):
        run_clips(make, indices, num_workers, num_clips)
    layout.finish_dataset(out, info, [clip_id_of(i) for i in range(num_clips)])
    return out


def write_clip(out: str | os.PathLike[str], clip: SyntheticClip) -> None:
    """Write mp4 and sidecar of a clip into the dataset folder ``out``; each appears only when it is
    whole.
    """
    from rest_lightning.media.writer import Mp4Writer

    path = layout.clip_path(out, clip.sidecar.clip_id)
    with Mp4Writer(path, clip.sidecar.size_px, crf=_CRF, overwrite=True) as writer:
        writer.write(clip.frames)
        writer.write_audio(clip.audio)
    layout.write_sidecar(out, clip.sidecar)


def _make_clip(
    index: int,
    out: Path,
    seed: int,
    size_px: int,
    num_frames: int,
    val_fraction: float,
    test_fraction: float,
) -> int:
    split = split_of_index(index, val_fraction, test_fraction)
    write_clip(out, synthesize_clip(index, seed, split, size_px, num_frames))
    return index
