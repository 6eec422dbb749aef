"""How fast are raw videos prepared, and does memory depend on their length or their resolution?

``python -m benchmarks.preparation --out benchmarks/results/preparation.json``; ``--minutes 120
--heights 2160 --fps 2`` is two hours of 4K, in half an hour: its length after preparation is that
of any other fps.

A synthetic talker stands in a larger frame. A few seconds are encoded once, and their packets are
written again and again with later time stamps: any length at no cost. Every file is prepared in a
process of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks._result import origin, write_result
from rest_lightning.constants import FPS, SAMPLE_RATE
from rest_lightning.errors import UserError, exit_code
from rest_lightning.machine import peak_memory_mb, resident_memory_mb

GROUP_S = 8  # encoded once: a whole number of frames and samples
FACE_SHARE = 0.45  # side of the talker's picture in the frame's height
NUM_SAMPLES_OF_MEMORY = 40


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return exit_code(lambda: run(parse(arguments)))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--minutes", type=float, nargs="+", default=[0.5, 2.0], help="lengths (default 0.5 2)"
    )
    parser.add_argument(
        "--heights", type=int, nargs="+", default=[360, 2160], help=("of 16:9 (default 360 2160)")
    )
    parser.add_argument(
        "--fps",
        type=int,
        default=FPS,
        help=("of the videos (default 25); fewer are decoded faster"),
    )
    parser.add_argument("--size-px", type=int, default=256, help="of the clips (default 256)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/preparation.json"))
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> int:
    """Measure, write after every file, print."""
    if min(args.minutes) * 60 < GROUP_S or min(args.heights) < 180 or not 1 <= args.fps <= 60:
        text = (
            f"expected --minutes of at least {GROUP_S / 60:.2f}, --heights of at least 180, "
            "--fps of 1 to 60"
        )
        raise UserError(f"{text}, got {args.minutes}, {args.heights}, {args.fps}: leave them out")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"files": [], **origin(args)}
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for height, minutes in product(args.heights, args.minutes):
            file = Path(folder) / "raw" / f"{height}p_{minutes:g}min.mkv"
            make_video(file, height, minutes, args.fps)
            with context.Pool(1) as pool:  # a fresh process each: its peak memory is this file's
                row = pool.apply(measure, (file, Path(folder) / file.stem, args.size_px, args.fps))
            row = {"height_px": height, "minutes": minutes, "fps": args.fps, **row}
            result["files"].append(row)
            write_result(args.out, result)
            file.unlink()
            told = (
                f"{row['frames_per_s']:.1f} frames/s, peak {row['peak_memory_mb']:.0f} MB, "
                f"{row['num_kept']} clips"
            )
            print(f"{height:5}p {minutes:7g} min: {told}", flush=True)
    print(f"wrote {args.out}")
    return 0


def make_video(path: Path, height: int, minutes: float, fps: int) -> None:
    """A talker with sound, 16:9, H.264 and PCM in Matroska."""
    path.parent.mkdir(parents=True, exist_ok=True)
    packets, template = _group(path.with_suffix(".group.mkv"), height, fps)
    with av.open(template) as source, av.open(str(path), "w") as target:
        streams = [target.add_stream_from_template(stream) for stream in source.streams]
        for turn in range(round(60 * minutes / GROUP_S)):
            for kind, pts, data, is_key, time_base in packets:
                packet = av.Packet(data)
                packet.stream, packet.time_base, packet.is_keyframe = (
                    streams[kind],
                    time_base,
                    is_key,
                )
                packet.pts = packet.dts = pts + round(turn * GROUP_S / time_base)
                target.mux(packet)
    Path(template).unlink()


def _group(
    path: Path, height: int, fps: int
) -> tuple[list[tuple[int, int, bytes, bool, Fraction]], str]:
    """Encodes a few seconds; gives their packets (stream, pts, bytes, key frame, time base) and the
    file's name.
    """
    from rest_lightning.data.synthetic.synthesize import synthesize_clip

    clip = synthesize_clip(0, seed=0, size_px=256, num_frames=GROUP_S * FPS)
    width, side = 2 * round(height * 8 / 9), round(FACE_SHARE * height)
    with av.open(str(path), "w") as container:
        video: Any = container.add_stream(
            "libx264", fps, options={"preset": "veryfast", "g": "1000", "bf": "0"}
        )
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        sound: Any = container.add_stream("pcm_s16le", SAMPLE_RATE, layout="mono")
        still = _still(width, height)
        for number in range(GROUP_S * fps):
            face = Image.fromarray(clip.frames[number * FPS // fps]).resize((side, side))
            scene = still.copy()
            scene[height // 4 : height // 4 + side, width // 3 : width // 3 + side] = np.asarray(
                face
            )
            frame = av.VideoFrame.from_ndarray(scene, "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        samples = np.round(clip.audio * 32767).astype(np.int16)[None]
        block = av.AudioFrame.from_ndarray(samples, "s16", "mono")
        block.sample_rate, block.pts = SAMPLE_RATE, 0
        container.mux([*sound.encode(block), *sound.encode(None)])
    with av.open(str(path)) as container:
        packets = [
            (packet.stream.index, packet.pts, bytes(packet), packet.is_keyframe, packet.time_base)
            for packet in container.demux()
            if packet.pts is not None and packet.time_base is not None
        ]
    return packets, str(path)


def _still(width: int, height: int) -> NDArray[np.uint8]:
    """A background of soft patches."""
    patches = np.random.default_rng(0).integers(40, 200, (9, 16, 3), dtype=np.uint8)
    return np.array(Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC))


def measure(path: Path, out: Path, size_px: int, fps: int) -> dict[str, Any]:
    """Prepare one video of ``fps`` frames a second in this process."""
    from rest_lightning.data.preparation.options import PrepareOptions
    from rest_lightning.data.preparation.work import prepare_video

    with resident_memory() as memory_mb:
        start_s = time.perf_counter()
        options = PrepareOptions(size_px=size_px, min_fps=min(float(fps), PrepareOptions.min_fps))
        rows = prepare_video(path, path.parent, out, options)
        took_s = time.perf_counter() - start_s
    num_frames = sum(row.num_frames or 0 for row in rows)
    return {
        "num_frames": num_frames,
        "num_kept": sum(row.status == "kept" for row in rows),
        "reasons": sorted({str(row.reason) for row in rows if row.status != "kept"}),
        "seconds": took_s,
        "frames_per_s": num_frames / took_s,
        "peak_memory_mb": peak_memory_mb(),
        "memory_mb_over_time": thinned(memory_mb),
    }


@contextmanager
def resident_memory(period_s: float = 1.0) -> Iterator[list[float]]:
    """Resident memory of this process in MB, once a period, for as long as the block runs."""
    values: list[float] = []
    done = threading.Event()

    def look() -> None:
        while not done.wait(period_s):
            values.append(resident_memory_mb())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield values
    finally:
        done.set()
        thread.join()


def thinned(values: list[float]) -> list[float]:
    """At most `NUM_SAMPLES_OF_MEMORY`, evenly spread."""
    step = -(-len(values) // NUM_SAMPLES_OF_MEMORY) or 1
    return [round(value, 1) for value in values[::step]]


if __name__ == "__main__":
    sys.exit(main())
