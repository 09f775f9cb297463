"""What a recognizer takes, and what it gives."""

import dataclasses
from typing import Any, Literal

import numpy as np

from granite_jax.audio.load import Audio
from granite_jax.keywords.lists import Keywords
from granite_jax.options import TranscribeOptions
from granite_jax.recognition.policy import ACCEPT, FIRST, Attempt, Decision
from granite_jax.results import Transcript, Word
from granite_jax.text.chat_template import PromptTokens

Want = Literal["logits", "words"]
NO_PROMPT = PromptTokens((), ())


@dataclasses.dataclass(frozen=True)
class Utterance:
    """A stretch of audio that is decoded in one pass, with its prompt and options.

    Fields:
      audio: valid audio.
      options: those of its input. Utterances with different options can share a batch.
      prompt: of models that take one.
      max_new_tokens: the most tokens to generate; None without a language model.
      draft: token ids of the caller's draft, if any.
      keywords: the keywords that are listened for, if any.
      flags: of the transcript, besides those of the audio and of the text.
      attempt: how it is decoded this time.
      wants: "words": the words of the text get their times. "logits": the CTC logits are kept on the device until the
        text is known, as "words" needs, so that all segments of a recording share a program.
    """

    audio: Audio
    options: TranscribeOptions = dataclasses.field(default_factory=TranscribeOptions)
    prompt: PromptTokens = NO_PROMPT
    max_new_tokens: int | None = None
    draft: tuple[int, ...] | None = None
    keywords: Keywords | None = None
    flags: tuple[str, ...] = ()
    attempt: Attempt = FIRST
    wants: frozenset[Want] = frozenset()

    @property
    def boosted(self) -> tuple[str, ...]:
        """The keywords whose boosts are added to logits."""
        return () if self.keywords is None or not self.attempt.boosts else self.keywords.texts


@dataclasses.dataclass(frozen=True)
class Decoded:
    """What came of an utterance.

    Fields:
      transcript: without segments.
      labels: the best CTC label of every frame, int32 `[t]`.
      words: if asked for, the words of its text; times are seconds of the utterance's audio.
      decision: whether this is final.
    """

    transcript: Transcript
    labels: np.ndarray
    words: tuple[Word, ...] = ()
    decision: Decision = ACCEPT


def silence(samples: int, **fields: Any) -> Utterance:
    """An utterance to run programs on."""
    return Utterance(Audio("silence", np.zeros(samples, np.float32)), **fields)
