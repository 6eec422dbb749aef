"""The ID-Context Cache with gradients: what the parallel training forward is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rest_lightning.models.attention import KeyValue, rotate, split_heads
from rest_lightning.models.cache import IDContextCache


class DifferentiableCache(IDContextCache):
    """The same maths with tensors that keep their graph: sequential training, chunk after chunk.

    The parallel forward gives the same gradients at less cost; this is what it is compared with.
    All rows advance together: there is no mask, no `snapshot` and no `copy_rows_`.
    """

    def _make_slots(self, shape: tuple[int, ...]) -> None:
        self._sink: dict[tuple[int, int], KeyValue] = {}
        self._previous: dict[tuple[int, int], KeyValue] = {}
        self._current: dict[tuple[int, int], KeyValue] = {}

    def _refresh(self) -> None:
        self.rotation = self.rotation.clone()  # the graph of earlier chunks still needs the old one
        super()._refresh()
        self._masked = False

    def update(self, layer: int, k: Tensor, v: Tensor) -> KeyValue:
        slot, options = (self.step, layer), self.options
        self._current[slot] = (k, v)
        cached = [self._previous[slot]] if self.num_previous[0] else []
        if options.use_sink or self.num_frames[0] == 0:
            cached.append(self._sink[slot])
        if options.cache_gradient == "detached" and not self._has_reference:
            cached = [(key.detach(), value.detach()) for key, value in cached]
        keys, values = (torch.cat(parts, 1) for parts in zip(*cached, (k, v), strict=True))
        return split_heads(keys, self.num_heads), split_heads(values, self.num_heads)

    def write_sink(
        self, layer: int, k: Tensor, v: Tensor, rows: Sequence[int] | None = None
    ) -> None:
        assert rows is None
        steps = range(self.num_steps) if self.options.reference_attends == "self" else [self.step]
        self._sink.update({(step, layer): (k, v) for step in steps})

    def _move(self) -> None:
        absolute = self.options.positions == "absolute"
        shift = None if absolute else self._shift()
        self._previous = {
            s: (k if shift is None else rotate(k, shift), v) for s, (k, v) in self._current.items()
        }

    def _clear_previous(self, row: int) -> None:
        self._previous = {}
