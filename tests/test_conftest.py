"""The guard that keeps tests offline must not be possible to swallow, and must let this machine
through.
"""

from __future__ import annotations

import socket
import urllib.request

import pytest
import torch


# reserved for documentation
@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("example.invalid", 443)])
def test_connections_to_other_machines_fail_the_test(address: tuple[str, int]) -> None:
    with pytest.raises(pytest.fail.Exception, match="stay offline"), socket.socket() as sock:
        sock.connect(address)


def test_name_lookups_fail_through_a_library_that_catches_errors() -> None:
    def careless() -> None:
        try:
            urllib.request.urlopen("http://example.invalid/weights.bin", timeout=1)
        except Exception:
            return

    with pytest.raises(pytest.fail.Exception, match=r"example\.invalid"):
        careless()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_loopback_works(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection((host, server.getsockname()[1]))
        connection, _ = server.accept()
        connection.sendall(b"ok")
        assert client.recv(2) == b"ok"
        connection.close()
        client.close()


def test_float32_is_not_rounded_to_tf32() -> None:
    """Parity on CUDA is tested to 1e-5; TF32 keeps 10 bits."""
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
