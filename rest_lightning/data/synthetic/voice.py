"""Speech from text with the times of its phonemes: espeak-ng through ctypes, no process and no file
in between.

The library and its data come from the package ``espeakng-loader`` (espeak-ng 1.52, C API in
speak_lib.h).
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rest_lightning.constants import SAMPLE_RATE
from rest_lightning.errors import UserError
from rest_lightning.extras import require

VARIANTS = (
    "m1",
    "m2",
    "m3",
    "m4",
    "m5",
    "m6",
    "m7",
    "m8",
    "f1",
    "f2",
    "f3",
    "f4",
    "f5",
    "adam",
    "linda",
    "steph",
)
"""Voice variants of espeak-ng that sound like people (no robots, no whispering)."""

# Constants of espeak-ng's speak_lib.h.
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_PHONEME_EVENTS = 0x0001
_INITIALIZE_PHONEME_IPA = 0x0002
_INITIALIZE_DONT_EXIT = 0x8000
_EVENT_LIST_TERMINATED = 0
_EVENT_PHONEME = 7
_RATE, _PITCH, _RANGE = 1, 3, 4
_CHARS_UTF8 = 1


class _EventId(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_void_p), ("string", ctypes.c_char * 8))


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    )


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


class Phoneme(NamedTuple):
    """One phoneme: IPA symbols (stress marks kept, "" for a pause) and its interval in seconds."""

    ipa: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Utterance:
    """Spoken text.

    Attributes:
        audio: float32 samples in [-1, 1], 16 kHz mono.
        phonemes: in order of time, inside the audio; pauses are phonemes with ipa "".
    """

    audio: NDArray[np.float32]
    phonemes: tuple[Phoneme, ...]

    @property
    def duration_s(self) -> float:
        """Length of the audio in seconds."""
        return len(self.audio) / SAMPLE_RATE


def speak(
    text: str,
    voice: str = "en-us",
    words_per_minute: int = 160,
    pitch: int = 50,
    pitch_range: int = 50,
) -> Utterance:
    """Speak a text.

    The same arguments give the same samples whatever was spoken before: espeak-ng keeps the phase
    of its oscillators in static variables, so the library is loaded afresh for each call (about 1
    ms) and its noise is seeded.

    Args:
        text: one or more sentences.
        voice: espeak-ng language with an optional variant, such as ``"en-us+f2"`` or ``"de"``.
        words_per_minute: 80 to 450.
        pitch: 0 to 100.
        pitch_range: 0 (monotone) to 100.

    Raises:
        UserError: the package espeakng-loader is missing, or there is no such voice.
    """
    require("synthetic", "synthetic speech")
    import espeakng_loader

    library = ctypes.CDLL(espeakng_loader.get_library_path())
    try:
        samples, events, rate_hz = _synthesise(
            library,
            os.fsencode(espeakng_loader.get_data_path()),
            text,
            voice,
            words_per_minute,
            pitch,
            pitch_range,
        )
    finally:
        _unload(library)
    return Utterance(
        audio=_resample(samples, rate_hz), phonemes=_intervals(events, len(samples), rate_hz)
    )


def _synthesise(
    library: ctypes.CDLL,
    data_path: bytes,
    text: str,
    voice: str,
    words_per_minute: int,
    pitch: int,
    pitch_range: int,
) -> tuple[NDArray[np.int16], list[tuple[int, str]], int]:
    blocks: list[NDArray[np.int16]] = []
    events: list[tuple[int, str]] = []

    @_Callback
    def receive(
        wave: ctypes._Pointer[ctypes.c_short], count: int, event: ctypes._Pointer[_Event]
    ) -> int:
        if wave and count > 0:
            blocks.append(np.ctypeslib.as_array(wave, (count,)).copy())
        i = 0
        while event[i].type != _EVENT_LIST_TERMINATED:
            if event[i].type == _EVENT_PHONEME:
                events.append((event[i].sample, event[i].id.string.decode("utf-8", "ignore")))
            i += 1
        return 0

    options = _INITIALIZE_PHONEME_EVENTS | _INITIALIZE_PHONEME_IPA | _INITIALIZE_DONT_EXIT
    rate_hz = library.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, data_path, options)
    if rate_hz <= 0:
        raise UserError(
            "espeak-ng found no voice data: pip install --force-reinstall espeakng-loader"
        )
    try:
        library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        library.espeak_SetSynthCallback(receive)
        if library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise UserError(
                f"expected an espeak-ng voice such as 'en-us' or 'de+f2', got {voice!r}: choose "
                "another voice"
            )
        for parameter, value in ((_RATE, words_per_minute), (_PITCH, pitch), (_RANGE, pitch_range)):
            library.espeak_SetParameter(parameter, int(value), 0)
        data = text.encode() + b"\0"
        if (
            library.espeak_Synth(data, ctypes.c_size_t(len(data)), 0, 1, 0, _CHARS_UTF8, None, None)
            != 0
        ):
            raise RuntimeError(f"espeak-ng failed to speak {text!r}")
        library.espeak_Synchronize()
    finally:
        library.espeak_Terminate()
    samples = np.concatenate(blocks) if blocks else np.zeros(0, np.int16)
    return samples, events, rate_hz


def _unload(library: ctypes.CDLL) -> None:
    import _ctypes

    names = vars(_ctypes)
    # the latter on Windows
    unload = names["dlclose"] if "dlclose" in names else names["FreeLibrary"]
    unload(library._handle)


def _resample(samples: NDArray[np.int16], rate_hz: int) -> NDArray[np.float32]:
    from scipy.signal import resample_poly

    if not len(samples):
        return np.zeros(0, np.float32)
    divisor = int(np.gcd(rate_hz, SAMPLE_RATE))
    audio = resample_poly(
        samples.astype(np.float64) / 32768.0, SAMPLE_RATE // divisor, rate_hz // divisor
    )
    return np.clip(audio, -1.0, 1.0).astype(np.float32)


def _intervals(
    events: list[tuple[int, str]], num_samples: int, rate_hz: int
) -> tuple[Phoneme, ...]:
    """Events mark starts; a phoneme lasts until the next one."""
    times = [min(sample, num_samples) / rate_hz for sample, _ in events]
    ends = [*times[1:], num_samples / rate_hz]
    return tuple(
        Phoneme(ipa, start, end)
        for (_, ipa), start, end in zip(events, times, ends, strict=True)
        if end > start
    )
