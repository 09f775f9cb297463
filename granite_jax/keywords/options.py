"""The options of keyword biasing."""

import dataclasses
import math
from typing import Any, Literal

from granite_jax.errors import GraniteError

BOOST = 8.0  # nats: measured by benchmarks/keywords.py
THRESHOLD = -1.2  # nats per character: measured likewise
MAX_BOOST = 50.0

KeywordsIn = Literal["decoder", "prompt", "both"]
Entry = str | tuple[str, float | None]
"""A keyword, or a pair of a keyword and its boost."""


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


def check_boost(name: str, value: Any) -> float:
    """Returns a boost in nats. Raises GraniteError with its `name` if it is out of range."""
    if not _is_number(value) or not 0 <= value <= MAX_BOOST:
        raise GraniteError(f"{name} is {value!r:.60}, not a number of nats from 0 to {MAX_BOOST:g}")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
