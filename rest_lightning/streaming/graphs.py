"""CUDA graphs of functions that read and write fixed memory; elsewhere the very same functions are just called."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

from rest_lightning.models.causal import Stream

Function = Callable[[], None]
Capture = Callable[[Function], Function]  # a function to one that repeats its device operations


class Program:
    """A function without arguments and results, captured once for each variant of itself.

    Args:
        capture: gives the function that repeats what the given one did on the device; None: nothing is captured.

    Attributes:
        num_captured: variants captured so far.
    """

    def __init__(self, capture: Capture | None) -> None:
        self._capture = capture
        self._replays: dict[Hashable, Function] = {}

    @property
    def num_captured(self) -> int:
        return len(self._replays)

    def run(self, function: Function, variant: Hashable, changed: Stream | None = None) -> bool:
        """Run ``function``, or the graph that stands for it; True when it was the graph.

        Args:
            function: works on fixed memory; whatever it decides on the host is decided by ``variant``.
            variant: None for what must not be captured.
            changed: state that the function reads and writes: capturing runs it several times, and puts this back.
        """
        if self._capture is None or variant is None:
            function()
            return False
        if variant not in self._replays:
            saved = changed.snapshot() if changed is not None else None
            self._replays[variant] = self._capture(function)
            if changed is not None and saved is not None:
                changed.restore(saved)
        self._replays[variant]()
        return True


def cuda_capture(device: torch.device) -> Capture:
    """Captures into graphs that share one memory pool: those of one program never run at the same time."""
    pool = torch.cuda.graph_pool_handle()

    def capture(function: Function) -> Function:
        current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        side.wait_stream(current)
        with torch.cuda.stream(side):  # libraries choose their kernels and allocate workspaces at their first calls
            for _ in range(2):
                function()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads (a writer that pins memory) may go on calling CUDA meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            function()
        return graph.replay

    return capture
