"""Portraits that sessions can show: the bundled ones, and those that users dropped."""

from __future__ import annotations

import io
import secrets
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from rest_lightning.data.portrait import load_portrait
from rest_lightning.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

ASSETS = Path(__file__).resolve().parent.parent / "assets"


@dataclass
class _Portrait:
    name: str
    png: bytes
    used_s: float


class Portraits:
    """Bundled portraits, and uploaded ones in memory: those have ids that cannot be guessed, and are never listed.

    Args:
        max_uploaded: how many are kept; the one unused for longest goes first.
        keep_s: an unused one goes after this time.
    """

    def __init__(self, max_uploaded: int = 64, keep_s: float = 3600.0) -> None:
        self._max, self._keep_s = max_uploaded, keep_s
        files = [ASSETS / "portrait.png", *sorted((ASSETS / "portraits").glob("*.png"))]
        self._bundled = {file.stem: file.read_bytes() for file in files}
        self._uploaded: dict[str, _Portrait] = {}
        self._lock = threading.Lock()  # sessions load portraits in threads of their own

    def listed(self) -> list[dict[str, str]]:
        """Ids and names of the bundled portraits."""
        return [{"id": name, "name": name.replace("_", " ").capitalize()} for name in self._bundled]

    def add(self, png: bytes) -> str:
        """Keep an uploaded portrait; returns its id."""
        name = "u" + secrets.token_urlsafe(12)
        with self._lock:
            self._expire()
            while len(self._uploaded) >= self._max:
                del self._uploaded[min(self._uploaded, key=lambda name: self._uploaded[name].used_s)]
            self._uploaded[name] = _Portrait(name, png, time.monotonic())
        return name

    def png(self, name: str) -> bytes:
        """The image of an id.

        Raises:
            UserError: there is none.
        """
        if name in self._bundled:
            return self._bundled[name]
        with self._lock:
            self._expire()
            if name not in self._uploaded:
                raise UserError(
                    "expected the id of a portrait, got one that is unknown or was forgotten: drop it again"
                )
            portrait = self._uploaded[name]
            portrait.used_s = time.monotonic()
            return portrait.png

    def load(self, name: str | None, size_px: int) -> Tensor:
        """A portrait (3, size_px, size_px) in [-1, 1]; None takes the first bundled one. Raises as :meth:`png`."""
        png = self.png(name if name is not None else next(iter(self._bundled)))
        with Image.open(io.BytesIO(png)) as image:
            return load_portrait(image, size_px, crop="centre")  # cut when it was uploaded

    def _expire(self) -> None:
        oldest_s = time.monotonic() - self._keep_s
        self._uploaded = {name: each for name, each in self._uploaded.items() if each.used_s >= oldest_s}
