"""How fast is scoring, and does its memory grow with the number of clips?

``python -m benchmarks.metrics --num-clips 100 1000 --out benchmarks/results/metrics.json``

Every metric scores made-up clips (113 frames, 128x128) in a process of its own, with the embedded
networks' sizes; and beside them, in one process on the same random weights, the features of ours
and of the reference implementation.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._result import origin, write_result
from rest_lightning.constants import SAMPLES_PER_FRAME
from rest_lightning.errors import UserError, exit_code
from rest_lightning.machine import peak_memory_mb
from rest_lightning.metrics.extractors import (
    EmbeddedImage,
    EmbeddedSync,
    EmbeddedVideo,
    ImageFeatures,
    Inception,
    SyncFeatures,
    VideoFeatures,
)
from rest_lightning.metrics.frechet import EFID, FID, FVD
from rest_lightning.metrics.identity import IdentitySimilarity
from rest_lightning.metrics.reconstruction import ReconstructionScores
from rest_lightning.metrics.sums import RowMetric
from rest_lightning.metrics.sync import SyncScore
from rest_lightning.metrics.syncnet import FACE_PX, SyncNet
from rest_lightning.metrics.video import TalkingScores

FRAMES, SIDE = 113, 128


def build(name: str) -> tuple[RowMetric, Callable[[RowMetric, Tensor, Tensor], None]]:
    """A metric with random networks of the shipped sizes, and how it takes in a clip (both sides of
    a distance).
    """

    def image(output: str) -> ImageFeatures:
        return ImageFeatures(EmbeddedImage(), output).eval()

    def both(metric: RowMetric, frames: Tensor, audio: Tensor) -> None:
        for real in (True, False):
            metric.update(frames, real=real)

    talk: dict[str, Any] = {
        "fid": (lambda: FID(image("features")), both),
        "fvd": (lambda: FVD(VideoFeatures(EmbeddedVideo()).eval()), both),
        "e_fid": (lambda: EFID(image("expression")), both),
        "sync": (
            lambda: SyncScore(SyncFeatures(EmbeddedSync()).eval()),
            lambda m, f, a: m.update(f, a),
        ),
        "identity": (
            lambda: IdentitySimilarity(image("identity")),
            lambda m, f, a: m.update(f, f[0]),
        ),
        "talking": (TalkingScores, lambda m, f, a: m.update(f, a, torch.rand(len(f)))),
        "reconstruction": (ReconstructionScores, lambda m, f, a: m.update(f, f.flip(1))),
    }
    make, take = talk[name]
    return make(), take


METRICS = ("fid", "fvd", "e_fid", "sync", "identity", "talking", "reconstruction")


def made_up_clips(num: int, num_frames: int = FRAMES) -> Iterator[tuple[Tensor, Tensor]]:
    """Clips of noise, each another one, at no cost worth measuring."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(
        0, 256, (num_frames, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator
    )
    audio = 0.1 * torch.randn(num_frames * SAMPLES_PER_FRAME, generator=generator)
    for i in range(num):
        yield frames.roll(i, dims=1), audio.roll(i * 100)


def measure(name: str, num_clips: int, num_frames: int = FRAMES) -> dict[str, float]:
    """Clips per second of one metric and the peak memory of this process."""
    torch.manual_seed(0)
    metric, take = build(name)
    for frames, audio in made_up_clips(1, num_frames):  # warm-up
        take(metric, frames, audio)
    metric.reset()
    started_s = time.perf_counter()
    for frames, audio in made_up_clips(num_clips, num_frames):
        take(metric, frames, audio)
    update_s = time.perf_counter() - started_s
    started_s = time.perf_counter()
    metric.compute()
    return {
        "num_clips": num_clips,
        "clips_per_s": num_clips / update_s,
        "compute_s": time.perf_counter() - started_s,
        "peak_memory_mib": peak_memory_mb() * 1e6 / 2**20,
    }


def against_reference(
    ours: Callable[[], Tensor], theirs: Callable[[], Tensor], repeats: int
) -> dict[str, float]:
    """Seconds of both, in turns and in alternating order, the best of each; and by how much their
    features differ.
    """
    best: dict[str, float] = {"ours_s": float("inf"), "reference_s": float("inf")}
    features: dict[str, Tensor] = {}
    calls = [("ours_s", ours), ("reference_s", theirs)]
    for turn in range(repeats + 1):
        for key, call in calls[:: 1 if turn % 2 else -1]:
            started_s = time.perf_counter()
            features[key] = call()
            best[key] = min(best[key], time.perf_counter() - started_s)
    difference = (features["ours_s"] - features["reference_s"]).abs().max() / features[
        "reference_s"
    ].abs().max()
    return {
        **best,
        "speed_up": best["reference_s"] / best["ours_s"],
        "largest_difference": float(difference),
    }


@torch.inference_mode()
def compare_sync(num_frames: int = 30, width: float = 1.0, repeats: int = 9) -> dict[str, float]:
    """SyncNet's lip tower: a whole clip at once against the reference's windows in batches of
    20.
    """
    torch.manual_seed(0)
    net = SyncNet(width=width).eval()
    video = torch.rand(3, num_frames, FACE_PX, FACE_PX) * 255

    def windows() -> Tensor:
        parts = [video[None, :, i : i + 5] for i in range(num_frames - 4)]
        batches = [torch.cat(parts[i : i + 20]) for i in range(0, len(parts), 20)]
        return torch.cat([net.netfclip(net.netcnnlip(batch).flatten(1)) for batch in batches])

    return against_reference(lambda: net.embed_faces(video), windows, repeats)


@torch.inference_mode()
def compare_fid(num_frames: int = 32, repeats: int = 9) -> dict[str, float] | None:
    """Inception's features of frames, ours against torch-fidelity's; None without
    torch-fidelity.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ModuleNotFoundError:
        return None

    class Untrained(FeatureExtractorInceptionV3):  # its constructor only loads
        def load_state_dict(self, state: Any, *arguments: Any, **options: Any) -> Any:
            return nn.Module.load_state_dict(self, state) if state else None

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "inception.pth"
        torch.save({}, file)
        torch.manual_seed(0)
        reference = Untrained("random", ["2048"], feature_extractor_weights_path=str(file))
        torch.save(reference.state_dict(), file)
        extractor = Inception(file).eval()
    frames = next(made_up_clips(1, num_frames))[0]
    images = frames.permute(0, 3, 1, 2).contiguous()

    def theirs() -> Tensor:
        return torch.cat([reference(batch)[0] for batch in images.split(32)])

    return against_reference(lambda: extractor(frames), theirs, repeats)


class StandIn(nn.Module):
    """Where I3D's file is not: 400 logits of 3D convolutions with random weights, called as I3D
    is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Conv3d(3, 16, (3, 7, 7), (2, 4, 4), (1, 3, 3))
        self.late = nn.Conv3d(16, 64, 3, 2, 1)
        self.logits = nn.Linear(64, 400)

    def forward(
        self, x: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False
    ) -> Tensor:
        """(1, 3, n, 224, 224) in [-1, 1] to (1, 400)."""
        return self.logits(self.late(self.early(x).relu()).relu().mean(dim=(2, 3, 4)))


def compare_fvd(file: Path | None, num_frames: int = FRAMES, repeats: int = 19) -> dict[str, Any]:
    """Features of a clip, see :func:`_compare_fvd`; without I3D's file on random weights: what is
    compared is the same.

    Both sides call the same torchscript network once; they differ in the way to it.
    """
    if file is not None:
        return {"network": "i3d", **_compare_fvd(file, num_frames, repeats)}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        torch.jit.script(StandIn().eval()).save(f"{folder}/i3d_torchscript.pt")
        return {
            "network": "stand-in",
            **_compare_fvd(Path(folder) / "i3d_torchscript.pt", num_frames, repeats),
        }


@torch.inference_mode()
def _compare_fvd(file: Path, num_frames: int, repeats: int) -> dict[str, float]:
    """Ours against the common recipe (every frame resized and cropped on its own)."""
    from rest_lightning.media.files import trusting
    from rest_lightning.metrics.extractors import load_extractor

    with trusting():  # whoever names a file here trusts it
        extractor, net = load_extractor("fvd", file), torch.jit.load(str(file))
    frames = next(made_up_clips(1, num_frames))[0]

    def theirs() -> Tensor:
        resize = partial(
            nn.functional.interpolate, size=(224, 224), mode="bilinear", align_corners=False
        )
        resized = [resize(frame[None])[0] for frame in frames.permute(0, 3, 1, 2).float() / 255.0]
        video = torch.stack(resized, dim=1)[None].sub(0.5).mul(2)
        features: Tensor = net(video, rescale=False, resize=False, return_features=True)
        return features

    return against_reference(lambda: extractor(frames), theirs, repeats)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The whole row."""
    context = multiprocessing.get_context("spawn")
    rows: dict[str, list[dict[str, float]]] = {}
    for name in args.metrics:
        for num_clips in args.num_clips:
            with context.Pool(1) as pool:  # a fresh process each: its peak memory is this run's
                rows.setdefault(name, []).append(pool.apply(measure, (name, num_clips)))
            last = rows[name][-1]
            speed, memory = last["clips_per_s"], last["peak_memory_mib"]
            print(
                (f"{name:15} {num_clips:5} clips {speed:8.2f} clips/s {memory:8.0f} MiB"),
                flush=True,
            )
    references: dict[str, Any] = {
        "sync": compare_sync(),
        "fid": compare_fid(),
        "fvd": compare_fvd(args.i3d),
    }
    for name, row in references.items():
        print(f"{name}: {'not compared' if row is None else row}", flush=True)
    return {
        "metrics": rows,
        "against_reference": references,
        "clip": {"num_frames": FRAMES, "size_px": SIDE},
        **origin(args),
    }


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return exit_code(lambda: _main(parse(arguments)))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--metrics",
        nargs="*",
        choices=METRICS,
        default=list(METRICS),
        help="none: references alone",
    )
    parser.add_argument("--num-clips", nargs="+", type=int, default=[100, 1000])
    parser.add_argument(
        "--i3d", type=Path, default=None, help=("i3d_torchscript.pt (default: a stand-in)")
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/metrics.json"))
    return parser.parse_args(arguments)


def _main(args: argparse.Namespace) -> int:
    if min(args.num_clips) < 2:
        raise UserError("expected --num-clips of at least 2, got fewer: a distance needs them")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_result(args.out, run(args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
