"""Pictures with faults, read as portraits: pixels come out, or one line."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path

import numpy as np
from mutations import mutated
from stills import face
from tries import loop

from rest_lightning.media.portrait import read_portrait

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


@cache
def picture(kind: str) -> bytes:
    """A face in a file format."""
    file = io.BytesIO()
    how = {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0"} if kind in ("JPEG", "WEBP") else {}
    face(160, 192).save(file, kind, **how)
    return file.getvalue()


def one(seed: int) -> None:
    """One file."""
    kind = FORMATS[seed % len(FORMATS)]
    path = Path(f"portrait.{kind.lower()}")
    path.write_bytes(mutated(picture(kind), seed))
    pixels = read_portrait(path, 64, "centre" if seed % 10 else "auto")
    assert pixels.shape == (64, 64, 3) and pixels.dtype == np.uint8


loop(one)
