"""What the teacher and the student share: a batch's conditions, its noise and its dropouts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from rest_lightning.diffusion.losses import flow_matching_loss
from rest_lightning.diffusion.noise import (
    Drops,
    NoisyPath,
    SigmaSchedule,
    drop_reference,
    drop_speech,
    noisy_path,
    sample_drops,
    sample_sigmas_ans,
    sample_sigmas_cans,
)
from rest_lightning.diffusion.sampling import Sampling, SamplingChanges
from rest_lightning.diffusion.schedule import training_table
from rest_lightning.errors import UserError
from rest_lightning.models.speech import SpeechEncoder
from rest_lightning.models.speech_ae import SpeechAE
from rest_lightning.models.transformer import A2VDiT
from rest_lightning.models.vae import VideoAutoencoder
from rest_lightning.parts import SAMPLING_KEY
from rest_lightning.tasks.base import OptimizerSettings, StageModule
from rest_lightning.tasks.regions import landmarks_of, token_weights
from rest_lightning.tasks.speech_ae import speech_features

# -- sharded training ------------------------------------------------------------------------------
# FSDP2 spreads weights, gradients and optimiser states over the data-parallel ranks.

DATA_PARALLEL = "data_parallel"  # as Lightning's ModelParallelStrategy calls this axis of its mesh
# The methods beside `forward` before which FSDP2 has to gather a layer's weights.
BLOCK_METHODS = {
    "attn1": ("self_attention",),
    "attn2": ("project", "cross_attention"),
    "speech_attn": ("project", "cross_attention"),
    "ff": (),
}


def shard(part: nn.Module, mesh: DeviceMesh, compute_dtype: torch.dtype | None = None) -> None:
    """Spreads the parameters of a transformer or a SpeechAE over ``mesh``, in place.

    A second call does nothing, nor does one for another network. The attentions and the
    feed-forward layer of each block are gathered one at a time; everything small (norms, tables,
    embeddings) is gathered at once.

    Args:
        part: the network.
        mesh: of devices, with the axis :data:`DATA_PARALLEL`.
        compute_dtype: bfloat16 gathers weights in that type, which halves the traffic and the
            memory for them. Each rank's share and the sums of gradients stay float32. Inputs are
            not cast, since noise levels in bfloat16 are too coarse. None keeps float32.
    """
    if type(part) not in (A2VDiT, SpeechAE):  # a sharded network has a class of its own
        return
    data_parallel = mesh[DATA_PARALLEL]
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype,
        reduce_dtype=None if compute_dtype is None else torch.float32,
        cast_forward_inputs=False,
    )
    if isinstance(part, SpeechAE):
        for parameter in part.parameters():  # FSDP2 takes no channels-last weights
            parameter.data = parameter.data.contiguous()
        fully_shard(part, mesh=data_parallel, mp_policy=policy)
        register_fsdp_forward_method(part, "encode")
        return
    for block in list(part.transformer_blocks):  # type: ignore[arg-type]
        for name, methods in BLOCK_METHODS.items():
            layer = getattr(block, name)
            if layer is not None:
                fully_shard(layer, mesh=data_parallel, mp_policy=policy)
                for method in methods:
                    register_fsdp_forward_method(layer, method)
    fully_shard(part, mesh=data_parallel, mp_policy=policy)
    register_fsdp_forward_method(part, "prefill")


SIGMA_SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "cans": sample_sigmas_cans,
    "ans": sample_sigmas_ans,
}


@dataclass
class NoiseSettings:
    """How training noise and dropouts are drawn (REST sec. 3.3; docs/method.md#noise).

    Attributes:
        schedule: ``cans`` (REST), ``ans`` (READ), or an object of your own class, derived from
            :class:`~rest_lightning.diffusion.noise.SigmaSchedule`.
        chunk_length: latent frames per chunk.
        chunk_lengths: lengths to draw from, one for each batch; empty uses ``chunk_length`` always.
        mean, std: of the logit-normal noise levels (READ: 2.05, 1.0).
        num_levels: number of noise levels in the table.
        uniform_share: share of levels that are drawn uniformly from 0 to 1 instead. The papers
            have none; but the logit-normal hardly ever reaches the low levels at which samplers
            end.
        motion_dropout: probability that all chunks share one level.
        identity_dropout, audio_dropout: probabilities of a zeroed reference and of a zeroed speech
            condition.
        joint_dropout: further probability that both are zeroed. The papers have none; without it
            the unconditional branch of guidance is trained on one sample in a hundred.
    """

    schedule: SigmaSchedule | str = "cans"
    chunk_length: int = 3
    chunk_lengths: tuple[int, ...] = ()
    mean: float = 2.05
    std: float = 1.0
    num_levels: int = 1000
    motion_dropout: float = 0.5
    identity_dropout: float = 0.1
    audio_dropout: float = 0.1
    joint_dropout: float = 0.0
    uniform_share: float = 0.0

    @property
    def table(self) -> dict[str, Any]:
        """Returns the arguments of :func:`~rest_lightning.diffusion.schedule.training_table`."""
        names = ("num_levels", "mean", "std", "uniform_share")
        return {name: getattr(self, name) for name in names}

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, SigmaSchedule) and self.schedule not in SIGMA_SAMPLERS:
            raise UserError(
                f"expected a noise schedule of {', '.join(SIGMA_SAMPLERS)}, got {self.schedule!r}: "
                "choose one, or give the class_path of a SigmaSchedule"
            )


@dataclass(frozen=True)
class Conditions:
    """What a batch says, before any noise.

    Attributes:
        latents: clean latents (B, C, f, h, w); slot 0 is the reference.
        speech_latents: (B, f, n, d).
        weights: of the flow loss, (B, 1, f, h, w); None weighs everything alike.
        teacher_speech_latents: (B, f, n, d) of the teacher's own SpeechAE; None where the teacher
            hears what the student hears.
    """

    latents: Tensor
    speech_latents: Tensor
    weights: Tensor | None = None
    teacher_speech_latents: Tensor | None = None

    def whole_chunks(self, chunk_length: int) -> Conditions:
        """Returns the same, cut to the reference and as many whole chunks as there are."""
        end = 1 + (self.latents.shape[2] - 1) // chunk_length * chunk_length
        weights = None if self.weights is None else self.weights[:, :, :end]
        teacher = self.teacher_speech_latents
        return Conditions(
            self.latents[:, :, :end],
            self.speech_latents[:, :end],
            weights,
            None if teacher is None else teacher[:, :end],
        )


@dataclass(frozen=True)
class TrainingInput:
    """What teacher and student both see in one step: the same noise, sigmas and dropout masks.

    Attributes:
        path: noisy latents, target velocity and sigmas; a dropped reference is zero in
            ``noisy_latents``.
        speech_latents: (B, f, n, d), zero where dropped. Slot 0 needs no zeros of its own: the
            transformer gives the reference no speech.
        drops: the masks.
        clean_latents: (B, C, f, h, w) with the same references dropped; a cache of ``clean_pass``
            would hold these.
        weights: of the flow loss, (B, 1, f, h, w), or None.
        chunk_length: latent frames per chunk of this draw.
        teacher_speech_latents: of the teacher's own SpeechAE, zero where dropped; None where the
            teacher hears ``speech_latents``.
        rolled_out: (B,), True where the student samples its context itself; None without
            ``rollout``.
    """

    path: NoisyPath
    speech_latents: Tensor
    drops: Drops
    clean_latents: Tensor
    weights: Tensor | None = None
    rolled_out: Tensor | None = None
    chunk_length: int = 3
    teacher_speech_latents: Tensor | None = None

    @property
    def noise(self) -> Tensor:
        """Returns the unit Gaussian noise of the draw, (B, C, f, h, w).

        Slot 0 is never noisy: its values mean nothing.
        """
        return self.path.velocity + self.clean_latents


class A2VModule(StageModule):
    """Base of :class:`TeacherModule` and :class:`StudentModule`.

    Args:
        transformer: the network to train.
        speech_ae: is trained, too, at a rate of its own (``optimizer.lr_factors``).
        speech_encoder: frozen.
        vae: frozen; needed when batches hold frames instead of latents, and for previews.
        noise: noise and dropout settings.
        optimizer: AdamW settings.
        initial: part name -> checkpoint or folder.
        mouth_weight: weight of the mouth's tokens in the flow loss, where any other token counts 1.
            The papers weigh all tokens alike, but REST names the mouth as its weakest region.
            Needs landmarks; in clips without them all tokens count 1.
        compile_blocks: runs the blocks of all transformers through ``torch.compile``. The numbers
            are the same up to rounding; on two CPU cores a bfloat16 step takes a quarter less time,
            after up to a minute of compiling.
        sampling: how the model is to be sampled, as changes of the paper's sampling; ``rest fit``
            takes it from the top-level key ``sampling``. Checkpoints store it, and ``rest export``
            and ``rest test`` use it.

    Attributes:
        sampling: the paper's sampling with these changes.
    """

    transformer: A2VDiT
    speech_ae: SpeechAE
    speech_encoder: SpeechEncoder
    vae: VideoAutoencoder | None

    def __init__(
        self,
        transformer: A2VDiT,
        speech_ae: SpeechAE,
        speech_encoder: SpeechEncoder,
        vae: VideoAutoencoder | None = None,
        noise: NoiseSettings | None = None,
        optimizer: OptimizerSettings | None = None,
        initial: dict[str, str] | None = None,
        frozen: dict[str, nn.Module] | None = None,
        mouth_weight: float = 1.0,
        compile_blocks: bool = False,
        sampling: SamplingChanges | None = None,
    ) -> None:
        if not mouth_weight > 0:
            raise UserError(
                f"expected a mouth_weight above 0, got {mouth_weight}: 1 weighs all tokens alike"
            )
        super().__init__(
            {"transformer": transformer, "speech_ae": speech_ae},
            {"speech_encoder": speech_encoder, "vae": vae, **(frozen or {})},
            initial,
            optimizer,
        )
        freeze_decoder(speech_ae)
        self.noise = noise or NoiseSettings()
        self.sampling = (sampling or SamplingChanges()).of(Sampling())
        self.mouth_weight, self.compile_blocks = mouth_weight, compile_blocks
        self._loss_table = LossTable()
        transformer.remember_noise(self.noise.table)
        table = training_table(**self.noise.table)
        self.register_buffer("noise_table", table, persistent=False)
        self.noise_table: Tensor

    def configure_model(self) -> None:
        """Compiles the blocks, and shards the parts (FSDP2) under Lightning's
        ModelParallelStrategy.
        """
        if self.compile_blocks:
            self._compile()
        if self.device_mesh is None:
            return
        averaging = [c for c in self.trainer.callbacks if isinstance(c, WeightAveraging)]  # type: ignore[attr-defined]
        if averaging:  # Lightning's class copies the whole module, which fails for sharded ones
            raise UserError(
                "expected rest_lightning.callbacks.MovingAverage with sharded networks, got "
                f"{type(averaging[0]).__name__}: put it in its place in trainer.callbacks"
            )
        is_mixed = str(self.trainer.precision) == "bf16-mixed"
        for part in self.children():
            shard(part, self.device_mesh, torch.bfloat16 if is_mixed else None)
        # That strategy reads checkpoints itself, and frozen parts are not in them.
        self.strict_loading = False

    def _compile(self) -> None:
        if self.device_mesh is not None:
            raise UserError(
                "expected no compile_blocks with sharded networks, got both: leave compile_blocks "
                "out"
            )
        on_cpu = self.trainer.strategy.root_device.type == "cpu"
        if on_cpu and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
            raise UserError(
                "expected a C++ compiler for compile_blocks on a CPU, found none: install g++"
            )
        for part in self.children():
            if isinstance(part, A2VDiT):
                part.compile_blocks()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Stores the sampling, beside what every stage stores."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[SAMPLING_KEY] = asdict(self.sampling)

    def conditions(self, batch: dict[str, Any]) -> Conditions:
        """Returns the latents and speech latents of a batch, read from the caches on disk where
        the batch has them, else encoded here.

        Raises:
            UserError: clips of another length than 1 + whole chunks, or a cache that another
                network made.
        """
        latents = batch.get("latents")
        if latents is None:
            latents = self.encode_clip(batch["frames"], batch.get("reference"))
        elif self.vae is not None:
            self.check_maker(batch, "latents_of", self.vae)
        latents = latents.float()
        length, several = self.noise.chunk_length, self.noise.chunk_lengths
        if several and latents.shape[2] <= max(several):
            raise UserError(
                f"expected clips of more than {max(several)} latent frames, got "
                f"{latents.shape[2]}: set data.num_frames to {8 * max(several)}k + 1"
            )
        if not several and ((latents.shape[2] - 1) % length or latents.shape[2] < 2):
            raise UserError(
                f"expected clips of 1 + {length}k latent frames, got {latents.shape[2]}: "
                f"set data.num_frames to {8 * length}k + 1 or noise.chunk_length to a divisor of "
                f"{latents.shape[2] - 1}"
            )
        num_frames = 8 * (latents.shape[2] - 1) + 1
        features = self.speech_features(batch, num_frames)
        speech_latents = self.speech_ae.encode(features)
        weights = None
        if self.mouth_weight != 1.0:
            weights = token_weights(
                landmarks_of(batch, num_frames),
                latents.shape[3],
                latents.shape[4],
                self.mouth_weight,
            )
        return Conditions(latents, speech_latents, weights, self.teacher_speech(features))

    def teacher_speech(self, features: Tensor) -> Tensor | None:
        """Returns the teacher's own speech latents of features (B, F, 10, D_A), or None where it
        has no SpeechAE of its own.
        """
        return None

    @torch.no_grad()
    def encode_clip(self, frames: Tensor, reference: Tensor | None = None) -> Tensor:
        """Returns the latents of frames (B, 3, F, H, W); slot 0 is the reference (B, 3, H, W) where
        one is given.

        Raises:
            UserError: a stage without a VAE.
        """
        if self.vae is None:
            raise UserError(
                "expected batches with precomputed latents, got frames: give this stage a vae"
            )
        # In float32, as in `rest encode` and in the session.
        with torch.autocast(frames.device.type, enabled=False):
            latents = self.vae.encode(frames)
            if reference is not None:
                latents = torch.cat(
                    [self.vae.encode(reference[:, :, None]), latents[:, :, 1:]], dim=2
                )
        return latents

    @torch.no_grad()
    def speech_features(self, batch: dict[str, Any], num_frames: int) -> Tensor:
        """Returns the speech features (B, F, 10, D_A) of a batch.

        Raises:
            UserError: speech of another length than the clip.
        """
        self.check_maker(batch, "speech_of", self.speech_encoder, with_config=True)
        features = speech_features(batch, self.speech_encoder)
        if features.shape[1] != num_frames:
            raise UserError(
                f"expected speech of {num_frames} frames, as the clip has, got "
                f"{features.shape[1]}: look at `audio` and `audio_margin_frames` of the batches"
            )
        return features

    def draw(
        self, conditions: Conditions, generator: torch.Generator | None = None
    ) -> TrainingInput:
        """Draws noise, sigmas and dropouts of one step, and applies them to the conditions."""
        settings = self.noise
        generator = generator or step_generator(conditions.latents.device)
        length = settings.chunk_length
        if settings.chunk_lengths:
            choice = torch.randint(
                len(settings.chunk_lengths), (), generator=generator, device=generator.device
            )
            length = settings.chunk_lengths[int(choice)]
            conditions = conditions.whole_chunks(length)
        latents = conditions.latents
        sigma = self.sample_sigmas(latents, length, generator)
        drops = sample_drops(
            len(latents),
            settings.identity_dropout,
            settings.audio_dropout,
            settings.joint_dropout,
            generator=generator,
        )
        noise = torch.randn(
            latents.shape, generator=generator, device=latents.device, dtype=latents.dtype
        )
        path = noisy_path(latents, noise, sigma)
        path = NoisyPath(
            drop_reference(path.noisy_latents, drops.identity), path.velocity, path.sigma
        )
        speech_latents = drop_speech(conditions.speech_latents, drops.audio)
        clean_latents = drop_reference(latents, drops.identity)
        weights = conditions.weights
        teacher_speech = conditions.teacher_speech_latents
        if teacher_speech is not None:
            teacher_speech = drop_speech(teacher_speech, drops.audio)
        return TrainingInput(
            path,
            speech_latents,
            drops,
            clean_latents,
            weights,
            chunk_length=length,
            teacher_speech_latents=teacher_speech,
        )

    def sample_sigmas(
        self, latents: Tensor, chunk_length: int, generator: torch.Generator
    ) -> Tensor:
        """Draws noise levels (B, f) for latents (B, C, f, h, w), chunk by chunk."""
        settings = self.noise
        batch, num_chunks = latents.shape[0], (latents.shape[2] - 1) // chunk_length
        schedule = settings.schedule
        draw = SIGMA_SAMPLERS[schedule] if isinstance(schedule, str) else schedule
        return draw(
            batch,
            num_chunks,
            chunk_length,
            self.noise_table,
            settings.motion_dropout,
            generator=generator,
        )

    def forward(self, inputs: TrainingInput) -> Tensor:
        """Returns the network's velocity (B, C, f, h, w)."""
        return self.transformer(inputs.path.noisy_latents, inputs.path.sigma, inputs.speech_latents)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Returns the loss of one step; logs every term."""
        terms = self.losses(self.draw(self.conditions(batch)))
        self.log_dict({f"train/{name}": value.detach() for name, value in terms.items()})
        self.log("lr", self.optimizers().param_groups[0]["lr"], prog_bar=True)  # type: ignore[union-attr]
        self.log("train_loss", terms["loss"].detach(), prog_bar=True, logger=False)
        return terms["loss"]

    def losses(self, inputs: TrainingInput) -> dict[str, Tensor]:
        """Returns the losses by name; ``loss`` is the one that is minimised."""
        return {"loss": flow_matching_loss(self(inputs), inputs.path.velocity, inputs.weights)}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Logs losses on held-out clips, with the same draws every time."""
        conditions = self.conditions(batch)
        generator = torch.Generator(device=conditions.latents.device).manual_seed(batch_idx)
        losses = self.validation_losses(self.draw(conditions, generator))
        for name, value in losses.items():
            self.log(
                f"val/{name}",
                value,
                prog_bar=True,
                batch_size=len(conditions.latents),
                sync_dist=True,
            )

    def validation_losses(self, inputs: TrainingInput) -> dict[str, Tensor]:
        """Returns losses by name: the flow loss, by which all stages can be compared."""
        velocity = self(inputs)
        self._loss_table.add(velocity, inputs)
        return {"flow_loss": flow_matching_loss(velocity, inputs.path.velocity)}

    def on_validation_epoch_start(self) -> None:
        """Forgets the losses of the last validation."""
        self._loss_table = LossTable()

    def on_validation_epoch_end(self) -> None:
        """Logs the flow loss by chunk and by noise level, over the clips of all processes."""
        strategy = self.trainer.strategy
        for name, value in self._loss_table.means(
            lambda x: strategy.reduce(x.to(self.device), reduce_op="sum").cpu()
        ).items():
            self.log(f"val/{name}", value, rank_zero_only=False)


class LossTable:
    """Running sums of the flow loss by chunk and by noise level.

    Losses differ more between noise levels than between models, so one mean over all levels hides
    where a model is weak.
    """

    MAX_CHUNKS = 8  # later ones count as the last
    LEVELS = (0.5, 0.8, 0.95, 1.0)  # upper ends

    def __init__(self) -> None:
        # sum and count
        self.by_chunk = torch.zeros(2, self.MAX_CHUNKS, dtype=torch.float64)
        self.by_level = torch.zeros(2, len(self.LEVELS), dtype=torch.float64)

    @torch.no_grad()
    def add(self, velocity: Tensor, inputs: TrainingInput) -> None:
        """Takes in the velocities (B, C, f, h, w) that were predicted for a draw."""
        error = (velocity - inputs.path.velocity)[:, :, 1:].float().square().mean((1, 3, 4))
        frames = torch.arange(error.shape[1]) // inputs.chunk_length
        chunks = frames.clamp(max=self.MAX_CHUNKS - 1).expand(error.shape)
        # a copy without gaps, which bucketize asks for in a warning
        sigma = inputs.path.sigma[:, 1:].cpu().contiguous()
        levels = torch.bucketize(sigma, torch.tensor(self.LEVELS[:-1], dtype=sigma.dtype))
        values = error.double().cpu()
        for table, places in ((self.by_chunk, chunks), (self.by_level, levels)):
            ones = torch.ones_like(values)
            for row, numbers in enumerate((values, ones)):
                table[row].index_add_(0, places.flatten(), numbers.flatten())

    def means(self, total: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Returns the means by name, of chunks and levels that occurred.

        Args:
            total: adds a tensor up over all processes.
        """
        low = (0.0, *self.LEVELS)
        names = [f"flow_loss_chunk_{i + 1}" for i in range(self.MAX_CHUNKS)]
        names += [f"flow_loss_sigma_{a:g}_{b:g}" for a, b in zip(low, self.LEVELS, strict=False)]
        sums, counts = total(torch.cat([self.by_chunk, self.by_level], dim=1))
        return {
            name: float(value / count)
            for name, value, count in zip(names, sums, counts, strict=True)
            if count > 0
        }


def freeze_decoder(speech_ae: SpeechAE) -> None:
    """Takes a SpeechAE's decoder out of the training of a transformer.

    No loss depends on it there, and DDP would wait for its gradients.
    """
    for name, parameter in speech_ae.named_parameters():
        if name.startswith("decoder"):
            parameter.requires_grad_(False)


def step_generator(device: torch.device) -> torch.Generator:
    """Returns a generator for the draws of one step.

    It is seeded from torch's global state, which checkpoints restore.
    """
    seed = int(torch.randint(2**62, ()).item())
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # seed_everything gives all ranks one state, but they must not draw the same noise.
        seed += torch.distributed.get_rank()
    return torch.Generator(device=device).manual_seed(seed)
