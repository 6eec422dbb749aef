"""Trains the bundled model further on videos of your own.

Prepare the videos first; each clip of the result shows one face:

    rest prepare my_videos/ --out data/mine
    python examples/train_on_your_videos.py --data data/mine --out my_model
    rest talk photo.jpg speech.wav -o out.mp4 --model my_model

The transformer and SpeechAE learn; the VAE and the speech encoder stay as they are. To train all
stages from the start, use `rest train-embedded`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rest_lightning import TalkingHead
from rest_lightning.data import TalkingHeadDataModule
from rest_lightning.tasks import NoiseSettings, OptimizerSettings, StudentModule

# After the package: it makes sure that Lightning can be imported beside a CPU build of torch.
from lightning import Trainer  # isort: skip


def train(
    data: Path, out: Path, model: Path | None, num_steps: int, batch_size: int, num_frames: int
) -> None:
    """Trains a model on prepared clips and writes the model folder ``out``.

    Args:
        data: prepared clips of the model's frame size.
        out: folder to write.
        model: folder to start from; None takes the bundled model.
        num_steps: optimiser steps.
        batch_size: clips per step.
        num_frames: length of the training windows in frames, 8 n + 1.
    """
    head = TalkingHead.from_pretrained(model)
    for part in (head.transformer, head.speech_ae):
        part.requires_grad_(True).train()
    cache = head.transformer.cache_options
    student = StudentModule(
        transformer=head.transformer,
        speech_ae=head.speech_ae,
        speech_encoder=head.speech_encoder,
        vae=head.vae,
        noise=NoiseSettings(
            chunk_length=cache.chunk_length, chunk_lengths=tuple(cache.trained_lengths)
        ),
        optimizer=OptimizerSettings(lr=1e-4, warmup_steps=50),
    )
    clips = TalkingHeadDataModule(
        str(data),
        batch_size=batch_size,
        num_frames=num_frames,
        num_workers=0,
        size_px=head.size_px,
        augment=True,
    )
    trainer = Trainer(
        max_steps=num_steps,
        max_epochs=-1,
        accelerator="auto",
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        default_root_dir=out.parent / "runs",
    )
    trainer.fit(student, clips)
    head.save_pretrained(out)


def main(args: list[str] | None = None) -> None:
    """Reads the command line and trains."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="prepared clips")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--model", type=Path, help="model folder (default: the bundled model)")
    parser.add_argument("--num-steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--num-frames", type=int, default=97)
    train(**vars(parser.parse_args(args)))


if __name__ == "__main__":
    main()
