"""Predicting a list: the session's frames in files, skipping, resuming, interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from rest_lightning.callbacks.sink import VideoSink
from rest_lightning.data.module import TalkingHeadDataModule
from rest_lightning.errors import UserError
from rest_lightning.media.audio import open_speech
from rest_lightning.media.video import read_frames
from rest_lightning.talking_head import TalkingHead
from rest_lightning.tasks.predict import PredictModule
from rest_lightning.torchvision_compat import ensure_torchvision

ensure_torchvision()
import lightning  # noqa: E402


def predict(
    model: Path,
    pairs: Any,
    *callbacks: lightning.Callback,
    block_samples: int = 7000,
    seed: int = 0,
) -> Any:
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    data = TalkingHeadDataModule(predict_pairs=pairs, predict_block_samples=block_samples)
    module = PredictModule(str(model), seed=seed)
    return trainer.predict(module, datamodule=data, return_predictions=False)


class StopAfter(lightning.Callback):
    """Raises at the start of a batch, as Ctrl-C or a crash would."""

    def __init__(self, batch_idx: int, error: type[BaseException]) -> None:
        self.batch_idx, self.error = batch_idx, error

    def on_predict_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if batch_idx == self.batch_idx:
            raise self.error("stopped by the test")


def files(folder: Path) -> dict[str, float]:
    return {path.name: path.stat().st_mtime_ns for path in sorted(folder.iterdir())}


def luma(frames: np.ndarray) -> np.ndarray:
    return frames @ np.array([0.299, 0.587, 0.114])


NAMES = [f"portrait-{i}-speech-{i}" for i in range(3)]
WHOLE = sorted(f"{name}{suffix}" for name in NAMES for suffix in (".mp4", ".json"))


@pytest.mark.parametrize("block_samples", [640, 16_000])
def test_videos_hold_what_a_session_gives(
    tmp_path: Path, model_folder: Path, pairs: list[dict[str, str]], block_samples: int
) -> None:
    predict(model_folder, pairs, VideoSink(str(tmp_path), crf=1), block_samples=block_samples)
    assert list(files(tmp_path)) == WHOLE
    head = TalkingHead.from_pretrained(model_folder)
    for pair, name in zip(pairs, NAMES, strict=True):
        samples = open_speech(pair["speech"]).read_all()
        session = head.open(pair["portrait"])
        expected = np.concatenate([session.push(samples), session.flush()])
        frames = read_frames(tmp_path / f"{name}.mp4")
        assert len(frames) == -(-len(samples) // 640) == len(expected)
        # frames like noise lose their chroma to 4:2:0
        assert np.abs(luma(frames) - luma(expected)).mean() < 8
        report = json.loads((tmp_path / f"{name}.json").read_text())
        assert report["num_frames"] == len(frames)
        assert report["configuration"]["portrait"] == pair["portrait"]
        assert report["stage_s"]["writing"] > 0
        with av.open(str(tmp_path / f"{name}.mp4")) as container:
            sound = container.streams.audio[0]
            assert float(sound.duration * sound.time_base) == pytest.approx(
                len(samples) / 16_000, abs=0.065
            )


@pytest.mark.parametrize(
    ("error", "outcome"), [(RuntimeError, RuntimeError), (KeyboardInterrupt, SystemExit)]
)
def test_an_interrupted_list_goes_on(
    tmp_path: Path,
    model_folder: Path,
    pairs: list[dict[str, str]],
    error: type[BaseException],
    outcome: type[BaseException],
) -> None:
    # Blocks of 7000 samples: 4 + end for the first pair, 3 + end for the second; stop before its
    # end.
    with pytest.raises((outcome, error)):
        predict(model_folder, pairs, VideoSink(str(tmp_path)), StopAfter(8, error))
    first = [f"{NAMES[0]}.json", f"{NAMES[0]}.mp4"]
    assert list(files(tmp_path)) == [*first, f"{NAMES[1]}.partial.mp4"]
    assert len(read_frames(tmp_path / f"{NAMES[1]}.partial.mp4")) == 24
    before = files(tmp_path)
    predict(model_folder, pairs, VideoSink(str(tmp_path)))
    after = files(tmp_path)
    assert list(after) == WHOLE
    assert all(after[name] == before[name] for name in first)
    predict(model_folder, pairs, VideoSink(str(tmp_path)))
    assert files(tmp_path) == after


def test_files_of_another_origin_are_refused_unless_overwritten(
    tmp_path: Path, model_folder: Path, pairs: list[dict[str, str]]
) -> None:
    predict(model_folder, pairs[:1], VideoSink(str(tmp_path)))
    with pytest.raises(
        UserError, match=("to be made with seed 1, got 0: choose another out_dir, or set overwrite")
    ):
        predict(model_folder, pairs[:1], VideoSink(str(tmp_path)), seed=1)
    before = files(tmp_path)
    predict(model_folder, pairs[:1], VideoSink(str(tmp_path), overwrite=True), seed=1)
    after = files(tmp_path)
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in after)
    (tmp_path / f"{NAMES[0]}.json").unlink()
    with pytest.raises(UserError, match="got no report"):
        predict(model_folder, pairs[:1], VideoSink(str(tmp_path)))


def test_folder_that_cannot_be_made(
    tmp_path: Path, model_folder: Path, pairs: list[dict[str, str]]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"expected a folder for videos, got .*file"):
        predict(model_folder, pairs[:1], VideoSink(str(tmp_path / "file")))


def test_predicting_without_pairs(model_folder: Path) -> None:
    with pytest.raises(UserError, match=r"set data\.predict_pairs"):
        predict(model_folder, None)


def test_devices_take_turns(pairs: list[dict[str, str]]) -> None:
    data = TalkingHeadDataModule(predict_pairs=pairs)
    data.setup("predict")
    assert [batch["pair"].name for batch in data.predict_dataloader() if batch["is_end"]] == NAMES


@pytest.mark.parametrize(("place", "what"), [(0, "speech"), (1, "portrait"), (2, "speech")])
def test_a_bad_pair_is_a_row_and_the_list_goes_on(
    tmp_path: Path, model_folder: Path, pairs: list[dict[str, str]], place: int, what: str
) -> None:
    bad = tmp_path / "bad.bin"
    bad.write_bytes(b"neither one nor the other")
    listed = [dict(pair) for pair in pairs]
    listed[place] |= {what: str(bad), "name": "bad"}
    predict(model_folder, listed, VideoSink(str(tmp_path / "out")))
    made = sorted(path.stem for path in (tmp_path / "out").glob("*.mp4"))
    assert made == sorted(name for k, name in enumerate(NAMES) if k != place)
    (row,) = (tmp_path / "out" / "failed.jsonl").read_text().splitlines()
    assert json.loads(row)["name"] == "bad" and "bad.bin" in json.loads(row)["reason"]
    predict(model_folder, [pairs[place]], VideoSink(str(tmp_path / "out")))
    assert not (tmp_path / "out" / "failed.jsonl").exists()


def test_finished_means_the_same_content_wherever_it_lies(
    tmp_path: Path, model_folder: Path, pairs: list[dict[str, str]]
) -> None:
    pair = {**pairs[0], "name": "a"}
    predict(model_folder, [pair], VideoSink(str(tmp_path / "out")))
    before = files(tmp_path / "out")
    moved = tmp_path / "moved.wav"
    moved.write_bytes(Path(pair["speech"]).read_bytes())
    predict(model_folder, [{**pair, "speech": str(moved)}], VideoSink(str(tmp_path / "out")))
    assert files(tmp_path / "out") == before
    moved.write_bytes(Path(pairs[1]["speech"]).read_bytes())
    with pytest.raises(UserError, match="speech_sha256"):
        predict(model_folder, [{**pair, "speech": str(moved)}], VideoSink(str(tmp_path / "out")))


def test_videos_are_signed_where_asked(pairs: list[dict[str, str]], tmp_path: Path) -> None:
    pytest.importorskip("c2pa", reason="c2pa-python (extra `provenance`) signs")
    from certificates import make_files
    from tiny_head import make_head

    from rest_lightning.media.provenance import read_provenance

    signer = make_files(tmp_path / "signer")
    make_head().save_pretrained(tmp_path / "model")
    sign = (str(signer.certificate), str(signer.key))
    predict(tmp_path / "model", pairs[:1], VideoSink(str(tmp_path / "out"), sign=sign))
    (video,) = (tmp_path / "out").glob("*.mp4")
    assert read_provenance(video).is_intact
