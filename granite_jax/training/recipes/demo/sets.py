"""The recipe's tuning sets, which decide between models, and its test sets, which are reported.

The tuning set has sentences of fortunes that training left out, sentences of the grammar, and a quarter of
`free_sentences.txt`. The test set has the other free sentences, whose forms training never had, and other sentences of
the grammar, in the voices of training; `test-voice` has such sentences in a voice that training never had. The tuning
and the test set have silences, too. The keyword sets have free sentences with names, each several times with other
names, and sentences of the grammar with names. `people` are recordings of people, from Debian's
`pocketsphinx-testdata`.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile as sf
from numpy.typing import NDArray

from granite_jax.training.corpus import Corpus, Utterance
from granite_jax.training.recipes.demo import synthesis
from granite_jax.training.recipes.demo.grammar import Sentence, compose, invent_name
from granite_jax.training.recipes.demo.texts import TextSource

FREE = tuple(Path(__file__).with_name("free_sentences.txt").read_text(encoding="utf-8").splitlines())
"""Sentences written for this project, with `{name}` in place of an invented name."""
PEOPLE = Path("/usr/share/pocketsphinx/test/data")
_TUNE_SEED, _TEST_SEED, _VOICE_SEED, _KEYWORD_SEED = 3, 4, 5, 6
_COMMANDS = {"goforward": "go forward ten meters", "something": "go somewhere and do something", "numbers": None}


@dataclass(frozen=True)
class Spoken:
    """An utterance of a set.

    Fields:
      group: the utterances that it is reported with.
      text: what is said, or None where that is not known.
    """

    group: str
    samples: NDArray[np.int16]
    text: str | None
    names: tuple[str, ...] = ()


def free_sentence(rng: np.random.Generator, line: str) -> Sentence:
    """A line of `FREE` with held-out names filled in."""
    names: list[str] = []

    def fill(_: re.Match[str]) -> str:
        names.append(invent_name(rng, "heldout"))
        return names[-1]

    return Sentence(re.sub(r"\{name\}", fill, line), tuple(names), "free")


def free(lines: Sequence[str]) -> synthesis.Draw:
    """Utterance i says the i-th of `lines`."""
    return lambda rng, index: [free_sentence(rng, lines[index])]


def grammar(rng: np.random.Generator, index: int) -> list[Sentence]:
    """A held-out sentence of the grammar."""
    return [compose(rng, "heldout")]


TUNE_LINES, TEST_LINES = FREE[::4], tuple(line for i, line in enumerate(FREE) if i % 4)


def _tune() -> Iterator[Utterance]:
    source = TextSource.open("heldout")
    return _chain(
        _TUNE_SEED,
        (range(100), free(TUNE_LINES)),
        (range(1000, 1150), grammar),
        (range(2000, 2150), lambda rng, _: [source.draw(rng, "sentence")]),
        (range(3000, 3050), lambda rng, _: [source.draw(rng, "silence")]),
    )


def _test() -> Iterator[Utterance]:
    silence = lambda rng, _: [Sentence("", (), "silence")]  # noqa: E731
    return _chain(
        _TEST_SEED, (range(300), free(TEST_LINES)), (range(1000, 1300), grammar), (range(3000, 3050), silence)
    )


def _test_voice() -> Iterator[Utterance]:
    return _chain(
        _VOICE_SEED,
        (range(300), free(TEST_LINES)),
        (range(1000, 1100), grammar),
        voice=synthesis.HELDOUT_VOICE,
    )


def _keywords(lines: Sequence[str], seed: int, count: int) -> Iterator[Utterance]:
    named = [line for line in lines if "{name}" in line]

    def named_grammar(rng: np.random.Generator, index: int) -> list[Sentence]:
        return [next(s for s in iter(lambda: compose(rng, "heldout"), None) if s.names)]

    repeated = free(named * (count // len(named) + 1))
    return _chain(seed, (range(count), repeated), (range(1000, 1000 + count), named_grammar))


def _chain(seed: int, *parts: tuple[Sequence[int], synthesis.Draw], voice: str | None = None) -> Iterator[Utterance]:
    streams = (synthesis.stream(seed, indices, "heldout", draw, voice=voice) for indices, draw in parts)
    return itertools.chain.from_iterable(streams)


SETS: dict[str, Callable[[], Iterator[Utterance]]] = {
    "tune": _tune,
    "test": _test,
    "test-voice": _test_voice,
    "keywords-tune": lambda: _keywords(TUNE_LINES, _KEYWORD_SEED, 150),
    "keywords-test": lambda: _keywords(TEST_LINES, _KEYWORD_SEED + 1, 300),
}


def spoken(corpus: Corpus) -> Iterator[Spoken]:
    """The utterances of a generated set, grouped by what they say."""
    for item in corpus:
        yield Spoken(item.kind, item.samples, item.text, item.names)


def people(directory: Path = PEOPLE) -> Iterator[Spoken]:
    """13 recordings of people at 16 kHz, five of them read from a novel; none if the package is not installed."""
    for folder in ("librivox", "cards"):
        (index,) = (*directory.glob(f"{folder}/*transcription"),) or (None,)
        if index is None:
            continue
        for line in index.read_text(encoding="utf-8").splitlines():
            text, name = re.fullmatch(r"<s>\s*(.*?)\s*</s> \((.*)\)", line).groups()  # type: ignore[union-attr]
            samples = np.asarray(sf.read(index.with_name(f"{name}.wav"), dtype="int16")[0], np.int16)
            yield Spoken(f"people ({folder})", samples, text)
    for name, command in _COMMANDS.items():
        if (directory / f"{name}.raw").exists():
            yield Spoken("people (commands)", np.fromfile(directory / f"{name}.raw", "<i2"), command)
