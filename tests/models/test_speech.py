from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rest_lightning.errors import UserError
from rest_lightning.models.speech import LogMelEncoder, SpeechEncoder, WhisperEncoder, mel_filters
from rest_lightning.torchvision_compat import ensure_torchvision

TINY_WHISPER: dict[str, Any] = {
    "d_model": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "max_source_positions": 150,
}


def whisper(**arguments: Any) -> WhisperEncoder:
    torch.manual_seed(1)
    encoder = WhisperEncoder(None, whisper_config=TINY_WHISPER, **arguments)
    # transformers starts with 0.02: too near to linear for a test
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return encoder


def speech_like(num_frames: int, batch: int = 2) -> Tensor:
    """Bursts of harmonics and noise with pauses of digital silence."""
    time = torch.arange(640 * num_frames) / 16000
    tone = sum(torch.sin(2 * math.pi * 140 * k * time) / k for k in range(1, 20))
    assert isinstance(tone, Tensor)
    audio = 0.1 * tone * (torch.sin(2 * math.pi * 3 * time) > 0) + 0.01 * torch.randn(
        batch, len(time)
    )
    audio[:, 640 * (num_frames // 2) : 640 * (num_frames // 2 + 2)] = 0
    return audio


def cut(audio: Tensor, encoder: SpeechEncoder, a: int, b: int) -> Tensor:
    """The samples that the features of frames [a, b) may read, silence beyond the file."""
    padded = encoder.pad(audio)
    return padded[:, 640 * a : 640 * (b + encoder.left_context_frames + encoder.lookahead_frames)]


def test_mel_filters_equal_transformers() -> None:
    ensure_torchvision()
    from transformers.audio_utils import mel_filter_bank

    for num_mels, low, norm in ((80, 0.0, "slaney"), (128, 0.0, "slaney"), (40, 60.0, None)):
        theirs = mel_filter_bank(201, num_mels, low, 8000.0, 16000, norm=norm, mel_scale="slaney")
        ours = mel_filters(num_mels, 201, low, 8000.0, slaney_norm=norm is not None)
        assert torch.allclose(ours, torch.from_numpy(theirs).float(), atol=1e-6)


@pytest.mark.parametrize("lookahead", range(5))
@pytest.mark.parametrize("num_frames", [1, 2, 9, 31])
def test_log_mel_windows_by_definition(lookahead: int, num_frames: int) -> None:
    encoder = LogMelEncoder(lookahead, num_mels=20)
    assert (encoder.feature_dim, encoder.window_steps, encoder.block_frames) == (40, 10, 1)
    audio = speech_like(num_frames, batch=1)
    features = encoder(encoder.pad(audio))
    assert features.shape == (1, num_frames, 10, 40)
    window = torch.hann_window(400, dtype=torch.float64)
    quiet = torch.cat([torch.zeros(6400), audio[0], torch.zeros(6400)]).double()
    frequency = torch.arange(257, dtype=torch.float64) * 16000 / 512
    emphasis = (1 - 0.97 * torch.exp(-2j * math.pi * frequency / 16000)).abs().square()
    for j in {0, num_frames // 2, num_frames - 1}:
        for step in range(10):
            for half in range(2):
                # mel step k ends with sample 160 (k + 1)
                k = 4 * (j + lookahead - 4) + 2 * step + half
                end = 6400 + 160 * (k + 1)
                spectrum = (
                    torch.fft.rfft(quiet[end - 400 : end] * window / window.sum(), n=512)
                    .abs()
                    .square()
                )
                power = (spectrum * emphasis) @ mel_filters(
                    20, 257, 60.0, 8000.0, slaney_norm=False
                ).double()
                expected = (torch.log10(power + 1e-8) + 8) / 2 - 1
                got = features[0, j, step, 20 * half : 20 * half + 20]
                assert torch.allclose(got.double(), expected, atol=1e-5)


def test_log_mel_range_of_silence_and_speech() -> None:
    encoder = LogMelEncoder()
    assert len(encoder.state_dict()) == 0
    silence = encoder(encoder.pad(torch.zeros(1, 640 * 10)))
    assert torch.allclose(silence, torch.full_like(silence, -1), atol=1e-6)
    audio = encoder.pad(speech_like(50))
    features = encoder(audio)
    assert features.min() >= -1 - 1e-6
    assert 0.3 < features.max() < 2
    louder = encoder(10 ** (6 / 20) * audio) - features
    assert louder.min() > -1e-6
    assert louder.max() == pytest.approx(6 * 0.05, abs=1e-4)
    offset = encoder(audio + 0.01) - features  # an offset of the recording stays out
    assert offset.abs().max() < 0.05


ENCODERS: list[tuple[Any, dict[str, Any]]] = [
    *((LogMelEncoder, {"lookahead_frames": lookahead, "num_mels": 20}) for lookahead in (0, 2, 4)),
    *(
        (whisper, {"left_context_frames": left, "lookahead_frames": right})
        for left, right in ((4, 0), (8, 2), (3, 4))
    ),
]


@pytest.mark.parametrize(("make", "arguments"), ENCODERS)
def test_streamed_features_equal_those_of_the_whole_file(
    make: Any, arguments: dict[str, Any]
) -> None:
    encoder = make(**arguments)
    block, num_frames = encoder.block_frames, 33
    audio = speech_like(num_frames)
    whole = encoder(encoder.pad(audio))
    assert whole.shape == (2, num_frames, 10, encoder.feature_dim)
    edges = [0, *range(1, num_frames + 1, block)]
    for i, a in enumerate(edges[:-1]):
        for b in edges[i + 1 :]:
            part = encoder(cut(audio, encoder, a, b))
            assert torch.allclose(part, whole[:, a:b], atol=1e-5), f"frames {a} to {b}"


@pytest.mark.parametrize(("make", "arguments"), ENCODERS)
def test_features_read_nothing_beyond_the_lookahead(make: Any, arguments: dict[str, Any]) -> None:
    encoder = make(**arguments)
    block, num_frames = encoder.block_frames, 33
    audio = speech_like(num_frames)
    before = encoder(encoder.pad(audio))
    for first_changed in range(num_frames):
        changed = audio.clone()
        changed[:, 640 * first_changed :] += 0.1 * torch.randn_like(
            changed[:, 640 * first_changed :]
        )
        difference = (encoder(encoder.pad(changed)) - before).abs().amax(dim=(0, 2, 3))
        for j in range(num_frames):
            block_end = j if j == 0 else (j - 1) // block * block + block  # last frame of j's block
            if block_end + encoder.lookahead_frames < first_changed:
                assert difference[j] == 0
        if first_changed + block < num_frames:
            assert difference[min(first_changed + block, num_frames - 1)] > 0


@pytest.mark.parametrize("lookahead", range(5))
def test_log_mel_past_is_bounded_by_the_left_context(lookahead: int) -> None:
    encoder = LogMelEncoder(lookahead, num_mels=20)
    audio = speech_like(20)
    changed = audio.clone()
    changed[:, : 640 * 5] = torch.randn(640 * 5)
    difference = (
        (encoder(encoder.pad(changed)) - encoder(encoder.pad(audio))).abs().amax(dim=(0, 2, 3))
    )
    first_equal = 5 + encoder.left_context_frames
    assert (difference[first_equal:] == 0).all()
    assert (difference[: first_equal - 1] > 0).all()


def test_batch_rows_are_independent_and_autocast_changes_nothing() -> None:
    for encoder in (LogMelEncoder(), whisper()):
        audio = encoder.pad(speech_like(17, batch=3))
        features = encoder(audio)
        assert torch.allclose(encoder(audio[1:2]), features[1:2], atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(encoder(audio), features)


def whole_file_reference(encoder: WhisperEncoder, audio: Tensor) -> Tensor:
    """Transformers' own feature extractor and encoder, all hidden states (B, 2F, D)."""
    from transformers import WhisperFeatureExtractor

    seconds = TINY_WHISPER["max_source_positions"] // 50
    extractor = WhisperFeatureExtractor(chunk_length=seconds)
    mel = extractor(list(audio.numpy()), sampling_rate=16000, return_tensors="pt").input_features
    with torch.no_grad():
        states = encoder.encoder(mel, output_hidden_states=True).hidden_states
    return torch.cat(states, dim=-1)[:, : audio.shape[1] // 320]


@pytest.mark.parametrize("num_frames", [1, 30, 75])
def test_whole_file_mode_equals_transformers(num_frames: int) -> None:
    encoder = whisper(whole_file=True)
    assert encoder.feature_dim == 3 * 16
    audio = speech_like(num_frames)
    features = encoder(encoder.pad(audio))
    states = whole_file_reference(encoder, audio)
    for j in range(num_frames):
        for step in range(10):
            source = 2 * (j - 2) + step
            if 0 <= source < states.shape[1]:
                assert torch.allclose(features[:, j, step], states[:, source], atol=2e-4)
            else:
                assert (features[:, j, step] == 0).all()


def test_whole_file_mode_goes_on_after_one_window() -> None:
    encoder = whisper(whole_file=True)
    audio = speech_like(100)
    features = encoder(audio)
    later = whole_file_reference(encoder, audio[:, 640 * 75 :])
    assert torch.allclose(features[:, 80, 4], later[:, 10], atol=2e-4)


def test_bounded_whisper_differs_from_the_whole_file_in_context_only() -> None:
    """A block that is the whole window of the model, with the recording's own maximum, is
    whole-file mode.
    """
    offline = whisper(whole_file=True)
    audio = speech_like(75)
    log_mel = offline._log_mel(audio)
    bounded = whisper(left_context_frames=65, lookahead_frames=2)
    bounded.max_log_mel = float(log_mel.amax())
    loudest = int(log_mel.amax(dim=(1, 2)).argmax())
    features = bounded(audio)  # 65 + 8 + 2 = 75 frames: one block
    expected = offline(audio)[:, 65:73]
    assert torch.allclose(features[loudest], expected[loudest], atol=2e-4)


def test_whisper_is_frozen_and_rebuilt_from_its_config(tmp_path: Path) -> None:
    encoder = whisper(left_context_frames=8)
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    again = WhisperEncoder.from_config(encoder.config)
    again.load_state_dict(encoder.state_dict())
    audio = encoder.pad(speech_like(9))
    assert torch.equal(again(audio), encoder(audio))
    assert (
        LogMelEncoder.from_config(LogMelEncoder(1, 20, -7.0).config).config
        == LogMelEncoder(1, 20, -7.0).config
    )


def test_whisper_from_pretrained_reads_a_local_folder(tmp_path: Path) -> None:
    ensure_torchvision()
    from transformers import WhisperConfig, WhisperModel

    decoder = {
        "decoder_layers": 1,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 8,
        "vocab_size": 60,
    }
    tokens = {"pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 2}
    model = WhisperModel(WhisperConfig(**TINY_WHISPER, **decoder, **tokens))
    model.save_pretrained(tmp_path)
    encoder = WhisperEncoder.from_pretrained(tmp_path, left_context_frames=8)
    own, theirs = encoder.encoder.state_dict(), model.encoder.state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name], theirs[name]) for name in own)
    assert encoder.config["whisper_config"]["d_model"] == 16


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"look-ahead of 0 to 4 frames .* got 5"):
        LogMelEncoder(5)
    encoder = LogMelEncoder(2)
    for shape in ((1, 640 * 5), (1, 640 * 6 + 1), (640 * 9,)):
        with pytest.raises(UserError, match=r"640 \* \(frames \+ 5\).*encoder.pad"):
            encoder(torch.zeros(shape))
    with pytest.raises(
        UserError, match=("at least 4 frames of left context for a look-ahead of 0 frames, got 2")
    ):
        whisper(left_context_frames=2, lookahead_frames=0)
    with pytest.raises(UserError, match="at most 150 Whisper steps"):
        whisper(left_context_frames=70)
    with pytest.raises(UserError, match="8n or 1 \\+ 8n frames of speech, got 12"):
        whisper(left_context_frames=4)(torch.zeros(1, 640 * 18))
    with pytest.raises(
        UserError,
        match=(
            r"config\.json, looked in .*hf download "
            r"openai/whisper-tiny"
        ),
    ):
        WhisperEncoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"model\.safetensors, looked in"):
        WhisperEncoder.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no-such/model.*hub cache.*hf download"):
        WhisperEncoder.from_pretrained("no-such/model")
