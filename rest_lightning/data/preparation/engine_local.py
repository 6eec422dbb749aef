"""Many videos on the cores of this machine: a process each, replaced when a video kills it; one run
per folder.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from rest_lightning.data.preparation.options import PrepareOptions
from rest_lightning.data.preparation.rows import Row
from rest_lightning.data.preparation.work import (
    fingerprint,
    prepare_video,
    read_record,
    remove_clips,
    source_key,
    source_name,
)
from rest_lightning.errors import UserError
from rest_lightning.processes import end_with_parent

VIDEO_SUFFIXES = (
    *(".3gp", ".avi", ".divx", ".f4v", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4"),
    *(".mpeg", ".mpg", ".mts", ".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv"),
)


def find_videos(root: Path, out: Path) -> list[Path]:
    """All videos below a folder, by their suffix, sorted; links are followed, each folder once;
    ``out`` is left out.

    Raises:
        UserError: no such folder, or no video in it.
    """
    if not root.is_dir():
        came = "a file" if root.exists() else "no such folder"
        raise UserError(f"expected a folder of videos, got {came}: {root}")
    videos: list[Path] = []
    seen: set[tuple[int, int]] = set()
    for folder, names, files in os.walk(root, followlinks=True):
        info = os.stat(folder)
        if (info.st_dev, info.st_ino) in seen or (out.exists() and os.path.samefile(folder, out)):
            names.clear()  # a loop of links, or our own clips
            continue
        seen.add((info.st_dev, info.st_ino))
        names.sort()
        videos += [
            Path(folder) / name
            for name in files
            if os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES
        ]
    if not videos:
        raise UserError(
            f"expected videos ({', '.join(VIDEO_SUFFIXES)}) in {root}, got none: check the folder"
        )
    return sorted(videos, key=os.fsencode)


def run(
    sources: Sequence[Path],
    root: Path,
    out: Path,
    options: PrepareOptions,
    num_workers: int = 2,
    progress: bool = True,
) -> list[Row]:
    """Prepare all videos; those that are done already are not touched. The caller
    holds the folder, see :func:`rest_lightning.processes.owned`.

    A video whose process dies (a crash inside a decoder, no memory) becomes a failed row and is
    tried again by the next run. The order of the rows is that of ``sources``, whatever the number
    of workers.

    Args:
        sources: videos below ``root``.
        root: folder of the input.
        out: folder of the dataset.
        options: sizes and thresholds.
        num_workers: processes, of one thread each.
        progress: whether a bar is shown on stderr.

    Raises:
        UserError: the output cannot be written; a later run goes on.
    """
    if num_workers < 1:
        raise UserError(
            f"expected num_workers of at least 1, got {num_workers}: use the number of cores"
        )
    rows: dict[int, list[Row]] = {}
    waiting: deque[int] = deque()
    for number, path in enumerate(sources):
        done = read_record(out, source_key(path, root), fingerprint(path, options))
        if done is None:
            waiting.append(number)
        else:
            rows[number] = done
    with progress_bar(sources, list(rows), progress) as advance:
        for number, result in _results(sources, waiting, root, out, options, num_workers):
            rows[number] = result
            advance(number)
    return [row for number in range(len(sources)) for row in rows[number]]


@dataclass
class _Worker:
    """A process and the video that it works on."""

    process: Any
    pipe: Connection
    number: int | None = None


def _results(
    sources: Sequence[Path],
    waiting: deque[int],
    root: Path,
    out: Path,
    options: PrepareOptions,
    num_workers: int,
) -> Iterator[tuple[int, list[Row]]]:
    """Rows of each waiting video as it is done."""
    workers: list[_Worker] = []
    try:
        while waiting or any(worker.number is not None for worker in workers):
            while waiting and len(workers) < min(num_workers, len(waiting) + len(workers)):
                workers.append(_start(root, out, options))
            for worker in workers:
                if worker.number is None and waiting:
                    worker.number = waiting.popleft()
                    with suppress(ConnectionError):  # it died idle: what follows finds out
                        worker.pipe.send(sources[worker.number])
            busy = {worker.pipe: worker for worker in workers if worker.number is not None}
            for pipe in wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]
                number = worker.number
                assert number is not None
                try:
                    answer = worker.pipe.recv()
                except (EOFError, ConnectionError):  # it died
                    workers.remove(worker)
                    yield number, [_crashed(worker, sources[number], root, out)]
                    continue
                if isinstance(answer, UserError):
                    raise answer
                worker.number = None
                yield number, answer
    finally:
        for worker in workers:
            worker.process.terminate()
            worker.process.join()


class VideoProcess:
    """One process that prepares video after video and is replaced when one kills it: what other
    engines work with.

    Args:
        root: folder of the input.
        out: folder of the dataset.
        options: sizes and thresholds.
    """

    def __init__(self, root: Path, out: Path, options: PrepareOptions) -> None:
        self.root, self.out, self.options = root, out, options
        self._worker: _Worker | None = None

    def prepare(self, path: Path) -> list[Row]:
        """Rows of one video; a failed row when the process dies over it. Raises a UserError as
        `run` does.
        """
        self._worker = self._worker or _start(self.root, self.out, self.options)
        try:
            self._worker.pipe.send(path)
            answer = self._worker.pipe.recv()
        except (EOFError, ConnectionError):
            worker, self._worker = self._worker, None
            return [_crashed(worker, path, self.root, self.out)]
        if isinstance(answer, UserError):
            raise answer
        rows: list[Row] = answer
        return rows


def _crashed(worker: _Worker, path: Path, root: Path, out: Path) -> Row:
    worker.process.join()
    code = worker.process.exitcode
    how = f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"
    remove_clips(out, source_key(path, root))
    reason = (
        f"the process that worked on it ended by {how}: a decoder crashed or memory ran out; "
        "tried again next time"
    )
    return Row(source_name(path, root), None, "failed", "decode", reason)


def _start(root: Path, out: Path, options: PrepareOptions) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, root, out, options), daemon=True)
    process.start()
    theirs.close()  # else our end would never see that theirs is gone
    return _Worker(process, ours)


def _work(pipe: Connection, root: Path, out: Path, options: PrepareOptions) -> None:
    """Loop of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    end_with_parent()
    quiet = os.open(os.devnull, os.O_WRONLY)
    # decoders and mediapipe's C++ log there, line upon line; what matters comes back as rows
    os.dup2(quiet, 2)
    while True:
        try:
            path = pipe.recv()
        except (EOFError, ConnectionError):  # the parent is gone
            return
        try:
            pipe.send(prepare_video(path, root, out, options))
        except UserError as error:
            pipe.send(UserError(str(error)))


@contextmanager
def progress_bar(
    sources: Sequence[Path], done: list[int], progress: bool
) -> Iterator[Callable[[int], None]]:
    """A bar in bytes of video, which tell the time left better than their number does."""
    from tqdm import tqdm

    sizes = [_size(path) for path in sources]
    num_done = len(done)

    with tqdm(
        total=sum(sizes),
        initial=sum(sizes[number] for number in done),
        unit="B",
        unit_scale=True,
        disable=not progress,
        desc=f"videos {num_done}/{len(sources)}",
        smoothing=0.05,
    ) as bar:

        def advance(number: int) -> None:
            nonlocal num_done
            num_done += 1
            bar.set_description(f"videos {num_done}/{len(sources)}", refresh=False)
            bar.update(sizes[number])

        yield advance


def _size(path: Path) -> int:
    try:
        return max(1, path.stat().st_size)
    except OSError:
        return 1
