"""Generates the clips that are scored: streamed where the model streams, the whole clip from noise
for a teacher.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rest_lightning.constants import SAMPLES_PER_FRAME, TEMPORAL_RATIO
from rest_lightning.diffusion.sampling import (
    Guidance,
    Sampling,
    SamplingChanges,
    euler_step,
    integrate,
    warn_of_unseen_levels,
)
from rest_lightning.errors import UserError
from rest_lightning.models.transformer import A2VDiT
from rest_lightning.parts import open_part, open_speech_encoder, read_sampling
from rest_lightning.streaming.engine import to_uint8
from rest_lightning.talking_head import DEFAULT_MODEL, INDEX_FILE, TalkingHead, bundled_folder

BLOCK_SAMPLES = 4000  # a quarter of a second a push
Frames = NDArray[np.uint8]


class Generator(nn.Module):
    """Base: a portrait and speech become frames.

    Attributes:
        sampling: steps, guidance, shift.
        seed: of the noise, the same for every clip.
        chunk_frames: period of chunk borders.
    """

    mode: str

    def __init__(self, sampling: Sampling, seed: int, chunk_length: int) -> None:
        super().__init__()
        self.sampling, self.seed = sampling, seed
        self.chunk_frames = TEMPORAL_RATIO * chunk_length
        self.seconds: list[float] = []
        self.first_frame_ms: list[float] = []
        self.num_frames: list[int] = []

    def generate(self, portrait: Tensor, speech: NDArray[np.float32]) -> Frames:
        """Frames for a portrait and speech, timed.

        Args:
            portrait: (3, H, W) in [-1, 1].
            speech: (640 n,), 16 kHz mono.

        Returns:
            uint8 (n, H, W, 3); the first one shows the first 40 ms of speech.
        """
        started_s = time.perf_counter()
        frames = self._generate(portrait, speech)
        self.seconds.append(time.perf_counter() - started_s)
        self.num_frames.append(len(frames))
        return frames

    def _generate(self, portrait: Tensor, speech: NDArray[np.float32]) -> Frames:
        raise NotImplementedError

    def set_dtype(self, dtype: torch.dtype) -> None:
        """Compute in a type; the speech encoder keeps float32."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """The sampler of a result row."""
        return {**asdict(self.sampling), "seed": self.seed, "mode": self.mode}

    def speed(self) -> dict[str, Any]:
        """The speed of a result row: every clip on its own, prefill, speech encoder and VAE
        included, mp4 left out.

        The first clip warms up and does not count, unless it is the only one.
        """
        start = min(1, len(self.seconds) - 1)
        seconds, num_frames = sum(self.seconds[start:]), sum(self.num_frames[start:])
        speed: dict[str, Any] = (
            {"num_clips": len(self.seconds) - start, "warm_up_s": self.seconds[0]}
            if seconds
            else {}
        )
        if seconds:
            speed["frames_per_second"] = num_frames / seconds
        if self.first_frame_ms:
            speed["time_to_first_frame_ms"] = float(np.median(self.first_frame_ms[start:]))
        return speed


class Streamed(Generator):
    """A student: chunk by chunk through a session, as a user would."""

    mode = "streamed"

    def __init__(self, head: TalkingHead, sampling: Sampling | None = None, seed: int = 0) -> None:
        super().__init__(
            sampling or head.sampling, seed, head.transformer.cache_options.chunk_length
        )
        self.head = head

    def set_dtype(self, dtype: torch.dtype) -> None:
        """See :meth:`Generator.set_dtype`: of the weights, as in a stream."""
        self.head.set_dtype(dtype)

    def _generate(self, portrait: Tensor, speech: NDArray[np.float32]) -> Frames:
        blocks = [
            speech[start : start + BLOCK_SAMPLES] for start in range(0, len(speech), BLOCK_SAMPLES)
        ]
        with self.head.open(
            _fitted(portrait, self.head.size_px), seed=self.seed, **asdict(self.sampling)
        ) as session:
            frames = np.concatenate(list(session.stream(blocks)))
            report = session.report()
        if report.time_to_first_frame_ms is not None:
            self.first_frame_ms.append(report.time_to_first_frame_ms)
        return frames


class Whole(Generator):
    """A teacher: all latents of a clip at once, with full attention, on the session's clock.

    Internal frame 0 is the portrait with one frame of silence before the speech, as in a session.
    With ``clip_latents`` clips of that length overlap, see :func:`generate_overlapping`.
    """

    mode = "whole clip"

    def __init__(
        self,
        vae: Any,
        speech_encoder: Any,
        speech_ae: Any,
        transformer: A2VDiT,
        sampling: Sampling,
        seed: int = 0,
        size_px: int | None = None,
        clip_latents: int | None = None,
    ) -> None:
        super().__init__(sampling, seed, transformer.cache_options.chunk_length)
        self.clip_latents = clip_latents
        if clip_latents is not None:
            if clip_latents < 2:
                raise UserError(
                    f"expected clip_latents of at least 2 (a motion frame and a new one), got "
                    f"{clip_latents}: use 12 (READ), or leave it out"
                )
            self.mode = f"clips of {clip_latents} latents, asynchronous"
        self.vae, self.speech_encoder, self.speech_ae, self.transformer = (
            vae,
            speech_encoder,
            speech_ae,
            transformer,
        )
        self.size_px, self._dtype = size_px, torch.float32

    def set_dtype(self, dtype: torch.dtype) -> None:
        """See :meth:`Generator.set_dtype`: by autocast, as in validation while training."""
        self._dtype = dtype

    @torch.no_grad()
    def _generate(self, portrait: Tensor, speech: NDArray[np.float32]) -> Frames:
        parameter = next(self.transformer.parameters())
        encoder, device = self.speech_encoder, parameter.device
        num_frames = -(-len(speech) // SAMPLES_PER_FRAME)
        num_latents = -(-num_frames // TEMPORAL_RATIO)
        audio = np.zeros(
            (encoder.left_context_frames + 1 + TEMPORAL_RATIO * num_latents) * SAMPLES_PER_FRAME,
            np.float32,
        )
        start = (encoder.left_context_frames + 1) * SAMPLES_PER_FRAME
        audio[start : start + len(speech)] = speech
        audio = np.pad(audio, (0, encoder.lookahead_frames * SAMPLES_PER_FRAME))
        speech_latents = self.speech_ae.encode(encoder(torch.from_numpy(audio)[None].to(device)))
        picture = _fitted(portrait, self.size_px or portrait.shape[-1])
        reference = self.vae.encode(picture[None, :, None].to(device)).float()
        shape = (*reference.shape[:2], 1 + num_latents, *reference.shape[3:])
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(self.seed)).to(device)
        num_tokens = noise[0, 0].numel()
        sigmas = self.sampling.sigmas(num_tokens)
        warn_of_unseen_levels(self.sampling, num_tokens, self.transformer.training_noise)
        with torch.autocast(device.type, self._dtype, enabled=self._dtype != torch.float32):
            given = (reference, speech_latents, noise, sigmas, self.sampling.branches)
            if self.clip_latents is None:
                clip = generate_clip(self.transformer, *given)
            else:
                clip = generate_overlapping(self.transformer, *given, self.clip_latents)
        return to_uint8(self.vae.decode(clip))[0, 1 : 1 + num_frames].cpu().numpy()


def load_generator(
    model: str | Path | None = None,
    vae: str | Path | None = None,
    sampling: SamplingChanges | None = None,
    seed: int = 0,
    clip_latents: int | None = None,
) -> Generator:
    """The generator of a model folder, of a student's or a teacher's checkpoint, or of the bundled
    model.

    Args:
        model: folder of `rest export`, checkpoint of a stage, or None for the bundled model.
        vae: checkpoint or folder with the VAE, where ``model`` is a checkpoint: stages do not keep
            frozen parts.
        sampling: changes of the model's own settings (where a checkpoint has none: the paper's).
        seed: of the noise.
        clip_latents: of a teacher: READ's overlapping clips of so many latents, see
            :func:`generate_overlapping`; None: the whole clip at once.

    Raises:
        UserError: no such model, a checkpoint without a ``vae``, or ``clip_latents`` for a student.
    """
    changes = sampling or SamplingChanges()
    if model is None or Path(model).is_dir() or bundled_folder(model) is not None:
        if vae is not None:
            raise UserError(
                f"expected no vae beside a model folder, which has its own, got {vae}: leave it out"
            )
        _refuse_clips(clip_latents)
        head = TalkingHead.from_pretrained(model)
        return Streamed(head, changes.of(head.sampling), seed)
    if vae is None and Path(model).is_file():
        raise UserError(
            f"expected a vae for the checkpoint {model}, which does not hold frozen parts, got "
            "none: name the VAE "
            "stage's final.ckpt or a model folder as model.vae"
        )
    transformer: Any = open_part("transformer", model)
    parts: dict[str, Any] = {
        "vae": open_part("vae", vae),  # type: ignore[arg-type]
        "speech_encoder": open_speech_encoder(model),
        "speech_ae": open_part("speech_ae", model),
        "transformer": transformer,
    }
    settings = changes.of(read_sampling(model) or Sampling())
    if transformer.config["attention"] == "chunked":
        _refuse_clips(clip_latents)
        return Streamed(TalkingHead(**parts, sampling=settings), settings, seed)
    generator = Whole(
        **parts,
        sampling=settings,
        seed=seed,
        size_px=_size_of(transformer),
        clip_latents=clip_latents,
    )
    return generator.requires_grad_(False).eval()


def _refuse_clips(clip_latents: int | None) -> None:
    if clip_latents is not None:
        raise UserError(
            f"expected a teacher's checkpoint with clip_latents, got {clip_latents} for a student, "
            "which streams: leave it out"
        )


def describe_model(model: str | Path | None) -> dict[str, Any]:
    """What a row says of a model: the end of its path."""
    if model is None:
        return {"model": DEFAULT_MODEL}
    path = Path(model)
    return {"model": path.name if (path / INDEX_FILE).is_file() else "/".join(path.parts[-2:])}


@torch.no_grad()
def generate_clip(
    transformer: A2VDiT,
    reference_latent: Tensor,
    speech_latents: Tensor,
    noise: Tensor,
    sigmas: list[float],
    guidance: Guidance,
) -> Tensor:
    """A teacher's whole clip from noise: Euler steps with guidance (REST sec. 3.3 and 3.5).

    Args:
        transformer: with full attention.
        reference_latent: (B, C, 1, h, w), clean.
        speech_latents: (B, f, n, d).
        noise: unit Gaussian (B, C, f, h, w); slot 0 is not used.
        sigmas: descending from 1 to 0.
        guidance: weights of the branches.

    Returns:
        Latents (B, C, f, h, w), slot 0 the reference.
    """
    references, speech = guidance.references(reference_latent), guidance.speech(speech_latents)

    def velocity(sample: Tensor, step: int) -> Tensor:
        rows = torch.cat([references, guidance.samples(sample)], dim=2)
        levels = sample.new_full((rows.shape[0], rows.shape[2]), sigmas[step])
        levels[:, 0] = 0.0
        return guidance.combine(transformer(rows, levels, speech)[:, :, 1:])

    return torch.cat([reference_latent, integrate(velocity, noise[:, :, 1:], sigmas)], dim=2)


@torch.no_grad()
def generate_overlapping(
    transformer: A2VDiT,
    reference_latent: Tensor,
    speech_latents: Tensor,
    noise: Tensor,
    sigmas: list[float],
    guidance: Guidance,
    clip_latents: int = 12,
) -> Tensor:
    """READ's asynchronous reverse process: clips of a teacher's own length, overlapping by one
    latent frame, all of them denoised together.

    The outer loop runs over Euler steps, the inner one over clips. The first frame of a clip, its
    motion frame, is the last one of the clip before, which has taken this step already: so a clip
    sees the levels (0, sigma_(s+1), sigma_s, ..., sigma_s) of READ's training (ANS). Nothing can be
    shown before the last step: it does not stream.

    Args:
        transformer, reference_latent, speech_latents, noise, sigmas, guidance: see
            :func:`generate_clip`.
        clip_latents: frames of a clip behind the reference, at least 2; 12 is the training's.

    Returns:
        Latents (B, C, f, h, w), slot 0 the reference; for f - 1 <= ``clip_latents`` those of
        :func:`generate_clip`.
    """
    num_frames = noise.shape[2] - 1
    spans = [(0, min(clip_latents, num_frames))]
    while spans[-1][1] < num_frames:
        start = spans[-1][1] - 1
        spans.append((start, min(start + clip_latents, num_frames)))
    references, speech = guidance.references(reference_latent), guidance.speech(speech_latents)
    sample = noise[:, :, 1:].clone()
    for sigma, sigma_next in itertools.pairwise(sigmas):
        for start, end in spans:
            clip, num_motion = sample[:, :, start:end], int(start > 0)
            rows = torch.cat([references, guidance.samples(clip)], dim=2)
            levels = clip.new_full((rows.shape[0], rows.shape[2]), sigma)
            levels[:, 0] = 0.0
            levels[:, 1 : 1 + num_motion] = sigma_next
            heard = torch.cat([speech[:, :1], speech[:, 1 + start : 1 + end]], dim=1)
            velocity = guidance.combine(transformer(rows, levels, heard)[:, :, 1:])
            moved = euler_step(clip, velocity, sigma, sigma_next)[:, :, num_motion:]
            sample[:, :, start + num_motion : end] = moved
    return torch.cat([reference_latent, sample], dim=2)


def _fitted(portrait: Tensor, size_px: int) -> Tensor:
    """The portrait at the model's size, (3, size_px, size_px)."""
    if portrait.shape[-1] == size_px:
        return portrait
    picture = nn.functional.interpolate(
        portrait[None], (size_px, size_px), mode="bilinear", antialias=True
    )
    return picture[0].clamp(-1, 1)


def _size_of(transformer: Any) -> int | None:
    from rest_lightning.constants import SPATIAL_RATIO

    return (
        SPATIAL_RATIO * transformer.spatial_size[0]
        if transformer.spatial_size is not None
        else None
    )
