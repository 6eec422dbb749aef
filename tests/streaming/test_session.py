"""Sessions: equality with the offline computation, independence of the cut, causality, state,
errors.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rest_lightning.errors import UserError
from rest_lightning.media.audio import Resampler
from rest_lightning.media.writer import BackgroundWriter, RawPipe
from rest_lightning.streaming.engine import ChunkEngine, to_uint8
from rest_lightning.streaming.session import StreamingSession, write_stream
from rest_lightning.talking_head import TalkingHead

SAMPLES = 640


def portrait(seed: int = 0) -> torch.Tensor:
    return torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def speech(num_frames: float, seed: int = 1) -> np.ndarray:
    samples = np.random.default_rng(seed).normal(scale=0.2, size=int(num_frames * SAMPLES))
    return samples.astype(np.float32)


def frames_of(
    head: TalkingHead, samples: np.ndarray, cuts: list[int], **options: float
) -> np.ndarray:
    session = head.open(portrait(), **options)  # type: ignore[arg-type]
    parts = [session.push(block) for block in np.split(samples, cuts)]
    return np.concatenate([*parts, session.flush()])


@pytest.mark.parametrize("chunk_length", [1, 2, 3])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_session_equals_offline_computation(
    make: Callable[..., TalkingHead], chunk_length: int, guidance: float
) -> None:
    head = make(chunk_length=chunk_length)
    samples = speech(48)
    streamed = frames_of(head, samples, [], guidance=guidance)

    engine = ChunkEngine(head, 1, replace(head.sampling, guidance=guidance))
    engine.start(portrait()[None])
    audio = torch.from_numpy(samples)[None]
    silence = head.speech_encoder(head.speech_encoder.pad(torch.zeros(1, SAMPLES)))
    features = torch.cat([silence, head.speech_encoder(head.speech_encoder.pad(audio))], dim=1)
    speech_latents = head.speech_ae.encode(features)
    generator = torch.Generator().manual_seed(0)
    latents = [head.vae.encode(portrait()[None, :, None])]
    with torch.inference_mode():
        latents += [
            engine.denoise(torch.randn(engine.latent_shape, generator=generator), chunk)
            for chunk in speech_latents[:, 1:].split(chunk_length, dim=1)
        ]
    whole = to_uint8(head.vae.decode(torch.cat(latents, dim=2)))[0, 1:].numpy()
    assert streamed.shape == (48, 64, 64, 3)
    assert np.abs(streamed.astype(int) - whole.astype(int)).max() <= 1
    assert whole.std() > 5


@pytest.mark.parametrize(
    "options",
    [
        {"reference_attends": "first_chunk"},
        {"cache_noise": "clean_pass"},
        {"cache_noise": "per_step"},
        {"positions": "absolute"},
        {"first_chunk_slot": "adjacent"},
        {"use_sink": False},
        {"use_context": False},
    ],
    ids=lambda options: "-".join(map(str, *options.items())),
)
def test_every_cache_option_streams_and_changes_the_frames(
    make: Callable[..., TalkingHead], options: dict[str, Any]
) -> None:
    samples = speech(60)
    plain = frames_of(make(), samples, [], guidance=2.0)
    other = frames_of(make(**options), samples, [777, 20000], guidance=2.0)
    assert other.shape == plain.shape
    assert not np.array_equal(other, plain)
    assert np.array_equal(other, frames_of(make(**options), samples, [], guidance=2.0))


@pytest.mark.parametrize(
    "cuts", [[1], [639, 640, 641], list(range(100, 38000, 997)), [48000 - 640], [15000, 15000]]
)
def test_the_cut_of_the_speech_does_not_matter(head: TalkingHead, cuts: list[int]) -> None:
    samples = speech(60)
    assert np.array_equal(frames_of(head, samples, cuts), frames_of(head, samples, []))


@pytest.mark.parametrize("num_frames", [0, 0.1, 1, 23, 24, 24.5, 26, 49.01, 72])
def test_video_is_as_long_as_the_speech(head: TalkingHead, num_frames: float) -> None:
    samples = speech(num_frames)
    assert len(frames_of(head, samples, [len(samples) // 2])) == int(
        np.ceil(len(samples) / SAMPLES)
    )


@pytest.mark.parametrize("lookahead", [0, 2, 4])
def test_frames_do_not_depend_on_speech_beyond_the_lookahead(
    make: Callable[..., TalkingHead], lookahead: int
) -> None:
    head = make(lookahead_frames=lookahead)
    samples = speech(96)
    changed = samples.copy()
    changed[(48 + lookahead) * SAMPLES :] = 0.0
    before, after = frames_of(head, samples, []), frames_of(head, changed, [])
    assert np.array_equal(before[:48], after[:48])
    assert not np.array_equal(before[48:], after[48:])


def test_first_chunk_needs_chunk_and_lookahead_only(head: TalkingHead) -> None:
    session = head.open(portrait())
    assert len(session.push(speech(26)[:-1])) == 0
    assert len(session.push(np.zeros(1, np.float32))) == 24


def test_snapshot_and_restore_are_bit_identical(head: TalkingHead) -> None:
    session = head.open(portrait(), seed=3)
    session.push(speech(40))
    state = session.snapshot()
    once = np.concatenate([session.push(speech(50, seed=2)), session.flush()])
    session.restore(state)
    assert np.array_equal(np.concatenate([session.push(speech(50, seed=2)), session.flush()]), once)


def test_seed_portrait_and_speech_decide_the_frames(head: TalkingHead) -> None:
    samples = speech(24)
    first = frames_of(head, samples, [], seed=1)
    assert np.array_equal(first, frames_of(head, samples, [], seed=1))
    assert not np.array_equal(first, frames_of(head, samples, [], seed=2))
    assert not np.array_equal(first, frames_of(head, speech(24, seed=9), [], seed=1))
    other = head.open(portrait(5), seed=1)
    assert not np.array_equal(first, np.concatenate([other.push(samples), other.flush()]))


def test_stream_yields_chunk_by_chunk(head: TalkingHead) -> None:
    samples = speech(60)
    with head.open(portrait()) as session:
        counts = [len(frames) for frames in session.stream(np.array_split(samples, 17))]
    assert counts == [24, 24, 12]
    report = session.report()
    assert report.num_frames == 60
    assert {"speech", "dit", "vae"} <= set(report.stage_s)


def test_memory_of_the_state_is_constant(head: TalkingHead) -> None:
    session = head.open(portrait())
    session.push(speech(60))
    addresses = [
        past.data_ptr()
        for past in (*session.engine.decoder.values(), *session.engine.speech.values())
    ]
    addresses += [session.engine.cache.keys.data_ptr(), session.engine.cache.values.data_ptr()]
    session.push(speech(120))
    later = [
        past.data_ptr()
        for past in (*session.engine.decoder.values(), *session.engine.speech.values())
    ]
    later += [session.engine.cache.keys.data_ptr(), session.engine.cache.values.data_ptr()]
    assert later == addresses


def test_identity_can_be_switched_in_mid_stream(head: TalkingHead) -> None:
    session = head.open(portrait())
    session.push(speech(26))
    session.switch_identity(portrait(7))
    assert len(session.push(speech(24))) == 24


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.array([0.0, np.nan], np.float32), "finite samples, got NaN or infinity at 0.00 s"),
        (
            np.zeros((2, 10), np.float32),
            r"one dimension .* got shape \(2, 10\): average the channels",
        ),
        (np.zeros(10, np.int64), "float or int16, got int64"),
        (bytes(20), r"got bytes: np.frombuffer\(samples, np.int16\) reads"),
    ],
)
def test_bad_speech_is_refused(head: TalkingHead, samples: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        head.open(portrait()).push(samples)


def test_int16_and_tensors_are_taken(head: TalkingHead) -> None:
    samples = (speech(26) * 32768).clip(-32768, 32767).astype(np.int16)
    scaled = samples.astype(np.float32) / 32768
    a, b, c = (head.open(portrait()).push(x) for x in (samples, scaled, torch.from_numpy(scaled)))
    assert np.array_equal(a, b)
    assert np.array_equal(a, c)


@pytest.mark.parametrize("rate", [44_100, 48_000])
def test_samples_of_another_rate_are_resampled(head: TalkingHead, rate: int) -> None:
    samples = np.repeat(speech(30), 3)[: rate * 30 // 25]
    resampler = Resampler(rate)
    at_16_khz = np.concatenate([resampler.push(samples), resampler.flush()])
    expected = frames_of(head, at_16_khz, [])
    session = head.open(portrait())
    parts = [session.push(samples[:7001], sample_rate=rate)]
    saved = session.snapshot()
    session.push(samples[:999], sample_rate=rate)
    session.restore(saved)
    parts += [session.push(samples[7001:], sample_rate=rate), session.flush()]
    assert np.array_equal(np.concatenate(parts), expected)


def test_a_session_has_one_sample_rate(head: TalkingHead) -> None:
    session = head.open(portrait())
    session.push(speech(1))
    with pytest.raises(UserError, match="one sample rate in a session, got 8000 Hz after 16000 Hz"):
        session.push(speech(1), sample_rate=8000)
    session = head.open(portrait())
    session.push(speech(1), sample_rate=48_000)
    with pytest.raises(UserError, match="got 16000 Hz after 48000 Hz"):
        session.push(speech(1))


def test_push_after_the_end_is_refused(head: TalkingHead) -> None:
    session: StreamingSession = head.open(portrait())
    session.flush()
    with pytest.raises(ValueError, match="a push after it: open a new session"):
        session.push(speech(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_heads_give_the_same_frames(
    head: TalkingHead, tmp_path: Path, dtype: torch.dtype
) -> None:
    head.save_pretrained(tmp_path / "model", dtype=dtype)
    first = TalkingHead.from_pretrained(tmp_path / "model")
    first.save_pretrained(tmp_path / "again", dtype=dtype)
    again = TalkingHead.from_pretrained(tmp_path / "again")
    samples = speech(30)
    expected = frames_of(head if dtype == torch.float32 else first, samples, [])
    assert np.array_equal(frames_of(again, samples, []), expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "model"]


def test_bfloat16_head_streams_close_to_float32(head: TalkingHead, tmp_path: Path) -> None:
    head.save_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    samples = speech(48)
    full, half = (
        frames_of(TalkingHead.from_pretrained(tmp_path / "model", dtype=dtype), samples, [])
        for dtype in (torch.float32, torch.bfloat16)
    )
    difference = np.abs(full.astype(int) - half.astype(int)).mean()
    assert 0 < difference < 0.1 * full.std()


def test_switching_identity_keeps_the_speech_stream(head: TalkingHead) -> None:
    session = head.open(portrait())
    session.push(speech(26))
    before = session.engine.speech.snapshot()
    session.switch_identity(portrait(7))
    assert all(torch.equal(session.engine.speech[name], past) for name, past in before.items())
    assert session.engine.cache.num_frames == [0] * session.engine.cache.rows


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"chunk_length": 2},
        {"cache_noise": "per_step"},
        {"guidance": 1.0},
        {"dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_a_snapshot_of_another_model_is_refused_and_changes_nothing(
    make: Callable[..., TalkingHead], head: TalkingHead, other: dict[str, Any]
) -> None:
    guidance, dtype = other.get("guidance"), other.get("dtype", torch.float32)
    stranger = make(
        **{name: value for name, value in other.items() if name not in ("guidance", "dtype")}
    )
    for part in (stranger.vae, stranger.speech_ae, stranger.transformer):
        part.to(dtype)
    state = stranger.open(portrait(), guidance=guidance).snapshot()
    session, untouched = head.open(portrait()), head.open(portrait())
    session.push(speech(30))
    untouched.push(speech(30))
    with pytest.raises(
        ValueError,
        match=r"expected a snapshot .* got one of another: restore it in a session that was",
    ):
        session.restore(state)
    assert np.array_equal(session.flush(), untouched.flush())


def test_a_snapshot_brings_the_portrait_back(make: Callable[..., TalkingHead]) -> None:
    for options in (
        {},
        {"reference_attends": "first_chunk"},
    ):  # the latter reads it again at the first chunk
        head = make(**options)
        session = head.open(portrait())
        expected = session.snapshot()
        frames = session.push(speech(26))
        session.switch_identity(portrait(7))
        session.restore(expected)
        assert np.array_equal(session.push(speech(26)), frames)
        assert torch.equal(session.reference[0], portrait())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(head: TalkingHead, tmp_path: Path) -> None:
    head.save_pretrained(tmp_path / "model")
    with pytest.raises(
        ValueError,
        match=r"expected an available device, got cuda, but torch finds no CUDA .* use cpu",
    ):
        TalkingHead.from_pretrained(tmp_path / "model", device="cuda")


def test_missing_model_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"model folder with model_index.json, got .*: make one with `rest export`"
    ):
        TalkingHead.from_pretrained(tmp_path)


@pytest.mark.parametrize("threaded", [True, False], ids=["thread", "inline"])
@pytest.mark.parametrize("block_samples", [1, 640, 999, 16_000, 100_000])
def test_written_sound_goes_with_its_frames(
    head: TalkingHead, block_samples: int, threaded: bool
) -> None:
    speech = np.random.default_rng(1).uniform(-0.5, 0.5, 60 * 640 + 5).astype(np.float32)
    blocks = (speech[i : i + block_samples] for i in range(0, len(speech), block_samples))
    taken: list[tuple[int, np.ndarray]] = []

    class Collect(RawPipe):
        def write_audio(self, samples: np.ndarray) -> None:
            taken.append((self.num_frames, samples))

    if block_samples == 1:  # 38,405 blocks of one sample would test patience
        blocks = (part for part in np.split(speech, range(1, 700)))
    with head.open(np.zeros((64, 64, 3), np.uint8)) as session:
        with BackgroundWriter(Collect(io.BytesIO(), 64), threaded=threaded) as background:
            counts = list(write_stream(session, blocks, background))
        assert session.clock.stage_s["writing"] > 0
    assert counts == [24, 24, 13]
    assert [frames for frames, _ in taken] == [24, 48, 61]
    assert [len(samples) for _, samples in taken] == [15_360, 15_360, 12 * 640 + 5]
    assert np.array_equal(np.concatenate([samples for _, samples in taken]), speech)


@pytest.mark.parametrize("chunk_length", [1, 2, 3])
def test_a_stream_chooses_among_the_trained_chunk_lengths(
    make: Callable[..., TalkingHead], chunk_length: int
) -> None:
    several, one = make(trained_lengths=(1, 2, 3)), make(chunk_length=chunk_length)
    chosen = frames_of(several, speech(48), [], chunk_length=chunk_length)
    np.testing.assert_array_equal(chosen, frames_of(one, speech(48), []))
    assert several.transformer.cache_options.chunk_length == 3


def test_untrained_chunk_lengths_are_refused(make: Callable[..., TalkingHead]) -> None:
    with pytest.raises(
        UserError, match=r"expected a chunk length that the model was trained with .3 latents"
    ):
        make().open(portrait(), chunk_length=1)
    with pytest.raises(
        UserError, match=r"expected chunk_length among trained_lengths .1, 2., got 3"
    ):
        make(trained_lengths=(1, 2))
