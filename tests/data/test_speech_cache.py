"""Speech features from disk are those that the frozen encoder computes in training, bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rest_lightning.data.dataset import PreparedClips
from rest_lightning.data.layout import clip_path
from rest_lightning.data.module import TalkingHeadDataModule
from rest_lightning.data.window_cache import (
    LatentsCache,
    SpeechCache,
    encode_dataset,
    encode_speech,
)
from rest_lightning.errors import UserError
from rest_lightning.models.speech import LogMelEncoder, SpeechEncoder, WhisperEncoder
from rest_lightning.models.speech_ae import SpeechAE
from rest_lightning.parts import fingerprint_of
from rest_lightning.tasks.speech_ae import SpeechAEModule, speech_features

TINY_WHISPER = {
    "d_model": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "max_source_positions": 100,
}


def make_encoder(kind: str, lookahead_frames: int = 2) -> SpeechEncoder:
    if kind == "log_mel":
        return LogMelEncoder(lookahead_frames, num_mels=12)
    torch.manual_seed(3)
    whole_file = kind == "whisper_whole_file"
    encoder = WhisperEncoder(None, 6, lookahead_frames, whole_file, whisper_config=TINY_WHISPER)
    # far from transformers' small start, so that rounding has work to do
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder


def encode(encoder: SpeechEncoder, data: Path, out: Path, **settings: Any) -> SpeechCache:
    fingerprint = fingerprint_of(encoder, with_config=True)
    return encode_speech(encoder, data, out, fingerprint=fingerprint, progress=False, **settings)


@pytest.mark.parametrize("kind", ["log_mel", "whisper", "whisper_whole_file"])
@pytest.mark.parametrize(
    ("num_frames", "batch_size", "in_memory"), [(9, 4, False), (25, 3, True), (41, 1, False)]
)
def test_batches_hold_the_features_of_the_online_path(
    dataset_dir: Path,
    tmp_path: Path,
    kind: str,
    num_frames: int,
    batch_size: int,
    in_memory: bool,
) -> None:
    encoder = make_encoder(kind)
    encode(encoder, dataset_dir, tmp_path, num_frames=num_frames, windows_per_clip=3)
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "num_frames": num_frames,
        "num_workers": 0,
        "progress": False,
    }
    data = TalkingHeadDataModule(
        str(dataset_dir),
        speech_dir=str(tmp_path),
        with_frames=False,
        cache_in_memory=in_memory,
        **options,
    )
    data.setup("fit")
    seen = set()
    for loader in (data.train_dataloader(), data.train_dataloader(), data.val_dataloader()):
        for batch in loader:
            assert batch["speech_of"] == fingerprint_of(encoder, with_config=True)
            cached = speech_features(batch, encoder)
            steps = batch.pop("speech_steps")
            assert steps[0].numel() < cached[0].numel() / (2 if num_frames > 9 else 1.5)
            online = speech_features(batch, encoder)
            assert online.shape == (len(batch["clip_id"]), num_frames, 10, encoder.feature_dim)
            assert torch.equal(cached, online)
            seen |= {
                (name, int(start))
                for name, start in zip(batch["clip_id"], batch["start"], strict=True)
            }
    slack = 41 - num_frames
    assert {start for _, start in seen} <= {0, slack // 2, slack}
    assert len({name for name, _ in seen}) == 5


def test_windows_are_those_of_the_latents(dataset_dir: Path, tmp_path: Path) -> None:
    class Mean(torch.nn.Module):
        def encode(self, frames: torch.Tensor) -> torch.Tensor:
            return frames.mean((3, 4), keepdim=True)[:, :, ::8]

    encoder = make_encoder("log_mel")
    encode_dataset(
        Mean(),
        dataset_dir,
        tmp_path / "latents",
        fingerprint="v",
        num_frames=17,
        windows_per_clip=5,
        progress=False,
    )
    latents = LatentsCache(tmp_path / "latents", 17)
    speech = encode(encoder, dataset_dir, tmp_path / "same", num_frames=17, windows_per_clip=5)
    alone = PreparedClips(dataset_dir, "train", 17, random_window=True, latents=latents)
    both = PreparedClips(
        dataset_dir, "train", 17, random_window=True, latents=latents, speech=speech
    )
    for index in range(4):
        first, second = alone[index], both[index]
        steps = second.pop("speech_steps")
        assert first["start"] == second["start"]
        assert torch.equal(first["latents"], second["latents"])
        assert torch.equal(steps, speech.at(second["clip_id"], second["start"]))
    fewer = encode(encoder, dataset_dir, tmp_path / "fewer", num_frames=17, windows_per_clip=2)
    with pytest.raises(
        UserError,
        match=("got none of frame 6 of clip clip-000: make both with the same --windows-per"),
    ):
        PreparedClips(dataset_dir, "train", 17, latents=latents, speech=fewer)
    with pytest.raises(
        UserError,
        match=("expected a speech features cache, got one of latents: name another folder"),
    ):
        SpeechCache(tmp_path / "latents")
    with pytest.raises(UserError, match="expected a latents cache, got one of speech features"):
        LatentsCache(tmp_path / "same")
    with pytest.raises(UserError, match="expected a speech features cache, got one of latents"):
        encode(encoder, dataset_dir, tmp_path / "latents", num_frames=17, overwrite=True)
    assert LatentsCache(tmp_path / "latents").starts("clip-000") == latents.starts("clip-000")


def test_stale_features_are_errors(make: Any, tmp_path: Path) -> None:
    root, folder = make.dataset(tmp_path / "talkers"), tmp_path / "speech"
    for kind in ("log_mel", "whisper"):
        prints = {
            fingerprint_of(make_encoder(kind, frames), with_config=True) for frames in (0, 2, 2)
        }
        assert len(prints) == 2  # the weights are the same, what they read is not
    encode(make_encoder("log_mel"), root, folder, num_frames=9)
    data, opened = (
        TalkingHeadDataModule(
            str(root), num_frames=9, num_workers=0, speech_dir=str(folder), with_frames=False
        )
        for _ in range(2)
    )
    other = make_encoder("log_mel", 1)
    stage = SpeechAEModule(SpeechAE(feature_dim=160, num_tokens=2, latent_dim=8, width=8), other)
    opened.setup("fit")
    batch = next(iter(opened.train_dataloader()))
    made_by = fingerprint_of(other, with_config=True)
    with pytest.raises(UserError, match=f"features of the encoder {made_by}, got those of LogMel"):
        stage.losses(batch)
    with pytest.raises(
        UserError,
        match=(
            r"expected a speech features cache with fingerprint .*: "
            r"give another folder"
        ),
    ):
        encode(make_encoder("log_mel", 1), root, folder, num_frames=9)
    with pytest.raises(UserError, match="expected speech features of 17 frames, got 9"):
        TalkingHeadDataModule(
            str(root), num_frames=17, speech_dir=str(folder), with_frames=False
        ).setup("fit")
    with pytest.raises(
        UserError,
        match=(
            r"expected augment false with speech_dir, .* got true: set data.augment "
            r"to false"
        ),
    ):
        TalkingHeadDataModule(str(root), num_frames=9, speech_dir=str(folder), augment=True)
    make.mp4(clip_path(root, "clip-000"), make.frames(41, 32, seed=9), make.speech(41 * 640))
    make.dataset(root, num_frames=(33, 41), splits=("train", "train"))
    with pytest.raises(
        UserError,
        match=("expected speech features of the present clip clip-000, got those of an older"),
    ):
        data.setup("fit")
