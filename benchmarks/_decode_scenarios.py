"""Scenarios of benchmarks/streaming.py about the VAE: what streaming costs its decoder, in time and
in exactness.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks._models import halo_decoders
from benchmarks._scenarios import Bench, Row, ratio
from rest_lightning.constants import SPATIAL_RATIO, TEMPORAL_RATIO
from rest_lightning.models.ltx_vae import streamed_decode


@dataclass(frozen=True)
class StreamedDecode:
    """Decoding a clip chunk by chunk, and whole."""

    repeats: int
    num_latents: int = 13
    name: str = "decode"

    @torch.inference_mode()
    def run(self, bench: Bench) -> Row:
        """Milliseconds per frame; the streamed decode includes slot 0."""
        vae, side = bench.vae, bench.head.size_px // SPATIAL_RATIO
        shape = (1, vae.latent_channels, self.num_latents, side, side)
        latents = torch.randn(shape, **bench.like)

        def streamed() -> None:
            _, stream = vae.start_decode(latents[:, :, :1])
            for piece in latents[:, :, 1:].split(bench.chunk_length, dim=2):
                vae.decode_chunk(piece, stream)

        row = bench.alternate(
            {"streamed": streamed, "whole": lambda: vae.decode(latents)}, self.repeats
        )
        num_frames = (self.num_latents - 1) * TEMPORAL_RATIO + 1
        return {"num_frames": num_frames, "clip_ms": row, "ratio": ratio(row, "streamed", "whole")}


@dataclass(frozen=True)
class Halo:
    """How exact the streamed decode of stock LTX decoders is with a halo of 0 to 3 latents, and
    what it costs.
    """

    width: int
    num_latents: int = 7
    cells: int = 2
    name: str = "halo"

    @torch.inference_mode()
    def run(self, bench: Bench) -> Row:
        """Largest and mean absolute error against the whole decode, over the frames' standard
        deviation.
        """
        rows = []
        for decoder, vae in halo_decoders(self.width, bench.device).items():
            shape = (1, vae.latent_channels, self.num_latents, self.cells, self.cells)
            latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(
                bench.device
            )
            whole = vae.decode(latents)
            for halo in range(4):
                start_s = bench.now_s()
                error = (
                    streamed_decode(vae, latents, bench.chunk_length, halo) - whole
                ).abs() / whole.std()
                took_ms = 1000 * (bench.now_s() - start_s)
                numbers = {
                    "max_error": round(float(error.max()), 5),
                    "mean_error": round(float(error.mean()), 5),
                }
                rows.append(
                    {"decoder": decoder, "halo": halo, **numbers, "decode_ms": round(took_ms, 2)}
                )
        return {"weights": "random", "width": self.width, "default": vae.halo, "rows": rows}
