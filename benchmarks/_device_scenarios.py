"""Scenarios of benchmarks/streaming.py about the device: the backbone alone, its share of the
matmul rate, memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks._cost import prompt_length, transformer_flops
from benchmarks._scenarios import Bench, Row, ratio, speech
from rest_lightning.constants import FPS, SPATIAL_RATIO, num_latent_frames
from rest_lightning.diffusion.sampling import integrate
from rest_lightning.diffusion.schedule import sampling_sigmas
from rest_lightning.models.transformer import Condition
from rest_lightning.streaming.engine import ChunkEngine, EngineOptions


@dataclass(frozen=True)
class Backbone:
    """The denoising of a clip alone, as the paper reports it (121 frames: 5 chunks), and its share
    of what matmuls do.

    The paper's figure: 4.416 s on an A100 (REST, table 1). Runs eagerly; the engine's captured
    program is in the other scenarios.
    """

    repeats: int
    num_frames: int = 121
    matmul_size: int = 8192
    name: str = "backbone"

    @torch.inference_mode()
    def run(self, bench: Bench) -> Row:
        """Seconds of the clip; FLOPs by the formula that tests/test_model_cost.py checks."""
        model, settings, length = bench.transformer, bench.head.sampling, bench.chunk_length
        rows, side = settings.branches.num_branches, bench.head.size_px // SPATIAL_RATIO
        num_chunks = (num_latent_frames(self.num_frames) - 1) // length
        sigmas = sampling_sigmas(settings.num_steps, settings.shift, (1 + 2 * length) * side * side)
        like = bench.like
        levels = [
            model.embed_sigma(torch.full((1, 1), level, device=bench.head.device))
            for level in sigmas[:-1]
        ]
        noise = torch.randn(rows, model.in_channels, length, side, side, **like)
        tokens = torch.randn(
            rows, length, bench.head.speech_ae.num_tokens, model.speech_dim or 1, **like
        )
        text = model.project_prompt(rows)
        cache = model.new_cache(rows, side, side, num_steps=settings.num_steps)

        def velocity(speech_keys: Condition, sample: Tensor, step: int) -> Tensor:
            found: Tensor = model(sample, levels[step], speech_keys, text, cache=cache, step=step)
            return found

        def clip() -> None:
            cache.reset_rows()
            model.prefill(noise[:, :, :1], cache, text_embeds=text)
            for _ in range(num_chunks):
                speech_keys = model.project_speech(tokens)
                integrate(partial(velocity, speech_keys), noise, sigmas)
                cache.commit()

        a = torch.randn(self.matmul_size, self.matmul_size, **like)
        row = bench.alternate({"clip": clip, "matmul": lambda: a @ a}, self.repeats)
        matmul = 2 * self.matmul_size**3 / row["matmul"]["p50"] / 1e9
        cells, flops = side * side, 0
        for chunk in range(num_chunks):
            window = (length * cells, (1 + (1 + (chunk > 0)) * length) * cells)
            count = bench.head.speech_ae.num_tokens
            terms = transformer_flops(
                model, rows, length, cells, [window], count, prompt_length(model)
            )
            flops += settings.num_steps * (terms["blocks"] + terms["ends"])
        achieved = flops / row["clip"]["p50"] / 1e9
        return {
            "num_frames": self.num_frames,
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
