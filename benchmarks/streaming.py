"""How fast does it stream, for how long, and against what? Every row of the table in README.md, in
one run.

``python -m benchmarks.streaming --size drawn --out benchmarks/results/streaming_drawn.json``

Ratios are taken side by side, alternating, with the same weights. What needs a GPU is "not
measured" without one, and never estimated. README.md explains every key; ``--size tiny`` rehearses
everything in a minute.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks._decode_scenarios import Halo, StreamedDecode
from benchmarks._device_scenarios import Backbone, DeviceMemory, Graphs
from benchmarks._models import SIZES, load_head
from benchmarks._result import origin, write_result
from benchmarks._scenarios import (
    AgainstDiffusers,
    Batch,
    Bench,
    CacheOrRecompute,
    Dtypes,
    FirstFrame,
    LongStream,
    Row,
    Writing,
    speech,
)
from benchmarks._targets import find, target_lines, target_row
from rest_lightning.constants import FPS, TEMPORAL_RATIO
from rest_lightning.errors import UserError, exit_code
from rest_lightning.machine import peak_memory_mb
from rest_lightning.media.files import check_output, whole_file
from rest_lightning.parts import dtype_on
from rest_lightning.streaming.report import ChunkProfiler
from rest_lightning.talking_head import DEFAULT_MODEL

# (where it counts, what, path in the JSON, sign, target). Elsewhere the value is shown without a
# target.
CPU, ANY, GPU = (DEFAULT_MODEL, "cpu"), ("", ""), ("paper", "cuda")
TARGETS = (
    (CPU, "frames per second, end to end", "long_stream.frames_per_second", ">=", 100.0),
    (
        CPU,
        ("first frame after the last needed sample, ms"),
        "first_frame.first_frame_ms.p50",
        "<=",
        200.0,
    ),
    (CPU, "chunk p99 / p50 over 10 minutes", "long_stream.p99_over_p50", "<=", 1.5),
    (
        CPU,
        ("time per chunk, last minute / second minute"),
        "long_stream.last_over_second_minute",
        "<=",
        1.03,
    ),
    (
        CPU,
        ("time per chunk after that / in another's second minute"),
        "long_stream.against_young.ratio",
        "<=",
        1.03,
    ),
    (
        CPU,
        ("resident memory, last minute - minute 2, MB"),
        "long_stream.resident_growth_mb",
        "<=",
        5.0,
    ),
    (ANY, "cached chunk / recomputing without a cache", "cache.ratio", "<=", 0.55),
    (ANY, "our forward without cache / diffusers' LTX forward", "diffusers.ratio", "<=", 1.0),
    (ANY, "streamed decode / whole-clip decode", "decode.ratio", "<=", 1.15),
    (ANY, "4 rows as a batch / 4 sessions one after another", "batch.ratio", "<=", 0.7),
    (GPU, "backbone for 121 frames, s", "backbone.backbone_s", "<=", 0.8),
    (GPU, "share of the matmul rate of this run", "backbone.matmul_share", ">=", 0.5),
    (GPU, "frames per second with VAE and copies", "long_stream.frames_per_second", ">=", 75.0),
    (GPU, "first frame, ms", "first_frame.first_frame_ms.p50", "<=", 300.0),
    (GPU, "peak device memory, GB", "device_memory.peak_allocated_gb", "<=", 11.0),
    (GPU, "captured graph / eager", "graphs.ratio", "", None),
)


def scenarios(size: str, minutes: float) -> list[Any]:
    """What is measured, in this order; the long stream comes last, when everything else has been
    allocated.
    """
    tiny = size == "tiny"
    repeats, seconds = (3, 4.0) if tiny else (20, 40.0)
    return [
        FirstFrame(repeats=3 if tiny else 20),
        CacheOrRecompute(repeats=3 if tiny else 30),
        AgainstDiffusers(repeats=3 if tiny else 30),
        StreamedDecode(repeats),
        Batch(repeats),
        Halo(width=8 if tiny else 32),
        Backbone(
            repeats=2 if tiny else 5,
            matmul_size=256 if tiny else 8192 if size == "paper" else 2048,
        ),
        Graphs(repeats),
        DeviceMemory(seconds),
        Dtypes(seconds, repeats=2 if tiny else 3),
        Writing(seconds, repeats=2 if tiny else 3),
        LongStream(minutes),
    ]


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return exit_code(lambda: run(parse(arguments)))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--size",
        choices=SIZES,
        default=DEFAULT_MODEL,
        help="people is the bundled model; tiny and paper have random weights",
    )
    parser.add_argument(
        "--out", type=Path, help=("JSON (default: benchmarks/results/streaming_SIZE.json)")
    )
    parser.add_argument("--plot", type=Path, help="PNG (default: beside the JSON)")
    parser.add_argument("--minutes", type=float, help="of the long stream (default: 30; tiny: 3)")
    parser.add_argument("--only", nargs="+", help="names of scenarios (default: all)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, help="of torch (default: its choice)")
    parser.add_argument(
        "--profile",
        type=Path,
        help=("also write a Chrome trace (JSON) of three chunks, and print it"),
    )
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> int:
    """Measure, write after every scenario, plot, print. Exit code 1 when a scenario failed."""
    bench, result = prepare(args)
    minutes = args.minutes or (3.0 if args.size == "tiny" else 30.0)
    wanted = scenarios(args.size, minutes)
    if args.only:
        unknown = set(args.only) - {scenario.name for scenario in wanted}
        if unknown:
            known = ", ".join(scenario.name for scenario in wanted)
            raise UserError(
                f"expected scenarios of {known}, got {', '.join(sorted(unknown))}: choose some"
            )
        wanted = [scenario for scenario in wanted if scenario.name in args.only]
    if args.profile is not None:
        profile(bench, args.profile)
    for scenario in wanted:
        start_s = time.perf_counter()
        try:
            result["scenarios"][scenario.name] = scenario.run(bench)
        except (UserError, RuntimeError, ImportError) as error:
            # out of memory, no diffusers: told, never skipped
            result["failures"].append(
                {"scenario": scenario.name, "reason": f"{type(error).__name__}: {error}"}
            )
        print(
            (f"{scenario.name}: {time.perf_counter() - start_s:.1f} s"), file=sys.stderr, flush=True
        )
        write(args.out, result)
    if "long_stream" in result["scenarios"]:
        plot(args.plot, result)
    print(table(result))
    print(f"wrote {args.out}")
    return 1 if result["failures"] else 0


def prepare(args: argparse.Namespace) -> tuple[Bench, Row]:
    """The model, and everything about the run that is known beforehand."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device not in ("cpu", "cuda") or (
        args.device == "cuda" and not torch.cuda.is_available()
    ):
        raise UserError(
            f"expected device auto, cpu or an available cuda, got {args.device}: try --device cpu"
        )
    if args.minutes is not None and not args.minutes > 0:
        raise UserError(f"expected --minutes above 0, got {args.minutes}: leave it out for 30")
    args.out = args.out or Path(f"benchmarks/results/streaming_{args.size}.json")
    args.plot = args.plot or args.out.with_suffix(".png")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for path, suffix in ((args.out, ".json"), (args.plot, ".png"), (args.profile, ".json")):
        if path is not None:
            check_output(path, True, suffix)
    head, weights = load_head(args.size, args.device, dtype_on(args.dtype, args.device))
    sampling = head.sampling
    result: Row = {
        "size": args.size,
        "weights": weights,
        "size_px": head.size_px,
        "device": args.device,
        "dtype": str(head.dtype).removeprefix("torch."),
        "sampler": {
            "num_steps": sampling.num_steps,
            "guidance": sampling.guidance,
            "shift": sampling.shift,
        },
        "chunk_frames": TEMPORAL_RATIO * int(head.transformer.cache_options.chunk_length),
        "fps": FPS,
        "scenarios": {},
        "targets": [],
        "failures": [],
        **origin(args),
        "seeds": {"weights": 0, "noise": 0},
    }
    return Bench(head, args.size, args.device), result


def write(path: Path, result: Row) -> None:
    """The JSON so far, whole."""
    result["targets"] = targets(result)
    result["peak_memory_mb"] = round(peak_memory_mb(), 1)
    write_result(path, result)


def targets(result: Row) -> list[Row]:
    """Every row of the table: its value, and whether it meets what is wanted at this size and on
    this device.
    """
    rows = []
    size = DEFAULT_MODEL if result["size"] == "drawn" else result["size"]  # the same goals for both
    for where, what, path, sign, limit in TARGETS:
        if where == CPU and result["device"] == "cuda":
            continue
        is_elsewhere = where == GPU and result["device"] != "cuda"
        # which only rehearses
        counts = where in (ANY, (size, result["device"])) and size != "tiny"
        value = None if is_elsewhere else find(result["scenarios"], path)
        row = target_row(what, value, sign, limit, None if counts else "no target here")
        rows.append(row | {"for": "any" if where == ANY else " on ".join(where)})
    return rows


def table(result: Row) -> str:
    """The same for people."""
    title = f"{result['size']} ({result['weights']} weights), {result['device']}, {result['dtype']}"
    lines = [f"\n{title}", *target_lines(result["targets"])]
    for name in ("dtypes", "writing"):
        for kind, fps in result["scenarios"].get(name, {}).get("frames_per_second", {}).items():
            lines.append(f"  {name}, {kind}: {fps:.1f} frames per second")
    for row in result["scenarios"].get("halo", {}).get("rows", []):
        error = f"max error {row['max_error']:.4f}, mean {row['mean_error']:.5f}"
        lines.append(
            f"  {row['decoder']} (random weights), halo {row['halo']}: {error} of the "
            "frames' deviation"
        )
    lines += [
        (f"  FAILED {failure['scenario']}: {failure['reason']}") for failure in result["failures"]
    ]
    return "\n".join(lines)


def profile(bench: Bench, path: Path) -> None:
    """Trace of three chunks, and the table of where their time goes."""
    from rich.console import Console

    with (
        bench.head.open(bench.portrait()[0]) as session,
        ChunkProfiler(session.clock, path) as profiler,
    ):
        for frames in session.stream(speech(6 * 0.32 * bench.chunk_length)):
            if len(frames):
                profiler.step()
    Console().print(profiler.table())


def plot(path: Path, result: Row) -> None:
    """Time per chunk and resident memory over the stream's time, minute by minute."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    row = result["scenarios"]["long_stream"]
    minutes = [entry["minute"] for entry in row["by_minute"]]
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.plot(
        minutes, [entry["chunk_ms_p50"] for entry in row["by_minute"]], marker="o", label="median"
    )
    upper.plot(
        minutes, [entry["chunk_ms_mean"] for entry in row["by_minute"]], linestyle=":", label="mean"
    )
    upper.set(ylabel="per chunk, ms", ylim=(0, None))
    upper.legend(frameon=False)
    lower.plot(
        minutes, [entry["resident_mb"] for entry in row["by_minute"]], marker="o", color="tab:red"
    )
    lower.set(xlabel="minute of the stream", ylabel="resident memory, MB", ylim=(0, None))
    title = (
        f"{result['size']}, {result['device']}, {result['dtype']}: "
        f"{row['frames_per_second']:.0f} frames per second"
    )
    upper.set_title(title, loc="left")
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=100, metadata={"Software": "rest_lightning"})


if __name__ == "__main__":
    sys.exit(main())
