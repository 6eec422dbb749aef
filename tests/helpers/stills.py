"""Pictures of faces for tests that are not about faces."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

STILLS = sorted((Path(__file__).parents[1] / "media" / "stills").glob("*.jpg"))


def face(width: int = 96, height: int = 96, index: int = 3) -> Image.Image:
    """A still scaled to the longer side and cut in the middle."""
    side = max(width, height)
    image = Image.open(STILLS[index]).convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
    left, top = (side - width) // 2, (side - height) // 2
    return image.crop((left, top, left + width, top + height))


def face_png(width: int = 96, height: int = 96, index: int = 3) -> bytes:
    """The same as a PNG file."""
    file = io.BytesIO()
    face(width, height, index).save(file, "PNG")
    return file.getvalue()
