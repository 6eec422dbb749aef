"""Speech from any file or pipe as float32 blocks of 16 kHz mono, in bounded memory.

One reader for all commands. What is there is decoded; what cannot be decoded is left out and told;
only a file without anything to decode is refused. What a header promises is never more than a
note: writers that could not seek back leave placeholders, and FFmpeg's own lengths are estimates
for several formats.
"""

from __future__ import annotations

import math
import os
import sys
import wave
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
from av.audio.frame import AudioFrame
from numpy.typing import NDArray

from rest_lightning.constants import SAMPLE_RATE
from rest_lightning.errors import UserError
from rest_lightning.media.container import (
    Losses,
    MediaError,
    decode_what_is_there,
    open_media,
    seconds,
    sound_stream,
)
from rest_lightning.media.level import MAX_PEAK, LevelMeter

BLOCK_SAMPLES = SAMPLE_RATE // 4
Samples = NDArray[np.float32]
_KINDS = "wav, mp3, flac, m4a, ogg or mp4"
_WITH_HEADER = (".mp3", ".flac", ".m4a", ".ogg", ".mp4")
_TO_PIPE = "ffmpeg -i speech.wav -f s16le -ar 16000 -ac 1 - | rest talk portrait.png - -o out.mp4"
_RAW = (
    "samples without a header go in through a pipe as 16 kHz mono s16le: rest talk portrait.png - "
    "-o out.mp4 < FILE, or give them one: ffmpeg -f s16le -ar 16000 -ac 1 -i FILE speech.wav"
)
_RAW_SUFFIXES = (".raw", ".pcm", ".ulaw", ".ul", ".alaw", ".al", ".s16", ".s16le", ".sw", ".sln")
# of a wav: a promise that reaches this far beyond the end is a placeholder
_PLACEHOLDER_BYTES = 1 << 30
_JUMP = Fraction(1, 25)  # time stamps further off than this are a gap, not jitter
BACK_S = Fraction(1, 2)
"""Time stamps that go back by more than this start again: another recording follows."""

_CANCELLED = 0.1  # of the power that channels would have together if they had nothing in common
# weights of FFmpeg's mix to mono; the low-frequency channel is left out
_WEIGHTS = {"FL": 0.7071, "FR": 0.7071, "FC": 1.0, "LFE": 0.0, "LFE2": 0.0}
_SURROUND = 0.5


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
        gain: what the samples are multiplied with, see :mod:`rest_lightning.media.level`.
        notes: what is odd about the sound or missing of it, one line each.
    """

    name: str
    num_samples: int | None
    sample_rate_hz: int | None
    num_channels: int | None
    codec: str | None
    block_samples: int = BLOCK_SAMPLES
    pipe: BinaryIO | None = None
    gain: float = 1.0
    notes: tuple[str, ...] = ()
    mix: Mix | None = field(default=None, repr=False)

    @property
    def duration_s(self) -> float | None:
        """Length in seconds, None where it cannot be known beforehand."""
        return None if self.num_samples is None else self.num_samples / SAMPLE_RATE

    def __iter__(self) -> Iterator[np.ndarray]:
        """Blocks (block_samples,) of float32 mono at 16 kHz, in [-1, 1]."""
        if self.pipe is not None:
            return _read_pipe(self.pipe, self.block_samples)
        return _blocks(self._pieces(), self.block_samples, self.num_samples)

    def read_all(self) -> np.ndarray:
        """Everything at once, (num_samples,) float32: 3 hours take 690 MB."""
        return np.concatenate([np.zeros(0, np.float32), *self])

    def _pieces(self) -> Iterator[Samples]:
        for samples in _in_a_row(Path(self.name), self.mix or Mix()):
            yield samples if self.gain == 1.0 else samples * np.float32(self.gain)


def open_speech(
    path: str | os.PathLike[str],
    *,
    block_samples: int = BLOCK_SAMPLES,
    stdin: BinaryIO | None = None,
    level: bool = True,
    longest_s: float | None = None,
) -> SpeechSource:
    """Opens speech of any rate and channel count: what PyAV reads, the audio of a video too, or
    ``-`` for a pipe.

    A file is decoded once here without keeping it, 1000 times faster than it plays: its length is
    then exact, what is odd about it is known (``notes``), and a file that holds nothing is refused
    before the first frame is rendered. Of several tracks the default one is read; samples follow
    each other without the gaps of their time stamps.

    Args:
        path: a file, or ``-`` for raw 16 kHz mono signed 16-bit little-endian samples from
            ``stdin``.
        block_samples: length of the blocks.
        stdin: the pipe to read instead of the process's own.
        level: raise quiet speech of a file by a constant gain, so that lips follow it.
        longest_s: a file with more sound is refused, when so much of it is decoded.

    Raises:
        UserError: no such file, a folder, not sound, no sound track, nothing that can be decoded,
            NaN samples.
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
    found = survey(path, longest_s)
    gain_db = found.meter.gain_db if level else 0.0
    notes = list(found.notes)
    if gain_db > 0:
        loud_db = found.meter.loud_db
        notes.append(
            f"very quiet speech ({loud_db:.0f} dB of full scale), raised by {gain_db:.0f} dB"
        )
    else:
        notes += found.meter.notes()
    return SpeechSource(
        str(path),
        found.num_samples,
        found.sample_rate_hz,
        found.num_channels,
        found.codec,
        block_samples,
        gain=10 ** (gain_db / 20),
        notes=tuple(f"{path.name}: {note}" for note in notes),
        mix=found.mix,
    )


# -- one pass to know a file -----------------------------------------------------------------------


@dataclass(frozen=True)
class Survey:
    """What one pass over the sound of a file has found.

    Attributes:
        num_samples: length at 16 kHz.
        sample_rate_hz, num_channels, codec: of the track.
        mix: how its channels become one.
        meter: of the mix.
        notes: what is missing, and channels that cancel.
    """

    num_samples: int
    sample_rate_hz: int
    num_channels: int
    codec: str
    mix: Mix
    meter: LevelMeter
    notes: tuple[str, ...]


def survey(path: Path, longest_s: float | None = None) -> Survey:
    """Decodes the sound of a file once, ``longest_s`` seconds of it at most.

    Raises:
        UserError: see :func:`open_speech`.
    """
    with _open(path) as container:
        stream = sound_stream(container)
        context = stream.codec_context
        codec, num_channels = context.name, context.layout.nb_channels
        rate, claimed = context.sample_rate, _claimed_s(path, container, stream)
        kind = container.format.name
    losses, channels, meter = Losses(), _ChannelPowers(), LevelMeter(rate or SAMPLE_RATE)
    counts: dict[int, int] = {}  # samples of each rate; a few broadcasts change it on the way
    end_s = 0.0
    for frame, planes in _decoded(path, losses):
        mixed = Mix().apply(frame, planes)
        channels.add(frame, planes, mixed)
        meter.add(mixed)
        counts[frame.sample_rate] = counts.get(frame.sample_rate, 0) + frame.samples
        if longest_s is not None and counts[frame.sample_rate] > longest_s * frame.sample_rate:
            raise UserError(f"expected at most {longest_s:g} s of sound, got more: cut it")
        end_s = frame.time if frame.time is not None else end_s
    length = sum((Fraction(count, rate) for rate, count in counts.items()), Fraction(0))
    if not length:
        raise UserError(_nothing(path, losses))
    notes = []
    mix = channels.mix()
    if mix.channel is not None:
        meter = LevelMeter(rate or SAMPLE_RATE)
        for frame, planes in _decoded(path):
            meter.add(mix.apply(frame, planes))
        notes.append(
            "its channels cancel each other when they are mixed (one is inverted): only channel "
            f"{mix.channel + 1} is heard"
        )
    if losses.seconds > 0.1:
        notes.append(
            f"{losses.seconds:.1f} s of the sound from {losses.first_s or 0:.1f} s on cannot be "
            "decoded and are left out"
        )
    if claimed is not None and max(float(end_s), float(length)) < 0.999 * float(claimed) - 0.15:
        notes.append(
            f"its header says {float(claimed):.1f} s, and {float(length):.1f} s are there: the "
            "rest is missing"
        )
    if claimed is not None and kind.startswith("mov") and 0 < length - claimed < Fraction(1, 10):
        length = claimed  # the padding of the last packet is no speech
    num_samples = max(1, round(length * SAMPLE_RATE))
    return Survey(num_samples, rate, num_channels, codec, mix, meter, tuple(notes))


def _open(path: Path) -> av.container.InputContainer:
    if path.suffix.lower() in _RAW_SUFFIXES:
        raise UserError(
            f"expected speech ({_KINDS}), got {path}, a name of headerless sound: {_RAW}"
        )
    try:
        container = open_media(path)
    except MediaError as error:
        raise UserError(
            f"expected speech ({_KINDS}), but {path} cannot be read ({error.reason}): "
            f"it is truncated or something else; copy or export it again{_raw_hint(path)}"
        ) from None
    if sound_stream(container) is not None:
        return container
    has_sound = bool(container.streams.audio)
    tracks = ", ".join(sorted({stream.type for stream in container.streams})) or "no"
    container.close()
    if has_sound:
        raise UserError(
            f"expected sound in a codec that FFmpeg decodes, but {path} has another: convert it to "
            "wav or flac with the program that made it"
        )
    raise UserError(
        f"expected an audio track, but {path} has {tracks} tracks only: choose a file with sound"
    )


def _raw_hint(path: Path) -> str:
    """How samples without a header go in, unless the name says that the file has one."""
    return "" if path.suffix.lower() in _WITH_HEADER else f"; {_RAW}"


def _nothing(path: Path, losses: Losses) -> str:
    if losses.num_bad:
        return (
            f"expected speech, but {path} cannot be decoded ({losses.error}): it is damaged or "
            f"something else; export it again{_raw_hint(path)}"
        )
    return f"expected speech, but {path} has no samples: record or export it again"


def _claimed_s(path: Path, container: Any, stream: Any) -> Fraction | None:
    """The length that a header promises; None where there is only an estimate of FFmpeg's."""
    kind = container.format.name
    if kind == "wav":
        try:
            with wave.open(str(path)) as file:
                frame_bytes = file.getnchannels() * file.getsampwidth()
                promised, rate = file.getnframes(), file.getframerate()
        except (wave.Error, EOFError, OSError, ValueError, ZeroDivisionError):
            return None
        if promised * frame_bytes - path.stat().st_size > _PLACEHOLDER_BYTES or rate < 1:
            return None
        return Fraction(promised, rate)
    if kind == "flac" or kind.startswith("mov"):
        return seconds(stream.duration, stream.time_base)
    return None


# -- decoding --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mix:
    """How channels become one: a weighted mean, or one channel alone where they cancel.

    Attributes:
        channel: the one channel, counted from 0; None mixes all.
    """

    channel: int | None = None

    def apply(self, frame: AudioFrame, planes: Samples) -> Samples:
        """Mono samples (n,) of planes (channels, n)."""
        if len(planes) == 1:
            return planes[0]
        if self.channel is not None and self.channel < len(planes):
            return planes[self.channel]
        return (_weights(frame) @ planes).astype(np.float32)


def _weights(frame: AudioFrame) -> NDArray[np.float32]:
    """Weights (channels,) that sum to one: the mix never clips."""
    count = frame.layout.nb_channels
    names = [channel.name for channel in frame.layout.channels]
    weights = np.array([_WEIGHTS.get(name, _SURROUND) for name in names], np.float32)
    if len(names) != count or "FL" not in names:  # a layout without names: all alike
        weights = np.ones(count, np.float32)
    return weights / weights.sum()


class _ChannelPowers:
    """Finds channels that cancel each other in the mix; the first layout of a file decides."""

    def __init__(self) -> None:
        self._powers: NDArray[np.float64] | None = None
        self._apart = self._mixed = 0.0

    def add(self, frame: AudioFrame, planes: Samples, mixed: Samples) -> None:
        if len(planes) == 1:
            return
        power = np.square(planes, dtype=np.float64).sum(axis=1)
        if self._powers is None:
            self._powers = np.zeros(len(planes))
        if len(power) != len(self._powers):
            return
        self._powers += power
        self._apart += float(np.square(_weights(frame), dtype=np.float64) @ power)
        self._mixed += float(np.square(mixed, dtype=np.float64).sum())

    def mix(self) -> Mix:
        if self._powers is None or self._mixed >= _CANCELLED * self._apart:
            return Mix()
        return Mix(int(self._powers.argmax()))


def _decoded(path: Path, losses: Losses | None = None) -> Iterator[tuple[AudioFrame, Samples]]:
    """Frames of the sound track with their samples (channels, n), float32 in [-1, 1].

    Raises:
        UserError: samples that are not finite, or beyond `MAX_PEAK`.
    """
    position = 0
    with _open(path) as container:
        for frame in decode_what_is_there(container, sound_stream(container), losses):
            if not frame.samples or frame.sample_rate < 1:
                continue
            planes = _planes(frame)
            peak = float(np.abs(planes).max())
            if not peak <= MAX_PEAK:
                _refuse(path, planes, position, frame.sample_rate)
            position += frame.samples
            yield frame, planes


def _planes(frame: AudioFrame) -> Samples:
    values = frame.to_ndarray()
    if not frame.format.is_planar:
        values = values.reshape(-1, frame.layout.nb_channels).T
    if values.dtype == np.uint8:
        return ((values.astype(np.float32) - 128) / 128).astype(np.float32)
    if values.dtype.kind == "i":
        full_scale = 2.0 ** (8 * values.dtype.itemsize - 1)
        return (values.astype(np.float32) / full_scale).astype(np.float32)
    return values.astype(np.float32)


def _refuse(path: Path, planes: Samples, offset: int, rate: int) -> None:
    good = (np.abs(planes) <= MAX_PEAK).all(axis=0)
    first = int(np.argmin(good))
    where = f"at sample {offset + first} ({(offset + first) / rate:.3f} s)"
    if np.isfinite(planes[:, first]).all():
        raise UserError(
            f"expected samples in [-1, 1], but {path} has {np.abs(planes[:, first]).max():.6g} "
            f"{where}: divide by the largest integer"
        )
    raise UserError(
        f"expected numbers, but {path} has NaN or infinite samples {where}: export it again"
    )


class _ToRate:
    """Mono pieces of any rate to 16 kHz."""

    def __init__(self) -> None:
        self._resampler: av.AudioResampler | None = None
        self._rate = 0

    def add(self, samples: Samples, rate: int) -> Samples:
        """The next samples (n,); what comes out is late by the filter's length."""
        rest = np.zeros(0, np.float32)
        if rate != self._rate:  # a few broadcasts change their rate on the way
            rest = self.finish()
            self._resampler, self._rate = av.AudioResampler("fltp", "mono", SAMPLE_RATE), rate
        frame = AudioFrame.from_ndarray(
            np.ascontiguousarray(samples[None]), format="fltp", layout="mono"
        )
        frame.sample_rate = rate
        return np.concatenate([rest, self._through(frame)])

    def finish(self) -> Samples:
        """What the filter still holds; the next samples begin anew."""
        rest = self._through(None)
        self._resampler, self._rate = None, 0
        return rest

    def _through(self, frame: AudioFrame | None) -> Samples:
        pieces = [] if self._resampler is None else self._resampler.resample(frame)
        return np.concatenate([np.zeros(0, np.float32), *(p.to_ndarray()[0] for p in pieces)])


def resample(samples: Samples, rate_hz: int) -> Samples:
    """Returns mono samples (n,) of any rate at 16 kHz, float32."""
    to_rate = _ToRate()
    return np.concatenate([to_rate.add(samples, rate_hz), to_rate.finish()])


def _in_a_row(path: Path, mix: Mix) -> Iterator[Samples]:
    """Mono pieces at 16 kHz of any length, one after another: gaps in the time stamps are no
    speech.
    """
    to_rate = _ToRate()
    for frame, planes in _decoded(path):
        yield to_rate.add(mix.apply(frame, planes), frame.sample_rate)
    yield to_rate.finish()


def sound_on_clock(
    path: Path, origins_s: Sequence[Fraction], mix: Mix | None = None, losses: Losses | None = None
) -> Iterator[tuple[int, Samples]]:
    """Sound at the place where its time stamps put it: late starts and gaps stay where they are.

    Args:
        path: a file with a sound track.
        origins_s: the time stamp that is time 0; where the time stamps of a file start again
            (joined recordings), one for each part.
        mix: of the channels, see :func:`survey`; None mixes all.
        losses: counts what cannot be decoded.

    Yields:
        Number of the first sample at 16 kHz, negative before time 0, and samples (n,) float32.
    """
    mix, to_rate = mix or Mix(), _ToRate()
    part, position, heard = 0, 0, Fraction(0)  # next sample; where the sound put in so far ends
    last_stamp: Fraction | None = None
    is_first = True
    for frame, planes in _decoded(path, losses):
        stamp = seconds(frame.pts, frame.time_base)
        if stamp is not None:
            if last_stamp is not None and stamp < last_stamp - BACK_S:
                part += 1
            last_stamp = stamp
            stamp -= origins_s[min(part, len(origins_s) - 1)]
        if is_first or (stamp is not None and abs(stamp - heard) > _JUMP):
            rest = to_rate.finish()
            if len(rest):
                yield position, rest
            heard = stamp if stamp is not None else heard
            position = round(heard * SAMPLE_RATE)
            is_first = False
        heard += Fraction(frame.samples, frame.sample_rate)
        block = to_rate.add(mix.apply(frame, planes), frame.sample_rate)
        yield position, block
        position += len(block)
    yield position, to_rate.finish()


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


class Resampler:
    """Samples of another rate to 16 kHz, block by block; how they are cut changes nothing.

    A windowed sinc as a polyphase filter (Kaiser window, about 80 dB); it adds no delay, but the
    last millisecond of what came waits for what follows. A copy goes on from the same place.

    Args:
        sample_rate: of the samples that come, in Hz.

    Raises:
        UserError: a rate outside 4,000 to 384,000.
    """

    _HALF_WIDTH = 16  # zero crossings of the sinc on either side

    def __init__(self, sample_rate: int) -> None:
        if not 4000 <= sample_rate <= 384_000:
            raise UserError(
                f"expected a sample_rate of 4000 to 384000 Hz, got {sample_rate}: give that of "
                "your samples"
            )
        self.sample_rate = int(sample_rate)
        common = math.gcd(SAMPLE_RATE, self.sample_rate)
        self._up, self._down = SAMPLE_RATE // common, self.sample_rate // common
        self._half = self._HALF_WIDTH * max(self._up, self._down)
        places = np.arange(-self._half, self._half + 1)
        kernel = np.sinc(places / max(self._up, self._down)) * np.kaiser(len(places), 8.0)
        kernel *= self._up / kernel.sum()
        num_taps = -(-len(kernel) // self._up)
        kernel = np.pad(kernel, (0, num_taps * self._up - len(kernel)))
        # Row p holds the taps of outputs that lie p steps of the finer clock behind a sample.
        self._taps = kernel.reshape(num_taps, self._up).T.astype(np.float32)[:, ::-1].copy()
        self._input: Samples = np.zeros(num_taps - 1, np.float32)  # silence before the first one
        self._first = 1 - num_taps  # place of the input's first sample
        self._num_out = self._num_in = 0

    def push(self, samples: Samples) -> Samples:
        """Takes samples (n,) of the other rate; returns those of 16 kHz that are known by now."""
        self._num_in += len(samples)
        self._input = np.concatenate([self._input, samples])
        # An output reads up to half a kernel of samples behind its place.
        end = max(0, ((self._num_in - 1) * self._up - self._half) // self._down + 1)
        return self._make(max(end, self._num_out))

    def flush(self) -> Samples:
        """Returns the rest: as much sound as came in, with silence behind it."""
        total = -(-self._num_in * self._up // self._down)
        num_behind = -(-self._half // self._up) + 1
        self._input = np.concatenate([self._input, np.zeros(num_behind, np.float32)])
        return self._make(total)

    def _make(self, end: int) -> Samples:
        """Outputs up to ``end``; what no later one reads is forgotten."""
        if end <= self._num_out:
            return np.zeros(0, np.float32)
        places = np.arange(self._num_out, end, dtype=np.int64) * self._down + self._half
        self._num_out = end
        num_taps = self._taps.shape[1]
        last, phase = places // self._up, places % self._up
        windows = np.lib.stride_tricks.sliding_window_view(self._input, num_taps)
        chosen = windows[last - (num_taps - 1) - self._first]
        made: Samples = (chosen * self._taps[phase]).sum(axis=1, dtype=np.float32)
        keep = (end * self._down + self._half) // self._up - (num_taps - 1) - self._first
        keep = max(0, min(keep, len(self._input) - (num_taps - 1)))
        self._input, self._first = self._input[keep:].copy(), self._first + keep
        return made
