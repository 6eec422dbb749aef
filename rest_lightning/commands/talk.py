"""Make a talking video of a portrait and speech, streamed chunk by chunk.

The speech may be any sound file or the sound of a video; "-" reads raw 16 kHz mono s16le samples
from a pipe, block by block as they arrive. "-o -" sends the video to a pipe as it is made. Ctrl-C
keeps the video of what was done so far.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np

from rest_lightning.constants import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME
from rest_lightning.errors import Terminated, UserError, note, run_async
from rest_lightning.machine import spin_briefly
from rest_lightning.media.files import check_output
from rest_lightning.terminal import is_closed

if TYPE_CHECKING:
    from rich.console import Console

    from rest_lightning.media.audio import SpeechSource
    from rest_lightning.media.level import LevelMeter
    from rest_lightning.media.photo import PhotoFrames
    from rest_lightning.media.portrait import Crop
    from rest_lightning.media.provenance import Signer
    from rest_lightning.media.writer import (
        BackgroundWriter,
        InterruptiblePipe,
        PipeFormat,
        VideoWriter,
    )
    from rest_lightning.streaming.report import StreamReport
    from rest_lightning.talking_head import ModelOptions, TalkingHead

_FULL_S = 0.01  # from one try to the next where the writer of a live video has enough


@dataclass
class TalkOptions:
    """What ``rest talk`` does.

    Attributes:
        portrait, speech: files; speech ``-`` is a pipe.
        out: the mp4; ``-`` is a pipe.
        model: model folder; None takes the bundled model.
        crop: of the portrait, see :func:`rest_lightning.media.portrait.read_portrait`.
        frame: what the video shows: the square around the ``head``, or the whole ``photo`` with it.
        overwrite: whether existing outputs may be replaced.
        seed, num_steps, guidance, reference_guidance: see
            :meth:`rest_lightning.talking_head.TalkingHead.open`.
        chunk_length: latents per chunk, where the model was trained for several; None takes its
            default.
        detail: of the portrait, see :class:`rest_lightning.streaming.engine.EngineOptions`.
        size_px: side of the square frames, the model's own or twice that; None takes the model's.
        report, sheet: JSON and PNG to write beside the video; None writes none.
        num_threads: of torch; None leaves its choice.
        dtype: of the model; ``auto`` takes bfloat16 on processors that compute it natively, else
            float32.
        device: of the model; ``auto`` takes a CUDA device where there is one.
        stdin, stdout: the pipes; None takes the process's own.
        quiet: without progress bar and table.
        live: keep the pace of the clock, with an idle face where the pipe pauses, see
            :func:`rest_lightning.avatar.speak`.
        format: of the video in a pipe: ``mp4`` (fragmented, with sound; the default) or ``rgb24``.
        profile: JSON for a Chrome trace of three chunks, see
            :class:`rest_lightning.streaming.report.ChunkProfiler`.
        sign: certificate and key (PEM) that sign the mp4, see
            :mod:`rest_lightning.media.provenance`; None leaves it unsigned.
    """

    portrait: Path
    speech: str
    out: Path
    model: Path | None = None
    crop: Crop = "auto"
    frame: Literal["head", "photo"] = "head"
    overwrite: bool = False
    seed: int = 0
    num_steps: int | None = None
    guidance: float | None = None
    reference_guidance: float | None = None
    chunk_length: int | None = None
    detail: Literal["model", "agreement", "none"] = "model"
    size_px: int | None = None
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
    sign: Sequence[Path] | None = None

    @property
    def to_pipe(self) -> bool:
        """Whether the video goes to ``stdout``."""
        return str(self.out) == "-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "portrait", type=Path, help="photograph of a person; the head is found in it"
    )
    parser.add_argument("speech", help='sound file, video, or "-" for a pipe')
    parser.add_argument(
        "-o", "--out", type=Path, required=True, help='the mp4 to write, or "-" for a pipe'
    )
    parser.add_argument(
        "--format",
        choices=("mp4", "rgb24"),
        help="in a pipe: fragmented mp4 (default), or raw frames",
    )
    parser.add_argument(
        "--live",
        action="store_true",
        help="keep the pace of the clock: the face idles where the speech in the pipe pauses",
    )
    crops = "auto (default: the head that is found), centre, x,y,size or x,y,width,height"
    parser.add_argument("--crop", type=_crop, default="auto", help=crops)
    frame = "what the video shows: the square around the head (default), or the whole photo with it"
    parser.add_argument("--frame", choices=("head", "photo"), default="head", help=frame)
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    parser.add_argument("--report", type=Path, help="also write the report as JSON")
    parser.add_argument("--sheet", type=Path, help="also write a contact sheet as PNG")
    profile = "also write a Chrome trace (JSON) of three chunks, and print where their time went"
    parser.add_argument("--profile", type=Path, help=profile)
    add_sign_argument(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no table")
    add_model_arguments(parser)


def add_sign_argument(parser: argparse.ArgumentParser, what: str = "the mp4") -> None:
    """The argument of commands that sign what they make."""
    sign = f"sign {what} with this certificate and its key, PEM (C2PA; extra `provenance`)"
    parser.add_argument("--sign", nargs=2, type=Path, metavar=("CERT", "KEY"), help=sign)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments about the model and its sampling, shared with ``rest demo``."""
    add_loading_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    parser.add_argument(
        "--steps",
        dest="num_steps",
        type=positive,
        help="Euler steps a chunk (default: the model's)",
    )
    parser.add_argument(
        "--guidance", type=float, help="weight of guidance, 1 for none (default: the model's)"
    )
    split = (
        "weight of the reference alone (split guidance), 0 for joint guidance (default: the "
        "model's)"
    )
    parser.add_argument("--reference-guidance", type=float, help=split)
    detail = (
        "of the portrait, in every frame: model (default: the model's own way), agreement "
        "(closed form) or none"
    )
    parser.add_argument(
        "--detail", choices=("model", "agreement", "none"), default="model", help=detail
    )
    size = (
        "side of the frames: the model's own (default) or twice that, with the photograph's detail"
    )
    parser.add_argument("--size", dest="size_px", type=positive, metavar="PX", help=size)


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that every command has which loads a model: those of
    :class:`~rest_lightning.talking_head.ModelOptions`.
    """
    parser.add_argument("--model", type=Path, help=MODEL_HELP)
    chunk = (
        "latents of 0.32 s per chunk, where the model was trained for several: short ones "
        "answer sooner"
    )
    parser.add_argument("--chunk-length", type=positive, help=chunk)
    parser.add_argument(
        "--threads",
        dest="num_threads",
        type=positive,
        help="threads of torch (default: its choice)",
    )
    types = (
        "of the model: auto (default) is bfloat16 on processors that compute it natively, "
        "else float32"
    )
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help=types
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")


def model_options(args: argparse.Namespace | TalkOptions) -> ModelOptions:
    """Returns what the arguments of :func:`add_loading_arguments` say."""
    from rest_lightning.talking_head import ModelOptions

    return ModelOptions(**{each.name: getattr(args, each.name) for each in fields(ModelOptions)})


def run(args: argparse.Namespace) -> int:
    """Make the video, the table and what else was asked for."""
    spin_briefly()
    talk(TalkOptions(**vars(args)))
    return 0


def talk(options: TalkOptions) -> StreamReport:
    """Streams the speech through the model into the mp4. Everything that can be wrong is looked at
    before torch loads.

    Raises:
        UserError: portrait, speech, model or an output is not usable.
        KeyboardInterrupt: after Ctrl-C, with a message that says what was kept.
    """
    from rest_lightning.media.audio import open_speech
    from rest_lightning.media.portrait import find_portrait

    _check_outputs(options)
    signer = None
    if options.sign is not None:
        from rest_lightning.media.provenance import load_signer

        signer = load_signer(*options.sign)
    found = find_portrait(options.portrait, options.crop, option="--crop")
    if not options.quiet:
        for line in found.notes:
            note(line)
    speech = open_speech(options.speech, stdin=options.stdin)
    for line in speech.notes:
        note(line)
    from rest_lightning.talking_head import DEFAULT_MODEL

    model = model_options(options).load()
    size_px = _sampling(options)["options"].output_px(model.size_px)
    small = found.small_note(size_px)
    if small is not None and size_px > model.size_px and not options.quiet:
        note(small)
    portrait = found.square(size_px)
    compose = None
    if options.frame == "photo":
        from rest_lightning.media.photo import PhotoFrames

        compose = PhotoFrames(found)
    report = _stream(model, portrait, speech, options, compose, signer)
    report.configuration |= {
        "portrait": str(options.portrait),
        "speech": options.speech,
        "model": str(options.model or DEFAULT_MODEL),
    }
    if options.report is not None:
        report.save(options.report)
    if options.sheet is not None:
        _draw_sheet(portrait, report, options)
    if not options.quiet:
        _console(options).print(report.table(f"{options.out}"))
    return report


def _stream(
    model: TalkingHead,
    portrait: np.ndarray,
    speech: SpeechSource,
    options: TalkOptions,
    compose: PhotoFrames | None,
    signer: Signer | None,
) -> StreamReport:
    from rest_lightning.media.writer import BackgroundWriter, InterruptiblePipe

    size = len(portrait) if compose is None else (compose.height, compose.width)
    pipe = _open_pipe(options) if options.to_pipe else None
    writer = _open_writer(size, options, signer, pipe)
    let_go = pipe.let_go if isinstance(pipe, InterruptiblePipe) else None
    try:
        # The reader of a pipe may be slow: that must not stop the model, whatever the cores.
        with BackgroundWriter(
            writer,
            threaded=options.live or options.to_pipe or None,
            compose=compose,
            let_go=let_go,
        ) as background:
            if options.live:
                live = _stream_live(model, portrait, speech, options, background)
                report, level = run_async(live)
                start_s = time.perf_counter()
                background.close()
                report.stage_s["writing"] += time.perf_counter() - start_s
            else:
                report, level = _stream_chunks(model, portrait, speech, options, background)
        if speech.pipe is not None:
            for line in level.notes():
                note(line)
        report.configuration["writing_thread"] = background.threaded
        report.configuration["writing_thread_s"] = round(background.busy_s, 3)
    except KeyboardInterrupt as interrupt:
        if not writer.num_frames:
            raise
        kept = "sent" if options.to_pipe else "kept"
        where = "to stdout" if options.to_pipe else f"in {options.out}"
        raise KeyboardInterrupt(
            f"interrupted: {kept} {writer.duration_s:.2f} s of video {where}"
        ) from (interrupt if isinstance(interrupt, Terminated) else None)
    except BrokenPipeError:
        if not options.quiet:
            print(
                f"the reader of stdout has gone after {writer.duration_s:.2f} s of video",
                file=sys.stderr,
            )
        raise
    return report


def _stream_chunks(
    model: TalkingHead,
    portrait: np.ndarray,
    speech: SpeechSource,
    options: TalkOptions,
    background: BackgroundWriter,
) -> tuple[StreamReport, LevelMeter]:
    """Writes the speech chunk by chunk, as fast as the model computes them."""
    from rest_lightning.streaming.report import ChunkProfiler
    from rest_lightning.streaming.session import write_stream

    session = model.open(portrait, seed=options.seed, **_sampling(options))
    with (
        session,
        TalkProgress(speech.duration_s, options.quiet) as progress,
        ChunkProfiler(session.clock, options.profile) as profiler,
    ):
        for num_frames in write_stream(session, speech, background):
            progress.advance(num_frames)
            profiler.step()
        with session.clock.stage("writing"):
            background.close()
        session.clock.stop()
    if options.profile is not None and not options.quiet:
        _console(options).print(profiler.table())
    return session.report(), session.level


async def _stream_live(
    model: TalkingHead,
    portrait: np.ndarray,
    speech: SpeechSource,
    options: TalkOptions,
    background: BackgroundWriter,
) -> tuple[StreamReport, LevelMeter]:
    """Writes an avatar that says the speech as it comes, at the pace of the clock."""
    from rest_lightning.avatar import Avatar, AvatarPool, AvatarSettings, ModelError, speak
    from rest_lightning.media.level import LevelMeter
    from rest_lightning.streaming.session import as_reference

    level = LevelMeter()

    def listened() -> Iterator[np.ndarray]:
        for block in speech:
            level.add(block)
            yield block

    reference = as_reference(portrait, len(portrait))[0]
    settings = AvatarSettings(seed=options.seed, sample_rate=SAMPLE_RATE)
    pool = AvatarPool(model, **_sampling(options))
    writing_s = 0.0
    try:
        async with pool, Avatar(reference, pool, settings) as avatar:
            with TalkProgress(None, options.quiet) as progress:
                async for frame in speak(avatar, listened()):
                    sound = frame.samples.astype(np.float32)  # silence is int16 until speech comes
                    start_s = time.perf_counter()
                    # No thread may wait here for a reader: Ctrl-C could not end it.
                    while not background.offer(frame.picture[None], sound):
                        await asyncio.sleep(_FULL_S)
                    writing_s += time.perf_counter() - start_s
                    progress.advance(1)
            report, stats = pool.report(), avatar.stats
    except ModelError as error:
        raise UserError(str(error)) from error
    report.num_frames = stats.num_frames
    report.stage_s["writing"] = writing_s
    report.configuration |= {"live": True, "num_held": stats.num_held}
    if stats.num_held:
        note(
            f"the model was too slow for {stats.num_held} of {stats.num_frames} frames, which show "
            "the picture before them in silence: take fewer --steps"
        )
    return report, level


def _sampling(options: TalkOptions) -> dict[str, Any]:
    """How the model is sampled, as :meth:`TalkingHead.open` and its batch take it."""
    from rest_lightning.streaming.engine import EngineOptions

    names = ("num_steps", "guidance", "reference_guidance")
    given = {name: getattr(options, name) for name in names}
    engine = EngineOptions(detail=options.detail, size_px=options.size_px)
    return {"options": engine, **given}


def _open_pipe(options: TalkOptions) -> BinaryIO | InterruptiblePipe:
    from rest_lightning.media.writer import InterruptiblePipe

    try:
        return InterruptiblePipe(options.stdout or sys.stdout.buffer)
    except OSError:  # an object in memory
        return options.stdout or sys.stdout.buffer


def _open_writer(
    size_px: int | tuple[int, int],
    options: TalkOptions,
    signer: Signer | None,
    pipe: BinaryIO | InterruptiblePipe | None,
) -> VideoWriter:
    if pipe is not None:
        from rest_lightning.media.writer import open_pipe

        return open_pipe(pipe, size_px, options.format or "mp4")
    from rest_lightning.media.writer import Mp4Writer

    return Mp4Writer(options.out, size_px, overwrite=options.overwrite, signer=signer)


def _console(options: TalkOptions) -> Console:
    """Where tables go: stdout, unless the video goes there."""
    from rich.console import Console

    return Console(stderr=options.to_pipe)


def _draw_sheet(portrait: np.ndarray, report: StreamReport, options: TalkOptions) -> None:
    from rest_lightning.media.face_models import mouth_openings
    from rest_lightning.media.sheet import draw_contact_sheet

    assert options.sheet is not None
    figures = sheet_figures(report)
    draw_contact_sheet(options.sheet, options.out, portrait, mouth_openings, figures=figures)


def sheet_figures(report: StreamReport) -> dict[str, str]:
    """Key figures for the title of a contact sheet."""
    first_ms, p50, p95 = (
        report.time_to_first_frame_ms,
        report.chunk_ms["p50"],
        report.chunk_ms["p95"],
    )
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
        if is_closed(options.stdout or sys.stdout):
            raise UserError('expected a pipe or a file for "-o -", got a closed stdout: open it')
        if (options.stdout or sys.stdout).isatty():
            raise UserError(
                'expected a pipe or a file for "-o -", got a terminal: add `| ffplay -` or `> '
                "out.mp4`"
            )
        if options.sheet is not None:
            raise UserError(
                "expected a video file for --sheet, got a pipe: write to a file, or leave --sheet "
                "out"
            )
        if options.sign is not None:
            raise UserError(
                "expected a video file for --sign, got a pipe: a signature covers the whole video, "
                "so write to a file, or leave --sign out"
            )
    elif options.format == "rgb24":
        raise UserError(f"expected a pipe for --format rgb24, got {options.out}: use -o - > FILE")
    if options.live and options.speech != "-":
        raise UserError(f'expected a pipe ("-") for --live, got {options.speech}: leave --live out')
    if options.live and options.profile is not None:
        raise UserError(
            "expected --profile without --live, whose model works in a thread of its own, got "
            "both: leave one of them out"
        )
    video = None if options.to_pipe else options.out
    outputs = (
        (video, ".mp4"),
        (options.report, ".json"),
        (options.sheet, ".png"),
        (options.profile, ".json"),
    )
    for path, suffix in outputs:
        if path is not None:
            check_output(path, options.overwrite, suffix)
            _check_not_input(path, options)


def _check_not_input(path: Path, options: TalkOptions) -> None:
    for given in (options.portrait, Path(options.speech)):
        if path.exists() and given.exists() and path.samefile(given):
            raise UserError(
                f"expected an output that is not an input, got {path} for both: choose another name"
            )


def _crop(text: Any) -> Any:
    from rest_lightning.media.portrait import parse_crop

    if not isinstance(text, str):  # the parser checks values of its own, too
        return text
    try:
        return parse_crop(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive(text: str | int) -> int:
    """Returns a number of at least 1, as argparse reads it."""
    if not str(text).isdecimal() or int(text) < 1:  # the parser checks numbers of its own, too
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


class TalkProgress:
    """A bar on stderr: frames, frames per second, times real time; without a total for pipes."""

    def __init__(self, duration_s: float | None, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        total = (
            None if duration_s is None else -(-round(duration_s * SAMPLE_RATE) // SAMPLES_PER_FRAME)
        )
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

    def __enter__(self) -> TalkProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


MODEL_HELP = "model folder, or org/name on the hub (default: the bundled model, people at 256 px)"
ASSETS = Path(__file__).resolve().parent.parent / "assets"
SPEECH = ASSETS / "speech.wav"


def add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "--out", type=Path, default=Path("outputs"), help="folder (default outputs)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no table")
    add_model_arguments(parser)


def run_demo(args: argparse.Namespace) -> int:
    """Stream the bundled portrait and speech to OUT/demo.mp4, with demo.json (a report) and
    demo.png (a sheet).
    """
    spin_briefly()
    options = vars(args)
    folder: Path = options.pop("out")
    if folder.exists() and not folder.is_dir():
        raise UserError(
            f"expected a folder for the demo, got the file {folder}: choose another name with --out"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"expected to make {folder}, got '{error.strerror}': choose another --out"
        ) from error
    from rest_lightning.talking_head import find_model, portraits_in

    portrait = portraits_in(find_model(options["model"]))[0]
    video, report, sheet = (folder / f"demo{suffix}" for suffix in (".mp4", ".json", ".png"))
    talk(
        TalkOptions(
            portrait, str(SPEECH), video, overwrite=True, report=report, sheet=sheet, **options
        )
    )
    if not options["quiet"]:
        print("\n".join(f"wrote {path}" for path in (video, report, sheet)))
    return 0
