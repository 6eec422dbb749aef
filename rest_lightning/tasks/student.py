"""Training of the streaming student: on ground truth and by distillation (REST sec. 3.2 and 3.4),
and with two stages that REST does not have, self-rollout and distillation of steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from rest_lightning.diffusion.losses import asd_loss, flow_matching_loss
from rest_lightning.diffusion.noise import add_noise
from rest_lightning.diffusion.rollout import Context, roll_out
from rest_lightning.diffusion.sampling import Sampling, SamplingChanges
from rest_lightning.diffusion.schedule import sampling_sigmas
from rest_lightning.diffusion.step_distillation import (
    average_velocity,
    guided_velocity,
    levels_of_steps,
    sample_sigmas_of_steps,
)
from rest_lightning.errors import UserError
from rest_lightning.models.speech import SpeechEncoder
from rest_lightning.models.speech_ae import SpeechAE
from rest_lightning.models.transformer import A2VDiT
from rest_lightning.models.vae import VideoAutoencoder
from rest_lightning.parts import build_part, open_part, read_part
from rest_lightning.tasks.a2v import (
    A2VModule,
    Conditions,
    NoiseSettings,
    TrainingInput,
    step_generator,
)
from rest_lightning.tasks.base import OptimizerSettings

TeacherSpeech = Literal["own", "student"]


@dataclass
class ASDSettings:
    """Asynchronous streaming distillation (REST sec. 3.4).

    Attributes:
        teacher: checkpoint of the teacher stage, or a folder that holds its transformer.
        alpha: weight of the contrastive loss.
        beta: weight of the smoothness loss.
        temperature: of the contrastive loss.
        anchored: whether the smoothness loss starts at the reference (REST's sum starts at v_0);
            False starts at the first generated frame.
        teacher_speech: with ``own`` the teacher hears speech through the SpeechAE that it was
            trained with, frozen; with ``student`` through the student's, which goes on training, so
            that the teacher's output drifts along. REST does not say which.

    Raises:
        UserError: another ``teacher_speech``.
    """

    teacher: str
    alpha: float = 0.2
    beta: float = 0.2
    temperature: float = 0.1
    anchored: bool = True
    teacher_speech: TeacherSpeech = "own"

    def __post_init__(self) -> None:
        if self.teacher_speech not in get_args(TeacherSpeech):
            raise UserError(
                f"expected asd.teacher_speech of {', '.join(get_args(TeacherSpeech))}, got "
                f"{self.teacher_speech!r}"
            )


@dataclass
class RolloutSettings:
    """Self-rollout: later chunks read the keys and values of chunks that the student has sampled.

    REST trains on contexts of ground truth, which a stream never has. Only the student's context
    changes here. The noisy chunks and their targets stay as they are, and so does what the teacher
    of ASD sees. The samples start from the noise of the draw and carry no gradient;
    ``cache_gradient`` decides whether the context's keys and values carry one.

    Attributes:
        num_steps: Euler steps per chunk, without guidance: fewer than in a stream, since they are
            cheaper and make larger errors to learn from.
        shift: shift of the sigma table; None takes LTX's, which follows the number of tokens.
        probability: that a sample is rolled out; the others keep contexts of noised ground truth.
            The ground truth does not exactly continue a chunk that the student has sampled, so at 1
            the student may learn to ignore its context.

    Raises:
        UserError: no step, or a probability outside 0 to 1.
    """

    num_steps: int = 4
    shift: float | None = None
    probability: float = 0.5

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise UserError(
                f"expected rollout.num_steps of at least 1, got {self.num_steps}: use 2 to 8"
            )
        if not 0 < self.probability <= 1:
            raise UserError(
                f"expected a rollout.probability above 0 and up to 1, got {self.probability}: "
                "use 0.5, or leave rollout out"
            )


@dataclass
class DistillSettings:
    """Distillation of guidance and steps (not in REST), see
    :mod:`rest_lightning.diffusion.step_distillation`.

    One step of the student, without guidance, learns to end where ``num_steps / student_steps``
    guided steps of the frozen source end. Noise levels are those of the student's sampler, drawn
    for each chunk. Contexts are ground truth at the noise level that the student's or the source's
    cache would hold. There is no other loss.

    Attributes:
        source: checkpoint of a student stage, or a model folder; the student should start from it,
            too.
        guidance: weight of the source's joint guidance; 1 for a source that is distilled itself.
        num_steps: Euler steps of the source per chunk.
        student_steps: Euler steps of the student; divides ``num_steps``. Halve them stage by stage
            (8, 4, 2).
        shift: shift of the source's sigma table; None takes LTX's. The student's table is every
            n-th level of it, so that each of its steps ends where a step of the source ends.
        table_steps: of a source that is distilled itself: steps of the table from which its own
            levels were taken; None: ``num_steps``.

    Raises:
        UserError: steps that do not divide each other, or nothing to distil.
    """

    source: str
    guidance: float = 6.0
    num_steps: int = 8
    student_steps: int = 4
    shift: float | None = None
    table_steps: int | None = None

    def __post_init__(self) -> None:
        if self.student_steps < 1 or self.num_steps < 1 or self.num_steps % self.student_steps:
            raise UserError(
                f"expected distill.student_steps to divide num_steps, got {self.student_steps} and "
                f"{self.num_steps}: "
                "use 4 of 8 or 2 of 4"
            )
        if self.num_steps == self.student_steps and self.guidance == 1.0:
            raise UserError(
                f"expected guidance or steps to distil, got guidance 1 and {self.num_steps} steps "
                "for both: "
                "lower distill.student_steps"
            )
        if self.table_steps is not None and self.table_steps % self.num_steps:
            raise UserError(
                f"expected distill.num_steps to divide table_steps, got {self.num_steps} and "
                f"{self.table_steps}: take the num_steps that the source's table began with"
            )

    @property
    def sampling(self) -> Sampling:
        """Returns the sampling that the student learns; it works with no other."""
        total = self.table_steps or self.num_steps
        return Sampling(self.student_steps, guidance=1.0, shift=self.shift, table_steps=total)

    def sigmas(self, num_steps: int, num_tokens: int) -> list[float]:
        """Returns the levels of ``num_steps`` steps, from the table of source and student."""
        total = self.table_steps or self.num_steps
        return sampling_sigmas(num_steps, self.shift, num_tokens, total)


class StudentModule(A2VModule):
    """Trains an A2V-DiT with chunked attention: on ground truth, or in one of the later stages.

    All chunks run in one parallel forward, which gives the same as chunk after chunk with the
    cache.

    Args:
        transformer, speech_ae, speech_encoder, vae, noise, optimizer, initial, mouth_weight,
            compile_blocks, sampling: see :class:`A2VModule`; ``initial`` may take the transformer
            from the teacher's checkpoint, whose parameter names are the same.
        asd: distillation from the teacher, or None.
        rollout: contexts that the student samples itself, with or without ``asd``, or None.
        distill: distillation of guidance and steps from another student, or None; a stage of its
            own. Checkpoints then store the sampling that is learnt, whatever ``sampling`` says.

    Raises:
        UserError: a teacher's transformer, chunk lengths that differ between ``noise`` and the
            transformer, or stages that exclude each other.
    """

    teacher: A2VDiT
    teacher_speech_ae: SpeechAE
    source: A2VDiT

    def __init__(
        self,
        transformer: A2VDiT,
        speech_ae: SpeechAE,
        speech_encoder: SpeechEncoder,
        vae: VideoAutoencoder | None = None,
        noise: NoiseSettings | None = None,
        optimizer: OptimizerSettings | None = None,
        initial: dict[str, str] | None = None,
        asd: ASDSettings | None = None,
        mouth_weight: float = 1.0,
        rollout: RolloutSettings | None = None,
        distill: DistillSettings | None = None,
        compile_blocks: bool = False,
        sampling: SamplingChanges | None = None,
    ) -> None:
        noise = noise or NoiseSettings()
        if transformer.config["attention"] != "chunked":
            raise UserError(
                "expected a student with attention 'chunked', got 'full': that is the teacher's"
            )
        options = transformer.cache_options
        if options.chunk_length != noise.chunk_length:
            raise UserError(
                f"expected one chunk length, got {options.chunk_length} in the "
                f"transformer's cache_options and {noise.chunk_length} in noise: make them equal"
            )
        if set(options.trained_lengths) != set(noise.chunk_lengths):
            raise UserError(
                f"expected one set of chunk lengths, got {list(options.trained_lengths)} in the "
                "transformer's "
                f"cache_options.trained_lengths and {list(noise.chunk_lengths)} in "
                "noise.chunk_lengths: make them equal"
            )
        if distill and (asd or rollout):
            raise UserError(
                "expected distill alone, got asd or rollout beside it: make them stages one after "
                "another"
            )
        for name, settings in (("rollout", rollout), ("distill", distill)):
            if settings and (options.cache_noise == "per_step" or not options.use_context):
                got = f"cache_noise {options.cache_noise} and use_context {options.use_context}"
                raise UserError(
                    f"expected a cache of last_step or clean_pass for {name}, got {got}: leave "
                    f"{name} out"
                )
        frozen: dict[str, torch.nn.Module] = {}
        if asd:
            frozen["teacher"] = _load_frozen(asd.teacher, transformer, "teacher", "full")
            if asd.teacher_speech == "own":
                frozen["teacher_speech_ae"] = open_part("speech_ae", asd.teacher)
        if distill:
            frozen["source"] = _load_frozen(distill.source, transformer, "source", "chunked")
        super().__init__(
            transformer,
            speech_ae,
            speech_encoder,
            vae,
            noise,
            optimizer,
            initial,
            frozen,
            mouth_weight,
            compile_blocks,
            sampling,
        )
        self.asd, self.rollout, self.distill = asd, rollout, distill
        if distill:  # training sees the levels of the sampler alone, not those of the table
            transformer.remember_noise(None)
            self.sampling = distill.sampling

    def sample_sigmas(
        self, latents: Tensor, chunk_length: int, generator: torch.Generator
    ) -> Tensor:
        """Draws noise levels as in every stage; with ``distill`` those at which the student's steps
        begin.
        """
        if self.distill is None:
            return super().sample_sigmas(latents, chunk_length, generator)
        table = torch.tensor(
            self._sigmas(self.distill.student_steps, latents), device=latents.device
        )
        num_chunks = (latents.shape[2] - 1) // chunk_length
        return sample_sigmas_of_steps(
            len(latents), num_chunks, chunk_length, table, generator=generator
        )

    def draw(
        self, conditions: Conditions, generator: torch.Generator | None = None
    ) -> TrainingInput:
        """Draws noise, sigmas and dropouts of one step, and with ``rollout`` the samples to roll
        out.
        """
        generator = generator or step_generator(conditions.latents.device)
        inputs = super().draw(conditions, generator)
        if self.rollout is None:
            return inputs
        uniform = torch.rand(len(conditions.latents), generator=generator, device=generator.device)
        return replace(inputs, rolled_out=uniform < self.rollout.probability)

    @torch.no_grad()
    def teacher_speech(self, features: Tensor) -> Tensor | None:
        """Returns speech latents of the teacher's own SpeechAE with ``asd.teacher_speech: own``,
        else None.
        """
        if self.asd is None or self.asd.teacher_speech != "own":
            return None
        return self.teacher_speech_ae.encode(features)

    def forward(self, inputs: TrainingInput, context: Context | None = None) -> Tensor:
        """Returns the network's velocity (B, C, f, h, w).

        Args:
            inputs: the draw.
            context: what later chunks see of earlier ones; None takes the noisy latents of the
                draw, or with ``cache_noise: clean_pass`` the clean ones.
        """
        if context is None and self._caches_clean:
            context = self._truth(inputs, 0.0)
        path = inputs.path
        transformer = self.transformer.with_chunk_length(inputs.chunk_length)
        if context is None:
            return transformer(path.noisy_latents, path.sigma, inputs.speech_latents)
        return transformer(
            path.noisy_latents,
            path.sigma,
            inputs.speech_latents,
            context_latents=context.latents,
            context_sigma=context.sigma,
        )

    def losses(self, inputs: TrainingInput) -> dict[str, Tensor]:
        """Returns the flow loss against ground truth, and with ``asd`` the contrastive and the
        smoothness loss against the teacher.

        With ``distill`` it is the distance to the source's guided velocities instead.
        """
        if self.distill is not None:
            return {"loss": self.distillation_loss(inputs, self.distill)}
        velocity = self(inputs, self.own_context(inputs))
        if self.asd is None:
            return {"loss": flow_matching_loss(velocity, inputs.path.velocity, inputs.weights)}
        with torch.no_grad():
            own = inputs.teacher_speech_latents
            speech = inputs.speech_latents if own is None else own
            teacher_velocity = self.teacher(inputs.path.noisy_latents, inputs.path.sigma, speech)
        terms = asd_loss(
            velocity,
            teacher_velocity,
            inputs.path.velocity,
            alpha=self.asd.alpha,
            beta=self.asd.beta,
            temperature=self.asd.temperature,
            mask=inputs.weights,
            anchored=self.asd.anchored,
        )
        error = (velocity - teacher_velocity)[:, :, 1:].detach().float().square().mean()
        return {
            "loss": terms.loss,
            "flow": terms.flow,
            "contrastive": terms.contrastive,
            "smoothness": terms.smoothness,
            "teacher_error": error,
        }

    def validation_losses(self, inputs: TrainingInput) -> dict[str, Tensor]:
        """Returns the flow loss, and with ``rollout`` also that of contexts which the student has
        sampled.

        With ``distill`` it is the loss of that stage alone: such a student predicts average
        velocities of a guided stream, of which the flow loss says nothing.
        """
        if self.distill is not None:
            return {"distillation_loss": self.distillation_loss(inputs, self.distill)}
        losses = super().validation_losses(inputs)
        if self.rollout is not None and inputs.rolled_out is not None:
            context = self.own_context(
                replace(inputs, rolled_out=torch.ones_like(inputs.rolled_out))
            )
            losses["rollout_flow_loss"] = flow_matching_loss(
                self(inputs, context), inputs.path.velocity
            )
        return losses

    def own_context(self, inputs: TrainingInput) -> Context | None:
        """Returns contexts with the student's own samples in the rows to roll out, or None where
        there are no such rows.
        """
        if self.rollout is None or inputs.rolled_out is None:
            return None
        mask = inputs.rolled_out.to(inputs.clean_latents.device)
        # Sharded networks gather their weights in every forward, so all ranks must run equally
        # many: there all rows are rolled out, and the mask picks some afterwards.
        rows = (
            torch.arange(len(mask), device=mask.device)
            if self.device_mesh
            else mask.nonzero().flatten()
        )
        if not len(rows):
            return None
        noise, clean = inputs.noise[rows, :, 1:], inputs.clean_latents
        sigmas = self._sigmas(self.rollout.num_steps, clean)
        transformer = self.transformer.with_chunk_length(inputs.chunk_length)
        own = roll_out(
            transformer, clean[rows, :, :1], noise, inputs.speech_latents[rows].detach(), sigmas
        )
        path = inputs.path
        truth = (
            self._truth(inputs, 0.0)
            if self._caches_clean
            else Context(path.noisy_latents, path.sigma)
        )
        latents, sigma = (
            truth.latents.index_copy(0, rows, own.latents),
            truth.sigma.index_copy(0, rows, own.sigma),
        )
        latents = torch.where(mask[:, None, None, None, None], latents, truth.latents)
        return Context(latents, torch.where(mask[:, None], sigma, truth.sigma))

    def distillation_loss(self, inputs: TrainingInput, settings: DistillSettings) -> Tensor:
        """Returns the mean squared distance between the student's velocity and the average velocity
        of the source's guided steps.
        """
        latents, sigma, speech = (
            inputs.path.noisy_latents,
            inputs.path.sigma,
            inputs.speech_latents.detach(),
        )
        tables = [
            self._sigmas(count, latents) for count in (settings.student_steps, settings.num_steps)
        ]
        own, context = (
            self._truth(inputs, 0.0 if self._caches_clean else table[-2]) for table in tables
        )
        levels = levels_of_steps(
            sigma,
            torch.tensor(tables[1], device=sigma.device),
            settings.num_steps // settings.student_steps,
        )

        source = self.source.with_chunk_length(inputs.chunk_length)

        def guided(sample: Tensor, level: Tensor) -> Tensor:
            return guided_velocity(source, sample, level, speech, context, settings.guidance)

        with torch.no_grad():
            target = average_velocity(guided, latents, levels)
        return flow_matching_loss(self(inputs, own), target, inputs.weights)

    @property
    def _caches_clean(self) -> bool:
        return self.transformer.cache_options.cache_noise == "clean_pass"

    def _truth(self, inputs: TrainingInput, level: float) -> Context:
        """The ground truth at one noise level, with the noise of the draw."""
        sigma = torch.full_like(inputs.path.sigma, level)
        sigma[:, 0] = 0.0
        return Context(add_noise(inputs.clean_latents, inputs.noise, sigma), sigma)

    def _sigmas(self, num_steps: int, latents: Tensor) -> list[float]:
        """Noise levels of a sampler with the shift of ``distill`` or ``rollout``."""
        if self.distill is not None:
            return self.distill.sigmas(num_steps, self._num_tokens(latents))
        assert self.rollout is not None
        return sampling_sigmas(num_steps, self.rollout.shift, self._num_tokens(latents))

    def _num_tokens(self, latents: Tensor) -> int:
        """Latent tokens of the window, on which LTX's schedule depends."""
        return self.transformer.cache_options.num_slots * latents.shape[3] * latents.shape[4]


def _load_frozen(source: str, student: A2VDiT, role: str, attention: str) -> A2VDiT:
    """Returns a transformer of the student's shape, as a ``teacher`` or a ``source``."""
    description, state = read_part("transformer", source)
    frozen = build_part(description)
    assert isinstance(frozen, A2VDiT)
    if frozen.config["attention"] != attention:
        other = "student" if attention == "full" else "teacher"
        raise UserError(
            f"expected a {role} with attention '{attention}', got a {other} in {source}"
        )
    names = ["in_channels", "num_layers", "num_attention_heads", "attention_head_dim", "speech_dim"]
    for name in [*names, *(["cache_options"] if attention == "chunked" else [])]:
        if frozen.config[name] != student.config[name]:
            raise UserError(
                f"expected a {role} of the student's shape, got {name} {frozen.config[name]} in "
                f"{source} against "
                f"{student.config[name]}: use one transformer configuration for both stages"
            )
    if frozen.rope.causal_ratio != student.rope.causal_ratio:
        raise UserError(
            f"expected a {role} with the student's causal_positions, got "
            f"{frozen.config['causal_positions']} in {source} against "
            f"{student.config['causal_positions']}: use one value in both stages"
        )
    frozen.load_state_dict(state)
    return frozen
