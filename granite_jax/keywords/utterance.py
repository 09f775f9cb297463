"""The automaton of an utterance: the keywords that it may contain, boosted more where they were heard."""

import functools
import itertools
from collections.abc import Sequence

import numpy as np

from granite_jax.keywords.automaton import STATES, KeywordAutomaton, Phrase, build_automaton
from granite_jax.keywords.lists import Keywords
from granite_jax.keywords.matches import KeywordMatch, repair
from granite_jax.keywords.phrases import places


def utterance_automaton(
    keywords: Keywords, matches: Sequence[KeywordMatch], labels: np.ndarray, threshold: float
) -> KeywordAutomaton | None:
    """The automaton of the keywords that were spotted and of those that cannot be scored. None if there are none.

    Args:
      labels: best label of every frame, `[t]`, of the utterance.
    """
    if not matches:
        return keywords.always_automaton if keywords.always else None
    phrases = [phrase for keyword in keywords.always for phrase in keywords.phrases(keyword)]
    placed: list[Phrase] = []
    draft = repair(labels, matches, keywords)
    for match in matches:
        scaled = functools.partial(_scaled, share=1 - 0.5 * match.score / threshold)
        phrases += map(scaled, keywords.phrases(match.keyword))
        text = keywords.texts[match.keyword]
        # If the draft does not contain the keyword, its place is after the text heard before it.
        for place in places(draft, text) or places(f"{repair(labels[: match.start], matches, keywords)} {text}", text):
            placed += map(scaled, keywords.phrases(match.keyword, place))
    # `prepare` made sure that all of `phrases` fit; of `placed`, the first that fit are used.
    lengths = itertools.accumulate((len(phrase.tokens) for phrase in (*phrases, *placed)), initial=4)
    count = sum(length <= STATES for length in lengths) - 1
    return build_automaton([*phrases, *placed][:count])


def _scaled(phrase: Phrase, share: float) -> Phrase:
    return phrase._replace(boost=phrase.boost * share)
