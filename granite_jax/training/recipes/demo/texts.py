"""What the training utterances say: text that a language model cannot guess, so that it learns to listen.

Most of it comes from two Debian packages, `fortunes` (sentences) and `wamerican` (a word list): sentences as they
are, their words shuffled, words drawn from both at random, and pieces of sentences around spelled letters, numbers
and dates. A fifth is `grammar`. Five in a hundred say nothing.

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

SHARES = {
    "grammar": 0.19,
    "sentence": 0.30,
    "words": 0.20,
    "shuffled": 0.12,
    "letters": 0.06,
    "numbers": 0.08,
    "silence": 0.05,
}

# "a" alone is read as an article; letters that follow it in a spelling are not.
_LETTERS = tuple("bcdefghijklmnopqrstuvwxyz")
_DIGITS = ("zero", *ONES)
_DAYS = (*ORDINALS[:20], *ORDINALS[21:], "thirtieth", "thirty first")
_UNITS = words(
    """dollars, percent, miles, pounds, degrees, meters, gallons, years, minutes, hours, days, people, pages, points,
    feet, inches, cents"""
)


@dataclass(frozen=True)
class TextSource:
    """Sentences and words of the Debian packages, and how an utterance is made of them.

    Fields:
      sentences: real sentences of a split, as raw transcripts.
      common: words of the sentences, each once.
      rare: words of the word list.
    """

    split: Split
    sentences: tuple[str, ...]
    common: tuple[str, ...]
    rare: tuple[str, ...]

    @classmethod
    def open(cls, split: Split) -> "TextSource":
        """Reads both packages. Raises FileNotFoundError that names a missing one."""
        for path, package in ((FORTUNES, "fortunes"), (WORD_LIST, "wamerican")):
            if not path.exists():
                raise FileNotFoundError(f"{path}: install Debian's {package!r} to make the training texts")
        listed = WORD_LIST.read_text(encoding="utf-8").split()
        known = {word.lower() for word in listed}
        files = sorted(path for path in FORTUNES.iterdir() if path.is_file() and not path.suffix)
        every = sorted({text for path in files for text in _sentences(path.read_text(encoding="utf-8"), known)})
        sentences = tuple(text for text in every if text_split(text) == split)
        common = tuple(sorted({word for text in sentences for word in text.split()}))
        rare = tuple(word for word in listed if re.fullmatch(r"[a-z]{2,12}", word))
        return cls(split, sentences, common, rare)

    def draw(self, rng: np.random.Generator, kind: str | None = None) -> Sentence:
        """Draws a sentence of a kind, default of a random one with the probabilities `SHARES`."""
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
        said, names = makers[kind](rng).split(), ()
        if kind in ("sentence", "words", "shuffled") and rng.random() < NAMED_SHARE:
            names = (invent_name(rng, self.split),)
            said[int(rng.integers(len(said)))] = names[0]
        return Sentence(" ".join(said), names, kind)

    def _sentence(self, rng: np.random.Generator) -> str:
        return self.sentences[int(rng.integers(len(self.sentences)))]

    def _words(self, rng: np.random.Generator) -> str:
        """Four to twelve words, two in three of them of the sentences' vocabulary."""
        pools = [self.common if rng.random() < 0.67 else self.rare for _ in range(int(rng.integers(4, 13)))]
        return " ".join(pool[int(rng.integers(len(pool)))] for pool in pools)

    def _shuffled(self, rng: np.random.Generator) -> str:
        """The words of a sentence in random order; every third is of the grammar."""
        text = compose(rng, self.split).text if rng.random() < 0.33 else self._sentence(rng)
        return " ".join(rng.permutation(text.split()))

    def _piece(self, rng: np.random.Generator) -> str:
        """Up to five words in a row of a sentence, or random ones."""
        whole = (self._sentence(rng) if rng.random() < 0.7 else self._words(rng)).split()
        size = int(rng.integers(1, 6))
        start = int(rng.integers(max(1, len(whole) - size + 1)))
        return " ".join(whole[start : start + size])

    def _around(self, rng: np.random.Generator, make: Callable[[np.random.Generator], str]) -> str:
        """One or two of what `make` draws, among pieces of sentences."""
        parts = [self._piece(rng), make(rng)]
        if rng.random() < 0.5:
            parts.append(self._piece(rng))
            if rng.random() < 0.4:
                parts.append(make(rng))
        return " ".join(parts if rng.random() < 0.8 else parts[::-1])


def _sentences(fortunes: str, known: set[str]) -> list[str]:
    """The sentences of a fortune file that can be raw transcripts: known words alone, without digits or acronyms."""
    found = []
    for fortune in re.split(r"^%$", fortunes, flags=re.MULTILINE):
        quoted = re.sub(r"\n\s*--.*", "", fortune, flags=re.DOTALL)  # without the attribution
        for sentence in re.split(r"(?<=[.!?])[\"')\]]*\s+", " ".join(quoted.split())):
            if re.search(r"[^A-Za-z ,.!?;:'\"()-]|\b[A-Z]{2,}\b", sentence):
                continue
            said = [word.strip("'") for word in re.sub(r"[^a-z']", " ", sentence.lower()).split()]
            if MIN_WORDS <= len(said) <= MAX_WORDS and all(w in known and (len(w) > 1 or w in "ai") for w in said):
                found.append(" ".join(said))
    return found


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
