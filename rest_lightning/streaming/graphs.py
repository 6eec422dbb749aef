"""CUDA graphs of functions that read and write fixed memory; elsewhere the very same functions are just called."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext

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

    def again(self) -> Program:
        """Another program that is captured in the same way, with the same stream and memory; never run both at once."""
        return Program(self._capture)

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


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes a CUDA device the current one: events, graphs and Triton's kernels go by that."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def cuda_capture(device: torch.device) -> Capture:
    """Captures into graphs that share one memory pool and one stream: those of one program never run together.

    The stream is the program's own, for warming up and for capturing. cuBLAS keeps one workspace for each stream, and a
    graph goes on using that of the stream it was captured on: two programs that replay at the same time need two.
    """
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def capture(function: Function) -> Function:
        with on_device(device):
            current = torch.cuda.current_stream(device)
            stream.wait_stream(current)
            with torch.cuda.stream(stream):  # libraries choose their kernels and allocate workspaces at first calls
                for _ in range(2):
                    function()
            current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads (a writer that pins memory) may go on calling CUDA meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                function()
        return graph.replay

    return capture
