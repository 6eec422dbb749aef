"""The embedded extractors: small networks trained on synthetic talkers, for where no published weights are.

Trained by ``python -m rest_lightning.commands.train_extractors``; called ``embedded-*`` in every row (EVALUATION sec.
3). Their numbers compare models of this project with each other on synthetic talkers, and nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from rest_lightning.errors import UserError
from rest_lightning.metrics.extractors import FeatureExtractor, mfcc_windows
from rest_lightning.metrics.mouth import crop_mouth
from rest_lightning.metrics.shipped import WEIGHTS_FILE, ShippedNetwork
from rest_lightning.metrics.weights import sha256_of_weights
from rest_lightning.models.syncnet import NUM_CEPSTRA, WINDOW_FRAMES, WINDOW_STEPS

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "metrics"
COMMAND = "python -m rest_lightning.commands.train_extractors"
EXPRESSION = ("mouth_opening", "mouth_width", "lip_rounding", "blink", "gaze_x", "gaze_y", "brow_raise")
POSE = ("yaw_rad", "pitch_rad", "roll_rad", "shift_x", "shift_y", "scale")
FACTORS = EXPRESSION + POSE  # curves of the renderer's face track
IMAGE_PX, VIDEO_PX = 128, 64
VIDEO_WINDOW = 16  # frames


def _conv(channels: int, out: int, stride: int = 2) -> list[nn.Module]:
    return [nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]


def _in_time(channels: int, out: int) -> list[nn.Module]:
    conv = nn.Conv3d(channels, out, (3, 1, 1), (2, 1, 1), (1, 0, 0), bias=False)
    return [conv, nn.BatchNorm3d(out), nn.ReLU()]


def resized(frames: Tensor, side: int) -> Tensor:
    """uint8 (n, H, W, 3) to (n, 3, side, side) in [-1, 1]."""
    x = frames.permute(0, 3, 1, 2).float().div(127.5).sub(1.0)
    if x.shape[2:] == (side, side):
        return x
    return functional.interpolate(x, (side, side), mode="bilinear", antialias=True, align_corners=False)


class EmbeddedImage(ShippedNetwork):
    """Frames at 128x128 to features, to the renderer's curves and to an identity.

    Args:
        widths: channels of five convolutions that halve the image.
        num_identity: dimensions of the identity.
    """

    title, command, assets = "image network", COMMAND, ASSETS / "image"

    def __init__(self, widths: tuple[int, ...] = (12, 24, 40, 56, 72), num_identity: int = 32) -> None:
        super().__init__()
        self.config = {"widths": tuple(widths), "num_identity": num_identity}
        layers: list[nn.Module] = []
        for channels, out in zip((3, *widths), widths, strict=False):
            layers += _conv(channels, out)
        self.trunk = nn.Sequential(*layers)
        self.num_features = widths[-1]
        self.factors = nn.Linear(16 * widths[-1], len(FACTORS))  # of 4x4 places: where the mouth is matters
        self.identity = nn.Linear(widths[-1], num_identity)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features (n, D), curves (n, 13) in units of their spread, identities (n, I) of length 1.

        Args:
            images: (n, 3, 128, 128) in [-1, 1].
        """
        places = self.trunk(images)
        features = places.mean(dim=(2, 3))
        return features, self.factors(places.flatten(1)), functional.normalize(self.identity(features), dim=1)


class EmbeddedVideo(ShippedNetwork):
    """Windows of 16 frames at 64x64 to features: convolutions in the image, then two along time.

    Args:
        widths: channels: three convolutions in the image, one in time, one in the image, one in time.
    """

    title, command, assets = "video network", COMMAND, ASSETS / "video"

    def __init__(self, widths: tuple[int, ...] = (16, 24, 40, 48, 56, 64)) -> None:
        super().__init__()
        self.config = {"widths": tuple(widths)}
        a, b, c, d, e, f = widths
        self.early = nn.Sequential(*_conv(3, a), *_conv(a, b), *_conv(b, c))
        self.early_time = nn.Sequential(*_in_time(c, d))
        self.late = nn.Sequential(*_conv(d, e))
        self.late_time = nn.Sequential(*_in_time(e, f))
        self.num_features = f

    def forward(self, windows: Tensor) -> Tensor:
        """Features (n, D) of windows (n, 16, 3, 64, 64) in [-1, 1]."""
        num = len(windows)
        x = self.early(windows.flatten(0, 1)).unflatten(0, (num, -1)).transpose(1, 2)
        x = self.early_time(x).transpose(1, 2)
        x = self.late(x.flatten(0, 1)).unflatten(0, (num, -1)).transpose(1, 2)
        return self.late_time(x).mean(dim=(2, 3, 4))


class EmbeddedSync(ShippedNetwork):
    """Mouth crops and MFCC to one space, windows as SyncNet's: 5 frames, 20 steps.

    Args:
        widths: channels of five convolutions that halve the crop.
        num_features: of an embedding, which has length 1.
    """

    title, command, assets = "sync network", COMMAND, ASSETS / "sync"

    def __init__(self, widths: tuple[int, ...] = (12, 24, 32, 48, 48), num_features: int = 48) -> None:
        super().__init__()
        self.config = {"widths": tuple(widths), "num_features": num_features}
        layers: list[nn.Module] = []
        for channels, out in zip((1, *widths), widths, strict=False):
            layers += _conv(channels, out)
        last = 2 * 3 * widths[-1]  # of 64x72
        self.frame = nn.Sequential(*layers, nn.Flatten(), nn.Linear(last, 48), nn.BatchNorm1d(48), nn.ReLU())
        self.frames = nn.Sequential(nn.Conv1d(48, 64, WINDOW_FRAMES), nn.ReLU(), nn.Conv1d(64, num_features, 1))
        self.speech = nn.Sequential(
            nn.BatchNorm1d(NUM_CEPSTRA),
            *(nn.Conv1d(NUM_CEPSTRA, 40, 3, 1, 1), nn.BatchNorm1d(40), nn.ReLU()),
            *(nn.Conv1d(40, 56, 3, 2, 1), nn.BatchNorm1d(56), nn.ReLU()),
            *(nn.Conv1d(56, 64, 3, 2, 1), nn.BatchNorm1d(64), nn.ReLU()),
            nn.Flatten(),
            nn.Linear(64 * WINDOW_STEPS // 4, num_features),
        )
        self.num_features = num_features

    def embed_faces(self, crops: Tensor) -> Tensor:
        """Windows of five of each clip's frames: grey crops (B, n, 64, 72) to (B, n - 4, D)."""
        num = len(crops)
        x = crops.flatten(0, 1)[:, None]
        mean, std = x.mean(dim=(2, 3), keepdim=True), x.std(dim=(2, 3), keepdim=True, correction=0)
        by_frame = self.frame((x - mean) / (std + 0.05)).unflatten(0, (num, -1)).transpose(1, 2)
        return functional.normalize(self.frames(by_frame).transpose(1, 2), dim=-1)

    def embed_speech(self, windows: Tensor) -> Tensor:
        """MFCC windows (n, 13, 20) to (n, D)."""
        return functional.normalize(self.speech(windows), dim=-1)


class ImageFeatures(FeatureExtractor):
    """What one output of :class:`EmbeddedImage` says of every frame: ``features``, ``expression`` or ``identity``."""

    outputs: ClassVar[dict[str, int]] = {"features": 0, "expression": 1, "identity": 2}

    def __init__(self, net: EmbeddedImage, output: str = "features", batch_size: int = 32) -> None:
        super().__init__()
        self.net, self.output, self.batch_size = net, self.outputs[output], batch_size
        self.num_features = (net.num_features, len(EXPRESSION), net.config["num_identity"])[self.output]

    @torch.inference_mode()
    def forward(self, frames: Tensor) -> Tensor:
        """Features (n, num_features)."""
        batches = frames.split(self.batch_size)
        parts = [self.net(resized(batch.to(self.device), IMAGE_PX))[self.output] for batch in batches]
        return torch.cat(parts)[:, : self.num_features]


class VideoFeatures(FeatureExtractor):
    """Features of every 16 frames of a clip; a rest below 16 is left out."""

    min_frames = VIDEO_WINDOW

    def __init__(self, net: EmbeddedVideo, batch_size: int = 4) -> None:
        super().__init__()
        self.net, self.batch_size, self.num_features = net, batch_size, net.num_features

    @torch.inference_mode()
    def forward(self, frames: Tensor) -> Tensor:
        """Features (n // 16, num_features)."""
        frames = frames[: len(frames) // VIDEO_WINDOW * VIDEO_WINDOW]
        batches = frames.split(VIDEO_WINDOW * self.batch_size)
        parts = [resized(batch.to(self.device), VIDEO_PX).unflatten(0, (-1, VIDEO_WINDOW)) for batch in batches]
        return torch.cat([self.net(part) for part in parts])


class SyncFeatures(FeatureExtractor):
    """Embeddings of mouths and speech; the clip is a prepared one, whose mouth has a known place."""

    def __init__(self, net: EmbeddedSync, batch_size: int = 64) -> None:
        super().__init__()
        self.net, self.batch_size, self.num_features = net, batch_size, net.num_features

    @torch.inference_mode()
    def forward(self, frames: Tensor, audio: Tensor, num_windows: int) -> tuple[Tensor, Tensor]:
        """Embeddings (num_windows, D) of frames, uint8 (n, H, W, 3), and of audio (samples,)."""
        faces = []
        for start in range(0, num_windows, self.batch_size):
            stop = min(start + self.batch_size, num_windows) + WINDOW_FRAMES - 1
            grey = crop_mouth(frames[start:stop].to(self.device)).mean(dim=1)
            faces.append(self.net.embed_faces(grey[None])[0])
        return torch.cat(faces), self.net.embed_speech(mfcc_windows(audio, num_windows).to(self.device))


# metric -> folder, network, extractor, its further arguments, name in result rows
_EMBEDDED: dict[str, tuple[str, type[ShippedNetwork], Any, tuple[str, ...], str]] = {
    "fid": ("image", EmbeddedImage, ImageFeatures, ("features",), "embedded-image"),
    "e_fid": ("image", EmbeddedImage, ImageFeatures, ("expression",), "embedded-expression"),
    "identity": ("image", EmbeddedImage, ImageFeatures, ("identity",), "embedded-identity"),
    "fvd": ("video", EmbeddedVideo, VideoFeatures, (), "embedded-video"),
    "sync": ("sync", EmbeddedSync, SyncFeatures, (), "embedded-sync"),
}


def load_embedded(metric: str, folder: str | Path | None = None) -> FeatureExtractor:
    """The embedded extractor of a metric, frozen.

    Args:
        metric: ``fid``, ``e_fid``, ``identity``, ``fvd`` or ``sync``.
        folder: what the training command wrote; None takes what ships with the package.

    Raises:
        UserError: no such network in the folder, or none for this metric.
    """
    if metric not in _EMBEDDED:
        raise UserError(f"expected an embedded extractor of {', '.join(_EMBEDDED)}, got {metric!r}: choose one of them")
    part, network, extractor_class, arguments, name = _EMBEDDED[metric]
    source = (ASSETS if folder is None else Path(folder)) / part
    extractor: FeatureExtractor = extractor_class(network.from_pretrained(source), *arguments)
    extractor.name, extractor.sha256 = name, sha256_of_weights(source / WEIGHTS_FILE)
    shipped = network.assets / WEIGHTS_FILE
    extractor.known = shipped.is_file() and sha256_of_weights(shipped) == extractor.sha256
    return extractor.eval().requires_grad_(False)
