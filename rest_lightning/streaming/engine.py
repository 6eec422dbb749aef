"""One chunk after another for a batch of streams: speech window -> Euler steps against the cache ->
uint8 frames.

A chunk is one static program: it reads and writes memory that is allocated once, and decides
nothing on the device's answer. On CUDA its two halves, denoising and decoding, are captured as
graphs; the CPU calls the same functions.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import zlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rest_lightning.constants import SAMPLES_PER_FRAME, SPATIAL_RATIO, TEMPORAL_RATIO
from rest_lightning.diffusion.sampling import integrate
from rest_lightning.errors import UserError, causes
from rest_lightning.models.cache import IDContextCache
from rest_lightning.models.causal import Stream
from rest_lightning.models.detail import AgreementDetail, EnlargedDetail
from rest_lightning.streaming.device import (
    Capture,
    Device,
    Host,
    Pending,
    Program,
    cuda_capture,
    on_device,
)
from rest_lightning.streaming.packed import can_pack, packed
from rest_lightning.streaming.report import StreamClock

if TYPE_CHECKING:
    from rest_lightning.diffusion.sampling import Sampling
    from rest_lightning.models.blocks import SigmaEmbedding
    from rest_lightning.models.detail import DetailTransfer
    from rest_lightning.parts import TalkingParts

GRAPHS_VARIABLE = "REST_CUDA_GRAPHS"
ATTENTION: dict[str, SDPBackend | None] = {
    "auto": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class EngineOptions:
    """Switches of the engine. All but ``float8``, ``first_chunk_length``, ``detail`` and
    ``size_px`` change speed and memory alone.

    Attributes:
        graphs: capture the denoising steps and the decoding as CUDA graphs. None: on CUDA;
            ``REST_CUDA_GRAPHS=0`` in the environment turns them off whatever stands here.
        compile: ``torch.compile`` the transformer's blocks, once for all of them, in a copy that
            shares the weights. Costs up to a minute at the first chunk.
        pack: lay the weights out once for the CPU's kernels, instead of at every call. None: on the
            CPU, where torch can. Packed weights lie beside the others, once for all sessions of a
            model. Not with ``compile``.
        fuse: run the transformer and an LTX decoder on the Triton kernels of
            :mod:`rest_lightning.models.fused`; needs CUDA and Triton. Joined and re-ordered weights
            lie beside the others, once for all sessions of a model. Off by default, since no GPU
            has measured it yet. Not with ``compile`` or ``pack``.
        float8: with ``fuse`` and a bfloat16 model, multiply self-attention's projections and the
            feed-forward layers in float8, with a factor for every row. Costs accuracy; needs
            compute capability 8.9.
        attention: the back end of ``scaled_dot_product_attention`` on CUDA that is tried first,
            ``flash``, ``cudnn``, ``efficient`` or ``math``; the others follow where it cannot.
            ``auto``: torch's own order.
        overlap: on CUDA decode a chunk, and copy it to the host, while the next one is denoised.
        warm_up: run dummy chunks when a session opens, so that the first real one is as fast as the
            others (and every graph is captured); frames are the same, bit for bit. None: where
            graphs are captured.
        reuse: keep the engine of a session that is closed for the next one that is opened alike, at
            most two a model: its graphs need not be captured again, and its memory stays taken.
            None: where graphs are captured.
        first_chunk_length: latents of a stream's first chunk, 1 to chunk_length: a short one needs
            less speech before the first frame. None takes chunk_length.
        detail: puts the portrait's detail back into frames. ``model``: with the model's own part,
            where it has one; ``agreement``: in closed form (`AgreementDetail`); ``none``: frames
            stay as they are decoded.
        size_px: side of the frames that come out: the model's own, or twice that, with the
            portrait's detail at that size (`EnlargedDetail`). None takes the model's own.
    """

    graphs: bool | None = None
    compile: bool = False
    pack: bool | None = None
    fuse: bool = False
    float8: bool = False
    attention: Literal["auto", "flash", "cudnn", "efficient", "math"] = "auto"
    overlap: bool = True
    warm_up: bool | None = None
    reuse: bool | None = None
    first_chunk_length: int | None = None
    detail: Literal["model", "agreement", "none"] = "model"
    size_px: int | None = None

    def __post_init__(self) -> None:
        if self.detail not in ("model", "agreement", "none"):
            raise UserError(f"expected detail model, agreement or none, got {self.detail!r}")
        if self.attention not in ATTENTION:
            raise UserError(
                f"expected attention to be one of {', '.join(ATTENTION)}, got {self.attention!r}"
            )

    def output_px(self, size_px: int) -> int:
        """Side of the frames that come out of a model whose own frames have ``size_px``.

        Raises:
            UserError: a size that is neither the model's own nor twice that.
        """
        sizes = (size_px, EnlargedDetail.factor * size_px)
        if self.size_px not in (None, *sizes):
            raise UserError(
                f"expected a size of {sizes[0]} or {sizes[1]} pixels for this model, got "
                f"{self.size_px}: choose one of the two, or scale the video afterwards"
            )
        return self.size_px or size_px

    def captures(self, device: torch.device) -> bool:
        """Whether graphs are captured on ``device``.

        Raises:
            UserError: graphs asked for without CUDA, or a value of the variable other than 0 and 1.
        """
        variable = os.environ.get(GRAPHS_VARIABLE, "1")
        if variable not in ("0", "1"):
            raise UserError(
                f"expected {GRAPHS_VARIABLE}=0 or 1, got {variable!r}: 0 turns CUDA graphs off"
            )
        if self.graphs and device.type != "cuda":
            raise UserError(
                f"expected a model on a CUDA device for graphs, got {device}: leave graphs at None"
            )
        return device.type == "cuda" and variable == "1" and self.graphs is not False

    def packs(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether a model of that type on ``device`` streams with packed weights.

        Raises:
            UserError: asked for where torch has no such kernels, or together with ``compile``.
        """
        possible = can_pack(device, dtype) and not self.compile and not self.fuse
        if self.pack and not possible:
            raise UserError(
                "expected an uncompiled float32 or bfloat16 model on a CPU with oneDNN for pack, "
                f"got {dtype} on "
                f"{device}{' with compile' if self.compile else ''}: leave pack at None"
            )
        return possible and self.pack is not False

    def fuses(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether a model of that type on ``device`` streams on fused kernels.

        Raises:
            UserError: asked for where they do not run, together with other forms of the weights, or
                float8 without it.
        """
        if self.float8 and not (self.fuse and dtype == torch.bfloat16):
            raise UserError(
                f"expected fuse=True and a bfloat16 model for float8, got fuse={self.fuse} and "
                f"{dtype}: set both"
            )
        if not self.fuse:
            return False
        if self.compile or self.pack:
            raise UserError("expected fuse without compile and pack, got both: leave these out")
        if importlib.util.find_spec("triton") is None:
            raise UserError("expected Triton for fuse, got none: install it, or leave fuse out")
        from rest_lightning.models.fused import can_fuse

        if not can_fuse(device):
            raise UserError(
                f"expected a model on a CUDA device for fuse, got {device}: leave fuse out"
            )
        return True

    def attention_order(self, device: torch.device) -> AbstractContextManager[None]:
        """Returns the context in which attention runs, with the chosen back end first."""
        first = ATTENTION[self.attention]
        if first is None or device.type != "cuda":
            return nullcontext()
        others = [kind for kind in ATTENTION.values() if kind not in (None, first)]
        return sdpa_kernel([first, *others], set_priority=True)

    def warms_up(self, device: torch.device) -> bool:
        """Whether a session on ``device`` runs dummy chunks when it opens."""
        return self.captures(device) if self.warm_up is None else self.warm_up

    def reuses(self, device: torch.device) -> bool:
        """Whether closed sessions on ``device`` leave their engines to later ones."""
        return self.captures(device) if self.reuse is None else self.reuse

    def first_length(self, chunk_length: int) -> int:
        """Latents of the first chunk.

        Raises:
            UserError: none, or more than the other chunks have.
        """
        length = chunk_length if self.first_chunk_length is None else self.first_chunk_length
        if not 1 <= length <= chunk_length:
            raise UserError(
                f"expected a first_chunk_length from 1 to {chunk_length} latents, got {length}"
            )
        return length


# -- state -----------------------------------------------------------------------------------------

Stage = Callable[[str], AbstractContextManager[None]]


def _untimed(name: str) -> AbstractContextManager[None]:
    return nullcontext()


class Tables:
    """What depends on the model and the sampling alone: made once, shared by all engines of a
    session.

    Attributes:
        vae, speech_ae, transformer: the model's, packed or fused as the options say.
        detail: what puts the portrait's detail into decoded frames; None: nothing.
        size_px: side of the frames that come out, and of the portraits that go in.
        enlarged: what brings frames to that size; None: they have it.
        sigmas: noise levels of the Euler steps, from 1 to 0, as plain numbers.
        levels: the same on the device: a number from the host would be copied, and waited for, at
            every step.
        embeddings: modulations of every level but the last, and of 0 (the clean pass). Levels stay
            float32 as in training: bfloat16 would round 1000 * sigma to steps of 4.
        text: the model's own prompt for one row, without padding and mask; None where it has none.
        signature: tells states of this model, type, size and guidance from those of others.
    """

    @torch.no_grad()
    def __init__(
        self, model: TalkingParts, sampling: Sampling, options: EngineOptions | None = None
    ) -> None:
        self.model, self.sampling = model, sampling
        switches = options or EngineOptions(pack=False)
        own, self.vae, self.speech_ae = model.detail, model.vae, model.speech_ae
        self.transformer = model.transformer
        if switches.fuses(model.device, model.dtype):
            from rest_lightning.models.fused import fused_transformer, fused_vae

            self.transformer = fused_transformer(model.transformer, switches.float8)
            self.vae = fused_vae(model.vae)
        elif switches.packs(model.device, model.dtype):
            own = packed(own) if own is not None else None
            self.vae, self.speech_ae = packed(model.vae), packed(model.speech_ae)
            self.transformer = packed(model.transformer)
        self.detail: DetailTransfer | None = {"model": own, "agreement": AgreementDetail()}.get(
            switches.detail
        )
        self.size_px = switches.output_px(model.size_px)
        self.enlarged = EnlargedDetail() if self.size_px > model.size_px else None
        self.guidance = sampling.branches
        self.side = model.size_px // SPATIAL_RATIO
        cache_options = model.transformer.cache_options
        self.sigmas = sampling.sigmas(cache_options.num_slots * self.side**2)
        self.levels = torch.tensor(self.sigmas, dtype=torch.float32, device=model.device)
        levels = [*self.sigmas[:-1], 0.0]
        self.embeddings = [
            model.transformer.embed_sigma(self.levels.new_full((1, 1), level)) for level in levels
        ]
        self.text = model.transformer.project_prompt(1, padded=False)
        self.signature: Hashable = (
            _fingerprint(model),
            str(model.dtype),
            (model.size_px, self.size_px),
            cache_options,
            (self.guidance.num_branches, self.guidance.has_none),
            sampling.num_steps if cache_options.cache_noise == "per_step" else None,
        )


def _fingerprint(model: TalkingParts) -> int:
    """A checksum of some weights of every part."""
    checksum = 0
    for part in (
        model.vae,
        model.speech_ae,
        model.transformer,
        *([model.detail] if model.detail else ()),
    ):
        parameters = list(part.parameters())
        for parameter in parameters[:1] + parameters[-1:]:
            values = parameter.detach().flatten()[:256].float().cpu()
            checksum = zlib.crc32(values.numpy().tobytes(), checksum)
    return checksum


@dataclass(frozen=True)
class EngineState:
    """Everything that the next chunk depends on, detached from the engine."""

    signature: Hashable
    cache: Any
    speech: Stream
    decoder: Stream
    reference_rows: Tensor


class StreamState:
    """The memory of a batch of streams; its addresses stay the same from the first :meth:`start`
    on.

    The cache holds one row per stream and branch of the guidance, so that all branches are one
    batch (REST sec. 3.5), each with a past of its own: first the rows with reference and speech,
    then, with split guidance (READ), those with the reference alone, then those without either,
    whose sink is that of a zeroed reference.

    Args:
        tables: constants, of the model that streams.
        batch: number of streams B.
        stage: charged with starts.

    Attributes:
        cache: keys and values; speech, decoder: pasts of the SpeechAE and of the VAE's decoder.
        reference_rows: latents of the references, (branches * B, C, 1, h, w).
        text: the model's prompt for all rows of the cache, each row in memory of its own: flash
            attention takes no mask, and no rows that lie on one another.
    """

    def __init__(self, tables: Tables, batch: int, stage: Stage = _untimed) -> None:
        model, side = tables.model, tables.side
        self.tables, self.batch, self._stage = tables, batch, stage
        rows = batch * tables.guidance.num_branches
        self.cache = model.transformer.new_cache(
            rows, side, side, num_steps=tables.sampling.num_steps
        )
        self.text = tables.text and tables.text.repeat(rows)
        self.speech, self.decoder = Stream(), Stream()
        with torch.inference_mode(False):
            shape = (rows, model.vae.latent_channels, 1, side, side)
            self.reference_rows = torch.zeros(shape, device=model.device, dtype=model.dtype)

    @torch.inference_mode()
    def start(self, reference: Tensor) -> None:
        """Begin every stream with its portrait (B, 3, H, W) in [-1, 1], of the size that comes out:
        fills the ID-Sink, before any speech.
        """
        model = self.tables.model
        with on_device(model.device), self._stage("speech"):
            silence = torch.zeros(
                self.batch, SAMPLES_PER_FRAME, device=model.device
            )  # frame 0 lies before the speech
            features = model.speech_encoder(model.speech_encoder.pad(silence)).to(model.dtype)
            speech = Stream()
            self.tables.speech_ae.encode(features, speech)
            self.speech.restore(speech)
        self.switch_identity(reference)

    @torch.inference_mode()
    def switch_identity(self, reference: Tensor) -> None:
        """Go on with another portrait (B, 3, H, W): the speech continues, context and decoder begin
        anew.
        """
        model = self.tables.model
        with on_device(model.device):
            self._switch_identity(reference.to(model.device), model.dtype)

    def _switch_identity(self, reference: Tensor, dtype: torch.dtype) -> None:
        tables = self.tables
        with self._stage("vae"):
            photograph = reference
            if tables.enlarged is not None:
                reference = tables.enlarged.reduce(photograph)
            latent = tables.vae.encode(reference[:, :, None].to(dtype))
            reconstruction, decoder = tables.vae.start_decode(latent)
            if tables.detail is not None:
                tables.detail.start(reference, reconstruction[:, :, 0].float(), decoder)
            if tables.enlarged is not None:
                tables.enlarged.start(photograph, reconstruction[:, :, 0].float(), decoder)
            self.decoder.restore(decoder)
        with self._stage("dit"):
            self.cache.reset_rows()
            self.reference_rows.copy_(tables.guidance.references(latent))
            if self.cache.options.reference_attends == "self":
                tables.transformer.prefill(self.reference_rows, self.cache, text_embeds=self.text)

    @torch.inference_mode()
    def clear(self) -> None:
        """Forget everything, in place: the streams have to be started again."""
        self.cache.clear()
        for past in (*self.speech.values(), *self.decoder.values(), self.reference_rows):
            past.zero_()

    # -- rows --------------------------------------------------------------------------------------

    @torch.inference_mode()
    def for_batch(self, batch: int) -> StreamState:
        """Room for another number of streams of the same kind; this one must have started."""
        other = StreamState(self.tables, batch, self._stage)
        other.speech, other.decoder = self.speech.for_batch(batch), self.decoder.for_batch(batch)
        return other

    def narrow(self, batch: int) -> Self:
        """The first ``batch`` streams as a state of their own, in the same memory."""
        narrow = copy.copy(self)
        rows = batch * self.tables.guidance.num_branches
        narrow.batch, narrow.cache = batch, self.cache.narrow(rows)
        narrow.speech, narrow.decoder = self.speech.narrow(batch), self.decoder.narrow(batch)
        narrow.reference_rows = self.reference_rows[:rows]
        narrow.text = self.text and self.text.first(rows)
        return narrow

    @torch.inference_mode()
    def copy_rows_(self, rows: Sequence[tuple[int, StreamState, int]]) -> None:
        """Take over streams between two chunks; each is (row here, source, row there)."""
        branches = range(self.tables.guidance.num_branches)
        moves = [
            (branch * self.batch + row, source, branch * source.batch + source_row)
            for row, source, source_row in rows
            for branch in branches
        ]
        self.cache.copy_rows_(
            [(row, source.cache, source_row) for row, source, source_row in moves]
        )
        for row, source, source_row in moves:
            self.reference_rows[row].copy_(source.reference_rows[source_row])
        for row, source, source_row in rows:
            self.speech.copy_row(row, source.speech, source_row)
            self.decoder.copy_row(row, source.decoder, source_row)

    # -- snapshots ---------------------------------------------------------------------------------

    @torch.inference_mode()
    def snapshot(self) -> EngineState:
        """The state after the last chunk."""
        parts = (
            self.cache.snapshot(),
            self.speech.snapshot(),
            self.decoder.snapshot(),
            self.reference_rows.clone(),
        )
        return EngineState(self.tables.signature, *parts)

    def check(self, state: EngineState) -> None:
        """Raise a UserError unless :meth:`restore` can take this snapshot."""
        if (
            state.signature != self.tables.signature
            or state.reference_rows.shape != self.reference_rows.shape
        ):
            raise UserError(
                "expected a snapshot of a session with this model, dtype, size, branches of "
                "guidance and number of "
                "streams, got one of another: restore it in a session that was opened alike"
            )

    @torch.inference_mode()
    def restore(self, state: EngineState) -> None:
        """Go back to a snapshot of this state or of one like it.

        Raises:
            UserError: a snapshot of another model, type, size, guidance or number of streams;
                nothing has changed then.
        """
        self.check(state)
        self.cache.restore(state.cache)
        self.speech.restore(state.speech)
        self.decoder.restore(state.decoder)
        self.reference_rows.copy_(state.reference_rows)


@contextmanager
def explain_out_of_memory(model: TalkingParts, batch: int, sampling: Sampling) -> Iterator[None]:
    """Turns a device's (or the CPU allocator's) out-of-memory error into one line.

    Raises:
        UserError: what was needed, and which settings lower it.
    """
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        branches = sampling.branches.num_branches
        weights_gb = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
        cache_gb = cache_num_bytes(model, batch * branches, sampling.num_steps) / 1e9
        raise UserError(
            f"expected memory on {model.device} for {batch} stream(s) of "
            f"{model.size_px}x{model.size_px} pixels: "
            f"{weights_gb:.2f} GB of weights, {cache_gb:.2f} GB of cache, and frames beside, got "
            "out of memory: lower "
            "the number of streams or size_px, load the model with dtype bfloat16, or set "
            "guidance to 1 (the cache "
            f"then has 1 instead of {branches} rows a stream)"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that caused it, says that a device or the CPU had no memory left."""
    words = ("DefaultCPUAllocator", "CUDA out of memory", "Storage size calculation overflowed")
    return any(  # ending a capture that ran out of memory raises one on top
        isinstance(seen, torch.OutOfMemoryError) or any(word in str(seen) for word in words)
        for seen in causes(error)
    )


def cache_num_bytes(model: TalkingParts, rows: int, num_steps: int) -> int:
    """Bytes of the keys and values of ``rows`` rows: what an ID-Context Cache of this model
    holds.
    """
    transformer, options = model.transformer, model.transformer.cache_options
    side = model.size_px // SPATIAL_RATIO
    slots = 1 + options.chunk_length * (2 if options.use_context else 1)
    kept = num_steps if options.cache_noise == "per_step" else 1
    size = model.dtype.itemsize
    return 2 * kept * transformer.num_layers * rows * slots * side * side * transformer.dim * size


class ChunkEngine:
    """The computation of one chunk of every stream of a batch. The model's weights must stay where
    they are.

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
        model: TalkingParts,
        batch: int,
        sampling: Sampling,
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
        if widest is None:
            self._denoising = Program(capture() if capture is not None else None)
            self._decoding = Program(capture() if capture is not None else None)
        else:  # one of the two works at a time: they share streams and memory for graphs
            self._denoising = widest._denoising.again()
            self._decoding = widest._decoding.again()
        with on_device(model.device), explain_out_of_memory(model, batch, sampling):
            # Not a method of this engine: what the state holds must not hold the engine, or the
            # memory of a closed session would wait for the garbage collector.
            self._stage = Stages(clock, model.device)
            self.state = state or StreamState(
                Tables(model, sampling, self.options), batch, self._stage
            )
            self.tables = self.state.tables
            self._static = widest.static(batch) if widest is not None else self._allocate()
            self._noise, self._speech, self._latents, self._decoder_input, *shown = self._static
            self._frames, self._finite = shown
            overlaps = model.device.type == "cuda" and self.options.overlap
            way: Device | Host = (
                Device(model.device, self._frames.shape) if overlaps and widest is None else Host()
            )
        self._way: Device | Host = way if widest is None else widest._way
        self.depth: int = self._way.depth
        self.guidance = self.tables.guidance
        self.sigmas = self.tables.sigmas
        self._text = self.state.text
        self._transformer = self.tables.transformer
        if self.options.compile:
            self._transformer = copy.copy(model.transformer)  # the same weights
            self._transformer.compile_blocks(streams=True)
            self.cache.__class__ = _opaque_cache()

    def _allocate(self) -> tuple[Tensor, ...]:
        """Inputs and outputs of the two programs: noise, speech latents, latents, the decoder's own
        latents, frames, and which rows' frames are finite.
        """
        model = self.model
        speech = (
            self.batch,
            self.chunk_length,
            model.speech_ae.num_tokens,
            model.speech_ae.latent_dim,
        )
        size_px = self.tables.size_px
        frames = (self.batch, self.chunk_frames, size_px, size_px, 3)
        with torch.inference_mode(False):
            shapes = (self.latent_shape, speech, self.latent_shape, self.latent_shape)
            inputs = [
                torch.zeros(shape, device=model.device, dtype=model.dtype) for shape in shapes
            ]
            shown = torch.zeros(frames, device=model.device, dtype=torch.uint8)
            finite = torch.ones(self.batch, device=model.device, dtype=torch.bool)
            return *inputs, shown, finite

    def static(self, batch: int) -> tuple[Tensor, ...]:
        """Inputs and outputs of the first ``batch`` streams."""
        return tuple(tensor[:batch] for tensor in self._static)

    def narrow(self, batch: int) -> ChunkEngine:
        """The engine of the first ``batch`` streams, in the same memory; one of the two may be at
        work at a time.
        """
        state = self.state.narrow(batch)
        return ChunkEngine(
            self.model,
            batch,
            self.sampling,
            self.clock,
            self.options,
            state,
            self._capture,
            widest=self,
        )

    def attach(self, model: TalkingParts, clock: StreamClock | None) -> None:
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
        """Where all static memory lies: a captured chunk is valid as long as this does not
        change.
        """
        cache, state = self.cache, self.state
        held = (
            cache.keys,
            cache.values,
            cache.mask,
            cache.rotation,
            state.reference_rows,
            self.tables.levels,
        )
        pasts = [
            past for stream in (self.speech, self.decoder) for _, past in sorted(stream.items())
        ]
        return [tensor.data_ptr() for tensor in (*self._static, *held, *pasts)]

    def samples_of(self, num_latents: int) -> int:
        """Samples that a chunk of ``num_latents`` reads."""
        encoder = self.model.speech_encoder
        num_frames = TEMPORAL_RATIO * num_latents
        return SAMPLES_PER_FRAME * (
            encoder.left_context_frames + num_frames + encoder.lookahead_frames
        )

    def start(self, reference: Tensor) -> None:
        """Begin every stream with its portrait (B, 3, H, W) in [-1, 1]: fills the ID-Sink, before
        any speech.
        """
        with self._at_rest():
            self.state.start(reference)

    def switch_identity(self, reference: Tensor) -> None:
        """Go on with another portrait (B, 3, H, W): the speech continues, context and decoder begin
        anew.
        """
        with self._at_rest():
            self.state.switch_identity(reference)

    def step(self, audio: Tensor, noise: Tensor) -> Tensor:
        """One chunk.

        Args:
            audio: (B, window_samples), 16 kHz, of the chunk with its context on both sides; fewer
                for a short chunk, see :meth:`samples_of`.
            noise: unit Gaussian of ``latent_shape``; with fewer latents for a short chunk.

        Returns:
            Frames, uint8 (B, chunk_frames, H, W, 3), on the model's device.
        """
        self.launch(audio, noise)
        with self._at_rest():
            return self._frames[:, : TEMPORAL_RATIO * noise.shape[2]].clone()

    @torch.inference_mode()
    def launch(self, audio: Tensor, noise: Tensor) -> Pending:
        """:meth:`step`, without waiting for the device: at most ``depth`` chunks may be under
        way.
        """
        model, num_latents = self.model, noise.shape[2]
        with on_device(model.device), explain_out_of_memory(model, self.batch, self.sampling):
            with self._stage("speech"):
                features = model.speech_encoder(_upload(audio, model.device)).to(model.dtype)
                speech_latents = self.tables.speech_ae.encode(features, self.speech)
            with self._stage("dit"):
                self._denoise(_upload(noise, model.device), speech_latents)
            num_frames = TEMPORAL_RATIO * num_latents
            take = partial(
                self._decoder_input[:, :, :num_latents].copy_, self._latents[:, :, :num_latents]
            )
            return self._way.launch(
                take, partial(self._decode, num_latents), self._frames, num_frames, self._finite
            )

    def denoise(self, noise: Tensor, speech_latents: Tensor) -> Tensor:
        """Noise (B, C, l, h, w) and speech latents (B, l, n, d) to clean latents; moves the cache
        on by one chunk.
        """
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
        """The captured half: from noise and speech latents to clean latents, and keys and values in
        the current slot.

        Running it twice gives the same: the cache moves on in `IDContextCache.commit` alone.
        """
        speech_latents = self.guidance.speech(self._speech[:, :num_latents])
        if self.cache.reference_expected:
            speech_latents = torch.cat(
                [torch.zeros_like(speech_latents[:, :1]), speech_latents], dim=1
            )
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
            guided = self._transformer(
                rows, sigma, speech, self._text, cache=self.cache, step=max(step, 0)
            )
            return self.guidance.combine(guided[:, :, num_references:])

        sample = integrate(velocity, self._noise[:, :, :num_latents], self.tables.levels)
        if self.cache.options.cache_noise == "clean_pass":
            velocity(sample, -1)
        self._latents[:, :, :num_latents].copy_(sample)

    def _decode(self, num_latents: int) -> None:
        """The other captured half: from clean latents to uint8 frames."""
        vae, decoder = self.tables.vae, self.decoder
        latents = self._decoder_input[:, :, :num_latents]

        def decode() -> None:
            frames = decoded = vae.decode_chunk(latents, decoder)
            if self.tables.detail is not None:
                frames = self.tables.detail(decoded, decoder)
            # A sum is not finite where one of its terms is not: no copy, no wait for the device.
            self._finite.copy_(frames.sum(dim=(1, 2, 3, 4), dtype=torch.float32).isfinite())
            shown = self._frames[:, : frames.shape[2]]
            if self.tables.enlarged is None:
                to_uint8(frames, shown)
                return
            for start in range(0, frames.shape[2], _ENLARGED_FRAMES):  # memory stays small
                some = slice(start, start + _ENLARGED_FRAMES)
                parts = (frames[:, :, some], decoded[:, :, some])
                to_uint8(self.tables.enlarged(*parts, decoder), shown[:, some])

        with self._stage("vae"):
            variant = vae.decode_variant(decoder)
            key = None if variant is None else (num_latents, variant)
            if self._decoding.run(decode, key, changed=decoder):
                vae.count_decoded(decoder, num_latents)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run dummy chunks from a start to the usual chunk, before any stream has started.

        The clock stands still, and the streams are empty afterwards: a start begins them as if
        nothing had been. So nothing is kept meanwhile: a copy of the state would take as much
        memory as the cache itself.
        """
        device, side = self.model.device, self.tables.size_px
        with self.clock.paused() if self.clock is not None else nullcontext():
            self.start(torch.zeros(self.batch, 3, side, side))
            # On CUDA three: a first chunk, one that sees a short predecessor, and one of all
            # others.
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
        """Go back to a snapshot of this engine or of one like it. See
        :meth:`StreamState.restore`.
        """
        with self._at_rest():
            self.state.restore(state)

    def join(self) -> None:
        """Let what comes next on the device wait for what is under way."""
        self._way.join()

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        model = self.model
        with on_device(model.device), explain_out_of_memory(model, self.batch, self.sampling):
            self._way.join()
            yield


_ENLARGED_FRAMES = 4


class Stages:
    """Charges a block to a stage of a clock, by events on CUDA; without a clock nothing is charged.

    Attributes:
        clock: of the session that the engine works for.
    """

    def __init__(self, clock: StreamClock | None, device: torch.device) -> None:
        self.clock = clock
        is_cuda = device.type == "cuda"
        self._event = partial(torch.cuda.Event, enable_timing=True) if is_cuda else None

    def __call__(self, name: str) -> AbstractContextManager[None]:
        """Returns the context that charges a stage."""
        return self.clock.stage(name, self._event) if self.clock is not None else nullcontext()


@cache
def _opaque_cache() -> type[IDContextCache]:
    """A cache that the compiler leaves alone: it takes what lies before and behind."""

    class OpaqueCache(IDContextCache):
        attend = torch.compiler.disable(IDContextCache.attend)

    return OpaqueCache


def _upload(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device; from pinned memory, so that the host does not wait."""
    return (
        tensor.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda" and tensor.is_cpu
        else tensor
    )


def to_uint8(frames: Tensor, out: Tensor | None = None) -> Tensor:
    """(B, 3, F, H, W) in [-1, 1] to uint8 (B, F, H, W, 3), which may be given as ``out``."""
    if out is None:
        out = frames.new_empty((frames.shape[0], *frames.shape[2:], 3), dtype=torch.uint8)
    # A few frames at a time: float32 of a batch's chunk would leave the processor's cache seven
    # times.
    for row, target in zip(frames, out, strict=True):
        for part, pixels in zip(
            row.split(TEMPORAL_RATIO, dim=1), target.split(TEMPORAL_RATIO), strict=True
        ):
            planes = part.float().clamp(-1, 1).add_(1).mul_(127.5).round_().to(torch.uint8)
            for channel, plane in enumerate(planes):
                pixels[..., channel] = plane
    return out
