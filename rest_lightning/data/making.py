"""Data sets that are made clip by clip: workers, progress, resuming, and folders that never mix two
recipes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rest_lightning.constants import SAMPLES_PER_FRAME
from rest_lightning.data import layout
from rest_lightning.errors import UserError
from rest_lightning.processes import LOCK_NAME, end_with_parent

MayChange = Callable[[str, Any, Any], bool]


def run_clips(
    make: Callable[[Any], Any], todo: Sequence[Any], num_workers: int, num_clips: int
) -> None:
    """Calls ``make`` for every item of ``todo`` with a progress bar that counts to ``num_clips``.

    Args:
        make: a picklable function; with one worker it runs in this process.
        todo: what is left to make.
        num_workers: processes, of one thread each.
        num_clips: clips of the whole set, those that are there included.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress, _results(make, todo, num_workers) as results:
        task = progress.add_task("clips", total=num_clips, completed=num_clips - len(todo), rate="")
        for _ in results:
            speed = progress.tasks[0].speed
            progress.update(task, advance=1, rate=f"{speed:.1f} clips/s" if speed else "")


def check_arguments(
    num_clips: int, num_workers: int, val_fraction: float, test_fraction: float
) -> None:
    """Checks what every data set that is made clip by clip is asked for.

    Raises:
        UserError: fewer than one clip or worker, or no share left for the training split.
    """
    if num_clips < 1:
        raise UserError(f"expected num_clips of at least 1, got {num_clips}: use 500")
    if num_workers < 1:
        raise UserError(
            f"expected num_workers of at least 1, got {num_workers}: use the number of cores"
        )
    if val_fraction < 0 or test_fraction < 0 or val_fraction + test_fraction > 1:
        raise UserError(
            "expected val_fraction and test_fraction of 0 to 1 together, "
            f"got {val_fraction} and {test_fraction}: use 0.05 and 0.05"
        )


def check_sizes(size_px: int, num_frames: int, least_px: int, least_frames: int) -> None:
    """Checks the size and the length of clips.

    Raises:
        UserError: frames that are odd or too small, or too few of them.
    """
    if size_px < least_px or size_px % 2:
        raise UserError(
            f"expected an even size_px of at least {least_px}, got {size_px}: use 128 or 256"
        )
    if num_frames < least_frames:
        raise UserError(
            f"expected num_frames of at least {least_frames}, got {num_frames}: use 113"
        )


def is_finished(out: Path, clip_id: str, size_px: int, num_frames: int) -> bool:
    """Whether both files of a clip are there and whole: the sidecar parses and the mp4 holds every
    packet.
    """
    if not layout.is_complete(out, clip_id):
        return False
    import av

    from rest_lightning.media.container import open_media

    try:
        sidecar = layout.read_sidecar(out, clip_id)
        with open_media(layout.clip_path(out, clip_id)) as container:
            num_packets, duration = 0, 0
            for packet in container.demux():
                if packet.is_corrupt:  # cut off
                    return False
                if packet.size and packet.stream.type == "video":
                    num_packets += 1
                elif packet.size:
                    duration += packet.duration or 0
    except (UserError, av.FFmpegError, OSError):
        return False
    sizes = (sidecar.num_frames, sidecar.size_px, num_packets)
    return sizes == (num_frames, size_px, num_frames) and duration >= num_frames * SAMPLES_PER_FRAME


def check_folder(out: Path, kind: str, info: Mapping[str, Any]) -> None:
    """UserError unless ``out`` is new, empty, or a set of this ``kind`` made with the same
    arguments.

    Args:
        out: folder of the data set.
        kind: what ``dataset.json`` says, such as ``synthetic talkers``.
        info: what is to be written to ``dataset.json``: generator_version and arguments.
            ``num_clips`` may grow.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"expected a folder, got the file {out}: choose another name")
    if all(path.name == LOCK_NAME for path in out.iterdir()):
        return
    if not (out / "dataset.json").is_file():
        raise UserError(
            f"expected a new or empty folder, got {out} with other files in it: choose another "
            "folder"
        )
    there = layout.read_dataset_json(out)
    if there.get("kind") != kind:
        raise UserError(
            f"expected a folder of {kind}, got another dataset in {out}: choose another folder"
        )
    before = {"generator_version": there.get("generator_version"), **there.get("arguments", {})}
    now = {"generator_version": info["generator_version"], **info["arguments"]}
    differences = [
        f"{name} {before.get(name)} (now {value})"
        for name, value in now.items()
        if before.get(name) != value
        and not (name == "num_clips" and (before.get(name) or 0) < value)
    ]
    if differences:
        raise UserError(
            f"expected the arguments that {out} was made with, got others: it has "
            f"{', '.join(differences)}; "
            "repeat them, choose another folder, or set overwrite to start again"
        )


def remove_dataset(out: Path, kind: str, prefix: str) -> None:
    """Deletes the files of a set of this ``kind``, whose clips begin with ``prefix``, and nothing
    else.
    """
    if not (out / "dataset.json").is_file() or layout.read_dataset_json(out).get("kind") != kind:
        return  # check_folder says what is wrong with it
    clips = out / "clips"
    for path in (layout.manifest_path(out), *clips.glob(f"{prefix}*"), *clips.glob(f".{prefix}*")):
        path.unlink(missing_ok=True)
    (out / "dataset.json").unlink()
    with suppress(OSError):
        clips.rmdir()  # refuses when somebody else's files are in it


@contextmanager
def _results(
    make: Callable[[Any], Any], todo: Sequence[Any], num_workers: int
) -> Iterator[Iterator[Any]]:
    num_workers = min(num_workers, len(todo))
    if num_workers <= 1:
        yield map(make, todo)
        return
    with _one_thread_each():
        pool = multiprocessing.get_context("spawn").Pool(num_workers, initializer=_begin_worker)
    with pool:  # leaves by terminate(): after Ctrl-C nothing goes on in the background
        yield pool.imap_unordered(make, todo)


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
    end_with_parent()


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Workers inherit the environment: libraries that read these names start one thread, not one
    per core.
    """
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
