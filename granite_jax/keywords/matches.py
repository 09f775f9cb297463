"""The keywords that an utterance may contain, and its greedy CTC text repaired with them."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from granite_jax.keywords.lists import Keywords
from granite_jax.keywords.spotter import SpottingScores
from granite_jax.models.layers import ctc
from granite_jax.models.spelling import frame_words

_SLACK = 4  # frames by which a keyword and the words of the draft that it replaces can differ at either end
_CUT = 3.0  # nats that a keyword loses where it begins or ends inside a word of the greedy text
_RIVAL = 0.2  # nats per character by which a keyword must score better than an overlapping one to displace it


@dataclasses.dataclass(frozen=True)
class KeywordMatch:
    """A keyword that an utterance may contain: its index, its score in nats per character, its span in frames."""

    keyword: int
    score: float
    start: int
    end: int


def filter_matches(
    keywords: Keywords, scores: SpottingScores, row: int, labels: np.ndarray, threshold: float
) -> list[KeywordMatch]:
    """The keywords of a row that pass the gate, best first, without those that overlap a clearly better one.

    Args:
      labels: best label of every frame, `[t]`, of the utterance: a keyword that is only part of a word scores less.
    """
    candidates = []
    for column, score, start, end in zip(*(x[row] for x in vars(scores).values()), strict=True):
        if score < threshold:
            break
        spelled = keywords.labels[column]
        spaced = ctc.label_character(int(spelled[-1])) < "\u3000"
        first = spelled[spelled > 0][0]
        cuts = int(_word_continues(labels[end:], spelled[-1])) + int(_word_continues(labels[:start][::-1], first))
        score -= spaced * cuts * _CUT / np.count_nonzero(spelled)
        candidates.append(KeywordMatch(keywords.scored[int(column)], float(score), int(start), int(end)))
    passed: list[KeywordMatch] = []
    for match in sorted(candidates, key=lambda match: -match.score):
        rivals = (other for other in passed if other.score - match.score > _RIVAL and _overlap(match, other))
        if match.score >= threshold and next(rivals, None) is None:
            passed.append(match)
    return passed


def _word_continues(labels: np.ndarray, edge: int) -> bool:
    """Whether a word continues in these frames, after those that repeat its label `edge`."""
    after = labels[np.argmax(labels != edge) :] if len(labels) and labels[0] == edge else labels
    sounding = after[after != ctc.BLANK]
    return len(sounding) > 0 and sounding[0] != ctc.SPACE


def _overlap(match: KeywordMatch, other: KeywordMatch) -> bool:
    """Whether two spans share more than half of the shorter."""
    shared = min(match.end, other.end) - max(match.start, other.start)
    return 2 * shared > min(match.end - match.start, other.end - other.start)


def repair(labels: np.ndarray, matches: Sequence[KeywordMatch], keywords: Keywords) -> str:
    """The greedy CTC text with the words that fill a keyword's span replaced by the keyword.

    Args:
      labels: best label of every frame, `[t]`, of one utterance.
      matches: best first; of several at one place, the first is used. Those that were not scored whole are not.
    """
    words = [(word.text, word.start, word.end, False) for word in frame_words(labels)]  # True of repaired ones
    for match in (match for match in matches if match.keyword in keywords.whole):
        inside = [
            i
            for i, (_, start, end, _) in enumerate(words)
            if min(end, match.end) - max(start, match.start) > (end - start) / 2
        ]
        if not inside:
            continue
        first, last = inside[0], inside[-1]
        fits = abs(words[first][1] - match.start) <= _SLACK and abs(words[last][2] - match.end) <= _SLACK
        if fits and not any(words[i][3] for i in inside):
            words[first : last + 1] = [(keywords.texts[match.keyword], words[first][1], words[last][2], True)]
    return " ".join(text for text, *_ in words)
