"""LPIPS through the package of its authors, with the backbone's weights from a file: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from rest_lightning.errors import UserError

# The names under which torchvision looks for the ImageNet backbones.
BACKBONE_FILES = {
    "vgg": "vgg16-397923af.pth",
    "alex": "alexnet-owt-7be5be79.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}


def load_lpips(net: str = "vgg") -> nn.Module:
    """A frozen LPIPS network: ``lpips(a, b)`` with images (N, 3, H, W) in [-1, 1] gives (N, 1, 1, 1).

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
            f"expected the weights of LPIPS's backbone at {file}, got no such file: fetch {file.name} from "
            "download.pytorch.org/models into that folder, or set loss_weights.lpips to 0"
        )
    import lpips  # torchvision finds the file above, so this stays offline

    return lpips.LPIPS(net=net, verbose=False).eval().requires_grad_(False)
