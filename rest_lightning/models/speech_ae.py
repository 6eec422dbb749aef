"""SpeechAE: windows of speech features at video rate to a few tokens per latent frame, and back
(REST, READ).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rest_lightning.constants import TEMPORAL_RATIO, num_latent_frames
from rest_lightning.errors import UserError
from rest_lightning.models.causal import (
    Downsample,
    RMSNorm,
    Stream,
    TemporalResBlock,
    Upsample,
    is_first_piece,
    name_streams,
)
from rest_lightning.models.pretrained import PretrainedPart
from rest_lightning.models.speech import WINDOW_STEPS

NUM_LEVELS = 3  # halvings of the frame rate: 2 ** 3 = TEMPORAL_RATIO


class SpeechAE(PretrainedPart):
    """Convolutional autoencoder of speech features. Encoder and decoder are causal, so that both
    stream (REST, READ).

    Encoder: a linear projection of every feature step; a strided convolution over the window that
    leaves ``num_tokens`` of its 10 steps, with a learned place for each; causal temporal residual
    blocks, halving the frame rate three times, frame 0 on its own as in the VAE; an output
    projection and a layer norm without weights, so that speech latents have unit scale whatever the
    training does. The papers give neither widths nor places nor a norm. The decoder is the mirror
    image.

    Args:
        feature_dim: D_A of the speech encoder (Whisper-tiny: 1920; log-mel: 160).
        num_tokens: tokens per latent frame, h_w, 1 to 10 (REST: 2; embedded: 4).
        latent_dim: channels of a token, d_A (REST: 2048; embedded: 128).
        width: channels inside (not stated by the papers; embedded: 128).
        num_blocks: residual blocks at each of the four frame rates.
        kernel_size: of the causal convolutions, in frames.

    Raises:
        UserError: more tokens than window steps.
    """

    def __init__(
        self,
        feature_dim: int = 1920,
        num_tokens: int = 2,
        latent_dim: int = 2048,
        width: int = 1024,
        num_blocks: int = 1,
        kernel_size: int = 3,
    ) -> None:
        super().__init__()
        _check_num_tokens(num_tokens)
        self.feature_dim, self.num_tokens, self.latent_dim = feature_dim, num_tokens, latent_dim
        self._config = {
            "feature_dim": feature_dim,
            "num_tokens": num_tokens,
            "latent_dim": latent_dim,
            "width": width,
            "num_blocks": num_blocks,
            "kernel_size": kernel_size,
        }
        # The widest stride that fits, and the kernel that then reaches the last step: 2 tokens 5/5,
        # 4 tokens 4/2.
        stride = WINDOW_STEPS // num_tokens
        reach = WINDOW_STEPS - (num_tokens - 1) * stride

        self.encoder_in = nn.Linear(feature_dim, width)
        self.encoder_window = nn.Conv1d(width, width, reach, stride)
        self.encoder_places = nn.Parameter(0.02 * torch.randn(num_tokens, width))
        encoder: list[nn.Module] = []
        for level in range(NUM_LEVELS + 1):
            encoder += [TemporalResBlock(width, kernel_size) for _ in range(num_blocks)]
            if level < NUM_LEVELS:
                encoder.append(Downsample(width, width, time=2))
        self.encoder = nn.ModuleList(encoder)
        self.encoder_norm = RMSNorm(width)
        self.encoder_out = nn.Linear(width, latent_dim)
        self.latent_norm = nn.LayerNorm(latent_dim, elementwise_affine=False)

        self.decoder_in = nn.Linear(latent_dim, width)
        decoder: list[nn.Module] = []
        for level in range(NUM_LEVELS + 1):
            decoder += [TemporalResBlock(width, kernel_size) for _ in range(num_blocks)]
            if level < NUM_LEVELS:
                decoder.append(Upsample(width, width, time=2))
        self.decoder = nn.ModuleList(decoder)
        self.decoder_window = nn.ConvTranspose1d(width, width, reach, stride)
        self.decoder_places = nn.Parameter(0.02 * torch.randn(WINDOW_STEPS, width))
        self.decoder_norm = RMSNorm(width)
        self.decoder_out = nn.Linear(width, feature_dim)
        name_streams(self)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, for ``config.json``."""
        return dict(self._config)

    def forward(self, features: Tensor) -> Tensor:
        """The reconstruction of (B, 8n + 1, 10, feature_dim), same shape."""
        return self.decode(self.encode(features))

    def encode(self, features: Tensor, stream: Stream | None = None) -> Tensor:
        """Speech features to speech latents.

        Args:
            features: (B, F, 10, feature_dim) with F = 8n + 1; later pieces of a stream have F = 8n.
            stream: the past of this encoder. A clip in pieces, the first of 1 or 8n + 1 frames,
                gives what the whole clip gives.

        Returns:
            (B, f, num_tokens, latent_dim), f = (F - 1) / 8 + 1, or F / 8 for later pieces; unit
            variance per token.

        Raises:
            UserError: another number of frames, window steps or channels.
        """
        self._check(features, stream)
        steps = self.encoder_in(features)
        tokens = _along_window(self.encoder_window, steps) + self.encoder_places
        for layer in self.encoder:
            tokens = layer(tokens, stream)
        if stream is not None:
            stream.started = True
        return self.latent_norm(self.encoder_out(F.silu(self.encoder_norm(tokens))))

    def decode(self, latents: Tensor, stream: Stream | None = None) -> Tensor:
        """Speech latents (B, f, num_tokens, latent_dim) to features (B, 8 (f - 1) + 1, 10,
        feature_dim).

        ``stream`` is the past of this decoder (not the encoder's); later pieces give 8 f frames.
        """
        tokens = self.decoder_in(latents)
        for layer in self.decoder:
            tokens = layer(tokens, stream)
        if stream is not None:
            stream.started = True
        steps = _along_window(self.decoder_window, tokens) + self.decoder_places
        return self.decoder_out(F.silu(self.decoder_norm(steps)))

    def _check(self, features: Tensor, stream: Stream | None) -> None:
        if features.ndim != 4 or features.shape[2:] != (WINDOW_STEPS, self.feature_dim):
            raise UserError(
                f"expected speech features of shape (B, F, {WINDOW_STEPS}, {self.feature_dim}), "
                "got "
                f"{tuple(features.shape)}: set feature_dim of SpeechAE to the speech encoder's"
            )
        num_frames = features.shape[1]
        if not is_first_piece(stream):
            if num_frames < 1 or num_frames % TEMPORAL_RATIO:
                raise UserError(
                    f"expected {TEMPORAL_RATIO}n frames of speech after the first "
                    f"piece, got {num_frames}"
                )
            return
        try:
            num_latent_frames(num_frames)
        except ValueError as error:
            raise UserError(str(error)) from None


class SpeechProjection(SpeechAE):
    """The ablation *w/o SpeechAE* (READ): raw windows of features through one linear layer, in
    SpeechAE's place in every stage.

    Each of the 10 steps of the windows of a latent frame's 8 video frames is a token: 80 tokens per
    latent frame, in order of time, with nothing added to them; READ does not say how the windows
    are laid out. Frame 0, a latent frame of its own, is repeated. No latent frame
    reads another, so it streams. The decoder is one linear layer, too.

    Args:
        feature_dim, latent_dim: see :class:`SpeechAE`.
    """

    def __init__(self, feature_dim: int = 1920, latent_dim: int = 2048) -> None:
        nn.Module.__init__(self)  # none of SpeechAE's layers
        self.feature_dim, self.latent_dim = feature_dim, latent_dim
        self.num_tokens = TEMPORAL_RATIO * WINDOW_STEPS
        self._config = {"feature_dim": feature_dim, "latent_dim": latent_dim}
        self.encoder_out = nn.Linear(feature_dim, latent_dim)
        self.decoder_out = nn.Linear(latent_dim, feature_dim)

    def encode(self, features: Tensor, stream: Stream | None = None) -> Tensor:
        """Shapes and errors of :meth:`SpeechAE.encode`."""
        self._check(features, stream)
        if is_first_piece(stream):  # frame 0 is a latent frame on its own
            features = torch.cat([features[:, :1]] * (TEMPORAL_RATIO - 1) + [features], dim=1)
        if stream is not None:
            stream.started = True
        return self.encoder_out(features.unflatten(1, (-1, TEMPORAL_RATIO)).flatten(2, 3))

    def decode(self, latents: Tensor, stream: Stream | None = None) -> Tensor:
        """Shapes of :meth:`SpeechAE.decode`."""
        windows = self.decoder_out(latents).unflatten(2, (TEMPORAL_RATIO, WINDOW_STEPS))
        frames = windows.flatten(1, 2)
        if is_first_piece(stream):
            frames = frames[:, TEMPORAL_RATIO - 1 :]
        if stream is not None:
            stream.started = True
        return frames


class SpeechPooling(SpeechAE):
    """An ablation of SpeechAE: means instead of a learned compression, in SpeechAE's place in every
    stage.

    The windows of a latent frame's 8 video frames are averaged, each over its 10 steps and then
    over ``num_tokens`` shares of time; every mean goes through one linear layer and the same norm
    as SpeechAE's latents. No latent frame reads another, so it streams. The decoder, one linear
    layer too, repeats tokens. It is the project's own; READ's ablation is
    :class:`SpeechProjection`.

    Args:
        feature_dim, num_tokens, latent_dim: see :class:`SpeechAE`.
    """

    def __init__(
        self, feature_dim: int = 1920, num_tokens: int = 2, latent_dim: int = 2048
    ) -> None:
        nn.Module.__init__(self)  # none of SpeechAE's layers
        _check_num_tokens(num_tokens)
        self.feature_dim, self.num_tokens, self.latent_dim = feature_dim, num_tokens, latent_dim
        self._config = {
            "feature_dim": feature_dim,
            "num_tokens": num_tokens,
            "latent_dim": latent_dim,
        }
        self.encoder_out = nn.Linear(feature_dim, latent_dim)
        # Attention to speech has no positions: without a place of its own a token could not tell
        # when it is.
        self.encoder_places = nn.Parameter(0.02 * torch.randn(num_tokens, latent_dim))
        self.latent_norm = nn.LayerNorm(latent_dim, elementwise_affine=False)
        self.decoder_out = nn.Linear(latent_dim, feature_dim)
        self.decoder_places = nn.Parameter(0.02 * torch.randn(WINDOW_STEPS, feature_dim))

    def encode(self, features: Tensor, stream: Stream | None = None) -> Tensor:
        """Shapes and errors of :meth:`SpeechAE.encode`."""
        self._check(features, stream)
        frames = features.mean(dim=2)
        if is_first_piece(stream):  # frame 0 is a latent frame on its own
            frames = torch.cat([frames[:, :1]] * (TEMPORAL_RATIO - 1) + [frames], dim=1)
        if stream is not None:
            stream.started = True
        tokens = _pool(frames.unflatten(1, (-1, TEMPORAL_RATIO)), self.num_tokens)
        return self.latent_norm(self.encoder_out(tokens) + self.encoder_places)

    def decode(self, latents: Tensor, stream: Stream | None = None) -> Tensor:
        """Shapes of :meth:`SpeechAE.decode`."""
        frames = _pool(self.decoder_out(latents), TEMPORAL_RATIO).flatten(1, 2)
        if is_first_piece(stream):
            frames = frames[:, TEMPORAL_RATIO - 1 :]
        if stream is not None:
            stream.started = True
        return frames.unsqueeze(2) + self.decoder_places


def _check_num_tokens(num_tokens: int) -> None:
    if not 1 <= num_tokens <= WINDOW_STEPS:
        raise UserError(
            f"expected 1 to {WINDOW_STEPS} speech tokens per latent frame, got "
            f"{num_tokens}: use 2 (REST)"
        )


def _pool(x: Tensor, num_means: int) -> Tensor:
    """Means over ``num_means`` equal shares of the third axis of (B, f, n, C); repeats where n is
    smaller.
    """
    y = F.adaptive_avg_pool1d(x.flatten(0, 1).transpose(1, 2), num_means)
    return y.transpose(1, 2).unflatten(0, x.shape[:2])


def _along_window(convolution: nn.Module, x: Tensor) -> Tensor:
    """Convolve along the window axis of (B, F, steps, C)."""
    y = convolution(x.flatten(0, 1).transpose(1, 2))
    return y.transpose(1, 2).unflatten(0, x.shape[:2])
