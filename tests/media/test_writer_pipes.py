"""Video into pipes: complete, early, and ended by a reader that goes away."""

from __future__ import annotations

import io
import os
import threading
from contextlib import suppress
from typing import BinaryIO

import av
import numpy as np
import pytest

from rest_lightning.constants import SAMPLES_PER_FRAME
from rest_lightning.errors import UserError
from rest_lightning.media.writer import Mp4Pipe, open_pipe


class Pipe(io.BytesIO):
    """Bytes that were sent, in an object that cannot seek."""

    def seekable(self) -> bool:
        return False


def noise(num_frames: int, size_px: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(
        0, 256, (num_frames, size_px, size_px, 3), dtype=np.uint8
    )


def read(data: bytes) -> tuple[np.ndarray, int, np.ndarray]:
    """Decoded frames, samples of sound, and the samples at which it clicks, by the clock of the
    container.
    """
    with av.open(io.BytesIO(data)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    with av.open(io.BytesIO(data)) as container:
        sound = np.zeros(len(frames) * SAMPLES_PER_FRAME + 4096)
        end = 0
        for frame in container.decode(audio=0):
            assert frame.pts is not None
            sound[frame.pts : frame.pts + frame.samples] = np.abs(frame.to_ndarray()[0])
            end = frame.pts + frame.samples
    loud = np.flatnonzero(sound > 0.4)
    return np.stack(frames), end, loud[np.flatnonzero(np.diff(loud, prepend=-1000) > 100)]


@pytest.mark.parametrize("chunks", [[9], [24, 24, 24], [24, 7], [250]])
def test_fragmented_mp4_holds_all_frames_and_sound(chunks: list[int]) -> None:
    pipe, frames = Pipe(), np.full((sum(chunks), 64, 64, 3), 40, np.uint8)
    frames[::5] = 220
    speech = np.zeros(len(frames) * SAMPLES_PER_FRAME, np.float32)
    speech[::3200] = 0.9  # a click with every flash
    writer, start = Mp4Pipe(pipe, 64), 0
    for part in np.split(frames, np.cumsum(chunks)[:-1]):
        writer.write(part)
        stop = start + len(part) * SAMPLES_PER_FRAME
        writer.write_audio(speech[start:stop])
        start = stop
    writer.close()
    writer.close()
    got, num_samples, clicks = read(pipe.getvalue())
    assert np.abs(clicks - np.flatnonzero(speech)).max() <= 2
    assert got.shape == frames.shape
    assert np.array_equal(got.mean((1, 2, 3)) > 128, frames.mean((1, 2, 3)) > 128)
    assert 0 <= num_samples - len(frames) * SAMPLES_PER_FRAME < 2 * 1024
    names = [b"ftyp", b"moov", b"moof", b"mdat"]
    places = [pipe.getvalue().index(name) for name in names]
    assert places == sorted(places)


def test_sound_is_not_late_by_its_encoders_run_in() -> None:
    """AAC's first 1024 samples, 64 ms, are dropped where the index says so: what is decoded begins
    with the speech.
    """
    pipe = Pipe()
    writer = Mp4Pipe(pipe, 64)
    speech = np.zeros(48 * SAMPLES_PER_FRAME, np.float32)
    speech[8000:8160] = 0.5
    for part in np.split(speech, 2):
        writer.write(noise(24))
        writer.write_audio(part)
    writer.close()
    with av.open(io.BytesIO(pipe.getvalue())) as container:
        decoded = np.concatenate(
            [frame.to_ndarray()[0] for frame in container.decode(container.streams.audio[0])]
        )
    assert abs(int(np.flatnonzero(np.abs(decoded) > 0.1)[0]) - 8000) < 48


def test_frames_leave_as_soon_as_they_are_written() -> None:
    """All but the last frame can be decoded before anything else is written, also from the first
    chunk.
    """
    pipe = Pipe()
    writer = Mp4Pipe(pipe, 64)
    for count in (24, 48, 72):
        writer.write(noise(24, seed=count))
        writer.write_audio(np.zeros(24 * SAMPLES_PER_FRAME, np.float32))
        assert len(read(pipe.getvalue())[0]) >= count - 2
    writer.close()
    assert len(read(pipe.getvalue())[0]) == 72


def test_raw_frames_are_the_frames() -> None:
    pipe, frames = Pipe(), noise(31)
    writer = open_pipe(pipe, 64, "rgb24")
    writer.write(frames[:24])
    writer.write_audio(np.zeros(100, np.float32))
    writer.write(frames[24:])
    writer.close()
    assert pipe.getvalue() == frames.tobytes()
    assert writer.num_frames == 31 and writer.num_samples == 100 and writer.duration_s == 31 / 25


@pytest.mark.parametrize("kind", ["mp4", "rgb24"])
def test_a_reader_that_goes_away(kind: str) -> None:
    reading, writing = os.pipe()

    def read_some() -> None:
        with os.fdopen(reading, "rb") as file:
            file.read(5000)

    reader = threading.Thread(target=read_some)
    reader.start()
    pipe: BinaryIO = os.fdopen(writing, "wb")
    writer = open_pipe(pipe, 64, kind)  # type: ignore[arg-type]
    with pytest.raises(BrokenPipeError):
        for seed in range(20):
            writer.write(noise(24, seed=seed))
            writer.write_audio(np.zeros(24 * SAMPLES_PER_FRAME, np.float32))
    writer.abort()
    writer.abort()
    reader.join()
    with suppress(BrokenPipeError):  # what its buffer still holds
        pipe.close()


def test_bad_formats_and_frames() -> None:
    with pytest.raises(UserError, match="expected a format of mp4, rgb24, got 'webm'"):
        open_pipe(Pipe(), 64, "webm")  # type: ignore[arg-type]
    for kind in ("mp4", "rgb24"):
        writer = open_pipe(Pipe(), 64, kind)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=r"expected uint8 frames \(n, 64, 64, 3\)"):
            writer.write(noise(2, 32))
        writer.abort()
