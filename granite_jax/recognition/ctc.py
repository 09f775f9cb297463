"""The recognizer of the encoder alone: its CTC head's own text, for any checkpoint, without the language model.

encode ──► texts on the host, with the keywords that were heard ──► align ──► results
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from granite_jax.engine.compilation import Compiler
from granite_jax.engine.stages import Collect, Outcome, Row, Stage
from granite_jax.recognition.alignment import Aligner
from granite_jax.recognition.buckets import Bucket
from granite_jax.recognition.ctc_programs import CTCPrograms
from granite_jax.recognition.encoding import ALIGN, Encoded, encode_name
from granite_jax.recognition.rows import ctc_decoded_row, encoder_inputs, failed_row, make_row, to_host
from granite_jax.recognition.utterances import Decoded, Utterance, silence
from granite_jax.text.chat_template import PromptTokens
from granite_jax.text.tokenizer import Tokenizer
from granite_jax.waveform import SAMPLING_RATE


class CTC:
    """Stages `encode` and that of its `Aligner`."""

    def __init__(
        self,
        params: Any,
        programs: CTCPrograms,
        tokenizer: Tokenizer,
        compiler: Compiler,
        buckets: Sequence[Bucket],
        word_offsets: tuple[float, float] = (0.0, 0.0),
    ):
        """
        Args:
          params: the model's.
          compiler: of these programs.
          word_offsets: seconds to add to the starts and the ends of words.
        """
        self.programs = programs
        self.compiler = compiler
        self.buckets = buckets
        self._params = programs.needed_params(params)
        self._tokenizer = tokenizer
        self.aligner = Aligner(programs.align, compiler, programs.devices.replicas, word_offsets)

    @property
    def first_stage(self) -> Stage:
        """`encode`."""
        return self.encode

    @property
    def max_programs(self) -> int:
        """Both forms of `encode`, and `align`, for every bucket."""
        return 3 * len(self.buckets)

    def prompt_length(self, utterance: Utterance) -> int:
        """0: there is no prompt."""
        return 0

    def encode(self, bucket: Bucket, rows: Sequence[Row], shared: Any = None) -> Collect:
        """Dispatches a batch to the encoder."""
        utterances: list[Utterance] = [row.payload for row in rows]
        encoded = self._encode(bucket, utterances)

        def collect() -> list[Outcome]:
            host = to_host(encoded)
            decoded = [self._decoded(utterance, host, i) for i, utterance in enumerate(utterances)]
            positions = range(len(rows))
            return self.aligner.outcomes(bucket, list(zip(positions, rows, decoded, strict=True)), encoded.logits)

        return collect

    def run_on_silence(self, bucket: Bucket, prompt: PromptTokens, *, words: bool = False) -> None:
        """Compiles and runs the programs of a bucket; with `words`, those that time words, too."""
        num_samples = min(bucket.samples, SAMPLING_RATE)
        jax.block_until_ready(self._encode(bucket, [silence(num_samples)]).labels)
        if words:
            wanting = silence(num_samples, wants=frozenset({"words"}))
            self.aligner.run_on_silence(bucket, self._encode(bucket, [wanting]).logits, num_samples)

    def _encode(self, bucket: Bucket, utterances: Sequence[Utterance]) -> Encoded:
        inputs = encoder_inputs(utterances, bucket.batch * self.programs.devices.replicas, bucket.samples)
        with_logits = any(utterance.wants for utterance in utterances)
        name = encode_name(with_logits)
        self.compiler.start(bucket, name, *([ALIGN] if with_logits else []))
        self.compiler.wait(bucket, name)
        return self.programs.encode(self._params, *inputs, with_logits=with_logits)

    def _decoded(self, utterance: Utterance, host: dict[str, Any], i: int) -> Decoded:
        row = make_row(self._tokenizer, utterance, host, i, for_decoder=False)
        if np.isnan(row.entropy):
            return failed_row(row)
        decoded, confidence = ctc_decoded_row(self._tokenizer, row), float(host["confidence"][i])
        if not decoded.transcript.text:
            return decoded
        # Rounded, because batch mates may change the last bits.
        return dataclasses.replace(
            decoded, transcript=dataclasses.replace(decoded.transcript, confidence=round(confidence, 3))
        )
