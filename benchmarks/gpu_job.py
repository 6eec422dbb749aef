#!/usr/bin/env python3
"""What does a GPU do with it? Checks, timings and a profile at paper size, the most valuable first.

``python3 benchmarks/gpu_job.py --out OUT --budget 430`` runs until its time is used up;
``--device cpu --size mini`` rehearses every step on a CPU in a few minutes.

The driver starts one process per group of steps. A step that fails leaves its error, and the next
one runs; when a process dies or hangs, another one goes on behind the step that it died in.
``results.json`` is written anew after every step, ``log.txt`` holds what was printed, and
``kernels.txt`` the profile. ``--out`` may be the folder of an earlier call: what it measured stays,
unless ``--again`` is given. Needs torch, numpy, diffusers, transformers and jsonargparse; Triton
for the fused kernels; pytest for the step ``tests``. No PyAV, Lightning, decord or lpips.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import faulthandler
import gc
import json
import math
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from rest_lightning.models.transformer import A2VDiT
    from rest_lightning.streaming.engine import ChunkEngine
    from rest_lightning.talking_head import TalkingHead

ROOT = Path(__file__).resolve().parent.parent
BACK_ENDS = ("cudnn", "flash", "efficient", "math")
TRAIN_VARIABLE = "GPU_JOB_TRAIN"  # a command for the time that is left
Row = dict[str, Any]
# a kernel, what it replaces, the arguments of that, and the bytes that the kernel reads and writes
Case = tuple[Callable[[], "Tensor"], Callable[..., "Tensor"], tuple["Tensor", ...], int]


@dataclass
class Job:
    """What is to be measured, where, and until when; and what the steps of one process share."""

    out: Path
    device: str
    size: str
    deadline_s: float
    started_s: float
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    least_s: float = 8.0
    break_at: str = ""
    hang_at: str = ""
    shared: dict[str, Any] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        """Whether this is no rehearsal."""
        return self.device == "cuda"

    @property
    def num_chunks(self) -> int:
        """Chunks of the clip whose backbone is measured: 121 frames are 5."""
        return 5 if self.on_gpu else 2

    @property
    def left_s(self) -> float:
        """Seconds until the deadline."""
        return self.deadline_s - time.time()

    def say(self, *words: Any) -> None:
        """Print a line with the job's time."""
        print(f"[{time.time() - self.started_s:6.1f} s]", *words, flush=True)

    def wants(self, name: str) -> bool:
        """Whether a step was chosen; names may be given by their beginnings."""
        chosen = not self.only or any(_is_within(name, word) for word in self.only)
        return chosen and not any(_is_within(name, word) for word in self.skip)

    # -- results --------------------------------------------------------------------------------

    def load(self) -> Row:
        """What was recorded so far."""
        path = self.out / "results.json"
        found: Row = {"steps": {}}
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
        return found

    def save(self, result: Row) -> None:
        """Write results.json, whole or not at all."""
        temporary = self.out / ".results.tmp"
        text = json.dumps(_finite(result), indent=1, default=str, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(self.out / "results.json")

    def record(self, name: str, **entries: Any) -> None:
        """Add to a step's entry."""
        result = self.load()
        result["steps"].setdefault(name, {}).update(entries)
        self.save(result)

    # -- the device -----------------------------------------------------------------------------

    def wait(self) -> None:
        """Wait for everything that the device was asked for."""
        if self.on_gpu:
            import torch

            torch.cuda.synchronize()

    def clean(self) -> None:
        """Give memory back."""
        gc.collect()
        if self.on_gpu:
            import torch

            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def memory(self) -> Row:
        """Gigabytes (10^9 bytes) that torch holds now and held at most."""
        if not self.on_gpu:
            return {}
        import torch

        names = ("memory_allocated", "max_memory_allocated", "max_memory_reserved")
        return {f"{name}_gb": round(getattr(torch.cuda, name)() / 1e9, 3) for name in names}

    def times_ms(self, call: Callable[[], Any], repeats: int, num_warm: int = 1) -> Row:
        """Milliseconds of calls, by events on a GPU, where the host's time to queue stands
        beside them.
        """
        import torch

        if not self.on_gpu:  # a rehearsal, in Triton's interpreter for the most part
            repeats, num_warm = 1, 0
        for _ in range(num_warm):
            call()
        times, host = [], []
        for _ in range(repeats):
            self.wait()
            start_s = time.perf_counter()
            if self.on_gpu:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                call()
                end.record()
                host.append(1e3 * (time.perf_counter() - start_s))
                end.synchronize()
                times.append(begin.elapsed_time(end))
            else:
                call()
                times.append(1e3 * (time.perf_counter() - start_s))
        return {**spread(times), **({"host_ms_p50": spread(host)["p50"]} if host else {})}

    def per_call_us(self, calls: list[Callable[[], Any]], repeats: int = 5) -> float:
        """Microseconds of one of several calls inside a captured graph, without gaps of
        launching.
        """
        import torch

        if not self.on_gpu:
            start_s = time.perf_counter()
            calls[0]()
            return round(1e6 * (time.perf_counter() - start_s), 3)
        for call in calls:
            call()
        self.wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return round(1e3 * self.times_ms(graph.replay, repeats)["p50"] / len(calls), 3)

    # -- what the steps share -------------------------------------------------------------------

    @property
    def like(self) -> dict[str, Any]:
        """Device and type of what is measured."""
        import torch

        return {"device": self.device, "dtype": torch.bfloat16 if self.on_gpu else torch.float32}

    @property
    def head(self) -> TalkingHead:
        """The model of this job's size, random weights; made once a process."""
        if "head" not in self.shared:
            import torch

            from benchmarks._models import load_head

            start_s = time.perf_counter()
            dtype = self.like["dtype"]
            head = (
                mini_head(self)
                if self.size == "mini"
                else load_head(self.size, self.device, dtype)[0]
            )
            for parameter in head.transformer.parameters():  # no path may hide behind a zero start
                if not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.02)
            self.clean()
            self.shared |= {"head": head, "load_s": round(time.perf_counter() - start_s, 2)}
        found: TalkingHead = self.shared["head"]
        return found

    @property
    def portrait(self) -> Tensor:
        """Random, (1, 3, H, W) in [-1, 1]."""
        side = self.head.size_px
        return _random(1, 3, side, side, uniform=True) * 2 - 1

    @property
    def noise(self) -> Tensor:
        """Of a chunk of one stream, on the device."""
        model, side = self.head.transformer, self.head.size_px // 32
        length = int(model.cache_options.chunk_length)
        return _random(1, model.in_channels, length, side, side).to(self.device)

    @property
    def tokens(self) -> Tensor:
        """Speech latents of a chunk of one stream, on the device."""
        model = self.head.transformer
        length, width = int(model.cache_options.chunk_length), model.speech_dim or 1
        return _random(1, length, self.head.speech_ae.num_tokens, width).to(**self.like)

    def engine(self, batch: int = 1, **options: Any) -> ChunkEngine:
        """A started engine."""
        from rest_lightning.streaming.engine import ChunkEngine, EngineOptions

        if not self.on_gpu:
            options.pop("graphs", None)
        made = ChunkEngine(self.head, batch, self.head.sampling, None, EngineOptions(**options))
        made.start(self.portrait.expand(batch, -1, -1, -1))
        return made

    def kept(self, name: str) -> ChunkEngine:
        """The captured, queued or eager engine, which several steps use; made when first wanted."""
        if name not in self.shared:
            options = {
                "captured": {"graphs": True},
                "queued": {"graphs": False},
                "eager": {"graphs": False, "overlap": False},
            }
            self.shared[name] = self.engine(**options[name])
            for _ in range(2):
                chunk(self, self.shared[name])
        made: ChunkEngine = self.shared[name]
        return made

    def drop(self, *names: str) -> None:
        """Let go of engines that steps share (all of them unless named)."""
        for name in names or ("captured", "queued", "eager"):
            self.shared.pop(name, None)
        self.clean()

    @property
    def wanted(self) -> Tensor:
        """Latents of the second chunk by the plain loop."""
        if "wanted" not in self.shared:
            self.shared["wanted"] = plain_latents(self, self.head.transformer)
        found: Tensor = self.shared["wanted"]
        return found


@dataclass(frozen=True)
class Step:
    """One measurement.

    Attributes:
        group: steps of one group share a process.
        limit_s: longest time.
        call: gives the entry for results.json.
    """

    group: str
    limit_s: float
    call: Callable[[Job], Any]


# Processes in this order; within one, steps in the order of this file.
GROUPS = ("kernels", "paper", "tests", "embedded", "products", "compiled", "training", "command")
STEPS: dict[str, Step] = {}


def step(
    name: str, group: str, limit_s: float
) -> Callable[[Callable[[Job], Any]], Callable[[Job], Any]]:
    """Registers a function as a step."""

    def register(call: Callable[[Job], Any]) -> Callable[[Job], Any]:
        STEPS[name] = Step(group, limit_s, call)
        return call

    return register


def _is_within(name: str, word: str) -> bool:
    return name == word or name.startswith(word + ".")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _random(*shape: int, uniform: bool = False) -> Tensor:
    import torch

    generator = torch.Generator().manual_seed(0)
    return (
        torch.rand(shape, generator=generator)
        if uniform
        else torch.randn(shape, generator=generator)
    )


def spread(values: list[float]) -> Row:
    """Count, p50, p95, min and max."""
    ordered = sorted(values)
    at = {
        f"p{q}": round(ordered[min(len(ordered) - 1, q * len(ordered) // 100)], 4) for q in (50, 95)
    }
    return {"num": len(ordered), **at, "min": round(ordered[0], 4), "max": round(ordered[-1], 4)}


def error_of(found: Tensor, exact: Tensor) -> float:
    """|found - exact| / |exact|."""
    found, exact = found.double(), exact.double()
    return round(float((found - exact).norm() / exact.norm()), 7)


def told(error: BaseException) -> str:
    """An error as an entry."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


# -- group kernels: what the device reaches, fused kernels, attention -----------------------------


@step("env", "kernels", 40)
def env(job: Job) -> Row:
    """Versions, the matmul rate, and the memory's and the host's bandwidth."""
    import torch

    from rest_lightning.machine import commit, hardware, versions

    found: Row = {"hardware": hardware(), "versions": versions(), "commit": commit()}
    with contextlib.suppress(ImportError):
        import triton

        found["versions"] |= {"triton": triton.__version__}
    if job.on_gpu:
        found["versions"] |= {"cudnn": torch.backends.cudnn.version(), "cuda": torch.version.cuda}
        found["capability"] = torch.cuda.get_device_capability()
        found["smi"] = smi("name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit")
    size = 8192 if job.on_gpu else 256
    a, b = (torch.randn(size, size, **job.like) for _ in range(2))
    found["matmul_tflops"] = round(2 * size**3 / job.times_ms(lambda: a @ b, 10, 3)["p50"] / 1e9, 2)
    source = torch.randn(2**30 if job.on_gpu else 2**20, device=job.device)
    target = torch.empty_like(source)
    copied = 2 * source.numel() * source.element_size()
    found["copy_tb_s"] = round(
        copied / job.times_ms(lambda: target.copy_(source), 10, 2)["p50"] / 1e9, 3
    )
    return found


def smi(query: str) -> str:
    """What nvidia-smi says, or why it says nothing."""
    words = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return told(error)


@step("fused", "kernels", 90)
def fused_kernels(job: Job) -> Row:
    """Every fused kernel and the operations that it replaces: error to float64, time, bytes a
    second.
    """
    import torch
    import torch.nn.functional as F

    from rest_lightning.models import fused
    from rest_lightning.models.attention import rotate, split_heads

    rows, tokens, dim, heads = (2, 768, 2048, 32) if job.on_gpu else (2, 6, 64, 2)
    like, frames = job.like, 6
    x, added = (torch.randn(rows, tokens, dim, **like) for _ in range(2))
    shift, scale, gate, norm = (torch.randn(dim, **like) for _ in range(4))
    qkv = torch.randn(rows, tokens, 3 * dim, **like)
    table = torch.polar(*(torch.rand(rows, tokens, dim // 2, device=job.device) for _ in range(2)))
    slots = [torch.empty(rows, heads, tokens, dim // heads, **like) for _ in range(2)]
    q = torch.randn(frames, rows * tokens // frames, dim, **like)
    keys = torch.randn(frames, 2, dim, **like)
    video = torch.randn(1, *((26, 128, 128, 128) if job.on_gpu else (3, 4, 4, 16)), **like)
    out = torch.empty_like(video)

    def eager_norm(x: Tensor, added: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        return torch.addcmul(
            shift, F.rms_norm(torch.addcmul(x, added, gate), (dim,), None, 1e-6), scale
        )

    def eager_rotate(qkv: Tensor, norm: Tensor, table: Tensor, *slots: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, -1)).unbind(-2)
        q, k = (rotate(F.rms_norm(x, (dim,), norm, 1e-5), table) for x in (q, k))
        for slot, new in zip(slots, (k, v), strict=False):
            slot.copy_(split_heads(new, heads))
        return q

    def eager_weights(q: Tensor, norm: Tensor, keys: Tensor) -> Tensor:
        q, k = split_heads(F.rms_norm(q, (dim,), norm, 1e-5), heads), split_heads(keys, heads)
        return (
            (q @ k.transpose(-1, -2) * (dim // heads) ** -0.5)
            .softmax(-1)
            .transpose(1, 2)
            .flatten(2)
        )

    def eager_silu(video: Tensor) -> Tensor:
        return F.silu(F.rms_norm(video, video.shape[-1:], None, 1e-8))

    def norm_silu() -> Tensor:
        fused.norm_silu(video, out, 1e-8)
        return out

    size = x.element_size()
    cases: dict[str, Case] = {
        "norm_modulate": (
            lambda: fused.norm_modulate(x, 1e-6, shift, scale, added, gate)[1][0],
            eager_norm, (x, added, shift, scale, gate), 4 * x.numel() * size,
        ),
        "rotate_store": (
            lambda: fused.rotate_store(qkv, norm, norm, table, slots[0], slots[1], 1e-5),
            eager_rotate, (qkv, norm, table), 2 * qkv.numel() * size + table.numel() * 8,
        ),
        "few_key_weights": (
            lambda: fused.few_key_weights(q, norm, keys, heads, 1e-5),
            eager_weights, (q, norm, keys), q.numel() * size,
        ),
        "norm_silu": (norm_silu, eager_silu, (video,), 2 * video.numel() * size),
    }  # fmt: skip
    found: Row = {}
    for name, (kernel, eager, arguments, num_bytes) in cases.items():
        wide = (
            value.to(torch.complex128) if value.is_complex() else value.double()
            for value in arguments
        )
        exact = eager(*wide)
        own = (*arguments, *slots) if name == "rotate_store" else arguments
        row: Row = {
            "error": error_of(kernel(), exact),
            "eager_error": error_of(eager(*arguments), exact),
        }
        row["us"] = job.per_call_us([kernel] * 10)
        row["eager_us"] = job.per_call_us([partial(eager, *own)] * 10)
        row["tb_s"] = round(num_bytes / row["us"] / 1e6, 3)
        found[name] = row
        job.say(name, row)
    return found


@step("attention", "kernels", 90)
def attention(job: Job) -> Row:
    """Every attention of a denoising step, as it is laid out there, on every back end."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import sdpa_kernel

    from rest_lightning.streaming.engine import ATTENTION

    heads, dim, n = (32, 64, 256) if job.on_gpu else (2, 16, 4)
    like = job.like

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(-3, -2)

    q = split(torch.randn(2, 3 * n, heads * dim, **like))
    keys, values = (torch.randn(28, 2, heads, 7 * n, dim, **like)[3] for _ in range(2))
    text = [torch.randn(2, heads, 20, dim, **like) for _ in range(2)]
    speech = [split(torch.randn(6, 2, heads * dim, **like)) for _ in range(2)]
    mask = torch.zeros(2, 1, 1, 7 * n, **like)
    cases: dict[str, tuple[Tensor, Tensor, Tensor, Tensor | None]] = {
        "self, steady": (q, keys, values, None),
        "self, first chunk": (q, keys[:, :, 3 * n :], values[:, :, 3 * n :], None),
        "self, rows of different ages": (q, keys, values, mask),
        "text, 20 tokens": (q, *text, None),  # type: ignore[dict-item]
        "speech, 2 keys": (split(torch.randn(6, n, heads * dim, **like)), *speech, None),  # type: ignore[dict-item]
    }
    found: Row = {}
    for name, (a, k, v, m) in cases.items():
        scores = a.double() @ k.double().transpose(-1, -2) / dim**0.5
        exact = torch.softmax(scores + (0 if m is None else m.double()), -1) @ v.double()
        row = found[name] = {}
        for kind in ("auto", *(BACK_ENDS if job.on_gpu else ())):
            back_end = ATTENTION[kind]
            scope = contextlib.nullcontext() if back_end is None else sdpa_kernel(back_end)
            call = partial(F.scaled_dot_product_attention, a, k, v, attn_mask=m)
            try:
                with scope, torch.inference_mode():
                    row[kind] = {
                        "error": error_of(call(), exact),
                        "us": job.per_call_us([call] * 10),
                    }
            except RuntimeError as error:
                row[kind] = told(error)
                job.wait()
        job.say(name, row)
    return found


# -- group paper: the engine ----------------------------------------------------------------------


def mini_head(job: Job) -> TalkingHead:
    """The paper's kinds of parts, all of them tiny: rehearses what ``tiny`` has no part for."""
    import torch

    from rest_lightning.diffusion.sampling import Sampling
    from rest_lightning.models.cache import CacheOptions
    from rest_lightning.models.ltx_vae import LTXVideoVAE
    from rest_lightning.models.speech import WhisperEncoder
    from rest_lightning.models.speech_ae import SpeechAE
    from rest_lightning.models.transformer import A2VDiT
    from rest_lightning.talking_head import TalkingHead

    torch.manual_seed(0)
    widths = {
        "block_out_channels": [16, 32, 32, 32],
        "decoder_block_out_channels": [16, 32, 32, 32],
    }
    layers = {"layers_per_block": [1] * 5, "decoder_layers_per_block": [1] * 5}
    vae = LTXVideoVAE(ltx_config={"decoder_causal": True, "latent_channels": 8, **widths, **layers})
    transformer = A2VDiT(
        in_channels=8, num_layers=2, num_attention_heads=2, attention_head_dim=16, speech_dim=8,
        caption_channels=16, prompt_length=9, attention="chunked", cache_options=CacheOptions(),
    )  # fmt: skip
    small = {
        "d_model": 16,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
    }
    speech = WhisperEncoder(None, whisper_config=small)
    speech_ae = SpeechAE(feature_dim=speech.feature_dim, num_tokens=2, latent_dim=8, width=8)
    head = TalkingHead(vae, speech, speech_ae, transformer, Sampling(2, 3.0, 1.0), size_px=32)
    head.to(job.device).set_dtype(job.like["dtype"])
    return head


def denoise(job: Job, engine: ChunkEngine, num_chunks: int) -> Tensor:
    """The backbone of a clip: its chunks, one after another; latents of the last one."""
    import torch

    with torch.inference_mode():
        engine.cache.reset_rows()
        for _ in range(num_chunks):
            latents = engine.denoise(job.noise, job.tokens)
        return latents


def chunk(job: Job, engine: ChunkEngine) -> Tensor:
    """One chunk of all of an engine's streams, from speech to frames."""
    audio = _random(1, engine.window_samples).expand(engine.batch, -1) * 0.1
    return engine.step(audio, job.noise.expand(engine.batch, -1, -1, -1, -1))


def to_host(job: Job, engine: ChunkEngine) -> Tensor:
    """The frames of one chunk, on the host."""
    return chunk(job, engine).cpu()


def plain_latents(job: Job, model: A2VDiT, num_chunks: int = 2) -> Tensor:
    """What an engine's denoising computes, written down plainly, in the type of ``model``."""
    import torch

    from rest_lightning.diffusion.sampling import euler_step
    from rest_lightning.diffusion.schedule import sampling_sigmas

    head, sampling = job.head, job.head.sampling
    guidance, side, dtype = sampling.branches, head.size_px // 32, model.proj_in.weight.dtype
    with torch.inference_mode():
        portrait = job.portrait[:, :, None].to(job.device, head.dtype)
        reference = head.vae.encode(portrait).to(dtype)
        rows = guidance.num_branches
        cache = model.new_cache(rows, side, side, num_steps=sampling.num_steps)
        text = model.project_prompt(rows)
        model.prefill(guidance.references(reference), cache, text_embeds=text)
        num_tokens = model.cache_options.num_slots * side**2
        levels = sampling_sigmas(sampling.num_steps, sampling.shift, num_tokens)
        sigmas = torch.tensor(levels, device=job.device)
        embedded = [model.embed_sigma(sigmas.new_full((1, 1), level)) for level in levels]
        speech = model.project_speech(guidance.speech(job.tokens.to(dtype)))
        for _ in range(num_chunks):
            sample = job.noise.to(dtype)
            for i in range(len(levels) - 1):
                velocity = model(
                    guidance.samples(sample), embedded[i], speech, text, cache=cache, step=i
                )
                sample = euler_step(sample, guidance.combine(velocity), sigmas[i], sigmas[i + 1])
            cache.commit()
    return sample


def backbone(job: Job, engine: ChunkEngine, repeats: int = 5) -> Row:
    """Time of the backbone for 121 frames, and the rate that this is."""
    from benchmarks._cost import clip_flops

    times = job.times_ms(partial(denoise, job, engine, job.num_chunks), repeats)
    flops = clip_flops(job.head, job.num_chunks)
    rate = {"tflop": round(flops / 1e12, 4), "tflops": round(flops / times["p50"] / 1e9, 3)}
    return {"num_chunks": job.num_chunks, "backbone_ms": times, **rate}


def decode_ms(job: Job, engine: ChunkEngine, repeats: int = 10) -> Row:
    """Time of decoding a chunk."""
    import torch

    def call() -> None:
        with torch.inference_mode():
            engine._decode(engine.chunk_length)

    return job.times_ms(call, repeats, 2)


@step("paper.build", "paper", 120)
def build(job: Job) -> Row:
    """Making the model on the device."""
    parts = job.head.named_children()
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts}
    return {"seconds": job.shared["load_s"], "parameters": counts, **job.memory()}


@step("paper.captured", "paper", 90)
def captured(job: Job) -> Row:
    """The engine as sessions run it."""
    assert job.head
    start_s = time.perf_counter()
    engine = job.kept("captured")
    job.wait()
    found: Row = {
        "start_and_capture_s": round(time.perf_counter() - start_s, 2),
        "captured": engine.num_captured,
    }
    found |= backbone(job, engine)
    found["decode_ms"] = decode_ms(job, engine)
    found["chunk_ms"] = job.times_ms(partial(to_host, job, engine), 8)
    return found | job.memory()


@step("paper.eager", "paper", 90)
def eager(job: Job) -> Row:
    """The same without graphs and overlap."""
    engine = job.kept("eager")
    found = {**backbone(job, engine, 2), "decode_ms": decode_ms(job, engine, 4)}
    return found | {"chunk_ms": job.times_ms(partial(to_host, job, engine), 3)}


@step("paper.equal", "paper", 90)
def equal(job: Job) -> Row:
    """Captured and eager against the plain loop, that against float32, and their frames."""
    import torch

    found: Row = {}
    videos = {}
    for name in ("eager", "captured"):
        engine = job.kept(name)
        engine.start(job.portrait)
        found[f"latents, {name} to the plain loop"] = error_of(denoise(job, engine, 2), job.wanted)
        engine.start(job.portrait)
        videos[name] = torch.cat([chunk(job, engine).cpu() for _ in range(3)], 1).int()
    off = (videos["eager"] - videos["captured"]).abs()
    found["frames"] = {
        "largest_difference": int(off.max()),
        "share": float((off > 0).float().mean()),
    }
    found["frames"]["deviation"] = round(float(videos["eager"].float().std()), 2)
    if job.on_gpu:
        wide = copy.deepcopy(job.head.transformer).float()
        job.shared["precise"] = plain_latents(job, wide)
        found["latents, bfloat16 to float32"] = error_of(job.wanted, job.shared["precise"])
        del wide
        job.clean()
    return found


@step("paper.waits", "paper", 60)
def waits(job: Job) -> Row:
    """Where the host waits for the device while chunks are launched."""
    import torch

    found: Row = {}
    job.drop("eager")  # its way to the host is the one that waits
    for name in ("captured", "queued"):
        engine = job.kept(name)
        engine.start(job.portrait)
        audio = _random(1, engine.window_samples) * 0.1
        for i in range(3):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                if job.on_gpu:
                    torch.cuda.set_sync_debug_mode("warn")
                start_s = time.perf_counter()
                pending = engine.launch(audio, job.noise.cpu())
                launch_ms = 1e3 * (time.perf_counter() - start_s)
                if job.on_gpu:
                    torch.cuda.set_sync_debug_mode("default")
            places = [
                f"{Path(w.filename).name}:{w.lineno}"
                for w in caught
                if "synchroniz" in str(w.message)
            ]
            start_s = time.perf_counter()
            pending.frames()
            wait_ms = 1e3 * (time.perf_counter() - start_s)
            found[f"{name}, chunk {i}"] = {
                "waits": places, "launch_ms": round(launch_ms, 2), "wait_ms": round(wait_ms, 2),
            }  # fmt: skip
    return found


@step("paper.session", "paper", 120)
def session(job: Job) -> Row:
    """What a user sees: opening, frames per second, first frame; and what closed sessions leave."""
    import numpy as np

    from rest_lightning.streaming.engine import EngineOptions

    job.drop()
    seconds = 20 if job.on_gpu else 3
    speech = np.random.default_rng(0).normal(scale=0.1, size=16_000 * seconds).astype(np.float32)
    blocks = np.array_split(speech, 4 * seconds)
    found: Row = {"before": job.memory(), "open_ms": []}
    for _ in range(2):  # the second one finds an engine that is idle
        start_s = time.perf_counter()
        with job.head.open(job.portrait[0]) as opened:
            job.wait()
            found["open_ms"].append(round(1e3 * (time.perf_counter() - start_s), 1))
            took_ms, num_frames, busy_s = [], 0, 0.0
            for block in blocks:
                start_s = time.perf_counter()
                frames = opened.push(block)
                lasted_s = time.perf_counter() - start_s
                busy_s, num_frames = busy_s + lasted_s, num_frames + len(frames)
                if len(frames):
                    took_ms.append(1e3 * lasted_s)
            stages = opened.report().chunk_stage_ms
    found["push"] = {
        "frames_per_second": round(num_frames / busy_s, 1),
        "chunk_ms": spread(took_ms),
    }
    found["stages_ms_p50"] = {name: each["p50"] for name, each in stages.items()}
    with job.head.open(job.portrait[0]) as opened:
        job.wait()
        start_s = time.perf_counter()
        num_frames = sum(len(frames) for frames in opened.stream(blocks))
        lasted_s = time.perf_counter() - start_s
    found["stream"] = {"frames_per_second": round(num_frames / lasted_s, 1)}
    length = int(job.head.transformer.cache_options.chunk_length)
    for name, first in (("first_frame_ms", length), ("first_frame_short_ms", 1)):
        times = []
        for _ in range(3 if job.on_gpu else 1):
            with job.head.open(
                job.portrait[0], options=EngineOptions(first_chunk_length=first)
            ) as opened:
                needed = opened._row.num_missing
                opened.push(speech[: needed - 1])
                job.wait()
                start_s = time.perf_counter()
                assert len(opened.push(speech[needed - 1 : needed]))
                times.append(1e3 * (time.perf_counter() - start_s))
        found[name] = spread(times)
    del opened
    found["after"] = job.memory()
    return found


@step("paper.memory", "paper", 60)
def peak(job: Job) -> Row:
    """Peak memory of one stream, the model included."""
    import numpy as np

    job.drop()
    assert job.head
    if job.on_gpu:
        import torch

        torch.cuda.reset_peak_memory_stats()
    with job.head.open(job.portrait[0]) as opened:
        opened.push(np.zeros(16_000 * 4, np.float32))
    return job.memory() | {"smi": smi("memory.used") if job.on_gpu else "no GPU"}


@step("paper.profile", "paper", 90)
def profile(job: Job) -> Row:
    """Kernels of one chunk by name, count and time, captured, fused and eager; all in
    kernels.txt.
    """
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    found: Row = {}
    lines: list[str] = []
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if job.on_gpu else [])]
    kinds = {"captured": {"graphs": True}, "eager": {"graphs": False, "overlap": False}}
    if _has_triton():
        kinds["fused"] = {"graphs": True, "fuse": True}
    for name, options in kinds.items():
        engine = job.engine(**options)
        denoise(job, engine, 2)
        decode_ms(job, engine)
        noise, tokens = job.noise, job.tokens
        parts: dict[str, Callable[[], Any]] = {
            "denoise": partial(engine.denoise, noise, tokens),
            "decode": partial(engine._decode, engine.chunk_length),
        }
        for part, call in parts.items():
            with torch.inference_mode(), profiler(activities=activities) as watched:
                call()
                job.wait()
            found[f"{name}, {part}"] = _kernels(job, watched.events(), lines, f"{name}, {part}")
        del engine
        job.clean()
    (job.out / "kernels.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return found


def _kernels(job: Job, events: Any, lines: list[str], title: str) -> Row:
    import torch

    sums: dict[str, list[float]] = {}
    spans = []
    for event in events:
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if on_device != job.on_gpu or not (on_device or event.name.startswith("aten::")):
            continue
        row = sums.setdefault(event.name, [0, 0.0])
        row[0] += 1
        row[1] += (event.self_device_time_total if on_device else event.self_cpu_time_total) / 1e3
        spans.append((event.time_range.start, event.time_range.end))
    wall_ms = (
        (max(end for _, end in spans) - min(start for start, _ in spans)) / 1e3 if spans else 0.0
    )
    total_ms = sum(value for _, value in sums.values())
    top = sorted(sums.items(), key=lambda item: -item[1][1])
    lines.append(f"\n== {title}: {total_ms:.2f} ms in kernels, {wall_ms:.2f} ms in all")
    lines += [f"{value:9.3f} ms {int(count):6}  {name[:200]}" for name, (count, value) in top[:60]]
    return {
        "kernels": sum(int(count) for count, _ in sums.values()),
        "kernel_ms": round(total_ms, 3),
        "wall_ms": round(wall_ms, 3),
        "top": [[name[:90], int(count), round(value, 3)] for name, (count, value) in top[:14]],
    }


def _has_triton() -> bool:
    import importlib.util

    return importlib.util.find_spec("triton") is not None


def measure_options(job: Job, **options: Any) -> Row:
    """An engine with other switches: how far its latents and frames are off, backbone and
    decode.
    """
    import torch

    if options.get("fuse") and not _has_triton():
        return {"not_measured": "no Triton"}
    if options.get("float8") and not job.on_gpu:
        job.head.set_dtype(torch.bfloat16)
    try:
        if "frames" not in job.shared:
            plain = job.engine(graphs=False, overlap=False)
            job.shared["frames"] = torch.cat([chunk(job, plain).cpu() for _ in range(2)], 1).int()
            del plain
        wanted = job.wanted
        job.drop()
        engine = job.engine(graphs=True, **options)
        found: Row = {"off_from_plain": error_of(denoise(job, engine, 2), wanted)}
        if "precise" in job.shared:
            found["off_from_float32"] = error_of(denoise(job, engine, 2), job.shared["precise"])
        found |= backbone(job, engine, 4)
        engine.start(job.portrait)
        frames = torch.cat([chunk(job, engine).cpu() for _ in range(2)], 1).int()
        off = (frames - job.shared["frames"]).abs()
        found["frames_off"] = {
            "largest": int(off.max()),
            "mean": round(float(off.float().mean()), 4),
        }
        found["decode_ms"] = decode_ms(job, engine)
        return found | job.memory()
    finally:
        engine = None  # type: ignore[assignment]
        if options.get("float8") and not job.on_gpu:
            job.shared.clear()  # its weights are rounded
        job.clean()


OPTIONS: dict[str, dict[str, Any]] = {
    "fused": {"fuse": True},
    "fused_flash": {"fuse": True, "attention": "flash"},
    "fused_float8": {"fuse": True, "float8": True},
    "flash": {"attention": "flash"},
    "cudnn": {"attention": "cudnn"},
    "efficient": {"attention": "efficient"},
}
for _name, _options in OPTIONS.items():
    step(f"options.{_name}", "paper", 60)(partial(measure_options, **_options))


@step("options.cudnn_benchmark", "paper", 60)
def cudnn_benchmark(job: Job) -> Row:
    """The fused decoder with convolutions that cuDNN tried out."""
    import torch

    torch.backends.cudnn.benchmark = True
    try:
        return measure_options(job, fuse=True)
    finally:
        torch.backends.cudnn.benchmark = False


@step("paper.batch", "paper", 60)
def batches(job: Job) -> Row:
    """Several streams as rows of one batch: a chunk of all of them."""
    found: Row = {}
    for size in (2, 4):
        engine = job.engine(size, graphs=True)
        for _ in range(2 if job.on_gpu else 0):
            chunk(job, engine)
        found[str(size)] = job.times_ms(partial(to_host, job, engine), 4) | job.memory()
        del engine
        job.clean()
    return found


# -- group tests, group embedded ------------------------------------------------------------------


@step("tests", "tests", 150)
def tests(job: Job) -> Row:
    """The tests that need a GPU, and those of the kernels; on a CPU the former skip themselves."""
    files = ["tests/streaming/test_overlap.py", "tests/models/test_fused.py"]
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    words += ["-k", "cuda or rotate_store or norm_modulate or few_key or norm_silu or float8"]
    log, limit_s = job.out / "tests.txt", max(20.0, min(140.0, job.left_s - 5))
    with log.open("w") as file:
        try:
            done = subprocess.run(
                words, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=limit_s
            )
            code: Any = done.returncode
        except subprocess.TimeoutExpired:
            code = "timeout"
    lines = log.read_text(errors="replace").strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"code": code, "last": lines[-1] if lines else "", "failed": failed}


@step("embedded", "embedded", 60)
def embedded(job: Job) -> Row:
    """The bundled model: decoding beside denoising must give what one after the other gives. A
    rehearsal takes the drawn one, which is quicker.
    """
    import numpy as np

    from benchmarks._models import load_head
    from rest_lightning.streaming.engine import EngineOptions

    size = "people" if job.on_gpu else "drawn"
    head, _ = load_head(size, job.device, job.like["dtype"])
    side, seconds = head.size_px, 30 if job.on_gpu else 2
    portrait = _random(3, side, side, uniform=True) * 2 - 1
    samples = np.random.default_rng(0).normal(scale=0.1, size=16_000 * seconds).astype(np.float32)
    found: Row = {}
    first: Any = None
    ways = {
        "in turn": EngineOptions(overlap=False),
        "beside": EngineOptions(),
        "again": EngineOptions(),
    }
    for name, options in ways.items():
        with head.open(portrait, options=options) as opened:
            job.wait()
            start_s = time.perf_counter()
            frames = np.concatenate(list(opened.stream(np.array_split(samples, seconds)))).astype(
                np.int16
            )
            lasted_s = time.perf_counter() - start_s
        first = frames if first is None else first
        off = np.abs(frames - first)
        found[name] = {
            "frames_per_second": round(len(frames) / lasted_s, 1),
            "largest_difference": int(off.max()),
            "share": float((off > 0).mean()),
        }
    return found


# -- group products: matrix products and convolutions ---------------------------------------------


@step("products", "products", 90)
def products(job: Job) -> Row:
    """The products of a block: plain, with GELU, in float8; 28 weights in turns, as in a step."""
    import torch
    import torch.nn.functional as F

    from rest_lightning.models.fused import quantise_rows

    scale, num = (1, 28) if job.on_gpu else (32, 2)
    found: Row = {}
    for tokens in (1536, 3072) if job.on_gpu else (64,):
        for n, k in ((2048, 2048), (6144, 2048), (8192, 2048), (2048, 8192)):
            n, k = n // scale, k // scale
            x, bias = torch.randn(tokens, k, **job.like), torch.randn(n, **job.like)
            weights = [torch.randn(n, k, **job.like) for _ in range(num)]
            low, low_weights = quantise_rows(x), [quantise_rows(weight) for weight in weights]

            def float8(i: int, low: Any = low, low_weights: Any = low_weights) -> Tensor:
                weight, factor = low_weights[i]
                return torch._scaled_mm(
                    low[0],
                    weight.t(),
                    low[1],
                    factor.t(),
                    out_dtype=torch.bfloat16,
                    use_fast_accum=job.on_gpu,
                )

            calls: dict[str, Callable[[int], Tensor]] = {
                "linear": lambda i, x=x, w=weights, b=bias: F.linear(x, w[i], b),  # type: ignore[misc]
                "gelu": lambda i, x=x, w=weights, b=bias: torch._addmm_activation(
                    b, x, w[i].t(), use_gelu=True
                ),  # type: ignore[misc]
                "float8": float8,
            }
            row = found[f"{tokens}x{n}x{k}"] = {}
            for name, call in calls.items():
                try:
                    us = job.per_call_us([partial(call, i) for i in range(num)])
                    row[name] = {"us": us, "tflops": round(2 * tokens * n * k / us / 1e6, 2)}
                except (RuntimeError, ValueError) as error:
                    row[name] = told(error)
                    job.wait()
            job.say(f"{tokens}x{n}x{k}", row)
    return found


@step("convolutions", "products", 90)
def convolutions(job: Job) -> Row:
    """The decoder's convolutions in both memory formats, by cuDNN's heuristics and tried out."""
    import torch
    import torch.nn.functional as F

    shapes = [
        (128, 128, 26, 128),
        (128, 1024, 14, 64),
        (256, 256, 14, 64),
        (256, 2048, 8, 32),
        (512, 512, 8, 32),
    ]
    found: Row = {}
    for c_in, c_out, frames, side in shapes if job.on_gpu else [(4, 4, 5, 8)]:
        x = torch.randn(1, c_in, frames, side, side, **job.like)
        w = torch.randn(c_out, c_in, 3, 3, 3, **job.like)
        flops = 2 * c_in * 27 * c_out * (frames - 2) * side * side
        row = found[f"{c_in}->{c_out}, {frames}x{side}x{side}"] = {}
        for name, layout in (("NCDHW", torch.contiguous_format), ("NDHWC", torch.channels_last_3d)):
            own, weight = x.to(memory_format=layout), w.to(memory_format=layout)
            call = partial(F.conv3d, own, weight, padding=(0, 1, 1))
            for tries in (False, True):
                torch.backends.cudnn.benchmark = tries
                try:
                    us = job.per_call_us([call] * 4)
                    row[name + (", tried" if tries else "")] = {
                        "us": us,
                        "tflops": round(flops / us / 1e6, 2),
                    }
                except RuntimeError as error:
                    row[name] = told(error)
                    job.wait()
        torch.backends.cudnn.benchmark = False
        job.say(c_in, c_out, frames, side, row)
    return found


# -- group compiled, group training ---------------------------------------------------------------


@step("compiled", "compiled", 180)
def compiled(job: Job) -> Row:
    """The engine's own compiled blocks, captured."""
    start_s = time.perf_counter()
    engine = job.engine(compile=True, graphs=True)
    latents = denoise(job, engine, 2)
    job.wait()
    found = {
        "seconds": round(time.perf_counter() - start_s, 1),
        "off_from_plain": error_of(latents, job.wanted),
    }
    return found | backbone(job, engine, 3)


def measure_training(
    job: Job, size: str, batch_sizes: tuple[int, ...], forms: tuple[str, ...], repeats: int
) -> Row:
    """Forward and backward of the student under autocast to bfloat16: time, rate, memory."""
    import torch

    from benchmarks import training_step as bench
    from benchmarks._cost import prompt_length, training_formula

    student = bench.build(size, job.device)
    model = student.transformer
    found: Row = {}
    num_chunks = 4
    for batch_size in batch_sizes:
        data = bench.make_batch(student, batch_size, num_chunks)
        num_frames = 1 + num_chunks * student.chunk_length
        for form in forms:
            used = copy.copy(model)
            used.gradient_checkpointing = form == "checkpointed"
            if form == "compiled":
                used.compile_blocks()
            loss_of = bench.sequential if form == "sequential" else bench.parallel

            def one(used: A2VDiT = used, data: Any = data, loss_of: Any = loss_of) -> None:
                with torch.autocast(job.device, torch.bfloat16):
                    loss = loss_of(used, data)
                loss.backward()

            try:
                start_s = time.perf_counter()
                one()
                job.wait()
                first_s = time.perf_counter() - start_s
                if job.on_gpu:
                    torch.cuda.reset_peak_memory_stats()
                times = job.times_ms(one, repeats)
                words = student.num_speech_tokens, prompt_length(model)
                flops = training_formula(
                    replace_checkpointing(used), batch_size, num_frames, student.cells**2, *words
                )
                row: Any = {"step_ms": times, "first_s": round(first_s, 2), **job.memory()}
                row["tflops"] = round(flops / times["p50"] / 1e9, 2)
            except RuntimeError as error:
                row = told(error)
            found[f"batch {batch_size}, {form}"] = row
            job.say(size, batch_size, form, row)
            for parameter in model.parameters():
                parameter.grad = None
            job.clean()
    return found


def replace_checkpointing(model: A2VDiT) -> A2VDiT:
    """The model without checkpointing: recomputation is no useful work."""
    plain = copy.copy(model)
    plain.gradient_checkpointing = False
    return plain


@step("training.paper", "training", 150)
def training_paper(job: Job) -> Row:
    """A training step of the student at paper size."""
    if not job.on_gpu:
        return measure_training(job, "embedded", (1,), ("parallel", "checkpointed"), 1)
    return measure_training(
        job, "paper", (1, 2), ("parallel", "checkpointed", "sequential", "compiled"), 4
    )


@step("training.embedded", "training", 90)
def training_embedded(job: Job) -> Row:
    """The same of the embedded model, with small and large batches."""
    if not job.on_gpu:
        return measure_training(job, "embedded", (1,), ("sequential",), 1)
    return measure_training(job, "embedded", (8, 64), ("parallel", "sequential", "compiled"), 10)


@step("command", "command", 600)
def command(job: Job) -> Row:
    """A command of one's own, from the environment, in the time that is left; its output is in
    train.txt.
    """
    words = os.environ.get(TRAIN_VARIABLE)
    if not words:
        return {"not_measured": f"{TRAIN_VARIABLE} is not set"}
    log = job.out / "train.txt"
    with log.open("w") as file:
        try:
            limit_s = max(20.0, job.left_s - 8)
            shell = ["bash", "-c", words]
            done = subprocess.run(
                shell, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=limit_s
            )
            code: Any = done.returncode
        except subprocess.TimeoutExpired:
            code = "stopped when the time was used up"
    return {"code": code, "tail": log.read_text(errors="replace")[-1500:]}


# -- processes ------------------------------------------------------------------------------------


@contextlib.contextmanager
def guarded(job: Job, name: str, limit_s: float) -> Iterator[None]:
    """End the process, with a traceback of all threads, when a step takes too long."""
    job.say(f"{name}: at most {limit_s:.0f} s")
    faulthandler.dump_traceback_later(limit_s, exit=True)
    try:
        yield
    finally:
        faulthandler.dump_traceback_later(max(10.0, job.left_s + 5), exit=True)


def work(job: Job, group: str) -> int:
    """One process: the steps of its group that no process has begun."""
    os.chdir(ROOT)
    faulthandler.dump_traceback_later(max(10.0, job.left_s + 5), exit=True)
    for name, entry in STEPS.items():
        if entry.group != group or not job.wants(name) or name in job.load()["steps"]:
            continue
        limit_s = min(entry.limit_s, job.left_s - 4)
        if limit_s < job.least_s:
            job.record(name, status="skipped", error="no time left")
            continue
        job.record(name, status="begun")
        if job.break_at == name:
            os._exit(9)
        if job.hang_at == name:
            entry, limit_s = replace(entry, call=lambda job: time.sleep(600)), 2.0
        start_s = time.perf_counter()
        try:
            with guarded(job, name, limit_s):
                outcome: Row = {"status": "done", "result": entry.call(job)}
        except BaseException as error:
            outcome = {
                "status": "failed",
                "error": told(error),
                "trace": traceback.format_exc()[-3000:],
            }
            traceback.print_exc()
        lasted_s = round(time.perf_counter() - start_s, 1)
        job.record(name, **outcome, seconds=lasted_s)
        job.say(f"{name}: {outcome['status']} in {lasted_s} s")
        if outcome["status"] == "failed":
            try:  # an error of CUDA spoils the process: the driver starts a new one
                job.drop()
            except BaseException:
                return 3
    return 0


def drive(job: Job, again: bool) -> int:
    """Start the processes, one after another, and sum up."""
    result = job.load()
    result.setdefault("calls", []).append({"argv": sys.argv[1:], "started": time.strftime("%F %T")})
    for name in [name for name in STEPS if job.wants(name) and again]:
        result["steps"].pop(name, None)
    job.save(result)
    environment = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(
            os.pathsep
        ),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **({} if job.on_gpu else {"TRITON_INTERPRET": "1"}),
    }
    # -P: the modules beside this file must not stand in for libraries of their names
    words = [
        sys.executable,
        "-P",
        str(Path(__file__).resolve()),
        "--out",
        str(job.out),
        "--device",
        job.device,
    ]
    words += [
        "--size",
        job.size,
        "--deadline",
        str(job.deadline_s),
        "--started",
        str(job.started_s),
    ]
    words += [
        "--only",
        ",".join(job.only),
        "--skip",
        ",".join(job.skip),
        "--least-s",
        str(job.least_s),
    ]
    words += ["--break-at", job.break_at, "--hang-at", job.hang_at]
    with (job.out / "log.txt").open("a", encoding="utf-8") as log:
        for group in GROUPS:
            names = [
                name for name, entry in STEPS.items() if entry.group == group and job.wants(name)
            ]
            for _ in range(len(names) + 1):  # a new process behind every step that ended one
                if all(name in job.load()["steps"] for name in names) or job.left_s < job.least_s:
                    break
                with subprocess.Popen(
                    [*words, "--worker", group],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    env=environment,
                ) as process:
                    assert process.stdout is not None
                    for raw in process.stdout:
                        line = raw.decode(errors="replace")
                        log.write(line)
                        log.flush()
                        if line.startswith("["):
                            print(line, end="", flush=True)
                for name, entry_ in job.load()["steps"].items():
                    if entry_.get("status") == "begun":
                        job.record(
                            name,
                            status="died",
                            error=f"its process ended with {process.returncode}",
                        )
                        job.say(f"{name}: its process ended with {process.returncode}")
    return summary(job)


def summary(job: Job) -> int:
    """A line for every step; exit code 1 where one failed or died."""
    steps = job.load()["steps"]
    print()
    for name, entry in steps.items():
        print(f"{name:26}{entry['status']:9}{entry.get('seconds', ''):>7}  {_short(entry)}")
    missing = [name for name in STEPS if job.wants(name) and name not in steps]
    if missing:
        print("not begun:", ", ".join(missing))
    return int(
        any(steps[name]["status"] in ("failed", "died") for name in steps if job.wants(name))
    )


def _short(entry: Row) -> str:
    found = entry.get("error") or entry.get("result")
    if not isinstance(found, dict):
        return str(found)[:110]
    words = [
        f"{key} {found[key]['p50']:g}"
        for key in ("backbone_ms", "decode_ms", "chunk_ms")
        if key in found
    ]
    keys = (
        "tflops",
        "matmul_tflops",
        "copy_tb_s",
        "off_from_plain",
        "push",
        "stream",
        "last",
        "not_measured",
    )
    return "; ".join([*words, *(f"{key} {found[key]}" for key in keys if key in found)])[:200]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Arguments of the job."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of results.json, log.txt and kernels.txt"
    )
    parser.add_argument("--budget", type=float, default=430.0, help="seconds in all (default 430)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    sizes = ("paper", "mini", "tiny", "people")
    parser.add_argument("--size", choices=sizes, default="paper", help="mini and cpu rehearse")
    parser.add_argument(
        "--only", default="", help="steps, or beginnings of their names, with commas"
    )
    parser.add_argument("--skip", default="", help="the same, left out")
    parser.add_argument("--again", action="store_true", help="also what results.json has already")
    parser.add_argument(
        "--least-s", type=float, default=8.0, help="a step is not begun with less time left"
    )
    parser.add_argument("--break-at", default="", help="rehearse a process that dies in this step")
    parser.add_argument("--hang-at", default="", help="rehearse a step that hangs")
    for name, kind in (
        ("worker", str),
        ("deadline", float),
        ("started", float),
    ):  # the driver's own
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = parse(arguments)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    started_s = args.started or time.time()
    only, skip = (
        tuple(word for word in text.split(",") if word) for text in (args.only, args.skip)
    )
    unknown = [word for word in (*only, *skip) if not any(_is_within(name, word) for name in STEPS)]
    if unknown:
        print(
            f"expected steps of {', '.join(STEPS)}, got {', '.join(unknown)}: choose some",
            file=sys.stderr,
        )
        return 2
    job = Job(
        out, args.device, args.size, args.deadline or started_s + args.budget, started_s, only,
        skip, args.least_s, args.break_at, args.hang_at,
    )  # fmt: skip
    return work(job, args.worker) if args.worker else drive(job, args.again)


if __name__ == "__main__":
    sys.exit(main())
