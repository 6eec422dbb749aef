"""PSNR, SSIM and LPIPS of videos against their truth: for a VAE's reconstructions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rest_lightning.errors import UserError
from rest_lightning.metrics.image import video_psnr_db
from rest_lightning.metrics.sums import Frames, MeanMetric, check_clip

# The names under which torchvision looks for the ImageNet backbones.
BACKBONE_FILES = {
    "vgg": "vgg16-397923af.pth",
    "alex": "alexnet-owt-7be5be79.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}


def load_lpips(net: str = "vgg") -> nn.Module:
    """A frozen LPIPS network: ``lpips(a, b)`` with images (N, 3, H, W) in [-1, 1] gives
    (N, 1, 1, 1).

    Args:
        net: backbone: vgg (what VAE training uses), alex or squeeze.

    Raises:
        UserError: an unknown backbone, or one whose weights are not in torch's hub folder.
    """
    if net not in BACKBONE_FILES:
        raise UserError(f"expected an LPIPS backbone of {', '.join(BACKBONE_FILES)}, got {net!r}")
    file = Path(torch.hub.get_dir()) / "checkpoints" / BACKBONE_FILES[net]
    if not file.is_file():
        raise UserError(
            f"expected the weights of LPIPS's backbone at {file}, got no such file: fetch "
            f"{file.name} from "
            "download.pytorch.org/models into that folder, or set loss_weights.lpips to 0"
        )
    import lpips  # torchvision finds the file above, so this stays offline

    return lpips.LPIPS(net=net, verbose=False).eval().requires_grad_(False)


_SSIM_WINDOW_PX = 11
_BATCH = 16


def video_ssim(frames: Tensor, truth: Tensor) -> float:
    """Mean SSIM (Wang et al. 2004: Gaussian window of 11 pixels, sigma 1.5) of frames, uint8
    (n, H, W, 3).
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    total = 0.0
    for a, b in zip(frames.split(_BATCH), truth.split(_BATCH), strict=True):
        images = (a.permute(0, 3, 1, 2).float(), b.permute(0, 3, 1, 2).float())
        ssim = structural_similarity_index_measure(*images, data_range=255.0, reduction="sum")
        assert isinstance(ssim, Tensor)  # a tuple only where more was asked for
        total += float(ssim)
    return total / len(frames)


@torch.inference_mode()
def video_lpips(frames: Tensor, truth: Tensor, net: Any) -> float:
    """Mean LPIPS of frames, uint8 (n, H, W, 3); ``net`` is of :func:`load_lpips`."""
    total = 0.0
    for a, b in zip(frames.split(_BATCH), truth.split(_BATCH), strict=True):
        images = (x.permute(0, 3, 1, 2).float().div(127.5).sub(1.0) for x in (a, b))
        total += float(net(*images).double().sum())
    return total / len(frames)


class ReconstructionScores(MeanMetric):
    """Means over clips of ``psnr_db``, ``ssim`` and, with a network, ``lpips``.

    Args:
        lpips: of :func:`rest_lightning.metrics.reconstruction.load_lpips`, or None.
    """

    def __init__(self, lpips: Any = None, **kwargs: Any) -> None:
        super().__init__(
            ("psnr_db", "ssim") + (("lpips",) if lpips is not None else ()), lpips, **kwargs
        )

    def update(self, frames: Frames, truth: Frames) -> None:  # type: ignore[override]
        """One clip and its truth, both uint8 (n, H, W, 3).

        Raises:
            UserError: videos of different shapes, or frames below 11 pixels.
        """
        clip, true = check_clip(frames), check_clip(truth)
        if clip.shape != true.shape:
            shapes = f"{tuple(clip.shape)} and {tuple(true.shape)}"
            raise UserError(
                f"expected two videos of one shape, got {shapes}: cut or resize one of them"
            )
        if min(clip.shape[1:3]) < _SSIM_WINDOW_PX:
            raise UserError(
                f"expected frames of at least 11 pixels for SSIM, got {tuple(clip.shape[1:3])}: "
                "use larger ones"
            )
        clip, true = clip.to(self.device), true.to(self.device)
        scores = {"psnr_db": video_psnr_db(clip.cpu(), true.cpu()), "ssim": video_ssim(clip, true)}
        if self.extractor is not None:
            scores["lpips"] = video_lpips(clip, true, self.extractor.to(self.device))
        self.add(scores)
