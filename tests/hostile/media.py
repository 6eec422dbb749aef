"""Sound and video with faults: samples and frames come out, or one line."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
from mutations import mutated
from tries import loop

from rest_lightning.media.audio import open_speech
from rest_lightning.media.video import VideoFile

KINDS = ("wav", "mp3", "flac", "ogg", "mp4", "webm", "mkv", "ts", "avi")
_CODECS = {
    "wav": ("pcm_s16le", None),
    "mp3": ("libmp3lame", None),
    "flac": ("flac", None),
    "ogg": ("libopus", None),
    "mp4": ("aac", "libx264"),
    "webm": ("libopus", "libvpx"),
    "mkv": ("flac", "libx264"),
    "ts": ("aac", "libx264"),
    "avi": ("pcm_s16le", "mpeg4"),
}


def make(path: Path, kind: str) -> bytes:
    """Half a second of noise, with pictures where the container has them."""
    sound, video = _CODECS[kind]
    names = {"ts": "mpegts", "mkv": "matroska"}
    rng = np.random.default_rng(0)
    rate = 48_000 if sound == "libopus" else 16_000
    with av.open(str(path), "w", format=names.get(kind, kind)) as container:
        audio = container.add_stream(sound, rate=rate)
        audio.layout = "mono"
        pictures = None
        if video is not None:
            pictures = container.add_stream(video, rate=25)
            pictures.width, pictures.height, pictures.pix_fmt = 64, 64, "yuv420p"
        resampler = av.AudioResampler(audio.format, "mono", rate, audio.codec_context.frame_size)
        noise = (rng.normal(scale=4000, size=(1, rate // 2))).astype("<i2")
        frame = av.AudioFrame.from_ndarray(noise, format="s16", layout="mono")
        frame.sample_rate, frame.pts = rate, 0
        for each in (*resampler.resample(frame), *resampler.resample(None)):
            container.mux(audio.encode(each))
        container.mux(audio.encode(None))
        if pictures is not None:
            for _ in range(12):
                pixels = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
                container.mux(pictures.encode(av.VideoFrame.from_ndarray(pixels)))
            container.mux(pictures.encode(None))
    return path.read_bytes()


FILES = {kind: make(Path(f"whole.{kind}"), kind) for kind in KINDS}


def one(seed: int) -> None:
    """One file, heard and then seen."""
    kind = KINDS[seed % len(KINDS)]
    path = Path(f"a.{kind}")
    path.write_bytes(mutated(FILES[kind], seed))
    if seed % 2 or _CODECS[kind][1] is None:
        samples = open_speech(str(path)).read_all()
        assert samples.ndim == 1 and np.isfinite(samples).all()
        return
    with VideoFile(path) as video:
        frames = video.read(0, min(video.num_frames, 12))
        assert frames.dtype == np.uint8 and frames.shape[-1] == 3


loop(one)
