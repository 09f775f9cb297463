"""Requests in, transcripts out: batches on their way through the device.

    submit ──► pending, by bucket ──► encode ──► drafts ──► prefill, decode ──► texts (──► align) ──► futures

    device   encode 1   encode 2   prefill, decode 1   encode 3   prefill, decode 2   ...
    host                drafts 1   batch 3             drafts 2   texts 1, batch 4

The host makes the drafts of one batch while the device encodes the next, and reads a result while the next one is
computed. `RequestQueue` says when a batch goes.

The engine has no thread: the callers that wait for a future drive it, one at a time.
"""

import collections
import contextlib
import dataclasses
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any

import jax
import numpy as np

from granite_jax.audio.load import Audio
from granite_jax.decoding import DecodeState
from granite_jax.inference.buckets import Bucket, label_budget
from granite_jax.inference.compilation import Compiler, encode_form
from granite_jax.inference.programs import Encoded, Programs, pad_drafts
from granite_jax.inference.request_queue import Batch, RequestQueue
from granite_jax.inference.requests import Decoded, Request, Ticket
from granite_jax.inference.results import Word
from granite_jax.inference.rows import Row, ctc_decoded_row, decoded_row, draft_head, make_row
from granite_jax.inference.words import label_sequence, split_words, word_times
from granite_jax.keywords.automaton import BatchedAutomata, FullError, KeywordAutomaton, batch_automata
from granite_jax.keywords.repetition import has_repetition_loop
from granite_jax.keywords.spotter import make_keyword_batch
from granite_jax.model.config import Config
from granite_jax.model.features import SAMPLING_RATE, num_frames
from granite_jax.text.tasks import PromptTokens
from granite_jax.text.tokenizer import Tokenizer

_POLL_SECONDS = 0.05
_ENCODED = ("labels", "entropy", "spotting", "bpe_labels", "speech_frames")
_DECODED = ("tokens", "log_probs", "draft_positions", "num_tokens", "num_forward_passes", "num_accepted", "ended")
_MAX_CACHED_LISTS = 8  # lists of keywords whose arrays stay on the device

_Results = list[tuple[Ticket, Decoded]]
_Stage = Callable[[], "_Results | _Stage"]  # waits for results, or for what the next stage needs


class Engine(RequestQueue):
    """Feeds batches of requests to the programs.

    In short:

        futures = [engine.submit(request) for request in requests]
        engine.flush()
        decoded = [future.result() for future in futures if engine.wait(future)]
    """

    def __init__(
        self,
        config: Config,
        params: Any,
        programs: Programs,
        tokenizer: Tokenizer,
        buckets: Sequence[Bucket],
        batch_size: int,
        *,
        compiler: Compiler | None = None,
        word_offsets: tuple[float, float] = (0.0, 0.0),
        deadline: float = math.inf,
    ):
        """
        Args:
          compiler: of these programs, if some have begun to be compiled.
          word_offsets: seconds to add to the starts and the ends of words.
          deadline: seconds after which a request is dispatched even in a part-filled batch.
        """
        super().__init__(buckets, batch_size, programs.devices.replicas, deadline=deadline)
        self.programs = programs
        self.compiler = compiler or Compiler(programs, params)
        self._config = config
        self._params = params
        self._tokenizer = tokenizer
        self.word_offsets = word_offsets
        self._pools: dict[tuple[int, ...], tuple[BatchedAutomata, list[KeywordAutomaton]]] = {}
        self._driving = threading.Lock()  # guards the batches on the device
        self._encoded: collections.deque[tuple[Batch, Encoded]] = collections.deque()
        self._decoding: collections.deque[_Stage] = collections.deque()
        self._to_decode: dict[Bucket, list[tuple[Row, np.ndarray, np.ndarray | None]]] = collections.defaultdict(list)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing on the device, and nothing that waits to go on from there."""
        return not (self._encoded or self._decoding or any(self._to_decode.values()))

    def num_audio_tokens(self, audio: Audio) -> int:
        """Prompt tokens that the audio takes."""
        return int(self._config.num_audio_tokens(num_frames(len(audio.samples))))

    def run_on_silence(self, bucket: Bucket, prompt: PromptTokens, *, words: bool = False) -> None:
        """Compiles and runs the programs of a bucket; with `words`, those that time words, too."""
        silence = Audio("warmup", np.zeros(min(bucket.samples, SAMPLING_RATE), np.float32))
        length = len(prompt.prefix) + len(prompt.suffix) + self.num_audio_tokens(silence)
        ticket = Ticket(Request(silence, 1, prompt, length), 0, 0.0, Future())
        row = Row(ticket, np.zeros(0, np.int32), "", "", (), None, 0.0)
        with self._driving:
            audio = self._encode(bucket, [row.ticket]).audio
            jax.block_until_ready(self._decode(bucket, [row], audio).tokens)
            if words:
                request = dataclasses.replace(ticket.request, needs_words=True)
                logits = self._encode(bucket, [dataclasses.replace(ticket, request=request)]).logits
                size = self.rows(bucket)
                none = np.zeros(size, np.int32)
                labels = np.zeros((size, bucket.max_labels), np.int32)
                self.compiler.wait(bucket, "align")
                jax.block_until_ready(self.programs.align(logits, none + SAMPLING_RATE, labels, none))

    # Admission.

    def wait(self, future: "Future[Any]", until: Callable[[], bool] = lambda: False) -> bool:
        """Drives the engine until a future is done or `until` returns True; returns whether the future is done."""
        while not future.done() and not until():
            with self._driving:
                if not future.done():
                    self.advance(_POLL_SECONDS)
        return future.done()

    def advance(self, timeout: float) -> None:
        """Does the next piece of work, or waits for one. The caller must hold `_driving`."""
        batch = self._next_batch() if len(self._encoded) < 2 else None
        try:
            if batch is not None:
                self._encoded.append((batch, self._encode(*batch)))
            if len(self._encoded) > 1 or (self._encoded and batch is None):
                self._advance_encoded()
            elif batch is None and not self._repack(late=True) and not self._decoding:
                with self._changed:
                    self._changed.wait(timeout)
            if self._decoding and (len(self._decoding) > 1 or batch is None):
                outcome = self._decoding.popleft()()
                if callable(outcome):
                    self._decoding.append(outcome)
                else:
                    self._finish(outcome)
        except BaseException as error:
            self._abandon(error)
            raise

    def _finish(self, results: _Results) -> None:
        for ticket, decoded in results:
            transcript = decoded.transcript
            keywords = ticket.request.keywords
            boosted = () if keywords is None or ticket.request.is_retry else keywords.texts
            if has_repetition_loop(transcript.text, transcript.ctc_text, boosted):
                self._retry(ticket)
            else:
                del self._unfinished[ticket.number]
                ticket.future.set_result(decoded)

    def _abandon(self, error: BaseException) -> None:
        """Drops all work and sets `error` on all unfinished futures."""
        with self._changed:
            tickets, self._unfinished = list(self._unfinished.values()), {}
            for collection in (self._pending, self._encoded, self._decoding, self._to_decode):
                collection.clear()
        for ticket in tickets:
            with contextlib.suppress(InvalidStateError):  # the future was cancelled
                ticket.future.set_exception(error)

    # On the device.

    def _advance_encoded(self) -> None:
        """Moves the oldest encoded batch on; rows whose CTC text passes the confidence filter are finished."""
        (bucket, batch), encoded = self._encoded.popleft()
        host = jax.device_get({name: getattr(encoded, name) for name in _ENCODED})
        rows = [make_row(self._tokenizer, ticket, host, i) for i, ticket in enumerate(batch)]
        thresholds = [row.request.options.drafting.ctc_threshold for row in rows]
        passed = [row.is_silent or row.entropy < threshold for row, threshold in zip(rows, thresholds, strict=True)]
        if not any(thresholds) and not all(passed):  # silent rows of such a batch generate nothing
            self._decoding.extend(self._dispatch(bucket, rows, encoded.audio, encoded.logits))
            return
        # Rows that go on wait for one another, so that the language model sees full batches.
        audio = np.asarray(encoded.audio)
        for i, row in enumerate(rows):
            if not passed[i]:
                logits = None if encoded.logits is None else np.asarray(encoded.logits[i])
                self._to_decode[bucket].append((row, audio[i], logits))
        finished = [ctc_decoded_row(self._tokenizer, row) if passed[i] else None for i, row in enumerate(rows)]
        outcome = self._align(bucket, rows, finished, encoded.logits)
        if callable(outcome):
            self._decoding.append(outcome)
        else:
            self._finish(outcome)
        self._repack(late=False)

    def _repack(self, *, late: bool) -> bool:
        """Dispatches a full batch of `_to_decode`, or, if `late`, one with a late row; returns whether there is one."""
        for bucket, rows in self._to_decode.items():
            size = self.rows(bucket)
            if len(rows) >= size or (late and any(self._is_late(row.ticket) for row, _, _ in rows)):
                batch, self._to_decode[bucket] = rows[:size], rows[size:]
                padded = [*batch, *[batch[0]] * (size - len(batch))]
                audio = self.programs.devices.shard_rows(np.stack([audio for _, audio, _ in padded]))
                some = next((logits for _, _, logits in batch if logits is not None), None)
                logits = None
                if some is not None:
                    filled = [np.zeros_like(some) if logits is None else logits for _, _, logits in padded]
                    logits = self.programs.devices.shard_rows(np.stack(filled))
                self._decoding.extend(self._dispatch(bucket, [row for row, _, _ in batch], audio, logits))
                return True
        return False

    def _encode(self, bucket: Bucket, batch: list[Ticket]) -> Encoded:
        """Dispatches a batch to the encoder. Padding rows have no samples."""
        size = self.rows(bucket)
        samples = np.zeros((size, bucket.samples), np.float32)
        lengths = np.zeros(size, np.int32)
        requests = [ticket.request for ticket in batch]
        padding = [None] * (size - len(batch))
        for row, request in enumerate(requests):
            samples[row, : len(request.audio.samples)] = request.audio.samples
            lengths[row] = len(request.audio.samples)
        keywords = make_keyword_batch([*(r.keywords and r.keywords.labels for r in requests), *padding])
        bpe_wanted, has_bpe_head = np.zeros(size, np.int32), bool(self._config.encoder.bpe_output_dim)
        bpe_wanted[: len(batch)] = [draft_head(request, has_bpe_head) == "bpe" for request in requests]
        with_logits = any(request.needs_logits or request.needs_words for request in requests)
        self.compiler.start_encoder(bucket, with_logits=with_logits)
        if not all(request.options.drafting.ctc_threshold for request in requests):  # else their CTC texts may do
            self.compiler.start_decoder(bucket)
        self.compiler.wait(bucket, encode_form(with_logits))
        return self.programs.encode(self._params, samples, lengths, keywords, bpe_wanted, with_logits=with_logits)

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

    def _dispatch(self, bucket: Bucket, rows: list[Row], audio: Any, logits: Any) -> Iterator[_Stage]:
        """Dispatches a batch to the language model; each function it yields waits for a part of the results."""
        try:
            state = self._decode(bucket, rows, audio)
        except FullError:
            # The rows have different long lists that cannot be scored. Each list fits alone, so halve the batch.
            if len(rows) == 1:
                raise
            half = len(rows) // 2
            roll = lambda array: self.programs.devices.shard_rows(np.roll(np.asarray(array), -half, axis=0))  # noqa: E731
            yield from self._dispatch(bucket, rows[:half], audio, logits)
            yield from self._dispatch(bucket, rows[half:], roll(audio), None if logits is None else roll(logits))
            return
        # Without the cache, so that its memory is freed as soon as the device is done with it.
        results = {name: getattr(state, name) for name in _DECODED}
        results["drafted"] = state.draft.lengths

        def collect() -> _Results | _Stage:
            host = jax.device_get(results)
            decoded = [decoded_row(self._tokenizer, row, host, i) for i, row in enumerate(rows)]
            return self._align(bucket, rows, decoded, logits)

        yield collect

    def _align(
        self, bucket: Bucket, rows: list[Row], decoded: Sequence[Decoded | None], logits: Any
    ) -> _Results | _Stage:
        """Dispatches the alignment of finished texts, if any of them wants its words.

        Args:
          decoded: the rows' results; those without one are left out.
          logits: of the rows, in their order.
        """
        results = [(row.ticket, result) for row, result in zip(rows, decoded, strict=True) if result is not None]
        texts = {
            i: split_words(result.transcript.text)
            for i, result in enumerate(decoded)
            if result is not None and result.verdict is None and rows[i].request.needs_words and result.transcript.text
        }
        if not texts:
            return results
        size, width = self.rows(bucket), bucket.max_labels
        labels, lengths = np.zeros((size, width), np.int32), np.ones(size, np.int32)
        counts = np.zeros(size, np.int32)
        for i, words in texts.items():
            sequence = label_sequence(words)[0]
            if len(sequence) <= label_budget(len(rows[i].request.audio.samples)):
                labels[i, : len(sequence)], counts[i] = sequence, len(sequence)
            lengths[i] = len(rows[i].request.audio.samples)
        self.compiler.wait(bucket, "align")
        alignment = self.programs.align(logits, lengths, labels, counts)

        def collect() -> _Results:
            host = jax.device_get(alignment)
            timed: dict[int, tuple[Word, ...]] = {}
            for i, words in texts.items():
                row = rows[i]
                frames = len(row.labels)
                states = host.states[i, :frames] if counts[i] else np.full(0, -1, np.int32)
                timed[i] = word_times(
                    words,
                    states,
                    host.log_probs[i, :frames],
                    duration=row.request.audio.duration,
                    offsets=self.word_offsets,
                )
            return [
                (row.ticket, dataclasses.replace(result, words=timed.get(i, ())))
                for i, (row, result) in enumerate(zip(rows, decoded, strict=True))
                if result is not None
            ]

        return collect

    def _decode(self, bucket: Bucket, rows: list[Row], audio: Any) -> DecodeState:
        """Dispatches prefill and decode of a padded batch, without waiting for them."""
        size = self.rows(bucket)
        padding = size - len(rows)
        # Padding rows and silent ones have no prompt and generate nothing.
        tokens = np.zeros((size, bucket.prompt), np.int32)
        lengths, max_new_tokens = np.zeros((2, size), np.int32)
        thresholds = np.zeros(size, np.float32)
        for i, row in enumerate(rows):
            request = row.request
            thresholds[i] = request.options.drafting.verify_threshold
            if not row.is_silent:
                lengths[i], max_new_tokens[i] = request.prompt_length, request.max_new_tokens
                audio_ids = [self._config.audio_token_id] * self.num_audio_tokens(request.audio)
                tokens[i, : request.prompt_length] = [*request.prompt.prefix, *audio_ids, *request.prompt.suffix]
        draft = pad_drafts([*(() if row.is_silent else row.draft for row in rows), *[()] * padding], bucket.draft)
        automata = self._automata([*(row.automaton for row in rows), *[None] * padding])
        self.compiler.start_decoder(bucket)
        self.compiler.wait(bucket, "prefill")
        verified, cache = self.programs.prefill(
            self._params, tokens, lengths, audio, draft, automata, capacity=bucket.capacity
        )
        self.compiler.wait(bucket, "decode")
        return self.programs.decode(
            self._params,
            verified,
            cache,
            draft,
            max_new_tokens,
            thresholds,
            automata,
            max_out_length=bucket.max_out_length,
        )
