"""Scenarios of benchmarks/streaming.py about the device: the backbone alone, its share of the
matmul rate, memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from benchmarks._cost import clip_flops
from benchmarks._scenarios import Bench, Row, ratio, speech
from rest_lightning.constants import FPS, num_latent_frames
from rest_lightning.streaming.engine import ChunkEngine, EngineOptions


@dataclass(frozen=True)
class Backbone:
    """The denoising of a clip alone, as the paper reports it, and its share of what matmuls do.

    121 frames are 5 chunks. It is the engine's own program, captured where sessions capture it; the
    reference is prefilled before. The paper's figure: 4.416 s on an A100 (REST, table 1).
    """

    repeats: int
    num_frames: int = 121
    matmul_size: int = 8192
    name: str = "backbone"

    @torch.inference_mode()
    def run(self, bench: Bench) -> Row:
        """Seconds of the clip; FLOPs by the formula that tests/test_model_cost.py checks."""
        head, like = bench.head, bench.like
        num_chunks = (num_latent_frames(self.num_frames) - 1) // bench.chunk_length
        engine = ChunkEngine(head, 1, head.sampling)
        engine.switch_identity(bench.portrait())
        noise = torch.randn(engine.latent_shape, **like)
        width = head.transformer.speech_dim or 1
        tokens = torch.randn(1, bench.chunk_length, head.speech_ae.num_tokens, width, **like)

        def clip() -> None:
            engine.cache.reset_rows()
            for _ in range(num_chunks):
                engine.denoise(noise, tokens)

        a = torch.randn(self.matmul_size, self.matmul_size, **like)
        row = bench.alternate({"clip": clip, "matmul": lambda: a @ a}, self.repeats)
        matmul = 2 * self.matmul_size**3 / row["matmul"]["p50"] / 1e9
        flops = clip_flops(head, num_chunks)
        achieved = flops / row["clip"]["p50"] / 1e9
        return {
            "num_frames": self.num_frames,
            "captured": engine.num_captured > 0,
            "ms": row,
            "backbone_s": round(row["clip"]["p50"] / 1000, 4),
            "tflop": round(flops / 1e12, 4),
            "tflops": round(achieved, 3),
            "matmul_tflops": round(matmul, 3),
            "matmul_share": round(achieved / matmul, 4),
        }


@dataclass(frozen=True)
class DeviceMemory:
    """Peak memory of an accelerator while a stream runs, its model included."""

    seconds: float
    name: str = "device_memory"

    def run(self, bench: Bench) -> Row:
        """Gigabytes (10^9 bytes) allocated and reserved at most; nothing without an accelerator."""
        if bench.device != "cuda":
            return {"not_measured": "no CUDA device"}
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        with bench.head.open(bench.portrait()[0]) as session:
            num_frames = sum(len(frames) for frames in session.stream(speech(self.seconds)))
        assert num_frames == round(self.seconds * FPS)
        peaks = {
            "allocated": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.max_memory_reserved(),
        }
        return {f"peak_{name}_gb": round(peak / 1e9, 3) for name, peak in peaks.items()}


@dataclass(frozen=True)
class Graphs:
    """A chunk as captured CUDA graphs, and the same functions called one operation after
    another.
    """

    repeats: int
    name: str = "graphs"

    def run(self, bench: Bench) -> Row:
        """One chunk of one stream in the steady state, frames on the host; nothing without CUDA."""
        if bench.device != "cuda":
            return {"not_measured": "no CUDA device"}
        engines = {}
        for name, graphs in (("captured", True), ("eager", False)):
            engine = ChunkEngine(
                bench.head, 1, bench.head.sampling, options=EngineOptions(graphs=graphs)
            )
            if engine.options.captures(bench.head.device) != graphs:
                return {"not_measured": "REST_CUDA_GRAPHS=0"}
            engine.start(bench.portrait())
            engines[name] = engine
        audio = torch.randn(1, engine.window_samples) * 0.1
        noise = torch.randn(engine.latent_shape)

        def chunk(engine: ChunkEngine) -> None:
            engine.step(audio, noise).cpu()

        for _ in range(3):  # the first chunk, the second, and all others are captured apart
            for engine in engines.values():
                chunk(engine)
        row = bench.alternate(
            {name: partial(chunk, engine) for name, engine in engines.items()}, self.repeats
        )
        return {"chunk_ms": row, "ratio": ratio(row, "captured", "eager")}
