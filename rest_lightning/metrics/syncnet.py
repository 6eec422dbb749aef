"""SyncNet: do these five frames and these 200 ms of speech belong together?

Chung and Zisserman, "Out of time: automated lip sync in the wild" (2016), with the layers and parameter names of the
published weights (joonson/syncnet_python, ``syncnet_v2.model``), so that they load strictly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

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
        c64, c96, c192, c256, c384, c512 = (max(1, round(n * width)) for n in (64, 96, 192, 256, 384, 512))
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

        Only the first convolution looks along time, and it gives one step per window: the clip goes through as it is,
        without the windows' copies of every frame, and the embeddings are the same.

        Args:
            frames: (3, n, 224, 224), n of at least 5, BGR in 0..255.
        """
        return self.netfclip(self.netcnnlip(frames[None])[0, :, :, 0, 0].T)


def _block(dims: int, channels: int, out: int, kernel: Any, stride: Any = 1, padding: Any = 0) -> list[nn.Module]:
    conv, norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
    return [conv(channels, out, kernel, stride, padding), norm(out), nn.ReLU(inplace=True)]


def _head(channels: int, num_features: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(channels, channels), nn.BatchNorm1d(channels), nn.ReLU(), nn.Linear(channels, num_features)
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
    """The MFCC windows that belong to the first ``count`` windows of frames: (steps, 13) to (count, 13, 20)."""
    return mfcc.unfold(0, WINDOW_STEPS, STEPS_PER_FRAME)[:count].to(torch.float32)
