"""The networks that the metrics look through: published weights, or the embedded ones."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from rest_lightning.errors import UserError
from rest_lightning.extras import install_command
from rest_lightning.media.files import is_trusted
from rest_lightning.metrics.mouth import crop_mouth
from rest_lightning.metrics.syncnet import NUM_CEPSTRA, WINDOW_FRAMES, WINDOW_STEPS
from rest_lightning.metrics.weights import (
    PUBLISHED,
    WEIGHTS_FILE,
    ShippedNetwork,
    find_weights,
    is_known,
    sha256_of_weights,
)
from rest_lightning.torchvision_compat import ensure_torchvision

METRICS = ("fid", "fvd", "fvd_videomae", "sync", "e_fid", "identity")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_RESIZED_TOGETHER, _CPU_BATCH = 8, 4  # frames


def load_extractor(metric: str, source: str | Path = "embedded") -> FeatureExtractor:
    """Returns the network of a metric, frozen, in evaluation mode, on the CPU.

    Args:
        metric: ``fid``, ``fvd``, ``fvd_videomae``, ``sync``, ``e_fid`` or ``identity``.
        source: ``embedded``, ``published`` (looked for as :func:`find_weights` says), a file of
            published weights, or a folder that the embedded networks' training command wrote.

    Raises:
        UserError: an unknown metric, no such weights, or a metric that has no such network.
    """
    if metric not in METRICS:
        raise UserError(
            f"expected an extractor of {', '.join(METRICS)}, got {metric!r}: choose one of them"
        )
    trained_here = any(
        (Path(source) / part / "config.json").is_file() for part in ("image", "video", "sync")
    )
    if str(source) == "embedded" or trained_here:
        if metric == "fvd_videomae":
            raise UserError(
                "expected published weights for fvd_videomae, got 'embedded': leave this column out"
            )

        return load_embedded(metric, source if trained_here else None)
    if metric not in _CLASSES:
        raise UserError(
            f"expected the embedded extractor for {metric}, got {str(source)!r}: nobody published "
            "one that all use; "
            "leave it 'embedded', or hand the metric class an extractor of your own"
        )
    path = find_weights(metric, None if str(source) == "published" else source)
    try:
        extractor = _CLASSES[metric](path)
    except UserError:
        raise
    except (
        RuntimeError,
        LookupError,
        TypeError,
        AttributeError,
        ValueError,
        EOFError,
        OSError,
        pickle.PickleError,
    ) as error:
        reason = (str(error).strip().splitlines() or [""])[0].strip()[:120] or type(error).__name__
        raise UserError(
            f"expected the weights of {PUBLISHED[metric].name} in {path}, got another file "
            f"({reason}): fetch it again"
        ) from error
    extractor.name, extractor.sha256 = PUBLISHED[metric].name, sha256_of_weights(path)
    extractor.known = is_known(metric, extractor.sha256)
    return extractor.eval().requires_grad_(False)


class FeatureExtractor(nn.Module):
    """uint8 (n, H, W, 3) to features (m, num_features).

    Attributes:
        name: in result rows.
        sha256: of the weights.
        known: whether the hash is that of the published file.
        num_features: of one sample.
        min_frames: a clip below is refused.
    """

    name = "random"
    sha256 = ""
    known = True
    num_features: int
    min_frames = 1

    def row(self) -> dict[str, Any]:
        """What a result row says of the extractor."""
        return {"name": self.name, "sha256": self.sha256} | ({} if self.known else {"known": False})

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))


class Inception(FeatureExtractor):
    """Inception of FID: TensorFlow 1's bilinear resize to 299x299, 2048 features of every frame.

    Through torchmetrics, whose network is torch-fidelity's; ``antialias=False`` is what makes it
    equal to that.

    Args:
        path: state dictionary of the converted TensorFlow weights.
        batch_size: frames per forward pass; on a CPU at most 4, whose values stay in its cache.
    """

    num_features = 2048

    def __init__(self, path: str | Path, batch_size: int = 32) -> None:
        super().__init__()
        ensure_torchvision()
        from torchmetrics.image.fid import NoTrainInceptionV3

        # torch-fidelity would run any code in the file
        torch.load(path, map_location="cpu", weights_only=True)
        try:
            self.net = NoTrainInceptionV3(
                "inception-v3-compat", ["2048"], str(path), antialias=False
            )
        except ModuleNotFoundError as error:
            raise UserError(
                "expected torch-fidelity beside torchmetrics for the published Inception, got "
                f"none: {install_command('metrics')}, or use the embedded extractor"
            ) from error
        self.batch_size = batch_size

    @torch.inference_mode()
    def forward(self, frames: Tensor) -> Tensor:
        """Features (n, 2048)."""
        together = (
            min(self.batch_size, _CPU_BATCH) if self.device.type == "cpu" else self.batch_size
        )
        batches = frames.permute(0, 3, 1, 2).split(together)
        # The layout reaches down into the network, whose convolutions are faster on this one.
        return torch.cat([self.net(batch.to(self.device).contiguous()) for batch in batches])


class I3D(FeatureExtractor):
    """I3D of FVD: StyleGAN-V's torchscript file, 400 logits of a whole clip.

    Args:
        path: the torchscript file.

    Raises:
        UserError: a file whose hash is not on record, where :func:`is_trusted` is not said.
    """

    num_features = 400
    min_frames = 10

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        path = Path(path)
        if not is_trusted() and not is_known("fvd", sha256_of_weights(path)):
            raise UserError(
                f"expected a file that runs no code, got {path}: TorchScript may run any, and no "
                "hash of the published file is on record; if you trust it, "
                "`rest --trust-checkpoint ...` loads it"
            )
        self.net = torch.jit.load(str(path), map_location="cpu")

    @torch.inference_mode()
    def forward(self, frames: Tensor) -> Tensor:
        """Features (1, 400)."""
        video = centre_square(frames.to(self.device)).mul_(2).sub_(1)
        return self.net(
            video.transpose(0, 1)[None], rescale=False, resize=False, return_features=True
        )


def centre_square(frames: Tensor, side: int = 224) -> Tensor:
    """uint8 (n, H, W, 3) to (n, 3, side, side) in [0, 1]: short side to ``side`` (bilinear), centre
    crop.

    The recipe of the common FVD code: the long side is rounded up and the crop's corner down.
    """
    height, width = frames.shape[1:3]
    scale = side / min(height, width)
    size = (side, math.ceil(width * scale)) if height < width else (math.ceil(height * scale), side)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    # Channels first, as the networks of videos want them; a few frames at a time, which stay in the
    # processor's cache.
    video = torch.empty(3, len(frames), side, side, device=frames.device)
    for part, target in zip(
        frames.split(_RESIZED_TOGETHER), video.split(_RESIZED_TOGETHER, dim=1), strict=True
    ):
        pixels = part.permute(0, 3, 1, 2).float() / 255.0
        resized = functional.interpolate(pixels, size, mode="bilinear", align_corners=False)
        target.copy_(resized[:, :, top : top + side, left : left + side].transpose(0, 1))
    return video.transpose(0, 1)


class VideoMAE(FeatureExtractor):
    """VideoMAE for content-debiased FVD: mean token of every 16 frames, no resampling; a rest below
    16 is left out.

    Args:
        path: folder in transformers' layout.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        ensure_torchvision()
        from transformers import VideoMAEModel

        self.net = VideoMAEModel.from_pretrained(str(path), local_files_only=True)
        self.num_features, self.min_frames = self.net.config.hidden_size, self.net.config.num_frames

    @torch.inference_mode()
    def forward(self, frames: Tensor) -> Tensor:
        """Features (n // 16, hidden_size)."""
        device, side = self.device, self.net.config.image_size
        mean, std = (
            torch.tensor(x, device=device)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD)
        )
        count = len(frames) // self.min_frames * self.min_frames
        windows = frames[:count].split(self.min_frames)
        videos = ((centre_square(window.to(device), side) - mean) / std for window in windows)
        return torch.cat([self.net(video[None]).last_hidden_state.mean(dim=1) for video in videos])


class SyncNetExtractor(FeatureExtractor):
    """SyncNet with published weights; called with face crops and speech.

    Args:
        path: ``syncnet_v2.model``.
        batch_windows: windows per forward pass.
    """

    def __init__(self, path: str | Path, batch_windows: int = 20) -> None:
        super().__init__()
        from rest_lightning.metrics.syncnet import load_syncnet

        self.net = load_syncnet(torch.load(path, map_location="cpu", weights_only=True))
        self.num_features, self.batch_windows = self.net.num_features, batch_windows

    @torch.inference_mode()
    def forward(self, frames: Tensor, audio: Tensor, num_windows: int) -> tuple[Tensor, Tensor]:
        """Embeddings (num_windows, D) of frames and speech.

        Args:
            frames: face crops, uint8 RGB (n, H, W, 3); another size than 224 is resized (bilinear).
            audio: (samples,) 16 kHz mono in [-1, 1].
            num_windows: windows of five frames, the first starting at frame 0.
        """
        from rest_lightning.metrics.syncnet import FACE_PX, WINDOW_FRAMES

        faces = []
        for start in range(0, num_windows, self.batch_windows):
            stop = min(start + self.batch_windows, num_windows) + WINDOW_FRAMES - 1
            # RGB to BGR
            part = frames[start:stop].to(self.device).permute(0, 3, 1, 2).flip(1).float()
            if part.shape[2:] != (FACE_PX, FACE_PX):
                part = functional.interpolate(
                    part, (FACE_PX, FACE_PX), mode="bilinear", align_corners=False
                )
            faces.append(self.net.embed_faces(part.transpose(0, 1)))
        windows = mfcc_windows(audio, num_windows).to(self.device)
        speech = [self.net.embed_speech(part) for part in windows.split(4 * self.batch_windows)]
        return torch.cat(faces), torch.cat(speech)


def mfcc_windows(audio: Tensor, num_windows: int) -> Tensor:
    """MFCC of the first windows of five frames: (num_windows, 13, 20)."""
    from rest_lightning.metrics.syncnet import mfcc, speech_windows, to_int16

    cepstra = torch.from_numpy(mfcc(to_int16(audio.detach().cpu().numpy())))
    return speech_windows(cepstra, num_windows)


_CLASSES: dict[str, Any] = {
    "fid": Inception,
    "fvd": I3D,
    "fvd_videomae": VideoMAE,
    "sync": SyncNetExtractor,
}


# -- embedded extractors ---------------------------------------------------------------------------
# The embedded extractors: small networks trained on synthetic talkers, for where no published
# weights are.
#
# Trained by ``python -m tools.extractors``; called ``embedded-*`` in
# every row (docs/metrics.md). Their numbers compare models of this project with each other on
# synthetic talkers, and nothing else.

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "metrics"
COMMAND = "python -m tools.extractors"
EXPRESSION = (
    "mouth_opening",
    "mouth_width",
    "lip_rounding",
    "blink",
    "gaze_x",
    "gaze_y",
    "brow_raise",
)
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
    return functional.interpolate(
        x, (side, side), mode="bilinear", antialias=True, align_corners=False
    )


class EmbeddedImage(ShippedNetwork):
    """Frames at 128x128 to features, to the renderer's curves and to an identity.

    Args:
        widths: channels of five convolutions that halve the image.
        num_identity: dimensions of the identity.
    """

    title, command, assets = "image network", COMMAND, ASSETS / "image"

    def __init__(
        self, widths: tuple[int, ...] = (12, 24, 40, 56, 72), num_identity: int = 32
    ) -> None:
        super().__init__()
        self.config = {"widths": tuple(widths), "num_identity": num_identity}
        layers: list[nn.Module] = []
        for channels, out in zip((3, *widths), widths, strict=False):
            layers += _conv(channels, out)
        self.trunk = nn.Sequential(*layers)
        self.num_features = widths[-1]
        # of 4x4 places: where the mouth is matters
        self.factors = nn.Linear(16 * widths[-1], len(FACTORS))
        self.identity = nn.Linear(widths[-1], num_identity)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features (n, D), curves (n, 13) in units of their spread, identities (n, I) of length 1.

        Args:
            images: (n, 3, 128, 128) in [-1, 1].
        """
        places = self.trunk(images)
        features = places.mean(dim=(2, 3))
        return (
            features,
            self.factors(places.flatten(1)),
            functional.normalize(self.identity(features), dim=1),
        )


class EmbeddedVideo(ShippedNetwork):
    """Windows of 16 frames at 64x64 to features: convolutions in the image, then two along time.

    Args:
        widths: channels: three convolutions in the image, one in time, one in the image, one in
            time.
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

    def __init__(
        self, widths: tuple[int, ...] = (12, 24, 32, 48, 48), num_features: int = 48
    ) -> None:
        super().__init__()
        self.config = {"widths": tuple(widths), "num_features": num_features}
        layers: list[nn.Module] = []
        for channels, out in zip((1, *widths), widths, strict=False):
            layers += _conv(channels, out)
        last = 2 * 3 * widths[-1]  # of 64x72
        self.frame = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(last, 48), nn.BatchNorm1d(48), nn.ReLU()
        )
        self.frames = nn.Sequential(
            nn.Conv1d(48, 64, WINDOW_FRAMES), nn.ReLU(), nn.Conv1d(64, num_features, 1)
        )
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
    """What one output of :class:`EmbeddedImage` says of every frame: ``features``, ``expression``
    or ``identity``.
    """

    outputs: ClassVar[dict[str, int]] = {"features": 0, "expression": 1, "identity": 2}

    def __init__(self, net: EmbeddedImage, output: str = "features", batch_size: int = 32) -> None:
        super().__init__()
        self.net, self.output, self.batch_size = net, self.outputs[output], batch_size
        self.num_features = (net.num_features, len(EXPRESSION), net.config["num_identity"])[
            self.output
        ]

    @torch.inference_mode()
    def forward(self, frames: Tensor) -> Tensor:
        """Features (n, num_features)."""
        batches = frames.split(self.batch_size)
        parts = [
            self.net(resized(batch.to(self.device), IMAGE_PX))[self.output] for batch in batches
        ]
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
        parts = [
            resized(batch.to(self.device), VIDEO_PX).unflatten(0, (-1, VIDEO_WINDOW))
            for batch in batches
        ]
        return torch.cat([self.net(part) for part in parts])


class SyncFeatures(FeatureExtractor):
    """Embeddings of mouths and speech; the clip is a prepared one, whose mouth has a known
    place.
    """

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
        return torch.cat(faces), self.net.embed_speech(
            mfcc_windows(audio, num_windows).to(self.device)
        )


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
        raise UserError(
            f"expected an embedded extractor of {', '.join(_EMBEDDED)}, got "
            f"{metric!r}: choose one of them"
        )
    part, network, extractor_class, arguments, name = _EMBEDDED[metric]
    source = (ASSETS if folder is None else Path(folder)) / part
    extractor: FeatureExtractor = extractor_class(network.from_pretrained(source), *arguments)
    extractor.name, extractor.sha256 = name, sha256_of_weights(source / WEIGHTS_FILE)
    shipped = network.assets / WEIGHTS_FILE
    extractor.known = shipped.is_file() and sha256_of_weights(shipped) == extractor.sha256
    return extractor.eval().requires_grad_(False)
