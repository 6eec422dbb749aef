"""How fast are prepared clips read, by what, and does the trainer wait for them?

``python -m benchmarks.reading --data data/talkers --out benchmarks/results/reading.json``

Random windows per second from clips as `rest prepare` writes them, by library, loader processes,
size and distance of key frames; then the stages of `rest train-embedded` for some steps each: how
much of a step is waiting for its batch.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks._data_wait import STAGE_NAMES, TARGET_WAIT_SHARE, measure_waits
from benchmarks._result import origin, write_result
from rest_lightning.data.layout import clip_path, read_manifest
from rest_lightning.data.preparation.options import PrepareOptions
from rest_lightning.errors import UserError, exit_code
from rest_lightning.media.video import Frames, VideoFile, has_decord
from rest_lightning.media.writer import Encoder

READERS = ("decord", "pyav", "torchcodec")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return exit_code(lambda: run(parse(arguments)))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("data/talkers"),
        help=("prepared clips to make the test's from"),
    )
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[128, 256],
        help=("sides in pixels (default 128 256)"),
    )
    parser.add_argument(
        "--key-frames", type=int, nargs="+", default=[25, 250], help=("distances (default 25 250)")
    )
    parser.add_argument(
        "--readers", nargs="+", choices=READERS, default=list(READERS), help="(default: all)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        nargs="+",
        default=[0, 1, 2],
        help=("loader processes (default 0 1 2)"),
    )
    parser.add_argument("--num-clips", type=int, default=8, help="clips of each kind (default 8)")
    parser.add_argument(
        "--clip-frames",
        type=int,
        default=750,
        help=("their length (default 750, as rest prepare's)"),
    )
    parser.add_argument("--window", type=int, default=97, help="frames of a window (default 97)")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help=("of each measurement (default 10)")
    )
    parser.add_argument(
        "--stages",
        nargs="*",
        choices=STAGE_NAMES,
        default=list(STAGE_NAMES),
        help=("to time; none leaves them out"),
    )
    parser.add_argument(
        "--size", choices=("embedded", "tiny"), default="embedded", help="of the stages' networks"
    )
    parser.add_argument(
        "--steps", type=int, default=20, help=("timed steps of each stage (default 20)")
    )
    parser.add_argument(
        "--training-clips", type=int, default=64, help=("clips of --data to train on (default 64)")
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/reading.json"))
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> int:
    """Measure, write, print."""
    for name in ("num_clips", "window", "steps", "training_clips"):
        if getattr(args, name) < 1:
            raise UserError(
                f"expected --{name.replace('_', '-')} of at least 1, got "
                f"{getattr(args, name)}: raise it"
            )
    if args.clip_frames < args.window:
        raise UserError(
            f"expected --clip-frames of at least --window {args.window}, got "
            f"{args.clip_frames}: raise it"
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    available = [name for name in args.readers if is_installed(name)]
    result: dict[str, Any] = {
        "window_frames": args.window,
        "readers": {name: name in available or "not installed" for name in args.readers},
        "clips": [],
        "reading": [],
        "data_wait": [],
        "targets": {"wait_share": TARGET_WAIT_SHARE},
    }
    with tempfile.TemporaryDirectory() as folder:
        for size_px, distance in itertools.product(args.sizes, args.key_frames):
            paths = make_clips(Path(folder), args, size_px, distance)
            kind = {"size_px": size_px, "key_frame_every": distance}
            num_bytes = sum(path.stat().st_size for path in paths) / len(paths)
            result["clips"].append(
                {**kind, "mb_per_minute": num_bytes / 1e6 / (args.clip_frames / 25 / 60)}
            )
            for reader, workers in itertools.product(available, args.workers):
                speed = windows_per_second(paths, reader, workers, args)
                result["reading"].append(
                    {**kind, "reader": reader, "num_workers": workers, "windows_per_s": speed}
                )
                about = f"{size_px:4} px, key frame every {distance:3}"
                print(f"{about}: {reader:10} {workers} workers {speed:7.2f} windows/s", flush=True)
                write_result(args.out, result | origin(args))
        for row in measure_waits(
            args.stages, args.size, args.data, Path(folder), args.steps, args.training_clips
        ):
            result["data_wait"].append(row)
            print(
                f"{row['stage']:12} waits {row['wait_ms']:.1f} of {row['step_ms']:.1f} ms: "
                f"{row['wait_share']:.1%}",
                flush=True,
            )
            write_result(args.out, result | origin(args))
    result["fastest"] = fastest(result["reading"])
    result["targets"]["met"] = {
        row["stage"]: row["wait_share"] < TARGET_WAIT_SHARE for row in result["data_wait"]
    }
    write_result(args.out, result | origin(args))
    print(f"wrote {args.out}")
    return 0


def is_installed(reader: str) -> bool:
    """Whether a reader can be used here."""
    return has_decord() if reader == "decord" else reader == "pyav" or find_spec(reader) is not None


def make_clips(
    folder: Path, args: argparse.Namespace, size_px: int, key_frame_every: int
) -> list[Path]:
    """Clips from the frames of ``--data``, one after the other, encoded as `rest prepare` does."""
    frames = talkers(args.data, size_px)
    paths = []
    for number in range(args.num_clips):
        path = folder / f"{size_px}-{key_frame_every}-{number}.mp4"
        options = {
            "crf": str(PrepareOptions().crf),
            "preset": "veryfast",
            "g": str(key_frame_every),
        }
        encoder = Encoder(str(path), size_px, "+faststart", options, audio=False)
        encoder.write(np.stack(list(itertools.islice(frames, args.clip_frames))))
        encoder.finish()
        paths.append(path)
    return paths


def talkers(data: Path, size_px: int) -> Iterator[Frames]:
    """Frames of all clips of a data set, again and again, resized."""
    for row in itertools.cycle(read_manifest(data)):
        with VideoFile(clip_path(data, row.clip_id)) as video:
            for frame in video.read():
                yield np.asarray(Image.fromarray(frame).resize((size_px, size_px)))


class RandomWindows(Dataset[torch.Tensor]):
    """Endless windows, a clip and a start drawn for each; a file is opened for every window, as the
    data set does.
    """

    def __init__(self, paths: list[Path], reader: str, num_frames: int, window: int) -> None:
        self.paths, self.reader, self.num_frames, self.window = paths, reader, num_frames, window

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, number: int) -> torch.Tensor:
        rng = np.random.default_rng(number)
        path = self.paths[int(rng.integers(len(self.paths)))]
        start = int(rng.integers(self.num_frames - self.window + 1))
        return torch.from_numpy(read(path, self.reader, start, self.window))


def read(path: Path, reader: str, start: int, count: int) -> Frames:
    """Frames (count, H, W, 3) by one of the libraries."""
    if reader == "torchcodec":
        from torchcodec.decoders import VideoDecoder  # type: ignore[import-not-found]

        decoder = VideoDecoder(
            os.fspath(path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact"
        )
        frames: Frames = decoder.get_frames_in_range(start, start + count).data.numpy()
        return frames
    with VideoFile(path, "decord" if reader == "decord" else "pyav") as video:
        return video.read(start, count)


def windows_per_second(
    paths: list[Path], reader: str, num_workers: int, args: argparse.Namespace
) -> float:
    """Windows that arrive per second, after one from every worker."""
    windows = RandomWindows(paths, reader, args.clip_frames, args.window)
    loader = DataLoader(
        windows,
        batch_size=None,
        sampler=range(len(windows)),
        num_workers=num_workers,
        multiprocessing_context="fork" if num_workers else None,
    )
    arriving = iter(loader)
    for _ in range(max(1, num_workers)):
        next(arriving)
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < args.seconds:
        next(arriving)
        count += 1
    return count / (time.perf_counter() - begin)


def fastest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every kind of clip and number of workers, the reader with the most windows per second."""
    best: dict[tuple[int, int, int], dict[str, Any]] = {}
    for row in rows:
        key = row["size_px"], row["key_frame_every"], row["num_workers"]
        if key not in best or row["windows_per_s"] > best[key]["windows_per_s"]:
            best[key] = row
    return list(best.values())


if __name__ == "__main__":
    sys.exit(main())
