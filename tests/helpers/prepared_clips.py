"""Tiny real clips: H.264 + AAC written with PyAV, in the prepared-clip layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np

from rest_lightning.constants import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME
from rest_lightning.data.layout import LANDMARKS, Sidecar, clip_path, finish_dataset, write_sidecar


def write_mp4(
    path: Path,
    frames: np.ndarray,
    audio: np.ndarray | None,
    *,
    fps: int = FPS,
    crf: int = 12,
    sample_rate: int = SAMPLE_RATE,
    max_b_frames: int = 2,
    key_frame_every: int | None = None,
) -> None:
    """frames uint8 (F, H, W, 3), audio float32 (n,)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        video = container.add_stream(
            "libx264", rate=fps, options={"crf": str(crf), "preset": "veryfast"}
        )
        video.width, video.height, video.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        video.codec_context.max_b_frames = max_b_frames
        video.codec_context.thread_count = 1
        if key_frame_every is not None:
            video.codec_context.gop_size = key_frame_every
        sound = None
        if audio is not None:
            sound = container.add_stream("aac", rate=sample_rate, layout="mono")
            sound.bit_rate = 96_000
        for image in frames:
            container.mux(
                video.encode(
                    av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                )
            )
        container.mux(video.encode(None))
        if sound is not None and audio is not None:
            for start in range(0, len(audio), 1024):
                block = av.AudioFrame.from_ndarray(
                    audio[None, start : start + 1024], format="fltp", layout="mono"
                )
                block.sample_rate, block.pts = sample_rate, start
                container.mux(sound.encode(block))
            container.mux(sound.encode(None))


def moving_frames(num_frames: int, size_px: int, seed: int = 0) -> np.ndarray:
    """Smooth coloured pictures in motion; every frame's mean red tells its number."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:size_px, 0:size_px].astype(np.float32) / size_px
    phase = rng.uniform(0, 6, 3)
    frames = np.empty((num_frames, size_px, size_px, 3), np.uint8)
    for f in range(num_frames):
        wave = np.sin(4 * x + phase[1] + 0.2 * f) * np.cos(3 * y + phase[2])
        frames[f, ..., 0] = 30 + f * 190 // num_frames
        frames[f, ..., 1] = 120 + 80 * wave
        frames[f, ..., 2] = 120 + 80 * np.sin(5 * y + phase[0] - 0.1 * f)
    return frames


def speech_like(num_samples: int, seed: int = 0) -> np.ndarray:
    """Band-limited noise with a syllable-like envelope: unique at every time, so that it shows its
    alignment.
    """
    rng = np.random.default_rng(seed)
    spectrum = np.fft.rfft(rng.standard_normal(num_samples))
    hz = np.fft.rfftfreq(num_samples, 1 / SAMPLE_RATE)
    noise = np.fft.irfft(spectrum * np.exp(-0.5 * ((hz - 800) / 600) ** 2), num_samples)
    envelope = 0.55 + 0.45 * np.sin(2 * np.pi * 4 * np.arange(num_samples) / SAMPLE_RATE + seed)
    signal = noise * envelope
    return (0.3 * signal / np.abs(signal).max()).astype(np.float32)


def make_dataset(
    root: Path,
    *,
    num_frames: Sequence[int] = (41, 41, 41, 41, 41, 41),
    size_px: int = 32,
    splits: Sequence[str] = ("train", "train", "train", "train", "val", "test"),
    fps: int = FPS,
) -> Path:
    """One identity per clip; mouth_opening and landmarks are simple functions of the frame
    number.
    """
    for i, (length, split) in enumerate(zip(num_frames, splits, strict=True)):
        clip_id = f"clip-{i:03d}"
        audio = speech_like(length * SAMPLES_PER_FRAME, seed=i)
        write_mp4(clip_path(root, clip_id), moving_frames(length, size_px, seed=i), audio, fps=fps)
        steps = np.arange(length) / 1000
        points = np.stack([steps, steps + 0.1], -1)
        landmarks = {name: (points + 0.2 * n).tolist() for n, name in enumerate(LANDMARKS)}
        write_sidecar(
            root,
            Sidecar(
                clip_id=clip_id,
                identity=f"person-{i}",
                source="test",
                num_frames=length,
                size_px=size_px,
                split=split,
                mouth_opening=None if i == 1 else (steps + i / 10).tolist(),
                landmarks=None if i == 1 else landmarks,
            ),
        )
    finish_dataset(root, {"made_by": "tests"})
    return root


class Make:
    """What the tests make, as the fixture ``make``."""

    mp4 = staticmethod(write_mp4)
    frames = staticmethod(moving_frames)
    speech = staticmethod(speech_like)
    dataset = staticmethod(make_dataset)
