"""One chunk after another for a batch of streams: speech window -> Euler steps against the cache -> uint8 frames.

A chunk is one static program: it reads and writes memory that is allocated once, and decides nothing on the device's
answer. On CUDA its two halves, denoising and decoding, are captured as graphs; the CPU calls the same functions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rest_lightning.constants import SAMPLES_PER_FRAME, SPATIAL_RATIO, TEMPORAL_RATIO
from rest_lightning.diffusion.sampling import euler_step
from rest_lightning.models.cache import IDContextCache
from rest_lightning.models.causal import Stream
from rest_lightning.streaming.graphs import Capture, Program, cuda_capture, on_device
from rest_lightning.streaming.options import EngineOptions, explain_out_of_memory
from rest_lightning.streaming.overlap import Device, Host, Pending
from rest_lightning.streaming.report import StreamClock
from rest_lightning.streaming.state import EngineState, StreamState, Tables

if TYPE_CHECKING:
    from rest_lightning.models.layers import SigmaEmbedding
    from rest_lightning.talking_head import SamplingSettings, TalkingHead


class ChunkEngine:
    """The computation of one chunk of every stream of a batch. The model's weights must stay where they are.

    Args:
        model: the talking head.
        batch: number of streams B.
        sampling: steps, guidance and sigma table.
        clock: charged with the stages speech, dit and vae.
        options: switches.
        state: of the streams; None allocates one.
        capture: in place of CUDA's graphs (tests replay on the CPU); None follows the options.
        widest: engine of a larger batch, whose memory serves this one too; see :meth:`narrow`.

    Attributes:
        chunk_frames: pixel frames per chunk.
        window_samples: samples that one chunk reads: left context, chunk, lookahead.
        depth: chunks that may be under way when the next one is launched.
    """

    def __init__(
        self,
        model: TalkingHead,
        batch: int,
        sampling: SamplingSettings,
        clock: StreamClock | None = None,
        options: EngineOptions | None = None,
        state: StreamState | None = None,
        capture: Callable[[], Capture] | None = None,
        widest: ChunkEngine | None = None,
    ) -> None:
        self.model, self.batch, self.sampling = model, batch, sampling
        self.options = options or EngineOptions()
        cache_options = model.transformer.cache_options
        self.chunk_length: int = cache_options.chunk_length
        self.first_length = self.options.first_length(self.chunk_length)
        self.chunk_frames = TEMPORAL_RATIO * self.chunk_length
        self.window_samples = self.samples_of(self.chunk_length)
        side = model.size_px // SPATIAL_RATIO
        self.latent_shape = (batch, model.vae.latent_channels, self.chunk_length, side, side)
        if capture is None and self.options.captures(model.device):
            capture = partial(cuda_capture, model.device)
        self._capture = capture
        self._denoising = Program(capture() if capture is not None and widest is None else None)
        self._decoding = Program(capture() if capture is not None and widest is None else None)
        if widest is not None:  # one of the two works at a time: they share streams and memory for graphs
            self._denoising, self._decoding = widest._denoising.again(), widest._decoding.again()
        with on_device(model.device), explain_out_of_memory(model, batch, sampling):
            # Not a method of this engine: what the state holds must not hold the engine, or the memory of a closed
            # session would wait for the garbage collector.
            self._stage = Stages(clock, model.device)
            self.state = state or StreamState(Tables(model, sampling, self.options), batch, self._stage)
            self._static = widest.static(batch) if widest is not None else self._allocate()
            self._noise, self._speech, self._latents, self._decoder_input, self._frames = self._static
            overlaps = model.device.type == "cuda" and self.options.overlap
            way: Device | Host = Device(model.device, self._frames.shape) if overlaps and widest is None else Host()
        self._way: Device | Host = way if widest is None else widest._way
        self.depth: int = self._way.depth
        self.tables, self.guidance = self.state.tables, self.state.tables.guidance
        self.sigmas = self.tables.sigmas
        self._text = self.state.text
        self._transformer = self.tables.transformer
        if self.options.compile:
            self._transformer = copy.copy(model.transformer)  # the same weights
            self._transformer.compile_blocks(streams=True)
            self.cache.__class__ = _opaque_cache()

    def _allocate(self) -> tuple[Tensor, ...]:
        """Inputs and outputs of the two programs: noise, speech latents, latents, the decoder's own latents, frames."""
        model = self.model
        speech = (self.batch, self.chunk_length, model.speech_ae.num_tokens, model.speech_ae.latent_dim)
        frames = (self.batch, self.chunk_frames, model.size_px, model.size_px, 3)
        with torch.inference_mode(False):
            shapes = (self.latent_shape, speech, self.latent_shape, self.latent_shape)
            inputs = [torch.zeros(shape, device=model.device, dtype=model.dtype) for shape in shapes]
            return *inputs, torch.zeros(frames, device=model.device, dtype=torch.uint8)

    def static(self, batch: int) -> tuple[Tensor, ...]:
        """Inputs and outputs of the first ``batch`` streams."""
        return tuple(tensor[:batch] for tensor in self._static)

    def narrow(self, batch: int) -> ChunkEngine:
        """The engine of the first ``batch`` streams, in the same memory; one of the two may be at work at a time."""
        state = self.state.narrow(batch)
        return ChunkEngine(
            self.model, batch, self.sampling, self.clock, self.options, state, self._capture, widest=self
        )

    def attach(self, model: TalkingHead, clock: StreamClock | None) -> None:
        """Work for another session; the streams have to be started."""
        self.model = self.tables.model = model
        self._stage.clock = clock

    def detach(self) -> None:
        """Let go of the session and of the model; nothing but :meth:`attach` may follow."""
        self.join()
        self._stage.clock = None
        del self.model, self.tables.model

    @property
    def clock(self) -> StreamClock | None:
        """Charged with what the engine does."""
        return self._stage.clock

    @property
    def cache(self) -> IDContextCache:
        """Keys and values of reference and context."""
        return self.state.cache

    @property
    def speech(self) -> Stream:
        """Past of the SpeechAE."""
        return self.state.speech

    @property
    def decoder(self) -> Stream:
        """Past of the VAE's decoder."""
        return self.state.decoder

    @property
    def num_captured(self) -> int:
        """Graphs captured so far."""
        return self._denoising.num_captured + self._decoding.num_captured

    @property
    def addresses(self) -> list[int]:
        """Where all static memory lies: a captured chunk is valid as long as this does not change."""
        cache, state = self.cache, self.state
        held = (cache.keys, cache.values, cache.mask, cache.rotation, state.reference_rows, self.tables.levels)
        pasts = [past for stream in (self.speech, self.decoder) for _, past in sorted(stream.items())]
        return [tensor.data_ptr() for tensor in (*self._static, *held, *pasts)]

    def samples_of(self, num_latents: int) -> int:
        """Samples that a chunk of ``num_latents`` reads."""
        encoder = self.model.speech_encoder
        num_frames = TEMPORAL_RATIO * num_latents
        return SAMPLES_PER_FRAME * (encoder.left_context_frames + num_frames + encoder.lookahead_frames)

    def start(self, reference: Tensor) -> None:
        """Begin every stream with its portrait (B, 3, H, W) in [-1, 1]: fills the ID-Sink, before any speech."""
        with self._at_rest():
            self.state.start(reference)

    def show(self, reference: Tensor) -> None:
        """Go on with another portrait (B, 3, H, W): the speech continues, context and decoder begin anew."""
        with self._at_rest():
            self.state.show(reference)

    def step(self, audio: Tensor, noise: Tensor) -> Tensor:
        """One chunk.

        Args:
            audio: (B, window_samples), 16 kHz, of the chunk with its context on both sides; fewer for a short chunk,
                see :meth:`samples_of`.
            noise: unit Gaussian of ``latent_shape``; with fewer latents for a short chunk.

        Returns:
            Frames, uint8 (B, chunk_frames, H, W, 3), on the model's device.
        """
        self.launch(audio, noise)
        with self._at_rest():
            return self._frames[:, : TEMPORAL_RATIO * noise.shape[2]].clone()

    @torch.inference_mode()
    def launch(self, audio: Tensor, noise: Tensor) -> Pending:
        """:meth:`step`, without waiting for the device: at most ``depth`` chunks may be under way."""
        model, num_latents = self.model, noise.shape[2]
        with on_device(model.device), explain_out_of_memory(model, self.batch, self.sampling):
            with self._stage("speech"):
                features = model.speech_encoder(_upload(audio, model.device)).to(model.dtype)
                speech_latents = self.tables.speech_ae.encode(features, self.speech)
            with self._stage("dit"):
                self._denoise(_upload(noise, model.device), speech_latents)
            num_frames = TEMPORAL_RATIO * num_latents
            take = partial(self._decoder_input[:, :, :num_latents].copy_, self._latents[:, :, :num_latents])
            return self._way.launch(take, partial(self._decode, num_latents), self._frames, num_frames)

    def denoise(self, noise: Tensor, speech_latents: Tensor) -> Tensor:
        """Noise (B, C, l, h, w) and speech latents (B, l, n, d) to clean latents; moves the cache on by one chunk."""
        with on_device(self.model.device):
            return self._denoise(noise, speech_latents).clone()

    def _denoise(self, noise: Tensor, speech_latents: Tensor) -> Tensor:
        num_latents, cache = noise.shape[2], self.cache
        self._noise[:, :, :num_latents].copy_(noise)
        self._speech[:, :num_latents].copy_(speech_latents)
        # A graph does not run the cache's own bookkeeping, so it is told here what comes.
        cache.begin(num_latents + cache.reference_expected)
        with self.options.attention_order(self.model.device):
            self._denoising.run(partial(self._integrate, num_latents), (num_latents, cache.variant))
        cache.commit()
        return self._latents[:, :, :num_latents]

    def _integrate(self, num_latents: int) -> None:
        """The captured half: from noise and speech latents to clean latents, and keys and values in the current slot.

        Running it twice gives the same: the cache moves on in `IDContextCache.commit` alone.
        """
        speech_latents = self.guidance.speech(self._speech[:, :num_latents])
        if self.cache.reference_expected:
            speech_latents = torch.cat([torch.zeros_like(speech_latents[:, :1]), speech_latents], dim=1)
        speech = self._transformer.project_speech(speech_latents)

        def velocity(sample: Tensor, step: int) -> Tensor:
            """Guided velocity of one step; step -1 is the clean pass at sigma 0."""
            rows = self.guidance.samples(sample)
            sigma: Tensor | SigmaEmbedding = self.tables.embeddings[step]
            num_references = int(self.cache.reference_expected)
            if num_references:  # the first chunk alone: the reference comes along, at sigma 0
                rows = torch.cat([self.state.reference_rows, rows], dim=2)
                level = [*self.sigmas[:-1], 0.0][step]
                sigma = torch.full((rows.shape[0], rows.shape[2]), level, device=rows.device)
                sigma[:, 0] = 0.0
            guided = self._transformer(rows, sigma, speech, self._text, cache=self.cache, step=max(step, 0))
            return self.guidance.combine(guided[:, :, num_references:])

        sample, levels = self._noise[:, :, :num_latents], self.tables.levels
        for step in range(len(levels) - 1):
            sample = euler_step(sample, velocity(sample, step), levels[step], levels[step + 1])
        if self.cache.options.cache_noise == "clean_pass":
            velocity(sample, -1)
        self._latents[:, :, :num_latents].copy_(sample)

    def _decode(self, num_latents: int) -> None:
        """The other captured half: from clean latents to uint8 frames."""
        vae, decoder = self.tables.vae, self.decoder
        latents = self._decoder_input[:, :, :num_latents]

        def decode() -> None:
            frames = vae.decode_chunk(latents, decoder)
            to_uint8(frames, self._frames[:, : frames.shape[2]])

        with self._stage("vae"):
            variant = vae.decode_variant(decoder)
            key = None if variant is None else (num_latents, variant)
            if self._decoding.run(decode, key, changed=decoder):
                vae.count_decoded(decoder, num_latents)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run dummy chunks from a start to the usual chunk, before any stream has started; the clock stands still.

        The streams are empty afterwards, and a start begins them as if nothing had been. So nothing has to be kept
        meanwhile: a copy of the state would take as much memory as the cache itself.
        """
        device, side = self.model.device, self.model.size_px
        with self.clock.paused() if self.clock is not None else nullcontext():
            self.start(torch.zeros(self.batch, 3, side, side))
            # On CUDA three: a first chunk, one that sees a short predecessor, and one of all others.
            lengths = (self.first_length, self.chunk_length, self.chunk_length)
            for length in lengths if device.type == "cuda" else lengths[:1]:
                noise = torch.zeros(*self.latent_shape[:2], length, *self.latent_shape[3:])
                self.launch(torch.zeros(self.batch, self.samples_of(length)), noise).frames()
            with self._at_rest():
                self.state.clear()

    def snapshot(self) -> EngineState:
        """The state after the last chunk."""
        with self._at_rest():
            return self.state.snapshot()

    def restore(self, state: EngineState) -> None:
        """Go back to a snapshot of this engine or of one like it. See :meth:`StreamState.restore`."""
        with self._at_rest():
            self.state.restore(state)

    def join(self) -> None:
        """Let what comes next on the device wait for what is under way."""
        self._way.join()

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        with on_device(self.model.device), explain_out_of_memory(self.model, self.batch, self.sampling):
            self._way.join()
            yield


class Stages:
    """Charges a block to a stage of a clock, by events on CUDA; without a clock nothing is charged.

    Attributes:
        clock: of the session that the engine works for.
    """

    def __init__(self, clock: StreamClock | None, device: torch.device) -> None:
        self.clock = clock
        self._event = partial(torch.cuda.Event, enable_timing=True) if device.type == "cuda" else None

    def __call__(self, name: str) -> AbstractContextManager[None]:
        return self.clock.stage(name, self._event) if self.clock is not None else nullcontext()


@cache
def _opaque_cache() -> type[IDContextCache]:
    """A cache that the compiler leaves alone: it takes what lies before and behind slots and complex rotations."""

    class OpaqueCache(IDContextCache):
        attend = torch.compiler.disable(IDContextCache.attend)

    return OpaqueCache


def _upload(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device; from pinned memory, so that the host does not wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and tensor.is_cpu else tensor


def to_uint8(frames: Tensor, out: Tensor | None = None) -> Tensor:
    """(B, 3, F, H, W) in [-1, 1] to uint8 (B, F, H, W, 3), which may be given as ``out``."""
    if out is None:
        out = frames.new_empty((frames.shape[0], *frames.shape[2:], 3), dtype=torch.uint8)
    # A few frames at a time: float32 of a batch's chunk would leave the processor's cache seven times.
    for row, target in zip(frames, out, strict=True):
        for part, pixels in zip(row.split(TEMPORAL_RATIO, dim=1), target.split(TEMPORAL_RATIO), strict=True):
            planes = part.float().clamp(-1, 1).add_(1).mul_(127.5).round_().to(torch.uint8)
            for channel, plane in enumerate(planes):
                pixels[..., channel] = plane
    return out
