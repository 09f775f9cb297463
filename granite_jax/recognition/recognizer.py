"""What a Transcriber needs of a recognizer, and how an utterance becomes a request to the engine."""

import math
from collections.abc import Sequence
from typing import Protocol

from granite_jax.engine.compilation import Compiler
from granite_jax.engine.programs import Programs
from granite_jax.engine.stages import Request, Stage
from granite_jax.recognition.alignment import Aligner
from granite_jax.recognition.buckets import Bucket, choose_bucket
from granite_jax.recognition.utterances import Utterance
from granite_jax.text.chat_template import PromptTokens


class Recognizer(Protocol):
    """Turns utterances into texts.

    Fields:
      compiler: compiles its programs ahead of their calls.
      aligner: times words.
      buckets: the shapes that they are compiled for.
    """

    compiler: Compiler
    aligner: Aligner
    buckets: Sequence[Bucket]

    @property
    def programs(self) -> Programs:
        """What is compiled for it, at most `max_programs`."""
        ...

    @property
    def first_stage(self) -> Stage:
        """Where utterances, the payload of requests, begin."""
        ...

    @property
    def max_programs(self) -> int:
        """The bound on compilations, for any options and lengths."""
        ...

    def prompt_length(self, utterance: Utterance) -> int:
        """Tokens of an utterance's prompt with those of its audio; 0 without a language model."""
        ...

    def run_on_silence(self, bucket: Bucket, prompt: PromptTokens, *, words: bool = False) -> None:
        """Compiles and runs the programs of a bucket; with `words`, those that time words, too."""
        ...


def make_request(recognizer: Recognizer, utterance: Utterance, *, deadline: float = math.inf) -> Request | None:
    """The request for an utterance; None if it fits no bucket.

    Args:
      deadline: seconds after which its batch goes, full or not.
    """
    samples, length = len(utterance.audio.samples), recognizer.prompt_length(utterance)
    sizes = samples, length, utterance.max_new_tokens or 0
    full, single = (
        choose_bucket(recognizer.buckets, batch, *sizes)
        for batch in (max(bucket.batch for bucket in recognizer.buckets), 1)
    )
    shape = full or single
    if shape is None:
        return None
    is_urgent = utterance.attempt.number > 0  # it takes the place of a request that was due
    return Request(recognizer.first_stage, utterance, shape, single, samples, deadline, is_urgent)
