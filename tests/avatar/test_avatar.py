"""An avatar with a real model, several on one model, mistakes, and a model that fails."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_head import make_head

from rest_lightning.avatar import Avatar, AvatarFrame, AvatarPool, AvatarSettings, ModelError
from rest_lightning.avatar.conformance import AvatarSubject as Subject
from rest_lightning.avatar.conformance import portrait, say, speech
from rest_lightning.avatar.simulation import TracedModel, read_trace, simulate
from rest_lightning.errors import UserError
from rest_lightning.talking_head import TalkingHead


@pytest.fixture(scope="module")
def head() -> TalkingHead:
    return make_head()


def face(seed: int = 0) -> torch.Tensor:
    return torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


async def frames_of(avatar: Avatar, seconds: float) -> list[AvatarFrame]:
    frames = []
    async for frame in avatar.run():
        frames.append(frame)
        if len(frames) >= seconds * 25:
            break
    return frames


def pictures(frames: list[AvatarFrame]) -> np.ndarray:
    return np.stack([frame.picture for frame in frames if not frame.is_held])


# -- a real model ---------------------------------------------------------------------------------


def test_pictures_are_those_of_a_session_that_hears_the_same(head: TalkingHead) -> None:
    """Speech that waits from the start; later it is computed in the place of silence that was not
    shown, or, of a live source, behind it.
    """

    async def talk(delay_s: float, is_live: bool) -> list[AvatarFrame]:
        async with Avatar(face(), head, AvatarSettings(is_live=is_live)) as avatar:
            if delay_s:
                reading = asyncio.create_task(frames_of(avatar, 5.0))
                await asyncio.sleep(delay_s)
            await avatar.push_audio(samples, 16_000)
            await avatar.flush()
            return await reading if delay_s else await frames_of(avatar, 5.0)

    samples = speech(1.5, 16_000)
    for delay_s, is_live in ((0.0, False), (1.37, False), (1.37, True)):
        frames = simulate(talk(delay_s, is_live))
        heard = np.concatenate(
            [frame.samples if frame.is_speech else np.zeros(640, np.int16) for frame in frames]
        )
        begins = next(frame.index for frame in frames if frame.begins)
        np.testing.assert_array_equal(heard[640 * begins :][: len(samples)], samples)
        session = head.open(face())
        alone = session.push(np.concatenate([heard, np.zeros(16_000, np.int16)]))
        difference = np.abs(pictures(frames).astype(int) - alone[: len(frames)].astype(int))
        # Silence was computed without knowing of the speech behind it: only those 80 ms may differ.
        ahead = slice(begins - 24, begins)
        assert (
            np.delete(difference, np.r_[ahead], axis=0)[: begins - 24 if delay_s else None].max(
                initial=0
            )
            <= 1
        )
        if is_live or not delay_s:
            assert difference.max() <= 1


def test_an_interruption_is_the_same_speech_with_silence_behind_it(head: TalkingHead) -> None:
    async def talk() -> tuple[list[AvatarFrame], int]:
        async with Avatar(face(), head) as avatar:
            await avatar.push_audio(speech(4.0, 16_000), 16_000)
            await avatar.flush()
            frames = []
            async for frame in avatar.run():
                frames.append(frame)
                if frame.index == 40:
                    avatar.interrupt()
                if frame.index == 100:
                    break
            return frames, avatar.stats.num_interruptions

    frames, num_interruptions = simulate(talk())
    assert num_interruptions == 1
    assert all(frame.is_speech for frame in frames[:41]) and not any(
        frame.is_speech for frame in frames[41:]
    )
    heard = np.concatenate(
        [frame.samples if frame.is_speech else np.zeros(640, np.int16) for frame in frames]
    )
    session = head.open(face())
    alone = session.push(np.concatenate([heard, np.zeros(16_000, np.int16)]))
    shown = pictures(frames)
    # The chunk of the interruption (frames 24 to 47) was computed twice: what was shown of it knew
    # of more speech.
    for part in (slice(0, 22), slice(48, len(shown))):
        difference = np.abs(shown[part].astype(int) - alone[: len(shown)][part].astype(int))
        assert difference.max() <= 1


def test_identity_changes_while_it_speaks_and_stays_when_interrupted() -> None:
    async def talk() -> list[int]:
        async with Avatar(portrait(), TracedModel()) as avatar:  # type: ignore[arg-type]
            await avatar.push_audio(speech(9.0), 24_000)
            shown = []
            async for frame in avatar.run():
                shown.append(read_trace(frame.picture).portrait)
                if frame.index == 30:
                    await avatar.switch_identity(portrait(is_bright=True))
                if frame.index == 45:
                    avatar.interrupt()
                if frame.index == 120:
                    return shown
        raise AssertionError("run() has ended")

    shown = simulate(talk())
    assert shown == sorted(shown)  # once, and for good
    assert 31 < shown.index(1) < 80


# -- a live source --------------------------------------------------------------------------------


def test_pieces_of_a_live_source_come_as_soon_as_they_are_computed() -> None:
    async def talk() -> None:
        settings = AvatarSettings(is_live=True)
        async with Avatar(portrait(), TracedModel(), settings) as avatar:  # type: ignore[arg-type]
            loop = asyncio.get_running_loop()
            counts: list[int] = []
            times_s: list[float] = []
            async for frame in avatar.run():
                assert frame.index == sum(counts) and not frame.is_held
                times_s.append(loop.time())
                counts.append(1 + len(avatar.take_early()))
                if len(counts) == 4:
                    avatar.interrupt()
                if len(counts) == 8:
                    break
            # Idle ones as late as they can be; after an interruption at once.
            gaps_s = np.diff(times_s)
            assert np.allclose(np.delete(gaps_s, 3), 0.96, atol=0.13) and gaps_s[3] < 0.2
            assert counts == [24] * 8

    simulate(talk())


async def hear_a_microphone(
    is_live: bool, delay_s: float = 0.5
) -> tuple[list[tuple[int, float]], Avatar, np.ndarray]:
    """Speech of 1.2 s with pauses of 0.5 s, for 12 s, in real time; after 5 s the pictures are
    delayed. Returns, for every piece that is heard, where it lies in the speech and how long after
    it was said it is due; the avatar; what is heard.
    """
    settings = AvatarSettings(sample_rate=16_000, is_live=is_live)
    loop = asyncio.get_running_loop()
    samples = np.where(np.arange(12 * 16_000) % 27_200 < 19_200, 8000, 20).astype(np.int16)
    async with Avatar(portrait(), TracedModel(), settings) as avatar:  # type: ignore[arg-type]
        start_s, pieces, heard = loop.time() + 0.5, [], []

        async def listen() -> None:
            async for frame in avatar.run():
                if frame.is_speech:
                    heard.append(frame.samples)
                    due_s = loop.time() + avatar.ahead_s - 0.04
                    pieces.append((frame.offset, due_s - start_s - frame.offset / 16_000))
                if frame.ends:
                    return

        listening = asyncio.create_task(listen())
        for end in range(320, len(samples) + 1, 320):
            await asyncio.sleep(start_s + end / 16_000 - loop.time())
            await avatar.push_audio(samples[end - 320 : end], 16_000)
            if end == 5 * 16_000:
                avatar.delay(delay_s)
        await avatar.flush()
        await listening
        return pieces, avatar, np.concatenate(heard)


@pytest.mark.parametrize("is_live", [True, False])
def test_pauses_of_a_live_source_are_left_out_where_it_is_late(is_live: bool) -> None:
    pieces, avatar, heard = simulate(hear_a_microphone(is_live))
    offsets = [offset for offset, _ in pieces]
    assert offsets == sorted(offsets)
    begun, last = pieces[0][1], pieces[-1][1]
    assert max(latency for _, latency in pieces) == pytest.approx(begun + 0.5, abs=0.09)
    assert avatar.stats.num_starved == 0
    assert last == pytest.approx(begun if is_live else begun + 0.5, abs=0.13)
    assert avatar.stats.left_out_s == pytest.approx(0.5 if is_live else 0.0, abs=0.13)
    assert np.count_nonzero(heard == 8000) == 12 * 16_000 - np.count_nonzero(heard == 20) - round(
        16_000 * avatar.stats.left_out_s
    ), "what was said is heard, however late"
    assert not avatar.stats.overrun_s


@pytest.mark.parametrize("is_live", [True, False])
def test_of_a_live_source_that_runs_ahead_the_oldest_speech_is_dropped(is_live: bool) -> None:
    async def talk() -> None:
        settings = AvatarSettings(is_live=is_live)
        async with Avatar(portrait(), TracedModel(), settings) as avatar:  # type: ignore[arg-type]
            reading = asyncio.create_task(frames_of(avatar, 14.0))
            await asyncio.sleep(1.0)
            samples = speech(10.0)
            await avatar.push_audio(samples, 24_000)
            await avatar.flush()
            frames = [frame for frame in await reading if frame.is_speech]
            heard = np.concatenate([frame.samples for frame in frames])
            np.testing.assert_array_equal(heard[-24_000:], samples[-24_000:])
            assert len(heard) == len(samples) - round(24_000 * avatar.stats.overrun_s)
            assert frames[0].begins and frames[-1].ends
            assert (avatar.stats.overrun_s > 4.0) is is_live

    simulate(talk())


# -- several --------------------------------------------------------------------------------------


def test_three_avatars_show_what_each_would_alone(head: TalkingHead) -> None:
    """One says all of it, one is interrupted, one ends early."""
    spoken = [speech(1.3, 16_000, number) for number in range(3)]
    last = (36, 36, 12)

    async def read(avatar: Avatar, number: int) -> list[AvatarFrame]:
        frames = []
        async for frame in avatar.run():
            frames.append(frame)
            if number == 1 and frame.index == 10:
                avatar.interrupt()
            if frame.index == last[number]:
                break
        if number == 2:
            await avatar.aclose()
        return frames

    async def talk() -> list[list[AvatarFrame]]:
        async with AvatarPool(head, 3) as pool:
            avatars = [Avatar(face(number), pool) for number in range(3)]
            for avatar, samples in zip(avatars, spoken, strict=True):
                await avatar.push_audio(samples, 16_000)
                await avatar.flush()
            return await asyncio.gather(*map(read, avatars, range(3)))

    for number, frames in enumerate(simulate(talk())):
        heard = spoken[number]
        if number == 1:
            said = [frame.samples for frame in frames if frame.is_speech]
            heard = np.concatenate(said)
        heard = np.pad(heard, (0, 48 * 640 + 1280 - len(heard)))  # two chunks, what they read ahead
        alone = head.open(face(number)).push(heard)
        shown = pictures(frames)
        # The chunk that was interrupted knew, in what was shown of it, of more speech.
        start = 24 if number == 1 else 0
        difference = shown[start:].astype(int) - alone[start : len(shown)].astype(int)
        assert len(shown) >= last[number] and np.abs(difference).max() <= 1


def test_three_avatars_share_a_model() -> None:
    async def talk() -> tuple[list[list[AvatarFrame]], list[int]]:
        model = TracedModel(compute_s=0.2)
        async with AvatarPool(model, 3) as pool:  # type: ignore[arg-type]
            avatars = [Avatar(portrait(number == 1), pool) for number in range(3)]
            reading = [asyncio.create_task(frames_of(avatar, 8.0)) for avatar in avatars]
            await asyncio.sleep(1.0)
            await asyncio.gather(
                *(say(Subject(one), speech(3.0, number=n)) for n, one in enumerate(avatars))
            )
            frames = await asyncio.gather(*reading)
            with pytest.raises(
                UserError, match="expected a place for one more avatar, got 3 of 3 taken: close one"
            ):
                await Avatar(portrait(), pool).start()
            await avatars[0].aclose()
            assert pool.num_free == 1
            async with Avatar(portrait(), pool) as late:
                assert pool.num_free == 0
                assert len(await frames_of(late, 1.0)) == 25
            return frames, model.num_rows

    frames, num_rows = simulate(talk())
    for number, each in enumerate(frames):
        heard = np.concatenate([frame.samples for frame in each if frame.is_speech])
        np.testing.assert_array_equal(heard[: 3 * 24_000], speech(3.0, number=number))
        assert {read_trace(frame.picture).portrait for frame in each} == {int(number == 1)}
        assert sum(frame.is_held for frame in each) == 0
    assert max(num_rows[6:]) == 3  # warm-up takes the first nine steps


def test_a_model_that_fails_ends_one_avatar_alone() -> None:
    async def talk() -> None:
        async with AvatarPool(TracedModel(broken_level=0.95), 2) as pool:  # type: ignore[arg-type]
            good, bad = Avatar(portrait(), pool), Avatar(portrait(), pool)
            reading = [asyncio.create_task(frames_of(one, 4.0)) for one in (good, bad)]
            await asyncio.sleep(1.0)
            await say(Subject(good), speech(1.5))
            await bad.push_audio(np.full(24_000, 32_700, np.int16), 24_000)
            await bad.flush()
            frames, error = await asyncio.gather(*reading, return_exceptions=True)
            assert isinstance(frames, list) and len(frames) == 100
            heard = np.concatenate([frame.samples for frame in frames if frame.is_speech])
            np.testing.assert_array_equal(heard[:36_000], speech(1.5))
            text = r"failed for this avatar \(RuntimeError: the speech was too loud\): open a"
            assert isinstance(error, ModelError)
            with pytest.raises(ModelError, match=text):
                raise error
            with pytest.raises(ModelError, match=text):
                await bad.push_audio(np.zeros(10, np.int16), 24_000)
            await bad.aclose()
            assert pool.num_free == 1

    simulate(talk())


# -- mistakes -------------------------------------------------------------------------------------


def test_mistakes_are_one_line_and_change_nothing(tmp_path: Path) -> None:
    async def talk() -> None:
        avatar = Avatar(portrait(), TracedModel())  # type: ignore[arg-type]
        reading = asyncio.create_task(frames_of(avatar, 3.0))
        await asyncio.sleep(0.5)
        push: Any = avatar.push_audio
        for samples, rate, text in (
            (
                np.array([0.1, np.nan], np.float32),
                24_000,
                "expected finite samples of speech, got NaN or infinity",
            ),
            (
                np.zeros((2, 2, 2), np.int16),
                24_000,
                r"got shape \(2, 2, 2\): transpose it, or average the channels",
            ),
            (
                np.zeros((2, 480), np.int16),
                24_000,
                r"expected speech as \(samples,\) or \(samples, channels\)",
            ),
            (
                np.zeros(10, np.int32),
                24_000,
                "expected speech as int16 or float, got int32: convert it to float32",
            ),
            (bytes(20), 24_000, r"got bytes: np.frombuffer\(samples, np.int16\) reads"),
            (
                np.full(10, -8_000.0, np.float32),
                24_000,
                r"expected samples in \[-1, 1\], got one of 8000: divide by the largest integer",
            ),
            (np.zeros(10, np.int16), 100, "expected a sample rate from 4000 to 192000 Hz, got 100"),
            (
                np.zeros(10, np.int16),
                24_000.0,
                "expected a sample rate in Hz as an integer, got 24000.0",
            ),
        ):
            with pytest.raises(UserError, match=text):
                await push(samples, rate)
        await push(speech(0.5), 24_000)
        with pytest.raises(
            UserError,
            match=r"got 16000 Hz, 1 channel, int16: call flush\(\) before speech of another",
        ):
            await push(speech(0.5, 16_000), 16_000)
        with pytest.raises(UserError, match=r"expected one run\(\) of an avatar, got a second one"):
            await anext(avatar.run())
        await avatar.flush()
        frames = await reading
        heard = np.concatenate([frame.samples for frame in frames if frame.is_speech])
        np.testing.assert_array_equal(heard[:12_000], speech(0.5))
        await avatar.aclose()
        await avatar.aclose()
        for call in (lambda: push(speech(0.5), 24_000), avatar.flush, lambda: anext(avatar.run())):
            with pytest.raises(
                UserError, match="expected an open avatar, got a closed one: open a new one"
            ):
                await call()
        with pytest.raises(
            UserError, match="expected an open avatar, got a closed one: open a new one"
        ):
            avatar.interrupt()

    simulate(talk())


def test_bad_portraits_settings_and_chunks(tmp_path: Path) -> None:
    async def start(given: Any) -> None:
        await Avatar(given, TracedModel()).start()  # type: ignore[arg-type]

    (tmp_path / "text.png").write_text("no image")
    for given, text in (
        (tmp_path / "none.png", "none.png does not exist: check the name"),
        (tmp_path / "text.png", "is not one that can be read: export it as PNG or JPEG"),
    ):
        with pytest.raises(UserError, match=text):
            simulate(start(given))
    for values, text in (
        ({"cushion_ms": -1.0}, "expected cushion_ms of at least 0, got -1.0"),
        ({"max_waiting_s": 0.1}, "expected max_waiting_s of at least 2, got 0.1"),
        ({"sample_rate": 12}, "expected a sample rate from 4000 to 192000 Hz, got 12"),
    ):
        with pytest.raises(UserError, match=text):
            AvatarSettings(**values)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="expected a pool of at least 1 avatar, got 0"):
        AvatarPool(TracedModel(), 0)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"load it with TalkingHead.from_pretrained\('people'\)"):
        AvatarPool("people")  # type: ignore[arg-type]


@pytest.mark.parametrize("rate", [16_000, 24_000])
def test_the_loudest_speech_that_is_let_in_can_be_shown(head: TalkingHead, rate: int) -> None:
    async def talk() -> list[AvatarFrame]:
        async with Avatar(face(), head) as avatar:
            square = np.sign(np.sin(np.arange(rate) / 5)).astype(np.float32)
            await avatar.push_audio(16 * square, rate)
            await avatar.flush()
            return await frames_of(avatar, 3.0)

    assert any(frame.is_speech for frame in simulate(talk()))


def test_a_closed_pool_ends_its_avatars() -> None:
    async def talk() -> None:
        pool = AvatarPool(TracedModel())  # type: ignore[arg-type]
        avatar = Avatar(portrait(), pool)
        reading = asyncio.create_task(frames_of(avatar, 60.0))
        await asyncio.sleep(1.0)
        await pool.aclose()
        with pytest.raises(ModelError, match="the pool of this avatar has been closed"):
            await reading
        await avatar.aclose()
        with pytest.raises(
            UserError, match="expected an open pool of avatars, got a closed one: make a new one"
        ):
            await Avatar(portrait(), pool).start()

    simulate(talk())


def test_speech_that_waits_is_bounded_and_an_interruption_frees_who_waits() -> None:
    async def talk() -> None:
        settings = AvatarSettings(max_waiting_s=5.0)
        async with Avatar(portrait(), TracedModel(), settings) as avatar:  # type: ignore[arg-type]
            reading = asyncio.create_task(frames_of(avatar, 3.0))
            pushing = asyncio.create_task(avatar.push_audio(speech(60.0), 24_000))
            await asyncio.sleep(1.0)
            assert not pushing.done() and avatar.waiting_s < 6.1
            avatar.interrupt()
            await asyncio.wait_for(pushing, 0.1)
            assert avatar.waiting_s == 0.0 and not avatar.is_speaking
            frames = await reading
            assert not any(frame.is_speech for frame in frames[-25:])

    simulate(talk())


def test_silence_that_comes_for_long_is_neither_torn_nor_gathered() -> None:
    """A microphone that nobody speaks into: an utterance without an end, in real time."""

    async def talk() -> None:
        async with Avatar(portrait(), TracedModel()) as avatar:  # type: ignore[arg-type]
            reading = asyncio.create_task(frames_of(avatar, 620.0))
            due_s = asyncio.get_running_loop().time()
            for block in range(6000):
                await avatar.push_audio(np.zeros(2400, np.int16), 24_000)
                due_s += 0.1
                await asyncio.sleep(due_s - asyncio.get_running_loop().time())
                if block > 30:
                    assert avatar.waiting_s < 1.5
            await avatar.flush()
            frames = await reading
            assert avatar.stats.num_starved == 0 and avatar.stats.num_held == 0
            assert sum(len(frame.samples) for frame in frames if frame.is_speech) == 6000 * 2400

    simulate(talk())


def test_another_reader_goes_on_where_the_first_stopped() -> None:
    async def talk() -> None:
        async with Avatar(portrait(), TracedModel()) as avatar:  # type: ignore[arg-type]
            await avatar.push_audio(speech(4.0), 24_000)
            await avatar.flush()
            first = await frames_of(avatar, 2.0)
            await asyncio.sleep(30.0)
            second = await frames_of(avatar, 4.0)
            heard = np.concatenate(
                [frame.samples for frame in (*first, *second) if frame.is_speech]
            )
            np.testing.assert_array_equal(heard[: 4 * 24_000], speech(4.0))
            traces = [read_trace(frame.picture).frame for frame in (*first, *second)]
            assert traces == list(range(len(traces)))

    simulate(talk())


def test_the_real_clock_keeps_the_pace() -> None:
    async def talk() -> float:
        loop = asyncio.get_running_loop()
        async with Avatar(portrait(), TracedModel(compute_s=0.05)) as avatar:  # type: ignore[arg-type]
            async for frame in avatar.run():
                if frame.index == 0:
                    begin_s = loop.time()
                if frame.index == 50:
                    return loop.time() - begin_s
        raise AssertionError("run() has ended")

    assert 1.9 < asyncio.run(talk()) < 3.0
