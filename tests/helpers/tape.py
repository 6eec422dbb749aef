"""CUDA graphs on the CPU: the operations of a function are recorded once, and repeated on the very
same memory.

Integers are left out: a decoder counts on the host, which no graph of a device would repeat. What a
replay computes can differ from a call of the function only where a graph would go wrong: where the
function decides something on the host, or reads memory that is exchanged between two calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        leaves = tree_leaves(result)
        if not any(isinstance(leaf, Tensor) and leaf.dtype == torch.int64 for leaf in leaves):
            self.operations.append((function, args, kwargs or {}, result))
        return result


class Tape:
    """A ``Capture``, and a factory of itself. ``num_replays`` counts what was repeated instead of
    called.
    """

    def __init__(self) -> None:
        self.num_captured = self.num_replays = 0

    def __call__(self) -> Callable[[Callable[[], None]], Callable[[], None]]:
        return self.capture

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        with _Recorder() as recorder:
            function()
        self.num_captured += 1
        assert len(recorder.operations) > 10

        def replay() -> None:
            self.num_replays += 1
            for operation, args, kwargs, recorded in recorder.operations:
                result = operation(*args, **kwargs)
                for old, new in zip(tree_leaves(recorded), tree_leaves(result), strict=True):
                    # else a view, or in place
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

        return replay


def tensors_alive_bytes() -> int:
    """Bytes of all storages that Python still holds a tensor of."""
    import gc

    gc.collect()
    tensors = [value for value in gc.get_objects() if type(value) in (Tensor, torch.nn.Parameter)]
    # packed weights have no storage to look at
    opaque = [tensor for tensor in tensors if tensor.is_mkldnn]
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tensors
        if not tensor.is_mkldnn
    }
    return sum(storages.values()) + sum(tensor.numel() * tensor.element_size() for tensor in opaque)
