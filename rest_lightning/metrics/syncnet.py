"""SyncNet: do these five frames and these 200 ms of speech belong together?

Chung and Zisserman, "Out of time: automated lip sync in the wild" (2016), with the layers and
parameter names of the published weights (joonson/syncnet_python, ``syncnet_v2.model``), so that
they load strictly.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn import functional

from rest_lightning.constants import SAMPLE_RATE
from rest_lightning.errors import UserError
from rest_lightning.metrics.sums import Frames, check_clip

WINDOW_FRAMES = 5
WINDOW_STEPS = 20  # of MFCC, 100 Hz
STEPS_PER_FRAME = 4
NUM_CEPSTRA = 13
FACE_PX = 224


class SyncNet(nn.Module):
    """Two towers into one space; in evaluation mode windows do not see each other.

    Args:
        num_features: of an embedding, 1024 in the published weights.
        width: scales the channels of all convolutions; 1.0 is the published network.
    """

    def __init__(self, num_features: int = 1024, width: float = 1.0) -> None:
        super().__init__()
        self.num_features = num_features
        c64, c96, c192, c256, c384, c512 = (
            max(1, round(n * width)) for n in (64, 96, 192, 256, 384, 512)
        )
        same = {"padding": 1}
        audio = [
            *_block(2, 1, c64, 3, **same),
            nn.Identity(),  # the published network pools 1x1 here
            *_block(2, c64, c192, 3, **same),
            nn.MaxPool2d(3, (1, 2)),
            *_block(2, c192, c384, 3, **same),
            *_block(2, c384, c256, 3, **same),
            *_block(2, c256, c256, 3, **same),
            nn.MaxPool2d(3, 2),
            *_block(2, c256, c512, (5, 4)),
        ]
        frame: dict[str, Any] = {"padding": (0, 1, 1)}
        half = (1, 2, 2)
        lip = [
            *_block(3, 3, c96, (WINDOW_FRAMES, 7, 7), stride=half),
            nn.MaxPool3d((1, 3, 3), half),
            *_block(3, c96, c256, (1, 5, 5), stride=half, **frame),
            nn.MaxPool3d((1, 3, 3), half, **frame),
            *_block(3, c256, c256, (1, 3, 3), **frame),
            *_block(3, c256, c256, (1, 3, 3), **frame),
            *_block(3, c256, c256, (1, 3, 3), **frame),
            nn.MaxPool3d((1, 3, 3), half),
            *_block(3, c256, c512, (1, 6, 6)),
        ]
        self.netcnnaud, self.netcnnlip = nn.Sequential(*audio), nn.Sequential(*lip)
        self.netfcaud, self.netfclip = _head(c512, num_features), _head(c512, num_features)

    def embed_speech(self, mfcc: Tensor) -> Tensor:
        """Windows of MFCC (n, 13, 20) to embeddings (n, num_features)."""
        return self.netfcaud(self.netcnnaud(mfcc[:, None]).flatten(1))

    def embed_faces(self, frames: Tensor) -> Tensor:
        """Every window of five of the frames of one clip, to embeddings (n - 4, num_features).

        Only the first convolution looks along time, and it gives one step per window: the clip goes
        through as it is, without the windows' copies of every frame, and the embeddings are the
        same.

        Args:
            frames: (3, n, 224, 224), n of at least 5, BGR in 0..255.
        """
        return self.netfclip(self.netcnnlip(frames[None])[0, :, :, 0, 0].T)


def _block(
    dims: int, channels: int, out: int, kernel: Any, stride: Any = 1, padding: Any = 0
) -> list[nn.Module]:
    conv, norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
    return [conv(channels, out, kernel, stride, padding), norm(out), nn.ReLU(inplace=True)]


def _head(channels: int, num_features: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(channels, channels),
        nn.BatchNorm1d(channels),
        nn.ReLU(),
        nn.Linear(channels, num_features),
    )


def load_syncnet(state: dict[str, Tensor]) -> SyncNet:
    """A frozen SyncNet with these tensors.

    Raises:
        RuntimeError: other names or shapes (of ``load_state_dict``).
    """
    model = SyncNet(len(state["netfcaud.3.bias"]) if "netfcaud.3.bias" in state else 1024)
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def speech_windows(mfcc: Tensor, count: int) -> Tensor:
    """The MFCC windows that belong to the first ``count`` windows of frames: (steps, 13) to
    (count, 13, 20).
    """
    return mfcc.unfold(0, WINDOW_STEPS, STEPS_PER_FRAME)[:count].to(torch.float32)


# -- speech features -------------------------------------------------------------------------------
# MFCC as SyncNet's authors compute them: equal to ``python_speech_features.mfcc`` with its
# defaults.
#
# 25 ms windows without a window function, every 10 ms, a 512-point DFT, 26 triangular filters
# with corners on whole bins (HTK mel scale), an orthonormal DCT-II, a lifter of 22, and the log
# energy as the first of 13 coefficients.

_WINDOW, _HOP, _NUM_FFT, _NUM_FILTERS, _LIFTER, _PREEMPHASIS = 400, 160, 512, 26, 22, 0.97
_EPS = float(np.finfo(np.float64).eps)


def to_int16(audio: ArrayLike) -> NDArray[np.int16]:
    """Samples in [-1, 1] to 16 bits, as a 16-bit wav file holds them; louder ones are clipped."""
    return np.clip(np.rint(np.asarray(audio, dtype=np.float64) * 32768.0), -32768, 32767).astype(
        np.int16
    )


def mfcc(samples: ArrayLike) -> NDArray[np.float64]:
    """Coefficients (steps, 13), 100 a second, of 16 kHz mono samples (n,); the last window is
    padded with zeros.

    Args:
        samples: at the scale of 16-bit integers (what SyncNet was trained on), see
            :func:`to_int16`.

    Raises:
        UserError: no samples, or samples that are not numbers.
    """
    signal = np.asarray(samples, dtype=np.float64)
    if signal.ndim != 1 or not len(signal):
        raise UserError(
            f"expected mono speech of at least one sample, got shape {signal.shape}: "
            "give the clip's audio"
        )
    if not np.isfinite(signal).all():
        raise UserError("expected numbers as samples, got NaN or infinity: export the audio again")
    emphasised = np.concatenate([signal[:1], signal[1:] - _PREEMPHASIS * signal[:-1]])
    num_steps = 1 + max(0, -(-(len(signal) - _WINDOW) // _HOP))
    padded = np.zeros((num_steps - 1) * _HOP + _WINDOW)
    padded[: len(signal)] = emphasised
    windows = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::_HOP]
    power = np.square(np.abs(np.fft.rfft(windows, _NUM_FFT))) / _NUM_FFT
    energy, bands = power.sum(axis=1), power @ _filters().T
    energy[energy == 0] = _EPS
    bands[bands == 0] = _EPS
    cepstra = np.log(bands) @ _transform()
    cepstra[:, 0] = np.log(energy)
    return cepstra


@cache
def _filters() -> NDArray[np.float64]:
    """Triangles (26, 257) between whole bins, equally far apart on the HTK mel scale from 0 to 8000
    Hz.
    """
    mels = np.linspace(0.0, 2595.0 * np.log10(1.0 + SAMPLE_RATE / 2 / 700.0), _NUM_FILTERS + 2)
    corners = np.floor((_NUM_FFT + 1) * 700.0 * (10.0 ** (mels / 2595.0) - 1.0) / SAMPLE_RATE)
    low, peak, high = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    bins = np.arange(_NUM_FFT // 2 + 1)
    rising = np.where(
        (bins >= low) & (bins < peak), (bins - low) / np.maximum(peak - low, 1.0), 0.0
    )
    falling = np.where(
        (bins >= peak) & (bins < high), (high - bins) / np.maximum(high - peak, 1.0), 0.0
    )
    return np.asarray(rising + falling)


@cache
def _transform() -> NDArray[np.float64]:
    """Orthonormal DCT-II of 26 values, its first 13 rows, times the lifter: (26, 13)."""
    n, k = np.arange(_NUM_FILTERS)[:, None], np.arange(NUM_CEPSTRA)[None, :]
    basis = np.cos(np.pi * k * (2 * n + 1) / (2 * _NUM_FILTERS)) * np.sqrt(2.0 / _NUM_FILTERS)
    basis[:, 0] /= np.sqrt(2.0)
    return np.asarray(basis * (1.0 + _LIFTER / 2.0 * np.sin(np.pi * k / _LIFTER)))


# -- face crops ------------------------------------------------------------------------------------
# Face crops for the published SyncNet, cut out of videos along a track as its authors' pipeline
# cuts them.

CROP_SCALE = 0.40  # the crop reaches this much of the face's half side beyond it
MIN_TRACK_FRAMES = 101  # the reference keeps tracks of more than 100 frames
_SMOOTHING_FRAMES = 13
_PADDING = 110  # grey level outside the image


def face_crops(
    frames: Frames, boxes: ArrayLike, min_track_frames: int = MIN_TRACK_FRAMES
) -> Tensor:
    """Crops uint8 (n, 224, 224, 3) around a face that was found in every frame.

    Centre and size go through a median over 13 frames (zeros beyond the ends, as in the reference).
    The crop is a square of 1.4 box heights that reaches further down, to the chin.

    Args:
        frames: uint8 (n, H, W, 3).
        boxes: (n, 4), left, top, right and bottom of the detector's box in pixels.
        min_track_frames: a shorter track is no track.

    Raises:
        UserError: too short a track, boxes that do not fit the frames or are empty.
    """
    from scipy.signal import medfilt

    clip = check_clip(frames)
    box = np.asarray(boxes, dtype=np.float64)
    if box.shape != (len(clip), 4) or not np.isfinite(box).all():
        raise UserError(
            f"expected a box of 4 numbers for each of {len(clip)} frames, got "
            f"{box.shape}: track the face"
        )
    least = max(min_track_frames, _SMOOTHING_FRAMES)
    if len(clip) < least:
        raise UserError(
            f"expected a face track of at least {least} frames, got {len(clip)}: give a longer clip"
        )
    sides = np.maximum(box[:, 3] - box[:, 1], box[:, 2] - box[:, 0]) / 2
    if sides.min() <= 0:
        raise UserError(
            "expected boxes with a size, got an empty one in frame "
            f"{int(sides.argmin())}: track the face"
        )
    centres_x, centres_y = (box[:, 0] + box[:, 2]) / 2, (box[:, 1] + box[:, 3]) / 2
    smooth = [medfilt(values, _SMOOTHING_FRAMES) for values in (sides, centres_x, centres_y)]
    return torch.stack(
        [_crop(frame, *(float(x[i]) for x in smooth)) for i, frame in enumerate(clip)]
    )


def _crop(frame: Tensor, side: float, x: float, y: float) -> Tensor:
    margin = int(side * (1 + 2 * CROP_SCALE))
    padded = functional.pad(frame.permute(2, 0, 1), (margin,) * 4, value=_PADDING)
    x, y = x + margin, y + margin
    rows = slice(int(y - side), int(y + side * (1 + 2 * CROP_SCALE)))
    columns = slice(int(x - side * (1 + CROP_SCALE)), int(x + side * (1 + CROP_SCALE)))
    face = padded[:, rows, columns].float()
    resized = functional.interpolate(
        face[None], (FACE_PX, FACE_PX), mode="bilinear", align_corners=False
    )[0]
    return resized.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
