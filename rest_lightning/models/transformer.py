"""A2V-DiT: the audio-to-video diffusion transformer; one class serves teacher and student (REST
sec. 3.2 to 3.4).

A superset of diffusers' ``LTXVideoTransformer3DModel`` with the same parameter names: each block
has self-attention, attention to text (optional), attention of every latent frame to its own speech
tokens, and a feed-forward layer. The output of the speech attention starts at zero, so that LTX
weights give LTX's own output.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rest_lightning.constants import FPS, SPATIAL_RATIO, TEMPORAL_RATIO
from rest_lightning.errors import UserError
from rest_lightning.models.attention import Rope
from rest_lightning.models.blocks import (
    AdaLayerNormSingle,
    Block,
    CaptionProjection,
    Condition,
    SigmaEmbedding,
    precondition,
    run_block,
)
from rest_lightning.models.cache import (
    AttentionContext,
    CacheOptions,
    ChunkedContext,
    FullContext,
    IDContextCache,
    SinkContext,
    repeat_reference,
)
from rest_lightning.models.pretrained import PretrainedPart

if TYPE_CHECKING:
    from pathlib import Path


def start_of_prompt(
    file: str | None, length: int | None, channels: int | None
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Embeddings ``(L, channels)`` and mask ``(L,)`` of a file, zeros of ``length`` to be filled,
    or nothing.

    Raises:
        UserError: a text for a model that reads none, no such file, or embeddings of another width
            or length.
    """
    if file is None and length is None:
        return None, None
    if channels is None:
        raise UserError(
            "expected no prompt with caption_channels=None, got one: set caption_channels (LTX: "
            "4096)"
        )
    if length is not None and length < 1:
        raise UserError(f"expected a prompt_length of at least 1, got {length}: LTX-Video's is 128")
    if file is None:
        return torch.zeros(length or 0, channels), torch.ones(length or 0)
    embeds, mask = read_prompt(file)
    if embeds.shape[1] != channels or length not in (None, len(embeds)):
        raise UserError(
            f"expected a prompt of shape ({length or 'L'}, {channels}), got {tuple(embeds.shape)} "
            f"in {file}: "
            "encode it with the T5 of these LTX weights, or set caption_channels and prompt_length "
            "to its shape"
        )
    return embeds, mask


def read_prompt(file: str | Path) -> tuple[Tensor, Tensor]:
    """Embeddings ``(L, C)`` and mask ``(L,)``, 1 = token and 0 = padding, of a file of `rest
    encode-prompt`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(
            f"expected the text embedding of the prompt, got no such file: {path}; make it once "
            "with "
            f"`rest encode-prompt --ltx FOLDER --out {path}`"
        )
    try:
        state = load_file(path)
        return state["prompt_embeds"].float(), state["prompt_mask"].float()
    except (SafetensorError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"expected prompt_embeds and prompt_mask in {path}, got {reason}: make it with `rest "
            "encode-prompt`"
        ) from error


class A2VDiT(PretrainedPart):
    """The network that predicts velocity = noise - latents.

    Args:
        in_channels, out_channels: latent channels C; out_channels defaults to in_channels.
        num_layers, num_attention_heads, attention_head_dim: the paper's 28 blocks of 32 heads x 64.
        caption_channels: width of the text embeddings; None = no text attention at all.
        prompt: file of `rest encode-prompt`: a fixed text, kept with the weights and read where no
            text is passed.
        prompt_length: tokens of that text where it is part of the weights; None = text comes with
            every call.
        speech_dim: width d_A of the speech latents; None = no speech attention at all.
        fps: frames per second; positions in time are seconds, temporal_ratio / fps for a latent
            frame.
        temporal_ratio, spatial_ratio: pixel frames and pixels per latent.
        rope_base_frames, rope_base_height, rope_base_width, rope_theta: positions are divided by
            these (LTX).
        causal_positions: True places latent frames at 0, 1/25, 9/25 s, ... (LTX-Video 0.9.5 and
            later), False at 0, 8/25, 16/25 s, ... None is False, for a model whose weights are not
            LTX's.
        attention_bias, attention_out_bias, norm_eps, norm_elementwise_affine: as in diffusers.
        spatial_embedding: (h, w) of a learned absolute embedding, zero at the start, for small
            models of one frame size. LTX has none.
        attention: ``full`` (teacher) or ``chunked`` (student).
        cache_options: the student's window; see `CacheOptions`.
        gradient_checkpointing: recompute each block in the backward pass.
        training_noise: arguments of `rest_lightning.diffusion.schedule.training_table` of the
            levels that it was trained at; stages set it, and it stays with the weights.
        preconditioned: the layers predict only what the noisy latents do not tell by themselves,
            see `precondition`. The papers have no such option; without it the noise of all C
            channels has to pass through every layer, for which a narrow network has no room.
    """

    def __init__(
        self,
        in_channels: int = 128,
        out_channels: int | None = None,
        num_layers: int = 28,
        num_attention_heads: int = 32,
        attention_head_dim: int = 64,
        caption_channels: int | None = 4096,
        prompt: str | None = None,
        prompt_length: int | None = None,
        speech_dim: int | None = 2048,
        fps: float = FPS,
        temporal_ratio: int = TEMPORAL_RATIO,
        spatial_ratio: int = SPATIAL_RATIO,
        rope_base_frames: float = 20,
        rope_base_height: float = 2048,
        rope_base_width: float = 2048,
        rope_theta: float = 10000.0,
        attention_bias: bool = True,
        attention_out_bias: bool = True,
        norm_eps: float = 1e-6,
        norm_elementwise_affine: bool = False,
        spatial_embedding: tuple[int, int] | None = None,
        attention: Literal["full", "chunked"] = "full",
        cache_options: CacheOptions | None = None,
        gradient_checkpointing: bool = False,
        causal_positions: bool | None = None,
        training_noise: dict[str, float] | None = None,
        preconditioned: bool = False,
    ) -> None:
        config = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        super().__init__()
        if attention not in ("full", "chunked"):
            raise UserError(
                f"expected attention `full` (teacher) or `chunked` (student), got {attention!r}"
            )
        if attention_head_dim % 2 or min(num_layers, num_attention_heads, in_channels) < 1:
            raise UserError(
                "expected an even attention_head_dim and at least one layer, head and channel"
            )
        self.attention = attention
        self.cache_options = cache_options or CacheOptions()
        self.num_layers, self.num_heads = num_layers, num_attention_heads
        self.in_channels, self.speech_dim, self.caption_channels = (
            in_channels,
            speech_dim,
            caption_channels,
        )
        self.gradient_checkpointing, self.preconditioned = gradient_checkpointing, preconditioned
        self._run_block: Callable[..., Tensor] = run_block
        self._compiles_streams = False
        embeds, mask = start_of_prompt(prompt, prompt_length, caption_channels)
        self.prompt_embeds: Tensor | None
        self.prompt_mask: Tensor | None
        self.register_buffer("prompt_embeds", embeds)
        self.register_buffer("prompt_mask", mask)
        config |= {"prompt": None, "prompt_length": None if embeds is None else len(embeds)}
        self._config = {
            **config,
            "out_channels": out_channels or in_channels,
            "cache_options": self.cache_options,
        }
        self.dim = dim = num_attention_heads * attention_head_dim
        frame_s, cell_px = temporal_ratio / fps, float(spatial_ratio)
        self.rope = Rope(
            dim,
            frame_s,
            cell_px,
            rope_base_frames,
            rope_base_height,
            rope_base_width,
            rope_theta,
            temporal_ratio if causal_positions else None,
            exact=attention == "chunked" and self.cache_options.positions == "absolute",
        )

        self.proj_in = nn.Linear(in_channels, dim)
        self.spatial_size = tuple(spatial_embedding) if spatial_embedding is not None else None
        if spatial_embedding is not None:
            self.spatial_embedding = nn.Parameter(
                torch.zeros(spatial_embedding[0] * spatial_embedding[1], dim)
            )
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.time_embed = AdaLayerNormSingle(dim)
        self.caption_projection = (
            CaptionProjection(caption_channels, dim) if caption_channels is not None else None
        )
        self.transformer_blocks = nn.ModuleList(
            Block(
                dim,
                num_attention_heads,
                caption_channels is not None,
                speech_dim,
                attention_bias,
                attention_out_bias,
                norm_eps,
                norm_elementwise_affine,
            )
            for _ in range(num_layers)
        )
        self.proj_out = nn.Linear(dim, out_channels or in_channels)

    # -- configuration -----------------------------------------------------------------------------

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, ready for JSON; `from_config` takes them back."""
        return {**self._config, "cache_options": asdict(self.cache_options)}

    @property
    def training_noise(self) -> dict[str, float] | None:
        """Returns the arguments of the table of noise levels in training; None: not known."""
        noise: dict[str, float] | None = self._config["training_noise"]
        return noise

    def remember_noise(self, noise: dict[str, float] | None) -> None:
        """Sets ``training_noise``, which is part of `config`."""
        self._config["training_noise"] = noise

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an untrained network from `config` (lists are accepted for tuples: JSON has
        none).
        """
        config = dict(config)
        if isinstance(config.get("cache_options"), dict):
            config["cache_options"] = CacheOptions(**config["cache_options"])
        if config.get("spatial_embedding") is not None:
            config["spatial_embedding"] = tuple(config["spatial_embedding"])
        return cls(**config)

    def to_student(self, cache_options: CacheOptions | None = None) -> A2VDiT:
        """Returns a student: a chunked network with a copy of these weights, on the same device."""
        config = {
            **self._config,
            "attention": "chunked",
            "cache_options": cache_options or self.cache_options,
        }
        student = type(self)(**config).to(self.proj_in.weight)
        student.load_state_dict(self.state_dict())
        return student

    def with_chunk_length(self, chunk_length: int) -> Self:
        """Returns this network for chunks of another length: the same weights, in the same memory.

        Raises:
            UserError: a length that training did not draw.
        """
        if chunk_length == self.cache_options.chunk_length:
            return self
        other = copy.copy(self)
        other.cache_options = self.cache_options.with_chunk_length(chunk_length)
        return other

    @classmethod
    def from_ltx(
        cls,
        source: str | Path | nn.Module,
        causal_positions: bool | None = None,
        **overrides: Any,
    ) -> A2VDiT:
        """Returns a teacher whose output equals LTX's own until the speech attention is trained.

        Args:
            source, causal_positions: see `rest_lightning.models.ltx.read_ltx`.
            overrides: arguments that LTX has no word for (``speech_dim``, ``fps``, ``attention``,
                ...).

        Raises:
            UserError: no such weights, an architecture that A2VDiT does not cover, or a tensor left
                over or missing.
        """
        from rest_lightning.models.ltx import fill_from_ltx, read_ltx

        arguments, state = read_ltx(source, causal_positions)
        model = cls(**{**arguments, **overrides}).to(state["proj_in.weight"])
        fill_from_ltx(model, state, "change the overrides")
        return model

    # -- what the denoising steps share ------------------------------------------------------------

    def embed_sigma(self, sigma: Tensor) -> SigmaEmbedding:
        """Modulations of ``sigma (B, f)`` in [0, 1]; pass them instead of sigma where it is used
        more than once.
        """
        modulation, embedding = self.time_embed(sigma)
        modulation = modulation.unflatten(-1, (6, 1, -1))
        shift, scale = (self.scale_shift_table[:, None] + embedding[:, :, None, None]).unbind(2)
        return SigmaEmbedding(
            [block.modulation(modulation) for block in self._blocks()],
            (shift, 1 + scale),
            precondition(sigma[:, :, None, None]) if self.preconditioned else None,
        )

    def project_speech(self, speech_latents: Tensor) -> Condition:
        """Keys and values of ``speech_latents (B, f, n, d_A)``, one set per frame; pass them
        instead of the latents.

        They are used as they are: the reference slot of a whole clip has to be zero already.
        """
        if self.speech_dim is None:
            raise UserError(
                "expected no speech latents with speech_dim=None, got some: set speech_dim"
            )
        if speech_latents.ndim != 4 or speech_latents.shape[-1] != self.speech_dim:
            raise UserError(
                f"expected speech_latents of shape (B, f, n, {self.speech_dim}), got "
                f"{tuple(speech_latents.shape)}: "
                "set speech_dim to the width of the SpeechAE"
            )
        tokens = speech_latents.flatten(0, 1)
        return Condition(
            [block.speech_attn.project(tokens) for block in self._blocks() if block.speech_attn]
        )

    def project_text(self, text_embeds: Tensor, text_mask: Tensor | None = None) -> Condition:
        """Keys and values of ``text_embeds (B, L, caption_channels)``; ``text_mask (B, L)``: 1 =
        token, 0 = padding.
        """
        if self.caption_projection is None:
            raise UserError(
                "expected no text with caption_channels=None, got some: set caption_channels"
            )
        if text_embeds.ndim != 3 or text_embeds.shape[-1] != self.caption_channels:
            raise UserError(
                f"expected text_embeds of shape (B, L, {self.caption_channels}), got "
                f"{tuple(text_embeds.shape)}"
            )
        tokens = self.caption_projection(text_embeds)
        blocks = [block.attn2.project(tokens) for block in self._blocks() if block.attn2]
        mask = None
        if text_mask is not None:  # additive and finite, as in diffusers
            mask = ((1 - text_mask.to(blocks[0][0].dtype)) * -10000.0)[:, None, None]
        return Condition(blocks, mask)

    def project_prompt(self, batch: int, padded: bool = True) -> Condition | None:
        """Keys and values of the model's own text for ``batch`` rows; None where it has none.

        Args:
            batch: number of rows.
            padded: False leaves the padding out, and with it the mask. That waits for the device:
                do it once.
        """
        if self.prompt_embeds is None or self.prompt_mask is None:
            return None
        if padded or not self.prompt_mask.any():  # a mask that hides everything hides nothing
            return self.project_text(self.prompt_embeds[None], self.prompt_mask[None]).expand(batch)
        return self.project_text(self.prompt_embeds[None, self.prompt_mask.bool()]).expand(batch)

    def _blocks(self) -> Iterable[Block]:
        yield from self.transformer_blocks  # type: ignore[misc]

    # -- forward -----------------------------------------------------------------------------------

    def forward(
        self,
        noisy_latents: Tensor,
        sigma: Tensor | SigmaEmbedding,
        speech_latents: Tensor | Condition | None = None,
        text_embeds: Tensor | Condition | None = None,
        text_mask: Tensor | None = None,
        cache: IDContextCache | None = None,
        step: int = 0,
        context_latents: Tensor | None = None,
        context_sigma: Tensor | None = None,
    ) -> Tensor:
        """Velocity ``(B, out_channels, f, h, w)``.

        Args:
            noisy_latents: ``(B, C, f, h, w)``. Slot 0 is the reference, 1 + K * l frames for a
                student; with a cache one chunk of at most l frames, without the reference (unless
                ``reference_attends`` brings it along: ``cache.reference_expected``).
            sigma: noise levels ``(B, f)`` in [0, 1], 0 for the reference.
            speech_latents: ``(B, f, n, d_A)``; None = zeros (dropped speech). The reference always
                reads zeros, whatever its slot holds: its keys are prefilled before any speech
                arrives.
            text_embeds, text_mask: ``(B, L, caption_channels)`` and ``(B, L)``; None = the model's
                own prompt.
            cache: the streams' state; this call is one denoising step of one chunk.
            step: index of the denoising step (``cache_noise: per_step``).
            context_latents, context_sigma: what the cache is fed with in the parallel form, ``(B,
                C, f, h, w)`` and ``(B, f)`` (default 0). Required for ``cache_noise: clean_pass``
                (the clean latents); else they may hold contexts that the model made itself.

        Raises:
            UserError: shapes, or arguments, that do not fit the model.
        """
        check_latents(self, noisy_latents)
        if isinstance(sigma, Tensor):
            check_sigma(self, sigma, noisy_latents, "sigma")
        batch = noisy_latents.shape[0]
        size = (noisy_latents.shape[2], noisy_latents.shape[3], noisy_latents.shape[4])
        num_references = 1
        context: AttentionContext
        if cache is not None:
            check_cache(self, cache, noisy_latents)
            num_references = cache.begin(size[0], step)
            context = cache
        elif self.attention == "chunked":
            check_chunks(self, noisy_latents, sigma, context_latents)
            two_streams = context_latents is not None
            context = ChunkedContext(
                self.cache_options, self.rope, size, noisy_latents.device, two_streams
            )
        else:
            context = FullContext(self.rope.table(0, *size, noisy_latents.device))

        repeats = isinstance(context, ChunkedContext) and (
            self.cache_options.reference_attends == "every_chunk"
        )
        num_chunks = (size[0] - 1) // self.cache_options.chunk_length
        if isinstance(speech_latents, Tensor) and repeats:
            check_speech(self, speech_latents, batch, size[0])
            speech_latents = torch.cat(
                [torch.zeros_like(speech_latents[:, :1]), speech_latents[:, 1:]], dim=1
            )
            speech_latents = repeat_reference(speech_latents, num_chunks, 1)
        num_speech = size[0] - 1 + num_chunks if repeats else size[0]
        speech = self._speech(speech_latents, batch, num_speech, num_references, noisy_latents)
        text = self._text(text_embeds, text_mask, batch)
        if context_latents is None:
            return self._run_repeated(noisy_latents, sigma, context, text, speech, repeats)
        if self.attention != "chunked" or cache is not None or isinstance(sigma, SigmaEmbedding):
            raise UserError(
                "expected context_latents in the student's parallel form only, got a cache or a "
                "teacher"
            )
        if context_latents.shape != noisy_latents.shape:
            raise UserError(
                f"expected context_latents of shape {tuple(noisy_latents.shape)}, got "
                f"{tuple(context_latents.shape)}"
            )
        if context_sigma is None:
            context_sigma = torch.zeros_like(sigma)
        check_sigma(self, context_sigma, noisy_latents, "context_sigma")
        both, both_sigmas = (
            torch.cat([noisy_latents, context_latents]),
            torch.cat([sigma, context_sigma]),
        )
        text, speech = text and text.twice(), speech and speech.twice()
        return self._run_repeated(both, both_sigmas, context, text, speech, repeats)[:batch]

    def _run_repeated(
        self,
        latents: Tensor,
        sigma: Tensor | SigmaEmbedding,
        context: AttentionContext,
        text: Condition | None,
        speech: Condition | None,
        repeats: bool,
    ) -> Tensor:
        """`_run`; with ``repeats`` a copy of the reference stands before every chunk of a clip."""
        if not repeats:
            return self._run(latents, sigma, context, text, speech)
        assert isinstance(sigma, Tensor), "a whole clip has levels of its own"
        length = self.cache_options.chunk_length
        num_chunks = (latents.shape[2] - 1) // length
        latents, sigma = (
            repeat_reference(latents, num_chunks, 2),
            repeat_reference(sigma, num_chunks, 1),
        )
        velocity = self._run(latents, sigma, context, text, speech)
        chunks = velocity.unflatten(2, (num_chunks, 1 + length))
        return torch.cat([chunks[:, :, 0, :1], chunks[:, :, :, 1:].flatten(2, 3)], 2)

    def new_cache(
        self,
        rows: int,
        height: int,
        width: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        num_steps: int = 1,
        always_mask: bool = False,
        kind: type[IDContextCache] = IDContextCache,
    ) -> IDContextCache:
        """Returns an empty cache for ``rows`` streams of ``height x width`` latents, writable also
        outside inference.

        Args:
            rows: number of independent streams.
            height, width: of the latents.
            device, dtype: of the model unless given; dtype is that of the keys and values.
            num_steps: denoising steps per chunk; used by ``cache_noise: per_step`` alone.
            always_mask: keep one shape for all chunks (CUDA graphs). Else the mask is left out
                where no row needs it.
            kind: class of the cache.

        Raises:
            UserError: the model is a teacher.
        """
        if self.attention != "chunked":
            raise UserError(
                'expected a model with attention="chunked", got a teacher: use teacher.to_student()'
            )
        weight = self.proj_in.weight
        per_step = self.cache_options.cache_noise == "per_step"
        return kind(
            self.cache_options,
            self.rope,
            self.num_layers,
            self.num_heads,
            rows,
            height,
            width,
            torch.device(device) if device is not None else weight.device,
            dtype or weight.dtype,
            num_steps if per_step else 1,
            always_mask,
        )

    def prefill(
        self,
        reference_latent: Tensor,
        cache: IDContextCache,
        rows: Sequence[int] | None = None,
        text_embeds: Tensor | Condition | None = None,
        text_mask: Tensor | None = None,
    ) -> None:
        """Write the ID-Sink of ``rows`` (default: all) from ``reference_latent (rows, C, 1, h,
        w)``, before any speech.

        In mid-stream this switches the identity; `IDContextCache.reset_rows` starts a new stream.
        """
        if cache.options.reference_attends != "self":
            raise UserError(
                "expected reference_attends=self for prefill, got "
                f"{cache.options.reference_attends}: put it before the first chunk, or every one"
            )
        check_latents(self, reference_latent)
        num_rows = cache.rows if rows is None else len(rows)
        expected = (num_rows, self.in_channels, 1, cache.height, cache.width)
        if tuple(reference_latent.shape) != expected:
            raise UserError(
                f"expected a reference_latent of shape {expected}, got "
                f"{tuple(reference_latent.shape)}"
            )
        cache.check_rows(rows)
        table = self.rope.table(0, 1, cache.height, cache.width, reference_latent.device)
        speech = self._speech(None, num_rows, 1, 1, reference_latent)
        sigma = reference_latent.new_zeros(num_rows, 1)
        text = self._text(text_embeds, text_mask, num_rows)
        self._run(reference_latent, sigma, SinkContext(cache, rows, table), text, speech)

    def _run(
        self,
        latents: Tensor,
        sigma: Tensor | SigmaEmbedding,
        context: AttentionContext,
        text: Condition | None,
        speech: Condition | None,
    ) -> Tensor:
        height, width = latents.shape[3:]
        embedding = sigma if isinstance(sigma, SigmaEmbedding) else self.embed_sigma(sigma)
        tokens = latents.flatten(3).permute(0, 2, 3, 1)
        x = self.proj_in(tokens)
        if self.spatial_size is not None:
            x = x + self.spatial_embedding
        fills, streams = isinstance(context, SinkContext), isinstance(context, IDContextCache)
        run = run_block if fills or (streams and not self._compiles_streams) else self._run_block
        recompute = (
            self.gradient_checkpointing and torch.is_grad_enabled() and not (fills or streams)
        )
        text_mask = text.mask if text is not None else None
        for layer, block in enumerate(self.transformer_blocks):
            arguments = (
                block,
                x,
                layer,
                embedding.blocks[layer],
                context,
                text.blocks[layer] if text is not None else None,
                text_mask,
                speech.blocks[layer] if speech is not None else None,
            )
            x = checkpoint(run, *arguments, use_reentrant=False) if recompute else run(*arguments)
        shift, scale = embedding.out
        # In place, where addcmul would make two more tensors in its backward pass, at the peak of a
        # training step.
        x = self.proj_out((F.layer_norm(x, (self.dim,), eps=1e-6) * scale).add_(shift))
        if embedding.skip is not None:
            of_input, of_output = (factor.to(tokens.dtype) for factor in embedding.skip)
            x = of_input * tokens + of_output * x
        return x.permute(0, 3, 1, 2).unflatten(-1, (height, width))

    def compile_blocks(self, streams: bool = False) -> None:
        """Let ``torch.compile`` run the blocks for whole clips (training, teacher); weights stay as
        they are.

        One compilation serves all blocks; it takes up to a minute at the first call.

        Args:
            streams: run compiled blocks on a cache, too. The compiler must not trace the cache's
                slots: give :meth:`new_cache` a class whose ``attend`` is wrapped in
                ``torch.compiler.disable``.
        """
        # Student and teacher, training and validation, a whole and a last batch: each has code of
        # its own, and beyond the limit (8 unless raised) blocks would run uncompiled.
        torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
        # Rotations come in as complex numbers and are taken apart at once: a view, for which no
        # code is needed.
        warnings.filterwarnings(
            "ignore", message="Torchinductor does not support code generation for complex"
        )
        self._run_block, self._compiles_streams = torch.compile(run_block), streams

    # -- conditions --------------------------------------------------------------------------------

    def _speech(
        self,
        speech: Tensor | Condition | None,
        batch: int,
        num_frames: int,
        num_references: int,
        like: Tensor,
    ) -> Condition | None:
        if isinstance(speech, Condition) or (speech is None and self.speech_dim is None):
            return speech
        if speech is None:
            speech = like.new_zeros(batch, num_frames, 1, self.speech_dim or 0)
        else:
            check_speech(self, speech, batch, num_frames)
        if num_references:
            speech = torch.cat([torch.zeros_like(speech[:, :1]), speech[:, 1:]], dim=1)
        return self.project_speech(speech)

    def _text(
        self, text: Tensor | Condition | None, mask: Tensor | None, batch: int
    ) -> Condition | None:
        if isinstance(text, Condition):
            return text
        if text is not None:
            return self.project_text(text, mask)
        own = self.project_prompt(batch)
        if own is None and self.caption_projection is not None:
            raise UserError(
                "expected text_embeds, got None: pass them, give a prompt, or set caption_channels "
                "to null"
            )
        return own


# -- what the network refuses ----------------------------------------------------------------------


def check_latents(model: A2VDiT, latents: Tensor) -> None:
    """Raise a UserError unless ``latents`` are (B, C, f, h, w) of the model's channels and, where
    fixed, its size.
    """
    if latents.ndim != 5 or latents.shape[1] != model.in_channels:
        raise UserError(
            f"expected noisy_latents of shape (B, {model.in_channels}, f, h, w), got "
            f"{tuple(latents.shape)}: "
            "set in_channels to the channels of the VAE"
        )
    if model.spatial_size is not None and tuple(latents.shape[3:]) != model.spatial_size:
        raise UserError(
            f"expected latents of {model.spatial_size[0]}x{model.spatial_size[1]} "
            "(spatial_embedding), "
            f"got {latents.shape[3]}x{latents.shape[4]}: use the size that the model was trained at"
        )


def check_speech(model: A2VDiT, speech: Tensor, batch: int, num_frames: int) -> None:
    """Raise a UserError unless ``speech`` is (B, f, n, d_A)."""
    if speech.shape[:2] != (batch, num_frames):
        raise UserError(
            f"expected speech_latents of shape ({batch}, {num_frames}, n, {model.speech_dim}), "
            f"got {tuple(speech.shape)}: one set of speech tokens per latent frame"
        )


def check_sigma(model: A2VDiT, sigma: Tensor, latents: Tensor, name: str) -> None:
    """Raise a UserError unless ``sigma`` is (B, f)."""
    expected = (latents.shape[0], latents.shape[2])
    if tuple(sigma.shape) != expected:
        raise UserError(
            f"expected {name} of shape (B, f) = {expected}, got {tuple(sigma.shape)}: one per frame"
        )


def check_chunks(
    model: A2VDiT, latents: Tensor, sigma: Tensor | SigmaEmbedding, context: Tensor | None
) -> None:
    """Raise a UserError unless a whole clip has 1 + K * l latents and what its kind of cache is fed
    with.
    """
    length, num_frames = model.cache_options.chunk_length, latents.shape[2]
    if num_frames <= 1 or (num_frames - 1) % length:
        raise UserError(
            f"expected 1 + K * {length} latent frames (reference and K chunks), got {num_frames}: "
            f"cut the clip or change chunk_length"
        )
    noise = model.cache_options.cache_noise
    if noise == "clean_pass" and context is None:
        raise UserError(
            "expected context_latents with cache_noise=clean_pass, got None: pass the clean latents"
        )
    if (
        noise == "per_step"
        and isinstance(sigma, Tensor)
        and bool((sigma[:, 1:] != sigma[:, 1:2]).any())
    ):
        raise UserError(
            "expected one sigma for all chunks of a clip with cache_noise=per_step, got several: "
            "step s reads the keys of step s, so set the motion dropout to 1"
        )


def check_cache(model: A2VDiT, cache: IDContextCache, latents: Tensor) -> None:
    """Raise a UserError unless ``cache`` is the model's, with rows and size of ``latents``."""
    if model.attention != "chunked" or cache.options != model.cache_options:
        raise UserError(
            "expected a cache of this very model, got another: use model.new_cache(...)"
        )
    expected = (cache.rows, cache.height, cache.width)
    got = (latents.shape[0], latents.shape[3], latents.shape[4])
    if got != expected:
        raise UserError(
            f"expected latents of the cache's (rows, h, w) = {expected}, got {got}: allocate it "
            "anew"
        )
