"""What a talker says in a clip: sentences with pauses and silences, of an exact length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rest_lightning.constants import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME
from rest_lightning.data.synthetic.text import sample_language, sample_sentence
from rest_lightning.data.synthetic.voice import VARIANTS, Phoneme, Utterance, speak

_MIN_SILENCE_S = 0.2  # every clip has at least one silence of this length
_FADE_S = 0.01
_MARGIN_S = 0.2


@dataclass(frozen=True)
class Script:
    """The sound of one clip.

    Attributes:
        speech: float32 (640 * F,), the clean voice with digital silence between the sentences.
        audio: the same at a varied level and tone with a faint noise floor: what the clip's file
            holds.
        phonemes: in seconds of the clip; where it begins or ends in the middle of a sentence, those
            up to 0.2 s outside are kept, since they shape the mouth too.
        info: text, language, voice, words_per_minute, pitch, for the sidecar.
    """

    speech: NDArray[np.float32]
    audio: NDArray[np.float32]
    phonemes: tuple[Phoneme, ...]
    info: dict[str, Any]


def sample_script(rng: np.random.Generator, num_frames: int, held_out: bool = False) -> Script:
    """Draw what is said in ``num_frames`` frames: whole sentences in a row, with pauses of 0.2 to
    0.8 s.

    About a third of the clips begin in the middle of a sentence, 3 % are silent but for a few words
    at most. ``held_out`` takes the words of validation and test.
    """
    language = sample_language(rng)
    variant = str(rng.choice(VARIANTS))
    low, high = (45, 90) if variant.startswith(("f", "linda", "steph")) else (15, 65)
    info: dict[str, Any] = {
        "text": "",
        "language": language,
        "voice": f"{language}+{variant}",
        "words_per_minute": int(rng.integers(120, 211)),
        "pitch": int(rng.integers(low, high)),
    }
    pitch_range = int(rng.integers(30, 80))
    duration_s = num_frames / FPS
    sentences: list[tuple[str, Utterance]] = []

    def sentence(number: int) -> Utterance:
        while len(sentences) <= number:
            text = sample_sentence(rng, language, held_out).text
            spoken = speak(
                text, info["voice"], info["words_per_minute"], info["pitch"], pitch_range
            )
            sentences.append((text, spoken))
        return sentences[number][1]

    draw = rng.random()
    if draw < 0.03:
        start_s = duration_s * rng.uniform(0.55, 1.1)
    elif draw < 0.35:
        start_s = -rng.uniform(0.1, 0.75) * sentence(0).duration_s
    else:
        start_s = rng.uniform(0.0, 0.7)
    pauses_s = rng.uniform(0.2, 0.8, size=8 + int(duration_s))

    placed = _place(start_s, duration_s, pauses_s, sentence)
    phonemes = _phonemes(placed, duration_s)
    if _longest_silence_s(phonemes, duration_s) < _MIN_SILENCE_S:
        # One sentence fills the clip: begin it after a silence.
        placed = _place(
            min(rng.uniform(0.25, 0.7), 0.5 * duration_s), duration_s, pauses_s, sentence
        )
        phonemes = _phonemes(placed, duration_s)
    speech = np.zeros(num_frames * SAMPLES_PER_FRAME, np.float32)
    for utterance, at_s in placed:
        _add(speech, utterance.audio, round(at_s * SAMPLE_RATE))
    speech[: _fade().size] *= _fade()
    speech[-_fade().size :] *= _fade()[::-1]
    info["text"] = " ".join(text for text, _ in sentences[: len(placed)])
    return Script(speech=speech, audio=_record(rng, speech), phonemes=phonemes, info=info)


def _place(
    start_s: float,
    duration_s: float,
    pauses_s: NDArray[np.float64],
    sentence: Callable[[int], Utterance],
) -> list[tuple[Utterance, float]]:
    """Utterances with their start times until the clip is full."""
    placed: list[tuple[Utterance, float]] = []
    at_s = start_s
    while at_s < duration_s:
        utterance = sentence(len(placed))
        placed.append((utterance, at_s))
        at_s += utterance.duration_s + float(pauses_s[(len(placed) - 1) % len(pauses_s)])
    return placed


def _phonemes(placed: list[tuple[Utterance, float]], duration_s: float) -> tuple[Phoneme, ...]:
    """Phonemes in clip time, with those just outside it: the mouth comes from one sound and goes to
    the next.
    """
    return tuple(
        Phoneme(p.ipa, p.start_s + at_s, p.end_s + at_s)
        for utterance, at_s in placed
        for p in utterance.phonemes
        if p.end_s + at_s > -_MARGIN_S and p.start_s + at_s < duration_s + _MARGIN_S
    )


def _longest_silence_s(phonemes: tuple[Phoneme, ...], duration_s: float) -> float:
    edges_s = [0.0]
    for phoneme in phonemes:
        if phoneme.ipa:
            edges_s += [min(max(edge, 0.0), duration_s) for edge in phoneme[1:]]
    edges_s.append(duration_s)
    return max(end - start for start, end in zip(edges_s[::2], edges_s[1::2], strict=True))


def _fade() -> NDArray[np.float32]:
    return np.linspace(0.0, 1.0, round(_FADE_S * SAMPLE_RATE), dtype=np.float32)


def _add(speech: NDArray[np.float32], voice: NDArray[np.float32], start: int) -> None:
    first, last = max(0, start), min(len(speech), start + len(voice))
    if last > first:
        speech[first:last] += voice[first - start : last - start]


def _record(rng: np.random.Generator, speech: NDArray[np.float32]) -> NDArray[np.float32]:
    """Level of -26 to -16 dB over the voiced part, a slight tilt of the tone, noise of -80 to -50
    dB.
    """
    voice = speech.astype(np.float64)
    voice += rng.uniform(-0.3, 0.3) * (voice - np.concatenate(([0.0], voice[:-1])))
    active = voice[np.abs(voice) > 1e-3]
    level = float(np.sqrt(np.mean(active**2))) if active.size else 1.0
    voice *= 10.0 ** (rng.uniform(-26.0, -16.0) / 20.0) / level
    peak = float(np.abs(voice).max())
    voice *= min(1.0, 0.95 / peak) if peak > 0 else 1.0
    noise = rng.normal(size=len(voice))
    noise = noise + rng.uniform(0.0, 0.9) * np.concatenate(([0.0], noise[:-1]))
    return (voice + 10.0 ** (rng.uniform(-80.0, -50.0) / 20.0) * noise).astype(np.float32)
