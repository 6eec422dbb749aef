"""What holds for every test: one thread, no network, fixed seeds, markers that skip themselves."""

from __future__ import annotations

import os

# Before anything imports torch or a hub client. One thread: tiny tensors gain nothing from two, and one is repeatable.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", MPLBACKEND="Agg")

import ipaddress
import random
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

WEIGHTS_VARIABLE = "REST_LIGHTNING_WEIGHTS"


def _is_local(host: Any) -> bool:
    if isinstance(host, bytes):
        host = host.decode()
    if host in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(str(host).split("%")[0]).is_loopback
    except ValueError:
        return False


@pytest.fixture(scope="session", autouse=True)
def offline_guard() -> Iterator[None]:
    """Fail the test that looks up or connects to anything but this machine.

    ``pytest.fail`` raises a BaseException, so a library that swallows connection errors cannot hide the attempt.
    """
    patch = pytest.MonkeyPatch()

    def guarded(original: Any, host_of: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            host = host_of(*args)
            if not _is_local(host):
                pytest.fail(f"tests stay offline, but one tried to reach {host!r}")
            return original(*args, **kwargs)

        return call

    def address_host(sock: socket.socket, address: Any, *_: Any) -> Any:
        return address[0] if sock.family in (socket.AF_INET, socket.AF_INET6) else None

    for name in ("connect", "connect_ex"):
        patch.setattr(socket.socket, name, guarded(getattr(socket.socket, name), address_host))
    patch.setattr(socket, "getaddrinfo", guarded(socket.getaddrinfo, lambda host, *_: host))
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Seed the global generators; torch only where the test module imported it."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run; the reasons stand in the summary."""
    weights = os.environ.get(WEIGHTS_VARIABLE)
    for item in items:
        if item.get_closest_marker("real_weights") and not (weights and Path(weights).is_dir()):
            item.add_marker(pytest.mark.skip(reason=f"{WEIGHTS_VARIABLE} names no folder with published weights"))
        if item.get_closest_marker("gpu") and not _has_cuda():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
