"""Optional packages: each command says what it needs before it begins. Needs no torch."""

from __future__ import annotations

from importlib.util import find_spec

from rest_lightning.errors import UserError

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


def missing(module: str, extra: str, what: str) -> UserError:
    """The mistake that a package is not installed."""
    return UserError(
        f"expected the package {module} for {what}, found none: "
        f"pip install 'rest_lightning[{extra}]'"
    )


def extra_of(module: str | None) -> str | None:
    """Returns the extra that brings a module, or None."""
    name = (module or "").partition(".")[0]
    return next((extra for extra, names in MODULES.items() if name in names), None)
