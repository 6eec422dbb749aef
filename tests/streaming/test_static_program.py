"""A chunk as one static program: repeated operations give the called function's frames; nothing
moves or grows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tape import Tape, tensors_alive_bytes
from tiny_ltx import make_vae

from rest_lightning.models.blocks import run_block
from rest_lightning.models.ltx_vae import LTXVideoVAE
from rest_lightning.streaming.engine import GRAPHS_VARIABLE, ChunkEngine, EngineOptions
from rest_lightning.streaming.packed import can_pack
from rest_lightning.streaming.session import StreamingSession
from rest_lightning.talking_head import TalkingHead

NUM_CHUNKS = 5


def portrait(seed: int = 0) -> torch.Tensor:
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def speech(num_frames: float, seed: int = 1) -> np.ndarray:
    return (
        np.random.default_rng(seed).normal(scale=0.2, size=int(num_frames * 640)).astype(np.float32)
    )


def engine_of(
    head: TalkingHead, guidance: float = 2.0, batch: int = 1, **arguments: Any
) -> ChunkEngine:
    return ChunkEngine(head, batch, replace(head.sampling, guidance=guidance), **arguments)


def run(
    engine: ChunkEngine, num_chunks: int = NUM_CHUNKS, switch_at: int | None = None
) -> list[torch.Tensor]:
    """Frames of some chunks, the first as long as the options say."""
    generator = torch.Generator().manual_seed(5)
    engine.start(portrait().expand(engine.batch, -1, -1, -1))
    frames = []
    for chunk in range(num_chunks):
        if chunk == switch_at:
            engine.switch_identity(portrait(3).expand(engine.batch, -1, -1, -1))
        length = engine.chunk_length if chunk else engine.first_length
        audio = 0.2 * torch.randn(engine.batch, engine.samples_of(length), generator=generator)
        noise = torch.randn(
            *engine.latent_shape[:2], length, *engine.latent_shape[3:], generator=generator
        )
        frames.append(engine.step(audio, noise))
    return frames


@pytest.mark.parametrize(
    ("options", "guidance", "batch", "first"),
    [
        ({}, 1.0, 2, None),
        ({}, 2.0, 1, 1),
        ({"chunk_length": 1}, 2.0, 1, None),
        ({"reference_attends": "first_chunk"}, 2.0, 1, 1),
        ({"cache_noise": "clean_pass"}, 1.0, 1, None),
        ({"cache_noise": "per_step", "reference_attends": "first_chunk"}, 2.0, 2, None),
        ({"positions": "absolute", "reference_attends": "first_chunk"}, 1.0, 1, 2),
        ({"first_chunk_slot": "adjacent", "use_sink": False}, 1.0, 1, None),
        ({"use_context": False}, 2.0, 1, 1),
    ],
    ids=str,
)
def test_replayed_operations_give_the_frames_of_the_called_program(
    make: Callable[..., TalkingHead],
    options: dict[str, Any],
    guidance: float,
    batch: int,
    first: int | None,
) -> None:
    head, tape = make(**options), Tape()
    switches = EngineOptions(first_chunk_length=first)
    called = run(engine_of(head, guidance, batch, options=switches), switch_at=3)
    engine = engine_of(head, guidance, batch, options=switches, capture=tape)
    replayed = run(engine, switch_at=3)
    assert all(torch.equal(a, b) for a, b in zip(called, replayed, strict=True))
    assert len({frames.float().mean() for frames in called}) == NUM_CHUNKS
    assert tape.num_replays == 2 * NUM_CHUNKS and tape.num_captured == engine.num_captured <= 6
    # restarted
    assert all(torch.equal(a, b) for a, b in zip(called, run(engine, switch_at=3), strict=True))


@pytest.mark.parametrize(
    ("version", "causal", "halo", "captured"),
    [
        ("0.9.0", True, 1, True),
        ("0.9.0", False, 1, True),
        ("0.9.0", False, 4, True),
        ("0.9.5", False, 1, False),
    ],
)
def test_ltx_decoders_are_captured_where_they_may_be(
    make: Callable[..., TalkingHead], version: str, causal: bool, halo: int, captured: bool
) -> None:
    head, tape = make(), Tape()
    vae: LTXVideoVAE = make_vae(version, causal=causal, halo=halo, decode_noise_scale=0.3)
    head = TalkingHead(
        vae, head.speech_encoder, head.speech_ae, head.transformer, head.sampling, size_px=64
    )
    called = engine_of(head)
    engine = engine_of(head, capture=tape)
    assert all(torch.equal(a, b) for a, b in zip(run(called), run(engine), strict=True))
    assert (engine._decoding.num_captured > 0) == captured
    assert torch.equal(engine.decoder["num_latents"], called.decoder["num_latents"])


@pytest.mark.parametrize("options", [{}, {"reference_attends": "first_chunk"}], ids=str)
def test_addresses_never_change_and_nothing_grows(
    make: Callable[..., TalkingHead], options: dict[str, Any]
) -> None:
    engine = engine_of(make(**options))
    run(engine, 5)  # as long as any below: tables of positions are made and kept
    run(engine, 3)
    state, addresses, alive = engine.snapshot(), engine.addresses, []
    for chunk in range(3):
        run(engine, 2 + chunk, switch_at=1)
        engine.restore(state)
        engine.warm_up()
        assert engine.addresses == addresses
        alive.append(tensors_alive_bytes())
    assert len(set(alive[1:])) == 1


def test_warming_up_leaves_no_trace(make: Callable[..., TalkingHead]) -> None:
    for options in ({}, {"reference_attends": "first_chunk"}):
        head = make(**options)
        sessions = [
            StreamingSession(head, portrait()[0], options=EngineOptions(warm_up=warm_up))
            for warm_up in (False, True)
        ]
        states = [session.snapshot().row.engine for session in sessions]
        for name in ("keys", "values"):
            # previous chunk and reference; what follows is written before it is read
            past = slice(0, 16)
            assert torch.equal(*(state.cache[name][..., past, :] for state in states))
        assert states[0].cache["num_frames"] == states[1].cache["num_frames"]
        for stream in ("decoder", "speech"):
            first, second = (getattr(state, stream) for state in states)
            assert first.keys() == second.keys() and all(
                torch.equal(first[name], second[name]) for name in first
            )
        videos = [
            np.concatenate([session.push(speech(50)), session.flush()]) for session in sessions
        ]
        assert np.array_equal(*videos)
        assert sessions[1].report().chunk_ms["count"] == 3  # the dummy is not counted


@pytest.mark.parametrize(("chunk_length", "first"), [(3, 1), (3, 2), (2, 1), (3, 3)])
def test_a_short_first_chunk_needs_less_speech(
    make: Callable[..., TalkingHead], chunk_length: int, first: int
) -> None:
    head = make(chunk_length=chunk_length)
    session = head.open(portrait()[0], options=EngineOptions(first_chunk_length=first))
    samples = speech(70)
    needed = (8 * first + 2) * 640
    assert len(session.push(samples[: needed - 1])) == 0
    frames = [session.push(samples[needed - 1 : needed])]
    assert len(frames[0]) == 8 * first
    rest = chunk_length * 8 * 640
    frames += [
        session.push(samples[needed : needed + rest]),
        session.push(samples[needed + rest :]),
        session.flush(),
    ]
    assert [len(part) for part in frames][:2] == [8 * first, 8 * chunk_length]
    assert sum(map(len, frames)) == 70
    once = head.open(portrait()[0], options=EngineOptions(first_chunk_length=first))
    assert np.array_equal(
        np.concatenate([once.push(samples), once.flush()]), np.concatenate(frames)
    )
    whole = head.open(portrait()[0])
    expected = np.concatenate([whole.push(samples), whole.flush()])
    assert np.array_equal(np.concatenate(frames), expected) == (first == chunk_length)


def test_compiled_blocks_share_weights_and_give_the_same_latents(
    make: Callable[..., TalkingHead],
) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    head = make()
    eager = engine_of(head)
    compiled = engine_of(head, options=EngineOptions(compile=True))
    # traces and functionalises like inductor, without its compiler
    counter = CompileCounterWithBackend("aot_eager")
    assert compiled._transformer._run_block is not run_block
    assert eager._transformer._run_block is head.transformer._run_block is run_block
    compiled._transformer._run_block = torch.compile(run_block, backend=counter)
    generator = torch.Generator().manual_seed(0)
    for engine in (eager, compiled):
        engine.start(portrait())
    for _ in range(3):
        noise = torch.randn(eager.latent_shape, generator=generator)
        words = torch.randn(1, 3, 2, 8, generator=generator)
        with torch.inference_mode():
            torch.testing.assert_close(
                compiled.denoise(noise, words), eager.denoise(noise, words), atol=1e-5, rtol=1e-5
            )
    # Before and behind the attention; again when the number of the block turns out to vary, and not
    # for every block.
    assert 0 < counter.frame_count <= 6, counter.frame_count


def test_switches(make: Callable[..., TalkingHead], monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert EngineOptions().captures(cuda) and EngineOptions().warms_up(cuda)
    assert not EngineOptions(graphs=False).captures(cuda)
    assert not EngineOptions().captures(cpu) and not EngineOptions().warms_up(cpu)
    monkeypatch.setenv(GRAPHS_VARIABLE, "0")
    assert not EngineOptions(graphs=True).captures(cuda) and not EngineOptions().warms_up(cuda)
    monkeypatch.setenv(GRAPHS_VARIABLE, "off")
    with pytest.raises(
        ValueError, match=("expected REST_CUDA_GRAPHS=0 or 1, got 'off': 0 turns CUDA graphs off")
    ):
        make().open(portrait()[0])
    monkeypatch.delenv(GRAPHS_VARIABLE)
    with pytest.raises(
        ValueError,
        match=("expected a model on a CUDA device for graphs, got cpu: leave graphs at None"),
    ):
        make().open(portrait()[0], options=EngineOptions(graphs=True))
    for length in (0, 4):
        with pytest.raises(
            ValueError, match=(f"expected a first_chunk_length from 1 to 3 latents, got {length}")
        ):
            make().open(portrait()[0], options=EngineOptions(first_chunk_length=length))


def test_packed_weights_give_the_same_frames(make: Callable[..., TalkingHead]) -> None:
    head = make()
    if not can_pack(torch.device("cpu"), torch.float32):
        pytest.skip("torch without oneDNN")
    speech = np.random.default_rng(0).uniform(-0.5, 0.5, 60 * 640).astype(np.float32)
    videos = []
    for pack in (False, None, True):
        session = head.open(portrait()[0], options=EngineOptions(pack=pack))
        assert session.report().configuration["packed"] == (pack is not False)
        videos.append(np.concatenate([session.push(speech), session.flush()]).astype(int))
    assert np.array_equal(videos[1], videos[2]) and videos[0].std() > 1
    assert np.abs(videos[0] - videos[1]).max() <= 1  # a value at the edge of two grey levels
    for options in (
        EngineOptions(pack=True, compile=True),
        EngineOptions(pack=True, compile=True, graphs=False),
    ):
        with pytest.raises(
            ValueError, match=("expected an uncompiled float32 or bfloat16 model on a CPU")
        ):
            head.open(portrait()[0], options=options)
