"""Which number type a model computes in: shared by ``rest talk``, ``rest predict`` and the benchmarks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

from rest_lightning.errors import UserError

if TYPE_CHECKING:
    import torch

DtypeName = Literal["auto", "float32", "bfloat16"]


def natural_dtype(capabilities: Mapping[str, Any]) -> str:
    """``bfloat16`` where a processor multiplies it natively (torch's names of capabilities), else ``float32``.

    Elsewhere bfloat16 is converted for every operation, which costs more than it saves.
    """
    return "bfloat16" if any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16")) else "float32"


def dtype_on(name: str, device: str) -> torch.dtype:
    """The type of that name; ``auto`` is what the device (``cpu``, ``cuda``, ...) multiplies natively.

    Raises:
        UserError: another name.
    """
    import torch

    if name not in get_args(DtypeName):
        raise UserError(f"expected a dtype of {', '.join(get_args(DtypeName))}, got {name!r}: choose one")
    if name == "auto" and device == "cuda":
        name = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    elif name == "auto":
        known = device == "cpu" and hasattr(torch.cpu, "get_capabilities")
        name = natural_dtype(torch.cpu.get_capabilities() if known else {})
    found: torch.dtype = getattr(torch, name)
    return found
