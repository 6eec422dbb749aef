"""``rest predict``: many videos from many portraits and speeches, through the same session that streams live."""

from __future__ import annotations

from typing import Any

import numpy as np
from lightning import LightningModule
from numpy.typing import NDArray

from rest_lightning.data.streams import SpeechBlock
from rest_lightning.streaming.session import StreamingSession
from rest_lightning.talking_head import TalkingHead


class PredictModule(LightningModule):
    """Streams the blocks of a `SpeechStream`; the session, and with it the ID-Context Cache, lives on across steps.

    Args:
        model: folder of a model; None is the embedded one.
        num_steps, guidance: override the model's own sampling.
        seed: of the noise of every video.
    """

    def __init__(
        self, model: str | None = None, num_steps: int | None = None, guidance: float | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        self.head = TalkingHead.from_pretrained(model)
        self.configuration = {
            "model": model or "embedded",
            "num_steps": self.head.sampling.num_steps if num_steps is None else num_steps,
            "guidance": self.head.sampling.guidance if guidance is None else guidance,
            "seed": seed,
        }
        self.session: StreamingSession | None = None

    @property
    def size_px(self) -> int:
        """Side of the frames."""
        return self.head.size_px

    def on_predict_batch_start(self, batch: SpeechBlock, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Open a session when another pair begins: the ID-Sink is filled before its first samples."""
        if batch["is_first"]:
            options: dict[str, Any] = {k: v for k, v in self.configuration.items() if k != "model"}
            self.session = self.head.open(batch["pair"].portrait, **options)

    def predict_step(self, batch: SpeechBlock, batch_idx: int) -> NDArray[np.uint8]:
        """The frames that this block completes, uint8 (n, H, W, 3)."""
        return self.session.flush() if batch["is_end"] else self.session.push(batch["samples"])  # type: ignore[union-attr]
