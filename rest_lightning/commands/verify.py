"""Tell what a video says about its origin, and whether it was changed since it was signed.

It reads the comment of the file and its C2PA manifest (extra `provenance`). The exit code is 0 when
nothing contradicts the file, 1 when its signature is broken. A file without any mark proves
nothing: marks can be removed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

EXIT_BROKEN = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("video", type=Path, help="an mp4")
    parser.add_argument("--json", action="store_true", help="print JSON, the manifest with it")


def run(args: argparse.Namespace) -> int:
    """Print what the file says."""
    from rest_lightning.media.provenance import read_provenance

    found = read_provenance(args.video)
    if args.json:
        print(json.dumps(dataclasses.asdict(found) | {"actions": found.actions}, indent=2))
    else:
        print("\n".join(found.lines()))
    return EXIT_BROKEN if found.is_intact is False else 0
