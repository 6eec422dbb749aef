"""The modules of ``rest predict``, which makes many videos through a streaming session, and of
``rest test``, which scores a model.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from lightning import LightningModule
from numpy.typing import NDArray

from rest_lightning.data.streams import SpeechBlock
from rest_lightning.diffusion.sampling import SamplingChanges
from rest_lightning.errors import UserError
from rest_lightning.generation import describe_model, load_generator
from rest_lightning.media.portrait import parse_crop
from rest_lightning.parts import DtypeName, dtype_on
from rest_lightning.streaming.engine import EngineOptions
from rest_lightning.streaming.session import StreamingSession
from rest_lightning.talking_head import DEFAULT_MODEL, TalkingHead


class PredictModule(LightningModule):
    """Streams the blocks of a `SpeechStream`.

    The session, and with it the ID-Context Cache, lives on from step to step.

    Args:
        model: folder of a model; None is the bundled one.
        sampling: changes of the model's own; ``rest predict`` takes them from the top-level key
            ``sampling``.
        seed: of the noise of every video.
        dtype: of the model, as for ``rest talk``; ``auto`` takes bfloat16 where the trainer's
            device multiplies it natively.
        size_px: side of the square frames: the model's own or twice that, see
            :class:`~rest_lightning.streaming.engine.EngineOptions`; None takes the model's.
    """

    def __init__(
        self,
        model: str | None = None,
        sampling: SamplingChanges | None = None,
        seed: int = 0,
        dtype: DtypeName = "auto",
        size_px: int | None = None,
    ) -> None:
        super().__init__()
        self.head = TalkingHead.from_pretrained(model)
        self.engine_options = EngineOptions(size_px=size_px)
        self.size_px = self.engine_options.output_px(self.head.size_px)
        self.sampling = (sampling or SamplingChanges()).of(self.head.sampling)
        self.model_name, self.seed, self.dtype_name = model or DEFAULT_MODEL, seed, dtype
        self.session: StreamingSession | None = None
        self.failure: str | None = None

    @property
    def configuration(self) -> dict[str, Any]:
        """Returns what determines the videos, beside portrait and speech. Needs a trainer."""
        larger = {"size_px": self.size_px} if self.size_px != self.head.size_px else {}
        return {
            "model": self.model_name,
            **asdict(self.sampling),
            "seed": self.seed,
            "dtype": str(self._head_dtype()).removeprefix("torch."),
            **larger,
        }

    def _head_dtype(self) -> torch.dtype:
        return dtype_on(self.dtype_name, self.trainer.strategy.root_device.type)

    def setup(self, stage: str) -> None:
        """Converts the model to its dtype."""
        self.head.set_dtype(self._head_dtype())

    def on_predict_batch_start(
        self, batch: SpeechBlock, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Opens a session when another pair begins, so that the ID-Sink is filled before its first
        samples.
        """
        if not batch["is_first"]:
            return
        self.failure, pair = None, batch["pair"]
        try:
            crop = parse_crop(pair.crop)
            self.session = self.head.open(
                pair.portrait,
                crop=crop,
                seed=self.seed,
                options=self.engine_options,
                **asdict(self.sampling),
            )
        except UserError as error:
            self.failure = str(error)

    def predict_step(self, batch: SpeechBlock, batch_idx: int) -> NDArray[np.uint8]:
        """Returns the frames that this block completes, uint8 (n, H, W, 3).

        A pair that has failed gets none: ``failure`` says why, and the next pair goes on.
        """
        if self.failure is None:
            assert self.session is not None
            try:
                if batch["is_end"]:
                    return self.session.flush()
                return self.session.push(batch["samples"])
            except UserError as error:
                self.failure = str(error)
        return np.zeros((0, self.size_px, self.size_px, 3), np.uint8)


class EvaluateModule(LightningModule):
    """Holds the generator of the clips: a student streams, a teacher makes whole clips.

    Args:
        model: folder of `rest export`, or checkpoint of a student or teacher stage; None is the
            bundled model.
        vae: checkpoint or folder with the VAE, where ``model`` is a checkpoint.
        sampling: changes of the model's own; ``rest test`` takes them from the top-level key
            ``sampling``.
        seed: of the noise of every clip.
        dtype: of the model, as for ``rest talk``. Score a model of paper size in bfloat16, as it
            runs; the row says so.
        clip_latents: of a teacher: latents of each of READ's overlapping clips; None makes the
            whole clip at once.
    """

    def __init__(
        self,
        model: str | None = None,
        vae: str | None = None,
        sampling: SamplingChanges | None = None,
        seed: int = 0,
        dtype: DtypeName = "float32",
        clip_latents: int | None = None,
    ) -> None:
        super().__init__()
        self.generator = load_generator(model, vae, sampling, seed, clip_latents)
        self.configuration: dict[str, Any] = describe_model(model)
        self.dtype_name = dtype

    def setup(self, stage: str) -> None:
        """Converts the model to its dtype."""
        dtype = dtype_on(self.dtype_name, self.trainer.strategy.root_device.type)
        if dtype != torch.float32:
            self.generator.set_dtype(dtype)
            self.configuration["dtype"] = str(dtype).removeprefix("torch.")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Does nothing: the callback ``Evaluation`` generates and scores, clip by clip."""
