"""What the training utterances say: text that a language model cannot guess, so that it learns to listen.

Most of it comes from Debian's `fortunes` and from the 12,000 most frequent English words (`wordfreq`), both checked
against the list of Debian's `wamerican`: unchanged sentences, their words shuffled, words drawn at random, and pieces
of sentences around spelled letters, numbers and dates. An eighth is `grammar`. Five in a hundred say nothing.

Fortunes are divided into a training and a held-out part as the grammar's sentences are, by a hash of their text.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from granite_jax.training.recipes.demo.grammar import (
    MONTHS,
    ONES,
    ORDINALS,
    TEENS,
    TENS,
    Sentence,
    Split,
    compose,
    invent_name,
    pick,
    text_split,
    words,
)

FORTUNES = Path("/usr/share/games/fortunes")
WORD_LIST = Path("/usr/share/dict/american-english")
MIN_WORDS, MAX_WORDS = 3, 16
NAMED_SHARE = 0.25  # of sentences and word sequences
FREQUENT_WORDS, FLATTENED = 12_000, 0.3  # how many words; the power of their frequency that they are drawn by

SHARES = {
    "grammar": 0.12,
    "sentence": 0.24,
    "words": 0.42,
    "shuffled": 0.06,
    "letters": 0.04,
    "numbers": 0.07,
    "silence": 0.05,
}

# "a" alone is read as an article; letters that follow it in a spelling are not.
_LETTERS = tuple("bcdefghijklmnopqrstuvwxyz")
_DIGITS = ("zero", *ONES)
_DAYS = (*ORDINALS[:20], *ORDINALS[21:], "thirtieth", "thirty first")
_WORD = re.compile(r"[a-z']{2,14}")
_UNITS = words(
    """dollars, percent, miles, pounds, degrees, meters, gallons, years, minutes, hours, days, people, pages, points,
    feet, inches, cents"""
)


@dataclass(frozen=True)
class TextSource:
    """Sentences and words of the Debian packages, and how utterances are drawn from them.

    Fields:
      sentences: real sentences of a split, as raw transcripts.
      words: those that random words are drawn from.
      probabilities: those of the words, proportional to a power of their frequency.
    """

    split: Split
    sentences: tuple[str, ...]
    words: tuple[str, ...]
    probabilities: np.ndarray

    @classmethod
    def open(cls, split: Split) -> "TextSource":
        """Reads both packages and `wordfreq`. Raises FileNotFoundError that names a package that is missing."""
        for path, package in ((FORTUNES, "fortunes"), (WORD_LIST, "wamerican")):
            if not path.exists():
                raise FileNotFoundError(f"{path}: install Debian's {package!r} to make the training texts")
        import wordfreq  # imported here because only the recipe needs it

        dictionary = {word.lower() for word in WORD_LIST.read_text(encoding="utf-8").split()}
        files = sorted(path for path in FORTUNES.iterdir() if path.is_file() and not path.suffix)
        all_sentences = sorted(
            {text for path in files for text in _sentences(path.read_text(encoding="utf-8"), dictionary)}
        )
        sentences = tuple(text for text in all_sentences if text_split(text) == split)
        ranked = [
            word for word in wordfreq.top_n_list("en", FREQUENT_WORDS) if word in dictionary and _WORD.fullmatch(word)
        ]
        weights = np.array([wordfreq.word_frequency(word, "en") for word in ranked]) ** FLATTENED
        return cls(split, sentences, tuple(ranked), weights / weights.sum())

    def draw(self, rng: np.random.Generator, kind: str | None = None) -> Sentence:
        """Draws a sentence of a kind, by default of a random one with the probabilities `SHARES`."""
        kind = kind or str(rng.choice(list(SHARES), p=list(SHARES.values())))
        if kind == "grammar":
            return compose(rng, self.split)
        makers: dict[str, Callable[[np.random.Generator], str]] = {
            "sentence": self._sentence,
            "words": self._words,
            "shuffled": self._shuffled,
            "letters": lambda rng: self._around(rng, _letters),
            "numbers": lambda rng: self._around(rng, _number),
            "silence": lambda _: "",
        }
        drawn_words, names = makers[kind](rng).split(), ()
        if kind in ("sentence", "words", "shuffled") and rng.random() < NAMED_SHARE:
            names = (invent_name(rng, self.split),)
            drawn_words[int(rng.integers(len(drawn_words)))] = names[0]
        return Sentence(" ".join(drawn_words), names, kind)

    def _sentence(self, rng: np.random.Generator) -> str:
        return self.sentences[int(rng.integers(len(self.sentences)))]

    def _words(self, rng: np.random.Generator) -> str:
        """Four to twelve random words."""
        indices = rng.choice(len(self.words), size=int(rng.integers(4, 13)), p=self.probabilities)
        return " ".join(self.words[i] for i in indices)

    def _shuffled(self, rng: np.random.Generator) -> str:
        """The words of a sentence in random order; a third of them are the grammar's."""
        text = compose(rng, self.split).text if rng.random() < 0.33 else self._sentence(rng)
        return " ".join(rng.permutation(text.split()))

    def _piece(self, rng: np.random.Generator) -> str:
        """Up to five consecutive words of a sentence, or of random words."""
        source_words = (self._sentence(rng) if rng.random() < 0.7 else self._words(rng)).split()
        size = int(rng.integers(1, 6))
        start = int(rng.integers(max(1, len(source_words) - size + 1)))
        return " ".join(source_words[start : start + size])

    def _around(self, rng: np.random.Generator, make: Callable[[np.random.Generator], str]) -> str:
        """One or two of what `make` draws, among pieces of sentences."""
        parts = [self._piece(rng), make(rng)]
        if rng.random() < 0.5:
            parts.append(self._piece(rng))
            if rng.random() < 0.4:
                parts.append(make(rng))
        return " ".join(parts if rng.random() < 0.8 else parts[::-1])


def _sentences(fortunes: str, dictionary: set[str]) -> list[str]:
    """The sentences of a fortune file that can be raw transcripts: only known words, no digits or acronyms."""
    sentences = []
    for fortune in re.split(r"^%$", fortunes, flags=re.MULTILINE):
        quoted = re.sub(r"\n\s*--.*", "", fortune, flags=re.DOTALL)  # without the attribution
        for sentence in re.split(r"(?<=[.!?])[\"')\]]*\s+", " ".join(quoted.split())):
            if re.search(r"[^A-Za-z ,.!?;:'\"()-]|\b[A-Z]{2,}\b", sentence):
                continue
            sentence_words = [word.strip("'") for word in re.sub(r"[^a-z']", " ", sentence.lower()).split()]
            if MIN_WORDS <= len(sentence_words) <= MAX_WORDS and all(
                word in dictionary and (len(word) > 1 or word in "ai") for word in sentence_words
            ):
                sentences.append(" ".join(sentence_words))
    return sentences


def _letters(rng: np.random.Generator) -> str:
    """Two to seven letters and digits, spelled."""
    size = int(rng.integers(2, 8))
    return " ".join(pick(rng, _LETTERS if rng.random() < 0.75 else ONES) for _ in range(size))


def in_words(number: int) -> str:
    """A number from 0 to 999,999 in words, as Americans say it."""
    if number < 20:
        return ("zero", *ONES, *TEENS)[number]
    if number < 100:
        return TENS[number // 10 - 2] + (f" {ONES[number % 10 - 1]}" if number % 10 else "")
    unit, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    return f"{in_words(number // unit)} {name}" + (f" {in_words(number % unit)}" if number % unit else "")


def _number(rng: np.random.Generator) -> str:
    """A count, an amount, a year, a date, a time or a row of digits."""
    below = lambda n: int(rng.integers(n))  # noqa: E731
    count = in_words(below(10 ** (1 + below(5))))
    tens = in_words(10 + below(90))
    return pick(
        rng,
        (
            count,
            f"{count} {pick(rng, _UNITS)}",
            f"{tens} point {pick(rng, _DIGITS)} {pick(rng, _UNITS)}",
            f"{pick(rng, ('eighteen', 'nineteen', 'twenty'))} {tens}",
            f"{pick(rng, MONTHS)} {pick(rng, _DAYS)}",
            f"the {pick(rng, _DAYS)} of {pick(rng, MONTHS)}",
            f"{in_words(1 + below(12))} {pick(rng, ('fifteen', 'thirty', 'forty five', 'twenty', 'ten', 'fifty'))}",
            f"half past {in_words(1 + below(12))}",
            " ".join(pick(rng, _DIGITS) for _ in range(3 + below(6))),
        ),
    )
