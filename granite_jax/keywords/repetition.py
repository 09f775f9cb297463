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
    spoken = "".join(ctc_text.lower().split())
    for match in _REPETITION.finditer(f"{text.lower()} "):
        twice = match[1] * 2
        is_spoken = "".join(twice.split()) in spoken
        if not is_spoken and any(keyword.lower() in twice for keyword in keywords):
            return True
    return False
