"""Measure how fast this machine streams: frames per second by stage, the first frame, and how many
streams it keeps up with at once.

Takes two minutes at most and prints a table. --out writes the same numbers as one JSON row, with
the machine and the versions, to send in or to compare.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rest_lightning.commands.talk import add_loading_arguments, model_options
from rest_lightning.constants import FPS, SAMPLE_RATE, TEMPORAL_RATIO
from rest_lightning.errors import UserError, note
from rest_lightning.machine import num_usable_cores
from rest_lightning.media.files import check_output, write_text_atomic

if TYPE_CHECKING:
    from rich.table import Table

    from rest_lightning.streaming.report import StreamReport
    from rest_lightning.talking_head import TalkingHead

ASSETS = Path(__file__).resolve().parent.parent / "assets"
SPEECH = ASSETS / "speech.wav"
BLOCK_SAMPLES = SAMPLE_RATE // FPS  # speech goes in as it would live: 40 ms at a time


@dataclass(frozen=True)
class Budget:
    """How long each measurement may take.

    Attributes:
        stream_s: of one stream, as fast as it goes.
        num_openings: sessions that are opened to time the first frame, and first_frame_s: all of
            them together.
        streams_s: the search for the number of streams.
        num_steps: chunks of every stream that one trial of the search times.
        most_streams: where the search ends.
    """

    stream_s: float = 30.0
    num_openings: int = 10
    first_frame_s: float = 15.0
    streams_s: float = 50.0
    num_steps: int = 8
    most_streams: int = 512


QUICK = Budget(1.0, 1, 1.0, 2.0, num_steps=2, most_streams=4)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--out", type=Path, help="also write the row as JSON")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    parser.add_argument(
        "--quick", action="store_true", help="seconds in place of minutes, and rough numbers"
    )
    add_loading_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write the row."""
    if args.out is not None:
        check_output(args.out, args.overwrite, ".json")
    import json

    from rich.console import Console

    from rest_lightning.talking_head import DEFAULT_MODEL

    head = model_options(args).load()
    name = DEFAULT_MODEL
    if args.model is not None:  # a row that is sent in tells no path of the machine
        name = args.model.resolve().name if args.model.exists() else str(args.model)
    row = measure(head, QUICK if args.quick else Budget(), name)
    load, num_cores = row["load_before"], num_usable_cores()
    if load is not None and load > 0.5 * num_cores:
        note(
            f"other programs kept {load:.1f} of {num_cores} cores busy when this began: the "
            "machine can do better"
        )
    console = Console()
    console.print(table_of(row))
    if args.out is not None:
        write_text_atomic(args.out, json.dumps(row, indent=2, ensure_ascii=False) + "\n")
        print(f"wrote {args.out}")
    return 0


def measure(head: TalkingHead, budget: Budget, name: str) -> dict[str, Any]:
    """Returns the row: what was measured, of which model, on which machine.

    Args:
        head: the model, on its device.
        budget: seconds for each part.
        name: of the model, as it is to appear in the row.
    """
    import torch

    from rest_lightning.machine import commit, hardware, peak_memory_mb, versions

    started_s = time.perf_counter()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    on_cuda = head.device.type == "cuda"
    report = stream_for(head, budget.stream_s)
    row: dict[str, Any] = {
        "kind": "rest bench",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": name,
        "size_px": head.size_px,
        "num_parameters": sum(each.numel() for each in head.parameters()),
        "device": str(head.device),
        "dtype": str(head.dtype).removeprefix("torch."),
        "num_threads": torch.get_num_threads(),
        "load_before": None if load is None else round(load, 2),
        "chunk_length": head.transformer.cache_options.chunk_length,
        "num_steps": head.sampling.num_steps,
        "guidance": head.sampling.guidance,
        "frames_per_second": round(report.frames_per_second, 2),
        "real_time_factor": round(report.real_time_factor, 3),
        "chunk_ms": report.chunk_ms,
        "chunk_stage_ms": report.chunk_stage_ms,
        **first_frames(head, budget),
        "streams": streams_at_once(head, budget),
        "peak_memory_mb": round(peak_memory_mb(), 1),
    }
    if on_cuda:
        row["peak_device_memory_mb"] = round(torch.cuda.max_memory_allocated() / 1e6, 1)
    row["measured_s"] = round(time.perf_counter() - started_s, 1)
    return row | {"hardware": hardware(), "versions": versions(), "commit": commit()}


def stream_for(head: TalkingHead, seconds: float) -> StreamReport:
    """Streams the model's first portrait and the bundled speech, as fast as the machine can, for so
    many seconds of clock; at least two chunks. What the first chunk warms up is not counted.
    """
    blocks = _blocks()
    with head.open(head.portraits[0], crop="centre") as session:
        while not len(session.push(next(blocks))):
            pass
        session.clock.start()
        end_s = time.perf_counter() + seconds
        while time.perf_counter() < end_s or session.clock.chunk_ms.count < 2:
            session.push(next(blocks))
        session.clock.stop()
    return session.report()


def first_frames(head: TalkingHead, budget: Budget) -> dict[str, Any]:
    """Milliseconds of opening a portrait (``open_ms``), and from the last sample that the first
    frame needs to that frame (``first_frame_ms``): count, median and maximum of each.
    """
    opening: list[float] = []
    first: list[float] = []
    end_s = time.perf_counter() + budget.first_frame_s
    while len(first) < budget.num_openings and (not first or time.perf_counter() < end_s):
        blocks = _blocks()
        start_s = time.perf_counter()
        with head.open(head.portraits[0], crop="centre") as session:
            opening.append(1000 * (time.perf_counter() - start_s))
            while not len(session.push(next(blocks))):
                pass
            compute_ms = session.report().first_frame_compute_ms
            assert compute_ms is not None
            first.append(compute_ms)
    return {"open_ms": _spread(opening), "first_frame_ms": _spread(first)}


def streams_at_once(head: TalkingHead, budget: Budget) -> dict[str, Any]:
    """How many streams the machine computes together before the slowest chunk takes longer than it
    plays.

    The number doubles until it is too large, then the gap is halved.

    Returns:
        ``at_once``: the largest number that kept up (0: not even one). ``is_limit``: whether one
        more was too many; where it is false time, memory or the search's own bound ended it.
        ``chunk_s``: seconds that a chunk plays. ``trials``: number, median and slowest chunk in ms.
    """
    chunk_s = head.transformer.cache_options.chunk_length * TEMPORAL_RATIO / FPS
    end_s = time.perf_counter() + budget.streams_s
    trials: list[dict[str, float]] = []
    good, bad = 0, budget.most_streams + 1
    while bad - good > 1:
        number = min(max(1, 2 * good), budget.most_streams) if bad > 2 * good else (good + bad) // 2
        if trials:  # does one more trial fit?
            per_stream_s = trials[-1]["p50"] / 1000 / trials[-1]["num_streams"]
            if time.perf_counter() + (budget.num_steps + 2) * number * per_stream_s > end_s:
                break
        try:
            chunk_ms = _step_together(head, number, budget.num_steps, chunk_s)
        except UserError:  # out of memory
            return _found(good, False, chunk_s, trials) | {"out_of_memory_at": number}
        trials.append({"num_streams": number, **_spread(chunk_ms)})
        if max(chunk_ms) <= 1000 * chunk_s:
            good = number
        else:
            bad = number
    return _found(good, bad - good == 1 and bad <= budget.most_streams, chunk_s, trials)


def _found(
    good: int, is_limit: bool, chunk_s: float, trials: list[dict[str, float]]
) -> dict[str, Any]:
    return {"at_once": good, "is_limit": is_limit, "chunk_s": chunk_s, "trials": trials}


def _step_together(head: TalkingHead, number: int, num_steps: int, chunk_s: float) -> list[float]:
    """Milliseconds of every chunk of so many rows; ends early where it is far too slow."""
    from rest_lightning.media.portrait import load_portrait
    from rest_lightning.streaming.engine import EngineOptions

    portrait = load_portrait(head.portraits[0], head.size_px, "centre")
    needed_s = (num_steps + 4) * chunk_s + 1
    speech = np.resize(_speech(), round(needed_s * SAMPLE_RATE))
    # Graphs of this number alone are captured, by the two chunks before the clock runs.
    options = EngineOptions(warm_up=False)
    took_ms: list[float] = []
    with head.open_batch(number, options=options, max_waiting_s=needed_s) as batch:
        for row in range(number):
            batch.start(row, portrait, seed=row)
            batch.push(row, np.roll(speech, row * BLOCK_SAMPLES * 7))
        for _ in range(2):
            batch.step()
        for _ in range(num_steps):
            start_s = time.perf_counter()
            frames = batch.step()
            took_ms.append(1000 * (time.perf_counter() - start_s))
            assert len(frames) == number
            if took_ms[-1] > 2000 * chunk_s:
                break
    return took_ms


def _speech() -> np.ndarray:
    from rest_lightning.media.audio import open_speech

    return open_speech(str(SPEECH)).read_all()


def _blocks() -> Iterator[np.ndarray]:
    """The bundled speech, over and over."""
    speech = _speech()
    position = 0
    while True:
        yield np.take(speech, np.arange(position, position + BLOCK_SAMPLES), mode="wrap")
        position += BLOCK_SAMPLES


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "count": len(values),
        "p50": round(float(np.median(values)), 2),
        "max": round(max(values), 2),
    }


def table_of(row: dict[str, Any]) -> Table:
    """The row for people, as a rich table."""
    from rich.table import Table

    machine = row["hardware"]
    where = machine.get("accelerator") if row["device"] != "cpu" else machine["processor"]
    title = f"{row['model']}, {row['size_px']} px, {row['dtype']} on {where}"
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="dim")
    table.add_column(justify="right", style="bold")
    table.add_column(style="dim")
    factor = row["real_time_factor"]
    table.add_row("one stream", f"{row['frames_per_second']:.1f} fps", f"{factor:.2f} x real time")
    titles = {"speech": "speech encoder", "dit": "DiT", "vae": "VAE decoder"}
    total_ms = row["chunk_ms"]["p50"] or 0.0
    table.add_row(
        "a chunk", f"{total_ms:.1f} ms", f"plays {1000 * row['streams']['chunk_s']:.0f} ms"
    )
    for name, spread in row["chunk_stage_ms"].items():
        share = spread["p50"] / total_ms if total_ms else 0.0
        table.add_row(f"  {titles.get(name, name)}", f"{spread['p50']:.1f} ms", f"{share:.0%}")
    table.add_row("opening a portrait", f"{row['open_ms']['p50']:.0f} ms", "median")
    needs = "median, from the last sample that it needs"
    table.add_row("first frame", f"{row['first_frame_ms']['p50']:.0f} ms", needs)
    streams = row["streams"]
    bound = "" if streams["is_limit"] else "at least "
    largest = [each for each in streams["trials"] if each["num_streams"] == streams["at_once"]]
    slowest = f"slowest chunk {largest[-1]['max']:.0f} ms" if largest else "slower than real time"
    table.add_row("streams at once", f"{bound}{streams['at_once']}", slowest)
    memory = f"{row['peak_memory_mb']:,.0f} MB"
    on_device = row.get("peak_device_memory_mb")
    table.add_row("memory", memory, "" if on_device is None else f"{on_device:,.0f} MB on the GPU")
    return table
