"""A Transcriber without a model: each segment is decoded at once, to a text of no words."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from granite_jax import Transcriber
from granite_jax.engine.engine import Engine
from granite_jax.engine.readers import Readers
from granite_jax.engine.scheduler import Scheduler
from granite_jax.engine.stages import Collect, Done, Row
from granite_jax.recognition.buckets import Bucket
from granite_jax.recognition.intake import Intake
from granite_jax.recognition.policy import ACCEPT
from granite_jax.recognition.utterances import Decoded, Utterance
from granite_jax.results import Transcript

SECOND = 16_000
SHORT, LONG = 0.2, 0.9  # seconds of two buckets
STATS = {
    **{"route": "greedy", "draft_from": None, "finish": "end"},
    **{"llm_passes": 1, "draft_tokens": 0, "accepted_tokens": 0},
}


class Instant:
    """A recognizer whose batches are done as soon as they go; records them."""

    def __init__(self, seconds: Sequence[float] = (SHORT, LONG)):
        self.buckets = [Bucket(rows, int(size * SECOND), 60, 300) for size in seconds for rows in (1, 8)]
        self.aligner = SimpleNamespace(word_offsets=(0.0, 0.0))
        self.batches: list[list[str]] = []
        self.decision: Callable[[Utterance], Any] = lambda utterance: ACCEPT
        self.first_stage = self.stage

    def prompt_length(self, utterance: Utterance) -> int:
        return 10

    def stage(self, bucket: Bucket, rows: Sequence[Row], shared: Any) -> Collect:
        self.batches.append([row.payload.audio.name for row in rows])
        return lambda: [Done([(row, self.decoded(row.payload)) for row in rows])]

    def decoded(self, utterance: Utterance) -> Decoded:
        transcript = Transcript(utterance.audio.name, stats=STATS)
        return Decoded(transcript, np.zeros(1, np.int32), decision=self.decision(utterance))


def with_recognizer(asr: Transcriber, recognizer: Any, monkeypatch: pytest.MonkeyPatch) -> Transcriber:
    """The Transcriber with another recognizer, and batches of eight."""
    engine = Engine(Scheduler(1, 8))
    readers = Readers(engine)
    parts = asr.config, asr.tokenizer, asr.template, asr.capabilities
    monkeypatch.setattr(asr, "_engine", engine)
    monkeypatch.setattr(asr, "readers", readers)
    monkeypatch.setattr(asr, "_intake", Intake(*parts, {"speech-lm": recognizer}, engine, readers))
    return asr
