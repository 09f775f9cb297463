"""The last stage of every recognizer: the times of a text's words, by aligning it with the CTC logits."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from granite_jax.engine.compilation import Compiler
from granite_jax.engine.stages import Collect, Done, Enqueue, Outcome, Row
from granite_jax.recognition.buckets import Bucket, label_budget
from granite_jax.recognition.encoding import ALIGN
from granite_jax.recognition.policy import Accept
from granite_jax.recognition.utterances import Decoded, Utterance
from granite_jax.recognition.words import TextWord, label_sequence, split_words, word_times


class _ToAlign(NamedTuple):
    """A row's payload.

    Fields:
      position: its row of the logits.
    """

    position: int
    decoded: Decoded
    words: list[TextWord]


class Aligner:
    """The stage, and what goes there."""

    def __init__(
        self,
        align: Callable[..., Any],
        compiler: Compiler,
        replicas: int,
        word_offsets: tuple[float, float] = (0.0, 0.0),
    ):
        """
        Args:
          align: the program.
          word_offsets: seconds to add to the starts and the ends of words.
        """
        self._align, self._compiler, self._replicas = align, compiler, replicas
        self.word_offsets = word_offsets

    def outcomes(self, bucket: Bucket, decoded: Sequence[tuple[int, Row, Decoded]], logits: Any) -> list[Outcome]:
        """What follows for rows whose text is known.

        Args:
          decoded: each with its row of the logits.
          logits: on the device, `[b, t, c]`; None if no row wants its words.
        """
        done: list[tuple[Row, Decoded]] = []
        to_align: list[Row] = []
        for position, row, result in decoded:
            text = result.transcript.text
            utterance: Utterance = row.request.payload
            if text and "words" in utterance.wants and isinstance(result.decision, Accept):
                to_align.append(Row(row.ticket, _ToAlign(position, result, split_words(text))))
            else:
                done.append((row, result))
        outcomes: list[Outcome] = [Done(done)] if done else []
        return [*outcomes, Enqueue(self.stage, to_align, bucket, (logits,))] if to_align else outcomes

    def stage(self, bucket: Bucket, rows: Sequence[Row], shared: Any) -> Collect:
        """Dispatches the alignment."""
        (logits,) = shared
        size = bucket.batch * self._replicas
        labels, lengths = np.zeros((size, bucket.max_labels), np.int32), np.ones(size, np.int32)
        counts = np.zeros(size, np.int32)
        for row in rows:
            position, _, words = row.payload
            sequence, num_samples = label_sequence(words)[0], len(row.request.payload.audio.samples)
            if len(sequence) <= label_budget(num_samples):
                labels[position, : len(sequence)], counts[position] = sequence, len(sequence)
            lengths[position] = num_samples
        self._compiler.wait(bucket, ALIGN)
        alignment = self._align(logits, lengths, labels, counts)

        def collect() -> list[Outcome]:
            host = jax.device_get(alignment)
            results = []
            for row in rows:
                position, decoded, words = row.payload
                frames = len(decoded.labels)
                states = host.states[position, :frames] if counts[position] else np.full(0, -1, np.int32)
                timed = word_times(
                    words,
                    states,
                    host.log_probs[position, :frames],
                    duration=row.request.payload.audio.duration,
                    offsets=self.word_offsets,
                )
                results.append((row, dataclasses.replace(decoded, words=timed)))
            return [Done(results)]

        return collect

    def run_on_silence(self, bucket: Bucket, logits: Any, num_samples: int) -> None:
        """Compiles and runs the program."""
        size = bucket.batch * self._replicas
        none, labels = np.zeros(size, np.int32), np.zeros((size, bucket.max_labels), np.int32)
        self._compiler.wait(bucket, ALIGN)
        jax.block_until_ready(self._align(logits, none + num_samples, labels, none))
