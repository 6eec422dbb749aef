"""A device that holds no values, and a watch for what would make the host wait for one that does.

It stands in for a GPU: an engine's programs run on ``meta``, where every copy from or to the host
is seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rest_lightning.models import attention
from rest_lightning.streaming import engine
from rest_lightning.talking_head import TalkingHead


class HostTraffic:
    """What copies between host and device, or gives one the other's values, inside a ``with``
    block.
    """

    def __init__(self) -> None:
        self.found: list[str] = []
        self.num_operations = 0

    def __enter__(self) -> HostTraffic:
        self._modes = _Numbers(self), _Copies(self)
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class _Numbers(TorchFunctionMode):
    """Python's numbers that become tensors of a device: on CUDA each is a copy that is waited
    for.
    """

    def __init__(self, traffic: HostTraffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        makes = function in (torch.tensor, torch.as_tensor, torch.scalar_tensor)
        if makes and not isinstance(args[0], Tensor) and result.device.type != "cpu":
            self.traffic.found.append(f"{function.__name__} of {args[0]}")
        return result


class _Copies(TorchDispatchMode):
    def __init__(self, traffic: HostTraffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        self.traffic.num_operations += 1
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        name = str(function.overloadpacket).removeprefix("aten.")
        if name in ("copy_", "_to_copy") and len({x.device.type for x in (*inputs, *outputs)}) > 1:
            self.traffic.found.append(
                f"{name} of {[(x.device.type, tuple(x.shape)) for x in inputs]}"
            )
        return result


@contextmanager
def without_values(head: TalkingHead) -> Iterator[None]:
    """The head's weights turned into tensors without values, in place.

    Tables of rotations are neither read nor left behind.
    """
    attention._rope_table.cache_clear()
    try:
        with pytest.MonkeyPatch.context() as patch:
            # reads weights when an engine is made
            patch.setattr(engine, "_fingerprint", lambda model: 0)
            for module in head.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        module._parameters[name] = nn.Parameter(_empty(parameter), False)
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[name] = _empty(buffer)
            yield
    finally:
        attention._rope_table.cache_clear()


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
