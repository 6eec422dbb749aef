"""Videos of every kind, good and bad, for the tests of `rest prepare`; written with PyAV, none is
stored.
"""

from __future__ import annotations

import json
import os
import signal
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from rest_lightning.media.faces import Face

TIME_BASE = Fraction(1, 12_000)  # fits 24, 25, 30, 50, 60 and 240 fps


def levels(num_frames: int, height: int = 64, width: int = 64) -> np.ndarray:
    """Grey frames whose level tells their number: 20 for the first, up to 219, then from 20 again;
    a fixed texture.
    """
    texture = np.random.default_rng(0).integers(-12, 12, (height, width, 1))
    steps = 20 + np.arange(num_frames) % 200
    return np.clip(steps[:, None, None, None] + texture, 0, 255).repeat(3, axis=3).astype(np.uint8)


def level_of(picture: np.ndarray) -> float:
    """What `levels` gave a frame, about."""
    return float(picture.mean()) + 0.5  # the texture's mean


def speech_like(seconds: float, rate: int = 16_000, seed: int = 0) -> np.ndarray:
    """Band-limited noise with syllables, float32, unique at every time; the same at every rate."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    signal = sum(
        np.sin(2 * np.pi * f * time + p)
        for f, p in zip(rng.uniform(150, 2500, 20), rng.uniform(0, 6, 20), strict=True)
    )
    return (0.05 * signal * (0.55 + 0.45 * np.sin(2 * np.pi * 3.7 * time))).astype(np.float32)


def write_video(
    path: Path,
    frames: np.ndarray,
    sounds: Sequence[np.ndarray] = (),
    *,
    fps: float = 25,
    times_s: Sequence[float] | None = None,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    rate: int = 16_000,
    layout: str = "mono",
    audio_codec: str = "aac",
    audio_start_s: float = 0.0,
    default_track: int = 0,
    options: dict[str, str] | None = None,
) -> Path:
    """A video of uint8 frames (n, H, W, 3) and any number of sounds, (samples,) or
    (channels, samples).

    Args:
        times_s: of the frames; None for a constant rate.
        audio_start_s: time stamp of the first sample.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    chosen = {"crf": "10", "preset": "ultrafast"} if codec == "libx264" else {}
    with av.open(str(path), "w", options=options or {}) as container:
        video: Any = container.add_stream(codec, rate=round(fps), options=chosen)
        video.width, video.height, video.pix_fmt = frames.shape[2], frames.shape[1], pix_fmt
        video.codec_context.time_base, video.codec_context.thread_count = TIME_BASE, 1
        video.codec_context.max_b_frames = 0
        tracks = [container.add_stream(audio_codec, rate=rate, layout=layout) for _ in sounds]
        for number, track in enumerate(tracks):
            if len(tracks) > 1:
                track.disposition = av.stream.Disposition(int(number == default_track))
        container.start_encoding()
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            time_s = number / fps if times_s is None else times_s[number]
            frame.pts, frame.time_base = round(time_s / TIME_BASE), TIME_BASE
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        for track, sound in zip(tracks, sounds, strict=True):
            _write_sound(
                container, track, np.atleast_2d(sound), rate, layout, round(audio_start_s * rate)
            )
    return path


def _write_sound(
    container: Any, track: Any, samples: np.ndarray, rate: int, layout: str, first: int
) -> None:
    for start in range(0, samples.shape[1], 1024):
        block = np.ascontiguousarray(samples[:, start : start + 1024], np.float32)
        frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, first + start, Fraction(1, rate)
        container.mux(track.encode(frame))
    container.mux(track.encode(None))


def rotate(path: Path, degrees: int) -> Path:
    """Write a display matrix into an mp4's video track, as phones do: players turn it clockwise by
    ``degrees``.
    """
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd")
    a, b, c, d = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[
        degrees
    ]
    one, w = 1 << 16, 1 << 30
    assert data[at + 4] == 0  # version: 40 bytes of times and sizes before the matrix
    struct.pack_into(">9i", data, at + 44, a * one, b * one, 0, c * one, d * one, 0, 0, 0, w)
    path.write_bytes(bytes(data))
    return path


class KnownFaces:
    """A detector for the preparation's plug: faces from ``<video>.faces.json``, as another tool
    would have left them.

    The file has, for each frame at 25 fps, a list of faces: {"box": [x, y, w, h], "left_eye",
    "right_eye", "mouth", "nose": [x, y]} in pixels of the source.
    """

    def __init__(self, source: Path, min_confidence: float) -> None:
        content = json.loads(Path(f"{source}.faces.json").read_text())
        self.width, self.frames = content["width"], content["frames"]

    def detect(self, picture: np.ndarray, time_s: float) -> list[Face]:
        scale = picture.shape[1] / self.width
        found = []
        for face in self.frames[round(time_s * 25)]:
            points = {
                k: np.array(face[k], np.float64) * scale
                for k in ("left_eye", "right_eye", "mouth", "nose")
            }
            x, y, w, h = (v * scale for v in face["box"])
            corners = np.array([(x, y), (x + w, y + h)])
            found.append(Face((x, y, w, h), np.vstack([corners, *points.values()]), **points))
        return found

    def close(self) -> None:
        pass


class OneFace:
    """A detector that sees one still face in the middle of every picture."""

    def __init__(self, source: Path, min_confidence: float) -> None:
        self.source = source

    def detect(self, picture: np.ndarray, time_s: float) -> list[Face]:
        height, width = picture.shape[:2]
        side = min(height, width) / 2
        x, y = (width - side) / 2, (height - side) / 2
        spots = {
            "left_eye": (0.3, 0.4),
            "right_eye": (0.7, 0.4),
            "mouth": (0.5, 0.75),
            "nose": (0.5, 0.55),
        }
        points = {name: np.array([x + u * side, y + v * side]) for name, (u, v) in spots.items()}
        corners = np.array([(x, y), (x + side, y + side)])
        return [Face((x, y, side, side), np.vstack([corners, *points.values()]), **points)]  # type: ignore[arg-type]

    def close(self) -> None:
        pass


class NoFace(OneFace):
    """A detector that sees nobody."""

    def detect(self, picture: np.ndarray, time_s: float) -> list[Face]:
        return []


class Crashing(OneFace):
    """Ends its process at a video that is called so."""

    def detect(self, picture: np.ndarray, time_s: float) -> list[Face]:
        if "crash" in self.source.name and time_s > 0.1:
            os.kill(os.getpid(), signal.SIGSEGV)
        if "raise" in self.source.name:
            raise ZeroDivisionError("a bug\nin a plug-in")
        if "memory" in self.source.name:
            raise MemoryError
        return super().detect(picture, time_s)
