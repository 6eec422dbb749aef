"""Decoding and the way to the host: on CUDA on a stream of its own, beside the denoising of the
next chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rest_lightning.models.causal import Stream

# -- graphs ----------------------------------------------------------------------------------------
# CUDA graphs of functions that read and write fixed memory; elsewhere the very same functions are
# just called.

Function = Callable[[], None]
Capture = Callable[[Function], Function]  # a function to one that repeats its device operations


class Program:
    """A function without arguments and results, captured once for each variant of itself.

    Args:
        capture: gives the function that repeats what the given one did on the device; None: nothing
            is captured.

    Attributes:
        num_captured: variants captured so far.
    """

    def __init__(self, capture: Capture | None) -> None:
        self._capture = capture
        self._replays: dict[Hashable, Function] = {}

    def again(self) -> Program:
        """Another program with the same stream and memory for graphs; never run both at once."""
        return Program(self._capture)

    @property
    def num_captured(self) -> int:
        """Variants captured so far."""
        return len(self._replays)

    def run(self, function: Function, variant: Hashable, changed: Stream | None = None) -> bool:
        """Run ``function``, or the graph that stands for it; True when it was the graph.

        Args:
            function: works on fixed memory; whatever it decides on the host is decided by
                ``variant``.
            variant: None for what must not be captured.
            changed: state that the function reads and writes: capturing runs it several times, and
                puts this back.
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
    """Captures into graphs that share one memory pool and one stream.

    The graphs of one program never run at the same time. The stream is the program's own, for
    warming up and for capturing: cuBLAS keeps one workspace for each stream, and a graph goes on
    using that of the stream it was captured on, so two programs that replay together need two.
    """
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def capture(function: Function) -> Function:
        with on_device(device):
            current = torch.cuda.current_stream(device)
            stream.wait_stream(current)
            # libraries choose their kernels and allocate workspaces at their first calls
            with torch.cuda.stream(stream):
                for _ in range(2):
                    function()
            current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads (a writer that pins memory) may go on calling CUDA meanwhile.
            mode = "thread_local"
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=mode):
                function()
        return graph.replay

    return capture


Frames = NDArray[np.uint8]


class Pending(Protocol):
    """Frames of one chunk on their way to the host."""

    @property
    def is_ready(self) -> bool:
        """Whether :meth:`frames` returns at once."""

    def frames(self) -> Frames:
        """(B, F, H, W, 3), the caller's own; waits for this chunk alone."""

    @property
    def finite(self) -> NDArray[np.bool_]:
        """(B,): whether a row's frames were numbers before they became pixels; after
        :meth:`frames`.
        """


class Ready:
    """Frames that are on the host already."""

    is_ready = True

    def __init__(self, frames: Frames, finite: NDArray[np.bool_] | None = None) -> None:
        self._frames = frames
        self.finite = np.ones(len(frames), np.bool_) if finite is None else finite

    def frames(self) -> Frames:
        """Returns the frames."""
        return self._frames


class Host:
    """The way of the CPU: one thing after the other, nothing to copy to."""

    depth = 0  # chunks that may be under way while another one is launched

    def launch(
        self,
        take: Callable[[], object],
        decode: Callable[[], None],
        frames: Tensor,
        num_frames: int,
        finite: Tensor,
    ) -> Pending:
        """Decode; see :meth:`Device.launch`."""
        take()
        decode()
        return Ready(frames[:, :num_frames].cpu().numpy().copy(), finite.cpu().numpy().copy())

    def join(self) -> None:
        """Nothing is under way."""


class Device:
    """CUDA: decoding and copying run on a second stream, into two pinned buffers by turns.

    Args:
        device: where the model is.
        shape: of the largest batch of frames, (B, F, H, W, 3).
    """

    depth = 1

    def __init__(self, device: torch.device, shape: torch.Size) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pinned = [torch.empty(shape, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._flags = [torch.empty(shape[0], dtype=torch.bool, pin_memory=True) for _ in range(2)]
        self._holders: list[_OnDevice | None] = [None, None]
        self._turn = 0

    def launch(
        self,
        take: Callable[[], object],
        decode: Callable[[], None],
        frames: Tensor,
        num_frames: int,
        finite: Tensor,
    ) -> Pending:
        """Queue a chunk's decoding and its copy to the host.

        Args:
            take: copies the clean latents into the decoder's own input; denoising goes on only
                after that.
            decode: from that input to ``frames``.
            frames: static memory on the device, uint8 (b, F, H, W, 3) with b up to B, that decoding
                writes.
            num_frames: frames of the chunk, at most F.
            finite: static memory on the device, bool (b,), that decoding writes.
        """
        turn, self._turn = self._turn, 1 - self._turn
        holder = self._holders[turn]
        if holder is not None:
            # the buffer's last frames were not fetched yet: they move to memory of their own
            holder.settle()
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            take()
            taken = self.stream.record_event()
        current.wait_event(taken)
        with torch.cuda.stream(self.stream):
            decode()
            target = self.pinned[turn][: len(frames)]
            # all F: the frames of a short chunk do not lie in one piece
            target.copy_(frames, non_blocking=True)
            flags = self._flags[turn][: len(frames)]
            flags.copy_(finite, non_blocking=True)
            arrived = self.stream.record_event()
        pending = self._holders[turn] = _OnDevice(target[:, :num_frames], flags, arrived)
        return pending

    def join(self) -> None:
        """Let the current stream wait for what is under way, without stopping the host: state is
        read or replaced.
        """
        torch.cuda.current_stream(self.device).wait_stream(self.stream)


class _OnDevice:
    """A chunk whose copy is queued; ``event`` fires when it has arrived in ``target``."""

    def __init__(self, target: Tensor, flags: Tensor, event: torch.cuda.Event) -> None:
        self._target: Tensor | None = target
        self._flags = flags
        self._event = event
        self._frames: Frames | None = None

    @property
    def is_ready(self) -> bool:
        return self._frames is not None or self._event.query()

    def settle(self) -> None:
        """Take the frames out of the shared buffer."""
        if self._target is not None:
            self._event.synchronize()
            self.finite = self._flags.numpy().copy()
            self._frames, self._target = self._target.numpy().copy(), None

    def frames(self) -> Frames:
        self.settle()
        assert self._frames is not None
        return self._frames
