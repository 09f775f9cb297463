"""The ways to write a keyword, as tokens: anywhere in a text, or at a place in it."""

import itertools
import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

from granite_jax.keywords.automaton import Phrase
from granite_jax.text.tokenizer import Tokenizer

# Shares of the boost, on every token of a keyword after the same word, or the same two words, as in the draft: measured
# by benchmarks/keywords.py.
IN_PLACE = (0.5, 1.5)


class Place(NamedTuple):
    """Where a keyword is in a text: after these words; `first` if they begin the text."""

    words: tuple[str, ...]
    first: bool


def places(draft: str, keyword: str) -> list[Place]:
    """The places of a keyword in a draft, each with the word before it and with the two words before it."""
    words, keyword_words = draft.split(), keyword.split()
    occurrences = [
        Place(tuple(words[max(i - count, 0) : i]), i <= count)
        for i in range(len(words))
        for count in range(1, len(IN_PLACE) + 1)
        if words[i : i + len(keyword_words)] == keyword_words
    ]
    return list(dict.fromkeys(occurrences))


def phrases_of(
    text: str, place: Place | None, boost: float, lower_case: bool | None, tokenizer: Tokenizer
) -> Iterable[Phrase]:
    """The ways to write a keyword in the task's letter case: at a place, or without one, anywhere and at the start."""
    cased = {True: [text.lower()], False: [text], None: list(dict.fromkeys([text, text.lower()]))}[lower_case]
    # Scripts without spaces between words.
    unspaced = unicodedata.category(text[0]) == "Lo"
    for spelling in cased:
        if place is None:
            phrases = [
                Phrase(tuple(tokenizer.encode(lead + spelling)), boost, bool(lead) or unspaced) for lead in (" ", "")
            ]
        else:
            words = [*place.words, spelling]
            pieces = [tokenizer.encode(" " * (i > 0 or not place.first) + word) for i, word in enumerate(words)]
            placed_boost = boost * IN_PLACE[-1 if place.first else len(place.words) - 1]
            tokens = tuple(itertools.chain(*pieces))
            phrases = [Phrase(tokens, placed_boost, not place.first, len(tokens) - len(pieces[-1]), first=1.0)]
        # A tokenizer may turn ordinary text into special tokens, which are never written.
        yield from (p for p in phrases if boost > 0 and tokenizer.special_ids.isdisjoint(p.tokens))
