"""Optional packages: each command says what it needs before it begins. Needs no torch."""

from __future__ import annotations

import json
import re
import shlex
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from rest_lightning.errors import UserError

if TYPE_CHECKING:
    from packaging.requirements import Requirement

DISTRIBUTION = "rest_lightning"
ON_AN_INDEX = False
"""Whether ``pip install rest_lightning`` finds the package. True once it is published."""
MODULES = {
    "synthetic": ("espeakng_loader", "skia"),
    "prepare": ("mediapipe", "cv2"),
    "metrics": ("torch_fidelity",),
    "serve": ("aiohttp", "prometheus_client"),
    "converse": ("aiohttp", "prometheus_client"),
    "ray": ("ray",),
}
"""Extra of pyproject.toml -> what can be imported once it is installed."""


def require(extra: str, what: str) -> None:
    """Raises a UserError that names the extra when a package of it is missing; imports nothing.

    Args:
        extra: a key of :data:`MODULES`.
        what: needs it, such as ``rest serve``.
    """
    for module in MODULES[extra]:
        if find_spec(module) is None:
            raise missing(module, extra, what)


def missing(module: str | None, extra: str, what: str) -> UserError:
    """The mistake that a package is not installed."""
    return UserError(
        f"expected the package {module} for {what}, found none: {install_command(extra)}"
    )


def install_command(extra: str) -> str:
    """Returns a command that installs an extra, on one line, to be given in any folder.

    As long as no index has the package it names what this installation came from, as pip recorded
    it (``direct_url.json``, PEP 610): the checkout, the wheel or the repository. Where that is gone
    it names the packages of the extra.
    """
    if ON_AN_INDEX:
        return f"pip install 'rest_lightning[{extra}]'"
    # In a checkout the metadata of its build (egg-info, with a list of sources) hide the others.
    found = metadata.distributions(name=DISTRIBUTION)
    installed = next((each for each in found if each.read_text("SOURCES.txt") is None), None)
    text = None if installed is None else installed.read_text("direct_url.json")
    origin = json.loads(text or "{}")
    url = urlsplit(origin.get("url", ""))
    folder = Path(unquote(url.path))
    if "vcs_info" in origin:
        at = f"{origin['vcs_info']['vcs']}+{url.geturl()}@{origin['vcs_info']['commit_id']}"
        return f"pip install {shlex.quote(f'rest_lightning[{extra}] @ {at}')}"
    if url.scheme == "file" and folder.exists():
        editable = "-e " if origin.get("dir_info", {}).get("editable") else ""
        here = "." if folder == Path.cwd() else folder
        return f"pip install {editable}{shlex.quote(f'{here}[{extra}]')}"
    packages = []
    for each in filter(applies, requirements(extra)):
        each.marker = None  # the shell's pip is that of this Python
        packages.append(str(each))
    return f"pip install {shlex.join(packages)}"


def requirements(extra: str, distribution: str = DISTRIBUTION) -> list[Requirement]:
    """Returns the requirements of an extra and of the extras that it asks for, also those that
    this Python cannot have (:func:`applies`).
    """
    from packaging.requirements import Requirement  # lightning brings it

    found = []
    for requirement in map(Requirement, metadata.requires(distribution) or ()):
        if f'extra == "{extra}"' not in str(requirement.marker):
            continue
        if requirement.name.replace("-", "_") == distribution:
            for other in sorted(requirement.extras):
                found += requirements(other, distribution)
        else:
            found.append(requirement)
    return found


def applies(requirement: Requirement) -> bool:
    """Returns whether a requirement of an extra is one on this Python and system."""
    marker = requirement.marker
    names = re.findall(r'extra == "([^"]+)"', str(marker))
    return marker is None or any(marker.evaluate({"extra": name}) for name in names)


def extra_of(module: str | None) -> str | None:
    """Returns the extra that brings a module, or None."""
    name = (module or "").partition(".")[0]
    return next((extra for extra, names in MODULES.items() if name in names), None)
