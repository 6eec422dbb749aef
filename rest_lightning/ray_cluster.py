"""Ray, for the commands that can use it: the cluster that ``RAY_ADDRESS`` names, or one of this
machine alone.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rest_lightning.errors import UserError


def environment() -> dict[str, str]:
    """What Ray should find in its environment, as far as the user has not set it; it is read when
    Ray is imported.
    """
    wanted = {
        "RAY_USAGE_STATS_ENABLED": "0",  # nothing of a user's work is told to others
        "RAY_DEDUP_LOGS": "0",  # lines of several sessions look alike, and each counts
    }
    if not os.environ.get("RAY_ADDRESS"):
        # Ray's own switch for loopback, whatever its name says: a cluster of one machine listens to
        # nobody else.
        wanted["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    return {name: value for name, value in wanted.items() if name not in os.environ}


@contextmanager
def joined(settings: Mapping[str, Any], own_settings: Mapping[str, Any]) -> Iterator[bool]:
    """Connected to a cluster for as long as the block takes; whoever is connected already stays so.

    Args:
        settings: of ``ray.init``.
        own_settings: further ones, of a cluster that is started here.

    Yields:
        Whether the cluster was started here, and ends with the block.

    Raises:
        UserError: no Ray, or no cluster.
    """
    os.environ.update(environment())
    try:
        import ray
    except ImportError:
        text = (
            "expected the package ray for --engine ray, got none: pip install 'rest_lightning[ray]'"
        )
        raise UserError(f"{text}, or use --engine local") from None
    if ray.is_initialized():
        yield False
        return
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _join(address, settings)
    else:
        _start({**settings, "include_dashboard": False, **own_settings})
    try:
        yield not address
    finally:
        ray.shutdown()


def _join(address: str, settings: Mapping[str, Any]) -> None:
    import ray

    try:
        host, colon, port = address.rpartition(":")
        # Ray itself would try for minutes where nobody listens
        if colon and port.isdigit() and "/" not in host:
            socket.create_connection((host, int(port)), timeout=20).close()
        ray.init(address=address, **settings)
    except Exception as error:  # Ray raises bare ones too
        ray.shutdown()
        text = (
            f"expected a Ray cluster at RAY_ADDRESS={address}, got '{_line(error)}': start "
            "one, "
            "or unset it"
        )
        raise UserError(text) from None


def _start(settings: Mapping[str, Any]) -> None:
    import ray

    for is_last in (False, True):
        try:
            ray.init(address="local", **settings)
            return
        except Exception as error:
            # a bare Exception where Ray's processes took more than its 30 s to start
            ray.shutdown()
            if is_last:
                raise UserError(
                    f"expected a Ray cluster on this machine, got '{_line(error)}': try again"
                ) from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
