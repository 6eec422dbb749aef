"""Signed videos, what `rest verify` says of them, and certificates that cannot sign.

The certificates are made here by an authority that nobody trusts.
"""

from __future__ import annotations

import io
import json
import wave
from pathlib import Path

import numpy as np
import pytest
from stills import face
from tiny_head import make_head

pytest.importorskip("c2pa", reason="c2pa-python (extra `provenance`) signs and reads manifests")

from certificates import Files, make_files

from rest_lightning.cli import main
from rest_lightning.errors import UserError
from rest_lightning.media.provenance import load_signer, read_provenance
from rest_lightning.media.segments import SegmentEncoder, join_segments
from rest_lightning.media.video import VideoFile
from rest_lightning.media.writer import Mp4Pipe, Mp4Writer


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_files(tmp_path_factory.mktemp("signer") / "good")


def frames(count: int = 10) -> np.ndarray:
    return np.full((count, 64, 64, 3), 90, np.uint8)


@pytest.fixture(scope="module")
def signed(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("videos") / "signed.mp4"
    with Mp4Writer(path, 64, signer=load_signer(files.certificate, files.key)) as writer:
        writer.write(frames())
        writer.write_audio(np.zeros(6400, np.float32))
    return path


def test_a_signed_video_plays_and_tells_who_made_it(signed: Path) -> None:
    assert VideoFile(signed).num_frames == 10
    found = read_provenance(signed)
    assert found.is_marked
    assert found.is_intact
    assert found.is_trusted is False
    assert found.failures == ()
    assert found.actions == [{"action": "c2pa.created", "source": "trainedAlgorithmicMedia"}]
    assert found.manifest is not None
    assert found.manifest["title"] == "signed.mp4"
    assert found.manifest["signature_info"]["common_name"] == "A signer"
    assert list(signed.parent.iterdir()) == [signed]


def test_a_changed_video_is_told_from_an_intact_one(
    signed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(signed)]) == 0
    assert "signature  intact" in capsys.readouterr().out
    data = bytearray(signed.read_bytes())
    data[-20] ^= 1  # in the encoded pictures
    changed = tmp_path / "changed.mp4"
    changed.write_bytes(data)
    assert main(["verify", str(changed)]) == 1
    assert "signature  BROKEN" in capsys.readouterr().out
    assert main(["verify", str(changed), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["failures"]


def test_unsigned_and_unmarked_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, generated in (("synthetic", True), ("recorded", False)):
        with Mp4Writer(tmp_path / f"{name}.mp4", 64, generated=generated) as writer:
            writer.write(frames(2))
    assert main(["verify", str(tmp_path / "synthetic.mp4")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("metadata   says that it is synthetic")
    assert said[1] == "signature  none"
    assert main(["verify", str(tmp_path / "recorded.mp4")]) == 0
    assert "no such mark" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "none.mp4")]) == 2
    assert "is no file: check the name" in capsys.readouterr().err


def test_segments_and_finished_fragments_are_signed_too(files: Files, tmp_path: Path) -> None:
    signer = load_signer(files.certificate, files.key)
    encoder = SegmentEncoder(64)
    data = encoder.encode(frames(), np.zeros(6400, np.float32), last=True).data
    join_segments([data], tmp_path / "joined.mp4", signer)
    pipe = io.BytesIO()
    fragmented = Mp4Pipe(pipe, 64)  # type: ignore[arg-type]
    fragmented.write(frames())
    fragmented.write_audio(np.zeros(6400, np.float32))
    fragmented.close()
    (tmp_path / "fragmented.mp4").write_bytes(pipe.getvalue())
    signer.sign(tmp_path / "fragmented.mp4", tmp_path / "whole.mp4", "whole.mp4")
    for name in ("joined.mp4", "whole.mp4"):
        assert read_provenance(tmp_path / name).is_intact
        assert VideoFile(tmp_path / name).num_frames == 10


def test_certificates_that_cannot_sign_are_told_in_one_line(files: Files, tmp_path: Path) -> None:
    old = make_files(tmp_path / "old", -60, -30)
    early = make_files(tmp_path / "early", 10, 30)
    other = make_files(tmp_path / "other")
    (tmp_path / "text.pem").write_text("no certificate")
    cases = {
        (old.certificate, old.key): r"which expired on \d{4}-\d\d-\d\d: renew it",
        (early.certificate, early.key): r"which is valid from \d{4}-\d\d-\d\d on",
        (files.certificate, other.key): r"which belongs to another one",
        (tmp_path / "text.pem", files.key): r"expected a certificate \(PEM\)",
        (files.certificate, tmp_path / "text.pem"): r"expected a private key \(PEM",
        (tmp_path / "none.pem", files.key): r"none.pem \(no such file or directory\)",
    }
    for (certificate, key), message in cases.items():
        with pytest.raises(UserError, match=message):
            load_signer(certificate, key)


def test_a_certificate_for_other_uses_leaves_no_file(tmp_path: Path) -> None:
    wrong = make_files(tmp_path / "wrong", for_signing=False)
    out = tmp_path / "videos" / "out.mp4"
    out.parent.mkdir()
    signer = load_signer(wrong.certificate, wrong.key)
    with (
        pytest.raises(UserError, match="expected a certificate that may sign"),
        Mp4Writer(out, 64, signer=signer) as writer,
    ):
        writer.write(frames(2))
    assert list(out.parent.iterdir()) == []


def test_talk_signs_a_file_and_refuses_a_pipe(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_head().save_pretrained(tmp_path / "model")
    face(128, 128).save(tmp_path / "portrait.png")
    with wave.open(str(tmp_path / "speech.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(np.full(6400, 900, "<i2").tobytes())
    words = ["talk", str(tmp_path / "portrait.png"), str(tmp_path / "speech.wav"), "--quiet"]
    words += ["--model", str(tmp_path / "model"), *files.words]
    assert main([*words, "-o", str(tmp_path / "out.mp4")]) == 0
    assert read_provenance(tmp_path / "out.mp4").is_intact
    assert main([*words, "-o", "-"]) == 2
    assert "expected a video file for --sign, got a pipe" in capsys.readouterr().err
