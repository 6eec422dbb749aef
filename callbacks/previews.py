"""Sample videos while a stage trains: the truth beside what the network makes of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor

from ..constants import FPS, SAMPLES_PER_FRAME
from ..data.clips import cut_audio
from ..diffusion.sampling import Sampling, SamplingChanges
from ..errors import UserError
from ..generation import generate_clip
from ..media.writer import Mp4Writer
from ..streaming.engine import ChunkEngine, to_uint8
from ..talking_head import TalkingHead
from ..tasks.a2v import A2VModule
from ..tasks.speech_ae import SpeechAEModule
from ..tasks.student import StudentModule
from ..tasks.vae import VAEModule

NO_VAE = (
    "expected a stage with a vae, got none: set model.vae and model.initial.vae, or leave "
    "SampleVideos out"
)


class SampleVideos(Callback):
    """Writes ``samples/step-<step>-<clip_id>.mp4`` (truth | sample, with the speech) and a grid of
    frames to every logger that takes pictures.

    VAE stage: the reconstruction. Teacher: the whole clip from noise, full attention. Student: the
    stream, chunk by chunk through the ID-Context Cache, from the clip's reference and speech.
    Teacher and student need a ``vae``. SpeechAE has nothing to show. Samples come from the averaged
    weights where weights are averaged, do not touch the random numbers of the training, and a
    sample that fails is a warning, never the end of the training.

    Args:
        every_n_validations: sample at the first validation of a run and at every n-th after it.
        num_clips: clips of the first validation batch.
        num_grid_frames: columns of the grid.
        seed: of the noise, the same at every validation.
        sampling: changes of the stage's own; ``rest fit`` takes them from the top-level key
            ``sampling``.
    """

    def __init__(
        self,
        every_n_validations: int = 1,
        num_clips: int = 2,
        num_grid_frames: int = 8,
        seed: int = 0,
        sampling: SamplingChanges | None = None,
    ) -> None:
        if min(every_n_validations, num_clips, num_grid_frames) < 1:
            raise UserError(
                "expected every_n_validations, num_clips and num_grid_frames of at least 1"
            )
        self.every_n_validations, self.num_clips, self.num_grid_frames = (
            every_n_validations,
            num_clips,
            num_grid_frames,
        )
        self.sampling = sampling or SamplingChanges()
        self.seed = seed
        self._num_validations = 0
        self._folder: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder: asking for it later would wait for the other ranks."""
        self._folder = Path(trainer.log_dir or trainer.default_root_dir) / "samples"

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Sample the first batch; here, weights that are averaged are those of the module."""
        if (
            batch_idx
            or dataloader_idx
            or trainer.sanity_checking
            or isinstance(pl_module, SpeechAEModule)
        ):
            return
        self._num_validations += 1
        due = (
            trainer.state.fn != "fit" or (self._num_validations - 1) % self.every_n_validations == 0
        )
        if not due or not trainer.is_global_zero:
            return
        try:
            self._write(trainer, pl_module, batch)
        except Exception as error:
            rank_zero_warn(f"no sample videos at step {trainer.global_step}: {error}")

    def _write(self, trainer: Trainer, module: LightningModule, batch: dict[str, Any]) -> None:
        num_clips = self.num_clips
        batch = {
            name: value[:num_clips] if isinstance(value, Tensor | list) else value
            for name, value in batch.items()
        }
        with torch.inference_mode():
            truth, sample = self.sample(module, batch)
        truth, sample = truth.cpu(), sample.cpu()
        assert self._folder is not None
        left = audio_left_frames(module, batch)
        for row, clip_id in enumerate(clip_ids(batch, len(truth))):
            audio = batch["audio"][row].float().cpu().numpy()
            show_sample(
                trainer,
                self._folder,
                clip_id,
                truth[row].numpy(),
                sample[row].numpy(),
                cut_audio(audio, left, truth.shape[1], 0, 0),
                self.num_grid_frames,
            )

    def sample(self, module: LightningModule, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Truth and sample of a validation batch, both uint8 (B, F, H, W, 3).

        Raises:
            UserError: a stage without ``vae``, or one that is not known here.
        """
        if isinstance(module, VAEModule):
            reconstruction = module.vae.decode_raw(module.vae.encode_moments(batch["frames"])[0])
            return to_uint8(batch["frames"]), to_uint8(reconstruction)
        if not isinstance(module, A2VModule):
            raise UserError(f"expected a stage of rest_lightning, got {type(module).__name__}")
        if module.vae is None:
            raise UserError(NO_VAE)
        conditions = module.conditions(batch)
        latents = conditions.latents
        frames = batch.get("frames")
        truth = module.vae.decode(latents) if frames is None else frames
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        if isinstance(module, StudentModule):
            reference = (
                batch["reference"]
                if "reference" in batch
                else module.vae.decode(latents[:, :, :1])[:, :, 0]
            )
            left = audio_left_frames(module, batch)
            return to_uint8(truth), self._stream(module, reference, batch["audio"], noise, left)
        sampling = self.sampling.of(module.sampling)
        sigmas = sampling.sigmas(latents[0, 0].numel())
        clip = generate_clip(
            module.transformer,
            latents[:, :, :1],
            conditions.speech_latents,
            noise,
            sigmas,
            sampling.branches,
        )
        return to_uint8(truth), to_uint8(module.vae.decode(clip))

    def _stream(
        self, module: A2VModule, reference: Tensor, audio: Tensor, noise: Tensor, left_frames: int
    ) -> Tensor:
        """What a session gives for the clip's reference and speech, the reference first: uint8
        (B, F, H, W, 3).
        """
        sampling = self.sampling.of(module.sampling)
        with borrowed_head(module, sampling, reference.shape[-1]) as head:
            engine = ChunkEngine(head, len(reference), sampling)
            engine.start(reference)
            videos = [to_uint8(reference[:, :, None])]
            for chunk, piece in enumerate(noise[:, :, 1:].split(engine.chunk_length, dim=2)):
                first_frame = 1 + chunk * engine.chunk_frames  # frame 0 is the reference
                start = left_frames + first_frame - head.speech_encoder.left_context_frames
                window = audio[:, start * SAMPLES_PER_FRAME :][:, : engine.window_samples]
                videos.append(engine.step(window, piece))
        return torch.cat(videos, dim=1)


def audio_left_frames(module: Any, batch: Mapping[str, Any]) -> int:
    """Frames of audio before a batch's clips; where it does not say, those that the stage reads."""
    encoder = getattr(module, "speech_encoder", None)
    own = 0 if encoder is None else encoder.left_context_frames
    left: int = batch.get("audio_margin_frames", (own, 0))[0]
    return left


def clip_ids(batch: Mapping[str, Any], num_clips: int) -> list[str]:
    """Names of a batch's clips; numbers where it has none."""
    names: list[str] = batch.get("clip_id") or [f"clip-{number}" for number in range(num_clips)]
    return names


def show_sample(
    trainer: Trainer,
    folder: Path,
    clip_id: str,
    truth: NDArray[np.uint8],
    sample: NDArray[np.uint8],
    audio: NDArray[np.float32],
    num_grid_frames: int,
    with_video: bool = False,
) -> Path:
    """Write ``<folder>/step-<step>-<clip_id>.mp4`` (truth | sample), and a grid of frames to every
    logger that takes pictures: TensorBoard, Weights & Biases, MLflow.

    Args:
        trainer: gives step and loggers.
        folder: made when absent.
        clip_id: of the file and of the log.
        truth, sample: (F, H, W, 3).
        audio: (640 F,).
        num_grid_frames: columns of the grid.
        with_video: also to the loggers (TensorBoard: as an animation).

    Returns:
        The video's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pair = np.concatenate([truth, sample], axis=2)
    path = folder / f"step-{trainer.global_step:06d}-{clip_id}.mp4"
    with Mp4Writer(path, pair.shape[1:3], overwrite=True) as writer:
        writer.write(pair)
        writer.write_audio(audio)
    columns = np.linspace(0, len(pair) - 1, min(num_grid_frames, len(pair))).round().astype(int)
    grid = np.concatenate(
        [np.concatenate(list(video[columns]), axis=1) for video in (truth, sample)]
    )
    for logger in trainer.loggers:
        _log_picture(logger, f"samples/{clip_id}", grid, trainer.global_step)
        if with_video:
            _log_video(logger, f"videos/{clip_id}", pair, path, trainer.global_step)
    return path


def _log_picture(logger: Any, key: str, picture: NDArray[np.uint8], step: int) -> None:
    """Hand a picture (H, W, 3) to a logger; one that takes none, such as the CSV logger, is left
    out.
    """
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_image"):  # TensorBoard
        experiment.add_image(key, picture, step, dataformats="HWC")
    elif hasattr(logger, "log_image"):  # Weights & Biases
        logger.log_image(key, [picture], step=step)
    elif hasattr(experiment, "log_image") and hasattr(logger, "run_id"):  # MLflow
        experiment.log_image(logger.run_id, picture, f"{key}/step-{step:06d}.png")


def _log_video(logger: Any, key: str, video: NDArray[np.uint8], path: Path, step: int) -> None:
    """The same for a video (F, H, W, 3), which lies in a file."""
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_image"):
        experiment._get_file_writer().add_summary(_animation(key, video), step)
    elif hasattr(logger, "log_video"):
        logger.log_video(key, [str(path)], step=step, format=["mp4"])
    elif hasattr(experiment, "log_artifact") and hasattr(logger, "run_id"):
        experiment.log_artifact(logger.run_id, str(path), "videos")


def _animation(tag: str, video: NDArray[np.uint8]) -> Any:
    """What TensorBoard's add_video makes, without moviepy: an image summary that holds a GIF, here
    at half the rate.
    """
    from io import BytesIO

    from PIL import Image
    from tensorboard.compat.proto.summary_pb2 import Summary

    first, *others = (Image.fromarray(frame) for frame in video[::2])
    content = BytesIO()
    first.save(content, "GIF", save_all=True, append_images=others, duration=2000 // FPS, loop=0)
    height, width = video.shape[1:3]
    image = Summary.Image(
        height=height, width=width, colorspace=3, encoded_image_string=content.getvalue()
    )
    return Summary(value=[Summary.Value(tag=tag, image=image)])


@contextmanager
def borrowed_head(module: A2VModule, sampling: Sampling, size_px: int) -> Iterator[TalkingHead]:
    """A talking head of the module's own parts; they train on afterwards as they did before.

    Raises:
        UserError: a module without ``vae``, or a teacher.
    """
    if module.vae is None:
        raise UserError(NO_VAE)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield TalkingHead(
            module.vae,
            module.speech_encoder,
            module.speech_ae,
            module.transformer,
            sampling,
            size_px,
        )
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for part, training in modes:
            part.training = training
