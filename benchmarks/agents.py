"""Faces of voice agents: how soon they answer and fall silent, several at once, memory, and what
the adapters cost.

``python -m benchmarks.agents --out benchmarks/results/agents.json`` takes about 4 minutes on two
cores; ``--seconds 4 --hours 0.1`` rehearses. Adapters are measured where their extras are
installed, as in the environment that ``make test-agents`` makes.

Times are those of the bundled model on the real clock: let nothing else run. The clock of idling
is simulated. What has to hold at every moment (nothing lost, nothing old) is not sampled here but
kept by the conformance suite, whose cases are counted.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib.util
import sys
import time
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._result import origin, write_result
from benchmarks._targets import find, target_lines, target_row
from rest_lightning import TalkingHead
from rest_lightning.avatar import Avatar, AvatarFrame, AvatarPool, conformance
from rest_lightning.avatar.conformance import Piece
from rest_lightning.avatar.simulation import TracedModel, simulate
from rest_lightning.errors import UserError, exit_code
from rest_lightning.machine import resident_memory_mb
from rest_lightning.talking_head import ASSETS

SPEECH = ASSETS / "speech.wav"
FULL_SECONDS, FULL_HOURS = 20.0, 2.0  # shorter ones rehearse
RATE_HZ, BLOCK_S = 16_000, 0.02
SPEEDS = {"fast": 4.0, "real_time": 1.0}  # of the source, in multiples of real time
SIZE_PX = 256  # of the pictures that adapters pass on
_ADAPTER_S = 15.0  # of the processor's time, at most
# (what, path in the JSON, sign, target)
TARGETS: tuple[tuple[str, str, str, float], ...] = (
    (
        "first spoken picture, speech at 4 x real time, p95, ms",
        "answer_fast.first_picture_p95_ms",
        "<=",
        700,
    ),
    (
        "first spoken picture, speech in real time, p95, ms",
        "answer_real_time.first_picture_p95_ms",
        "<=",
        700,
    ),
    (
        "the same, short chunks, 100 ms a chunk (simulated)",
        "simulated.chunk_320_ms_compute_100_ms_real_time.p95_ms",
        "<=",
        700,
    ),
    ("of which computing a chunk, p50, ms", "answer_fast.chunk_p50_ms", "<=", 120),
    ("interruption: last old piece handed out after, ms", "interruption.last_old_max_ms", "<=", 40),
    ("offset of sound and picture, largest, ms", "offset.largest_ms", "<=", 20),
    ("three avatars at once: pictures held, %", "three.held_percent", "<=", 0.5),
    ("three avatars at once: pace of the slowest, %", "three.pace_percent", ">=", 99),
    ("two hours of idling: memory, MB", "idle.grown_mb", "<=", 5),
    ("LiveKit adapter beside the seam, % of a core", "adapters.livekit_percent", "<=", 5),
    ("Pipecat adapter beside the seam, % of a core", "adapters.pipecat_percent", "<=", 5),
    ("conformance of the seam, cases kept of all, %", "conformance.kept_percent", ">=", 100),
)
Row = dict[str, Any]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--seconds", type=float, default=FULL_SECONDS, help="of every measurement on the real clock"
    )
    parser.add_argument("--hours", type=float, default=FULL_HOURS, help="of idling, simulated")
    parser.add_argument(
        "--chunk-length", type=int, help="latents of a chunk, where the model offers it"
    )
    parser.add_argument("--model", type=Path, help="model folder (default: the bundled model)")
    parser.add_argument("--only", nargs="+", help="names of scenarios (default: all)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/agents.json"))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return exit_code(lambda: run(parse(arguments)))


def run(args: argparse.Namespace) -> int:
    """Measure, write after every scenario, print. Exit code 1 when a scenario failed."""
    if not args.seconds >= 2 or not args.hours > 0:
        raise UserError("expected --seconds of at least 2 and --hours above 0: leave them out")
    head: list[TalkingHead] = []

    def model() -> TalkingHead:
        if not head:
            head.append(TalkingHead.from_pretrained(args.model))
        return head[0]

    def pool(num_avatars: int) -> AvatarPool:
        return AvatarPool(model(), num_avatars, chunk_length=args.chunk_length)

    def answer(speed: float) -> Row:
        return asyncio.run(answers(pool(1), args.seconds, speed))

    scenarios: dict[str, Callable[[], Row]] = {
        **{f"answer_{name}": partial(answer, speed) for name, speed in SPEEDS.items()},
        "interruption": lambda: asyncio.run(interruptions(pool(1), args.seconds)),
        "three": lambda: asyncio.run(together(pool(3), 3, args.seconds)),
        "offset": lambda: asyncio.run(offset(args.seconds)),
        "simulated": simulated,
        "idle": lambda: idle(args.hours),
        "adapters": lambda: adapters(args.seconds),
        "conformance": conforms,
    }
    if unknown := set(args.only or ()) - set(scenarios):
        raise UserError(
            f"expected scenarios of {', '.join(scenarios)}, got {', '.join(sorted(unknown))}: "
            f"choose some"
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    result: Row = {"scenarios": {}, "targets": [], "failures": [], **origin(args)}
    is_short = args.seconds < FULL_SECONDS or args.hours < FULL_HOURS
    for name, measure in scenarios.items():
        if args.only and name not in args.only:
            continue
        start_s = time.perf_counter()
        try:
            result["scenarios"][name] = measure()
        except Exception as error:  # told, never skipped
            line = next(iter(str(error).splitlines()), "")
            result["failures"].append(
                {"scenario": name, "reason": f"{type(error).__name__}: {line}"}
            )
        print(f"{name}: {time.perf_counter() - start_s:.1f} s", file=sys.stderr, flush=True)
        result["targets"] = [
            target_row(
                what,
                find(result["scenarios"], path),
                sign,
                limit,
                "rehearsal" if is_short else None,
            )
            for what, path, sign, limit in TARGETS
        ]
        write_result(args.out, result)
    lines = [*target_lines(result["targets"])]
    lines += [
        f"  FAILED {failure['scenario']}: {failure['reason']}" for failure in result["failures"]
    ]
    print("\n".join(lines))
    print(f"wrote {args.out}")
    return 1 if result["failures"] else 0


# -- on the real clock ----------------------------------------------------------------------------


async def answers(pool: AvatarPool, seconds: float, speed: float) -> Row:
    """From the first sample of an utterance to the first picture with it, at every phase of a
    chunk.
    """
    async with pool, Avatar(pool.model.portraits[0], pool) as avatar:
        reading = asyncio.create_task(_read(avatar, lambda frame: None))
        await asyncio.sleep(1.5)
        end_s, number = time.monotonic() + seconds, 0
        while time.monotonic() < end_s or not number:
            await _speak(avatar, _speech(1.2), speed)
            while avatar.is_speaking:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.3 + 0.137 * (number % 7))
            number += 1
        first_ms = avatar.stats.first_picture_ms
        chunk_ms = [1e3 * each for each in pool.turnarounds_s(0)]
        stats = avatar.stats
        reading.cancel()
    return {
        "num_utterances": number,
        "source_speed": speed,
        "chunk_frames": pool.chunk_frames,
        "first_picture_p50_ms": _quantile(first_ms, 0.5),
        "first_picture_p95_ms": _quantile(first_ms, 0.95),
        "first_picture_max_ms": max(first_ms),
        "chunk_p50_ms": _quantile(chunk_ms, 0.5),
        "num_starved": stats.num_starved,
        "held_percent": 100 * stats.num_held / stats.num_frames,
    }


async def interruptions(pool: AvatarPool, seconds: float) -> Row:
    """How long after an interruption speech was still handed out, and how long the last picture was
    held.
    """
    last_s = 0.0
    late_ms: list[float] = []
    held: list[int] = []

    def note(frame: AvatarFrame) -> None:
        nonlocal last_s
        if frame.is_speech:
            last_s = time.monotonic()

    async with pool, Avatar(pool.model.portraits[0], pool) as avatar:
        reading = asyncio.create_task(_read(avatar, note))
        await asyncio.sleep(1.5)
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s or not late_ms:
            await _speak(avatar, _speech(4.0), 8.0)
            while not avatar.stats.first_picture_ms or time.monotonic() - last_s > 0.1:
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.2 + 0.173 * (len(late_ms) % 6))
            before, at_s = avatar.stats.num_held, time.monotonic()
            avatar.interrupt()
            await asyncio.sleep(0.8)
            late_ms.append(1e3 * max(0.0, last_s - at_s))
            held.append(avatar.stats.num_held - before)
        reading.cancel()
    return {
        "num_interruptions": len(late_ms),
        "last_old_max_ms": max(late_ms),
        "held_p50_frames": _quantile(held, 0.5),
        "held_max_frames": max(held),
    }


async def offset(seconds: float) -> Row:
    """How far apart sound and picture are, by a model whose pictures tell what they were made for,
    that is too slow in the middle.
    """
    model: Any = TracedModel(compute_s=0.1)
    apart_ms: list[float] = []

    def note(frame: AvatarFrame) -> None:
        samples = frame.samples if frame.is_speech else None
        apart_s = conformance.offset_s(Piece(frame.picture, samples, frame.sample_rate))
        if apart_s is not None:
            apart_ms.append(1e3 * apart_s)

    async with Avatar(conformance.portrait(), model) as avatar:
        reading = asyncio.create_task(_read(avatar, note))
        await avatar.push_audio(conformance.speech(seconds, RATE_HZ), RATE_HZ)
        await avatar.flush()
        for compute_s in (0.1, 1.2, 0.1):
            model.compute_s = compute_s
            await asyncio.sleep(seconds / 3)
        reading.cancel()
        num_held = avatar.stats.num_held
    return {"num_pieces": len(apart_ms), "largest_ms": max(apart_ms), "num_held": num_held}


async def together(pool: AvatarPool, count: int, seconds: float) -> Row:
    """Several avatars that speak at once."""
    counts = [0] * count

    async def read(avatar: Avatar, place: int) -> None:
        async for _ in avatar.run():
            counts[place] += 1

    async with pool:
        avatars = [Avatar(pool.model.portraits[0], pool) for _ in range(count)]
        reading = [asyncio.create_task(read(each, place)) for place, each in enumerate(avatars)]
        while min(counts) < 50:
            await asyncio.sleep(0.02)
        start_s, before = time.monotonic(), list(counts)
        held = sum(each.stats.num_held for each in avatars)
        while time.monotonic() - start_s < seconds:
            await asyncio.gather(*(_speak(each, _speech(2.0), 4.0) for each in avatars))
            await asyncio.sleep(2.0)
        took_s = time.monotonic() - start_s
        shown = [after - first for after, first in zip(counts, before, strict=True)]
        held = sum(each.stats.num_held for each in avatars) - held
        turnaround_ms = [1e3 * each for row in range(count) for each in pool.turnarounds_s(row)]
        for task in reading:
            task.cancel()
        for each in avatars:
            await each.aclose()
    return {
        "num_avatars": count,
        "pace_percent": 100 * min(shown) / (25 * took_s),
        "held_percent": 100 * held / sum(shown),
        "chunk_p50_ms": _quantile(turnaround_ms, 0.5),
    }


def simulated() -> Row:
    """What waiting, placing and computing again come to, for a model that takes 100 ms or 200 ms
    for a chunk.

    The clock is simulated: nothing else on this machine matters. Of 24 phases of a chunk.
    """
    found: Row = {}
    for chunk_length in (3, 1):
        for compute_ms in (100, 200):
            for name, speed in SPEEDS.items():
                first_ms = [
                    simulate(
                        _first_picture_ms(chunk_length, compute_ms / 1e3, speed, 3.0 + 0.04 * phase)
                    )
                    for phase in range(24)
                ]
                found[f"chunk_{320 * chunk_length}_ms_compute_{compute_ms}_ms_{name}"] = {
                    "p50_ms": _quantile(first_ms, 0.5),
                    "p95_ms": _quantile(first_ms, 0.95),
                }
    return found


async def _first_picture_ms(
    chunk_length: int, compute_s: float, speed: float, at_s: float
) -> float:
    model: Any = TracedModel(chunk_length, compute_s=compute_s)
    async with Avatar(conformance.portrait(), model) as avatar:
        reading = asyncio.create_task(_read(avatar, lambda frame: None))
        await asyncio.sleep(at_s)
        samples, size = conformance.speech(3.0, RATE_HZ), round(BLOCK_S * RATE_HZ)
        for start in range(0, len(samples), size):
            await avatar.push_audio(samples[start : start + size], RATE_HZ)
            await asyncio.sleep(BLOCK_S / speed)
        await avatar.flush()
        while not avatar.stats.first_picture_ms:
            await asyncio.sleep(0.02)
        reading.cancel()
        assert not avatar.stats.num_starved, "speech that began too early"
        return avatar.stats.first_picture_ms[0]


# -- memory and adapters --------------------------------------------------------------------------


def idle(hours: float) -> Row:
    """Resident memory that simulated hours of idling leave behind."""

    async def wait() -> Row:
        async with Avatar(conformance.portrait(), TracedModel()) as avatar:  # type: ignore[arg-type]
            reading = asyncio.create_task(_read(avatar, lambda frame: None))
            await asyncio.sleep(60.0)
            gc.collect()
            before_mb = resident_memory_mb()
            await asyncio.sleep(3600 * hours)
            gc.collect()
            grown_mb = resident_memory_mb() - before_mb
            reading.cancel()
            return {"hours": hours, "num_frames": avatar.stats.num_frames, "grown_mb": grown_mb}

    return simulate(wait())


def adapters(seconds: float) -> Row:
    """Processor time of the seam alone, and with an adapter around it, for pictures of 256 px and
    speech without a pause.
    """
    seconds = min(seconds, _ADAPTER_S)
    seam = _percent_of_core(lambda avatar: _read(avatar, lambda frame: None), seconds)
    found: Row = {"size_px": SIZE_PX, "seam_percent": seam}
    if importlib.util.find_spec("livekit") is not None:
        found["livekit_percent"] = _percent_of_core(_read_livekit, seconds) - seam
    if importlib.util.find_spec("pipecat") is not None:
        found["pipecat_percent"] = _percent_of_core(_read_pipecat, seconds) - seam
    return found


def _percent_of_core(read: Callable[[Avatar], Coroutine[Any, Any, None]], seconds: float) -> float:
    async def measure() -> float:
        model: Any = TracedModel(size_px=SIZE_PX, compute_s=0.0)
        async with Avatar(conformance.portrait(), model) as avatar:
            reading = asyncio.create_task(read(avatar))
            await avatar.push_audio(_speech(seconds + 2.0), RATE_HZ)
            await asyncio.sleep(1.0)
            start_s, start_cpu_s = time.perf_counter(), time.process_time()
            await asyncio.sleep(seconds)
            used = time.process_time() - start_cpu_s
            took_s = time.perf_counter() - start_s
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            return 100 * used / took_s

    return asyncio.run(measure())


async def _read_livekit(avatar: Avatar) -> None:
    from rest_lightning.integrations.livekit import AvatarVideoGenerator

    async for _ in AvatarVideoGenerator(avatar):
        pass


async def _read_pipecat(avatar: Avatar) -> None:
    from loguru import logger
    from pipecat.pipeline.pipeline import Pipeline
    from pipecat.pipeline.worker import PipelineWorker
    from pipecat.workers.runner import WorkerRunner

    from rest_lightning.integrations.pipecat import AvatarVideoService

    logger.remove()
    settings = AvatarVideoService.Settings(portrait=conformance.portrait())
    service = AvatarVideoService(settings=settings)
    service.avatar = avatar
    worker = PipelineWorker(Pipeline([service]), cancel_on_idle_timeout=False, enable_rtvi=False)
    runner = WorkerRunner(handle_sigint=False)
    await runner.add_workers(worker)
    await runner.run()


def conforms() -> Row:
    """Cases of the conformance suite that the seam keeps; those of hours are run by the tests."""
    hours = (conformance.hours_of_idling, conformance.ten_minutes_faster_than_real_time)
    cases = [case for case in conformance.CASES if case not in hours]
    broken = []
    for case in cases:
        try:
            conformance.check(case, conformance.open_avatar)
        except AssertionError as error:
            broken.append(f"{case.__name__}: {error}")
    return {
        "num_cases": len(cases),
        "broken": broken,
        "kept_percent": 100 * (len(cases) - len(broken)) / len(cases),
    }


async def _read(avatar: Avatar, note: Callable[[AvatarFrame], None]) -> None:
    async for frame in avatar.run():
        note(frame)


async def _speak(avatar: Avatar, samples: np.ndarray, speed: float) -> None:
    """Push an utterance at a multiple of real time, on a clock that does not drift."""
    size, due_s = round(BLOCK_S * RATE_HZ), time.monotonic()
    for start in range(0, len(samples), size):
        await avatar.push_audio(samples[start : start + size], RATE_HZ)
        due_s += BLOCK_S / speed
        await asyncio.sleep(max(0.0, due_s - time.monotonic()))
    await avatar.flush()


def _speech(seconds: float) -> np.ndarray:
    """The bundled speech, again and again."""
    import wave

    with wave.open(str(SPEECH)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16)
    return np.resize(samples, round(seconds * RATE_HZ))


def _quantile(values: list[Any], share: float) -> float:
    return float(np.quantile(values, share))


if __name__ == "__main__":
    sys.exit(main())
