"""Whether a text is believed, or its audio is decoded again: the only place that says so.

    decoded ──► decide ──┬─► Accept: the text, or what is written in its place
                         ├─► Again: the same audio, without boosts that made the text repeat a keyword
                         └─► Split: two smaller pieces

A recognizer asks once a text is known, before its words are aligned; whoever submitted the audio acts on the answer.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from granite_jax.options import TranscribeOptions
from granite_jax.recognition.guards import Finding, check_text
from granite_jax.recognition.repetition import has_repetition_loop

MAX_SPLITS = 2


@dataclasses.dataclass(frozen=True)
class Attempt:
    """How an utterance is decoded.

    Fields:
      boosts: whether boosts are added to the logits of keywords.
      splits: how often audio around it was cut in smaller pieces, because of its text.
      can_split: whether it may be cut in smaller pieces.
    """

    boosts: bool = True
    splits: int = 0
    can_split: bool = False

    @property
    def number(self) -> int:
        """How often its audio was decoded before."""
        return self.splits + (not self.boosts)


@dataclasses.dataclass(frozen=True)
class Accept:
    """The text is final.

    Fields:
      finding: what was doubtful about it, if anything; its `text` is written.
    """

    finding: Finding | None = None


@dataclasses.dataclass(frozen=True)
class Again:
    """The same audio is decoded again.

    Fields:
      boosts: as in `Attempt`.
    """

    boosts: bool = True


@dataclasses.dataclass(frozen=True)
class Split:
    """The audio is cut in two, and both are decoded.

    Fields:
      seconds: where what the text lacks begins, if that is known.
    """

    seconds: float | None = None


Decision = Accept | Again | Split
ACCEPT, FIRST = Accept(), Attempt()


def decide(
    options: TranscribeOptions,
    attempt: Attempt,
    text: str,
    ctc_text: str,
    labels: np.ndarray,
    *,
    boosted: Sequence[str],
    stopped: bool,
) -> Decision:
    """What is to be done about a text of a language model.

    Args:
      attempt: how the audio was decoded.
      ctc_text: of the encoder, to which nothing was added.
      labels: the best CTC label of every frame, int `[t]`.
      boosted: keywords that had boosts.
      stopped: whether the text ended because its tokens were used up.
    """
    if has_repetition_loop(text, ctc_text, boosted):
        return Again(boosts=False)
    is_as_asked = stopped and options.max_new_tokens is not None
    if not options.guards or options.prompt is not None or is_as_asked:  # of what a prompt asks for, nothing is known
        return ACCEPT
    kinds = {"is_transcript": options.is_transcript, "is_raw": options.raw}
    finding = check_text(text, labels, ctc_text, stopped=stopped, **kinds)
    if finding is not None and attempt.can_split and finding.problem != "invention":
        return Split(finding.seconds)
    return Accept(finding)
