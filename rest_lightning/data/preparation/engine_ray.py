"""Many videos on many machines: the work of the local engine on Ray Data, with the same rows and
the same files.

A running cluster is named by the environment's ``RAY_ADDRESS``; without it, one is started on this
machine for the run. On a cluster every machine needs this package, and the input and the output
folder under the same names (a shared disk).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rest_lightning.data.preparation.engine_local import (
    VideoProcess,
    progress_bar,
)
from rest_lightning.data.preparation.options import PrepareOptions
from rest_lightning.data.preparation.rows import Row
from rest_lightning.data.preparation.work import fingerprint, read_record, source_key
from rest_lightning.errors import UserError
from rest_lightning.ray_cluster import joined

_QUIET = {"logging_level": logging.ERROR, "log_to_driver": False}
_MAX_BLOCKS = 10_000  # of one video each; beyond it several share one


def run(
    sources: Sequence[Path],
    root: Path,
    out: Path,
    options: PrepareOptions,
    num_workers: int = 2,
    progress: bool = True,
) -> list[Row]:
    """Prepare all videos; those that are done already are not touched. The caller holds
    the folder, see :func:`rest_lightning.processes.owned`.

    Arguments, rows and their order are those of
    :func:`rest_lightning.data.preparation.engine_local.run`. A video whose process dies becomes a
    failed row; when a whole machine goes, Ray gives its videos to another one.

    Args:
        num_workers: actors with one core each, over all machines.

    Raises:
        UserError: no Ray, no cluster at ``RAY_ADDRESS``, or the output cannot be written; a later
            run goes on.
    """
    if num_workers < 1:
        raise UserError(
            f"expected num_workers of at least 1, got {num_workers}: use the number of cores"
        )
    # Workers elsewhere have other working directories.
    sources, root, out = [path.absolute() for path in sources], root.absolute(), out.absolute()
    rows: dict[int, list[Row]] = {}
    for number, path in enumerate(sources):
        done = read_record(out, source_key(path, root), fingerprint(path, options))
        if done is not None:
            rows[number] = done
    todo = [number for number in range(len(sources)) if number not in rows]
    with progress_bar(sources, list(rows), progress) as advance:
        if todo:
            with joined(_QUIET, {"num_cpus": num_workers}):
                for number, result in _results(sources, todo, root, out, options, num_workers):
                    rows[number] = result
                    advance(number)
    return [row for number in range(len(sources)) for row in rows[number]]


def _results(
    sources: Sequence[Path],
    todo: Sequence[int],
    root: Path,
    out: Path,
    options: PrepareOptions,
    num_workers: int,
) -> Iterator[tuple[int, list[Row]]]:
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # Bytes, not text: file names need not be UTF-8.
    items = [{"number": number, "path": os.fsencode(sources[number])} for number in todo]
    videos = ray.data.from_items(items, override_num_blocks=min(len(items), _MAX_BLOCKS))
    prepared = videos.map(
        _PrepareVideo,  # type: ignore[arg-type]  # a class is one actor's worth of work, which Ray's annotation leaves out
        fn_constructor_args=(root, out, options),
        num_cpus=1,
        concurrency=min(num_workers, len(items)),
    )
    for answer in prepared.iter_rows():
        if answer["error"]:
            raise UserError(answer["error"])
        yield (
            answer["number"],
            [Row.from_dict(row, "a worker's answer") for row in json.loads(answer["rows"])],
        )


class _PrepareVideo:
    """An actor. Its videos are decoded in a process below it, so that a decoder's crash is a row
    and no lost actor.
    """

    def __init__(self, root: Path, out: Path, options: PrepareOptions) -> None:
        self._process = VideoProcess(root, out, options)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        try:
            rows = self._process.prepare(Path(os.fsdecode(item["path"])))
        except UserError as error:
            return {"number": item["number"], "rows": "[]", "error": str(error)}
        return {
            "number": item["number"],
            "rows": json.dumps([asdict(row) for row in rows]),
            "error": "",
        }
