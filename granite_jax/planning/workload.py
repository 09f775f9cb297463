"""What a roofline is drawn for. Imports no JAX, so that the command line can show the defaults."""

import dataclasses

PROMPT_TOKENS = 18
"""Tokens of a prompt besides those of the audio: granite-4.0-1b-speech's chat template with a short instruction."""
TOKENS_PER_SECOND = 4.0
"""Tokens written for each second of speech, an assumption: two to three words of one and a half tokens each."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """One full batch on one copy of the weights.

    Fields:
      batch: rows.
      seconds: length of every row's audio.
      prompt_tokens: tokens of each prompt besides those of the audio.
      tokens_per_second: tokens written for each second of audio.
      tokens_per_step: tokens that each row gains in a decode step: 1 without drafts, more where drafts are accepted.
    """

    batch: int
    seconds: float
    prompt_tokens: int = PROMPT_TOKENS
    tokens_per_second: float = TOKENS_PER_SECOND
    tokens_per_step: float = 1.0

    @property
    def new_tokens(self) -> float:
        """Tokens that a row writes, the end of its text included; the prefill has the first one."""
        return max(1.0, self.tokens_per_second * self.seconds)
