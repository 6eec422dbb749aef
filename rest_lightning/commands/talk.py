"""Make a talking video of a portrait and speech, streamed chunk by chunk.

The speech may be any sound file or the sound of a video; "-" reads raw 16 kHz mono s16le samples from a pipe.
Ctrl-C keeps the video of what was done so far.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from rest_lightning.constants import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME
from rest_lightning.errors import UserError
from rest_lightning.streaming.output import check_output

if TYPE_CHECKING:
    from rest_lightning.data.audio import SpeechSource
    from rest_lightning.data.portrait import Crop
    from rest_lightning.streaming.report import StreamReport
    from rest_lightning.streaming.session import StreamingSession
    from rest_lightning.streaming.writer import Mp4Writer
    from rest_lightning.talking_head import TalkingHead


@dataclass
class TalkOptions:
    """What ``rest talk`` does.

    Attributes:
        portrait, speech: files; speech ``-`` is a pipe.
        out: the mp4.
        model: model folder; None takes the embedded model.
        crop: of the portrait, see :func:`rest_lightning.data.portrait.read_portrait`.
        overwrite: whether existing outputs may be replaced.
        seed, num_steps, guidance, reference_guidance: see :meth:`rest_lightning.talking_head.TalkingHead.open`.
        report, sheet: JSON and PNG to write beside the video; None writes none.
        num_threads: of torch; None leaves its choice.
        dtype: of the model; ``auto`` takes bfloat16 on processors that compute it natively, else float32.
        device: of the model; ``auto`` takes a CUDA device where there is one.
        stdin: the pipe; None takes the process's own.
        quiet: without progress bar and table.
    """

    portrait: Path
    speech: str
    out: Path
    model: Path | None = None
    crop: Crop = "centre"
    overwrite: bool = False
    seed: int = 0
    num_steps: int | None = None
    guidance: float | None = None
    reference_guidance: float | None = None
    report: Path | None = None
    sheet: Path | None = None
    num_threads: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    stdin: BinaryIO | None = field(default=None, repr=False)
    quiet: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("portrait", type=Path, help="image of a face, the head filling most of it")
    parser.add_argument("speech", help='sound file, video, or "-" for a pipe')
    parser.add_argument("-o", "--out", type=Path, required=True, help="the mp4 to write")
    parser.add_argument("--crop", type=_crop, default="centre", help="centre (default), face, or x,y,width,height")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    parser.add_argument("--report", type=Path, help="also write the report as JSON")
    parser.add_argument("--sheet", type=Path, help="also write a contact sheet as PNG")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no table")
    add_model_arguments(parser)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments about the model, shared with ``rest demo``."""
    parser.add_argument("--model", type=Path, help="model folder (default: the embedded model)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    parser.add_argument("--steps", dest="num_steps", type=_positive, help="Euler steps a chunk (default: the model's)")
    parser.add_argument("--guidance", type=float, help="weight of guidance, 1 for none (default: the model's)")
    split = "weight of the reference alone (split guidance), 0 for joint guidance (default: the model's)"
    parser.add_argument("--reference-guidance", type=float, help=split)
    parser.add_argument("--threads", dest="num_threads", type=_positive, help="threads of torch (default: its choice)")
    types = "of the model: auto (default) is bfloat16 on processors that compute it natively, else float32"
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help=types)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")


def run(args: argparse.Namespace) -> int:
    """Make the video, the table and what else was asked for."""
    talk(TalkOptions(**vars(args)))
    return 0


def talk(options: TalkOptions) -> StreamReport:
    """Streams the speech through the model into the mp4. Everything that can be wrong is looked at before torch loads.

    Raises:
        UserError: portrait, speech, model or an output is not usable.
        KeyboardInterrupt: after Ctrl-C, with a message that says what was kept.
    """
    from rest_lightning.data.audio import open_speech
    from rest_lightning.data.portrait import MIN_SIDE_PX, read_portrait

    for path, suffix in ((options.out, ".mp4"), (options.report, ".json"), (options.sheet, ".png")):
        if path is not None:
            check_output(path, options.overwrite, suffix)
            _check_not_input(path, options)
    read_portrait(options.portrait, MIN_SIDE_PX, options.crop)
    speech = open_speech(options.speech, stdin=options.stdin)
    model = load_model(options)
    portrait = read_portrait(options.portrait, model.size_px, options.crop)
    report = _stream(model, portrait, speech, options)
    report.configuration |= {
        "portrait": str(options.portrait),
        "speech": options.speech,
        "model": str(options.model or "embedded"),
    }
    if options.report is not None:
        report.save(options.report)
    if options.sheet is not None:
        _draw_sheet(portrait, report, options)
    if not options.quiet:
        from rich.console import Console

        Console().print(report.table(f"{options.out}"))
    return report


def load_model(options: TalkOptions) -> TalkingHead:
    """The model on its device, with torch's threads set."""
    import torch

    from rest_lightning.talking_head import TalkingHead

    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise UserError(f"expected device auto, cpu or an available cuda, got {device}: try --device cpu")
    dtype = options.dtype
    if dtype == "auto":
        known = device == "cpu" and hasattr(torch.cpu, "get_capabilities")
        dtype = natural_dtype(torch.cpu.get_capabilities() if known else {})
    return TalkingHead.from_pretrained(options.model, device=device, dtype=getattr(torch, dtype))


def natural_dtype(capabilities: Mapping[str, Any]) -> str:
    """``bfloat16`` where a processor multiplies it natively (torch's names of capabilities), else ``float32``.

    Elsewhere bfloat16 is converted for every operation, which costs more than it saves.
    """
    return "bfloat16" if any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16")) else "float32"


def _stream(model: TalkingHead, portrait: np.ndarray, speech: SpeechSource, options: TalkOptions) -> StreamReport:
    from rest_lightning.streaming.writer import Mp4Writer

    writer = Mp4Writer(options.out, model.size_px, overwrite=options.overwrite)
    sampling = {name: getattr(options, name) for name in ("num_steps", "guidance", "reference_guidance")}
    try:
        with (
            writer,
            model.open(portrait, seed=options.seed, **sampling) as session,
            _Progress(speech.duration_s, options.quiet) as progress,
        ):
            for num_frames in _write_stream(session, speech, writer):
                progress.advance(num_frames)
            with session.clock.stage("writing"):
                writer.close()
            session.clock.stop()
            return session.report()
    except KeyboardInterrupt:
        if not writer.num_frames:
            raise
        raise KeyboardInterrupt(f"interrupted: kept {writer.duration_s:.2f} s of video in {options.out}") from None


def _write_stream(session: StreamingSession, speech: SpeechSource, writer: Mp4Writer) -> Iterator[int]:
    """Writes frames and the speech that belongs to them; yields numbers of frames.

    Speech is held back until its frames are there: in an interrupted video it ends with the pictures.
    """
    waiting: deque[np.ndarray] = deque()

    def listened() -> Iterator[np.ndarray]:
        for block in speech:
            waiting.append(block)
            yield block

    def write_audio_until(num_samples: int | None) -> None:
        while waiting and (num_samples is None or writer.num_samples < num_samples):
            block = waiting.popleft()
            if num_samples is not None and len(block) > (room := num_samples - writer.num_samples):
                waiting.appendleft(block[room:])
                block = block[:room]
            writer.write_audio(block)

    for frames in session.stream(listened()):
        with session.clock.stage("writing"):
            writer.write(frames)
            write_audio_until(writer.num_frames * SAMPLES_PER_FRAME)
        yield len(frames)
    with session.clock.stage("writing"):
        write_audio_until(None)


class _Progress:
    """A bar on stderr: frames, frames per second, times real time; without a total for pipes."""

    def __init__(self, duration_s: float | None, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        total = None if duration_s is None else -(-round(duration_s * SAMPLE_RATE) // SAMPLES_PER_FRAME)
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("talking"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("frames  {task.fields[speed]}"),
            Remaining(),
            console=Console(stderr=True),
            disable=quiet,
        )
        self._task = self._bar.add_task("talking", total=total, speed="")

    def advance(self, num_frames: int) -> None:
        """Counts frames that are written."""
        self._bar.update(self._task, advance=num_frames)
        task = self._bar.tasks[self._task]
        if task.elapsed:
            speed = task.completed / task.elapsed
            self._bar.update(self._task, speed=f"{speed:.1f} fps  {speed / FPS:.2f} x real time")

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _draw_sheet(portrait: np.ndarray, report: StreamReport, options: TalkOptions) -> None:
    from rest_lightning.metrics.mouth import mouth_opening, shipped_estimator
    from rest_lightning.streaming.sheet import draw_contact_sheet

    assert options.sheet is not None
    try:
        shipped_estimator()
        measure = mouth_opening
    except UserError as error:
        print(f"note: the contact sheet has no mouth opening: {error}", file=sys.stderr)
        measure = None
    draw_contact_sheet(options.sheet, options.out, portrait, measure, figures=sheet_figures(report))


def sheet_figures(report: StreamReport) -> dict[str, str]:
    """Key figures for the title of a contact sheet."""
    first_ms, p50, p95 = report.time_to_first_frame_ms, report.chunk_ms["p50"], report.chunk_ms["p95"]
    return {
        "frames": f"{report.num_frames:,}",
        "video": f"{report.video_s:.1f} s",
        "end to end": f"{report.frames_per_second:.1f} fps",
        "real time": f"{report.real_time_factor:.2f} x",
        "first frame": "-" if first_ms is None else f"{first_ms:.0f} ms",
        "per chunk p50 / p95": "-" if p50 is None or p95 is None else f"{p50:.0f} / {p95:.0f} ms",
        "peak memory": f"{report.peak_memory_mb:,.0f} MB",
    }


def _check_not_input(path: Path, options: TalkOptions) -> None:
    for given in (options.portrait, Path(options.speech)):
        if path.exists() and given.exists() and os.path.samefile(path, given):
            raise UserError(f"expected an output that is not an input, got {path} for both: choose another name")


def _crop(text: str) -> Any:
    if text in ("centre", "face"):
        return text
    try:
        values = tuple(float(value) for value in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 4:
        raise argparse.ArgumentTypeError(f"expected centre, face or x,y,width,height, got {text!r}")
    return values


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)
