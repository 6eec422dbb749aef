"""After the last video: splits and duplicates, then the files that make the folder a dataset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rest_lightning.data import layout
from rest_lightning.data.preparation.duplicates import mark_duplicates
from rest_lightning.data.preparation.options import PrepareOptions
from rest_lightning.data.preparation.report import write_report
from rest_lightning.data.preparation.rows import Row, sort_rows, write_rows
from rest_lightning.data.preparation.splits import assign_splits

KIND = "prepared videos"


def finish(out: Path, rows: Sequence[Row], options: PrepareOptions) -> list[Row]:
    """Write prepare.jsonl, the clips' sidecars, manifest.jsonl, dataset.json and report.html.

    Args:
        out: folder of the dataset.
        rows: of all videos.
        options: how they were made.

    Returns:
        The rows with identities, splits and duplicates, sorted.

    Raises:
        UserError: a mapping of identities that cannot be read, or a folder that cannot be written.
    """
    rows = sort_rows(mark_duplicates(assign_splits(rows, options), options))
    kept = [row for row in rows if row.status == "kept" and row.clip_id is not None]
    for row in rows:
        if row.clip_id is not None and layout.is_complete(out, row.clip_id):
            _update_sidecar(out, row)
    info = {
        "kind": KIND,
        "options": asdict(options),
        "num_rows_per_status": dict(sorted(Counter(row.status for row in rows).items())),
        "num_rows_per_filter": dict(
            sorted(Counter(row.filter for row in rows if row.filter).items())
        ),
    }
    write_rows(out, rows)
    layout.finish_dataset(out, info, [row.clip_id for row in kept if row.clip_id is not None])
    write_report(out)
    return rows


def _update_sidecar(out: Path, row: Row) -> None:
    """Identity and split, where they have changed: they are known only now."""
    assert row.clip_id is not None
    sidecar = layout.read_sidecar(out, row.clip_id)
    identity, split = row.identity or row.source, row.split or sidecar.split
    if (sidecar.identity, sidecar.split) != (identity, split):
        layout.write_sidecar(out, replace(sidecar, identity=identity, split=split))
