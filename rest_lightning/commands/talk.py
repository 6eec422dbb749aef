"""Make a talking video of a portrait and speech, streamed chunk by chunk.

The speech may be any sound file or the sound of a video; "-" reads raw 16 kHz mono s16le samples from a pipe, block by
block as they arrive. "-o -" sends the video to a pipe as it is made. Ctrl-C keeps the video of what was done so far.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from rest_lightning.constants import FPS, TEMPORAL_RATIO
from rest_lightning.dtypes import dtype_on
from rest_lightning.errors import UserError
from rest_lightning.streaming.output import check_output

if TYPE_CHECKING:
    from rich.console import Console

    from rest_lightning.data.audio import SpeechSource
    from rest_lightning.data.portrait import Crop
    from rest_lightning.streaming.pipe import PipeFormat
    from rest_lightning.streaming.report import StreamReport
    from rest_lightning.streaming.writer import VideoWriter
    from rest_lightning.talking_head import TalkingHead


@dataclass
class TalkOptions:
    """What ``rest talk`` does.

    Attributes:
        portrait, speech: files; speech ``-`` is a pipe.
        out: the mp4; ``-`` is a pipe.
        model: model folder; None takes the embedded model.
        crop: of the portrait, see :func:`rest_lightning.data.portrait.read_portrait`.
        overwrite: whether existing outputs may be replaced.
        seed, num_steps, guidance, reference_guidance: see :meth:`rest_lightning.talking_head.TalkingHead.open`.
        report, sheet: JSON and PNG to write beside the video; None writes none.
        num_threads: of torch; None leaves its choice.
        dtype: of the model; ``auto`` takes bfloat16 on processors that compute it natively, else float32.
        device: of the model; ``auto`` takes a CUDA device where there is one.
        stdin, stdout: the pipes; None takes the process's own.
        quiet: without progress bar and table.
        live: put silence where the pipe pauses, see :class:`rest_lightning.streaming.live.LiveSpeech`.
        format: of the video in a pipe: ``mp4`` (fragmented, with sound; the default) or ``rgb24``.
        profile: JSON for a Chrome trace of three chunks, see :class:`rest_lightning.streaming.profile.ChunkProfiler`.
    """

    portrait: Path
    speech: str
    out: Path
    model: Path | None = None
    crop: Crop = "auto"
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
    live: bool = False
    format: PipeFormat | None = None
    profile: Path | None = None
    stdout: BinaryIO | None = field(default=None, repr=False)

    @property
    def to_pipe(self) -> bool:
        """Whether the video goes to ``stdout``."""
        return str(self.out) == "-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("portrait", type=Path, help="image of a face, the head filling most of it")
    parser.add_argument("speech", help='sound file, video, or "-" for a pipe')
    parser.add_argument("-o", "--out", type=Path, required=True, help='the mp4 to write, or "-" for a pipe')
    parser.add_argument("--format", choices=("mp4", "rgb24"), help="in a pipe: fragmented mp4 (default), or raw frames")
    parser.add_argument("--live", action="store_true", help="put silence where the speech in the pipe pauses")
    crops = "auto (default: the head that is found), centre, x,y,size or x,y,width,height"
    parser.add_argument("--crop", type=_crop, default="auto", help=crops)
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    parser.add_argument("--report", type=Path, help="also write the report as JSON")
    parser.add_argument("--sheet", type=Path, help="also write a contact sheet as PNG")
    profile = "also write a Chrome trace (JSON) of three chunks, and print where their time went"
    parser.add_argument("--profile", type=Path, help=profile)
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no table")
    add_model_arguments(parser)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments about the model, shared with ``rest demo``."""
    parser.add_argument("--model", type=Path, help="model folder (default: the embedded model)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    parser.add_argument("--steps", dest="num_steps", type=positive, help="Euler steps a chunk (default: the model's)")
    parser.add_argument("--guidance", type=float, help="weight of guidance, 1 for none (default: the model's)")
    split = "weight of the reference alone (split guidance), 0 for joint guidance (default: the model's)"
    parser.add_argument("--reference-guidance", type=float, help=split)
    parser.add_argument("--threads", dest="num_threads", type=positive, help="threads of torch (default: its choice)")
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
    from rest_lightning.data.portrait import find_portrait

    _check_outputs(options)
    found = find_portrait(options.portrait, options.crop, option="--crop")
    if not options.quiet:
        for note in found.notes:
            print(f"note: {note}", file=sys.stderr)
    speech = open_speech(options.speech, stdin=options.stdin)
    model = load_model(options)
    portrait = found.square(model.size_px)
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
        _console(options).print(report.table(f"{options.out}"))
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
    dtype = dtype_on(options.dtype, device.partition(":")[0])
    return TalkingHead.from_pretrained(options.model, device=device, dtype=dtype)


def _stream(model: TalkingHead, portrait: np.ndarray, speech: SpeechSource, options: TalkOptions) -> StreamReport:
    from rest_lightning.commands._progress import TalkProgress
    from rest_lightning.streaming.background import BackgroundWriter, write_stream
    from rest_lightning.streaming.live import LiveSpeech
    from rest_lightning.streaming.profile import ChunkProfiler

    writer = _open_writer(model, options)
    sampling = {name: getattr(options, name) for name in ("num_steps", "guidance", "reference_guidance")}
    try:
        # The reader of a pipe may be slow: that must not stop the model, whatever the cores.
        with BackgroundWriter(writer, threaded=options.to_pipe or None) as background:
            session = model.open(portrait, seed=options.seed, **sampling)
            blocks: Iterable[np.ndarray] = speech
            if options.live:
                blocks = LiveSpeech(speech, model.transformer.cache_options.chunk_length * TEMPORAL_RATIO / FPS)
            with (
                session,
                TalkProgress(speech.duration_s, options.quiet) as progress,
                ChunkProfiler(session.clock, options.profile) as profiler,
            ):
                for num_frames in write_stream(session, blocks, background):
                    progress.advance(num_frames)
                    profiler.step()
                with session.clock.stage("writing"):
                    background.close()
                session.clock.stop()
        report = session.report()
        report.configuration["writing_thread"] = background.threaded
        report.configuration["writing_thread_s"] = round(background.busy_s, 3)
    except KeyboardInterrupt:
        if not writer.num_frames:
            raise
        kept = "sent" if options.to_pipe else "kept"
        where = "to stdout" if options.to_pipe else f"in {options.out}"
        raise KeyboardInterrupt(f"interrupted: {kept} {writer.duration_s:.2f} s of video {where}") from None
    except BrokenPipeError:
        if not options.quiet:
            print(f"the reader of stdout has gone after {writer.duration_s:.2f} s of video", file=sys.stderr)
        raise
    if options.profile is not None and not options.quiet:
        _console(options).print(profiler.table())
    return report


def _open_writer(model: TalkingHead, options: TalkOptions) -> VideoWriter:
    if options.to_pipe:
        from rest_lightning.streaming.pipe import open_pipe

        return open_pipe(options.stdout or sys.stdout.buffer, model.size_px, options.format or "mp4")
    from rest_lightning.streaming.writer import Mp4Writer

    return Mp4Writer(options.out, model.size_px, overwrite=options.overwrite)


def _console(options: TalkOptions) -> Console:
    """Where tables go: stdout, unless the video goes there."""
    from rich.console import Console

    return Console(stderr=options.to_pipe)


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


def _check_outputs(options: TalkOptions) -> None:
    """Everything about the outputs that can be known before the work begins."""
    if options.to_pipe:
        if (options.stdout or sys.stdout).isatty():
            raise UserError('expected a pipe or a file for "-o -", got a terminal: add `| ffplay -` or `> out.mp4`')
        if options.sheet is not None:
            raise UserError("expected a video file for --sheet, got a pipe: write to a file, or leave --sheet out")
    elif options.format == "rgb24":
        raise UserError(f"expected a pipe for --format rgb24, got {options.out}: use -o - > FILE")
    if options.live and options.speech != "-":
        raise UserError(f'expected a pipe ("-") for --live, got {options.speech}: leave --live out')
    video = None if options.to_pipe else options.out
    outputs = ((video, ".mp4"), (options.report, ".json"), (options.sheet, ".png"), (options.profile, ".json"))
    for path, suffix in outputs:
        if path is not None:
            check_output(path, options.overwrite, suffix)
            _check_not_input(path, options)


def _check_not_input(path: Path, options: TalkOptions) -> None:
    for given in (options.portrait, Path(options.speech)):
        if path.exists() and given.exists() and os.path.samefile(path, given):
            raise UserError(f"expected an output that is not an input, got {path} for both: choose another name")


def _crop(text: str) -> Any:
    from rest_lightning.data.portrait import parse_crop

    try:
        return parse_crop(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)
