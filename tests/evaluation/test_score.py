"""`rest score`: numbers equal those of the metric classes, and every fault is named, counted and
leaves no trace.
"""

from __future__ import annotations

import csv
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from rest_lightning.cli import main
from rest_lightning.data.layout import Sidecar
from rest_lightning.evaluation.clips import NUM_THUMBNAILS, THUMBNAIL_PX
from rest_lightning.evaluation.row import ResultRow, read_rows
from rest_lightning.media.video import read_clip_audio, read_frames
from rest_lightning.media.writer import Mp4Writer
from rest_lightning.metrics.extractors import load_extractor
from rest_lightning.metrics.frechet import EFID, FID, FVD
from rest_lightning.metrics.identity import IdentitySimilarity
from rest_lightning.metrics.sync import SyncScore
from rest_lightning.metrics.video import TalkingScores

NUM_FRAMES = 48


def write(path: Path, frames: np.ndarray, audio: np.ndarray | None, fps: int = 25) -> None:
    with Mp4Writer(path, frames.shape[1:3], fps=fps, overwrite=True) as writer:
        writer.write(frames)
        if audio is not None:
            writer.write_audio(audio)


def blurred(source: Path, target: Path) -> None:
    frames = read_frames(source)
    averaged = (
        frames.reshape(len(frames), 32, 2, 32, 2, 3).mean(axis=(2, 4)).round().astype(np.uint8)
    )
    write(
        target, averaged.repeat(2, axis=1).repeat(2, axis=2), read_clip_audio(source, len(frames))
    )


@pytest.fixture(scope="module")
def generated(truth: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every true clip, blurred. Read only."""
    folder = tmp_path_factory.mktemp("generated") / "blur"
    folder.mkdir()
    for path in truth.glob("*.mp4"):
        blurred(path, folder / path.name)
    return folder


@pytest.fixture
def score(protocol_file: Path, truth: Path, tmp_path: Path) -> Callable[..., tuple[int, ResultRow]]:
    def run(folder: Path, *args: str) -> tuple[int, ResultRow]:
        out = tmp_path / "rows" / "row.json"
        words = [
            "--protocol",
            str(protocol_file),
            "--generated",
            str(folder),
            "--truth",
            str(truth),
        ]
        code = main(["score", *words, "--out", str(out), *args])
        return code, read_rows(out)[0]

    return run


def test_row_equals_the_metric_classes(
    score: Callable[..., tuple[int, ResultRow]],
    generated: Path,
    truth: Path,
    extractors: Path,
    tmp_path: Path,
) -> None:
    code, row = score(generated)
    assert code == 0 and row.failures == [] and row.num_clips == 3 and row.num_frames == NUM_FRAMES
    assert (row.protocol, row.protocol_version, row.method, row.measured) == (
        "tiny",
        1,
        "blur",
        True,
    )

    load = lambda name: load_extractor(name, str(extractors))  # noqa: E731
    frechet = {"fid": FID(load("fid")), "fvd": FVD(load("fvd")), "e_fid": EFID(load("e_fid"))}
    others = {
        side: (SyncScore(load("sync")), TalkingScores(), IdentitySimilarity(load("identity")))
        for side in "gt"
    }
    for path in sorted(truth.glob("*.mp4")):
        clips = {
            side: read_frames(folder / path.name, 0, NUM_FRAMES)
            for side, folder in (("g", generated), ("t", truth))
        }
        for metric in frechet.values():
            metric.update(clips["t"], real=True)
            metric.update(clips["g"], real=False)
        opening = Sidecar.from_json(path.with_suffix(".json").read_text()).mouth_opening
        for side, folder in (("g", generated), ("t", truth)):
            audio = read_clip_audio(folder / path.name, NUM_FRAMES)
            sync, talking, identity = others[side]
            sync.update(clips[side], audio)
            talking.update(clips[side], audio, opening)
            identity.update(clips[side], clips["t"][0])
    expected: dict[str, Any] = {
        "metrics": {},
        "ground_truth": {"fid": 0.0, "fvd": 0.0, "e_fid": 0.0},
    }
    for metric in frechet.values():
        expected["metrics"] |= metric.compute()
    for side, name in (("g", "metrics"), ("t", "ground_truth")):
        for other in others[side]:
            expected[name] |= other.compute()
    for name, values in expected.items():
        scalars = {
            key: value for key, value in getattr(row, name).items() if not isinstance(value, list)
        }
        assert scalars.keys() == values.keys()
        for key, value in values.items():
            if np.isfinite(float(value)):
                assert scalars[key] == pytest.approx(float(value), rel=1e-4, abs=2e-6), key
            else:
                assert scalars[key] is None, key
    table = list(csv.DictReader((tmp_path / "rows" / "row.clips.csv").open()))
    assert {line["clip"] for line in table} == {path.stem for path in truth.glob("*.mp4")}
    confidences = [float(line["sync_c"]) for line in table]
    assert confidences == sorted(confidences)  # the worst first
    with Image.open(tmp_path / "rows" / "row.worst.png") as sheet:
        pictures = np.asarray(sheet).astype(int)
    height = 22 + 2 * THUMBNAIL_PX
    assert pictures.shape == (3 * height, NUM_THUMBNAILS * THUMBNAIL_PX, 3)
    for number, line in enumerate(table):
        true, made = np.split(pictures[number * height + 22 : (number + 1) * height], 2)
        first = Image.fromarray(read_frames(truth / f"{line['clip']}.mp4", 0, 1)[0])
        shown = np.asarray(first.resize((THUMBNAIL_PX, THUMBNAIL_PX)))
        assert np.array_equal(true[:, :THUMBNAIL_PX], shown)
        assert 0.5 < np.abs(true - made).mean() < 30, "the blurred clip is below the true one"
    intervals = row.config["intervals_95"]
    for key in ("sync_c", "identity_similarity", "sync_d"):
        values = [float(line[key]) for line in table if line[key]]
        assert np.mean(values) == pytest.approx(row.metrics[key], abs=2e-6), key
        low, high = intervals[key]
        assert min(values) - 1e-5 <= low <= row.metrics[key] <= high <= max(values) + 1e-5, key
    assert "fid" not in table[0] and "fid" not in intervals
    assert row.metrics["fid"] > 1e-3
    assert len(row.metrics["background_drift_by_second"]) == 2
    assert set(row.extractors) == {
        "fid",
        "fvd",
        "e_fid",
        "sync_c",
        "identity_similarity",
        "lip_correlation",
    }
    assert (
        row.extractors["fid"]["name"] == "embedded-image"
        and row.config["protocol"]["size_px"] == 64
    )


def test_videos_without_a_true_clip_are_named_in_the_row(
    score: Callable[..., tuple[int, ResultRow]],
    generated: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "more"
    shutil.copytree(generated, folder)
    shutil.copy(min(generated.iterdir()), folder / "nobody.mp4")
    missing = max(path for path in folder.iterdir() if path.stem != "nobody")
    missing.unlink()
    code, row = score(folder)
    assert code == 1 and row.config["unpaired"] == ["nobody.mp4"] and row.num_clips == 2
    assert row.failures == [
        {"clip": missing.stem, "reason": ("expected a generated video of this name, got none")}
    ]
    assert "left out: nobody.mp4, no true clip of this name" in row.config["notes"]
    assert "the weights of embedded-image are none of the known files" in row.config["notes"]
    assert row.config["frame_source"] == {"generated": "mp4", "truth": "mp4"}
    assert "nobody.mp4: no true clip of this name" in capsys.readouterr().out


def test_pieces_are_the_whole(
    truth: Path, protocol_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory: however a video is cut, the numbers are the same."""
    from rest_lightning.evaluation import videos
    from rest_lightning.evaluation.protocol import read_protocol
    from rest_lightning.evaluation.scorer import Scorer

    rows = []
    for length in (7, 128):
        monkeypatch.setattr(videos, "PIECE_FRAMES", length)
        scorer = Scorer(read_protocol(protocol_file))
        files = videos.pair_folders(truth, truth, 2)
        assert all(counts for _, counts in videos.score_folders(scorer, files))
        rows.append(scorer.row("same"))
    for key, value in rows[0].metrics.items():
        if value is not None:
            assert value == pytest.approx(rows[1].metrics[key], rel=1e-5, abs=1e-6), key


def test_every_fault_is_named_and_counts_nowhere(
    truth: Path, protocol_file: Path, tmp_path: Path
) -> None:
    from dataclasses import replace

    from rest_lightning.evaluation.protocol import read_protocol
    from rest_lightning.evaluation.scorer import Scorer
    from rest_lightning.evaluation.videos import PairedFiles, pair_folders, score_folders

    (_, _, first), *others = pair_folders(truth, truth, 2).pairs
    frames = read_frames(first)
    audio = read_clip_audio(first, len(frames))
    faults = {
        "expected a readable video": lambda path: path.write_bytes(b"no video"),
        "expected 25 frames per second, got 30": lambda path: write(path, frames, audio, fps=30),
        ("expected 48 frames, got 20: too short"): lambda path: write(
            path, frames[:20], audio[: 20 * 640]
        ),
        "expected an audio track": lambda path: write(path, frames, None),
        "got 4.56 s: frames are missing": lambda path: write(path, frames, np.tile(audio, 2)),
        ("expected 1.92 s of sound, got 1.00 s: too short"): lambda path: write(
            path, frames, audio[:16_000]
        ),
        "expected square frames, got 64x48": lambda path: write(path, frames[:, :48], audio),
        "expected a generated video of this name": lambda path: None,
    }
    protocol = replace(read_protocol(protocol_file), measures=["fid", "talking"])
    pairs = []
    for number, spoil in enumerate(faults.values()):
        path = tmp_path / f"{number}.mp4"
        spoil(path)
        pairs.append((path.stem, path if path.is_file() else None, first))
    scorer, clean = Scorer(protocol), Scorer(protocol)
    good = [("good", first, first), *others]
    counts = dict(score_folders(scorer, PairedFiles([good[0], *pairs, *good[1:]], [])))
    assert sum(counts.values()) == 2 and list(score_folders(clean, PairedFiles(good, [])))
    row = scorer.row("x")
    assert row.num_clips == 2 and row.num_attempted == 2 + len(faults)
    for failure, (number, reason) in zip(row.failures, enumerate(faults), strict=True):
        assert failure["clip"] == str(number) and reason in failure["reason"], failure
        assert str(tmp_path) not in failure["reason"], "rows travel: no paths of one machine"
    assert row.metrics == clean.row("x").metrics, "a clip that failed has left a trace"


def test_damaged_files_of_both_sides_are_named(
    truth: Path, protocol_file: Path, tmp_path: Path
) -> None:
    """Files that open and break later on, and sidecars that are none."""
    from dataclasses import replace

    from rest_lightning.evaluation.protocol import read_protocol
    from rest_lightning.evaluation.scorer import Scorer
    from rest_lightning.evaluation.videos import PairedFiles, score_folders

    good = min(truth.glob("*.mp4"))
    content = good.read_bytes()
    third = len(content) // 3
    damages = {
        "empty": b"",
        "half": content[: len(content) // 2],
        "hole": content[:third] + bytes(third) + content[2 * third :],
    }
    pairs = []
    for name, damaged in damages.items():
        (tmp_path / f"{name}.mp4").write_bytes(damaged)
        pairs += [
            (name, tmp_path / f"{name}.mp4", good),
            (f"true {name}", good, tmp_path / f"{name}.mp4"),
        ]
    for name, sidecar in (("keys", b"{}"), ("bytes", b"\xff\xfe")):
        (tmp_path / f"{name}.mp4").write_bytes(content)
        (tmp_path / f"{name}.json").write_bytes(sidecar)
        pairs.append((name, good, tmp_path / f"{name}.mp4"))
    scorer = Scorer(replace(read_protocol(protocol_file), measures=["fid"]))
    assert not any(counts for _, counts in score_folders(scorer, PairedFiles(pairs, [])))
    assert [failure["clip"] for failure in scorer.failures] == [name for name, _, _ in pairs]
    for failure in scorer.failures:
        assert "expected" in failure["reason"] and str(tmp_path) not in failure["reason"], failure
    assert "bytes.json" in scorer.failures[-1]["reason"]


def test_faces_of_a_track_are_what_sync_sees(truth: Path, protocol_file: Path) -> None:
    """Crops along each side's own track; no face and too short a track are failures of the clip, in
    the row.
    """
    from dataclasses import replace

    from rest_lightning.evaluation.faces import MediapipeFaces, SidecarFaces
    from rest_lightning.evaluation.protocol import read_protocol
    from rest_lightning.evaluation.scorer import ClipPair, Scorer
    from rest_lightning.metrics.sync import sync_of_clip
    from rest_lightning.metrics.syncnet import face_crops

    protocol = replace(
        read_protocol(protocol_file), measures=["sync"], num_frames=104, faces="sidecar"
    )
    path = min(truth.glob("*.mp4"))
    frames = np.concatenate([read_frames(path)] * 2)[:104]
    audio = np.tile(read_clip_audio(path, 57), 2)[: 104 * 640]
    landmarks = Sidecar.from_json(path.with_suffix(".json").read_text()).landmarks
    assert landmarks is not None
    faces = SidecarFaces({name: (points * 2)[:104] for name, points in landmarks.items()})
    scorer = Scorer(protocol)
    late = np.roll(frames, 3, axis=0)
    for name in "ab":
        assert scorer.add(ClipPair(name, [(late, frames)], audio, audio, frames[0], faces=faces)), (
            scorer.failures
        )
    extractor = scorer.measures["sync"].metrics["generated"].extractor
    blank = ClipPair(
        "blank", [(0 * frames, frames)], audio, audio, frames[0], faces=MediapipeFaces()
    )
    assert not scorer.add(blank)  # no face, or no mediapipe
    assert scorer.failures[-1]["clip"] == "blank" and "expected" in scorer.failures[-1]["reason"]
    row = scorer.row("x")
    for side, made in ((row.metrics, late), (row.ground_truth, frames)):
        expected = sync_of_clip(face_crops(made, faces.boxes(made)), audio, extractor)
        assert side["sync_d"] == pytest.approx(expected.distance, rel=1e-5)
        assert side["offset_frames"] == expected.offset_frames
    assert row.metrics["sync_d"] != row.ground_truth["sync_d"] and row.num_clips == 2

    short = Scorer(replace(protocol, num_frames=100))
    assert not short.add(
        ClipPair("c", [(late[:100], frames[:100])], audio, audio, frames[0], faces=faces)
    )
    assert short.failures == [
        {
            "clip": "c",
            "reason": (
                "sync: expected a face track of at least 101 frames, got 100: give a longer clip"
            ),
        }
    ]


def test_features_that_are_not_numbers_fail_after_others_took_the_clip(
    protocol_file: Path, truth: Path
) -> None:
    """FID has the clip already when another refuses it: it must be taken back."""
    from rest_lightning.evaluation.protocol import read_protocol
    from rest_lightning.evaluation.scorer import Scorer
    from rest_lightning.evaluation.videos import open_pair, pair_folders

    protocol = read_protocol(protocol_file)
    scorer, clean = Scorer(protocol), Scorer(protocol)
    pairs = pair_folders(truth, truth, 3).pairs
    reasons = {
        ("sync", "speech.11"): "sync: expected numbers as embeddings",
        ("identity", "identity"): "identity: expected numbers as identities",
        ("e_fid", "factors"): "e_fid: expected numbers as e_fid features",
        ("fvd", "late.0"): "fvd: expected numbers as fvd features",
    }
    for number, pair in enumerate(pairs):
        if number != 1:
            assert clean.add(open_pair(*pair, protocol)) and scorer.add(open_pair(*pair, protocol))
            continue
        for measure, layer in reasons:
            part: Any = scorer.measures[measure]
            extractor = part.extractor if measure != "sync" else part.metrics["generated"].extractor
            weight = extractor.net.get_submodule(layer).weight
            before = weight.clone()
            weight.fill_(float("nan"))
            assert not scorer.add(open_pair(*pair, protocol))
            weight.copy_(before)
    for failure, reason in zip(scorer.failures, reasons.values(), strict=True):
        assert failure["clip"] == pairs[1][0] and failure["reason"].startswith(reason), failure
    assert scorer.row("x").metrics == clean.row("x").metrics
    audio = open_pair(*pairs[0], protocol)
    audio.audio[100] = np.nan
    assert not scorer.add(audio) and "NaN" in scorer.failures[-1]["reason"]


def test_state_goes_on_where_it_was(protocol_file: Path, truth: Path) -> None:
    from rest_lightning.evaluation.protocol import read_protocol
    from rest_lightning.evaluation.scorer import Scorer
    from rest_lightning.evaluation.videos import open_pair, pair_folders

    protocol = read_protocol(protocol_file)
    whole, first, second = (Scorer(protocol) for _ in range(3))
    pairs = pair_folders(truth, truth, 3).pairs
    for number, pair in enumerate(pairs):
        whole.add(open_pair(*pair, protocol))
        if number == 1:
            first.fail("somebody", "a reason")
            second.load_state_dict(first.state_dict())
        (first if number < 1 else second).add(open_pair(*pair, protocol))
    assert second.row("x").metrics == whole.row("x").metrics
    sizes = [
        len(pickle.dumps(scorer.state_dict()["metrics"])) for scorer in (Scorer(protocol), whole)
    ]
    assert sizes[0] == sizes[1], "states grow with the number of clips"
    assert not any(getattr(measure, "waiting", None) for measure in whole.measures.values())
    assert second.num_clips == 3 and second.failures == [{"clip": "somebody", "reason": "a reason"}]


def test_another_size_is_resized_and_told(
    score: Callable[..., tuple[int, ResultRow]], truth: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "large"
    folder.mkdir()
    for path in truth.glob("*.mp4"):
        frames = read_frames(path).repeat(2, axis=1).repeat(2, axis=2)
        write(folder / path.name, frames, read_clip_audio(path, len(frames)))
    code, row = score(folder)
    assert code == 0 and "frames of 128 px were resized to 64" in row.config["notes"]
    assert row.metrics["lip_correlation"] == pytest.approx(
        row.ground_truth["lip_correlation"], abs=0.05
    )


@pytest.mark.parametrize("rate", [48_000, 8_000])
def test_sound_of_another_rate_is_heard(truth: Path, tmp_path: Path, rate: int) -> None:
    from rest_lightning.evaluation.videos import _sound

    source = min(truth.glob("*.mp4"))
    audio = read_clip_audio(source, NUM_FRAMES)
    path = tmp_path / "other.mp4"
    block = av.AudioFrame.from_ndarray(audio[None], format="fltp", layout="mono")
    block.sample_rate = 16_000
    resampler = av.AudioResampler("fltp", "mono", rate)
    pieces = [
        frame.to_ndarray()[0] for frame in (*resampler.resample(block), *resampler.resample(None))
    ]
    with Mp4Writer(path, 64, sample_rate=rate) as writer:
        writer.write(np.zeros((NUM_FRAMES, 64, 64, 3), np.uint8))
        writer.write_audio(np.concatenate(pieces))
    heard = _sound(path, NUM_FRAMES)[: len(audio)]
    assert np.corrcoef(heard, audio[: len(heard)])[0, 1] > 0.8


def test_unusable_whole_is_an_error(
    protocol_file: Path, truth: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in truth.glob("*.mp4"):
        (tmp_path / path.name).write_bytes(b"no video")
    out = tmp_path / "rows" / "row.json"
    words = [
        "score",
        "--protocol",
        str(protocol_file),
        "--truth",
        str(truth),
        "--out",
        str(out),
        "--generated",
    ]
    assert main([*words, str(tmp_path)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        "expected at least 2 usable clips under tiny, got 0; 3 failed"
    ) in error and not out.exists()
    other = tmp_path / "other"
    other.mkdir()
    assert main([*words, str(other)]) == 2
    assert "expected videos" in capsys.readouterr().err
    (other / "nobody.mp4").write_bytes(b"x")
    assert main([*words, str(other)]) == 2
    assert "name each video after its true clip" in capsys.readouterr().err
    assert main([*words, str(truth), "--protocol", "nowhere"]) == 2
    assert "got 'nowhere'" in capsys.readouterr().err
    assert main([*words, str(truth), "--num-clips", "1"]) == 2
    assert "expected at least 2 usable clips under tiny, got 1; 0 failed" in capsys.readouterr().err
    assert main([*words, str(truth), "--num-frames", "58"]) == 2
    assert "expected 58 frames, got 57" in capsys.readouterr().err
    assert torch.is_grad_enabled()
