"""What /metrics shows, in Prometheus format."""

from __future__ import annotations

import json
import logging
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from rest_lightning.constants import FPS

if TYPE_CHECKING:
    from rest_lightning.avatar.timeline import Computed

_SECONDS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 0.96, 1.2, 1.6, 2.4)
_OFFSETS = (-0.2, -0.1, -0.06, -0.04, -0.02, 0.0, 0.02, 0.04, 0.06, 0.1, 0.2)


class Metrics:
    """Figures of one server, in a registry of its own: several servers may live in one process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.sessions = Gauge("rest_sessions", "Sessions now", registry=registry)
        self.ended = Counter(
            "rest_sessions_ended", ("Sessions that ended, by reason"), ["reason"], registry=registry
        )
        self.refused = Counter(
            "rest_refused", ("Requests refused, by reason"), ["reason"], registry=registry
        )
        self.compute_s = self._histogram(
            "rest_chunk_compute_seconds", "Model time of a chunk", _SECONDS
        )
        self.queued_s = self._histogram(
            "rest_chunk_queued_seconds", ("Time that a chunk waited for the model"), _SECONDS
        )
        self.encode_s = self._histogram(
            "rest_chunk_encode_seconds", ("Encoding time of a chunk"), _SECONDS
        )
        self.rows = self._histogram(
            "rest_chunk_rows", ("Sessions computed together"), (1, 2, 3, 4, 6, 8, 12, 16)
        )
        self.offset_s = self._histogram(
            "rest_offset_seconds", ("Picture minus sound, told by clients"), _OFFSETS
        )
        self.frames = Counter("rest_frames", "Frames sent", registry=registry)
        self.dropped_s = Counter(
            "rest_dropped_seconds", ("Speech not shown, by reason"), ["reason"], registry=registry
        )
        self.idle_s = Counter(
            "rest_idle_seconds", ("Silence put in by the server"), registry=registry
        )
        self.model_errors = Counter(
            "rest_model_errors", ("Sessions in which the model failed"), registry=registry
        )
        self.uploads = Counter(
            "rest_uploads", ("Uploads, by kind and outcome"), ["kind", "outcome"], registry=registry
        )

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, buckets=buckets, registry=self.registry)

    def chunk(
        self, computed: Computed | None, num_frames: int, encode_s: float, idle: bool
    ) -> None:
        """Frames that were sent together; ``computed``: where a chunk of the model begins."""
        if computed is not None:
            self.compute_s.observe(computed.compute_ms / 1e3)
            self.queued_s.observe(computed.queued_ms / 1e3)
            self.rows.observe(computed.num_rows)
        self.encode_s.observe(encode_s)
        self.frames.inc(num_frames)
        if idle:
            self.idle_s.inc(num_frames / FPS)

    def exposition(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)


# -- logs ------------------------------------------------------------------------------------------

LOG = logging.getLogger("rest_lightning.serve")


def log_as_json() -> logging.Handler:
    """Let everything that serves write to stderr from now on; remove the handler from ``LOG`` to
    end that.
    """
    from rest_lightning.serve.gate import Sparing

    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    handler.addFilter(Sparing())
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    return handler


def _where(error: BaseException | None) -> list[str]:
    """Kind of an error and the places it came through, without its message: that may hold what a
    client sent.
    """
    places = []
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)[-6:]
        at = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames))
        places.append(f"{type(error).__name__} at {at}")
        error = error.__cause__
    return places


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, message, and what the call names as ``extra``."""

    _USUAL = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        line |= {
            name: value
            for name, value in vars(record).items()
            if name not in self._USUAL and name[0] != "_"
        }
        if record.exc_info:
            line["error"] = _where(record.exc_info[1])
        return json.dumps(line, default=str)
