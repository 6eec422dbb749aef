"""The network that tells real frames from decoded ones, in training only (LDM's patch
discriminator, here of short pieces of video).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from rest_lightning.models.pretrained import PretrainedPart


class PatchDiscriminator(PretrainedPart):
    """Says of every patch of a few successive frames whether it looks real: above 0, or below.

    It sees about 46 pixels on a side, a mouth, and ``num_frames`` frames, so that flicker is seen
    too. Spectral norm bounds its slope. The pieces of :meth:`forward` come from
    :func:`random_pieces`.

    Args:
        width: channels of the first layer; later ones have 2 and 4 times as many.
        num_frames: successive frames that are judged together.
    """

    def __init__(self, width: int = 32, num_frames: int = 3) -> None:
        super().__init__()
        self._config = {"width": width, "num_frames": num_frames}
        self.num_frames = num_frames
        channels = (3 * num_frames, width, 2 * width, 4 * width)
        self.layers = nn.ModuleList(
            spectral_norm(nn.Conv2d(before, after, 4, stride=2, padding=1))
            for before, after in pairwise(channels)
        )
        self.layers.append(spectral_norm(nn.Conv2d(4 * width, 4 * width, 3, padding=1)))
        self.out = spectral_norm(nn.Conv2d(4 * width, 1, 3, padding=1))

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return dict(self._config)

    def forward(self, pieces: Tensor) -> Tensor:
        """Pieces (N, 3, ``num_frames``, H, W) in [-1, 1] -> verdicts (N, H / 8, W / 8)."""
        x = pieces.flatten(1, 2)
        for layer in self.layers:
            x = nn.functional.leaky_relu(layer(x), 0.2)
        verdicts: Tensor = self.out(x)[:, 0]
        return verdicts

    def unmoved(self, pieces: Tensor) -> Tensor:
        """:meth:`forward` with weights that no gradient reaches: for who is to be judged well."""
        weights = {name: weight.detach() for name, weight in self.named_parameters()}
        verdicts: Tensor = torch.func.functional_call(self, weights, (pieces,))
        return verdicts


def random_pieces(videos: tuple[Tensor, ...], num_frames: int, count: int) -> list[Tensor]:
    """Cuts ``count`` pieces of successive frames out of each clip, the same ones of every video.

    Args:
        videos: each (B, 3, F, H, W), F at least ``num_frames``.

    Returns:
        For each video (count * B, 3, num_frames, H, W).
    """
    starts = torch.randint(videos[0].shape[2] - num_frames + 1, (count,)).tolist()
    return [
        torch.cat([video[:, :, start : start + num_frames] for start in starts]) for video in videos
    ]
