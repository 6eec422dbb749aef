"""The streaming engine: audio in, frames out, constant cost per chunk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rest_lightning.names import lazy

if TYPE_CHECKING:
    from rest_lightning.streaming.batch import BatchSession as BatchSession
    from rest_lightning.streaming.engine import ChunkEngine as ChunkEngine
    from rest_lightning.streaming.engine import EngineOptions as EngineOptions
    from rest_lightning.streaming.report import ChunkProfiler as ChunkProfiler
    from rest_lightning.streaming.report import StreamClock as StreamClock
    from rest_lightning.streaming.report import StreamReport as StreamReport
    from rest_lightning.streaming.session import StreamingSession as StreamingSession
    from rest_lightning.streaming.session import write_stream as write_stream

__all__, __getattr__ = lazy(
    __name__,
    {
        "batch": ["BatchSession"],
        "engine": ["ChunkEngine", "EngineOptions"],
        "report": ["ChunkProfiler", "StreamClock", "StreamReport"],
        "session": ["StreamingSession", "write_stream"],
    },
)
