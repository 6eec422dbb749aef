"""The networks that the metrics look through: published weights, or the embedded ones, behind one interface."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rest_lightning.errors import UserError
from rest_lightning.metrics.weights import PUBLISHED, find_weights, is_known, sha256_of_weights
from rest_lightning.torchvision_compat import ensure_torchvision

METRICS = ("fid", "fvd", "fvd_videomae", "sync", "e_fid", "identity")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_RESIZED_TOGETHER, _CPU_BATCH = 8, 4  # frames


def load_extractor(metric: str, source: str | Path = "embedded") -> FeatureExtractor:
    """The network of a metric, frozen, in evaluation mode, on the CPU.

    Args:
        metric: ``fid``, ``fvd``, ``fvd_videomae``, ``sync``, ``e_fid`` or ``identity``.
        source: ``embedded``, ``published`` (looked for as :func:`find_weights` says), a file of published weights, or a
            folder that the embedded networks' training command wrote.

    Raises:
        UserError: an unknown metric, no such weights, a metric that has no such network.
    """
    if metric not in METRICS:
        raise UserError(f"expected an extractor of {', '.join(METRICS)}, got {metric!r}: choose one of them")
    trained_here = any((Path(source) / part / "config.json").is_file() for part in ("image", "video", "sync"))
    if str(source) == "embedded" or trained_here:
        if metric == "fvd_videomae":
            raise UserError("expected published weights for fvd_videomae, got 'embedded': leave this column out")
        from rest_lightning.metrics.embedded import load_embedded

        return load_embedded(metric, source if trained_here else None)
    if metric not in _CLASSES:
        raise UserError(
            f"expected the embedded extractor for {metric}, got {str(source)!r}: nobody published one that all use; "
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
            f"expected the weights of {PUBLISHED[metric].name} in {path}, got another file ({reason}): fetch it again"
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

    Through torchmetrics, whose network is torch-fidelity's; ``antialias=False`` is what makes it equal to that.

    Args:
        path: state dictionary of the converted TensorFlow weights.
        batch_size: frames per forward pass; on a CPU at most 4, whose values stay in its cache.
    """

    num_features = 2048

    def __init__(self, path: str | Path, batch_size: int = 32) -> None:
        super().__init__()
        ensure_torchvision()
        from torchmetrics.image.fid import NoTrainInceptionV3

        torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity would run any code in the file
        try:
            self.net = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path), antialias=False)
        except ModuleNotFoundError as error:
            raise UserError(
                "expected torch-fidelity beside torchmetrics for the published Inception, got none: "
                "`pip install -c constraints.txt rest_lightning[metrics]`, or use the embedded extractor"
            ) from error
        self.batch_size = batch_size

    @torch.inference_mode()
    def forward(self, frames: Tensor) -> Tensor:
        """Features (n, 2048)."""
        together = min(self.batch_size, _CPU_BATCH) if self.device.type == "cpu" else self.batch_size
        batches = frames.permute(0, 3, 1, 2).split(together)
        # The layout reaches down into the network, whose convolutions are faster on this one.
        return torch.cat([self.net(batch.to(self.device).contiguous()) for batch in batches])


class I3D(FeatureExtractor):
    """I3D of FVD: StyleGAN-V's torchscript file, 400 logits of a whole clip.

    Args:
        path: the torchscript file.
    """

    num_features = 400
    min_frames = 10

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.net = torch.jit.load(str(path), map_location="cpu")

    @torch.inference_mode()
    def forward(self, frames: Tensor) -> Tensor:
        """Features (1, 400)."""
        video = centre_square(frames.to(self.device)).mul_(2).sub_(1)
        return self.net(video.transpose(0, 1)[None], rescale=False, resize=False, return_features=True)


def centre_square(frames: Tensor, side: int = 224) -> Tensor:
    """uint8 (n, H, W, 3) to (n, 3, side, side) in [0, 1]: short side to ``side`` (bilinear), centre crop.

    The recipe of the common FVD code: the long side is rounded up and the crop's corner down.
    """
    height, width = frames.shape[1:3]
    scale = side / min(height, width)
    size = (side, math.ceil(width * scale)) if height < width else (math.ceil(height * scale), side)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    # Channels first, as the networks of videos want them; a few frames at a time, which stay in the processor's cache.
    video = torch.empty(3, len(frames), side, side, device=frames.device)
    for part, target in zip(frames.split(_RESIZED_TOGETHER), video.split(_RESIZED_TOGETHER, dim=1), strict=True):
        pixels = part.permute(0, 3, 1, 2).float() / 255.0
        resized = functional.interpolate(pixels, size, mode="bilinear", align_corners=False)
        target.copy_(resized[:, :, top : top + side, left : left + side].transpose(0, 1))
    return video.transpose(0, 1)


class VideoMAE(FeatureExtractor):
    """VideoMAE for content-debiased FVD: mean token of every 16 frames, no resampling; a rest below 16 is left out.

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
        mean, std = (torch.tensor(x, device=device)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
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
        from rest_lightning.models.syncnet import load_syncnet

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
        from rest_lightning.models.syncnet import FACE_PX, WINDOW_FRAMES

        faces = []
        for start in range(0, num_windows, self.batch_windows):
            stop = min(start + self.batch_windows, num_windows) + WINDOW_FRAMES - 1
            part = frames[start:stop].to(self.device).permute(0, 3, 1, 2).flip(1).float()  # RGB to BGR
            if part.shape[2:] != (FACE_PX, FACE_PX):
                part = functional.interpolate(part, (FACE_PX, FACE_PX), mode="bilinear", align_corners=False)
            faces.append(self.net.embed_faces(part.transpose(0, 1)))
        windows = mfcc_windows(audio, num_windows).to(self.device)
        speech = [self.net.embed_speech(part) for part in windows.split(4 * self.batch_windows)]
        return torch.cat(faces), torch.cat(speech)


def mfcc_windows(audio: Tensor, num_windows: int) -> Tensor:
    """MFCC of the first windows of five frames: (num_windows, 13, 20)."""
    from rest_lightning.metrics.mfcc import mfcc, to_int16
    from rest_lightning.models.syncnet import speech_windows

    cepstra = torch.from_numpy(mfcc(to_int16(audio.detach().cpu().numpy())))
    return speech_windows(cepstra, num_windows)


_CLASSES: dict[str, Any] = {"fid": Inception, "fvd": I3D, "fvd_videomae": VideoMAE, "sync": SyncNetExtractor}
