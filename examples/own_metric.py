"""A metric of your own: how much the picture flickers from frame to frame.

    python examples/own_metric.py folder_of_videos/

`MeanMetric` averages numbers over clips, over several processes too, and leaves out clips for which
a number is not defined. `update` checks and measures one clip.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from rest_lightning.errors import UserError
from rest_lightning.media import VideoFile
from rest_lightning.metrics import MeanMetric, check_clip
from rest_lightning.metrics.sums import Frames


class Flicker(MeanMetric):
    """Mean absolute second difference of successive frames, in grey levels (0 to 255).

    Steady motion gives 0, and so does a still picture: what is left is trembling.

    Example:
        >>> flicker = Flicker()
        >>> flicker.update(torch.zeros(5, 8, 8, 3, dtype=torch.uint8))
        >>> flicker.compute()["flicker"].item()
        0.0
    """

    def __init__(self) -> None:
        super().__init__(["flicker"])

    def update(self, frames: Frames) -> None:  # type: ignore[override]
        """Takes in one clip.

        Args:
            frames: uint8 (n, H, W, 3), at least 3 of them.

        Raises:
            UserError: another type or shape, or fewer frames.
        """
        clip = check_clip(frames, min_frames=3).float()
        second: Tensor = clip[2:] - 2 * clip[1:-1] + clip[:-2]
        self.add({"flicker": float(second.abs().mean())})


def main(args: list[str] | None = None) -> float:
    """Prints and returns the flicker of all videos of a folder."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("videos", type=Path, help="folder of mp4 files")
    folder = parser.parse_args(args).videos
    metric = Flicker()
    for path in sorted(folder.glob("*.mp4")):
        try:
            video = VideoFile(path)
            metric.update(torch.from_numpy(video.read(0, video.num_frames)))
        except UserError as error:
            print(f"left out: {error}")
    flicker = float(metric.compute()["flicker"])
    print(f"{int(metric.num_clips)} clips, flicker {flicker:.3f}")
    return flicker


if __name__ == "__main__":
    main()
