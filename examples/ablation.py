"""An ablation without training: what do fewer Euler steps cost, and what do they save?

    python examples/ablation.py photo.jpg speech.wav --steps 1 2 4 8

prints a table with one row per number of steps. Ablations that train are files of
configs/ablation; `rest ablate` trains and scores them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rest_lightning import TalkingHead
from rest_lightning.media import open_speech
from rest_lightning.metrics import VideoScores

COLUMNS = ("jump_ratio_chunk", "background_drift", "sharpness", "loudness_rank_correlation")


def measure(model: TalkingHead, portrait: Path, speech: Path, num_steps: int) -> dict[str, float]:
    """Streams one video and returns its scores; benchmarks/README.md tells what they mean."""
    source = open_speech(speech)
    scores = VideoScores()
    num_frames = 0
    with model.open(portrait, num_steps=num_steps, seed=0) as session:
        started_s = time.perf_counter()
        for frames in session.stream(source):
            num_frames += len(frames)
            scores.update(frames)
        seconds = time.perf_counter() - started_s
    return {"frames_per_second": num_frames / seconds, **scores.compute(source.read_all())}


def main(args: list[str] | None = None) -> dict[int, dict[str, float]]:
    """Prints the table and returns its rows, steps -> scores."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("portrait", type=Path)
    parser.add_argument("speech", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--model", type=Path, help="model folder (default: the bundled model)")
    options = parser.parse_args(args)
    model = TalkingHead.from_pretrained(options.model)
    names = ("frames_per_second", *COLUMNS)
    print("| steps | " + " | ".join(names) + " |")
    print("| --- " * (1 + len(names)) + "|")
    rows = {}
    for num_steps in options.steps:
        rows[num_steps] = measure(model, options.portrait, options.speech, num_steps)
        values = " | ".join(f"{rows[num_steps][name]:.3f}" for name in names)
        print(f"| {num_steps} | {values} |", flush=True)
    return rows


if __name__ == "__main__":
    main()
