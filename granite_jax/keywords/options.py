"""The options of keyword biasing."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from granite_jax.errors import GraniteError, PromptError

BOOST = 8.0  # nats: measured by benchmarks/keywords.py
THRESHOLD = -1.2  # nats per character: measured likewise
MAX_BOOST = 50.0

KeywordsIn = Literal["decoder", "prompt", "both"]
Entry = str | tuple[str, float | None]
"""A keyword, or a pair of a keyword and its boost."""
KeywordList = Sequence[Entry] | Mapping[str, float | None]


@dataclasses.dataclass(frozen=True)
class KeywordOptions:
    """How keywords are used.

    Fields:
      boost: nats added to a keyword's last token.
      threshold: nats per character; keywords that score worse are left out. None: all are used, heard or not.
      prompt, decoder: whether they go into the prompt, and whether they bias decoding.
      lower_case: whether the task's text is lower case; None if that is unknown.
    """

    boost: float = BOOST
    threshold: float | None = THRESHOLD
    prompt: bool = False
    decoder: bool = True
    lower_case: bool | None = True

    @classmethod
    def from_fields(
        cls,
        keyword_boost: float | None,
        keyword_gate: float | Literal[False] | None,
        keywords_in: str,
        lower_case: bool | None,
    ) -> "KeywordOptions":
        """Makes the options from a caller's fields. Raises GraniteError naming the one that is out of range."""
        if keywords_in not in ("decoder", "prompt", "both"):
            raise GraniteError(f"keywords_in is one of decoder, prompt, both, not {keywords_in!r:.60}")
        boost = BOOST if keyword_boost is None else check_boost("keyword_boost", keyword_boost)
        threshold: float | None = None
        if keyword_gate is None:
            threshold = THRESHOLD
        elif keyword_gate is not False:
            if not (_is_number(keyword_gate) and -math.inf < keyword_gate < 0):
                raise GraniteError(f"keyword_gate is {keyword_gate!r:.60}, not a number below 0, or False")
            threshold = keyword_gate
        return cls(boost, threshold, keywords_in != "decoder", keywords_in != "prompt", lower_case)


def keyword_entries(keywords: Any) -> tuple[Entry, ...]:
    """A caller's list of keywords, or mapping from keywords to boosts, as entries.

    Raises:
      PromptError: it is neither.
    """
    if isinstance(keywords, Mapping):
        keywords = [(text, boost) for text, boost in keywords.items()]
    elif isinstance(keywords, str | bytes) or not isinstance(keywords, Iterable):
        raise PromptError(f"keywords must be a list of strings, not {keywords!r:.60}")
    return tuple(
        (entry[0], plain_number(entry[1])) if isinstance(entry, tuple) and len(entry) == 2 else entry
        for entry in keywords
    )


def plain_number(value: Any) -> Any:
    """A NumPy scalar as a Python number; anything else unchanged."""
    return value.item() if isinstance(value, np.generic) else value


def check_boost(name: str, value: Any) -> float:
    """Returns a boost in nats. Raises GraniteError with its `name` if it is out of range."""
    value = plain_number(value)
    if not _is_number(value) or not 0 <= value <= MAX_BOOST:
        raise GraniteError(f"{name} is {value!r:.60}, not a number of nats from 0 to {MAX_BOOST:g}")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
