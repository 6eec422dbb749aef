"""Output files and folders: checked before the work begins, written beside their place, moved
there when whole. What a killed process left beside them is removed by the next one.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import math
import os
import re
import shutil
import socket
import sys
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Self

from rest_lightning.errors import UserError, causes


class Closing(ABC):
    """What is closed at the end of its ``with`` block."""

    @abstractmethod
    def close(self) -> None:
        """Releases what is held."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


TRUST = "REST_LIGHTNING_TRUST_CHECKPOINT"  # child processes inherit it


def is_trusted() -> bool:
    """Whether the user wants files read that may run code: `rest --trust-checkpoint COMMAND`, or
    this variable at 1.
    """
    return os.environ.get(TRUST) == "1"


@contextmanager
def trusting() -> Iterator[None]:
    """Within the block files are read that may run code, by this process and its children."""
    # The second is torch's own, for what Lightning reads.
    wanted = {TRUST: "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OF_A_STREAM = (*_NO_SPACE, errno.EIO, errno.EBADF)
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")  # safetensors


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


def explain_write_error(path: PathLike, error: OSError) -> str:
    """One line for an OSError met while writing ``path``."""
    if error.errno in _NO_SPACE:
        return (
            f"expected room for {path}, but the disk is full: free some space or write to "
            "another disk"
        )
    reason = os.strerror(error.errno).lower() if error.errno else str(error).splitlines()[0]
    return f"expected to write {path}, got '{reason}': choose a folder that you may write to"


def explain_error(error: OSError) -> str | None:
    """One line for an OSError that nobody has explained; None where it looks like a fault of ours.

    One without a file's name came of stdout.
    """
    if error.errno in _NO_SPACE:
        return explain_write_error(error.filename or "stdout", error)
    if error.filename and error.errno:
        reason = os.strerror(error.errno).lower()
        return f"expected to use {error.filename}, got '{reason}': check its name and permissions"
    return explain_write_error("stdout", error) if error.errno in _OF_A_STREAM else None


def refusals(error: BaseException | None) -> Iterator[OSError]:
    """What the operating system refused behind an exception; torch and safetensors wrap that in
    exceptions of their own.
    """
    for cause in causes(error):
        if isinstance(cause, OSError):
            yield cause
        elif found := _RUST_ERROR.search(str(cause)):
            yield OSError(int(found[1]), os.strerror(int(found[1])))


def temporary_path(path: PathLike) -> Path:
    """A hidden unused name in ``path``'s folder with its suffix, for what is not whole yet.

    The name tells which process writes it: the first call in a folder removes what processes that
    have ended left there.
    """
    path = Path(path)
    _remove_orphans(path.parent)
    number = _machine() + uuid.uuid4().hex[:8]
    name = f".{_short_stem(path)}.{os.getpid()}.{number}.part{path.suffix}"
    _given_out.add(path.absolute().with_name(name))
    return path.with_name(name)


_given_out: set[Path] = set()


def remove_own_leftovers() -> None:
    """Removes the temporary files that this process still has, at the end of a command.

    Whoever made one removes it; but Ctrl-C may come after a file is opened and before anybody knows
    of it.
    """
    for path in tuple(_given_out):
        if f".{os.getpid()}." in path.name:  # a fork has those of its parent in the set
            _remove(path)
    _given_out.clear()


_TEMPORARY = re.compile(r"\..*\.(\d+)\.([0-9a-f]{6})[0-9a-f]{8}\.part(\..+)?")
_PART = re.compile(r"\..*\.part(\..+)?")


@cache
def _machine() -> str:
    """Six hex digits of this machine, or container, within which numbers of processes count."""
    processes = Path("/proc/self/ns/pid")
    space = str(processes.readlink()) if processes.is_symlink() else ""
    return hashlib.sha256(f"{socket.gethostname()} {space}".encode()).hexdigest()[:6]


@lru_cache(256)  # a server records in ever new folders
def _remove_orphans(folder: Path) -> None:
    """Once for each folder: the temporary files whose process has ended."""
    with suppress(OSError):
        for entry in os.scandir(folder):
            found = _TEMPORARY.fullmatch(entry.name)
            if found and found[2] == _machine() and not _is_alive(int(found[1])):
                _remove(Path(entry.path))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        pass
    return True


def discard(temporary: Path) -> None:
    """Removes a temporary file that nobody needs any more, if it is still there."""
    _given_out.discard(temporary.absolute())
    _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def remove_parts(*folders: PathLike) -> None:
    """Removes what killed runs have not finished in folders. The caller owns them, see
    :func:`rest_lightning.processes.owned`.
    """
    for folder in folders:
        if Path(folder).is_dir():
            for entry in os.scandir(folder):
                if _PART.fullmatch(entry.name):
                    _remove(Path(entry.path))


_STEM_BYTES = 100  # a name has 255 bytes on most file systems, and a temporary one is longer


def _short_stem(path: Path) -> str:
    """The name without its ending; of a long one its beginning and a hash."""
    data = os.fsencode(path.stem)
    if len(data) <= _STEM_BYTES:
        return path.stem
    start = data[:_STEM_BYTES].decode("utf-8", "ignore")
    return f"{start}-{hashlib.sha256(data).hexdigest()[:12]}"


@contextmanager
def swept(*folders: PathLike) -> Iterator[None]:
    """Before and after the block :func:`remove_parts`: workers that are ended in the middle of a
    file leave it behind.
    """
    remove_parts(*folders)
    try:
        yield
    finally:
        remove_parts(*folders)


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
    with _explained(path, temporary):
        yield temporary
        temporary.replace(path)


@contextmanager
def whole_folder(path: PathLike) -> Iterator[Path]:
    """Gives a new folder beside ``path``; puts it in the place of ``path`` when the block succeeds,
    else removes it.

    A folder under that name is replaced in one step where the file system can exchange two names
    (Linux, macOS). Elsewhere it has another name for a moment, by which :func:`restore_folder`
    finds it if the process ends just then.

    Raises:
        UserError: when the operating system refuses.
    """
    path = Path(os.path.abspath(path))
    temporary = temporary_path(path)
    with _explained(path, temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        restore_folder(path)
        temporary.mkdir()
        yield temporary
        if not path.exists():
            temporary.replace(path)
        elif not _exchange(temporary, path):
            _remove(_replaced(path))
            path.replace(_replaced(path))
            try:
                temporary.replace(path)
            finally:
                restore_folder(path)
    _remove(_replaced(path))


def restore_folder(path: PathLike) -> Path:
    """``path``; where a process ended while it replaced that folder, the old one is put back."""
    path = Path(path)
    if path.name and not path.exists() and _replaced(path).is_dir():
        with suppress(OSError):
            _replaced(path).replace(path)
    return path


def _replaced(path: Path) -> Path:
    return path.with_name(f".{_short_stem(path)}{path.suffix}.replaced")


def _exchange(first: Path, second: Path) -> bool:
    """Whether two names were exchanged in one step."""
    try:
        library = ctypes.CDLL(None, use_errno=True)
        names = os.fsencode(first), os.fsencode(second)
        if sys.platform == "darwin":
            return library.renamex_np(*names, 2) == 0  # RENAME_SWAP
        here = -100  # AT_FDCWD
        return library.renameat2(here, names[0], here, names[1], 2) == 0  # RENAME_EXCHANGE
    except (OSError, AttributeError, TypeError):  # a system without it
        return False


@contextmanager
def _explained(path: Path, temporary: Path) -> Iterator[None]:
    """Removes ``temporary`` at the end; the system's refusals become one line about ``path``."""
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:
        refusal = next(refusals(error), None)
        if refusal is None:
            raise
        raise UserError(explain_write_error(path, refusal)) from error
    finally:
        discard(temporary)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, came of a disk, quota or file size that ended."""
    return any(refusal.errno in _NO_SPACE for refusal in refusals(error))


DECIMALS = 4  # of every number in a JSON array: 1e-4 of the image side is far below a pixel
PathLike = str | os.PathLike[str]


def write_text_atomic(path: PathLike, text: str) -> None:
    """Write ``text`` (UTF-8) so that ``path`` is either the old file or the whole new one; makes
    the folder.

    Raises:
        UserError: when the operating system refuses.
    """
    path = Path(path)
    with suppress(OSError):  # whole_file says what is wrong
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
