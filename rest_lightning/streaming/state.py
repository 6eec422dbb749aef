"""What streams remember between two chunks, and the constants of the chunks that follow."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from rest_lightning.constants import SAMPLES_PER_FRAME, SPATIAL_RATIO
from rest_lightning.diffusion.schedule import sampling_sigmas
from rest_lightning.errors import UserError
from rest_lightning.models.cache import IDContextCache
from rest_lightning.models.causal import Stream
from rest_lightning.models.packed import packed
from rest_lightning.streaming.graphs import on_device
from rest_lightning.streaming.options import EngineOptions

if TYPE_CHECKING:
    from rest_lightning.talking_head import SamplingSettings, TalkingHead

Stage = Callable[[str], AbstractContextManager[None]]


def _untimed(name: str) -> AbstractContextManager[None]:
    return nullcontext()


class Tables:
    """What depends on the model and the sampling alone: made once, shared by all engines of a session.

    Attributes:
        vae, speech_ae, transformer: the model's, packed or fused as the options say.
        sigmas: noise levels of the Euler steps, from 1 to 0, as plain numbers.
        levels: the same on the device: a number from the host would be copied, and waited for, at every step.
        embeddings: modulations of every level but the last, and of 0 (the clean pass). Levels stay float32 as in
            training: bfloat16 would round 1000 * sigma to steps of 4.
        text: the model's own prompt for one row, without padding and mask; None where it has none.
        signature: tells states of this model, type, size and guidance from those of others.
    """

    @torch.no_grad()
    def __init__(self, model: TalkingHead, sampling: SamplingSettings, options: EngineOptions | None = None) -> None:
        self.model, self.sampling = model, sampling
        switches = options or EngineOptions(pack=False)
        self.vae, self.speech_ae, self.transformer = model.vae, model.speech_ae, model.transformer
        if switches.fuses(model.device, model.dtype):
            from rest_lightning.models.fused import fused_transformer, fused_vae

            self.transformer = fused_transformer(model.transformer, switches.float8)
            self.vae = fused_vae(model.vae)
        elif switches.packs(model.device, model.dtype):
            self.vae, self.speech_ae = packed(model.vae), packed(model.speech_ae)
            self.transformer = packed(model.transformer)
        self.guidance = sampling.branches
        self.side = model.size_px // SPATIAL_RATIO
        cache_options = model.transformer.cache_options
        self.sigmas = sampling_sigmas(sampling.num_steps, sampling.shift, cache_options.num_slots * self.side**2)
        self.levels = torch.tensor(self.sigmas, dtype=torch.float32, device=model.device)
        levels = [*self.sigmas[:-1], 0.0]
        self.embeddings = [model.transformer.embed_sigma(self.levels.new_full((1, 1), level)) for level in levels]
        self.text = model.transformer.project_prompt(1, padded=False)
        self.signature: Hashable = (
            _fingerprint(model), str(model.dtype), model.size_px, cache_options, self.guidance.num_branches,
            sampling.num_steps if cache_options.cache_noise == "per_step" else None,
        )  # fmt: skip


def _fingerprint(model: TalkingHead) -> int:
    """A checksum of some weights of every part."""
    checksum = 0
    for part in (model.vae, model.speech_ae, model.transformer):
        parameters = list(part.parameters())
        for parameter in (parameters[0], parameters[-1]):
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
    """The memory of a batch of streams; its addresses stay the same from the first :meth:`start` on.

    The cache holds one row per stream and branch of the guidance, so that all branches are one batch (REST sec. 3.5),
    each with a past of its own: first the rows with reference and speech, then, with split guidance (READ), those with
    the reference alone, then those without either, whose sink is that of a zeroed reference.

    Args:
        tables: constants, of the model that streams.
        batch: number of streams B.
        stage: charged with starts.

    Attributes:
        cache: keys and values; speech, decoder: pasts of the SpeechAE and of the VAE's decoder.
        reference_rows: latents of the references, (branches * B, C, 1, h, w).
        text: the model's prompt for all rows of the cache, each row in memory of its own: flash attention takes no
            mask, and no rows that lie on one another.
    """

    def __init__(self, tables: Tables, batch: int, stage: Stage = _untimed) -> None:
        model, side = tables.model, tables.side
        self.tables, self.batch, self._stage = tables, batch, stage
        rows = batch * tables.guidance.num_branches
        self.cache = IDContextCache.allocate(model.transformer, rows, side, side, num_steps=tables.sampling.num_steps)
        self.text = tables.text and tables.text.repeat(rows)
        self.speech, self.decoder = Stream(), Stream()
        with torch.inference_mode(False):
            shape = (rows, model.vae.latent_channels, 1, side, side)
            self.reference_rows = torch.zeros(shape, device=model.device, dtype=model.dtype)

    @torch.inference_mode()
    def start(self, reference: Tensor) -> None:
        """Begin every stream with its portrait (B, 3, H, W) in [-1, 1]: fills the ID-Sink, before any speech."""
        model = self.tables.model
        with on_device(model.device), self._stage("speech"):
            silence = torch.zeros(self.batch, SAMPLES_PER_FRAME, device=model.device)  # frame 0 lies before the speech
            features = model.speech_encoder(model.speech_encoder.pad(silence)).to(model.dtype)
            speech = Stream()
            self.tables.speech_ae.encode(features, speech)
            self.speech.restore(speech)
        self.show(reference)

    @torch.inference_mode()
    def show(self, reference: Tensor) -> None:
        """Go on with another portrait (B, 3, H, W): the speech continues, context and decoder begin anew."""
        model = self.tables.model
        with on_device(model.device):
            self._show(reference.to(model.device, model.dtype))

    def _show(self, reference: Tensor) -> None:
        tables = self.tables
        with self._stage("vae"):
            latent = tables.vae.encode(reference[:, :, None])
            self.decoder.restore(tables.vae.start_decode(latent)[1])
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

    # -- rows ---------------------------------------------------------------------------------------------------------

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
        self.cache.copy_rows_([(row, source.cache, source_row) for row, source, source_row in moves])
        for row, source, source_row in moves:
            self.reference_rows[row].copy_(source.reference_rows[source_row])
        for row, source, source_row in rows:
            self.speech.copy_row(row, source.speech, source_row)
            self.decoder.copy_row(row, source.decoder, source_row)

    # -- snapshots ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def snapshot(self) -> EngineState:
        """The state after the last chunk."""
        parts = (self.cache.snapshot(), self.speech.snapshot(), self.decoder.snapshot(), self.reference_rows.clone())
        return EngineState(self.tables.signature, *parts)

    def check(self, state: EngineState) -> None:
        """Raise a UserError unless :meth:`restore` can take this snapshot."""
        if state.signature != self.tables.signature or state.reference_rows.shape != self.reference_rows.shape:
            raise UserError(
                "expected a snapshot of a session with this model, dtype, size, branches of guidance and number of "
                "streams, got one of another: restore it in a session that was opened alike"
            )

    @torch.inference_mode()
    def restore(self, state: EngineState) -> None:
        """Go back to a snapshot of this state or of one like it.

        Raises:
            UserError: a snapshot of another model, type, size, guidance or number of streams; nothing has changed then.
        """
        self.check(state)
        self.cache.restore(state.cache)
        self.speech.restore(state.speech)
        self.decoder.restore(state.decoder)
        self.reference_rows.copy_(state.reference_rows)
