"""Engines between two sessions: kept with their captured graphs, so that the next one need not
capture anew.

Capturing takes about two seconds at paper size (an estimate). An idle engine holds its cache, its
inputs and outputs and its graphs, but not the model: it goes when its model goes.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from dataclasses import astuple
from typing import TYPE_CHECKING

import torch

from rest_lightning.errors import UserError
from rest_lightning.streaming.engine import ChunkEngine, EngineOptions, is_out_of_memory
from rest_lightning.streaming.report import StreamClock

if TYPE_CHECKING:
    from rest_lightning.diffusion.sampling import Sampling
    from rest_lightning.parts import TalkingParts

MOST_IDLE = 2  # of one model: the newest ones are kept


class IdleEngines:
    """The engines of closed sessions, by model; safe to use from several threads.

    Args:
        most: that are kept of one model.
    """

    def __init__(self, most: int = MOST_IDLE) -> None:
        self.most = most
        self._lock = threading.Lock()
        self._idle: weakref.WeakKeyDictionary[TalkingParts, list[tuple[Hashable, ChunkEngine]]]
        self._idle = weakref.WeakKeyDictionary()

    def num_idle(self, model: TalkingParts) -> int:
        """Engines that are kept of a model."""
        return len(self._idle.get(model, ()))

    def open(
        self,
        model: TalkingParts,
        sampling: Sampling,
        clock: StreamClock,
        options: EngineOptions,
    ) -> ChunkEngine:
        """An engine of one stream that has to be started: an idle one that was opened alike, or a
        new one.

        Where memory ends, idle engines of all models are let go, and it is tried once more.

        Raises:
            UserError: not enough memory.
        """
        engine = (
            self._take(model, _key(model, sampling, options))
            if options.reuses(model.device)
            else None
        )
        if engine is not None:
            engine.attach(model, clock)
            return engine

        def make() -> ChunkEngine:
            return ChunkEngine(model, 1, sampling, clock, options)

        return self._retried(make)

    def close(self, engine: ChunkEngine) -> None:
        """Keep an engine whose session is over; the oldest one goes where there are too many."""
        model = engine.model
        if not engine.options.reuses(model.device):
            return
        key = _key(model, engine.sampling, engine.options)
        engine.detach()
        with self._lock:
            kept = self._idle.setdefault(model, [])
            kept.append((key, engine))
            del kept[: -self.most]

    def clear(self) -> int:
        """Let all idle engines go; how many there were."""
        with self._lock:
            num_idle = sum(map(len, self._idle.values()))
            self._idle.clear()
        return num_idle

    def _take(self, model: TalkingParts, key: Hashable) -> ChunkEngine | None:
        with self._lock:
            kept = self._idle.get(model, [])
            kept[:] = [
                entry for entry in kept if _weights_of(entry[0]) == _weights_of(key)
            ]  # others are stale
            for i in reversed(range(len(kept))):
                if kept[i][0] == key:
                    return kept.pop(i)[1]
        return None

    def _retried(self, make: Callable[[], ChunkEngine]) -> ChunkEngine:
        try:
            return make()
        except UserError as error:
            if not is_out_of_memory(error) or not self.clear():
                raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return make()


def _key(
    model: TalkingParts, sampling: Sampling, options: EngineOptions
) -> tuple[Hashable, Hashable]:
    """What two sessions must have in common: first their switches, then the weights of now."""
    weights = tuple(
        (x.data_ptr(), 0 if x.is_inference() else x._version) for x in model.parameters()
    )
    return (astuple(sampling), options, options.captures(model.device), model.size_px), weights


def _weights_of(key: Hashable) -> Hashable:
    assert isinstance(key, tuple)
    weights: Hashable = key[1]
    return weights


IDLE = IdleEngines()
