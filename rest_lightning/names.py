"""Names: those that packages export, loaded on first use, those of other people's packages, and
those of release 0.1 that files still say.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from rest_lightning.errors import UserError


def lazy(
    package: str, homes: Mapping[str, Sequence[str]]
) -> tuple[list[str], Callable[[str], Any]]:
    """Returns ``__all__`` and ``__getattr__`` of a package, and lets ``dir`` show its names.

    Args:
        package: full name of the package.
        homes: module of the package -> public names that it defines.
    """
    module_of = {name: f"{package}.{module}" for module, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(module_of[name]), name)

    loaded = vars(sys.modules[package])
    loaded["__dir__"] = lambda: sorted({*module_of, *(n for n in loaded if n.startswith("__"))})
    return sorted(module_of), get


# Names of packages, comma-separated; child processes inherit them.
IMPORTED = "REST_LIGHTNING_IMPORT"


def import_package(name: str) -> ModuleType:
    """Imports a package or module of the user's, also from the current folder.

    Raises:
        UserError: there is none of this name, or it needs one that is not there.
    """
    look_in_current_folder()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        where = "" if error.name == name else f", which needs {error.name}"
        raise UserError(
            f"expected an installed package, or one in the current folder, got {name}{where}: "
            "check the name and the folder"
        ) from None


def imported_packages() -> list[str]:
    """Returns the packages of ``rest --import``."""
    return [name for name in os.environ.get(IMPORTED, "").split(",") if name]


def add_imported(name: str) -> None:
    """Imports a package, and has the child processes import it, too."""
    import_package(name)
    if name not in imported_packages():
        os.environ[IMPORTED] = ",".join([*imported_packages(), name])


def look_in_current_folder() -> None:
    """Makes modules of the current folder importable, behind everything that is installed."""
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)


# Modules of 0.1 that configuration files, checkpoints and programs name -> where their classes and
# functions are now; in rest_lightning.
_MOVED = {
    "data.audio": "media.audio",
    "data.latents": "data.window_cache",
    "data.portrait": "media.portrait",
    "data.speech_cache": "data.window_cache",
    "data.video": "media.video",
    "evaluation.board": "evaluation.leaderboard",
    "evaluation.generate": "generation",
    "metrics.lpips": "metrics.reconstruction",
    "metrics.talking": "metrics.video",
    "models.autoencoder": "models.vae",
    "models.cache_options": "models.cache",
    "models.principal": "models.vae",
    "serve.portraits": "serve.uploads",
    "streaming.background": "media.writer",
    "streaming.options": "streaming.engine",
    "streaming.pipe": "media.writer",
    "streaming.sheet": "media.sheet",
    "streaming.writer": "media.writer",
    "tasks.checkpoints": "tasks.base",
    "tasks.evaluate": "tasks.predict",
}
MOVED = {f"rest_lightning.{old}": f"rest_lightning.{new}" for old, new in _MOVED.items()}


def accept_old_names() -> None:
    """Let modules of :data:`MOVED` be imported; each class that is taken from one is told on
    stderr, in one line.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        # the last one: it is asked for modules that nobody else has
        sys.meta_path.append(_Finder())


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        new = importlib.import_module(MOVED[module.__name__])

        def get(name: str) -> Any:
            found = getattr(new, name)
            if not name.startswith("__"):
                _tell(f"{module.__name__}.{name}", f"{new.__name__}.{name}")
            return found

        module.__dict__["__getattr__"] = get


@functools.cache  # importing a class asks for it several times
def _tell(old: str, new: str) -> None:
    print(f"note: {old} is called {new} now", file=sys.stderr, flush=True)
