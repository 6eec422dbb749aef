"""Rates and ratios that the whole code base shares (REST sec. 3: 25 fps, 16 kHz, 32x32x8
compression).
"""

from __future__ import annotations

VERSION = "0.2.0"  # of the package; pyproject.toml names the same
FPS = 25
SAMPLE_RATE = 16_000
SAMPLES_PER_FRAME = SAMPLE_RATE // FPS
TEMPORAL_RATIO = 8
SPATIAL_RATIO = 32


def num_latent_frames(num_frames: int) -> int:
    """Latent frames of ``num_frames`` pixel frames; the first frame is encoded on its own (REST
    sec. 3.1).
    """
    if num_frames < 1 or (num_frames - 1) % TEMPORAL_RATIO:
        low = max(1, (num_frames - 1) // TEMPORAL_RATIO * TEMPORAL_RATIO + 1)
        raise ValueError(
            f"expected a clip of 8n+1 frames, got {num_frames}: use {low} or {low + TEMPORAL_RATIO}"
        )
    return (num_frames - 1) // TEMPORAL_RATIO + 1
