"""How well do people speak? Streams held-out photographs with their true speech, and measures lips.

``python -m benchmarks.people --model people --data data/animated --out
benchmarks/results/people.json``

The data are clips of `rest animate`, or any prepared clips whose sidecars hold a mouth opening.
Each clip of the splits ``val`` and ``test`` gives a portrait (its first frame), speech, and the
true opening. The lips of what comes out are read by mediapipe's mesh, as those of the truth were.
Beside the stream stand what the mesh reads of the clip itself and of its reconstruction by the VAE,
a ceiling for any model with this VAE. README.md explains every number.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks._result import origin, write_result
from rest_lightning.constants import FPS, TEMPORAL_RATIO
from rest_lightning.data import layout
from rest_lightning.data.animated.mesh import MeshTracker
from rest_lightning.data.animated.mesh import mouth_opening as opening_of
from rest_lightning.errors import UserError, exit_code
from rest_lightning.media.video import read_clip_audio, read_frames
from rest_lightning.metrics.lips import loudness_db, pearson, silent_frames, spearman, summary
from rest_lightning.talking_head import ModelOptions, TalkingHead

PROTOCOL, PROTOCOL_VERSION = "people", 1


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return exit_code(lambda: run(parse(arguments)))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("people"), help="as of `rest talk`")
    parser.add_argument("--data", type=Path, required=True, help="prepared clips")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/people.json"))
    parser.add_argument("--num-clips", type=int, default=20, help="at most")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--steps", type=int, help="Euler steps (default: the model's)")
    parser.add_argument("--threads", type=int, help="of torch (default: its choice)")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> int:
    """Streams and measures clip by clip, then writes the means; returns the exit code.

    Raises:
        UserError: no held-out clip with a true mouth opening, or no such model.
    """
    rows = [row for row in layout.read_manifest(args.data) if row.split != "train"]
    rows = [row for row in rows if _true_opening(args.data, row.clip_id) is not None]
    if not rows:
        raise UserError(
            f"expected held-out clips with a mouth opening in {args.data}, got none: make them "
            "with `rest animate`"
        )
    rows = rows[: args.num_clips]
    head = ModelOptions(args.model, num_threads=args.threads).load()
    truths = [_true_opening(args.data, row.clip_id) for row in rows]
    scores, seconds, num_frames = [], 0.0, 0
    for index, row in enumerate(rows):
        path = layout.clip_path(args.data, row.clip_id)
        clip, speech = read_frames(path, 0, row.num_frames), read_clip_audio(path, row.num_frames)
        started_s = time.perf_counter()
        with head.open(clip[0], crop="centre", seed=args.seed, num_steps=args.steps) as session:
            frames = np.concatenate([session.push(speech), session.flush()])
        seconds += time.perf_counter() - started_s
        num_frames += len(frames)
        score = measure(frames, speech, truths[index], truths[(index + 1) % len(truths)])
        for name, shown in (("clip", clip), ("vae", reconstruct(head, clip))):
            beside = measure(shown, speech, truths[index], None)
            score[f"lips_correlation_{name}"] = beside["lips_correlation"]
        scores.append(score)
        print(row.clip_id, {name: round(value, 3) for name, value in score.items()}, flush=True)
    write_result(args.out, _result(args, head, scores, num_frames / seconds))
    print(f"wrote {args.out}")
    return 0


def measure(
    frames: NDArray[np.uint8],
    speech: NDArray[np.float32],
    truth: NDArray[np.float64] | None,
    another: NDArray[np.float64] | None,
) -> dict[str, float]:
    """Numbers of one stream.

    Args:
        frames: (F, H, W, 3).
        speech: (640 F,) in [-1, 1].
        truth, another: true opening of this clip, and of another one as a control.
    """
    with MeshTracker() as tracker:
        points = list(tracker.track(frames))
    found = np.array([each is not None for each in points])
    opening = np.array([0.0 if each is None else float(opening_of(each)) for each in points])
    loudness = loudness_db(speech, len(frames))
    silent = silent_frames(loudness)

    def against(curve: NDArray[np.float64] | None) -> float:
        if curve is None:
            return float("nan")
        length = min(len(opening), len(curve))
        kept = found[:length]
        return pearson(opening[:length][kept], curve[:length][kept])

    return {
        "face_found": float(found.mean()),
        "lips_correlation": against(truth),
        "lips_correlation_with_another": against(another),
        "loudness_rank_correlation": spearman(opening[found], loudness[found]),
        "opening_sd": float(opening[found].std()),
        "true_opening_sd": float("nan") if truth is None else float(truth.std()),
        "opening_in_silence": float(opening[silent].mean()) if silent.any() else float("nan"),
        "opening_in_speech": float(opening[~silent].mean()) if (~silent).any() else float("nan"),
    }


@torch.inference_mode()
def reconstruct(head: TalkingHead, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Frames (F, H, W, 3) through the VAE and back, the longest part of 8n + 1 frames."""
    frames = frames[: (len(frames) - 1) // TEMPORAL_RATIO * TEMPORAL_RATIO + 1]
    video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].to(head.dtype) / 127.5 - 1
    decoded = head.vae.decode(head.vae.encode(video))[0].float()
    return ((decoded + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0).numpy()


def _true_opening(root: Path, clip_id: str) -> NDArray[np.float64] | None:
    found = layout.read_sidecar(root, clip_id).mouth_opening
    return None if found is None else np.asarray(found, np.float64)


def _result(
    args: argparse.Namespace, head: TalkingHead, scores: list[dict[str, float]], fps: float
) -> dict[str, Any]:
    return {
        "benchmark": "people",
        "protocol": {"name": PROTOCOL, "version": PROTOCOL_VERSION},
        **origin(args),
        "size_px": head.size_px,
        "metrics": {name: summary(score[name] for score in scores) for name in scores[0]},
        "speed": {"frames_per_second": round(fps, 1), "times_real_time": round(fps / FPS, 2)},
    }


if __name__ == "__main__":
    sys.exit(main())
