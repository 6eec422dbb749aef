"""Result rows become a leaderboard: leaderboard.md, leaderboard.html (one self-contained page) and
leaderboard.json.

Rows of another protocol, other extractors, another number of clips or of frames per clip get a
table of their own. Published figures (rows with "measured": false and a "source") stand beside,
marked as claimed. A picture or clip with the name of a row's file (row.json: row.png, row.jpg,
row.webp, row.gif, row.mp4, row.webm) is shown on the page, as is row.worst.png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rest_lightning.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "results", type=Path, nargs="+", help=("folders of result rows, or JSON files")
    )
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/leaderboard"), help=("folder of the three files")
    )
    parser.add_argument("--title", default="Talking-head leaderboard", help="heading of the page")
    parser.add_argument(
        "--sort-by", help=("metric to sort by (default: FVD, else FID, Sync-C, lip correlation)")
    )
    parser.add_argument(
        "--max-media-mb",
        type=float,
        default=20.0,
        help=("largest picture or clip to embed (default 20)"),
    )


def run(args: argparse.Namespace) -> int:
    """Read all rows, then write all files."""
    from rest_lightning.evaluation.leaderboard import make_board, to_json, to_markdown
    from rest_lightning.evaluation.page import to_html
    from rest_lightning.evaluation.row import read_rows, row_files
    from rest_lightning.media.files import whole_file

    files = [file for file in row_files(args.results) if args.out not in file.parents]
    rows = [(file, row) for file in files for row in read_rows(file)]
    groups = make_board([row for _, row in rows], args.sort_by)
    media: dict[str, list[Path]] = {}
    for file, row in rows:
        media.setdefault(row.method, []).extend(_media_beside(file, args.max_media_mb))
    num_measured = sum(len(group.rows) for group in groups)
    footer = (
        f"Measured rows: {num_measured}; tables of these: "
        f"{sum(bool(group.entries) for group in groups)}; newest: "
    )
    footer += max((row.date for _, row in rows), default="")[:10] or "no date"
    texts = {
        "leaderboard.md": to_markdown(groups, args.title),
        "leaderboard.html": to_html(groups, media, args.title, footer),
        "leaderboard.json": json.dumps(
            to_json(groups), indent=2, ensure_ascii=False, allow_nan=False
        )
        + "\n",
    }
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"expected a folder for the leaderboard, got {args.out} ({error.strerror}): choose "
            "another --out"
        ) from None
    for name, text in texts.items():
        with whole_file(args.out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(f"{args.out / 'leaderboard.html'}: {num_measured} measured rows, tables: {len(groups)}")
    return 0


def _media_beside(file: Path, max_mb: float) -> list[Path]:
    from rest_lightning.media.html import MEDIA_TYPES

    suffixes = (*MEDIA_TYPES, ".worst.png")  # `rest score` and `rest test` draw the worst clips
    found = [path for suffix in suffixes if (path := file.with_suffix(suffix)).is_file()]
    for path in found:
        size_mb = path.stat().st_size / 1e6
        if size_mb > max_mb:
            raise UserError(
                f"expected at most {max_mb:g} MB to embed, but {path} has {size_mb:.1f} MB: "
                "make it smaller, or raise --max-media-mb"
            )
    return found
