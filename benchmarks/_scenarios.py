"""What benchmarks/streaming.py measures: every scenario is a dataclass whose ``run`` gives a
dictionary for JSON.
"""

from __future__ import annotations

import gc
import importlib.util
import tempfile
import time
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks._models import load_head, ltx_pair, run_ltx
from rest_lightning.constants import (
    FPS,
    SAMPLE_RATE,
    SAMPLES_PER_FRAME,
    SPATIAL_RATIO,
    TEMPORAL_RATIO,
)
from rest_lightning.diffusion.sampling import integrate
from rest_lightning.diffusion.schedule import sampling_sigmas
from rest_lightning.machine import resident_memory_mb
from rest_lightning.models.transformer import A2VDiT
from rest_lightning.models.vae import VideoAutoencoder
from rest_lightning.streaming.engine import ChunkEngine, EngineOptions
from rest_lightning.streaming.packed import packed
from rest_lightning.talking_head import ASSETS, TalkingHead

SPEECH = ASSETS / "speech.wav"
BLOCK_SAMPLES = SAMPLE_RATE // 4
Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """What all scenarios share: the model in its natural type, where it is, and its name."""

    head: TalkingHead
    size: str
    device: str

    def now_s(self) -> float:
        """The clock, after the device has done everything it was asked for."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def portrait(self, batch: int = 1) -> Tensor:
        """Random portraits (B, 3, H, W) in [-1, 1]."""
        side = self.head.size_px
        return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1

    @property
    def like(self) -> dict[str, Any]:
        """Device and type of the model's tensors."""
        return {"device": self.head.device, "dtype": self.head.dtype}

    @property
    def vae(self) -> VideoAutoencoder:
        """The VAE as a session runs it: on a CPU with packed weights."""
        return packed(self.head.vae)

    @property
    def transformer(self) -> A2VDiT:
        """The same of the A2V-DiT."""
        return packed(self.head.transformer)

    @property
    def chunk_length(self) -> int:
        """Latents per chunk."""
        return int(self.head.transformer.cache_options.chunk_length)

    @property
    def window_samples(self) -> int:
        """Samples that the first chunk needs."""
        return SAMPLES_PER_FRAME * (
            TEMPORAL_RATIO * self.chunk_length + int(self.head.speech_encoder.lookahead_frames)
        )

    def alternate(self, calls: dict[str, Callable[[], Any]], repeats: int) -> Row:
        """Milliseconds of every call, taken in turns: p50, min and max, after one turn that does
        not count.
        """
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(repeats + 1):
            for name, call in calls.items():
                start_s = self.now_s()
                call()
                if turn:
                    times[name].append(1000 * (self.now_s() - start_s))
        return {name: spread(values) for name, values in times.items()}


def spread(values: list[float] | NDArray[np.float64]) -> Row:
    """Count, p50, p95, p99, min and max."""
    quantiles = {f"p{q}": round(float(np.quantile(values, q / 100)), 4) for q in (50, 95, 99)}
    return {
        "num": len(values),
        **quantiles,
        "min": round(float(np.min(values)), 4),
        "max": round(float(np.max(values)), 4),
    }


def ratio(row: Row, first: str, second: str) -> float:
    """p50 of one call over that of another."""
    return round(row[first]["p50"] / row[second]["p50"], 4)


def speech(seconds: float) -> Iterator[NDArray[np.float32]]:
    """The bundled speech, again and again, in blocks of 0.25 s; no more than the recording is
    held.
    """
    # 16 kHz, mono, 16 bits: a machine that only measures needs no PyAV
    with wave.open(str(SPEECH)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16)
    recording, position = samples.astype(np.float32) / 32768.0, 0
    for start in range(0, round(seconds * SAMPLE_RATE), BLOCK_SAMPLES):
        count = min(BLOCK_SAMPLES, round(seconds * SAMPLE_RATE) - start)
        yield recording.take(range(position, position + count), mode="wrap")
        position = (position + count) % len(recording)


@dataclass(frozen=True)
class LongStream:
    """One stream of ``minutes``: frames per second, the time of every chunk, memory over the
    stream's time.
    """

    minutes: float
    name: str = "long_stream"

    def run(self, bench: Bench) -> Row:
        """Pushes blocks of 0.25 s and times the pushes that give frames: with speech, DiT, VAE and
        copy to the host.
        """
        capacity = int(self.minutes * 60 * FPS / (TEMPORAL_RATIO * bench.chunk_length)) + 2
        chunk_ms, memory_mb, at_s = np.zeros(capacity), np.zeros(capacity), np.zeros(capacity)
        gc.collect()
        count = num_frames = 0
        busy_s = 0.0
        with bench.head.open(bench.portrait()[0]) as session:
            for block in speech(60 * self.minutes):
                start_s = bench.now_s()
                frames = session.push(block)
                took_s = bench.now_s() - start_s
                busy_s += took_s
                if len(frames):
                    num_frames += len(frames)
                    chunk_ms[count], at_s[count] = 1000 * took_s, num_frames / FPS
                    memory_mb[count] = resident_memory_mb()
                    count += 1
            stage_s = dict(session.report().stage_s)
            against_young = self._against_young(bench, session)
        times, memory, minute = chunk_ms[:count], memory_mb[:count], (at_s[:count] - 1e-6) // 60
        first_ten = times[minute < 10]
        row: Row = {
            "minutes": self.minutes,
            "num_frames": num_frames,
            "frames_per_second": round(num_frames / busy_s, 2),
            "chunk_ms": spread(times),
            "first_10_minutes": {"chunk_ms": spread(first_ten)},
            "p99_over_p50": round(
                float(np.quantile(first_ten, 0.99) / np.quantile(first_ten, 0.5)), 4
            ),
            "stage_s": {name: round(value, 3) for name, value in stage_s.items()},
            "against_young": against_young,
            "by_minute": [
                {
                    "minute": int(number) + 1,
                    "chunk_ms_p50": round(float(np.median(times[minute == number])), 3),
                    "chunk_ms_mean": round(float(np.mean(times[minute == number])), 3),
                    "resident_mb": round(float(memory[minute == number][-1]), 2),
                }
                for number in np.unique(minute)
            ],
        }
        full = [entry for entry in row["by_minute"] if entry["minute"] <= self.minutes]
        if len(full) >= 3:
            row["last_over_second_minute"] = round(
                full[-1]["chunk_ms_p50"] / full[1]["chunk_ms_p50"], 4
            )
            row["resident_growth_mb"] = round(full[-1]["resident_mb"] - full[1]["resident_mb"], 3)
        return row

    def _against_young(self, bench: Bench, old: Any) -> Row:
        """One minute more, in turns with a stream in its second minute: a machine's own pace
        changes within minutes.
        """
        with bench.head.open(bench.portrait()[0]) as young:
            for block in speech(60):
                young.push(block)
            times: dict[str, list[float]] = {"old": [], "young": []}
            for block in speech(60):
                for name, session in (("old", old), ("young", young)):
                    start_s = bench.now_s()
                    if len(session.push(block)):
                        times[name].append(1000 * (bench.now_s() - start_s))
        row: Row = {name: spread(values) for name, values in times.items()}
        return {"chunk_ms": row, "ratio": ratio(row, "old", "young")}


@dataclass(frozen=True)
class FirstFrame:
    """Compute time from the last sample that the first chunk needs to its frames, and what opening
    a session takes.
    """

    repeats: int
    name: str = "first_frame"

    def run(self, bench: Bench) -> Row:
        """``repeats`` sessions; the very first one of the process, before anything is warm, stands
        apart.
        """
        row = self.measure(bench, bench.chunk_length)
        return {**row, "short": {"first_chunk_length": 1, **self.measure(bench, 1)}}

    def measure(self, bench: Bench, first_chunk_length: int) -> Row:
        """The same for a first chunk of so many latents."""
        options = EngineOptions(first_chunk_length=first_chunk_length)
        spared = (bench.chunk_length - first_chunk_length) * TEMPORAL_RATIO * SAMPLES_PER_FRAME
        samples = np.concatenate(list(speech((bench.window_samples - spared) / SAMPLE_RATE)))
        first, opening = [], []
        for _ in range(self.repeats + 1):
            start_s = bench.now_s()
            session = bench.head.open(bench.portrait()[0], options=options)
            opening.append(1000 * (bench.now_s() - start_s))
            assert not len(session.push(samples[:-1]))
            start_s = bench.now_s()
            assert len(session.push(samples[-1:]))
            first.append(1000 * (bench.now_s() - start_s))
        cold = {"open": round(opening[0], 3), "first_frame": round(first[0], 3)}
        return {
            "first_frame_ms": spread(first[1:]),
            "open_ms": spread(opening[1:]),
            "cold_ms": cold,
        }


@dataclass(frozen=True)
class Dtypes:
    """The same stream in float32 and in bfloat16, alternating."""

    seconds: float
    repeats: int
    name: str = "dtypes"

    def run(self, bench: Bench) -> Row:
        """Frames per second of every type."""
        heads = {}
        for name in ("float32", "bfloat16"):
            dtype = getattr(torch, name)
            heads[name] = (
                bench.head
                if bench.head.dtype == dtype
                else load_head(bench.size, bench.device, dtype)[0]
            )
        num_frames = round(self.seconds * FPS)

        def stream(head: TalkingHead) -> None:
            with head.open(bench.portrait()[0]) as session:
                assert (
                    sum(len(frames) for frames in session.stream(speech(self.seconds)))
                    == num_frames
                )

        streams: dict[str, Callable[[], object]] = {
            name: partial(stream, head) for name, head in heads.items()
        }
        row = bench.alternate(streams, self.repeats)
        fps = {name: round(1000 * num_frames / times["p50"], 2) for name, times in row.items()}
        return {"seconds": self.seconds, "stream_ms": row, "frames_per_second": fps}


@dataclass(frozen=True)
class Writing:
    """What writing the mp4 costs: alone, in the stream's own thread, and in a thread beside it."""

    seconds: float
    repeats: int
    name: str = "writing"

    def run(self, bench: Bench) -> Row:
        """Frames per second; ``rest talk`` takes the thread with three cores or more. Nothing
        without PyAV.
        """
        if importlib.util.find_spec("av") is None:
            return {"not_measured": "no PyAV"}
        from rest_lightning.media.writer import BackgroundWriter, Mp4Writer

        blocks = list(speech(self.seconds))
        with bench.head.open(bench.portrait()[0]) as session:
            chunks = list(session.stream(blocks))
        num_frames = sum(map(len, chunks))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "a.mp4"

            def alone() -> None:
                with Mp4Writer(path, bench.head.size_px, overwrite=True) as writer:
                    for frames in chunks:
                        writer.write(frames)

            def inline() -> None:
                with Mp4Writer(path, bench.head.size_px, overwrite=True) as writer:
                    for frames in bench.head.open(bench.portrait()[0]).stream(blocks):
                        writer.write(frames)

            def thread() -> None:
                nothing = np.zeros(0, np.float32)
                with BackgroundWriter(
                    Mp4Writer(path, bench.head.size_px, overwrite=True), threaded=True
                ) as writer:
                    for frames in bench.head.open(bench.portrait()[0]).stream(blocks):
                        writer.write(frames, nothing)

            row = bench.alternate(
                {"alone": alone, "inline": inline, "thread": thread}, self.repeats
            )
        fps = {name: round(1000 * num_frames / times["p50"], 2) for name, times in row.items()}
        return {"seconds": self.seconds, "ms": row, "frames_per_second": fps}


@dataclass(frozen=True)
class CacheOrRecompute:
    """One chunk against the ID-Context Cache, and the same chunk by computing
    [ref, previous, current] every time.
    """

    repeats: int
    name: str = "cache"

    @torch.inference_mode()
    def run(self, bench: Bench) -> Row:
        """Same weights, guidance and steps; both project their speech once and know the noise
        levels' embeddings.
        """
        model, settings, length = bench.transformer, bench.head.sampling, bench.chunk_length
        rows, side = settings.branches.num_branches, bench.head.size_px // SPATIAL_RATIO
        sigmas = sampling_sigmas(settings.num_steps, settings.shift, (1 + 2 * length) * side * side)
        like = bench.like
        window = torch.randn(rows, model.in_channels, 1 + 2 * length, side, side, **like)
        tokens = torch.randn(
            rows, 1 + 2 * length, bench.head.speech_ae.num_tokens, model.speech_dim or 1, **like
        )
        tokens[:, 0] = 0.0
        text = model.project_prompt(rows, padded=False)
        cache = model.new_cache(rows, side, side, num_steps=settings.num_steps)
        if cache.options.reference_attends == "self":
            model.prefill(window[:, :, :1], cache, text_embeds=text)

        # On the device: a number from the host would be copied, and waited for, at every step.
        levels = torch.tensor(sigmas, device=bench.head.device)
        embedded = [model.embed_sigma(levels[i : i + 1, None]) for i in range(len(sigmas) - 1)]
        whole = []
        for level in sigmas[:-1]:
            frames = torch.full((1, 1 + 2 * length), level, device=bench.head.device)
            frames[:, : 1 + length] = 0.0
            whole.append(model.embed_sigma(frames))

        def cached() -> None:
            speech_keys = model.project_speech(tokens[:, -length:])

            def velocity(sample: Tensor, step: int) -> Tensor:
                found: Tensor = model(
                    sample, embedded[step], speech_keys, text, cache=cache, step=step
                )
                return found

            integrate(velocity, window[:, :, -length:], levels)
            cache.commit()

        def recomputed() -> None:
            clip, speech_keys = window.clone(), model.project_speech(tokens)

            def velocity(sample: Tensor, step: int) -> Tensor:
                clip[:, :, -length:] = sample
                found: Tensor = model(clip, whole[step], speech_keys, text)[:, :, -length:]
                return found

            integrate(velocity, window[:, :, -length:], levels)

        if not cache.reference_expected:
            cached()  # the first chunk has no previous one and is cheaper
        row = bench.alternate({"cached": cached, "recomputed": recomputed}, self.repeats)
        return {"chunk_ms": row, "ratio": ratio(row, "cached", "recomputed")}


@dataclass(frozen=True)
class AgainstDiffusers:
    """Our forward without cache and diffusers' LTX transformer: the same tokens, equal weights, no
    speech.
    """

    repeats: int
    num_latents: int = 13
    name: str = "diffusers"

    @torch.inference_mode()
    def run(self, bench: Bench) -> Row:
        """One forward of one guided pair; ``difference`` says how far the outputs are apart."""
        ltx, ours = ltx_pair(bench.head)
        side = bench.head.size_px // SPATIAL_RATIO
        like = bench.like
        latents = torch.randn(2, ours.in_channels, self.num_latents, side, side, **like)
        sigma, text = (
            torch.rand(2, self.num_latents, **like),
            torch.randn(2, 32, ours.caption_channels or 1, **like),
        )
        calls = {
            "ours": lambda: ours(latents, sigma, None, text),
            "diffusers": lambda: run_ltx(ltx, latents, sigma, text, FPS),
        }
        first, second = (call() for call in calls.values())
        row = bench.alternate(calls, self.repeats)
        difference = float((first - second).abs().max() / second.abs().max())
        return {
            "forward_ms": row,
            "ratio": ratio(row, "ours", "diffusers"),
            "difference": difference,
        }


@dataclass(frozen=True)
class Batch:
    """Four streams as the rows of one batch, and four one after another."""

    repeats: int
    num_streams: int = 4
    name: str = "batch"

    def run(self, bench: Bench) -> Row:
        """One chunk of every stream, in the steady state."""
        engines = [ChunkEngine(bench.head, 1, bench.head.sampling) for _ in range(self.num_streams)]
        together = ChunkEngine(bench.head, self.num_streams, bench.head.sampling)
        together.start(bench.portrait(self.num_streams))
        for engine in engines:
            engine.start(bench.portrait())
        audio = torch.randn(self.num_streams, together.window_samples) * 0.1
        noise = torch.randn(together.latent_shape)

        def one_after_another() -> None:
            for row, engine in enumerate(engines):
                engine.step(audio[row : row + 1], noise[row : row + 1]).cpu()

        calls = {
            "batch": lambda: together.step(audio, noise).cpu(),
            "one_after_another": one_after_another,
        }
        for call in calls.values():
            call()
        row = bench.alternate(calls, self.repeats)
        return {
            "num_streams": self.num_streams,
            "chunk_ms": row,
            "ratio": ratio(row, "batch", "one_after_another"),
        }
