"""How exact word times are: espeak-ng speaks, its own events say when, and CTC alignment is compared with them.

    python benchmarks/word_times.py [CHECKPOINT]         # errors on the test sentences, without offsets
    python benchmarks/word_times.py [CHECKPOINT] --fit   # and with offsets, measured on the tuning sentences
    python benchmarks/word_times.py [CHECKPOINT] --fit --tune      # on the tuning sentences themselves
    python benchmarks/word_times.py --sentences FILE --voices en-029,en+f5  # on other sentences, in other voices

The sentences are the demo recipe's free ones (lower-case words), without noise: its tuning lines in half of its
espeak-ng voices, its test lines in the other half. Every second sentence gets a comma, hence a pause. Of FILE, one
sentence a line, lines are skipped that are not two or more words of the letters a to z and apostrophes.

libespeak-ng reports the sample at which each word begins (the closure of a first plosive included), each phoneme and
each pause. A word ends where the next one begins or a pause does. What espeak-ng speaks as one ("to be", "on the") has
no boundary inside, so none is compared there. The events are espeak-ng's own units, not what a phonetician would mark:
they can be some 10 ms from the audible change. Needs Debian's espeak-ng, which has the library, too.
"""

import argparse
import ctypes
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soxr

sys.path.insert(0, str(Path(__file__).parents[1]))

from granite_jax.recognition.words import locate_words
from granite_jax.training.recipes.demo.noise import Samples
from granite_jax.training.recipes.demo.sets import TEST_LINES, TUNE_LINES, free_sentence
from granite_jax.training.recipes.demo.synthesis import ESPEAK_VOICES, draw_recipe
from granite_jax.transcriber import Transcriber
from granite_jax.waveform import SAMPLING_RATE

LIBRARY = "libespeak-ng.so.1"
SYNCHRONOUS, PHONEME_EVENTS, UTF8, RATE_PARAMETER, PITCH_PARAMETER = 2, 1, 1, 1, 3  # of espeak-ng's speak_lib.h
WORD, PHONEME = 1, 7
PAUSES = (b"_", b"_:")
TUNE_VOICES, TEST_VOICES = ESPEAK_VOICES[::2], ESPEAK_VOICES[1::2]
_SILENCE = 1e-3


class Event(ctypes.Structure):
    """`espeak_EVENT`; `text_position` counts characters from 1, `sample` those of the audio from 0."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("milliseconds", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("name", ctypes.c_char * 8),
    )


class Voice(ctypes.Structure):
    """`espeak_VOICE`."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("languages", ctypes.c_char_p),
        ("identifier", ctypes.c_char_p),
        ("gender", ctypes.c_ubyte),
        ("age", ctypes.c_ubyte),
        ("variant", ctypes.c_ubyte),
        ("reserved", ctypes.c_ubyte),
        ("score", ctypes.c_int),
        ("spare", ctypes.c_void_p),
    )


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(Event))


class Spoken(NamedTuple):
    """A spoken sentence: float32 audio at 16 kHz, and each word's start and end in seconds, NaN where not known."""

    text: str
    voice: str
    audio: Samples
    times: np.ndarray


class Synthesizer:
    """libespeak-ng, which can be initialized once in a process."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(LIBRARY)
        self._rate = self._library.espeak_Initialize(SYNCHRONOUS, 0, None, PHONEME_EVENTS)
        if self._rate <= 0:
            raise RuntimeError("espeak-ng found no data: install it")
        self._chunks: list[np.ndarray] = []
        self._events: list[tuple[int, int, float, bytes]] = []
        self._callback = _CALLBACK(self._receive)  # kept from the garbage collector
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples: "ctypes._Pointer[ctypes.c_short]", size: int, events: "ctypes._Pointer[Event]") -> int:
        if samples and size:
            self._chunks.append(np.ctypeslib.as_array(samples, (size,)).copy())
        position = 0
        while (event := events[position]).type:
            self._events.append((event.type, event.text_position - 1, event.sample / self._rate, event.name))
            position += 1
        return 0

    def speak(self, text: str, voice: str, speed: int, pitch: int) -> tuple[Samples, np.ndarray]:
        """Speaks lower-case words. Returns trimmed float32 audio at 16 kHz, and each word's times, float64 `[w, 2]`."""
        self._chunks.clear()
        self._events.clear()
        # As the program does: a voice's name, or a language.
        selected = Voice(languages=voice.encode())
        if self._library.espeak_SetVoiceByName(voice.encode()) and self._library.espeak_SetVoiceByProperties(
            ctypes.byref(selected)
        ):
            raise RuntimeError(f"espeak-ng has no voice {voice!r}")
        self._library.espeak_SetParameter(RATE_PARAMETER, speed, 0)
        self._library.espeak_SetParameter(PITCH_PARAMETER, pitch, 0)
        data = text.encode()
        self._library.espeak_Synth(data, len(data) + 1, 0, 1, 0, UTF8, None, None)
        wave = np.concatenate(self._chunks).astype(np.float32) / 32768
        loud = np.flatnonzero(np.abs(wave) > _SILENCE)
        times = self._times(text) - loud[0] / self._rate
        wave = wave[loud[0] : loud[-1] + 1]
        times = np.clip(times, 0.0, len(wave) / self._rate)
        return soxr.resample(wave, self._rate, SAMPLING_RATE).astype(np.float32), times

    def _times(self, text: str) -> np.ndarray:
        starts = [match.start() for match in re.finditer(r"\S+", text)]
        times = np.full((len(starts), 2), np.nan)
        begun = {position: time for kind, position, time, _ in reversed(self._events) if kind == WORD}
        pauses = [time for kind, _, time, name in self._events if kind == PHONEME and name in PAUSES]
        for index, start in enumerate(starts):
            if start not in begun:
                continue
            times[index, 0] = begun[start]
            following = starts[index + 1] if index + 1 < len(starts) else None
            if following is None or following in begun:
                next_word = np.inf if following is None else begun[following]
                times[index, 1] = min([next_word, *(pause for pause in pauses if pause > begun[start])])
        return times


def sentences(
    synthesizer: Synthesizer, lines: Sequence[str], voices: Sequence[str], seed: int, speed: int | None = None
) -> Iterator[Spoken]:
    """Speaks each line as the demo recipe does, with its pitches, levels and (by default) speeds, without noise."""
    for index, line in enumerate(lines):
        rng = np.random.default_rng([seed, index])
        sentence, voice = free_sentence(rng, line), voices[index % len(voices)]
        recipe = draw_recipe(rng, [sentence], "heldout", voice=voice, noisy=False)
        text = sentence.text
        if index % 2:
            spaces = [match.start() for match in re.finditer(" ", text)]
            comma = int(rng.choice(spaces[1:-1] or spaces))
            text = text[:comma] + "," + text[comma:]
        speech, times = synthesizer.speak(text, voice, speed or recipe.speed, recipe.pitch)
        speech = speech * np.float32(0.95 / np.abs(speech).max() * 10 ** (recipe.gain_db / 20))
        lead, trail = (np.zeros(int(seconds * SAMPLING_RATE), np.float32) for seconds in (recipe.lead, recipe.trail))
        yield Spoken(text, voice, np.concatenate([lead, speech, trail]), times + len(lead) / SAMPLING_RATE)


def read_sentences(path: Path) -> list[str]:
    """The lines of a file that are words as the recipe's are."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if re.fullmatch(r"[a-z']+( [a-z']+)+", line)]


def errors(
    transcriber: Transcriber, spoken: Sequence[Spoken], offsets: Sequence[tuple[float, float]]
) -> list[np.ndarray]:
    """Time minus truth of starts and ends in ms, for each pair of offsets: float64 `[w, 2]`, NaN without truth."""
    found: list[list[np.ndarray]] = [[] for _ in offsets]
    for sentence in spoken:
        logits = transcriber.ctc_emissions(sentence.audio, sampling_rate=SAMPLING_RATE).ctc_logits
        for pair, rows in zip(offsets, found, strict=True):
            words = locate_words(logits, sentence.text, duration=len(sentence.audio) / SAMPLING_RATE, offsets=pair)
            rows.append(1e3 * (np.array([[word.start, word.end] for word in words]) - sentence.times))
    return [np.concatenate(rows) for rows in found]


def report(name: str, differences: np.ndarray) -> None:
    """Prints a row for starts and a row for ends, in ms."""
    for side, column in zip(("starts", "ends"), differences.T, strict=True):
        known = column[~np.isnan(column)]
        size = np.abs(known)
        print(
            f"| {name} | {side} | {len(known):,} | {np.median(size):.0f} | {size.mean():.0f} | "
            f"{np.quantile(size, 0.95):.0f} | {np.median(known):+.0f} |",
            flush=True,
        )


def measure_offsets(transcriber: Transcriber, spoken: Sequence[Spoken]) -> tuple[float, float]:
    """The seconds to add to starts and ends that bring their median error to 0."""
    (differences,) = errors(transcriber, spoken, [(0.0, 0.0)])
    starts, ends = (-round(float(median)) / 1e3 for median in np.nanmedian(differences, axis=0))
    return starts, ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="demo")
    parser.add_argument("--fit", action="store_true", help="measure the offsets on the tuning sentences")
    parser.add_argument("--offsets", type=float, nargs=2, metavar=("START", "END"), help="seconds to add")
    parser.add_argument("--tune", action="store_true", help="report the tuning sentences instead of the test sentences")
    parser.add_argument("--sentences", type=Path, metavar="FILE", help="instead of the recipe's test sentences")
    parser.add_argument("--voices", default=",".join(TEST_VOICES), help="espeak-ng's, separated by commas")
    parser.add_argument("--speed", type=int, help="words a minute, instead of the recipe's 143 to 188")
    parser.add_argument("--limit", type=int, default=200, help="test sentences")
    options = parser.parse_args()
    transcriber = Transcriber.from_pretrained(options.checkpoint)
    synthesizer = Synthesizer()
    tuning = list(sentences(synthesizer, TUNE_LINES, TUNE_VOICES, 11)) if options.fit or options.tune else []
    pairs = [(0.0, 0.0)]
    if options.fit:
        pairs.append(measure_offsets(transcriber, tuning))
    if options.offsets:
        pairs.append(tuple(options.offsets))
    lines = read_sentences(options.sentences) if options.sentences else TEST_LINES
    test = sentences(synthesizer, lines[: options.limit], options.voices.split(","), 12, options.speed)
    spoken = tuning if options.tune else list(test)
    print(f"{len(spoken)} sentences")
    print("| offsets of starts and ends (s) | | words | median (ms) | mean | 95 % | signed median |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for pair, differences in zip(pairs, errors(transcriber, spoken, pairs), strict=True):
        report(f"{pair[0]:g}, {pair[1]:g}", differences)


if __name__ == "__main__":
    main()
