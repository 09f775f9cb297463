"""How much a batch asks of a chip, and what it is. Imports no JAX, so that the command line can show the defaults."""

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


@dataclasses.dataclass(frozen=True)
class Work:
    """Arithmetic and memory traffic of some computation; work adds up, and is multiplied by how often it is done.

    Fields:
      flops: floating-point operations.
      bytes: bytes that cross the memory bus.
    """

    flops: float
    bytes: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> "Work":
        return Work(self.flops * times, self.bytes * times)

    __rmul__ = __mul__

    @property
    def intensity(self) -> float:
        """FLOPs a byte; 0 where there is nothing to do."""
        return self.flops / self.bytes if self.bytes else 0.0
