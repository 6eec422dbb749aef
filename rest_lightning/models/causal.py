"""Causal building blocks that run whole clips and streams with one ``forward``.

Everything works on channels-last video, (B, F, ..., C), so that a linear layer, a norm or a reshape
never transposes memory. Offline (``stream=None``) the past of the first frame is that frame
repeated. With a :class:`Stream` the same ``forward`` takes a clip piece by piece: three things
happen on the first piece only (the repetition, the downsampler's prepended frames, the upsampler's
dropped frames); later pieces read the stored past instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Stream(dict[str, Tensor]):
    """The past of every causal convolution of one network, by module name.

    A session owns it; a module never does.

    Attributes:
        started: False until the first piece has gone through the whole network.
    """

    def __init__(self, state: Iterable[tuple[str, Tensor]] = (), started: bool = False) -> None:
        super().__init__(state)
        self.started = started

    def snapshot(self) -> Stream:
        """Returns a copy that later pieces do not change."""
        return Stream(((name, past.clone()) for name, past in self.items()), self.started)

    def restore(self, other: Stream) -> None:
        """Takes over the values of a snapshot, in place where memory is there already."""
        for name, past in other.items():
            self.remember(name, past)
        self.started = other.started

    def remember(self, name: str, past: Tensor) -> None:
        """Stores the past of one module.

        Its address stays the same from the first piece on.
        """
        if name in self and self[name].shape == past.shape:
            self[name].copy_(past)
        else:
            self[name] = past.clone()

    def for_batch(self, batch: int) -> Stream:
        """Returns an empty stream of the same network for another number of rows."""
        return Stream(
            ((name, past.new_zeros(batch, *past.shape[1:])) for name, past in self.items()),
            self.started,
        )

    def narrow(self, batch: int) -> Stream:
        """Returns the first rows as a stream in the same memory."""
        return Stream(((name, past[:batch]) for name, past in self.items()), self.started)

    def copy_row(self, row: int, source: Stream, source_row: int = 0) -> None:
        """Overwrites one batch row with a row of another stream of the same network."""
        for name, past in source.items():
            self[name][row].copy_(past[source_row])


def is_first_piece(stream: Stream | None) -> bool:
    """Returns whether the coming frames have no past.

    That is so for a whole clip and for the first piece of a stream.
    """
    return stream is None or not stream.started


class StreamedModule(nn.Module):
    """A module with a past. Its key in a :class:`Stream` is its name within the network."""

    stream_name = ""


def name_streams(network: nn.Module) -> None:
    """Tells every streamed module of ``network`` its name.

    Call it at the end of the network's ``__init__``.
    """
    for name, module in network.named_modules():
        if isinstance(module, StreamedModule):
            module.stream_name = name


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension with a learned scale."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C), in the type of ``x``."""
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True, dtype=torch.float32) + self.eps)
        return x * scale.to(x.dtype) * self.weight.to(x.dtype)


class SpatialConv(nn.Module):
    """A 2-D convolution in every frame, zero padded.

    (B, F, H, W, C_in) -> (B, F, H, W, C_out).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, H, W, C_in) -> (B, F, H, W, C_out)."""
        batch = x.shape[:2]
        # A permuted view of channels-last memory is what the channels-last convolution wants:
        # nothing is copied.
        y = self.conv(x.flatten(0, 1).permute(0, 3, 1, 2))
        return y.permute(0, 2, 3, 1).unflatten(0, batch)


class TemporalConv(StreamedModule):
    """A causal convolution along time at every place.

    (B, F, ..., C_in) -> (B, F, ..., C_out).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, (kernel_size, 1))
        self.conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """Convolve, reading what came before from ``stream``."""
        num_past = self.conv.kernel_size[0] - 1
        places = x.shape[2:-1]
        x = x.reshape(x.shape[0], x.shape[1], -1, x.shape[-1])
        if num_past:
            if is_first_piece(stream):
                past = x[:, :1].expand(-1, num_past, -1, -1)
            else:
                past = stream[self.stream_name]  # type: ignore[index]
            x = torch.cat([past.to(x.dtype), x], dim=1)
            if stream is not None:
                stream.remember(self.stream_name, x[:, -num_past:])
        y = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return y.reshape(y.shape[0], y.shape[1], *places, y.shape[-1])


class ResBlock(nn.Module):
    """A residual block: spatial convolution, then causal temporal convolution.

    Each follows a norm and a SiLU. The temporal convolution starts at zero, so that the block
    starts as the identity.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(channels)
        self.spatial = SpatialConv(channels, channels)
        self.norm2 = RMSNorm(channels)
        self.temporal = TemporalConv(channels, channels)
        nn.init.zeros_(self.temporal.conv.weight)
        nn.init.zeros_(self.temporal.conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """(B, F, H, W, C) -> the same."""
        in_place = not torch.is_grad_enabled()
        y = self.spatial(F.silu(self.norm1(x), in_place))
        return x + self.temporal(F.silu(self.norm2(y), in_place), stream)


class TemporalResBlock(nn.Module):
    """A residual block of two causal temporal convolutions, for (B, F, ..., C).

    The second one starts at zero, so that the block starts as the identity.
    """

    def __init__(self, channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.norm1 = RMSNorm(channels)
        self.conv1 = TemporalConv(channels, channels, kernel_size)
        self.norm2 = RMSNorm(channels)
        self.conv2 = TemporalConv(channels, channels, kernel_size)
        nn.init.zeros_(self.conv2.conv.weight)
        nn.init.zeros_(self.conv2.conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """(B, F, ..., C) -> the same."""
        y = self.conv1(F.silu(self.norm1(x)), stream)
        return x + self.conv2(F.silu(self.norm2(y)), stream)


class Downsample(nn.Module):
    """Folds ``time`` frames and ``space`` x ``space`` places into channels, then applies a linear
    layer.

    The first frame is kept on its own: ``time - 1`` copies of it are prepended, so that 1 + k *
    time frames become 1 + k. ``space`` must be 1 for inputs without two spatial dimensions.
    """

    def __init__(self, in_channels: int, out_channels: int, time: int = 2, space: int = 1) -> None:
        super().__init__()
        self.time, self.space = time, space
        self.proj = nn.Linear(in_channels * time * space * space, out_channels)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """(B, F, ..., C_in) -> (B, F', ..., C_out)."""
        t, s = self.time, self.space
        if t > 1 and is_first_piece(stream):
            x = torch.cat([x[:, :1]] * (t - 1) + [x], dim=1)
        if x.shape[1] % t:
            raise ValueError(
                f"expected a first piece of {t}n+1 frames, later ones of {t}n, got a rest of "
                f"{x.shape[1] % t}"
            )
        if s == 1:
            x = x.unflatten(1, (-1, t)).movedim(2, -2).flatten(-2)
        else:
            b, f, h, w, c = x.shape
            x = (
                x.reshape(b, f // t, t, h // s, s, w // s, s, c)
                .permute(0, 1, 3, 5, 2, 4, 6, 7)
                .flatten(4)
            )
        y: Tensor = self.proj(x)
        return y


class Upsample(nn.Module):
    """Applies a linear layer, then unfolds channels into frames and places.

    It is the counterpart of :class:`Downsample`. On the first piece the first ``time - 1`` frames
    are dropped.
    """

    def __init__(self, in_channels: int, out_channels: int, time: int = 2, space: int = 1) -> None:
        super().__init__()
        self.time, self.space = time, space
        self.proj = nn.Linear(in_channels, out_channels * time * space * space)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """(B, F, ..., C_in) -> (B, F', ..., C_out)."""
        t, s = self.time, self.space
        x = self.proj(x)
        if s == 1:
            x = x.unflatten(-1, (t, -1)).movedim(-2, 2).flatten(1, 2)
        else:
            b, f, h, w, c = x.shape
            x = x.reshape(b, f, h, w, t, s, s, c // (t * s * s)).permute(0, 1, 4, 2, 5, 3, 6, 7)
            x = x.reshape(b, f * t, h * s, w * s, -1)
        return x[:, t - 1 :] if t > 1 and is_first_piece(stream) else x


def patchify(frames: Tensor, patch_size: int) -> Tensor:
    """(B, 3, F, H, W) -> (B, F, H/p, W/p, 3*p*p)."""
    b, c, f, h, w = frames.shape
    p = patch_size
    x = frames.reshape(b, c, f, h // p, p, w // p, p).permute(0, 2, 3, 5, 1, 4, 6)
    return x.reshape(b, f, h // p, w // p, c * p * p)


def unpatchify(x: Tensor, patch_size: int) -> Tensor:
    """(B, F, H/p, W/p, 3*p*p) -> (B, 3, F, H, W), the inverse of :func:`patchify`."""
    b, f, h, w, c = x.shape
    p = patch_size
    channels = c // (p * p)
    y = x.reshape(b, f, h, w, channels, p, p).permute(0, 4, 1, 2, 5, 3, 6)
    return y.reshape(b, channels, f, h * p, w * p)


def num_bytes(stream: Stream) -> int:
    """Memory that a stream holds, in bytes; constant after the first piece."""
    return sum(math.prod(past.shape) * past.element_size() for past in stream.values())
