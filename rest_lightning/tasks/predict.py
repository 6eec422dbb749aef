"""``rest predict``: many videos from many portraits and speeches, through the same session that streams live."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
from lightning import LightningModule
from numpy.typing import NDArray

from rest_lightning.data.streams import SpeechBlock
from rest_lightning.streaming.session import StreamingSession
from rest_lightning.talking_head import SamplingChanges, TalkingHead


class PredictModule(LightningModule):
    """Streams the blocks of a `SpeechStream`; the session, and with it the ID-Context Cache, lives on across steps.

    Args:
        model: folder of a model; None is the embedded one.
        sampling: changes of the model's own; ``rest predict`` takes them from the top-level key ``sampling``.
        seed: of the noise of every video.
    """

    def __init__(self, model: str | None = None, sampling: SamplingChanges | None = None, seed: int = 0) -> None:
        super().__init__()
        self.head = TalkingHead.from_pretrained(model)
        self.sampling = (sampling or SamplingChanges()).of(self.head.sampling)
        self.seed = seed
        self.configuration = {"model": model or "embedded", **asdict(self.sampling), "seed": seed}
        self.session: StreamingSession | None = None

    @property
    def size_px(self) -> int:
        """Side of the frames."""
        return self.head.size_px

    def on_predict_batch_start(self, batch: SpeechBlock, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Open a session when another pair begins: the ID-Sink is filled before its first samples."""
        if batch["is_first"]:
            self.session = self.head.open(batch["pair"].portrait, seed=self.seed, **asdict(self.sampling))

    def predict_step(self, batch: SpeechBlock, batch_idx: int) -> NDArray[np.uint8]:
        """The frames that this block completes, uint8 (n, H, W, 3)."""
        return self.session.flush() if batch["is_end"] else self.session.push(batch["samples"])  # type: ignore[union-attr]
