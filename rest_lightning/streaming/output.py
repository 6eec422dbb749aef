"""Output files: checked before the work begins, written beside their place, moved there when whole."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rest_lightning.errors import UserError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_output(path: str | os.PathLike[str], overwrite: bool, suffix: str = ".mp4") -> Path:
    """Raises a UserError when ``path`` cannot become an output file; cheap, to be called before long work."""
    path = Path(path)
    folder = path.parent
    if path.is_dir():
        raise UserError(f"expected a file name for the output, got the folder {path}: try {path / ('out' + suffix)}")
    if path.suffix.lower() != suffix:
        raise UserError(f"expected an output name that ends in {suffix}, got {path}: try {path.with_suffix(suffix)}")
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise UserError(f"expected a folder {folder} for {path}, found {found} there: create it with mkdir -p {folder}")
    if path.exists() and not overwrite:
        raise UserError(f"expected a new file name, but {path} exists: choose another name or add --overwrite")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"expected a writable folder for {path}, got {folder}: choose a folder that you may write to")
    return path


def explain_write_error(path: Path, error: OSError) -> str:
    """One line for an OSError met while writing ``path``."""
    if error.errno in _NO_SPACE:
        return f"expected room for {path}, but the disk is full: free some space or write to another disk"
    reason = os.strerror(error.errno).lower() if error.errno else str(error).splitlines()[0]
    return f"expected to write {path}, got '{reason}': choose a folder that you may write to"


def temporary_name(path: Path, mark: str = "") -> Path:
    """A hidden name beside ``path`` for what is not whole yet; ``mark`` tells several of one process apart."""
    mark = f".{mark}" if mark else ""
    return path.with_name(f".{path.stem}.{os.getpid()}{mark}.part{path.suffix}")


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Removes the temporary files that killed processes left beside ``path``. Nobody else may be writing ``path``."""
    path = Path(path)
    left = re.compile(rf"\.{re.escape(path.stem)}\.\d+(\.[0-9a-f]+)?\.part{re.escape(path.suffix)}")
    for other in path.parent.iterdir():
        if left.fullmatch(other.name):
            other.unlink(missing_ok=True)


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary name in the folder of ``path``; moves it to ``path`` when the block succeeds, else removes it.

    Raises:
        UserError: when the operating system refuses.
    """
    path = Path(path)
    temporary = temporary_name(path)
    try:
        yield temporary
        os.replace(temporary, path)
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
