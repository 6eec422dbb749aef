"""One chunk after another for a batch of streams: speech window -> Euler steps against the cache -> uint8 frames."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rest_lightning.constants import SAMPLES_PER_FRAME, SPATIAL_RATIO, TEMPORAL_RATIO
from rest_lightning.diffusion.sampling import euler_step
from rest_lightning.diffusion.schedule import sampling_sigmas
from rest_lightning.models.cache import IDContextCache
from rest_lightning.models.causal import Stream
from rest_lightning.streaming.report import StreamClock

if TYPE_CHECKING:
    from rest_lightning.models.transformer import Condition, SigmaEmbedding
    from rest_lightning.talking_head import SamplingSettings, TalkingHead


@dataclass(frozen=True)
class EngineState:
    """Everything that the next chunk depends on, detached from the engine."""

    cache: Any
    speech: Stream
    decoder: Stream


class ChunkEngine:
    """The state of a batch of streams and the computation of one chunk of each.

    The cache holds one row per stream and branch of the guidance, so that all branches are one batch (REST sec. 3.5),
    each with a past of its own: first the rows with reference and speech, then, with split guidance (READ), those with
    the reference alone, then those without either, whose sink is that of a zeroed reference.

    Args:
        model: the talking head.
        batch: number of streams B.
        sampling: steps, guidance and sigma table.
        clock: charged with the stages speech, dit and vae.

    Attributes:
        chunk_frames: pixel frames per chunk.
        window_samples: samples that one chunk reads: left context, chunk, lookahead.
    """

    def __init__(
        self, model: TalkingHead, batch: int, sampling: SamplingSettings, clock: StreamClock | None = None
    ) -> None:
        self.model, self.batch, self.clock = model, batch, clock
        self.guidance = sampling.branches
        self.chunk_length: int = model.transformer.cache_options.chunk_length
        self.chunk_frames = TEMPORAL_RATIO * self.chunk_length
        encoder = model.speech_encoder
        self.window_samples = SAMPLES_PER_FRAME * (
            encoder.left_context_frames + self.chunk_frames + encoder.lookahead_frames
        )
        side = model.size_px // SPATIAL_RATIO
        self.latent_shape = (batch, model.vae.latent_channels, self.chunk_length, side, side)
        num_tokens = model.transformer.cache_options.num_slots * side * side
        self.sigmas = sampling_sigmas(sampling.num_steps, sampling.shift, num_tokens)
        with torch.no_grad():
            levels = [*self.sigmas[:-1], 0.0]
            # Modulations depend on the noise level alone: once per session instead of once per step. Levels stay
            # float32 as in training: bfloat16 would round 1000 * sigma to steps of 4.
            self.embeddings = [
                model.transformer.embed_sigma(torch.full((1, 1), level, device=model.device)) for level in levels
            ]
        rows = batch * self.guidance.num_branches
        with torch.no_grad():
            self.text = model.transformer.project_prompt(rows)  # a fixed text: once per session
        self.cache = IDContextCache.allocate(model.transformer, rows, side, side, num_steps=sampling.num_steps)
        self.speech, self.decoder = Stream(), Stream()

    @torch.inference_mode()
    def start(self, reference: Tensor) -> None:
        """Begin every stream with its portrait (B, 3, H, W) in [-1, 1]: fills the ID-Sink, before any speech."""
        with self._stage("speech"):
            self.speech = Stream()
            self.model.speech_ae.encode(self._silent_features(), self.speech)
        self.show(reference)

    @torch.inference_mode()
    def show(self, reference: Tensor) -> None:
        """Go on with another portrait (B, 3, H, W): the speech continues, context and decoder begin anew."""
        model = self.model
        with self._stage("vae"):
            latent = model.vae.encode(reference[:, :, None].to(model.device, model.dtype))
            self.decoder = model.vae.start_decode(latent)[1]
        with self._stage("dit"):
            self.cache.reset_rows()
            self.reference_rows = self.guidance.references(latent)
            if self.cache.options.reference_attends == "self":
                model.transformer.prefill(self.reference_rows, self.cache, text_embeds=self.text)

    def _silent_features(self) -> Tensor:
        """Speech features of frame 0, which lies before the speech: silence."""
        audio = torch.zeros(self.batch, SAMPLES_PER_FRAME, device=self.model.device)
        return self.model.speech_encoder(self.model.speech_encoder.pad(audio)).to(self.model.dtype)

    @torch.inference_mode()
    def step(self, audio: Tensor, noise: Tensor) -> Tensor:
        """One chunk.

        Args:
            audio: (B, window_samples), 16 kHz, of the chunk with its context on both sides.
            noise: unit Gaussian of ``latent_shape``.

        Returns:
            Frames, uint8 (B, chunk_frames, H, W, 3).
        """
        model = self.model
        with self._stage("speech"):
            features = model.speech_encoder(audio.to(model.device)).to(model.dtype)
            speech_latents = model.speech_ae.encode(features, self.speech)
        with self._stage("dit"):
            latents = self.denoise(noise.to(model.device, model.dtype), speech_latents)
        with self._stage("vae"):
            return to_uint8(model.vae.decode_chunk(latents, self.decoder))

    def denoise(self, noise: Tensor, speech_latents: Tensor) -> Tensor:
        """Noise (B, C, l, h, w) and speech latents (B, l, n, d) to clean latents; moves the cache on by one chunk."""
        transformer, cache = self.model.transformer, self.cache
        speech_latents = self.guidance.speech(speech_latents)
        if cache.reference_expected:
            speech_latents = torch.cat([torch.zeros_like(speech_latents[:, :1]), speech_latents], dim=1)
        speech = transformer.project_speech(speech_latents)
        sample = noise
        for step, (sigma, sigma_next) in enumerate(zip(self.sigmas[:-1], self.sigmas[1:], strict=True)):
            sample = euler_step(sample, self._velocity(sample, step, speech), sigma, sigma_next)
        if transformer.cache_options.cache_noise == "clean_pass":
            self._velocity(sample, -1, speech)
        cache.commit()
        return sample

    def _velocity(self, sample: Tensor, step: int, speech: Condition) -> Tensor:
        """Guided velocity of one step; step -1 is the clean pass at sigma 0."""
        rows = self.guidance.samples(sample)
        sigma: Tensor | SigmaEmbedding = self.embeddings[step]
        num_references = int(self.cache.reference_expected)
        if num_references:  # the first chunk alone: the reference comes along, at sigma 0
            rows = torch.cat([self.reference_rows, rows], dim=2)
            level = [*self.sigmas[:-1], 0.0][step]
            sigma = torch.full((rows.shape[0], rows.shape[2]), level, device=rows.device)
            sigma[:, 0] = 0.0
        velocity = self.model.transformer(rows, sigma, speech, self.text, cache=self.cache, step=max(step, 0))
        return self.guidance.combine(velocity[:, :, num_references:])

    def _stage(self, name: str) -> Any:
        return self.clock.stage(name) if self.clock is not None else nullcontext()

    def snapshot(self) -> EngineState:
        """The state after the last chunk."""
        return EngineState(self.cache.snapshot(), self.speech.snapshot(), self.decoder.snapshot())

    @torch.inference_mode()
    def restore(self, state: EngineState) -> None:
        """Go back to a snapshot of this engine or of one like it."""
        self.cache.restore(state.cache)
        self.speech.restore(state.speech)
        self.decoder.restore(state.decoder)


def to_uint8(frames: Tensor) -> Tensor:
    """(B, 3, F, H, W) in [-1, 1] to uint8 (B, F, H, W, 3)."""
    return frames.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()
