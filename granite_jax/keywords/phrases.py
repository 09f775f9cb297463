"""The ways to write a keyword, as tokens: anywhere in a text, or at a place in it."""

import itertools
import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

from granite_jax.keywords.automaton import Phrase
from granite_jax.text.tokenizer import Tokenizer

# Of the boost, on every token of a keyword behind the same word, or the same two words, as in the draft: measured by
# benchmarks/keywords.py.
IN_PLACE = (0.5, 1.5)


class Place(NamedTuple):
    """Where a keyword is in a text: after these words, which may be the text's first."""

    words: tuple[str, ...]
    first: bool


def places(draft: str, keyword: str) -> list[Place]:
    """The places of a keyword in a draft, each by the word before it and by the two words before it."""
    words, spelled = draft.split(), keyword.split()
    found = [
        Place(tuple(words[max(i - count, 0) : i]), i <= count)
        for i in range(len(words))
        for count in range(1, len(IN_PLACE) + 1)
        if words[i : i + len(spelled)] == spelled
    ]
    return list(dict.fromkeys(found))


def phrases_of(
    text: str, place: Place | None, boost: float, lower_case: bool | None, tokenizer: Tokenizer
) -> Iterable[Phrase]:
    """The ways to write a keyword, in the case of the task: at a place, or else with a space before it, and without one
    at the text's start."""
    cased = {True: [text.lower()], False: [text], None: list(dict.fromkeys([text, text.lower()]))}[lower_case]
    # Scripts that write no spaces between words.
    unspaced = unicodedata.category(text[0]) == "Lo"
    for written in cased:
        if place is None:
            ways = [
                Phrase(tuple(tokenizer.encode(lead + written)), boost, bool(lead) or unspaced) for lead in (" ", "")
            ]
        else:
            words = [*place.words, written]
            pieces = [tokenizer.encode(" " * (i > 0 or not place.first) + word) for i, word in enumerate(words)]
            placed_boost = boost * IN_PLACE[-1 if place.first else len(place.words) - 1]
            tokens = tuple(itertools.chain(*pieces))
            ways = [Phrase(tokens, placed_boost, not place.first, len(tokens) - len(pieces[-1]), first=1.0)]
        # An odd tokenizer may make special tokens of ordinary text: these are never written.
        yield from (way for way in ways if boost > 0 and tokenizer.special_ids.isdisjoint(way.tokens))
