"""Output files: checked before the work begins, written beside their place, moved there when
whole.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from rest_lightning.errors import UserError


class Closing(ABC):
    """What is closed at the end of its ``with`` block."""

    @abstractmethod
    def close(self) -> None:
        """Releases what is held."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_output(path: str | os.PathLike[str], overwrite: bool, suffix: str = ".mp4") -> Path:
    """Raises a UserError when ``path`` cannot become an output file; cheap, to be called before
    long work.
    """
    path = Path(path)
    folder = path.parent
    if path.is_dir():
        raise UserError(
            f"expected a file name for the output, got the folder {path}: try "
            f"{path / ('out' + suffix)}"
        )
    if path.suffix.lower() != suffix:
        raise UserError(
            f"expected an output name that ends in {suffix}, got {path}: try "
            f"{path.with_suffix(suffix)}"
        )
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise UserError(
            f"expected a folder {folder} for {path}, found {found} there: create it "
            f"with mkdir -p {folder}"
        )
    if path.exists() and not overwrite:
        raise UserError(
            f"expected a new file name, but {path} exists: choose another name or add --overwrite"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(
            f"expected a writable folder for {path}, got {folder}: choose a folder "
            "that you may write to"
        )
    return path


def explain_write_error(path: Path, error: OSError) -> str:
    """One line for an OSError met while writing ``path``."""
    if error.errno in _NO_SPACE:
        return (
            f"expected room for {path}, but the disk is full: free some space or write to "
            "another disk"
        )
    reason = os.strerror(error.errno).lower() if error.errno else str(error).splitlines()[0]
    return f"expected to write {path}, got '{reason}': choose a folder that you may write to"


def temporary_path(path: PathLike) -> Path:
    """A hidden unused name in ``path``'s folder with its suffix, for what is not whole yet."""
    path = Path(path)
    number = uuid.uuid4().hex[:8]
    return path.with_name(f".{_short_stem(path)}.{os.getpid()}.{number}.part{path.suffix}")


_STEM_BYTES = 100  # a name has 255 bytes on most file systems, and a temporary one is longer


def _short_stem(path: Path) -> str:
    """The name without its ending; of a long one its beginning and a hash."""
    data = os.fsencode(path.stem)
    if len(data) <= _STEM_BYTES:
        return path.stem
    start = data[:_STEM_BYTES].decode("utf-8", "ignore")
    return f"{start}-{hashlib.sha256(data).hexdigest()[:12]}"


def publish(temporary: Path, path: Path, overwrite: bool) -> None:
    """Give a whole file its final name; without ``overwrite`` never over a file that came
    meanwhile.

    Raises:
        UserError: the name is taken by now; the temporary file is removed.
        OSError: the system refuses.
    """
    if overwrite:
        temporary.replace(path)
        return
    try:
        os.link(temporary, path)
    except FileExistsError:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"expected a new file name, but {path} exists by now, another run has written it: "
            "choose another name or add --overwrite"
        ) from None
    except OSError:  # a file system without hard links
        if path.exists():
            temporary.unlink(missing_ok=True)
            raise UserError(
                f"expected a new file name, but {path} exists by now: choose another name"
            ) from None
        temporary.replace(path)
        return
    temporary.unlink(missing_ok=True)


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Removes the temporary files that killed processes left beside ``path``. Nobody else may be
    writing ``path``.
    """
    path = Path(path)
    left = re.compile(
        rf"\.{re.escape(_short_stem(path))}\.\d+(\.[0-9a-f]+)?\.part{re.escape(path.suffix)}"
    )
    for other in path.parent.iterdir():
        if left.fullmatch(other.name):
            other.unlink(missing_ok=True)


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary name in the folder of ``path``; moves it to ``path`` when the block
    succeeds, else removes it.

    Raises:
        UserError: when the operating system refuses.
    """
    path = Path(path)
    temporary = temporary_path(path)
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise UserError(explain_write_error(path, error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, came of a disk, quota or file size that ended."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            return True
        error = error.__cause__
    return False


DECIMALS = 4  # of every number in a JSON array: 1e-4 of the image side is far below a pixel
PathLike = str | os.PathLike[str]


def write_text_atomic(path: PathLike, text: str) -> None:
    """Write ``text`` (UTF-8) so that ``path`` is either the old file or the whole new one; makes
    the folder.

    Raises:
        UserError: when the operating system refuses.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256_of(path: PathLike) -> str:
    """Hex SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def rounded(value: Any, decimals: int = DECIMALS) -> Any:
    """``value`` as plain JSON types: arrays become lists, floats are rounded, NaN and infinity
    become None.
    """
    if hasattr(value, "tolist"):  # numpy arrays and scalars, torch tensors
        value = value.tolist()
    if isinstance(value, float):
        return round(value, decimals) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): rounded(item, decimals) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item, decimals) for item in value]
    return value
