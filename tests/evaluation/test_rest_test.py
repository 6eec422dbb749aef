"""`rest test` under a protocol: the row of the generated clips; the same callback while a stage
trains.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from rest_lightning.cli import main
from rest_lightning.config import read_config
from rest_lightning.data.clips import cut_audio
from rest_lightning.data.layout import Sidecar, complete_clip_ids, finish_dataset, write_sidecar
from rest_lightning.diffusion.sampling import SamplingChanges
from rest_lightning.evaluation.protocol import read_protocol
from rest_lightning.evaluation.row import ResultRow, read_rows
from rest_lightning.evaluation.scorer import ClipPair, Scorer
from rest_lightning.generation import Streamed, Whole, generate_clip, load_generator
from rest_lightning.media.video import read_clip_audio, read_frames
from rest_lightning.streaming.engine import to_uint8
from rest_lightning.talking_head import TalkingHead

NUM_FRAMES = 48


@pytest.fixture(scope="session")
def test_clips(talkers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The six talkers, all of them in the split `test`. Read only."""
    root = tmp_path_factory.mktemp("test_clips") / "data"
    shutil.copytree(talkers, root)
    for clip_id in complete_clip_ids(root):
        content = json.loads((root / "clips" / f"{clip_id}.json").read_text())
        write_sidecar(root, Sidecar.from_json(json.dumps(content | {"split": "test"})))
    finish_dataset(root, {"made_by": "tests"})
    return root


def words(protocol_file: Path, data: Path, out: Path, *args: str) -> list[str]:
    overlay = out / "overlay.yaml"
    overlay.write_text(
        json.dumps(
            {
                "data": {
                    "data_dir": str(data),
                    "num_frames": 57,
                    "progress": False,
                    "num_workers": 0,
                },
                "trainer": {
                    "accelerator": "cpu",
                    "default_root_dir": str(out),
                    "enable_progress_bar": False,
                    "callbacks": [
                        {"class_path": "Evaluation", "init_args": {"protocol": str(protocol_file)}}
                    ],
                },
            }
        )
    )
    return ["test", "--config", "test", "--config", str(overlay), *args]


def windows(data: Path) -> list[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """Name, frames, audio and true opening of the clips that the protocol takes: whole clips are
    one window here.
    """
    found = []
    for clip_id in complete_clip_ids(data)[:3]:
        path = data / "clips" / f"{clip_id}.mp4"
        opening = Sidecar.from_json(path.with_suffix(".json").read_text()).mouth_opening
        audio = read_clip_audio(path, 57)[: NUM_FRAMES * 640]
        found.append((clip_id, read_frames(path, 0, NUM_FRAMES), audio, np.asarray(opening)))
    return found


def check_row(
    row: ResultRow, protocol_file: Path, clips: list[Any], generated: list[np.ndarray]
) -> None:
    scorer = Scorer(read_protocol(protocol_file))
    for (name, truth, audio, opening), frames in zip(clips, generated, strict=True):
        assert scorer.add(ClipPair(name, [(frames, truth)], audio, audio, truth[0], opening)), (
            scorer.failures
        )
    expected = scorer.row("x")
    for side in ("metrics", "ground_truth"):
        mine, theirs = getattr(row, side), getattr(expected, side)
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            assert mine[key] == (
                None if value is None else pytest.approx(value, rel=1e-4, abs=2e-6)
            ), key


def test_student_streams_and_is_scored(
    protocol_file: Path,
    test_clips: Path,
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = ["--model.model", str(model_folder), "--model.seed", "3", "--sampling.num_steps", "1"]
    args += ["--trainer.callbacks.method", "tiny student"]
    assert main(words(protocol_file, test_clips, tmp_path, *args)) == 0, capsys.readouterr().err
    (row,) = read_rows(tmp_path / "row.json")
    assert (row.method, row.num_clips, row.num_frames, row.failures) == (
        "tiny student",
        3,
        NUM_FRAMES,
        [],
    )
    assert row.sampler == {
        **{"num_steps": 1, "guidance": 1.0, "shift": 1.0, "reference_guidance": 0.0},
        **{"table_steps": None, "seed": 3, "mode": "streamed"},
    }
    assert row.speed["frames_per_second"] > 0 and row.speed["time_to_first_frame_ms"] > 0
    table = list(csv.DictReader((tmp_path / "row.clips.csv").open()))
    assert len(table) == 3 and all(float(line["time_to_first_frame_ms"]) > 0 for line in table)
    assert (tmp_path / "row.worst.png").is_file()
    assert row.config["split"] == "test" and row.config["size_px"] == 64
    assert row.config["frame_source"] == {"generated": "decoder", "truth": "mp4"}

    head, clips, generated = TalkingHead.from_pretrained(model_folder), windows(test_clips), []
    for _, truth, audio, _ in clips:
        session = head.open(truth[0], seed=3, num_steps=1)
        generated.append(np.concatenate([session.push(audio), session.flush()]))
    check_row(row, protocol_file, clips, generated)
    samples = sorted((tmp_path / "samples").glob("*.mp4"))
    assert len(samples) == 2 and (tmp_path / "row.mp4").read_bytes() == samples[0].read_bytes()


def test_teacher_makes_whole_clips_on_the_sessions_clock(
    protocol_file: Path,
    test_clips: Path,
    recipe: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint, vae = str(recipe.final("teacher")), str(recipe.final(recipe.vae_stage))
    args = [
        "--model.model",
        checkpoint,
        "--model.vae",
        vae,
        "--sampling.num_steps=2",
        "--sampling.shift=1.0",
    ]
    assert main(words(protocol_file, test_clips, tmp_path, *args)) == 0, capsys.readouterr().err
    (row,) = read_rows(tmp_path / "row.json")
    assert row.sampler["mode"] == "whole clip" and row.sampler["guidance"] == 4.0  # the stage's

    module = recipe.clis["teacher"].model
    changes = SamplingChanges(num_steps=2, shift=1.0)
    generator = load_generator(checkpoint, vae, changes)
    assert isinstance(generator, Whole)
    clips, generated = windows(test_clips), []
    for _, truth, audio, _ in clips:
        # Internal frame 0 is the portrait: the speech begins one frame later. Cut as the data
        # module cuts a clip's.
        shifted = np.concatenate([np.zeros(640, np.float32), audio])
        encoder = generator.speech_encoder
        cut = cut_audio(
            shifted, 0, NUM_FRAMES + 1, encoder.left_context_frames, encoder.lookahead_frames
        )
        picture = torch.from_numpy(truth[0]).permute(2, 0, 1)[None, :, None].float() / 127.5 - 1
        with torch.no_grad():
            speech = generator.speech_ae.encode(encoder(torch.from_numpy(cut)[None]))
            reference = generator.vae.encode(picture)
            noise = torch.randn(1, 4, 7, 2, 2, generator=torch.Generator().manual_seed(0))
            clip = generate_clip(
                generator.transformer,
                reference,
                speech,
                noise,
                [1.0, 0.5, 0.0],
                generator.sampling.branches,
            )
            generated.append(to_uint8(generator.vae.decode(clip))[0, 1:].numpy())
    check_row(row, protocol_file, clips, generated)
    assert module.transformer.config["attention"] == "full"


OVERLAY = """
trainer:
  logger:
    class_path: lightning.pytorch.loggers.TensorBoardLogger
    init_args: {{save_dir: {folder}, name: "", version: ""}}
  callbacks+:
    - class_path: rest_lightning.callbacks.evaluation.Evaluation
      init_args:
        protocol: {protocol}
        num_videos: 1
data: {{data_dir: {data}}}
sampling: {{num_steps: 1, guidance: 1.0, shift: 1.0}}
"""


@pytest.mark.parametrize("stage", ["student", "teacher"])
def test_stage_is_evaluated_while_it_trains_and_does_not_notice(
    recipe: Any, protocol_file: Path, tmp_path: Path, stage: str
) -> None:
    from dataclasses import asdict, replace

    protocol = replace(read_protocol(protocol_file), min_clips=1, measures=["fid", "talking"])
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(
        OVERLAY.format(folder=tmp_path, protocol=json.dumps(asdict(protocol)), data=recipe.data)
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "no evaluation")
        cli = recipe.run(stage, tmp_path, overlays=(overlay,))
    files = sorted((tmp_path / "evaluation").glob("*.json"))
    row = ResultRow.from_dict(json.loads(files[-1].read_text()))
    assert row.config["split"] == "val" and row.num_clips == 1 and row.config["step"] == 3
    assert row.sampler["mode"] == {"student": "streamed", "teacher": "whole clip"}[stage]
    plain, evaluated = (
        torch.load(path / "final.ckpt", weights_only=False)
        for path in (recipe.out / stage, tmp_path)
    )
    assert all(
        torch.equal(value, evaluated["state_dict"][name])
        for name, value in plain["state_dict"].items()
    )
    (last,) = tmp_path.rglob("last.ckpt")  # final.ckpt holds weights alone
    callbacks = torch.load(last, weights_only=False)["callbacks"]
    (state,) = (value for key, value in callbacks.items() if key.startswith("Evaluation"))
    assert state["num_validations"] == 0, "it is of step 2; the one validation comes after step 3"
    (callback,) = (each for each in cli.trainer.callbacks if type(each).__name__ == "Evaluation")
    assert callback.state_dict()["num_validations"] == len(files)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path), {"images": 0}).Reload()
    logged = events.Scalars("eval/fid")[-1]
    assert logged.value == pytest.approx(row.metrics["fid"], rel=1e-4)
    (tag,) = (tag for tag in events.Tags()["images"] if tag.startswith("videos/"))
    video = events.Images(tag)[-1]
    assert video.encoded_image_string[:4] == b"GIF8" and (video.width, video.height) == (128, 64)


@pytest.mark.parametrize("change", [None, "step", "num_processes"])
def test_an_evaluation_goes_on_from_its_state(
    protocol_file: Path, model_folder: Path, test_clips: Path, change: str | None
) -> None:
    """Half the clips before a checkpoint, half after it, in another callback: Lightning's loop
    begins at the first clip again, and none may count twice. Clips of other weights, or of another
    sharing out, must not be mixed in.
    """
    from types import SimpleNamespace

    from rest_lightning.callbacks.evaluation import Evaluation
    from rest_lightning.data.module import TalkingHeadDataModule
    from rest_lightning.tasks.predict import EvaluateModule

    data = TalkingHeadDataModule(
        str(test_clips), batch_size=2, num_frames=57, num_workers=0, progress=False
    )
    module = EvaluateModule(str(model_folder), sampling=SamplingChanges(num_steps=1))
    state = SimpleNamespace(fn="test")
    trainer: Any = SimpleNamespace(
        datamodule=data,
        test_dataloaders=data.test_dataloader(),
        world_size=1,
        global_rank=0,
        is_global_zero=False,
        global_step=0,
        state=state,
    )
    batches = [data.on_after_batch_transfer(batch) for batch in data.test_dataloader()][:2]
    rows = []
    for cut in (False, True):
        callback = Evaluation(read_protocol(protocol_file), num_videos=0)
        callback.on_test_start(trainer, module)
        callback.on_test_batch_end(trainer, module, None, batches[0], 0)
        if cut:
            saved, callback = (
                callback.state_dict(),
                Evaluation(read_protocol(protocol_file), num_videos=0),
            )
            assert callback._scorer is None and saved["seen"] == list(batches[0]["clip_id"])
            callback.load_state_dict(saved if change is None else saved | {change: 7})
            callback.on_test_start(trainer, module)
            assert callback._scorer is not None and callback._scorer.num_clips == (
                2 if change is None else 0
            )
            callback.on_test_batch_end(trainer, module, None, batches[0], 0)
        callback.on_test_batch_end(trainer, module, None, batches[1], 1)
        assert callback._scorer is not None
        rows.append(callback._scorer.row("x"))
    assert rows[0].num_clips == rows[1].num_clips == 3 and rows[0].metrics == rows[1].metrics


def test_turns_of_a_training_run(protocol_file: Path, recipe: Any) -> None:
    """Every third validation; a checkpoint of one that has begun begins it again; a sanity check is
    none.
    """
    from types import SimpleNamespace

    from rest_lightning.callbacks.evaluation import Evaluation

    module = recipe.clis["student"].model
    trainer: Any = SimpleNamespace(
        sanity_checking=False, state=SimpleNamespace(fn="fit"), val_dataloaders=None
    )

    def turns(callback: Evaluation, count: int) -> list[bool]:
        due = []
        for _ in range(count):
            callback.on_validation_start(trainer, module)
            due.append(callback._scorer is not None)
            callback._seen = ["a clip"] if due[-1] else []
        return due

    make = lambda: Evaluation(read_protocol(protocol_file), every_n_validations=3)  # noqa: E731
    callback = make()
    trainer.sanity_checking = True
    assert turns(callback, 1) == [False]
    trainer.sanity_checking = False
    assert turns(callback, 5) == [True, False, False, True, False]
    assert turns(callback, 2) == [False, True]
    again = make()
    again.load_state_dict(callback.state_dict())
    assert turns(again, 4) == [True, False, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("num_clips", [3, 4])
def test_two_processes_make_the_row_of_one(
    protocol_file: Path,
    test_clips: Path,
    model_folder: Path,
    tmp_path: Path,
    repository: Path,
    num_clips: int,
) -> None:
    """An odd number too: no clip counts twice, whoever has the last one. The split holds just these
    clips.
    """
    data = tmp_path / "data"
    shutil.copytree(test_clips, data)
    kept = complete_clip_ids(data)[:num_clips]
    finish_dataset(data, {"made_by": "tests"}, kept)
    changes = {"num_clips": 8, "num_frames": NUM_FRAMES}
    protocol = tmp_path / "protocol.yaml"
    content = yaml.safe_load(protocol_file.read_text())
    protocol.write_text(yaml.safe_dump(content | changes))
    rows = []
    for num_processes in (1, 2):
        out = tmp_path / str(num_processes)
        out.mkdir()
        command = words(
            protocol, data, out, "--model.model", str(model_folder), "--sampling.num_steps=1"
        )
        command += [
            f"--trainer.devices={num_processes}",
            "--trainer.strategy",
            "auto" if num_processes == 1 else "ddp",
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository)}
        done = subprocess.run(
            [sys.executable, "-m", "rest_lightning", *command],
            env=environment,
            cwd=repository,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        rows += read_rows(out / "row.json")
    one, two = rows
    assert (one.num_clips, two.num_clips) == (num_clips, num_clips)
    for side in ("metrics", "ground_truth"):
        mine, theirs = getattr(two, side), getattr(one, side)
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            assert mine[key] == (
                None if value is None else pytest.approx(value, rel=1e-5, abs=1e-6)
            ), key


def test_clips_are_bounded_and_mistakes_told(
    protocol_file: Path,
    test_clips: Path,
    model_folder: Path,
    recipe: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = ["--model.model", str(model_folder)]
    assert (
        main(words(protocol_file, test_clips, tmp_path, *args, "--trainer.callbacks.num_clips=2"))
        == 0
    )
    (row,) = read_rows(tmp_path / "row.json")
    assert row.num_clips == 2
    capsys.readouterr()
    for more, message in (
        (["--trainer.callbacks.num_clips=1"], "expected at least 2 usable clips under tiny, got 1"),
        (
            ["--data.num_frames=41"],
            "of at least 48 for tiny, got 41: set it to 49, with clips as long",
        ),
        (["--model.model", str(recipe.final("asd"))], "expected a vae for the checkpoint"),
        (["--model.vae", str(recipe.final("asd"))], "expected no vae beside a model folder"),
        (
            ["--model.model", str(tmp_path / "no.ckpt"), "--model.vae", str(model_folder)],
            "no such file",
        ),
    ):
        assert main(words(protocol_file, test_clips, tmp_path, *args, *more)) == 2
        assert message in capsys.readouterr().err
    assert isinstance(load_generator(recipe.final("asd"), model_folder), Streamed)


@pytest.mark.parametrize("name", ["synthetic", "rest-hdtf", "rest-mead", "rap-hdtf-75", "long"])
def test_protocols_of_the_repository(name: str, repository: Path) -> None:
    protocol = read_protocol(name)
    assert protocol.name == name and protocol.version == 1
    assert read_protocol(repository / "configs/protocol" / f"{name}.yaml") == protocol
    content = read_config(f"eval/{name}").content
    num_frames = content["data"]["num_frames"]
    assert num_frames % 8 == 1 and num_frames >= protocol.num_frames
    if name.startswith("rest-"):  # REST's 121 frames: the reference, which is given, and 5 chunks
        assert (num_frames, protocol.num_frames) == (121, 5 * 24)
        assert content["model"]["init_args"]["dtype"] == "bfloat16"  # a model of paper size
    assert content["model"]["class_path"] == "EvaluateModule"
    (callback,) = content["trainer"]["callbacks"]
    assert callback == {"class_path": "Evaluation", "init_args": {"protocol": name}}
