"""What the engine takes, and what it gives."""

import dataclasses
from concurrent.futures import Future

import numpy as np

from granite_jax.audio.load import Audio
from granite_jax.inference.guards import Verdict
from granite_jax.inference.options import TranscribeOptions
from granite_jax.inference.results import Transcript, Word
from granite_jax.keywords.lists import Keywords
from granite_jax.text.tasks import PromptTokens


@dataclasses.dataclass(frozen=True)
class Request:
    """One valid input with its prompt and options.

    Fields:
      max_new_tokens: the most tokens to generate.
      prompt_length: number of prompt tokens, audio tokens included.
      options: how drafts and keywords are used. Requests with different options can share a batch.
      draft: token ids of the caller's draft, if any.
      keywords: the keywords that bias decoding, if any.
      flags: of the transcript, besides those of the audio and of the text.
      is_retry: whether keywords are only looked for, because their boosts made one repeat.
      needs_logits: whether CTC logits are kept on the device until the text is known.
      needs_words: whether the words of the text get their times, for which it needs logits.
      is_urgent: whether it goes with the next batch, because it replaces a request that was due.
      is_final: whether a problem of the text is settled here and now; otherwise the caller is told of it.
    """

    audio: Audio
    max_new_tokens: int
    prompt: PromptTokens
    prompt_length: int
    options: TranscribeOptions = dataclasses.field(default_factory=TranscribeOptions)
    draft: tuple[int, ...] | None = None
    keywords: Keywords | None = None
    flags: tuple[str, ...] = ()
    is_retry: bool = False
    needs_logits: bool = False
    needs_words: bool = False
    is_urgent: bool = False
    is_final: bool = True


@dataclasses.dataclass(frozen=True)
class Decoded:
    """The result for one request.

    Fields:
      transcript: without segments.
      labels: the best CTC label of every frame, int32 `[t]`.
      words: if asked for, the words of its text; times are seconds of the request's audio.
      verdict: the problem of a text that is not final.
    """

    transcript: Transcript
    labels: np.ndarray
    words: tuple[Word, ...] = ()
    verdict: Verdict | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Ticket:
    """An admitted request: its number, its time of admission and its future."""

    request: Request
    number: int
    time: float
    future: "Future[Decoded]"
