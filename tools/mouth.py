"""Trains the embedded mouth-opening estimator on synthetic talkers and on a VAE's reconstructions
of them.

``python -m tools.mouth --data data/talkers --vae runs/embedded/vae/final.ckpt``
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rest_lightning.data.layout import (
    ManifestRow,
    clip_path,
    read_dataset_json,
    read_manifest,
    read_sidecar,
)
from rest_lightning.errors import UserError, exit_code
from rest_lightning.metrics.mouth import (
    ASSETS,
    CROP_SIZE,
    MouthOpeningEstimator,
    crop_mouth,
    mouth_opening,
)
from tools.extractors import gaussian_blur

CARD_FILE = "card.json"
MAX_SHIFT_PX = 3
MARGIN_PX = MAX_SHIFT_PX
VAE_WINDOW_FRAMES = 65  # 8n + 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("data/talkers"),
        help=("synthetic talkers with true openings"),
    )
    parser.add_argument(
        "--vae",
        type=Path,
        default=None,
        help=("checkpoint or model folder; without it renders alone"),
    )
    parser.add_argument(
        "--out", type=Path, default=ASSETS, help=("folder of the weights and their card")
    )
    parser.add_argument(
        "--minutes", type=float, default=3.0, help=("of training; reading the data comes on top")
    )
    parser.add_argument("--frames-per-clip", type=int, default=32, help="drawn from every clip")
    parser.add_argument(
        "--vae-clips", type=int, default=400, help=("training clips that are reconstructed")
    )
    parser.add_argument(
        "--max-clips", type=int, default=None, help=("use at most this many clips of each split")
    )
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Read, reconstruct, train, evaluate on unseen identities, write the folder."""
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    vae = _load_vae(args.vae)
    train_rows = read_manifest(args.data, "train")[: args.max_clips]
    test_rows = read_manifest(args.data, "test")[: args.max_clips]
    if not train_rows or not test_rows:
        raise UserError(
            f"expected clips of the splits train and test in {args.data}, got none: make more clips"
        )
    crops, openings = gather(args.data, train_rows, args.frames_per_clip, rng)
    num_renders = len(crops)
    if vae is not None:
        chosen = [train_rows[i] for i in rng.permutation(len(train_rows))[: args.vae_clips]]
        more_crops, more_openings = gather(args.data, chosen, args.frames_per_clip, rng, vae)
        crops, openings = torch.cat([crops, more_crops]), torch.cat([openings, more_openings])
    model = MouthOpeningEstimator()
    steps, loss = train(
        model, crops, openings, 60.0 * args.minutes, args.batch_size, args.lr, args.seed
    )
    model.save_pretrained(args.out)
    # what is measured is what is shipped, bfloat16 and all
    model = MouthOpeningEstimator.from_pretrained(args.out)
    held_out = {"renders": evaluate(model, args.data, test_rows)}
    if vae is not None:
        held_out["reconstructions"] = evaluate(model, args.data, test_rows, vae)
    card = {
        "name": "embedded-mouth",
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "data": {
            "dataset": read_dataset_json(args.data),
            "num_train_clips": len(train_rows),
            "num_frames_renders": num_renders,
            "num_frames_reconstructions": len(crops) - num_renders,
            "vae": None if vae is None else vae.config,
        },
        "training": {
            "loss": "smooth L1 (beta 0.05) of the opening",
            "augmentation": f"mirror, shift +-{MAX_SHIFT_PX} px, gain, colour, blur, noise",
            "final_loss": loss,
            "num_steps": steps,
            "minutes": args.minutes,
            "batch_size": args.batch_size,
            "lr": args.lr,
            "seed": args.seed,
        },
        "held_out": held_out,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    (args.out / CARD_FILE).write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(held_out, indent=2), flush=True)
    return 0


def gather(
    data: Path,
    rows: list[ManifestRow],
    frames_per_clip: int,
    rng: np.random.Generator,
    vae: Any = None,
) -> tuple[Tensor, Tensor]:
    """Mouth crops, uint8 (n, 3, 70, 78), with their true openings (n,), from renders or their
    reconstructions.
    """
    crops, openings = [], []
    for row in _progress(rows, "reconstructions" if vae is not None else "renders"):
        frames, opening = _read(data, row)
        if vae is not None:
            # Windows start anywhere: latents see the mouth at every phase of their eight frames.
            start = int(rng.integers(0, max(1, len(frames) - VAE_WINDOW_FRAMES + 1)))
            frames, opening = (
                frames[start : start + VAE_WINDOW_FRAMES],
                opening[start : start + VAE_WINDOW_FRAMES],
            )
            frames = reconstruct(vae, frames)
            opening = opening[: len(frames)]
        chosen = np.sort(rng.permutation(len(frames))[:frames_per_clip])
        crops.append(
            crop_mouth(frames[chosen], MARGIN_PX)
            .add(1.0)
            .mul(127.5)
            .round()
            .clamp(0, 255)
            .to(torch.uint8)
        )
        openings.append(torch.from_numpy(opening[chosen]))
    return torch.cat(crops), torch.cat(openings)


@torch.inference_mode()
def reconstruct(vae: Any, frames: np.ndarray) -> np.ndarray:
    """A VAE's reconstruction of the first 8n + 1 frames, uint8 (m, H, W, 3)."""
    count = (len(frames) - 1) // 8 * 8 + 1
    video = torch.from_numpy(frames[:count]).permute(3, 0, 1, 2)[None].float().div(127.5).sub(1.0)
    result = vae.decode(vae.encode(video))[0]
    array: np.ndarray = (
        result.add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).numpy()
    )
    return array


def train(
    model: MouthOpeningEstimator,
    crops: Tensor,
    openings: Tensor,
    seconds: float,
    batch_size: int = 128,
    lr: float = 2e-3,
    seed: int = 0,
) -> tuple[int, float]:
    """AdamW for ``seconds``, the learning rate falling linearly to zero; returns steps and the last
    loss (a mean).
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    model.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    started_s = shown_s = time.monotonic()
    step, mean_loss = 0, 0.0
    while (elapsed_s := time.monotonic() - started_s) < seconds:
        left = 1.0 - elapsed_s / seconds
        for group in optimizer.param_groups:
            group["lr"] = lr * min(left, (step + 1) / 50)
        chosen = torch.randint(len(crops), (batch_size,), generator=generator)
        batch = augment(crops[chosen], generator)
        # twice as fast as float32, and this network does not notice
        with torch.autocast("cpu", torch.bfloat16):
            estimated = model.from_crops(batch)
        loss = functional.smooth_l1_loss(estimated, openings[chosen].float(), beta=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
        mean_loss += (loss.item() - mean_loss) / min(step, 100)
        if time.monotonic() - shown_s > 15.0:
            shown_s = time.monotonic()
            print(
                (f"step {step}, {elapsed_s:.0f} of {seconds:.0f} s, loss {mean_loss:.4f}"),
                flush=True,
            )
    model.eval()
    return step, mean_loss


def augment(crops: Tensor, generator: torch.Generator) -> Tensor:
    """Crops with a margin, uint8 (n, 3, 70, 78), to varied crops (n, 3, 64, 72) in about
    [-1, 1].
    """
    num = len(crops)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(num, *shape, generator=generator) * (high - low) + low

    left, top = (
        torch.randint(0, 2 * MAX_SHIFT_PX + 1, (num, 1), generator=generator) for _ in range(2)
    )
    rows, columns = top + torch.arange(CROP_SIZE[0]), left + torch.arange(CROP_SIZE[1])
    columns = torch.where(uniform(0, 1, 1) < 0.5, columns, columns.flip(1))
    index = torch.arange(num)[:, None, None]
    x = crops.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]]
    x = x.permute(0, 3, 1, 2).float() / 127.5 - 1.0
    half = num // 2  # the other half stays sharp
    x = torch.cat([gaussian_blur(x[:half], uniform(0.3, 1.6, 1)[:half]), x[half:]])
    gain, shade = uniform(0.7, 1.2, 1, 1, 1), uniform(-0.15, 0.15, 3, 1, 1)
    noise = torch.randn(x.shape, generator=generator) * uniform(0.0, 0.08, 1, 1, 1)
    return x * gain + shade + noise


def evaluate(
    model: MouthOpeningEstimator, data: Path, rows: list[ManifestRow], vae: Any = None
) -> dict[str, Any]:
    """Correlation of every clip and mean absolute error on renders, or on reconstructions, of
    unseen identities.
    """
    correlations, errors, closed = [], [], []
    for row in rows:
        frames, opening = _read(data, row)
        if vae is not None:
            frames = reconstruct(vae, frames)
            opening = opening[: len(frames)]
        estimated = mouth_opening(frames, model)
        errors.append(np.abs(estimated - opening))
        closed.append(estimated[opening == 0])
        # a clip whose mouth hardly moves has no correlation worth the name
        if opening.std() > 0.02:
            correlations.append(float(np.corrcoef(estimated, opening)[0, 1]))
    return {
        "num_clips": len(rows),
        "correlation_mean": round(float(np.mean(correlations)), 4),
        "correlation_min": round(float(np.min(correlations)), 4),
        "mean_absolute_error": round(float(np.concatenate(errors).mean()), 4),
        "mean_when_closed": round(float(np.concatenate(closed).mean()), 4),
    }


def _read(data: Path, row: ManifestRow) -> tuple[np.ndarray, np.ndarray]:
    from rest_lightning.media.video import read_frames

    sidecar = read_sidecar(data, row.clip_id)
    if sidecar.mouth_opening is None:
        raise UserError(
            f"expected clips with true mouth openings, got {row.clip_id} without: use "
            "`rest synthesize`"
        )
    return read_frames(clip_path(data, row.clip_id)), np.asarray(
        sidecar.mouth_opening, dtype=np.float32
    )


def _load_vae(source: Path | None) -> Any:
    if source is None:
        return None
    from rest_lightning.parts import build_part, read_part

    description, state = read_part("vae", source)
    vae = build_part(description)
    vae.load_state_dict(state)
    return vae.eval().requires_grad_(False)


def _progress(rows: list[ManifestRow], title: str) -> Any:
    from rich.progress import track

    return track(rows, description=title)


def main(args: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_arguments(parser)
    return exit_code(lambda: run(parser.parse_args(args)))


if __name__ == "__main__":
    sys.exit(main())
