"""``rest test --config configs/eval/...``: a model that is only scored, by the evaluation callback."""

from __future__ import annotations

from typing import Any

from lightning import LightningModule

from rest_lightning.evaluation.generate import describe_model, load_generator
from rest_lightning.talking_head import SamplingChanges


class EvaluateModule(LightningModule):
    """Holds what generates the clips: a student streams, a teacher makes whole clips.

    Args:
        model: folder of `rest export`, checkpoint of a student or teacher stage; None is the embedded model.
        vae: checkpoint or folder with the VAE, where ``model`` is a checkpoint.
        sampling: changes of the model's own; ``rest test`` takes them from the top-level key ``sampling``.
        seed: of the noise of every clip.
    """

    def __init__(
        self,
        model: str | None = None,
        vae: str | None = None,
        sampling: SamplingChanges | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.generator = load_generator(model, vae, sampling, seed)
        self.configuration: dict[str, Any] = describe_model(model)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Nothing: the callback generates and scores, clip by clip."""
