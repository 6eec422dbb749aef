"""What does one forward for all chunks save? A student's training step, parallel against sequential
(REST sec. 3.4).

``python -m benchmarks.training_step --out benchmarks/results/training_step.json``

Forward and backward of the A2V-DiT of configs/<size>/, random weights: all chunks at once in their
windows, as training does, against chunk after chunk through the ID-Context Cache with its graph
kept. Both give the same gradients (the largest difference stands in the JSON). ``--compile`` also
measures the parallel form with compiled blocks. README.md explains every number.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks._cost import LiveBytes, read_student
from benchmarks._differentiable_cache import DifferentiableCache
from benchmarks._result import origin, write_result
from rest_lightning.constants import SPATIAL_RATIO
from rest_lightning.diffusion.losses import flow_matching_loss
from rest_lightning.diffusion.noise import sample_sigmas_cans
from rest_lightning.diffusion.schedule import training_table
from rest_lightning.errors import UserError, exit_code
from rest_lightning.models.transformer import A2VDiT


@dataclass(frozen=True)
class Student:
    """The network that is trained, on its device, and what its batches look like.

    Attributes:
        num_speech_tokens: per latent frame.
        cells: latent cells on one side.
    """

    transformer: A2VDiT
    num_speech_tokens: int
    cells: int

    @property
    def chunk_length(self) -> int:
        """New latent frames per chunk."""
        return int(self.transformer.cache_options.chunk_length)


# noisy latents, sigmas, speech latents, target velocity
Batch = tuple[Tensor, Tensor, Tensor, Tensor]
Form = Callable[[Batch], Tensor]  # a batch to its loss
TARGET_TIME_RATIO = 0.5
# Beginnings of names.
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_dot_product_")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return exit_code(lambda: run(parse(arguments)))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="embedded", help="folder of configs/ (default embedded)")
    parser.add_argument(
        "--batch",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8],
        help=("clips per step (default 1 2 4 8)"),
    )
    parser.add_argument(
        "--num-chunks", type=int, default=4, help=("of every clip (default 4: 97 frames)")
    )
    parser.add_argument(
        "--repeats", type=int, default=15, help=("timed steps of each form (default 15)")
    )
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=("bfloat16", "float32"),
        default=["bfloat16", "float32"],
        help="of autocast",
    )
    parser.add_argument(
        "--checkpointing",
        action="store_true",
        help=("recompute blocks (the parallel form alone can)"),
    )
    parser.add_argument(
        "--compile", action="store_true", help=("the parallel form with compiled blocks, too")
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--threads", type=int, help="of torch (default: its choice)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/training_step.json"))
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> int:
    """Measure every batch size, write, print."""
    for name in ("num_chunks", "repeats", *(["threads"] if args.threads is not None else [])):
        if getattr(args, name) < 1:
            raise UserError(
                f"expected --{name.replace('_', '-')} of at least 1, got "
                f"{getattr(args, name)}: raise it"
            )
    if min(args.batch) < 1:
        raise UserError(f"expected --batch of at least 1, got {min(args.batch)}: raise it")
    device = torch.device(args.device)
    if device.type != "cpu" and not torch.cuda.is_available():
        raise UserError(f"expected a machine with {args.device}, got none: use --device cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    student = build(args.size, args.device)
    student.transformer.gradient_checkpointing = args.checkpointing
    for parameter in student.transformer.parameters():
        # as in every step of an accumulation but the first
        parameter.grad = torch.zeros_like(parameter)
    rows: list[dict[str, Any]] = []
    counted = "live tensor storages, every operation"
    result = {
        "size": args.size,
        "num_chunks": args.num_chunks,
        "num_latent_frames": 1 + args.num_chunks * student.chunk_length,
        "memory": counted if device.type == "cpu" else "torch.cuda.max_memory_allocated",
        "rows": rows,
        "target": {"time_ratio": TARGET_TIME_RATIO, "reached": []},
        **origin(args),
    }
    for precision in args.precision:
        for batch_size in args.batch:
            row = {"precision": precision, "batch_size": batch_size}
            rows.append(row | measure(student, batch_size, precision, args))
            print(line(rows[-1]), flush=True)
            result["target"]["reached"].append(rows[-1]["time_ratio"] <= TARGET_TIME_RATIO)
            # a row that does not fit into memory must not take the others with it
            write_result(args.out, result)
    print(f"wrote {args.out}")
    return 0


def build(size: str, device: str) -> Student:
    """The student of configs/<size>/student.yaml in training mode, drawn on the device, random
    everywhere.
    """
    torch.manual_seed(0)
    with torch.device(device):
        parts, size_px = read_student(size)
    transformer: A2VDiT = parts["transformer"].train()
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)  # no path may hide behind a zero start
    return Student(transformer, parts["speech_ae"].num_tokens, size_px // SPATIAL_RATIO)


def make_batch(student: Student, batch_size: int, num_chunks: int) -> Batch:
    """Random latents under CANS noise levels, without motion dropout: every chunk has a level of
    its own.
    """
    generator, model = torch.Generator().manual_seed(batch_size), student.transformer
    num_frames = 1 + num_chunks * student.chunk_length
    shape = (batch_size, model.in_channels, num_frames, student.cells, student.cells)
    sigma = sample_sigmas_cans(
        batch_size,
        num_chunks,
        student.chunk_length,
        training_table(1000, 2.05, 1.0),
        0.0,
        generator=generator,
    )
    tokens = student.num_speech_tokens
    speech = torch.randn(batch_size, num_frames, tokens, model.speech_dim or 0, generator=generator)
    latents, target = (torch.randn(shape, generator=generator) for _ in range(2))
    device = model.proj_in.weight.device
    return (
        latents.to(device),
        sigma.to(device),
        speech.to(device).requires_grad_(),
        target.to(device),
    )


def parallel(model: A2VDiT, batch: Batch) -> Tensor:
    """The loss from one forward of all chunks."""
    latents, sigma, speech, target = batch
    return flow_matching_loss(model(latents, sigma, speech), target)


def sequential(model: A2VDiT, batch: Batch) -> Tensor:
    """The same loss, chunk after chunk through the cache."""
    latents, sigma, speech, target = batch
    length = model.cache_options.chunk_length
    rows, height, width = (latents.shape[i] for i in (0, 3, 4))
    cache = model.new_cache(rows, height, width, kind=DifferentiableCache)
    model.prefill(latents[:, :, :1], cache)
    velocities = [torch.zeros_like(latents[:, :, :1])]  # the reference's place, which no loss reads
    for start in range(1, latents.shape[2], length):
        frames = slice(start, start + length)
        velocities.append(
            model(latents[:, :, frames], sigma[:, frames], speech[:, frames], cache=cache)
        )
        cache.commit()
    return flow_matching_loss(torch.cat(velocities, dim=2), target)


def forms_of(model: A2VDiT, args: argparse.Namespace) -> dict[str, Form]:
    """What is compared, by name."""
    forms: dict[str, Form] = {
        "parallel": partial(parallel, model),
        "sequential": partial(sequential, model),
    }
    if args.compile:
        compiled = copy.copy(model)  # the same weights
        compiled.compile_blocks()
        forms["compiled"] = partial(parallel, compiled)
    return forms


def measure(
    student: Student, batch_size: int, precision: str, args: argparse.Namespace
) -> dict[str, Any]:
    """Median times and peak memory of all forms, taken in turns."""
    batch, model = make_batch(student, batch_size, args.num_chunks), student.transformer
    forms, device = forms_of(model, args), torch.device(args.device)
    cuda = device.type != "cpu"

    def autocast() -> AbstractContextManager[Any]:
        low = precision == "bfloat16"
        return torch.autocast(device.type, torch.bfloat16) if low else nullcontext()

    def step(name: str) -> None:
        with autocast():
            loss = forms[name](batch)
        loss.backward()

    difference = gradient_difference(
        [*model.parameters(), batch[2]], [partial(step, name) for name in forms]
    )
    # Compiled code allocates past what counts tensors on a CPU.
    counted = [name for name in forms if cuda or name != "compiled"]
    memory = {name: peak_bytes(model, batch, partial(step, name), device) for name in counted}
    times: dict[str, list[float]] = {name: [] for name in forms}
    for repeat in range(args.repeats + 1):  # the first one warms up
        for name in list(forms)[:: 1 if repeat % 2 else -1]:
            if cuda:
                torch.cuda.synchronize(device)
            started_s = time.perf_counter()
            step(name)
            if cuda:
                torch.cuda.synchronize(device)
            if repeat:
                times[name].append(time.perf_counter() - started_s)
    row: dict[str, Any] = {}
    for name in forms:
        row[name] = {
            "step_ms": round(1e3 * statistics.median(times[name]), 3),
            "step_ms_fastest": round(1e3 * min(times[name]), 3),
        }
        if name in memory:
            row[name] |= {
                "peak_bytes": memory[name],
                "peak_bytes_per_sample": memory[name] // batch_size,
            }
        if not cuda:
            row[name]["products_ms"] = round(
                products_ms(partial(step, name), min(args.repeats, 3)), 3
            )
    row["time_ratio"] = round(row["parallel"]["step_ms"] / row["sequential"]["step_ms"], 4)
    if args.compile:
        row["time_ratio_compiled"] = round(
            row["compiled"]["step_ms"] / row["sequential"]["step_ms"], 4
        )
    if not cuda:
        row["time_ratio_floor"] = round(
            row["parallel"]["products_ms"] / row["sequential"]["step_ms"], 4
        )
    row["memory_ratio"] = round(memory["parallel"] / memory["sequential"], 4)
    row["gradient_difference"] = difference
    return row


def gradient_difference(tensors: list[Tensor], steps: list[Callable[[], None]]) -> float:
    """Largest difference of any gradient to the first form's, over the largest gradient of its
    tensor.
    """
    first: list[Tensor] = []  # the one copy that is kept
    largest = 0.0
    for number, step in enumerate(steps):
        for tensor in tensors:
            tensor.grad = torch.zeros_like(tensor)
        step()
        gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
        if not number:
            first = [gradient.clone() for gradient in gradients]
            continue
        for a, b in zip(first, gradients, strict=True):
            largest = max(largest, float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)))
    return largest


def products_ms(step: Callable[[], None], repeats: int) -> float:
    """Median time of a step in matrix products and attention: the arithmetic that both forms have
    in common.
    """
    times = []
    for _ in range(repeats):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step()
        events = (event for event in profiler.key_averages() if event.key.startswith(PRODUCTS))
        times.append(1e-3 * sum(event.self_cpu_time_total for event in events))
    return statistics.median(times)


def peak_bytes(model: A2VDiT, batch: Batch, step: Callable[[], None], device: torch.device) -> int:
    """What a step allocates beside weights, gradients and the batch, at its peak."""
    gc.collect()
    if device.type != "cpu":
        step()
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    known = [*model.parameters(), *model.buffers(), *batch]
    with LiveBytes([*known, *(tensor.grad for tensor in known if tensor.grad is not None)]) as live:
        step()
    return int(live.peak)


def line(row: dict[str, Any]) -> str:
    """One row for people."""
    said = []
    for name in ("parallel", "sequential", "compiled"):
        if name in row:
            num_bytes = row[name].get("peak_bytes_per_sample")
            memory = f" and {num_bytes / 1e6:.1f} MB a sample" if num_bytes else ""
            said.append(f"{name} {row[name]['step_ms']:.1f} ms{memory}")
    text = (
        f"{row['precision']:>8}, batch {row['batch_size']}: {', '.join(said)}; time "
        f"{row['time_ratio']:.2f}"
    )
    others = {
        "compiled": "time_ratio_compiled",
        "memory": "memory_ratio",
        "floor of the time": "time_ratio_floor",
    }
    for what, key in others.items():
        text += f", {what} {row[key]:.2f}" if key in row else ""
    return text


if __name__ == "__main__":
    sys.exit(main())
