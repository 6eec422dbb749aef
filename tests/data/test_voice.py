"""Speech synthesis and the sentences that it speaks."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest

from rest_lightning.constants import SAMPLE_RATE
from rest_lightning.data.synthetic.script import sample_script
from rest_lightning.data.synthetic.text import (
    sample_language,
    sample_sentence,
    vocabulary,
)
from rest_lightning.data.synthetic.voice import VARIANTS, speak
from rest_lightning.errors import UserError

pytest.importorskip("espeakng_loader")

TEXT = "Bob and Mary put a map on the table."


@pytest.mark.parametrize("words_per_minute", [120, 165, 210])
@pytest.mark.parametrize("voice", ["en-us+m3", "en+f2", "de", "pt-br+m1"])
def test_phonemes_lie_in_order_inside_the_audio(voice: str, words_per_minute: int) -> None:
    spoken = speak(TEXT, voice, words_per_minute)
    assert spoken.audio.dtype == np.float32
    assert np.abs(spoken.audio).max() <= 1.0
    assert len(spoken.phonemes) > 15
    last_s = 0.0
    for phoneme in spoken.phonemes:
        assert last_s <= phoneme.start_s < phoneme.end_s <= spoken.duration_s + 1e-3
        last_s = phoneme.end_s - 1e-9


@pytest.mark.parametrize("voice", ["en-us+m3", "en-us+f2"])
def test_vowels_are_loud_where_the_marks_say_and_pauses_silent(voice: str) -> None:
    spoken = speak("My mama saw a pea. Papa saw a bee.", voice, 130)
    vowels, pauses = [], []
    for ipa, start_s, end_s in spoken.phonemes:
        part = spoken.audio[round(start_s * SAMPLE_RATE) : round(end_s * SAMPLE_RATE)]
        level = float(np.sqrt(np.mean(part**2)))
        if ipa.startswith("ˈ"):
            vowels.append(level)
        elif not ipa and end_s - start_s > 0.1:
            pauses.append(level)
    assert len(vowels) >= 5
    assert len(pauses) >= 1
    assert min(vowels) > 0.03
    assert max(pauses) < 3e-3


def test_speech_does_not_depend_on_what_was_spoken_before() -> None:
    first = speak(TEXT, "en-us+m3")
    for voice in ("en+f4", "fr", "en-us+m1"):
        speak("Something else in between!", voice)
    again = speak(TEXT, "en-us+m3")
    np.testing.assert_array_equal(first.audio, again.audio)
    assert first.phonemes == again.phonemes


def test_rate_and_pitch_change_the_speech() -> None:
    slow, fast = speak(TEXT, words_per_minute=120), speak(TEXT, words_per_minute=210)
    assert 1.3 < slow.duration_s / fast.duration_s < 2.2
    assert not np.array_equal(speak(TEXT, pitch=20).audio, speak(TEXT, pitch=80).audio)


def test_every_variant_and_language_speaks() -> None:
    languages = {"en-us", "en", *vocabulary().foreign}
    for voice in [
        *(f"en-us+{variant}" for variant in VARIANTS),
        *(f"{language}+m1" for language in languages),
    ]:
        assert speak("Mama.", voice).duration_s > 0.2


def test_unknown_voice_is_told() -> None:
    with pytest.raises(
        UserError,
        match=("expected an espeak-ng voice such as 'en-us' or 'de\\+f2', got 'klingonish'"),
    ):
        speak(TEXT, "klingonish")


def test_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(UserError, match=r"found none: pip install .*\[synthetic\]"):
        speak(TEXT)


def held_out_words() -> set[str]:
    words = vocabulary(held_out=True).words.values()
    return {word.lower() for each in words for word in each}


def words_of(text: str) -> list[str]:
    return re.findall(r"[\w-]+", text.lower())


def test_held_out_words_never_occur_in_training_sentences() -> None:
    held_out = held_out_words()
    assert len(held_out) >= 70
    training = vocabulary()
    known = {
        word.lower() for words in (*training.words.values(), training.syllables) for word in words
    }
    assert not known & held_out
    for language, words in training.foreign.items():
        assert not set(words) & set(vocabulary(held_out=True).foreign[language])
    rng = np.random.default_rng(0)
    singular = held_out | {word + "s" for word in held_out} | {word + "es" for word in held_out}
    for _ in range(1500):
        sentence = sample_sentence(rng, sample_language(rng))
        if sentence.language.startswith("en"):
            assert not set(words_of(sentence.text)) & singular, sentence.text


def test_held_out_sentences_use_held_out_words_and_repeat_by_seed() -> None:
    def draw(seed: int) -> list[str]:
        rng = np.random.default_rng(seed)
        return [sample_sentence(rng, "en-us", held_out=True).text for _ in range(50)]

    stems = tuple(held_out_words())
    for text in draw(3):
        if not any(word.startswith(stems) for word in words_of(text)):
            pytest.fail(f"no held-out word in {text!r}")
    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    assert len(set(draw(3))) > 45


@pytest.mark.parametrize("num_frames", [9, 113, 401])
def test_script_fills_the_clip_exactly_and_has_a_silence(num_frames: int) -> None:
    for seed in range(6):
        script = sample_script(np.random.default_rng(seed), num_frames)
        assert script.audio.shape == script.speech.shape == (640 * num_frames,)
        assert script.audio.dtype == np.float32
        assert np.abs(script.audio).max() <= 1.0
        silent = np.abs(script.speech).reshape(-1, 160).max(axis=1) < 2e-3  # 10 ms
        runs = "".join("s" if quiet else " " for quiet in silent).split()
        assert max(map(len, runs), default=0) >= min(16, num_frames)
        if num_frames > 100:
            assert len(script.info["text"].split()) >= 1
