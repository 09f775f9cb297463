"""Finds texts that repeat themselves without end."""

import re
from collections.abc import Iterator, Sequence

from granite_jax.models.spelling import KATAKANA

_MIN_REPEATS = 4
_MIN_REPEATS_OF_DIGITS = 12
_REPETITION = re.compile(rf"(.{{1,120}}?)\1{{{_MIN_REPEATS - 1},}}", re.DOTALL)
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]")
_WORD = re.compile(r"\w+")


def has_repetition_loop(text: str, ctc_text: str, keywords: Sequence[str]) -> bool:
    """Whether something with a keyword in it is there four times or more without a break, and was not spoken so.

    Args:
      text: of the language model.
      ctc_text: of the encoder, which no boost changes.
      keywords: those that were boosted.
    """
    if not keywords:
        return False
    units = [unit for unit, _, _ in _loops(_words(text)) if not _is_spoken(unit, ctc_text)]
    return any(_words(keyword) in unit * 2 for unit in units for keyword in keywords)


def find_loop(text: str, ctc_text: str, *, is_transcript: bool) -> int | None:
    """Where in `text` something ends that is then repeated without end, and was not spoken so; None if nothing is.

    Args:
      is_transcript: whether the CTC text has the same words; otherwise any repetition in it speaks for those in `text`.
    """
    if not is_transcript and next(_loops(_words(ctc_text)), None) is not None:
        return None
    folded = _words(text)
    for unit, start, _ in _loops(folded):
        if not is_transcript or not _is_spoken(unit, ctc_text):
            words = len(folded[: start + len(unit)].split())
            return [match.end() for match in _WORD.finditer(text)][words - 1]
    return None


def _loops(folded: str) -> Iterator[tuple[str, int, int]]:
    """What repeats in folded text, where it begins, and how often it is there. Numbers repeat their digits."""
    for match in _REPETITION.finditer(f"{folded} "):
        unit, repeats = match[1], len(match[0]) // len(match[1])
        if any(map(str.isalpha, unit)) or (unit.strip() and repeats >= _MIN_REPEATS_OF_DIGITS):
            yield unit, match.start(), repeats


def _is_spoken(unit: str, ctc_text: str) -> bool:
    if _HAN.search(unit):  # whose sounds are not known
        return next(_loops(_words(ctc_text)), None) is not None
    return (unit * 2).replace(" ", "") in _words(ctc_text).replace(" ", "")


def _words(text: str) -> str:
    """The words of a text, in lower case, in Katakana for Hiragana, and without punctuation."""
    return " ".join(_WORD.findall(text.lower().translate(KATAKANA)))
