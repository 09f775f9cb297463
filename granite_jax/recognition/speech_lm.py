"""The recognizer of speech language models: stages of a batch on its way through encoder, decoder and alignment.

    encode ──► drafts on the host ──┬─► decode: prefill and decode loop ──► texts ──► align ──► results
                                    └─► texts of the encoder that are final ────────────┘

Rows that the confidence filter lets go on wait for those of other batches, so that the decoder sees full ones.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from granite_jax.decoding import DecodeState
from granite_jax.engine.compilation import Compiler
from granite_jax.engine.stages import Collect, Enqueue, Outcome, Row, Stage
from granite_jax.keywords.automaton import BatchedAutomata, FullError, KeywordAutomaton, batch_automata
from granite_jax.models.family import SpeechLMConfig
from granite_jax.models.layers.features import num_frames
from granite_jax.recognition.alignment import Aligner
from granite_jax.recognition.buckets import Bucket
from granite_jax.recognition.encoding import ALIGN, Encoded, encode_name
from granite_jax.recognition.rows import (
    EncodedRow,
    ctc_decoded_row,
    decoded_row,
    draft_head,
    encoder_inputs,
    make_row,
    to_host,
)
from granite_jax.recognition.speech_lm_programs import DECODE, PREFILL, SpeechLMPrograms, pad_drafts
from granite_jax.recognition.utterances import Utterance, silence
from granite_jax.text.chat_template import PromptTokens
from granite_jax.text.tokenizer import Tokenizer
from granite_jax.waveform import SAMPLING_RATE

_DECODED = ("tokens", "log_probs", "draft_positions", "num_tokens", "num_forward_passes", "num_accepted", "ended")
_MAX_CACHED_LISTS = 8  # lists of keywords whose arrays stay on the device


class _ToDecode(NamedTuple):
    """A row's payload for the decoder: with its own arrays on the host, if it leaves its batch."""

    row: EncodedRow
    audio: np.ndarray | None = None
    logits: np.ndarray | None = None


class SpeechLM:
    """Stages `encode`, `decode` and that of its `Aligner`."""

    def __init__(
        self,
        config: SpeechLMConfig,
        params: Any,
        programs: SpeechLMPrograms,
        tokenizer: Tokenizer,
        compiler: Compiler,
        buckets: Sequence[Bucket],
        word_offsets: tuple[float, float] = (0.0, 0.0),
    ):
        """
        Args:
          compiler: of these programs.
          word_offsets: seconds to add to the starts and the ends of words.
        """
        self.programs = programs
        self.compiler = compiler
        self.buckets = buckets
        self.params = params
        self._config = config
        self._tokenizer = tokenizer
        self.aligner = Aligner(programs.align, compiler, programs.devices.replicas, word_offsets)
        self._pools: dict[tuple[int, ...], tuple[BatchedAutomata, list[KeywordAutomaton]]] = {}

    @property
    def first_stage(self) -> Stage:
        """`encode`."""
        return self.encode

    @property
    def max_programs(self) -> int:
        """Both forms of `encode`, `prefill`, `decode` and `align` for every bucket."""
        return 5 * len(self.buckets)

    def num_audio_tokens(self, num_samples: int) -> int:
        """Prompt tokens that audio takes."""
        return int(self._config.num_audio_tokens(num_frames(num_samples)))

    def prompt_length(self, utterance: Utterance) -> int:
        """Tokens of an utterance's prompt with those of its audio."""
        prompt = utterance.prompt
        return len(prompt.prefix) + self.num_audio_tokens(len(utterance.audio.samples)) + len(prompt.suffix)

    def encode(self, bucket: Bucket, rows: Sequence[Row], shared: Any = None) -> Collect:
        """Dispatches a batch to the encoder."""
        utterances: list[Utterance] = [row.payload for row in rows]
        encoded = self._encode(bucket, utterances)

        def collect() -> list[Outcome]:
            host = to_host(encoded)
            encoded_rows = [make_row(self._tokenizer, utterance, host, i) for i, utterance in enumerate(utterances)]
            thresholds = [utterance.options.drafting.ctc_threshold for utterance in utterances]
            passed = [
                row.is_silent or row.entropy < threshold
                for row, threshold in zip(encoded_rows, thresholds, strict=True)
            ]
            both = list(zip(rows, encoded_rows, strict=True))
            if not any(thresholds) and not all(passed):  # silent rows of such a batch generate nothing
                going = [Row(row.ticket, _ToDecode(encoded_row)) for row, encoded_row in both]
                return [Enqueue(self.decode, going, bucket, (encoded.audio, encoded.logits))]
            audio = np.asarray(encoded.audio)
            going = [
                Row(row.ticket, _ToDecode(encoded_row, audio[i], _row_of(encoded.logits, i)))
                for i, (row, encoded_row) in enumerate(both)
                if not passed[i]
            ]
            finished = [
                (i, row, ctc_decoded_row(self._tokenizer, encoded_row))
                for i, (row, encoded_row) in enumerate(both)
                if passed[i]
            ]
            outcomes = self.aligner.outcomes(bucket, finished, encoded.logits)
            return [*outcomes, Enqueue(self.decode, going, bucket)] if going else outcomes

        return collect

    def decode(self, bucket: Bucket, rows: Sequence[Row], shared: Any = None) -> Collect:
        """Dispatches a batch to the language model.

        Args:
          shared: audio embeddings and CTC logits of the rows, in their order; None if each has its own.
        """
        audio, logits = shared or self._joined(bucket, rows)
        encoded_rows: list[EncodedRow] = [row.payload.row for row in rows]
        try:
            state = self._decode(bucket, encoded_rows, audio)
        except FullError:
            # The rows have different long lists that cannot be scored. Each list fits alone, so halve the batch.
            if len(rows) == 1:
                raise
            half = len(rows) // 2
            roll = lambda x: self.programs.devices.shard_rows(np.roll(np.asarray(x), -half, axis=0))  # noqa: E731
            rolled = roll(audio), None if logits is None else roll(logits)
            parts = (
                Enqueue(self.decode, rows[:half], bucket, (audio, logits)),
                Enqueue(self.decode, rows[half:], bucket, rolled),
            )
            return lambda: parts
        # Without the cache, so that its memory is freed as soon as the device is done with it.
        results = {name: getattr(state, name) for name in _DECODED}
        results["drafted"] = state.draft.lengths

        def collect() -> list[Outcome]:
            host = jax.device_get(results)
            decoded = [decoded_row(self._tokenizer, row, host, i) for i, row in enumerate(encoded_rows)]
            positions = range(len(rows))
            return self.aligner.outcomes(bucket, list(zip(positions, rows, decoded, strict=True)), logits)

        return collect

    def run_on_silence(self, bucket: Bucket, prompt: PromptTokens, *, words: bool = False) -> None:
        """Compiles and runs the programs of a bucket; with `words`, those that time words, too."""
        num_samples = min(bucket.samples, SAMPLING_RATE)
        utterance = silence(num_samples, prompt=prompt, max_new_tokens=1)
        row = EncodedRow(utterance, np.zeros(0, np.int32))
        jax.block_until_ready(self._decode(bucket, [row], self._encode(bucket, [utterance]).audio).tokens)
        if words:
            wanting = dataclasses.replace(utterance, wants=frozenset({"words"}))
            self.aligner.run_on_silence(bucket, self._encode(bucket, [wanting]).logits, num_samples)

    def _size(self, bucket: Bucket) -> int:
        """Rows of a batch on all devices together."""
        return bucket.batch * self.programs.devices.replicas

    def _encode(self, bucket: Bucket, utterances: Sequence[Utterance]) -> Encoded:
        inputs = encoder_inputs(utterances, self._size(bucket), bucket.samples)
        bpe_wanted, has_bpe_head = (
            np.zeros(self._size(bucket), np.int32),
            bool(self.programs.model.num_bpe_labels(self._config)),
        )
        bpe_wanted[: len(utterances)] = [draft_head(utterance, has_bpe_head) == "bpe" for utterance in utterances]
        with_logits = any(utterance.wants for utterance in utterances)
        name = encode_name(with_logits)
        self.compiler.start(bucket, name, *([ALIGN] if with_logits else []))
        if not all(utterance.options.drafting.ctc_threshold for utterance in utterances):  # else CTC texts may do
            self.compiler.start(bucket, PREFILL, DECODE)
        self.compiler.wait(bucket, name)
        return self.programs.encode(self.params, *inputs, bpe_wanted, with_logits=with_logits)

    def _joined(self, bucket: Bucket, rows: Sequence[Row]) -> tuple[Any, Any]:
        """Arrays on the device from those of rows of several batches."""
        padding = self._size(bucket) - len(rows)
        shard = self.programs.devices.shard_rows
        audio = shard(np.stack([*(row.payload.audio for row in rows), *[rows[0].payload.audio] * padding]))
        logits = [row.payload.logits for row in rows]
        some = next((row for row in logits if row is not None), None)
        if some is None:
            return audio, None
        filled = [np.zeros_like(some) if row is None else row for row in [*logits, *[None] * padding]]
        return audio, shard(np.stack(filled))

    def _automata(self, lists: Sequence[KeywordAutomaton | None]) -> BatchedAutomata:
        """The automata of a batch, on all devices; cached if its rows have at most one list."""
        key = tuple(map(id, lists))
        cached = self._pools.get(key)
        if cached is None:
            distinct = list({id(automaton): automaton for automaton in lists if automaton is not None}.values())
            indices = {id(automaton): index for index, automaton in enumerate(distinct)}
            batched = batch_automata(distinct, [indices.get(identity, -1) for identity in key])
            automata = dataclasses.replace(self.programs.devices.put(batched), starts=batched.starts)
            cached = automata, distinct  # references to `distinct` keep the ids from being reused
            if len(distinct) <= 1:
                self._pools = {} if len(self._pools) >= _MAX_CACHED_LISTS else self._pools
                self._pools[key] = cached
        return cached[0]

    def _decode(self, bucket: Bucket, rows: Sequence[EncodedRow], audio: Any) -> DecodeState:
        """Dispatches prefill and decode of a padded batch."""
        size = self._size(bucket)
        padding = size - len(rows)
        # Padding rows and silent ones have no prompt and generate nothing.
        tokens = np.zeros((size, bucket.prompt), np.int32)
        lengths, max_new_tokens = np.zeros((2, size), np.int32)
        thresholds = np.zeros(size, np.float32)
        for i, row in enumerate(rows):
            utterance = row.utterance
            thresholds[i] = utterance.options.drafting.verify_threshold
            if not row.is_silent:
                prompt, num_audio = utterance.prompt, self.num_audio_tokens(len(utterance.audio.samples))
                ids = [*prompt.prefix, *[self._config.audio_token_id] * num_audio, *prompt.suffix]
                tokens[i, : len(ids)] = ids
                lengths[i], max_new_tokens[i] = len(ids), utterance.max_new_tokens or 0
        draft = pad_drafts([*(() if row.is_silent else row.draft for row in rows), *[()] * padding], bucket.draft)
        automata = self._automata([*(row.automaton for row in rows), *[None] * padding])
        self.compiler.start(bucket, PREFILL, DECODE)
        self.compiler.wait(bucket, PREFILL)
        verified, cache = self.programs.prefill(
            self.params, tokens, lengths, audio, draft, automata, capacity=bucket.capacity
        )
        self.compiler.wait(bucket, DECODE)
        return self.programs.decode(
            self.params,
            verified,
            cache,
            draft,
            max_new_tokens,
            thresholds,
            automata,
            max_out_length=bucket.max_out_length,
        )


def _row_of(array: Any, row: int) -> np.ndarray | None:
    return None if array is None else np.asarray(array[row])
