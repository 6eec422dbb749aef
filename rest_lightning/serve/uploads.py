"""Portraits and sound files of strangers: decoded by a process of their own, with little time and
memory.

``python -m rest_lightning.serve.uploads portrait|sound LIMIT SIZE`` is that process: it reads the
file ``upload`` in its working folder and writes PNG or raw samples to stdout, or one line to stderr
and exits with 2.
"""

from __future__ import annotations

import asyncio
import io
import os
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from rest_lightning.errors import UserError
from rest_lightning.media.portrait import load_portrait
from rest_lightning.processes import PARENT_VARIABLE, end_with_parent
from rest_lightning.talking_head import portraits_in

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class _Portrait:
    name: str
    png: bytes
    used_s: float
    owner: str = ""


class Portraits:
    """Bundled portraits, and uploaded ones in memory: those have ids that cannot be guessed, and
    are never listed.

    Args:
        max_uploaded: how many are kept; the one unused for longest goes first.
        keep_s: an unused one goes after this time.
        files: the bundled ones, PNG; None takes those of the package.
    """

    def __init__(
        self, max_uploaded: int = 64, keep_s: float = 3600.0, files: Sequence[Path] | None = None
    ) -> None:
        self._max, self._keep_s = max_uploaded, keep_s
        files = files or portraits_in()
        self._bundled = {file.stem: file.read_bytes() for file in files}
        self._uploaded: dict[str, _Portrait] = {}
        self._lock = threading.Lock()  # sessions load portraits in threads of their own

    def listed(self) -> list[dict[str, str]]:
        """Ids and names of the bundled portraits."""
        return [{"id": name, "name": name.replace("_", " ").capitalize()} for name in self._bundled]

    def add(self, png: bytes, owner: str = "") -> str:
        """Keep an uploaded portrait; returns its id.

        An owner (an address) that has a quarter of all places loses its own oldest one, and no one
        else's.
        """
        name = "u" + secrets.token_urlsafe(12)
        with self._lock:
            self._expire()
            own = [name for name, each in self._uploaded.items() if each.owner == owner]
            if owner and len(own) >= max(1, self._max // 4):
                del self._uploaded[min(own, key=lambda name: self._uploaded[name].used_s)]
            while len(self._uploaded) >= self._max:
                del self._uploaded[
                    min(self._uploaded, key=lambda name: self._uploaded[name].used_s)
                ]
            self._uploaded[name] = _Portrait(name, png, time.monotonic(), owner)
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
                    "expected the id of a portrait, got one that is unknown or was forgotten: drop "
                    "it again"
                )
            portrait = self._uploaded[name]
            portrait.used_s = time.monotonic()
            return portrait.png

    def load(self, name: str | None, size_px: int) -> Tensor:
        """A portrait (3, size_px, size_px) in [-1, 1]; None takes the first bundled one. Raises as
        :meth:`png`.
        """
        png = self.png(name if name is not None else next(iter(self._bundled)))
        with Image.open(io.BytesIO(png)) as image:
            return load_portrait(image, size_px, crop="centre")  # cut when it was uploaded

    def _expire(self) -> None:
        oldest_s = time.monotonic() - self._keep_s
        self._uploaded = {
            name: each for name, each in self._uploaded.items() if each.used_s >= oldest_s
        }


_NAME = "upload"
_PICTURE_SIDE_PX = 1280  # looking for a face in it takes a second at most
_MEMORY_BYTES = 2_000_000_000
_DAMAGED = "it is damaged, too large, or something else; export it again"
# What FFmpeg would guess from anything else includes playlists, which name other files.
_MPEG_STARTS = tuple(
    bytes((0xFF, second)) for second in (0xFB, 0xFA, 0xF3, 0xF2, 0xF1, 0xF9)
)  # mp3 and raw aac
_SOUND_STARTS = (
    b"RIFF",
    b"RF64",
    b"fLaC",
    b"OggS",
    b"ID3",
    b"FORM",
    b"caff",
    b"#!AMR",
    b"\x1a\x45\xdf\xa3",
)


_FOLDER = "rest_upload_"
RECORDING_FOLDER = "rest_recording_"


def remove_stale_folders() -> int:
    """Remove the temporary folders of servers that were killed while a file came in, or with
    recordings; returns how many. A folder's name holds the number of the process it belongs to.
    """
    num_removed = 0
    for prefix in (_FOLDER, RECORDING_FOLDER):
        for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
            number = folder.name.removeprefix(prefix).partition("_")[0]
            if not number.isdecimal() or folder.is_symlink() or _is_alive(int(number)):
                continue
            with suppress(OSError):
                if folder.stat().st_uid == os.getuid():
                    shutil.rmtree(folder)
                    num_removed += 1
    return num_removed


def _is_alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        return True
    return True


class Uploads:
    """Decodes a few uploads at a time.

    Args:
        num_at_once: processes; others wait.
        timeout_s: a process that takes longer is killed.
        image_side_px: largest side of an image; sound_s: longest sound.
    """

    def __init__(
        self,
        num_at_once: int = 2,
        timeout_s: float = 20.0,
        image_side_px: int = 8192,
        sound_s: float = 300.0,
    ) -> None:
        self._places = asyncio.Semaphore(num_at_once)
        self._timeout_s, self._image_side_px, self._sound_s = timeout_s, image_side_px, sound_s

    async def portrait(self, data: bytes, size_px: int) -> bytes:
        """The head in an image file, as a square PNG of ``size_px``.

        The stranger's file is decoded in a process of its own; the face is found here, where the
        networks are loaded, in the plain picture that comes back.

        Raises:
            UserError: it is no image, too large, or shows no face or several.
        """
        picture = await self._decode(
            data, "portrait", str(self._image_side_px), str(_PICTURE_SIDE_PX)
        )
        return await asyncio.to_thread(_cut, picture, size_px)

    async def sound(self, data: bytes) -> bytes:
        """A sound file as raw samples, s16le mono 16 kHz. Raises a UserError when it is none, or
        too long.
        """
        return await self._decode(data, "sound", str(self._sound_s), "0")

    async def _decode(self, data: bytes, *arguments: str) -> bytes:
        async with self._places:
            with tempfile.TemporaryDirectory(prefix=f"{_FOLDER}{os.getpid()}_") as folder:
                await asyncio.to_thread((Path(folder) / _NAME).write_bytes, data)
                return await self._run(folder, arguments)

    async def _run(self, folder: str, arguments: tuple[str, ...]) -> bytes:
        module = [sys.executable, "-P", "-m", "rest_lightning.serve.uploads", *arguments]
        package = str(Path(__file__).resolve().parents[2])
        search = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        kept = {
            name: os.environ[name]
            for name in ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT")
            if name in os.environ
        }
        process = await asyncio.create_subprocess_exec(
            *module,
            cwd=folder,
            env=kept
            | {"PYTHONPATH": search, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            | {PARENT_VARIABLE: str(os.getpid())},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(self._timeout_s):
                out, said = await process.communicate()
        except TimeoutError:
            raise UserError(
                f"expected a file that is decoded within {self._timeout_s:g} s, got a slower one: "
                f"{_DAMAGED}"
            ) from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode == 0:
            return out
        lines = (
            said.decode(errors="replace").strip().splitlines() if process.returncode == 2 else []
        )
        raise UserError(
            lines[-1]
            if lines
            else f"expected a file that can be decoded, got one that cannot: {_DAMAGED}"
        )


def main(kind: str, limit: str, size: str) -> int:
    """The process: decodes ``upload`` in the working folder to stdout."""
    end_with_parent()
    _limit_resources()
    try:
        data = _portrait(int(limit), int(size)) if kind == "portrait" else _sound(float(limit))
    except UserError as error:
        text = " ".join(str(error).split()).replace(_NAME, "the file")
        print(text, file=sys.stderr)
        return 2
    except MemoryError:
        print(f"expected a file that needs less memory: {_DAMAGED}", file=sys.stderr)
        return 2
    sys.stdout.buffer.write(data)
    return 0


def _limit_resources() -> None:
    try:
        import resource
    except ImportError:  # not on Windows: the parent's clock is the only limit there
        return
    for kind, most in (
        (resource.RLIMIT_AS, _MEMORY_BYTES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        with suppress(ValueError, OSError):  # a system that does not know one
            resource.setrlimit(kind, (most, most))


def _cut(picture: bytes, size_px: int) -> bytes:
    """The head in a PNG, as a square PNG."""
    import io

    from PIL import Image

    from rest_lightning.media.portrait import find_portrait

    with Image.open(io.BytesIO(picture)) as image:
        try:
            square = find_portrait(image, option=None).square(size_px)
        except UserError as error:
            raise UserError(
                str(error).replace(f"the given {type(image).__name__}", "the file")
            ) from None
    file = io.BytesIO()
    Image.fromarray(square).save(file, "PNG")
    return file.getvalue()


def _portrait(side_px: int, size_px: int) -> bytes:
    """The whole picture as a PNG, its longer side at most ``size_px``."""
    import io
    import warnings

    from PIL import Image

    from rest_lightning.media.portrait import find_portrait

    warnings.simplefilter("ignore")
    try:
        with Image.open(_NAME) as image:
            width, height = image.size
    except Exception:
        width = height = 0  # find_portrait tells what is wrong
    if max(width, height) > side_px:
        raise UserError(
            f"expected an image of at most {side_px} x {side_px} pixels, got {width} x {height}: "
            "scale it"
        )
    picture = find_portrait(_NAME, "centre").picture
    picture.thumbnail((size_px, size_px), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _sound(longest_s: float) -> bytes:
    import numpy as np

    from rest_lightning.media.audio import open_speech

    head = Path(_NAME).read_bytes()[:16]
    if not head.startswith(_SOUND_STARTS + _MPEG_STARTS) and head[4:8] != b"ftyp":
        raise UserError(
            "expected a sound file (wav, mp3, flac, m4a, ogg, webm or mp4), got something else: "
            "export it"
        )
    speech = open_speech(_NAME, longest_s=longest_s)
    return (np.clip(speech.read_all(), -1.0, 1.0) * 32767.0).round().astype("<i2").tobytes()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
