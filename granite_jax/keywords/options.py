"""What a caller may ask of keywords."""

import dataclasses
import math
from typing import Any, Literal

from granite_jax.errors import GraniteError

BOOST = 8.0  # nats: measured by benchmarks/keywords.py
THRESHOLD = -1.2  # nats a character: likewise
MAX_BOOST = 50.0
PLACES = ("decoder", "prompt", "both")


@dataclasses.dataclass(frozen=True)
class Biasing:
    """How keywords are used.

    Fields:
      boost: nats by which a keyword's last token is lifted.
      threshold: nats a character; keywords that sound worse are left out. None: all are used, heard or not.
      prompt, decoder: whether they go into the prompt, and whether they bias decoding.
      lower_case: whether the task's text is lower case; None where that is unknown.
    """

    boost: float = BOOST
    threshold: float | None = THRESHOLD
    prompt: bool = False
    decoder: bool = True
    lower_case: bool | None = True


def biasing(
    boost: float | None, threshold: float | Literal[False] | None, where: str, lower_case: bool | None
) -> Biasing:
    """Reads a caller's options. Raises GraniteError naming the one that is out of range."""
    if where not in PLACES:
        raise GraniteError(f"keywords_in is one of {', '.join(PLACES)}, not {where!r:.60}")
    boost = BOOST if boost is None else check_boost("keyword_boost", boost)
    if threshold is None:
        threshold = THRESHOLD
    elif threshold is not False and not (_is_number(threshold) and -math.inf < threshold < 0):
        raise GraniteError(f"keyword_gate is {threshold!r:.60}, not a number below 0, or False")
    return Biasing(boost, None if threshold is False else threshold, where != "decoder", where != "prompt", lower_case)


def check_boost(what: str, value: Any) -> float:
    """`value` in nats. Raises GraniteError if it is out of range, naming `what` it is."""
    if not _is_number(value) or not 0 <= value <= MAX_BOOST:
        raise GraniteError(f"{what} is {value!r:.60}, not a number of nats from 0 to {MAX_BOOST:g}")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
