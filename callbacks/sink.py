"""Where predicted frames go: one mp4 and one report per portrait and speech."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from ..data.streams import PredictPair, SpeechBlock
from ..errors import UserError, note
from ..media.files import remove_leftovers, sha256_of, write_text_atomic
from ..media.provenance import load_signer
from ..media.writer import BackgroundWriter, Mp4Writer
from ..processes import owned
from ..tasks.predict import PredictModule


class VideoSink(Callback):
    """Writes ``<name>.mp4`` and ``<name>.json`` per pair as the frames come, in a thread and in
    bounded memory.

    A run that was interrupted leaves what it has as ``<name>.partial.mp4``, which plays. The next
    run skips the finished pairs: those with both files, made from the same portrait and speech (by
    their content) with the same settings. So a run that was killed, with no time to leave anything,
    does one pair again at most. A pair that cannot be made is left out: a row of ``failed.jsonl``
    says why.

    Args:
        out_dir: folder of the videos; made when absent.
        overwrite: replace what is there, and skip nothing.
        crf: quality of the video, see `Mp4Writer`.
        sign: certificate and key (PEM) that sign the videos, see
            `rest_lightning.media.provenance`; None leaves them unsigned.

    Raises:
        UserError: a certificate or key that cannot sign.
    """

    def __init__(
        self,
        out_dir: str,
        overwrite: bool = False,
        crf: int = 18,
        sign: tuple[str, str] | None = None,
    ) -> None:
        self.out_dir, self.overwrite, self.crf = Path(out_dir), overwrite, crf
        self._held = ExitStack()
        self._signer = None if sign is None else load_signer(*sign)
        self._file: Mp4Writer | None = None
        self._writer: BackgroundWriter | None = None
        self._pair: PredictPair | None = None
        self._failed: list[dict[str, str]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the finished pairs out of the data module's list.

        Raises:
            UserError: a folder that cannot be made or that another run works in, or a file of
                another origin under a name that is needed.
        """
        if stage != "predict":
            return
        if not isinstance(pl_module, PredictModule):
            name = type(pl_module).__name__
            raise UserError(
                f"expected VideoSink with PredictModule, got {name}: see configs/predict.yaml"
            )
        try:
            self.out_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = f"{self.out_dir} ({error.strerror})"
            raise UserError(
                f"expected a folder for videos, got {reason}: choose another out_dir"
            ) from None
        if trainer.is_global_zero:
            self._held.enter_context(owned(self.out_dir, "rest predict"))
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        pairs = list(datamodule.pairs)
        datamodule.pairs = [
            pair for pair in pairs if not self._is_finished(pair, pl_module.configuration)
        ]
        if len(datamodule.pairs) < len(pairs):
            rank_zero_info(
                f"{len(pairs) - len(datamodule.pairs)} of {len(pairs)} videos are done before"
            )

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: SpeechBlock,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the frames and the samples of one block; at the end of a pair, finish its files."""
        assert isinstance(pl_module, PredictModule)
        if pl_module.failure is not None:
            self._give_up(batch["pair"], pl_module.failure)
            return
        assert pl_module.session is not None
        clock = pl_module.session.clock
        with clock.stage("writing"):
            if batch["is_first"]:
                self._open(batch["pair"], pl_module.size_px)
            assert self._file is not None and self._writer is not None and self._pair is not None
            self._writer.write(outputs, batch["samples"])
        if not batch["is_end"]:
            return
        with clock.stage("writing"):
            self._writer.drain()
        report = pl_module.session.report()
        report.configuration.update(_expected(self._pair, pl_module.configuration))
        report.configuration["portrait"] = os.path.abspath(self._pair.portrait)
        report.configuration["speech"] = os.path.abspath(self._pair.speech)
        report.configuration["writing_thread"] = self._writer.threaded
        report.configuration["writing_thread_s"] = round(self._writer.busy_s, 3)
        # The report first: a pair counts as finished once the video has its final name.
        report.save(self._path(self._pair, ".json"))
        self._writer.close()
        self._path(self._pair, ".partial.mp4").unlink(missing_ok=True)
        self._file = self._writer = self._pair = None

    def _give_up(self, pair: PredictPair, reason: str) -> None:
        """Leave a pair out whose stream has failed; told once."""
        if self._writer is not None:
            self._writer.abort()
        self._file = self._writer = self._pair = None
        if not self._failed or self._failed[-1]["name"] != pair.name:
            note(f"{pair.name} is left out: {reason}")
            self._failed.append(_failed_row(pair, reason))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``failed.jsonl``: one row for each pair that was left out, with its reason; none
        when all are made.
        """
        before = getattr(trainer.predict_dataloaders, "failed", [])
        rows = [_failed_row(pair, reason) for pair, reason in before] + self._failed
        path = self.out_dir / "failed.jsonl"
        path.unlink(missing_ok=True)
        if rows:
            write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
            rank_zero_info(f"{len(rows)} pairs were left out: {path} says why")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the folder."""
        self._held.close()

    def _open(self, pair: PredictPair, size_px: int) -> None:
        for suffix in (".mp4", ".json"):
            remove_leftovers(self._path(pair, suffix))
        self._file = Mp4Writer(
            self._path(pair, ".mp4"),
            size_px,
            crf=self.crf,
            overwrite=self.overwrite,
            signer=self._signer,
        )
        self._writer, self._pair = BackgroundWriter(self._file), pair

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Keep what was done of the present video, under a name that says so, and let go of the
        folder: there is no teardown then.
        """
        with self._held:
            self._keep_partial()

    def _keep_partial(self) -> None:
        file, writer, pair = self._file, self._writer, self._pair
        self._file = self._writer = self._pair = None
        if file is None or writer is None or pair is None:
            return
        try:
            writer.drain()
            if file.num_frames == 0 or file.closed:  # closed: it was the writer that failed
                writer.abort()
                return
            file.path = self._path(pair, ".partial.mp4")
            writer.close()
        except UserError as error:
            # the disk is full, say; the exception under way is the one to be told
            rank_zero_info(f"nothing is left of {pair.name}: {error}")
            return
        rank_zero_info(f"{file.duration_s:.1f} s of {pair.name} are in {file.path}")

    def _path(self, pair: PredictPair, suffix: str) -> Path:
        return self.out_dir / (pair.name + suffix)

    def _is_finished(self, pair: PredictPair, configuration: dict[str, Any]) -> bool:
        video, report = self._path(pair, ".mp4"), self._path(pair, ".json")
        if self.overwrite or not video.exists():
            return False
        try:
            made_from = json.loads(report.read_text(encoding="utf-8"))["configuration"]
        except (OSError, ValueError, KeyError, TypeError):
            made_from = {}
        for key, value in _expected(pair, configuration).items():
            if made_from.get(key) != value:
                raise UserError(
                    f"expected {video} to be made with {key} {value}, got "
                    f"{made_from.get(key, 'no report')}: "
                    "choose another out_dir, or set overwrite"
                )
        if video.stat().st_nlink > 1:  # killed before its temporary name was taken away
            remove_leftovers(video)
        return True


def _failed_row(pair: PredictPair, reason: str) -> dict[str, str]:
    return {
        "name": pair.name,
        "portrait": str(pair.portrait),
        "speech": str(pair.speech),
        "reason": reason,
    }


def _expected(pair: PredictPair, configuration: dict[str, Any]) -> dict[str, Any]:
    """What a finished video was made from: the content of its files, wherever they lie."""
    files = {
        "portrait_sha256": sha256_of(pair.portrait),
        "speech_sha256": sha256_of(pair.speech),
    }
    return {**configuration, **files}
