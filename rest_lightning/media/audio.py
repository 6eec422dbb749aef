"""Speech from any file or pipe as float32 blocks of 16 kHz mono, in bounded memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from av.audio.frame import AudioFrame

from rest_lightning.constants import SAMPLE_RATE
from rest_lightning.errors import UserError

BLOCK_SAMPLES = SAMPLE_RATE // 4
_KINDS = "wav, mp3, flac, m4a, ogg or mp4"
_TO_PIPE = "ffmpeg -i speech.wav -f s16le -ar 16000 -ac 1 - | rest talk portrait.png - -o out.mp4"
_MAX_PEAK = 16.0  # float files beyond this hold integers by mistake, not loud speech
# sizes that a wav header carries when its writer could not seek back
_STREAMED_SIZES = (0, 0x7FFFFFFF, 0xFFFFFFFF)


@dataclass(frozen=True)
class SpeechSource:
    """Speech that can be read block by block; a file as often as one likes, a pipe once.

    Attributes:
        name: path, or ``stdin``.
        num_samples: length at 16 kHz; None where it cannot be known beforehand (pipes).
        sample_rate_hz: rate inside the file; this and the next two are None for named pipes.
        num_channels: channels inside the file; they are mixed down.
        codec: name of the codec.
        block_samples: length of the blocks at 16 kHz; the last one may be shorter. From ``stdin``
            they come as they arrive, and are that long at most.
    """

    name: str
    num_samples: int | None
    sample_rate_hz: int | None
    num_channels: int | None
    codec: str | None
    block_samples: int = BLOCK_SAMPLES
    pipe: BinaryIO | None = None

    @property
    def duration_s(self) -> float | None:
        """Length in seconds, None where it cannot be known beforehand."""
        return None if self.num_samples is None else self.num_samples / SAMPLE_RATE

    def __iter__(self) -> Iterator[np.ndarray]:
        """Blocks (block_samples,) of float32 mono at 16 kHz, in [-1, 1]."""
        if self.pipe is not None:
            return _read_pipe(self.pipe, self.block_samples)
        return _blocks(_resample(Path(self.name)), self.block_samples, self.num_samples)

    def read_all(self) -> np.ndarray:
        """Everything at once, (num_samples,) float32: 3 hours take 690 MB."""
        return np.concatenate([np.zeros(0, np.float32), *self])


def open_speech(
    path: str | os.PathLike[str],
    *,
    block_samples: int = BLOCK_SAMPLES,
    stdin: BinaryIO | None = None,
) -> SpeechSource:
    """Opens speech of any rate and channel count: what PyAV reads, the audio of a video too, or
    ``-`` for a pipe.

    A file is decoded once here without keeping it, 1000 times faster than it plays: its length is
    then exact, and a broken file is refused before the first frame is rendered instead of after an
    hour.

    Args:
        path: a file, or ``-`` for raw 16 kHz mono signed 16-bit little-endian samples from
            ``stdin``.
        block_samples: length of the blocks.
        stdin: the pipe to read instead of the process's own.

    Raises:
        UserError: no such file, a folder, not sound, truncated, no audio track, no samples, NaN
            samples.
    """
    if os.fspath(path) == "-":
        # Without its buffer: whoever waits for that in a thread holds a lock that Python needs at
        # its end.
        pipe = stdin if stdin is not None else getattr(sys.stdin.buffer, "raw", sys.stdin.buffer)
        if pipe.isatty():
            raise UserError(
                f"expected raw 16 kHz samples from a pipe, got a terminal: try {_TO_PIPE}"
            )
        return SpeechSource("stdin", None, SAMPLE_RATE, 1, "pcm_s16le", block_samples, pipe)
    path = Path(path)
    if path.is_dir():
        raise UserError(f"expected a speech file, got the folder {path}: name a file in it")
    if not path.exists():
        raise UserError(
            f"expected a speech file ({_KINDS}), but {path} does not exist: check the name"
        )
    # a named pipe or a device can be opened only once: nothing is known before it is read
    if not path.is_file():
        return SpeechSource(str(path), None, None, None, None, block_samples)
    if path.stat().st_size == 0:
        raise UserError(f"expected speech, got the empty file {path}: record or export it again")
    with _open(path) as container:
        stream = container.streams.audio[0]
        codec, layout = stream.codec_context.name, stream.codec_context.layout
        rate, num_channels = stream.codec_context.sample_rate, layout.nb_channels
    return SpeechSource(str(path), _check(path), rate, num_channels, codec, block_samples)


def _open(path: Path) -> av.container.InputContainer:
    try:
        container = av.open(str(path))
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = (getattr(error, "strerror", None) or type(error).__name__).lower()
        raise UserError(
            f"expected speech ({_KINDS}), but {path} cannot be read ({reason}): "
            "it is truncated or something else; copy or export it again"
        ) from error
    if not container.streams.audio:
        tracks = ", ".join(sorted({stream.type for stream in container.streams})) or "no"
        container.close()
        raise UserError(
            f"expected an audio track, but {path} has {tracks} tracks only: choose a "
            "file with sound"
        )
    return container


def _decode(path: Path) -> Iterator[AudioFrame]:
    """Decoded frames of the first audio track; a few bad packets are skipped, many are an error."""
    num_bad = num_good = num_samples = 0
    with _open(path) as container:
        stream = container.streams.audio[0]
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
                frames = packet.decode() if packet is not None else []
            except (av.FFmpegError, ValueError, ZeroDivisionError) as error:
                num_bad += 1
                if num_bad > 2 + num_good // 100:
                    at_s = num_samples / max(1, stream.codec_context.sample_rate)
                    raise UserError(
                        f"expected speech, but {path} cannot be decoded at {at_s:.2f} s: it is "
                        "damaged; export it again"
                    ) from error
                continue
            if packet is None:
                return
            num_good += 1
            for frame in frames:
                if stream.codec_context.name.startswith("pcm_f"):
                    _check_floats(path, frame, num_samples)
                num_samples += frame.samples
                yield frame


def _check(path: Path) -> int:
    """Decodes everything once; returns the number of samples at 16 kHz."""
    with _open(path) as container:
        claimed_s = _claimed_s(path, container)
    seconds, num_samples = 0.0, 0
    for frame in _decode(path):
        num_samples += frame.samples
        seconds += frame.samples / frame.sample_rate
    if claimed_s is not None and seconds < claimed_s - 0.15 - 0.001 * claimed_s:
        raise UserError(
            f"expected {claimed_s:.2f} s of speech in {path} as its header says, found "
            f"{seconds:.2f} s: "
            "the file is truncated; copy or export it again"
        )
    if num_samples == 0:
        raise UserError(f"expected speech, but {path} has no samples: record or export it again")
    if claimed_s is not None and 0 < seconds - claimed_s < 0.1:
        seconds = claimed_s  # the padding of the last packet is no speech
    return max(1, round(seconds * SAMPLE_RATE))


def _check_floats(path: Path, frame: AudioFrame, offset: int) -> None:
    samples = frame.to_ndarray()
    with np.errstate(invalid="ignore"):
        peak = np.abs(samples).max(initial=0.0)
    if peak <= _MAX_PEAK:
        return
    num_channels = 1 if frame.format.is_planar else frame.layout.nb_channels
    position = (
        offset + int(np.flatnonzero(~(np.abs(samples) <= _MAX_PEAK).all(axis=0))[0]) // num_channels
    )
    where = f"at sample {position} ({position / frame.sample_rate:.3f} s)"
    if np.isfinite(peak):
        raise UserError(
            f"expected samples in [-1, 1], but {path} has {peak:.6g} {where}: divide by the "
            "largest integer"
        )
    raise UserError(
        f"expected numbers, but {path} has NaN or infinite samples {where}: export it again"
    )


def _claimed_s(path: Path, container: av.container.InputContainer) -> float | None:
    """The length that the header promises, None where it only guesses (raw AAC, Ogg, MP3 without a
    Xing header).
    """
    stream, kind = container.streams.audio[0], container.format.name
    if kind == "wav":
        header_s = _claimed_by_wav(path, stream.codec_context)
        if header_s is not None:
            return header_s
    if kind in ("aac", "ogg"):
        return None
    if kind == "mp3":
        with path.open("rb") as file:
            head = file.read(10)
            if head[:3] == b"ID3":  # the tag's size: four bytes of seven bits
                file.seek(10 + (head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]))
            head = file.read(4096)
        if b"Xing" not in head and b"Info" not in head:
            return None
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    if len(container.streams) == 1 and container.duration is not None:
        return container.duration / av.time_base
    return None


def _claimed_by_wav(path: Path, context: av.AudioCodecContext) -> float | None:
    """Walks the RIFF chunks: FFmpeg quietly trusts the file's size where the data chunk promises
    more.
    """
    with path.open("rb") as file:
        head, byte_rate = file.read(12), 0
        while head[:4] == b"RIFF" and len(chunk := file.read(8)) == 8:
            name, size = chunk[:4], int.from_bytes(chunk[4:], "little")
            if name == b"data":
                return None if size in _STREAMED_SIZES or not byte_rate else size / byte_rate
            body = file.read(size + size % 2) if name == b"fmt " else b""
            if name == b"fmt ":
                byte_rate = int.from_bytes(body[8:12], "little")
            else:
                file.seek(size + size % 2, os.SEEK_CUR)
    return None


def _resample(path: Path) -> Iterator[np.ndarray]:
    """Mono float32 pieces at 16 kHz of any length.

    FFmpeg mixes down to integers with weights that sum to one, to floats with a gain of 3 dB that
    clips: hence s32.
    """

    def convert(frame: AudioFrame | None) -> Iterator[np.ndarray]:
        if resampler is not None:
            for piece in resampler.resample(frame):
                yield piece.to_ndarray()[0].astype(np.float32) / 2.0**31

    resampler: av.AudioResampler | None = None
    shape: tuple[str, int, int] | None = None
    for frame in _decode(path):
        now = (frame.format.name, frame.layout.nb_channels, frame.sample_rate)
        if resampler is None or now != shape:  # a few broadcasts change their rate on the way
            yield from convert(None)
            resampler, shape = av.AudioResampler("s32p", "mono", SAMPLE_RATE), now
        frame.pts = None  # gaps in the time stamps are no speech
        yield from convert(frame)
    yield from convert(None)


def _read_pipe(pipe: BinaryIO, block_samples: int) -> Iterator[np.ndarray]:
    """Whatever has arrived, without waiting for more: a microphone's samples are not kept until a
    block is full.
    """
    read = getattr(pipe, "read1", pipe.read)
    waiting, num_bytes = b"", 0
    while data := read(2 * block_samples):
        waiting += data
        if num_bytes == 0 and len(waiting) < 4:
            continue
        if num_bytes == 0 and waiting[:4] in (b"RIFF", b"fLaC", b"OggS", b"ID3\x03", b"ID3\x04"):
            raise UserError(
                "expected raw 16 kHz s16le samples on stdin, got a whole sound file: "
                f"try {_TO_PIPE}"
            )
        even = len(waiting) // 2 * 2
        num_bytes += even
        yield _from_int16(waiting[:even])
        waiting = waiting[even:]
    if num_bytes + len(waiting) < 2:
        raise UserError(f"expected raw 16 kHz s16le samples on stdin, got none: try {_TO_PIPE}")
    if len(waiting) >= 2:
        yield _from_int16(waiting[: len(waiting) // 2 * 2])


def _from_int16(data: bytes) -> np.ndarray:
    return np.frombuffer(data, dtype="<i2").astype(np.float32) / 32768.0


def _blocks(
    pieces: Iterator[np.ndarray], block_samples: int, num_samples: int | None
) -> Iterator[np.ndarray]:
    """Cuts pieces into equal blocks and the whole to ``num_samples``: the resampler's tail may be
    some samples off.
    """
    waiting: list[np.ndarray] = []
    num_waiting = num_done = 0

    def limit(samples: np.ndarray) -> np.ndarray:
        return samples if num_samples is None else samples[: max(0, num_samples - num_done)]

    for piece in pieces:
        waiting.append(piece)
        num_waiting += len(piece)
        if num_waiting < block_samples:
            continue
        samples = np.concatenate(waiting)
        for start in range(0, num_waiting - block_samples + 1, block_samples):
            block = limit(samples[start : start + block_samples])
            num_done += len(block)
            if len(block):
                yield block
        waiting = [samples[num_waiting // block_samples * block_samples :]]
        num_waiting = len(waiting[0])
    rest = limit(np.concatenate([np.zeros(0, np.float32), *waiting]))
    if num_samples is not None:
        rest = np.pad(rest, (0, max(0, num_samples - num_done - len(rest))))
    for start in range(0, len(rest), block_samples):
        yield rest[start : start + block_samples]
