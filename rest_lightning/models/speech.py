"""Speech encoders: 16 kHz samples to a window of 10 feature steps (50 Hz) for every video frame
(REST).

Frame j of the video is the samples [640 j, 640 (j + 1)). Its window spans five frames, j + L - 4
... j + L, where L is ``lookahead_frames``: 2 is the centred window of the paper, 0 needs no speech
after the frame. Each encoder reads a bounded past and a bounded future, in training and in
streaming alike: the features of frames [a, b) come from exactly the samples [640 (a -
left_context_frames), 640 (b + lookahead_frames)), so a stream gives what the whole file gives.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from rest_lightning.constants import SAMPLE_RATE, SAMPLES_PER_FRAME
from rest_lightning.errors import UserError
from rest_lightning.models.pretrained import PretrainedPart
from rest_lightning.torchvision_compat import ensure_torchvision

if TYPE_CHECKING:
    from transformers import WhisperConfig

WINDOW_STEPS = 10
STEPS_PER_FRAME = 2
WINDOW_FRAMES = WINDOW_STEPS // STEPS_PER_FRAME
HOP, WINDOW_SAMPLES = 160, 400
WHISPER_TINY = {
    "d_model": 384,
    "encoder_layers": 4,
    "encoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "num_mel_bins": 80,
    "max_source_positions": 1500,
}


def mel_filters(
    num_mels: int, num_bins: int, min_hz: float, max_hz: float, slaney_norm: bool
) -> Tensor:
    """Triangular filters on the Slaney mel scale: float32 (num_bins, num_mels) for bins from 0 Hz
    to 8 kHz.

    Linear below 1 kHz (200/3 Hz a mel), logarithmic above (6.4-fold in 27 mels). Peaks are 1, or
    with ``slaney_norm`` 2 / width (Whisper's filters, librosa's default).
    """
    step = math.log(6.4) / 27

    def to_mel(hz: float) -> float:
        return hz * 3 / 200 if hz < 1000 else 15 + math.log(hz / 1000) / step

    # Not torch.linspace: torch.device("meta") can miss it (seen after transformers, which swaps it,
    # loaded weights).
    lowest, highest = to_mel(min_hz), to_mel(max_hz)
    mels = lowest + (highest - lowest) / (num_mels + 1) * torch.arange(
        num_mels + 2, dtype=torch.float64
    )
    edges = torch.where(mels < 15, mels * 200 / 3, 1000 * torch.exp(step * (mels - 15)))
    low, peak, high = edges[:-2], edges[1:-1], edges[2:]
    hz = SAMPLE_RATE / 2 / (num_bins - 1) * torch.arange(num_bins, dtype=torch.float64)[:, None]
    filters = torch.minimum((hz - low) / (peak - low), (high - hz) / (high - peak)).clamp_min(0)
    return (filters * 2 / (high - low) if slaney_norm else filters).float()


def power_spectrum(windows: Tensor, num_fft: int) -> Tensor:
    """|DFT|^2 of real windows (..., n), zero padded to ``num_fft`` -> (..., num_fft // 2 + 1)."""
    return torch.view_as_real(torch.fft.rfft(windows, n=num_fft)).square().sum(-1)


def slide_windows(steps: Tensor) -> Tensor:
    """The 10-step windows of successive frames, two steps apart: (B, 2 (F + 4), D) -> (B, F, 10,
    D).
    """
    return steps.unfold(1, WINDOW_STEPS, STEPS_PER_FRAME).transpose(2, 3)


class SpeechEncoder(PretrainedPart):
    """Base of the speech encoders; frozen, called like a function.

    Attributes:
        feature_dim: D_A, channels of one feature step.
        window_steps: feature steps per video frame, 10.
        left_context_frames: video frames of audio read before the first frame.
        lookahead_frames: video frames of audio read after the last frame.
        block_frames: frames come in blocks of this many, aligned to frame 1 + n * block_frames
            (frame 0 is a block of its own); the features of a frame depend on audio up to the end
            of its block + lookahead. 1: no blocks.
    """

    window_steps = WINDOW_STEPS
    block_frames = 1
    feature_dim: int
    left_context_frames: int
    lookahead_frames: int

    def forward(self, audio: Tensor) -> Tensor:
        """Samples (B, 640 * (left_context + F + lookahead)) in [-1, 1] to features (B, F, 10,
        feature_dim), float32.

        Without gradients, and in float32 under autocast too: half precision would blur quiet
        speech, and features in training would differ from those in streaming.
        """
        self.num_frames(audio)
        with torch.no_grad(), torch.autocast(audio.device.type, enabled=False):
            return self.features(audio.float())

    def features(self, audio: Tensor) -> Tensor:
        """What an encoder defines; shapes as in :meth:`forward`."""
        raise NotImplementedError

    def pack(self, features: Tensor) -> Tensor:
        """Features (B, F, 10, D_A) without what overlapping windows repeat: (B, n, D_A), n = 2
        (length + 4) a block.
        """
        blocks = features.split(self._blocks(features.shape[1]), dim=1)
        steps = [
            part
            for block in blocks
            for part in (block[:, 0], block[:, 1:, -STEPS_PER_FRAME:].flatten(1, 2))
        ]
        return torch.cat(steps, dim=1)

    def unpack(self, steps: Tensor, num_frames: int) -> Tensor:
        """The features (B, F, 10, D_A) of `pack`, bit by bit."""
        blocks = self._blocks(num_frames)
        windows = [
            slide_windows(x)
            for x in steps.split([2 * (n + WINDOW_FRAMES - 1) for n in blocks], dim=1)
        ]
        return windows[0] if len(windows) == 1 else torch.cat(windows, dim=1)

    def _blocks(self, num_frames: int) -> list[int]:
        if self.block_frames == 1:
            return [num_frames]
        first = num_frames % self.block_frames
        return [first] * (first > 0) + [self.block_frames] * (num_frames // self.block_frames)

    def pad(self, audio: Tensor) -> Tensor:
        """Surround a whole file (B, 640 * F) with the silence that :meth:`forward` reads before and
        after it.
        """
        return F.pad(
            audio,
            (
                self.left_context_frames * SAMPLES_PER_FRAME,
                self.lookahead_frames * SAMPLES_PER_FRAME,
            ),
        )

    def num_frames(self, audio: Tensor) -> int:
        """F of an input of :meth:`forward`.

        Raises:
            UserError: not whole frames, or none left beside the context.
        """
        extra = self.left_context_frames + self.lookahead_frames
        num_samples = audio.shape[-1]
        if (
            audio.ndim != 2
            or num_samples % SAMPLES_PER_FRAME
            or num_samples < (extra + 1) * SAMPLES_PER_FRAME
        ):
            raise UserError(
                f"expected audio of shape (batch, {SAMPLES_PER_FRAME} * (frames + {extra})), with "
                f"{extra} frames of "
                f"context, got {tuple(audio.shape)}: cut it to whole frames and pad it with "
                "encoder.pad"
            )
        return num_samples // SAMPLES_PER_FRAME - extra


def _check_lookahead(lookahead_frames: int) -> None:
    if not 0 <= lookahead_frames < WINDOW_FRAMES:
        raise UserError(
            f"expected a look-ahead of 0 to {WINDOW_FRAMES - 1} frames (40 ms each), got "
            f"{lookahead_frames}"
        )


class LogMelEncoder(SpeechEncoder):
    """Log-mel features, without any weights: the encoder of the small models (not in REST).

    25 ms Hann windows every 10 ms, right-aligned: mel step k ends with sample 160 (k + 1). A
    feature step joins two mel steps, so D_A = 2 * num_mels. Everything is fixed, so that it is
    causal: the filters carry a pre-emphasis of 1 - 0.97 / z as a gain (speech falls off towards
    high frequencies; this levels it), start at 60 Hz (mains hum and offset stay out), and power is
    floored at ``10 ** floor``. Output ``(log10(power + 10 ** floor) - floor) / 2 - 1``: digital
    silence is exactly -1, room noise close to it, and a voice at usual level lies mostly in [-0.8,
    1.3]. One dB of level moves voiced features by 0.05: nothing normalises over time, so train with
    speech of varied level.

    Args:
        lookahead_frames: L, 0 to 4.
        num_mels: mel channels.
        floor: log10 of the power (1 = full-scale squared) below which nothing is told apart from
            silence.
    """

    def __init__(self, lookahead_frames: int = 2, num_mels: int = 80, floor: float = -8.0) -> None:
        super().__init__()
        _check_lookahead(lookahead_frames)
        self.lookahead_frames, self.num_mels, self.floor = lookahead_frames, num_mels, floor
        # The window reaches back 4 - L frames, and its first spectrum starts 240 samples earlier:
        # one frame more.
        self.left_context_frames = WINDOW_FRAMES - lookahead_frames
        self.feature_dim = STEPS_PER_FRAME * num_mels
        num_fft = 512
        window = torch.hann_window(WINDOW_SAMPLES)
        radians = math.pi / (num_fft // 2) * torch.arange(num_fft // 2 + 1)
        emphasis = (1 + 0.97**2 - 2 * 0.97 * torch.cos(radians))[:, None]
        filters = mel_filters(num_mels, num_fft // 2 + 1, 60.0, SAMPLE_RATE / 2, slaney_norm=False)
        self.num_fft = num_fft
        self.window: Tensor
        self.filters: Tensor
        self.register_buffer("window", window / window.sum(), persistent=False)
        self.register_buffer("filters", filters * emphasis, persistent=False)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "lookahead_frames": self.lookahead_frames,
            "num_mels": self.num_mels,
            "floor": self.floor,
        }

    def features(self, audio: Tensor) -> Tensor:
        """(B, 640 * (left_context + F + lookahead)) -> (B, F, 10, 2 * num_mels)."""
        first = SAMPLES_PER_FRAME - (WINDOW_SAMPLES - HOP)
        power = power_spectrum(
            audio[:, first:].unfold(1, WINDOW_SAMPLES, HOP) * self.window, self.num_fft
        )
        log_mel = torch.log10(power @ self.filters + 10**self.floor)
        steps = (log_mel - self.floor) / 2 - 1
        return slide_windows(steps.unflatten(1, (-1, STEPS_PER_FRAME)).flatten(2))


class WhisperEncoder(SpeechEncoder):
    """Frozen Whisper encoder: embedding output and every block's output on the channels (REST:
    tiny, 5 x 384 = 1920).

    Bounded mode is this project's, since a stream cannot hear the end of a file: Whisper attends
    over all it is given, so it is run on blocks of 8 frames (one latent frame) with
    ``left_context_frames`` before and ``lookahead_frames`` after. Positions are cut to that length,
    and log-mel is floored 8 below a fixed maximum, not the recording's own. Inputs hold
    1 + 8n frames (starting with frame 0) or 8n frames (later ones).

    ``whole_file`` mode, offline, is the paper's: transformers' own features and encoder on 30 s of
    the file at a time, no context beside it, windows of frames j - 2 ... j + 2 with zeros beyond
    the ends.

    Args:
        weights: folder of a Whisper model in transformers' format (or a name in the hub's local
            cache); None leaves random weights, to be filled by ``load_state_dict``.
        left_context_frames: at least 4 - lookahead_frames.
        lookahead_frames: L, 0 to 4; 2 in ``whole_file`` mode, where the attribute is 0.
        whole_file: the offline mode.
        max_log_mel: the fixed maximum of log10 mel power (speech that peaks near full scale: 1.0 to
            1.6).
        whisper_config: changes to the configuration of Whisper-tiny; with ``weights`` the folder's
            own rules.

    Raises:
        UserError: weights that are not there, or a context that is too short.
    """

    def __init__(
        self,
        weights: str | None,
        left_context_frames: int = 24,
        lookahead_frames: int = 2,
        whole_file: bool = False,
        max_log_mel: float = 1.5,
        whisper_config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        _check_lookahead(lookahead_frames)
        if not whole_file and left_context_frames < WINDOW_FRAMES - 1 - lookahead_frames:
            raise UserError(
                f"expected at least {WINDOW_FRAMES - 1 - lookahead_frames} frames of left context "
                "for a look-ahead of "
                f"{lookahead_frames} frames, got {left_context_frames}"
            )
        self.whole_file, self.max_log_mel = whole_file, max_log_mel
        self.left_context_frames = 0 if whole_file else left_context_frames
        self.lookahead_frames = 0 if whole_file else lookahead_frames
        self.block_frames = 8
        self.encoder = _load_whisper(weights) if weights else _random_whisper(whisper_config or {})
        self.encoder.requires_grad_(False).eval()
        model = self.encoder.config
        num_steps = (
            self.left_context_frames + self.block_frames + self.lookahead_frames
        ) * STEPS_PER_FRAME
        if num_steps > model.max_source_positions:
            raise UserError(
                f"expected blocks of at most {model.max_source_positions} Whisper steps (2 a "
                f"frame), got {num_steps}: "
                f"lower left_context_frames from {left_context_frames}"
            )
        self._config = {
            "weights": None,  # they travel in the state dict
            "left_context_frames": left_context_frames,
            "lookahead_frames": lookahead_frames,
            "whole_file": whole_file,
            "max_log_mel": max_log_mel,
            "whisper_config": {key: getattr(model, key) for key in WHISPER_TINY},
        }
        self.feature_dim = (model.encoder_layers + 1) * model.d_model
        self.window: Tensor
        self.filters: Tensor
        filters = mel_filters(
            model.num_mel_bins, WINDOW_SAMPLES // 2 + 1, 0.0, SAMPLE_RATE / 2, slaney_norm=True
        )
        self.register_buffer("window", torch.hann_window(WINDOW_SAMPLES), persistent=False)
        self.register_buffer("filters", filters, persistent=False)

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str], *, subfolder: str | None = None, **arguments: Any
    ) -> Self:
        """``WhisperEncoder(weights=source, ...)``: from a local folder, never from the network.
        With a ``subfolder`` it is a part of a model folder, see
        :meth:`~rest_lightning.models.pretrained.PretrainedPart.from_pretrained`.
        """
        if subfolder is not None:
            return super().from_pretrained(source, subfolder=subfolder, **arguments)
        return cls(weights=os.fspath(source), **arguments)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, with the network's shape instead of the weights' path."""
        return dict(self._config)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: the encoder is frozen."""
        return super().train(False)

    def features(self, audio: Tensor) -> Tensor:
        """(B, 640 * (left_context + F + lookahead)) -> (B, F, 10, feature_dim); F = 1 + 8n or 8n
        when bounded.
        """
        num_frames = self.num_frames(audio)
        if self.whole_file:
            return self._whole_file(audio, num_frames)
        block, extra = self.block_frames, self.left_context_frames + self.lookahead_frames
        if num_frames % block not in (0, 1):
            raise UserError(
                f"expected {block}n or 1 + {block}n frames of speech, got {num_frames}: cut at "
                "latent frames"
            )
        features = []
        if num_frames % block:
            features.append(self._bounded(audio[:, : (1 + extra) * SAMPLES_PER_FRAME]))
            audio = audio[:, SAMPLES_PER_FRAME:]
        if num_frames >= block:
            blocks = audio.unfold(1, (block + extra) * SAMPLES_PER_FRAME, block * SAMPLES_PER_FRAME)
            features.append(
                self._bounded(blocks.flatten(0, 1)).unflatten(0, blocks.shape[:2]).flatten(1, 2)
            )
        return torch.cat(features, dim=1)

    def _bounded(self, audio: Tensor) -> Tensor:
        """Blocks with their context (N, 640 * (left + n + lookahead)) -> (N, n, 10,
        feature_dim).
        """
        log_mel = self._log_mel(audio)
        states = self._hidden_states(torch.clamp_min(log_mel, self.max_log_mel - 8))
        # The window of the first frame starts 4 - L frames before it.
        first = self.left_context_frames - (WINDOW_FRAMES - 1 - self.lookahead_frames)
        return slide_windows(states[:, first * STEPS_PER_FRAME :])

    def _whole_file(self, audio: Tensor, num_frames: int) -> Tensor:
        limit = self.encoder.config.max_source_positions
        segments = []
        for segment in audio.split(limit * STEPS_PER_FRAME * HOP, dim=1):
            num_steps = segment.shape[1] // (STEPS_PER_FRAME * HOP)
            log_mel = self._log_mel(
                F.pad(segment, (0, limit * STEPS_PER_FRAME * HOP - segment.shape[1]))
            )
            log_mel = torch.maximum(log_mel, log_mel.amax(dim=(1, 2), keepdim=True) - 8)
            segments.append(self._hidden_states(log_mel)[:, :num_steps])
        side = (WINDOW_FRAMES // 2) * STEPS_PER_FRAME
        return slide_windows(F.pad(torch.cat(segments, dim=1), (0, 0, side, side)))

    def _log_mel(self, audio: Tensor) -> Tensor:
        """Whisper's log10 mel power (N, num_mels, samples / 160), centred windows, without its
        normalisation.
        """
        side = WINDOW_SAMPLES // 2
        padded = F.pad(audio[:, None], (side, side), mode="reflect")[:, 0]
        windows = (
            padded[:, :-1].unfold(1, WINDOW_SAMPLES, HOP) * self.window
        )  # drops the last one, as Whisper does
        power = power_spectrum(windows, WINDOW_SAMPLES)
        return torch.clamp_min(power @ self.filters, 1e-10).log10().transpose(1, 2)

    def _hidden_states(self, log_mel: Tensor) -> Tensor:
        """Floored log10 mel power (N, num_mels, 2n) to all hidden states on the channels (N, n,
        feature_dim).
        """
        encoder = self.encoder
        hidden = F.gelu(encoder.conv1((log_mel + 4) / 4))
        hidden = F.gelu(encoder.conv2(hidden)).transpose(1, 2)
        hidden = hidden + encoder.embed_positions.weight[: hidden.shape[1]]
        states = [hidden]
        for layer in encoder.layers:
            output = layer(states[-1], None)
            states.append(output[0] if isinstance(output, tuple) else output)
        states[-1] = encoder.layer_norm(states[-1])  # as transformers reports its last hidden state
        return torch.cat(states, dim=-1)


def _random_whisper(changes: dict[str, Any]) -> Any:
    ensure_torchvision()
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder as Encoder

    config: WhisperConfig = WhisperConfig(**{**WHISPER_TINY, **changes})
    return Encoder(config)


def _load_whisper(weights: str) -> Any:
    """The encoder of a Whisper model in a local folder or in the hub's cache on this machine;
    nothing is downloaded.
    """
    ensure_torchvision()
    from transformers import WhisperModel

    how = "get it with `hf download openai/whisper-tiny --local-dir FOLDER` and name FOLDER"
    folder = Path(weights).expanduser()
    if folder.is_dir():
        for names in (
            ("config.json",),
            ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"),
        ):
            if not any((folder / name).is_file() for name in names):
                raise UserError(
                    f"expected a Whisper model with {names[0]}, looked in {folder.resolve()}: {how}"
                )
    try:
        model = WhisperModel.from_pretrained(
            str(folder) if folder.is_dir() else weights, local_files_only=True
        )
    except (OSError, ValueError) as error:
        from huggingface_hub.constants import HF_HUB_CACHE

        where = (
            folder.resolve()
            if folder.is_dir()
            else f"{folder.absolute()} and the hub cache {HF_HUB_CACHE}"
        )
        raise UserError(
            f"expected a Whisper model ({weights}: config.json, model.safetensors), looked in "
            f"{where}: {how}"
        ) from error
    return model.get_encoder().float()  # stored in half precision or not: features are float32
