"""Make docs/demo.gif from the video of ``make demo``: ``python docs/make_demo_gif.py
outputs/demo.mp4``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from rest_lightning.media.video import VideoFile

SECONDS, EVERY, SIDE_PX = 5.0, 2, 224


def main(source: str) -> None:
    """Every second frame of the first seconds, enlarged, as an endless GIF."""
    video = VideoFile(source)
    frames = video.read(0, min(video.num_frames, int(SECONDS * video.fps)))[::EVERY]
    images = [
        Image.fromarray(frame).resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)
        for frame in frames
    ]
    palette = images[0].quantize(128)
    images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    duration_ms = round(1000 * EVERY / video.fps)
    target = Path(__file__).with_name("demo.gif")
    images[0].save(
        target, save_all=True, append_images=images[1:], duration=duration_ms, loop=0, optimize=True
    )


if __name__ == "__main__":
    main(sys.argv[1])
