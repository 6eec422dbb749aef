"""Evaluation inside Lightning: generates clips, scores them under a protocol, writes a result
row.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from numpy.typing import NDArray
from torchmetrics import Metric

from ..constants import SAMPLES_PER_FRAME, TEMPORAL_RATIO
from ..data.clips import load_frames
from ..data.layout import ManifestRow, manifest_path, read_manifest, read_sidecar
from ..diffusion.sampling import SamplingChanges
from ..errors import UserError
from ..evaluation.clips import write_clips, write_worst
from ..evaluation.faces import FaceFinder, MediapipeFaces, SidecarFaces
from ..evaluation.protocol import Protocol, read_protocol
from ..evaluation.row import ResultRow, write_row
from ..evaluation.scorer import ClipPair, Scorer
from ..generation import Generator, Streamed, Whole
from ..media.files import sha256_of, whole_file
from ..tasks.a2v import A2VModule
from ..tasks.predict import EvaluateModule
from ..tasks.student import StudentModule
from .previews import NO_VAE, borrowed_head, show_sample

SPLITS = {"test": "test", "validate": "val", "fit": "val"}
Frames = NDArray[np.uint8]


class Evaluation(Callback):
    """Generates clips, one at a time, and scores them and the true clips by a protocol: FID, FVD,
    Sync-C, and the rest.

    The portrait of a clip is its first frame, and frame k of the generated clip belongs to frame k
    of the true one.

    ``rest test`` of an `EvaluateModule` writes the row, and beside it one row per clip
    (``row.clips.csv``), the worst clips (``row.worst.png``) and the first clip (true | generated).
    With a teacher or student stage it runs at every n-th validation of ``rest fit`` and at ``rest
    validate`` on the validation clips, logs ``eval/<metric>`` and writes
    ``evaluation/step-<step>.json``; there an evaluation that fails is a warning.

    Args:
        protocol: what to measure, or the name or file of a protocol; its clips are the first ones
            of the split.
        out: file of the row; None: ``row.json`` of ``rest test`` in the trainer's folder.
        method: name in the row; None: that of the model.
        every_n_validations: of a training run.
        num_clips: fewer than the protocol's, for a quick look: the row is ranked apart.
        num_videos: clips shown as video and grid, in ``samples/`` and in TensorBoard.
        num_grid_frames: columns of a grid.
        seed: of the noise in a training run; `EvaluateModule` has its own.
        sampling: changes of the stage's own; ``rest fit`` takes it from the top-level key
            ``sampling``.
        metrics: your own, beside the protocol's: ``update`` takes a clip's frames, uint8
            (n, H, W, 3).
    """

    def __init__(
        self,
        protocol: str | Protocol,
        out: str | None = None,
        method: str | None = None,
        every_n_validations: int = 1,
        num_clips: int | None = None,
        num_videos: int = 2,
        num_grid_frames: int = 8,
        seed: int = 0,
        sampling: SamplingChanges | None = None,
        metrics: list[Metric] | None = None,
    ) -> None:
        if min(every_n_validations, num_grid_frames, 1 if num_clips is None else num_clips) < 1:
            raise UserError(
                "expected every_n_validations, num_grid_frames and num_clips of at least 1"
            )
        protocol = read_protocol(protocol) if isinstance(protocol, str) else protocol
        self.protocol, self.out, self.method = protocol, out, method
        self.every_n_validations, self.num_videos = every_n_validations, num_videos
        self.num_clips = min(protocol.num_clips, num_clips or protocol.num_clips)
        self.num_grid_frames, self.seed, self.sampling = (
            num_grid_frames,
            seed,
            sampling or SamplingChanges(),
        )
        self.metrics = metrics or []
        self.row: ResultRow | None = None
        self._scorer: Scorer | None = None
        self._resumed: dict[str, Any] | None = None
        self._generator: Generator | None = None
        self._num_validations = 0
        self._seen: list[str] = []  # clips of this process in this evaluation
        self._step = 0  # of its weights
        self._folder = Path()
        self._data_dir = ""  # of the batches
        self._manifest: dict[str, ManifestRow] = {}  # of that data set, by clip id
        self._video: Path | None = None  # of the first clip

    @property
    def state_key(self) -> str:
        """Several protocols may stand side by side."""
        return self._generate_state_key(protocol=self.protocol.name, version=self.protocol.version)

    def state_dict(self) -> dict[str, Any]:
        """How many validations there were, and an evaluation that has begun: of process 0, whose
        state is kept.
        """
        begun = self._scorer is not None and bool(self._seen)
        return {
            # one that has begun will begin again
            "num_validations": max(0, self._num_validations - begun),
            "scorer": self._scorer.state_dict() if self._scorer is not None and begun else None,
            "seen": list(self._seen),
            "step": self._step,
            "num_processes": self._num_processes(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the count; an evaluation that was cut short goes on when its scorer is made.

        The loop starts at the first clip again: what was scored before is skipped. The other
        processes kept nothing and score their clips again. Where the clips are shared out among
        another number of processes, or the weights have moved on, all of them do.
        """
        self._num_validations = state_dict["num_validations"]
        self._resumed = state_dict if state_dict["scorer"] is not None else None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be scored before anything is computed.

        Raises:
            UserError: weights that are not there, a stage that makes no clips.
        """
        if stage not in SPLITS:
            return
        if not isinstance(pl_module, EvaluateModule | A2VModule):
            name = type(pl_module).__name__
            raise UserError(
                f"expected Evaluation with a teacher, a student or EvaluateModule, got {name}: "
                "leave it out"
            )
        if isinstance(pl_module, A2VModule) and pl_module.vae is None:
            raise UserError(NO_VAE.replace("SampleVideos", "Evaluation"))
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)
        self._scorer_for(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse clips that are too short before the training, and not at its first validation."""
        self._check_clips(trainer.val_dataloaders)

    def _check_clips(self, loader: Any) -> None:
        """Refuse windows that are shorter than the protocol's clips, where a loader knows them."""
        num_frames = getattr(getattr(loader, "dataset", None), "num_frames", None)
        if num_frames is not None and num_frames < self.protocol.num_frames:
            blocks = math.ceil((self.protocol.num_frames - 1) / TEMPORAL_RATIO)
            raise UserError(
                f"expected data.num_frames of at least {self.protocol.num_frames} for "
                f"{self.protocol.name}, got {num_frames}: set it to {1 + TEMPORAL_RATIO * blocks}, "
                "with clips as long"
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An evaluation begins, if its turn has come."""
        if trainer.sanity_checking or not isinstance(pl_module, A2VModule):
            return
        self._check_clips(trainer.val_dataloaders)
        self._num_validations += 1
        due = (
            trainer.state.fn != "fit" or (self._num_validations - 1) % self.every_n_validations == 0
        )
        self._begin(pl_module) if due else self._drop()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The evaluation begins."""
        self._check_clips(trainer.test_dataloaders)
        self._begin(pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        loader: int = 0,
    ) -> None:
        """Generate and score the clips of a batch; here, weights that are averaged are those of the
        module.
        """
        if self._scorer is not None and not trainer.sanity_checking:
            self._batch(trainer, pl_module, batch)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        loader: int = 0,
    ) -> None:
        """The same."""
        self._batch(trainer, pl_module, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log and write the row; what cannot make one is a warning."""
        if self._scorer is None or trainer.sanity_checking:
            return
        path = self._folder / "evaluation" / f"step-{trainer.global_step:06d}.json"
        try:
            self._finish(trainer, pl_module, path)
        except UserError as error:
            if trainer.state.fn != "fit":
                raise
            rank_zero_warn(f"no evaluation at step {trainer.global_step}: {error}")
        self._drop()

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log and write the row.

        Raises:
            UserError: fewer usable clips than the protocol needs.
        """
        default = Path(trainer.default_root_dir) / "row.json"
        path = default if self.out is None else Path(self.out)
        self._finish(trainer, pl_module, path)
        # beside the row, where `rest leaderboard` looks for one to show
        if self._video is not None:
            with whole_file(path.with_suffix(self._video.suffix)) as temporary:
                shutil.copyfile(self._video, temporary)
        self._drop()

    def _begin(self, module: LightningModule) -> None:
        self._scorer_for(module)
        assert self._scorer is not None
        self._seen, self._step, self._manifest = [], module.global_step, {}
        saved, self._resumed = self._resumed, None
        if saved is None or module.global_rank:
            return
        if (saved.get("step"), saved.get("num_processes")) == (self._step, self._num_processes()):
            self._scorer.load_state_dict(saved["scorer"])
            self._seen = list(saved["seen"])

    def _scorer_for(self, module: LightningModule) -> None:
        if self._scorer is None:
            if isinstance(module, EvaluateModule):
                chunk_frames = module.generator.chunk_frames
            else:
                assert isinstance(module, A2VModule)
                chunk_frames = TEMPORAL_RATIO * module.transformer.cache_options.chunk_length
            # Building networks draws random numbers, which must not be those of the training.
            with torch.random.fork_rng(devices=[]):
                self._scorer = Scorer(
                    self.protocol, chunk_frames, module.device, metrics=self.metrics
                )

    def _drop(self) -> None:
        self._scorer = self._generator = self._video = None
        self._seen = []

    def _batch(self, trainer: Trainer, module: LightningModule, batch: dict[str, Any]) -> None:
        if "data_dir" not in batch:
            raise UserError(
                "expected Evaluation with clips of a TalkingHeadDataModule, got batches without "
                "data_dir: leave it out, and judge the model's videos with `rest score`"
            )
        self._data_dir = batch["data_dir"]
        if not self._manifest:
            self._manifest = {row.clip_id: row for row in read_manifest(self._data_dir)}
        for row, clip_id in enumerate(batch["clip_id"]):
            if len(self._seen) >= self._share(trainer):
                return
            if clip_id not in self._seen:
                self._seen.append(clip_id)
                self._clip(trainer, module, batch, row)

    @staticmethod
    def _num_processes() -> int:
        distributed = torch.distributed
        return (
            distributed.get_world_size()
            if distributed.is_available() and distributed.is_initialized()
            else 1
        )

    def _share(self, trainer: Trainer) -> int:
        """Clips of this process: the processes take turns, and the last ones may be given a clip a
        second time.
        """
        split = SPLITS[str(getattr(trainer.state.fn, "value", trainer.state.fn))]
        in_split = sum(row.split == split for row in self._manifest.values())
        num_clips = min(self.num_clips, in_split)
        return len(range(trainer.global_rank, num_clips, trainer.world_size))

    def _clip(
        self, trainer: Trainer, module: LightningModule, batch: dict[str, Any], row: int
    ) -> None:
        assert self._scorer is not None
        clip_id, num_frames = batch["clip_id"][row], self.protocol.num_frames
        try:
            truth = true_frames(self._data_dir, self._manifest[clip_id], batch, row, num_frames)
            start = batch["audio_margin_frames"][0] * SAMPLES_PER_FRAME
            audio = (
                batch["audio"][row, start:][: num_frames * SAMPLES_PER_FRAME].float().cpu().numpy()
            )
            portrait = torch.from_numpy(truth[0]).permute(2, 0, 1).float().div(127.5).sub(1.0)
            with self._generating(module, portrait.shape[-1]) as generator:
                num_timed = len(generator.first_frame_ms)
                frames = generator.generate(portrait.to(module.device), audio)
                first_ms = generator.first_frame_ms[num_timed:]
            faces: FaceFinder | None = None
            if self.protocol.faces == "mediapipe":
                faces = MediapipeFaces()
            elif self.protocol.faces == "sidecar":
                faces = SidecarFaces(_landmarks(self._data_dir, clip_id, int(batch["start"][row])))
            opening = batch["mouth_opening"][row].cpu().numpy()
            pair = ClipPair(
                name=clip_id,
                pieces=[(frames, truth)],
                audio=audio,
                true_audio=audio,
                reference=truth[0],
                true_opening=None if np.isnan(opening).any() else opening,
                faces=faces,
                facts={"time_to_first_frame_ms": round(first_ms[0], 1)} if first_ms else {},
            )
        except UserError as error:
            self._scorer.fail(clip_id, str(error).replace(f"{self._data_dir}/", ""))
            return
        self._scorer.add(pair)
        if (
            len(self._seen) <= self.num_videos
            and trainer.is_global_zero
            and frames.shape == truth.shape
        ):
            folder = self._folder / "samples"
            video = show_sample(
                trainer, folder, clip_id, truth, frames, audio, self.num_grid_frames, True
            )
            self._video = self._video or video

    @contextmanager
    def _generating(self, module: LightningModule, size_px: int) -> Iterator[Generator]:
        """What generates: the evaluated model, or the parts of a stage, which train on afterwards
        as before.
        """
        if isinstance(module, EvaluateModule):
            self._generator = module.generator
            yield module.generator
            return
        assert isinstance(module, A2VModule)
        settings = self.sampling.of(module.sampling)
        before = self._generator
        if isinstance(module, StudentModule):
            with borrowed_head(module, settings, size_px) as head:
                self._generator = Streamed(head, settings, self.seed)
                _keep_times(before, self._generator)
                yield self._generator
                self._generator.head = None  # type: ignore[assignment]
            return
        parts = (module.vae, module.speech_encoder, module.speech_ae, module.transformer)
        self._generator = Whole(*parts, settings, self.seed, size_px)
        _keep_times(before, self._generator)
        yield self._generator

    def _finish(self, trainer: Trainer, module: LightningModule, path: Path) -> None:
        assert self._scorer is not None
        own = (
            module.configuration
            if isinstance(module, EvaluateModule)
            else {"model": type(module).__name__}
        )
        generator = self._generator
        command = str(getattr(trainer.state.fn, "value", trainer.state.fn))
        config = {
            "command": command,
            "split": SPLITS[command],
            "manifest_sha256": sha256_of(manifest_path(self._data_dir)) if self._data_dir else None,
            "precision": str(trainer.precision),
            "frame_source": {"generated": "decoder", "truth": "mp4"},
            "step": trainer.global_step,
            **own,
        }
        self.row = self._scorer.row(
            self.method or own["model"],
            {} if generator is None else generator.describe(),
            {} if generator is None else generator.speed(),
            config,
        )
        numbers = {
            f"eval/{key}": value
            for key, value in self.row.metrics.items()
            if isinstance(value, float)
        }
        truths = {
            f"eval_truth/{key}": v
            for key, v in self.row.ground_truth.items()
            if isinstance(v, float)
        }
        for name, value in (numbers | truths).items():
            module.log(name, value, rank_zero_only=True)
        clips, worst = self._scorer.clips(), self._scorer.worst()
        if trainer.is_global_zero:
            write_row(self.row, path)
            write_clips(clips, path)
            write_worst(worst, path)
            rank_zero_info(f"{path}: {self.row.num_clips} clips, {len(self.row.failures)} failed")


def true_frames(
    root: str, clip: ManifestRow, batch: dict[str, Any], row: int, num_frames: int
) -> Frames:
    """Returns the first frames of a batch's window, uint8 (num_frames, H, W, 3): of the batch, or
    of the clip's file where the batch has none.
    """
    if "frames" in batch:
        floats = batch["frames"][row, :, :num_frames]
        return (
            ((floats.float() + 1.0) * 127.5)
            .round()
            .to(torch.uint8)
            .permute(1, 2, 3, 0)
            .cpu()
            .numpy()
        )
    return load_frames(root, clip, [(int(batch["start"][row]), num_frames)])[0]


def _landmarks(root: str, clip_id: str, start: int) -> dict[str, Any] | None:
    found = read_sidecar(root, clip_id).landmarks
    return None if found is None else {name: points[start:] for name, points in found.items()}


def _keep_times(before: Generator | None, now: Generator) -> None:
    if before is not None:
        now.seconds, now.num_frames, now.first_frame_ms = (
            before.seconds,
            before.num_frames,
            before.first_frame_ms,
        )
