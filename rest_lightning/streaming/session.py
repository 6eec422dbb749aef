"""A stream of one talking head: push speech, get frames."""

from __future__ import annotations

import copy
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rest_lightning.constants import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME, TEMPORAL_RATIO
from rest_lightning.errors import UserError
from rest_lightning.media.level import MAX_PEAK, LevelMeter, refuse_bytes
from rest_lightning.streaming.device import Frames, Pending, Ready
from rest_lightning.streaming.engine import ChunkEngine, EngineOptions, EngineState, StreamState
from rest_lightning.streaming.idle import IDLE
from rest_lightning.streaming.report import StreamClock, StreamReport

if TYPE_CHECKING:
    from rest_lightning.diffusion.sampling import Sampling
    from rest_lightning.media.audio import Resampler
    from rest_lightning.media.writer import BackgroundWriter
    from rest_lightning.parts import TalkingParts
    from rest_lightning.streaming.engine import ChunkEngine

# -- a stream of an engine -------------------------------------------------------------------------

Samples = NDArray[np.float32]


@dataclass(frozen=True)
class RowState:
    """A row between two chunks: engine, waiting samples, noise generator, portrait and counters."""

    engine: EngineState
    waiting: tuple[Samples, ...]
    buffer: Samples
    filled: int
    num_samples: int
    num_frames: int
    is_finished: bool
    generator: Tensor
    reference: Tensor


def checked_seed(seed: int) -> int:
    """The seed, if it is one of torch's.

    Raises:
        UserError: a number that does not fit into 64 bits.
    """
    if not -(2**63) <= seed < 2**64:
        raise UserError(
            f"expected a seed of 64 bits (0 to {2**64 - 1}), got {seed}: use a small one"
        )
    return seed


class Row:
    """A stream of an engine: speech goes in with :meth:`push`, and :meth:`take` gives what the next
    chunk needs.

    Speech lies in the window of the next chunk, and what has no room there waits behind it. A
    session of one stream and a batch of many hold their speech here and nowhere else.

    The first emitted frame shows the first 40 ms of speech. Internally frame 0 is the portrait
    itself with one frame of silence before the speech; it is never emitted.

    Args:
        engine: tells the lengths of chunks and windows.
        reference: portrait (1, 3, H, W) in [-1, 1].
        seed: of the noise.
        place: memory of this one stream; None: the engine's own.

    Attributes:
        num_samples: samples of speech in the windows so far, those that wait not counted.
        num_frames: frames launched so far.
        is_finished: whether the speech has ended.
    """

    def __init__(
        self, engine: ChunkEngine, reference: Tensor, seed: int, place: StreamState | None = None
    ) -> None:
        self._engine, self._place, self.reference = engine, place or engine, reference
        self.generator = torch.Generator().manual_seed(checked_seed(seed))
        self._buffer: Samples = np.zeros(engine.window_samples, dtype=np.float32)
        self._filled = engine.model.speech_encoder.left_context_frames * SAMPLES_PER_FRAME
        self._waiting: deque[Samples] = deque()
        self.num_samples = self.num_frames = 0
        self.is_finished = False
        self._place.start(reference)

    @property
    def num_latents(self) -> int:
        """Latents of the next chunk."""
        return self._engine.chunk_length if self.num_frames else self._engine.first_length

    @property
    def num_missing(self) -> int:
        """Samples that the next chunk still needs."""
        return self._engine.samples_of(self.num_latents) - self._filled

    @property
    def total_frames(self) -> int:
        """Frames of all speech so far; 40 ms begun count as one."""
        return -(-self.num_samples // SAMPLES_PER_FRAME)

    @property
    def has_chunk(self) -> bool:
        """Whether a chunk can be taken: all its samples are there, or the speech has ended before
        it was shown.
        """
        return self.num_missing == 0 or (self.is_finished and self.num_frames < self.total_frames)

    def push(self, block: Samples) -> None:
        """Take in samples. The array must not change afterwards."""
        if len(block):
            self._waiting.append(block)
            self._fill()

    def _fill(self) -> None:
        """Move what waits into the window, as far as there is room."""
        while self._waiting and self.num_missing:
            block = self._waiting.popleft()
            count = min(len(block), self.num_missing)
            self._buffer[self._filled : self._filled + count] = block[:count]
            self._filled += count
            self.num_samples += count
            if count < len(block):
                self._waiting.appendleft(block[count:])

    @property
    def num_waiting(self) -> int:
        """Samples that the next chunk has no room for."""
        return sum(map(len, self._waiting))

    def drop_waiting(self) -> None:
        """Forget the samples that the next chunk has no room for."""
        self._waiting.clear()

    @property
    def num_amendable(self) -> int:
        """Samples at the end of the speech that can still be replaced: no launched frame shows
        them, and none wait behind them.
        """
        if self._waiting or self.is_finished:
            return 0
        return self.num_samples - SAMPLES_PER_FRAME * self.num_frames

    def amend(self, block: Samples) -> None:
        """Put other samples in the place of the last ones; at most :attr:`num_amendable`."""
        self._buffer[self._filled - len(block) : self._filled] = block

    def take(self) -> tuple[Tensor, Tensor, int]:
        """Audio (1, samples) and noise (1, C, l, h, w) of the next chunk, and how many of its
        frames are shown.
        """
        if self.num_missing:  # the ragged end
            self._buffer[self._filled :] = 0.0
            self._filled = self._engine.samples_of(self.num_latents)
        num_latents = self.num_latents
        audio = torch.from_numpy(self._buffer[: self._filled].copy())[None]
        _, channels, _, *place = self._engine.latent_shape
        noise = torch.randn((1, channels, num_latents, *place), generator=self.generator)
        num_frames = TEMPORAL_RATIO * num_latents
        if self.is_finished:
            num_frames = min(num_frames, self.total_frames - self.num_frames)
        shift = TEMPORAL_RATIO * num_latents * SAMPLES_PER_FRAME
        self._filled -= shift
        self._buffer[: self._filled] = audio[0, shift:].numpy()
        self.num_frames += num_frames
        self._fill()
        return audio, noise, num_frames

    def switch_identity(self, reference: Tensor) -> None:
        """Go on with another portrait from the next chunk on."""
        self._place.switch_identity(reference)
        self.reference = reference

    def snapshot(self) -> RowState:
        """A copy of everything that the following frames depend on."""
        return RowState(
            self._place.snapshot(),
            tuple(self._waiting),
            self._buffer.copy(),
            self._filled,
            self.num_samples,
            self.num_frames,
            self.is_finished,
            self.generator.get_state(),
            self.reference,
        )

    def restore(self, saved: RowState) -> None:
        """Go back to a snapshot. See :meth:`StreamState.restore`."""
        self._place.restore(saved.engine)
        self._waiting = deque(saved.waiting)
        self._buffer[:] = saved.buffer
        self._filled, self.num_samples, self.num_frames = (
            saved.filled,
            saved.num_samples,
            saved.num_frames,
        )
        self.is_finished, self.reference = saved.is_finished, saved.reference
        self.generator.set_state(saved.generator)


def launch(
    engine: ChunkEngine, clock: StreamClock, rows: Sequence[Row]
) -> tuple[Pending, list[int]]:
    """Queue the next chunk of rows that are alike in length.

    Args:
        engine: of as many rows, which holds their state.
        clock: told when the first chunk of a row has all its speech.
        rows: the streams, in the engine's order.

    Returns:
        The chunk, and how many of each row's frames are shown.
    """
    if any(not row.num_frames for row in rows):
        clock.input_complete()
    audio, noise, counts = zip(*(row.take() for row in rows), strict=True)
    return engine.launch(torch.cat(audio), torch.cat(noise)), list(counts)


_MAX_PIXEL = 2.0  # in units of [-1, 1]: resampling may overshoot by a little


def as_reference(portrait: Any, size_px: int) -> Tensor:
    """A portrait as :meth:`TalkingHead.open` takes it, as a tensor (1, 3, size_px, size_px) in [-1,
    1].

    Raises:
        UserError: a tensor of another shape, or with values far outside [-1, 1] or not finite; or
            what
            :func:`rest_lightning.media.portrait.read_portrait` refuses.
    """
    if isinstance(portrait, Tensor) and portrait.is_floating_point():
        largest = float(portrait.detach().abs().max()) if portrait.numel() else 0.0
        if not largest <= _MAX_PIXEL:  # NaN too
            raise UserError(
                f"expected a portrait tensor with values in [-1, 1], got {largest:g}: divide "
                "pixels of 0 to 255 by 127.5 and take 1 from them"
            )
        if portrait.shape != (3, size_px, size_px):
            raise UserError(
                f"expected a portrait tensor of shape (3, {size_px}, {size_px}), got "
                f"{tuple(portrait.shape)}"
            )
        return portrait[None]
    from rest_lightning.media.portrait import load_portrait

    return load_portrait(portrait, size_px)[None]


def as_samples(samples: Any, position: int = 0) -> Samples:
    """Check a block of speech and bring it to float32; int16 is scaled to [-1, 1].

    Args:
        samples: array, list or tensor of one dimension.
        position: samples before this block, for the error's time stamp.

    Raises:
        UserError: bytes, more than one dimension, an integer type other than int16, NaN, infinity
            or samples beyond 16.
    """
    refuse_bytes(samples)
    block = samples.detach().cpu().numpy() if isinstance(samples, Tensor) else np.asarray(samples)
    if block.ndim != 1:
        raise UserError(
            f"expected speech of one dimension (mono, {SAMPLE_RATE} Hz), got shape {block.shape}: "
            "average the channels"
        )
    if block.dtype == np.int16:
        return block.astype(np.float32) / 32768.0
    if not np.issubdtype(block.dtype, np.floating):
        raise UserError(
            f"expected speech as float or int16, got {block.dtype}: convert it to float32 in [-1, "
            "1]"
        )
    with np.errstate(over="ignore"):
        block = block.astype(np.float32)
    good = np.abs(block) <= MAX_PEAK  # False for NaN
    if not good.all():
        first = int(np.argmin(good))
        at_s = (position + first) / SAMPLE_RATE
        if np.isfinite(block[first]):
            raise UserError(
                f"expected samples in [-1, 1], got {block[first]:g} at {at_s:.2f} s of the "
                "speech: divide by the largest integer"
            )
        raise UserError(
            f"expected finite samples, got NaN or infinity at {at_s:.2f} s of the speech: repair "
            "the source"
        )
    return block


_LIVE_S = 0.005  # a source that lets us wait longer than this for a block is live


@dataclass(frozen=True)
class SessionState:
    """A session between two pushes: its row, and frames that were computed but not handed out."""

    row: RowState
    waiting: tuple[Frames, ...] = ()
    resampler: Resampler | None = None


class NotFiniteError(UserError):
    """A chunk whose frames are no numbers: the stream ends instead of showing black."""

    def __init__(self, at_s: float) -> None:
        super().__init__(
            f"expected frames from the model, got NaN or infinity in the chunk at {at_s:.2f} s: "
            "lower the guidance, use float32, or take another model (these weights may be damaged)"
        )


class _Alone:
    """Lets one thread in at a time; a second one is refused, as the order of its speech would be
    chance.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise UserError(
                "expected one thread at a time in a session, got a second one: give every thread a "
                "session of its own, or call this one from one thread"
            )

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class StreamingSession:
    """Speech in, frames out, chunk by chunk, at a constant cost. :meth:`TalkingHead.open` makes it.

    The first frame that comes out shows the first 40 ms of speech.

    Args:
        model: the talking head.
        portrait: see :meth:`TalkingHead.open`.
        seed: see :meth:`TalkingHead.open`.
        sampling: steps and guidance; None takes the model's own.
        options: switches of the engine.

    Attributes:
        size_px: side of the frames.
    """

    def __init__(
        self,
        model: TalkingParts,
        portrait: Any,
        *,
        seed: int = 0,
        sampling: Sampling | None = None,
        options: EngineOptions | None = None,
    ) -> None:
        self.model = model
        sampling, options = sampling or model.sampling, options or EngineOptions()
        self.clock = StreamClock()
        self.configuration = describe(model, sampling, options) | {"seed": seed}
        self.size_px = options.output_px(model.size_px)
        reference = as_reference(portrait, self.size_px)
        self.engine = IDLE.open(model, sampling, self.clock, options)
        if options.warms_up(model.device) and not self.engine.num_captured:
            self.engine.warm_up()
        self._row = Row(self.engine, reference, seed)
        self._under_way: deque[tuple[Pending, int, int]] = deque()
        self._closed = False
        self._alone = _Alone()
        self.level = LevelMeter()
        self._resampler: Resampler | None = None

    @property
    def num_frames(self) -> int:
        """The number of frames that came out so far."""
        return self._row.num_frames - sum(num_frames for _, num_frames, _ in self._under_way)

    @property
    def reference(self) -> Tensor:
        """The portrait, (1, 3, H, W) in [-1, 1]."""
        return self._row.reference

    def push(self, samples: Any, sample_rate: int = SAMPLE_RATE) -> Frames:
        """Takes speech in, and returns the frames that became ready.

        Args:
            samples: float samples in about [-1, 1], or int16; one dimension, any length.
            sample_rate: of the samples, in Hz; one rate in a session. Another one than 16,000 is
                resampled, and the last millisecond waits for the next push.

        Returns:
            uint8 (n, H, W, 3). n is a multiple of the chunk's frames, and often 0.

        Raises:
            UserError: a push after :meth:`flush`, more than one dimension, or samples that are not
                finite.
        """
        with self._alone:
            block = self._at_16_khz(samples, sample_rate)
            return self._stack([*self._feed(block), *self._collect()])

    def flush(self) -> Frames:
        """Ends the speech, and returns the frames of what is left.

        The video is then as long as the speech.
        """
        with self._alone:
            rest: list[Frames] = []
            if self._resampler is not None and not self._closed and not self._row.is_finished:
                rest += self._feed(self._resampler.flush())
            return self._stack([*rest, *self._drain()])

    def _at_16_khz(self, samples: Any, sample_rate: int) -> Any:
        """Samples of 16 kHz, as :meth:`_feed` takes them."""
        rate = SAMPLE_RATE if self._resampler is None else self._resampler.sample_rate
        if sample_rate != rate and (self._resampler is not None or self._row.num_samples):
            raise UserError(
                f"expected one sample rate in a session, got {sample_rate} Hz after {rate} Hz: "
                "resample one of the two, or open a new session"
            )
        if sample_rate == SAMPLE_RATE:
            return samples
        if self._resampler is None:
            from rest_lightning.media.audio import Resampler  # PyAV: only who resamples needs it

            self._resampler = Resampler(sample_rate)
        return self._resampler.push(as_samples(samples, self._row.num_samples))

    def stream(self, blocks: Iterable[Any]) -> Iterator[Frames]:
        """Pushes every block, flushes at the end, and yields frames as soon as they are ready.

        On CUDA a chunk is decoded while the next one is denoised. A live source is one that keeps
        us waiting for a block. For such a source nothing is held back: frames are handed out before
        the next block is asked for.
        """
        source = iter(blocks)
        while True:
            asked_s = time.perf_counter()
            try:
                block = next(source)
            except StopIteration:
                break
            is_live = time.perf_counter() - asked_s > _LIVE_S
            yield from self._one_by_one(self._feed(block))
            yield from self._one_by_one(self._collect(0 if is_live else self.engine.depth))
        yield from self._one_by_one(self._drain())

    def _one_by_one(self, chunks: Iterator[Frames]) -> Iterator[Frames]:
        """Chunks, each made without another thread in the session."""
        while True:
            with self._alone:
                frames = next(chunks, None)
            if frames is None:
                return
            yield frames

    def switch_identity(self, portrait: Any) -> None:
        """Continues with another portrait from the next chunk on.

        This costs one prefill.
        """
        self._check_open()
        reference = as_reference(portrait, self.size_px)
        with self._alone:
            self._row.switch_identity(reference)

    def report(self) -> StreamReport:
        """Returns frames, speed, latency and memory so far."""
        return self.clock.report(self.configuration)

    def snapshot(self) -> SessionState:
        """Returns a copy of everything that the following frames depend on."""
        self._check_open()
        with self._alone:
            waiting = [
                (Ready(pending.frames(), pending.finite), num_frames, mark)
                for pending, num_frames, mark in self._under_way
            ]
            self._under_way = deque(waiting)
            frames = tuple(ready.frames()[0, :num_frames] for ready, num_frames, _ in waiting)
            return SessionState(self._row.snapshot(), frames, copy.copy(self._resampler))

    def restore(self, state: SessionState) -> None:
        """Goes back to a snapshot: the same speech then gives the same frames, bit for bit.

        Raises:
            UserError: a snapshot of another model, type, size or guidance; the session is then
                unchanged.
        """
        self._check_open()
        with self._alone:
            self._row.restore(state.row)
            self._resampler = copy.copy(state.resampler)
            self._under_way = deque(
                (Ready(frames[None]), len(frames), self.clock.mark()) for frames in state.waiting
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None and not self._closed:  # an engine that failed is not trusted again
            IDLE.close(self.engine)
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise UserError("expected an open session, got one that is closed: open a new session")

    def _feed(self, samples: Any) -> Iterator[Frames]:
        if self._closed or self._row.is_finished:
            raise UserError(
                "expected speech before flush() or the end of the session, got a push after it: "
                "open a new session"
            )
        block = as_samples(samples, self._row.num_samples)
        self.level.add(block)
        while len(block):  # a chunk at a time: a snapshot in between holds no more than that
            count = self._row.num_missing
            self._row.push(block[:count])
            block = block[count:]
            if self._row.has_chunk:
                yield from self._launch()

    def _drain(self) -> Iterator[Frames]:
        if self._closed:
            return
        self._row.is_finished = True
        while self._row.has_chunk:
            yield from self._launch()
        yield from self._collect()

    def _launch(self) -> Iterator[Frames]:
        """Queue the next chunk, then hand out earlier ones: all that are ready, and what must be
        before one more.
        """
        pending, (num_frames,) = launch(self.engine, self.clock, [self._row])
        self._under_way.append((pending, num_frames, self.clock.mark()))
        yield from self._collect(self.engine.depth)

    def _collect(self, num_left: int = 0) -> Iterator[Frames]:
        """Hand out chunks in their order: those that are ready, and waiting for others until
        ``num_left`` are left.
        """
        while self._under_way and (
            len(self._under_way) > num_left or self._under_way[0][0].is_ready
        ):
            at_s = self.num_frames / FPS
            pending, num_frames, mark = self._under_way.popleft()
            frames = pending.frames()[0, :num_frames]
            if not pending.finite[0]:
                self._closed = True
                raise NotFiniteError(at_s)
            self.clock.end_chunk(num_frames, mark)
            yield frames

    def _stack(self, chunks: list[Frames]) -> Frames:
        size = self.size_px
        return np.concatenate(chunks) if chunks else np.zeros((0, size, size, 3), dtype=np.uint8)


def describe(model: TalkingParts, sampling: Sampling, options: EngineOptions) -> dict[str, Any]:
    """What a report remembers of how a stream was made."""
    return {
        **asdict(sampling),
        "size_px": options.output_px(model.size_px),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "cuda_graphs": options.captures(model.device),
        "compile": options.compile,
        "packed": options.packs(model.device, model.dtype),
        "fused": options.fuses(model.device, model.dtype),
        "float8": options.float8,
        "attention": options.attention,
        "overlap": options.overlap and model.device.type == "cuda",
        "first_chunk_length": options.first_length(model.transformer.cache_options.chunk_length),
    }


def write_stream(
    session: StreamingSession, speech: Iterable[np.ndarray], writer: BackgroundWriter
) -> Iterator[int]:
    """Streams speech (float32 blocks, 16 kHz) into a video; yields the number of frames of every
    chunk.

    Speech is held back until its frames are there: in an interrupted video it ends with the
    pictures. What the stream waits for the writer is charged to the stage ``writing``.
    """
    waiting: deque[np.ndarray] = deque()
    num_frames = num_samples = 0

    def listened() -> Iterator[np.ndarray]:
        for block in speech:
            waiting.append(block)
            yield block

    for frames in session.stream(listened()):
        num_frames += len(frames)
        samples = _take(waiting, num_frames * SAMPLES_PER_FRAME - num_samples)
        num_samples += len(samples)
        with session.clock.stage("writing"):
            writer.write(frames, samples)
        yield len(frames)


def _take(waiting: deque[np.ndarray], count: int) -> np.ndarray:
    """The first ``count`` samples of what waits, or all there are."""
    taken = []
    while waiting and count > 0:
        block = waiting.popleft()
        if len(block) > count:
            waiting.appendleft(block[count:])
            block = block[:count]
        taken.append(block)
        count -= len(block)
    return np.concatenate([np.zeros(0, np.float32), *taken])
