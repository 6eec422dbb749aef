"""Make ``import torchvision`` work beside a build of torch that its compiled operators do not fit.

The package index holds torchvision only as a CUDA build. Beside the CPU build of torch its shared
library cannot be loaded, torchvision goes on without it, and then dies registering fake kernels for
two operators that nobody declared: ``operator torchvision::nms does not exist``. lpips and large
parts of diffusers and transformers import torchvision, though this package never calls an operator
of it. Declaring the two schemas is enough for the import; calling one of the operators still fails,
as it should.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from typing import Any

# The operators whose fake kernels torchvision registers without asking whether its library was
# loaded.
_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_library: Any = None  # torch drops the declarations together with this handle


@cache
def ensure_torchvision() -> bool:
    """Import torchvision, declaring its missing operators only where the plain import fails.

    Call it before importing lpips, diffusers or transformers.

    Returns:
        True when torchvision is imported, False when it is not installed (diffusers and
        transformers do without).

    Raises:
        RuntimeError: torchvision fails for another reason than an undeclared operator; the error is
            its own.
    """
    if importlib.util.find_spec("torchvision") is None:
        return False
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        _declare_missing_operators()
        importlib.import_module("torchvision")
    return True


def _declare_missing_operators() -> None:
    import torch

    global _library
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for name, arguments in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            _library.define(name + arguments)
