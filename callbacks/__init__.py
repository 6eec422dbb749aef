"""Lightning callbacks, imported as ``rest_lightning.callbacks``: averaging, evaluation, previews,
sinks.

The folder lies at the top level of the repository; a link at its import name leads to it, for
Python, for type checkers and for whatever builds the wheel. Modules in here import the rest of the
package relatively (``from ..streaming.writer import Mp4Writer``), so that a stray ``import
callbacks`` from the repository's root fails loudly instead of making every class a second time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..names import lazy
from ..torchvision_compat import ensure_torchvision

if TYPE_CHECKING:
    from .averaging import MovingAverage as MovingAverage
    from .evaluation import Evaluation as Evaluation
    from .previews import SampleVideos as SampleVideos
    from .sink import VideoSink as VideoSink

# Before anything in here imports lightning or torchmetrics: both import torchvision.
ensure_torchvision()

__all__, __getattr__ = lazy(
    __name__,
    {
        "averaging": ["MovingAverage"],
        "evaluation": ["Evaluation"],
        "previews": ["SampleVideos"],
        "sink": ["VideoSink"],
    },
)
