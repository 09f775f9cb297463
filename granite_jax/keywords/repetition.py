"""Finds texts in which a boost made a keyword repeat."""

import re
from collections.abc import Sequence

_MIN_REPEATS = 4
_REPETITION = re.compile(rf"(.{{1,60}}?)\1{{{_MIN_REPEATS - 1},}}", re.DOTALL)


def has_repetition_loop(text: str, ctc_text: str, keywords: Sequence[str]) -> bool:
    """Whether something with a keyword in it is there four times or more without a break, and was not spoken so.

    Args:
      text: of the language model.
      ctc_text: of the encoder, which no boost changes.
      keywords: those that were boosted.
    """
    if not keywords:
        return False
    spoken = _words(ctc_text).replace(" ", "")
    for match in _REPETITION.finditer(f"{_words(text)} "):
        twice = match[1] * 2
        is_spoken = twice.replace(" ", "") in spoken
        has_letters = any(char.isalpha() for char in twice)  # numbers repeat their digits
        if has_letters and not is_spoken and any(_words(keyword) in twice for keyword in keywords):
            return True
    return False


def _words(text: str) -> str:
    """The words of a text, in lower case and without punctuation."""
    return " ".join(re.findall(r"\w+", text.lower()))
