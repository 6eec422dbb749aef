"""Live in a browser: latency, sound and picture in step, interruption, cost. Every row of the table
in README.md.

``python -m benchmarks.live --out benchmarks/results/live.json``; with ``--minutes 60`` also the
hour.

A real Chromium on this machine, a fake microphone that hears beeps, loopback, the server in a
process of its own. The browser shares the processor with the server: let nothing else run.
``--model marked --seconds 6`` rehearses.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks._browser import WIDE, LivePage, browser
from benchmarks._live_scenarios import (
    MARKED,
    Interruptions,
    LongSession,
    Pixels,
    Row,
    Server,
    ServerCpu,
    Sessions,
)
from benchmarks._result import origin, write_result
from benchmarks._targets import find, target_lines, target_row
from rest_lightning.errors import UserError, exit_code
from rest_lightning.media.files import check_output
from rest_lightning.talking_head import ASSETS, DEFAULT_MODEL

SPEECH = ASSETS / "speech.wav"
LONG_MIN = 60.0  # a shorter long session says nothing about the hour
# (what, path in the JSON, sign, target)
TARGETS: tuple[tuple[str, str, str, float], ...] = (
    ("microphone to picture, one session, p95, ms", "sessions_1.latency_p95_ms", "<=", 1450),
    ("the same, by beeps", "sessions_1.beep_latency_p95_ms", "<=", 1450),
    ("microphone to picture, three sessions, p95, ms", "sessions_3.latency_p95_ms", "<=", 1800),
    ("the same, by beeps", "sessions_3.beep_latency_p95_ms", "<=", 1800),
    ("sound/picture offset, mean, ms", "sessions_1.offset_mean_abs_ms", "<=", 40),
    ("sound/picture offset, deviation, ms", "sessions_1.offset_sd_ms", "<=", 10),
    ("sound/picture offset, largest of a beep, ms", "sessions_1.offset_max_abs_ms", "<=", 60),
    ("largest gap between frames in 60 s, ms", "sessions_1.largest_gap_ms", "<=", 120),
    ("frames lost of 1500", "sessions_1.lost_of_1500", "<=", 3),
    ("interruption: sound gone, slowest, ms", "interruption.silent_ms.max", "<=", 50),
    ("interruption: old picture gone, slowest, ms", "interruption.picture_gone_ms.max", "<=", 150),
    ("server without the model, one session, % of a core", "cpu.percent_of_1", "<=", 8),
    ("server without the model, three, % each", "cpu.percent_of_3", "<=", 8),
    ("sessions in real time of three", "sessions_3.num_in_real_time", ">=", 3),
    ("60 minutes: drift of the offset, ms", "long.drift_ms", "<=", 20),
    ("60 minutes: growth of resident memory, MB", "long.growth_mb", "<=", 5),
)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return exit_code(lambda: run(parse(arguments)))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model",
        choices=(DEFAULT_MODEL, "drawn", MARKED),
        default=DEFAULT_MODEL,
        help="marked rehearses",
    )
    parser.add_argument(
        "--seconds", type=float, default=60.0, help=("of every measurement (default 60)")
    )
    parser.add_argument(
        "--minutes", type=float, default=0.0, help=("of the long session (default: not measured)")
    )
    parser.add_argument("--interruptions", type=int, default=12, help="how many (default 12)")
    parser.add_argument("--only", nargs="+", help="names of scenarios (default: all)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/live.json"))
    parser.add_argument(
        "--screenshot",
        type=Path,
        help=("only take a picture (PNG) of the page with a session running"),
    )
    return parser.parse_args(arguments)


def scenarios(args: argparse.Namespace) -> list[Any]:
    """What is measured, in this order."""
    wanted: list[Any] = [
        Pixels(args.seconds),
        Sessions(1, args.model, args.seconds),
        Sessions(3, args.model, args.seconds),
        Interruptions(args.model, args.interruptions),
        ServerCpu(args.seconds),
    ]
    if args.minutes:
        wanted.append(LongSession(args.model, args.minutes))
    known = [scenario.name for scenario in wanted]
    if unknown := set(args.only or ()) - set(known):
        text = (
            f"expected scenarios of {', '.join(known)}, got {', '.join(sorted(unknown))}: "
            "choose some"
        )
        raise UserError(f"{text} (`long` needs --minutes)")
    return [scenario for scenario in wanted if not args.only or scenario.name in args.only]


def run(args: argparse.Namespace) -> int:
    """Measure, write after every scenario, print. Exit code 1 when a scenario failed."""
    if args.screenshot is not None:
        return screenshot(args.screenshot, args.model)
    if not args.seconds >= 4 or args.minutes < 0 or args.interruptions < 1:
        raise UserError(
            "expected --seconds of at least 4, --minutes and --interruptions above 0: "
            "leave them out"
        )
    wanted = scenarios(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    check_output(args.out, True, ".json")
    result: Row = {
        "model": args.model,
        "scenarios": {},
        "targets": [],
        "failures": [],
        **origin(args),
    }
    for scenario in wanted:
        start_s = time.perf_counter()
        try:
            result["scenarios"][scenario.name] = scenario.run()
        except Exception as error:  # a browser that crashed: told, never skipped
            line = next(iter(str(error).splitlines()), "")
            result["failures"].append(
                {"scenario": scenario.name, "reason": f"{type(error).__name__}: {line}"}
            )
        print(
            (f"{scenario.name}: {time.perf_counter() - start_s:.1f} s"), file=sys.stderr, flush=True
        )
        result["targets"] = targets(result)
        write_result(args.out, result)
    print(table(result))
    print(f"wrote {args.out}")
    return 1 if result["failures"] else 0


def targets(result: Row) -> list[Row]:
    """Every row of the table; a rehearsal meets nothing, and a short hour is none."""
    rows, found = [], result["scenarios"]
    for what, path, sign, limit in TARGETS:
        is_short = path.startswith("long.") and (find(found, "long.minutes") or 0) < LONG_MIN
        rehearses = result["model"] == MARKED and not path.startswith("cpu.")
        instead = "not measured" if is_short else "rehearsal" if rehearses else None
        rows.append(target_row(what, find(found, path), sign, limit, instead))
    told = find_text(found.get("sessions_3"), "refused")
    is_told: bool | str = "sessions" in told if told is not None else "not measured"
    rows.append(
        {
            "what": ("the fourth session is refused in words"),
            "value": told,
            "wanted": "words",
            "met": is_told,
        }
    )
    return rows


def find_text(scenario: Row | None, key: str) -> str | None:
    """A text of a scenario, None where it was not run."""
    return None if scenario is None else str(scenario[key])


def table(result: Row) -> str:
    """The same for people."""
    lines = [f"\n{result['model']} model, loopback", *target_lines(result["targets"])]
    pixels = result["scenarios"].get("pixels", {})
    if pixels:
        share = (
            f"{100 * pixels['numbers_agree']:.1f} % of frames, "
            f"{100 * pixels['beeps_agree']:.1f} % of beeps"
        )
        lines.append(f"  pixels of the marked model agree with the protocol: {share}")
    lines += [
        (f"  FAILED {failure['scenario']}: {failure['reason']}") for failure in result["failures"]
    ]
    return "\n".join(lines)


def screenshot(path: Path, model: str) -> int:
    """The page after ten seconds of speech."""
    server = Server(model)
    try:
        with browser(SPEECH) as launched:
            page = LivePage(launched, server.url, WIDE)
            page.speak(False)
            page.wait(10)
            page.page.screenshot(path=path)
    finally:
        server.stop()
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
