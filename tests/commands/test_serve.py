"""``rest serve`` as a process: it says where it is, serves, and stops when told to."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from rest_lightning.cli import main
from rest_lightning.serve.client import LiveClient, Received


@pytest.mark.slow
def test_a_server_begins_serves_and_stops(tiny_model: Path) -> None:
    words = [
        "serve",
        "--port",
        "0",
        "--model",
        str(tiny_model),
        "--max-sessions",
        "1",
        "--threads",
        "1",
        "--grace",
        "60",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "rest_lightning", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log: list[str] = []
    assert process.stdout is not None and process.stderr is not None
    reading = threading.Thread(target=lambda: log.extend(process.stderr or []))
    reading.start()
    try:
        lines = iter(process.stdout.readline, "")
        url = next(line.split()[1] for line in lines if line.startswith("open http://127.0.0.1:"))

        async def scenario() -> list[Received]:
            async with LiveClient(url) as client:
                process.send_signal(signal.SIGTERM)
                received = [each async for each in client.stream([np.ones(16_000, np.int16)])]
            return received

        received = asyncio.run(scenario())
        assert received[-1] == {"type": "bye", "reason": "the session has ended"}
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        reading.join()
    entries = [json.loads(line) for line in log]
    assert [each["message"] for each in entries] == ["warmed up", "session begins", "session ended"]
    assert entries[-1]["reason"] == "ended" and entries[-1]["frames"] >= 25


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--port", "70000"], "expected a port from 0 to 65535, got 70000"),
        (["--cert", "missing.pem"], "expected --cert and --key together"),
        (["--cert", "missing.pem", "--key", "missing.pem"], "certificate and its key in PEM files"),
        (["--max-sessions", "0"], "expected a number of at least 1, got '0'"),
        (
            ["--origin", "example.org"],
            ("expected an origin like https://example.org, got example.org"),
        ),
        (["--idle-min", "0"], "expected minutes above 0, got 0"),
    ],
)
def test_wrong_arguments_are_told_before_the_model_is_loaded(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *words]) == 2
    assert told in capsys.readouterr().err


def test_a_port_that_is_taken_is_told(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code = main(
            ["serve", "--port", str(port), "--model", str(tiny_model), "--max-sessions", "1"]
        )
    assert code == 2 and f"expected to listen on 127.0.0.1:{port}" in capsys.readouterr().err
