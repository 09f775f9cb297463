"""What a caller may ask of inference: how batches are spread over devices, and self-speculative decoding."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

from granite_jax.errors import GraniteError

Parallel = Literal["shard_map", "pmap"]

PRESETS: Mapping[str, tuple[float, float]] = {
    "relaxed": (0.7, 0.2),
    "relaxed-accurate": (0.7, 0.2),
    "relaxed-fast": (3.0, 0.1),
}
"""(τ_CTC in nats, τ_SLM) of arXiv 2603.11243, table 2: the first for accuracy, the last for speed."""

MODES = ("lossless", *PRESETS)


@dataclasses.dataclass(frozen=True)
class Acceptance:
    """When a draft is believed.

    Fields:
      drafts: whether the encoder's CTC head drafts for inputs that come without a draft.
      ctc_threshold: nats; a CTC text all of whose frames are less uncertain than this is final. 0 accepts none.
      verify_threshold: likelihood that every draft token must exceed in the language model. Infinite (lossless): the
        tokens must be those of greedy decoding.
    """

    drafts: bool = True
    ctc_threshold: float = 0.0
    verify_threshold: float = math.inf


def acceptance(
    speculative: str | bool, ctc_threshold: float | None = None, verify_threshold: float | None = None
) -> Acceptance:
    """Reads a caller's options.

    Args:
      speculative: "lossless", "relaxed" (the same as "relaxed-accurate"), "relaxed-fast", or False.
      ctc_threshold, verify_threshold: of relaxed modes, in place of the preset's.

    Raises:
      GraniteError: naming the option that is unknown or out of range.
    """
    given = {"ctc_threshold": ctc_threshold, "verify_threshold": verify_threshold}
    thresholds = {name: value for name, value in given.items() if value is not None}
    if speculative is not False and (not isinstance(speculative, str) or speculative not in MODES):
        raise GraniteError(f"speculative is one of {', '.join(MODES)}, or False, not {speculative!r:.60}")
    if speculative not in PRESETS:
        if thresholds:
            raise GraniteError(f"{next(iter(thresholds))} is for relaxed modes, not for speculative={speculative!r}")
        return Acceptance(drafts=speculative == "lossless")
    for name, value in thresholds.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise GraniteError(f"{name} is {value!r:.60}, not a number from 0 on")
    preset = dict(zip(given, PRESETS[str(speculative)], strict=True))
    return Acceptance(drafts=True, **(preset | thresholds))


def drafts_of(draft: str | Sequence[str | None] | None, inputs: int) -> list[str | None]:
    """A caller's `draft=` as one entry an input.

    Raises:
      GraniteError: it is neither a text nor a list with an entry for every input.
    """
    if draft is None:
        return [None] * inputs
    drafts = [draft] if isinstance(draft, str) else draft
    if not isinstance(drafts, list | tuple) or not all(text is None or isinstance(text, str) for text in drafts):
        raise GraniteError("draft is a text, or a list of texts, one for every input")
    if len(drafts) != inputs:
        raise GraniteError(f"draft has {len(drafts)} texts for {inputs} inputs")
    return list(drafts)
