"""Structured logs of the live server."""

from __future__ import annotations

import json
import logging

LOG = logging.getLogger("rest_lightning.serve")


def log_as_json() -> logging.Handler:
    """Let everything that serves write to stderr from now on; remove the handler from ``LOG`` to end that."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    return handler


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, message, and what the call names as ``extra``."""

    _USUAL = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {"time": self.formatTime(record), "level": record.levelname.lower(), "message": record.getMessage()}
        line |= {name: value for name, value in vars(record).items() if name not in self._USUAL and name[0] != "_"}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
