"""Requests in, transcripts out: batches on their way through the device.

    submit ──► pending, by bucket ──► encode ──► drafts ──► prefill, decode ──► texts (──► align) ──► futures

    device   encode 1   encode 2   prefill, decode 1   encode 3   prefill, decode 2   ...
    host                drafts 1   batch 3             drafts 2   texts 1, batch 4

A batch is dispatched when it is full, when it is flushed, when one of its requests has waited for the deadline, or when
more than `read_ahead` requests were admitted after one of its own. The host makes the drafts of one batch while the
device encodes the next, and reads a result while the next one is computed.

The engine has no thread: the callers that wait for a future drive it, one at a time.
"""

import collections
import contextlib
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any

import jax
import numpy as np

from granite_jax.audio.load import Audio, printable
from granite_jax.decoding import DecodeState
from granite_jax.inference.buckets import Bucket, choose_bucket, draft_budget, label_budget
from granite_jax.inference.compilation import Compilations, encode_form
from granite_jax.inference.guards import Verdict, is_silent, judge
from granite_jax.inference.options import DraftFrom, TranscribeOptions
from granite_jax.inference.programs import Encoded, Programs, pad_drafts
from granite_jax.inference.results import LOW_AGREEMENT, NOT_FINITE, Transcript, Word, disagreement
from granite_jax.inference.words import label_sequence, split_words, word_times
from granite_jax.keywords.automaton import BatchedAutomata, FullError, KeywordAutomaton, batch_automata
from granite_jax.keywords.lists import Keywords
from granite_jax.keywords.matches import filter_matches, repair
from granite_jax.keywords.repetition import has_repetition_loop
from granite_jax.keywords.spotter import make_keyword_batch
from granite_jax.keywords.utterance import utterance_automaton
from granite_jax.model import ctc
from granite_jax.model.bpe_head import bpe_tokens
from granite_jax.model.config import Config
from granite_jax.model.features import SAMPLING_RATE, num_frames
from granite_jax.text.tasks import PromptTokens
from granite_jax.text.tokenizer import Tokenizer

_READ_AHEAD = 16  # full batches of audio held on the host at a time
_POLL_SECONDS = 0.05
_RESULTS = ("tokens", "log_probs", "draft_positions", "num_tokens", "num_forward_passes", "num_accepted", "ended")
_MAX_CACHED_LISTS = 8  # lists of keywords whose arrays stay on the device


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
class _Ticket:
    """An admitted request: its number, its time of admission and its future."""

    request: Request
    number: int
    time: float
    future: "Future[Decoded]"


@dataclasses.dataclass(frozen=True)
class _Row:
    """A request after encoding."""

    ticket: _Ticket
    labels: np.ndarray
    ctc_text: str
    drafted_text: str
    draft: tuple[int, ...]
    draft_from: str | None
    entropy: float
    is_silent: bool = False
    spotted: tuple[str, ...] = ()
    automaton: KeywordAutomaton | None = None

    @property
    def request(self) -> Request:
        return self.ticket.request


_Batch = tuple[Bucket, list[_Ticket]]
_Results = list[tuple[_Ticket, Decoded]]
_Stage = Callable[[], "_Results | _Stage"]  # waits for results, or for what the next stage needs


class Engine:
    """Feeds requests to the three programs.

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
        compilations: Compilations | None = None,
        word_offsets: tuple[float, float] = (0.0, 0.0),
        deadline: float = math.inf,
    ):
        """
        Args:
          compilations: of these programs, if some have begun.
          word_offsets: seconds to add to the starts and the ends of words.
          deadline: seconds after which a request is dispatched even in a part-filled batch.
        """
        self.programs = programs
        self.compilations = compilations or Compilations(programs, params)
        self.deadline = deadline
        self._config = config
        self._params = params
        self._tokenizer = tokenizer
        self.word_offsets = word_offsets
        self._buckets = tuple(buckets)
        self._batch_size = batch_size
        self._pools: dict[tuple[int, ...], tuple[BatchedAutomata, list[KeywordAutomaton]]] = {}
        self._changed = threading.Condition()  # guards the pending requests
        self._pending: dict[Bucket, list[_Ticket]] = collections.defaultdict(list)
        self._unfinished: dict[int, _Ticket] = {}
        self._admitted = 0
        self._flushed = 0  # requests with a lower number do not wait for a full batch
        self._driving = threading.Lock()  # guards the batches on the device
        self._encoded: collections.deque[tuple[_Batch, Encoded]] = collections.deque()
        self._decoding: collections.deque[_Stage] = collections.deque()
        self._to_decode: dict[Bucket, list[tuple[_Row, np.ndarray, np.ndarray | None]]] = collections.defaultdict(list)

    def bucket(self, request: Request, batch: int) -> Bucket | None:
        """The bucket of `batch` rows for a request, or None."""
        samples = len(request.audio.samples)
        return choose_bucket(self._buckets, batch, samples, request.prompt_length, request.max_new_tokens)

    def rows(self, bucket: Bucket) -> int:
        """Rows of a batch on all devices together."""
        return bucket.batch * self.programs.devices.replicas

    @property
    def num_unfinished(self) -> int:
        """Requests that were admitted and are not done."""
        return len(self._unfinished)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing on the device, and nothing that waits to go on from there."""
        return not (self._encoded or self._decoding or any(self._to_decode.values()))

    @property
    def full_rows(self) -> int:
        """Rows of a full batch on all devices together."""
        return self._batch_size * self.programs.devices.replicas

    @property
    def read_ahead(self) -> int:
        """How many requests can be admitted after a request before its batch is dispatched, full or not."""
        return _READ_AHEAD * self.full_rows

    def fits(self, request: Request) -> bool:
        """Whether there is any bucket for a request."""
        return any(self.bucket(request, batch) is not None for batch in {1, self._batch_size})

    def num_audio_tokens(self, audio: Audio) -> int:
        """Prompt tokens that the audio takes."""
        return int(self._config.num_audio_tokens(num_frames(len(audio.samples))))

    def run_on_silence(self, bucket: Bucket, prompt: PromptTokens, *, words: bool = False) -> None:
        """Compiles and runs the programs of a bucket; with `words`, those that time words, too."""
        silence = Audio("warmup", np.zeros(min(bucket.samples, SAMPLING_RATE), np.float32))
        length = len(prompt.prefix) + len(prompt.suffix) + self.num_audio_tokens(silence)
        ticket = _Ticket(Request(silence, 1, prompt, length), 0, 0.0, Future())
        row = _Row(ticket, np.zeros(0, np.int32), "", "", (), None, 0.0)
        with self._driving:
            audio = self._encode(bucket, [row.ticket]).audio
            jax.block_until_ready(self._decode(bucket, [row], audio).tokens)
            if words:
                request = dataclasses.replace(ticket.request, needs_words=True)
                logits = self._encode(bucket, [dataclasses.replace(ticket, request=request)]).logits
                size = self.rows(bucket)
                none = np.zeros(size, np.int32)
                labels = np.zeros((size, bucket.max_labels), np.int32)
                jax.block_until_ready(self.programs.align(logits, none + SAMPLING_RATE, labels, none))

    # Admission.

    def submit(self, request: Request) -> "Future[Decoded]":
        """Admits a request that `fits`. Its future completes only while a caller drives the engine: see `wait`."""
        bucket = self.bucket(request, self._batch_size) or self.bucket(request, 1)
        assert bucket is not None, "checked when the request was made"
        with self._changed:
            ticket = _Ticket(request, self._admitted, time.monotonic(), Future())
            self._admitted += 1
            self._pending[bucket].append(ticket)
            self._unfinished[ticket.number] = ticket
            self._changed.notify_all()
        return ticket.future

    def flush(self) -> None:
        """Makes all requests admitted so far due, in part-filled batches if necessary."""
        with self._changed:
            self._flushed = self._admitted
            self._changed.notify_all()

    def wait(self, future: "Future[Any]", until: Callable[[], bool] = lambda: False) -> bool:
        """Drives the engine until a future is done or `until` returns True; returns whether the future is done."""
        while not future.done() and not until():
            with self._driving:
                if not future.done():
                    self.advance(_POLL_SECONDS)
        return future.done()

    def advance(self, timeout: float) -> None:
        """Does the next piece of work, or waits for one. The caller must hold `_driving`."""
        batch = self._take() if len(self._encoded) < 2 else None
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

    def _take(self) -> _Batch | None:
        """Removes and returns the next batch that is due: one with a late request, or a full one."""
        with self._changed:
            for tickets in self._pending.values():
                tickets[:] = [t for t in tickets if not (t.future.cancelled() and self._unfinished.pop(t.number))]
            late = {b: [t for t in tickets if self._is_late(t)] for b, tickets in self._pending.items()}
            late = {b: min(tickets, key=_number) for b, tickets in late.items() if tickets}
            full = [b for b, tickets in self._pending.items() if len(tickets) >= self.rows(b)]
            if late:
                bucket, first = min(late.items(), key=lambda item: item[1].number)
            elif full:
                bucket = max(full, key=lambda b: len(self._pending[b]))
                first = min(self._pending[bucket], key=_number)
            else:
                return None
            joined = [bucket]
            if len(self._pending[bucket]) < self.rows(bucket):
                # Rows cost the same in any shape: due requests of other buckets fill the batch up.
                bucket = max(
                    (b for b in late if b.contains(bucket)), key=lambda b: (b.capacity, b.samples), default=bucket
                )
                joined = [b for b in late if bucket.contains(b)]
            waiting = [ticket for b in joined for ticket in self._pending[b]]
            batch = _nearest(waiting, first, self.rows(bucket))
            if bucket.batch > 1 and 4 * len(batch) <= self.rows(bucket):
                bucket, batch = self._row_by_row(bucket, batch, first)
            numbers = set(map(_number, batch))
            for tickets in self._pending.values():
                tickets[:] = [ticket for ticket in tickets if ticket.number not in numbers]
            # From here on a request cannot be cancelled.
            batch = [t for t in batch if self._is_wanted(t)]
            return (bucket, batch) if batch else None

    def _row_by_row(self, bucket: Bucket, batch: list[_Ticket], first: _Ticket) -> _Batch:
        """In place of a mostly empty batch, whose empty rows take part in decode steps, one row for each device."""
        for tickets in (_nearest(batch, first, self.programs.devices.replicas), [first]):
            singles = [self.bucket(ticket.request, 1) for ticket in tickets]
            known = [single for single in singles if single is not None]
            largest = next((b for b in known if all(map(b.contains, known))), None)
            if largest is not None and len(known) == len(tickets):
                return largest, tickets
        return bucket, batch

    def _is_wanted(self, ticket: _Ticket) -> bool:
        """Whether a request that leaves the queue has not been cancelled."""
        is_wanted = ticket.request.is_retry or ticket.future.set_running_or_notify_cancel()
        if not is_wanted:
            del self._unfinished[ticket.number]
        return is_wanted

    def _is_late(self, ticket: _Ticket) -> bool:
        return (
            ticket.request.is_retry
            or ticket.request.is_urgent
            or ticket.number < self._flushed
            or self._admitted - ticket.number > self.read_ahead
            or time.monotonic() - ticket.time > self.deadline
        )

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

    def _retry(self, ticket: _Ticket) -> None:
        """Admits a request again, without boosts."""
        request = dataclasses.replace(ticket.request, is_retry=True)
        bucket = self.bucket(request, self._batch_size) or self.bucket(request, 1)
        assert bucket is not None
        with self._changed:
            retry = dataclasses.replace(ticket, request=request)
            self._pending[bucket].append(retry)
            self._unfinished[ticket.number] = retry

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
        rows = self._rows(batch, encoded)
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
        finished = [self._ctc_decoded(row) if passed[i] else None for i, row in enumerate(rows)]
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

    def _encode(self, bucket: Bucket, batch: list[_Ticket]) -> Encoded:
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
        bpe_wanted = np.zeros(size, np.int32)
        bpe_wanted[: len(batch)] = [self._draft_from(request) == "bpe" for request in requests]
        with_logits = any(request.needs_logits or request.needs_words for request in requests)
        self.compilations.start(bucket, with_logits=with_logits)
        self.compilations.wait(bucket, encode_form(with_logits))
        return self.programs.encode(self._params, samples, lengths, keywords, bpe_wanted, with_logits=with_logits)

    def _draft_from(self, request: Request) -> DraftFrom | None:
        """The head that makes a request's draft, if one does."""
        drafting = request.options.drafting
        if request.draft is not None or not drafting.drafts:
            return None
        return drafting.draft_from or ("bpe" if self._config.encoder.bpe_output_dim else "ctc")

    def _rows(self, batch: list[_Ticket], encoded: Encoded) -> list[_Row]:
        """Waits for a batch's labels, finds the keywords in them, and makes drafts from them."""
        names = ("labels", "entropy", "spotting", "bpe_labels", "speech_frames")
        host: dict[str, Any] = jax.device_get({name: getattr(encoded, name) for name in names})
        labels, scores = host["labels"], host["spotting"]
        rows = []
        for i, ticket in enumerate(batch):
            request, biasing = ticket.request, ticket.request.options.biasing
            text = drafted = " ".join(ctc.to_text(labels[i]).split())
            spotted, automaton = (), None
            if (keywords := request.keywords) is not None:
                threshold = biasing.threshold
                matches = [] if threshold is None else filter_matches(keywords, scores, i, labels[i], threshold)
                drafted = repair(labels[i], matches, keywords)
                spotted = tuple(keywords.texts[m.keyword] for m in matches if m.keyword in keywords.whole)
                if not request.is_retry:
                    automaton = utterance_automaton(keywords, matches, labels[i], threshold or -math.inf)
            head, draft, source = self._draft_from(request), request.draft, drafted
            if head == "bpe" and drafted == text:
                source = " ".join(self._tokenizer.decode(bpe_tokens(host["bpe_labels"][i])).split())
            elif head == "bpe":
                head = "ctc"  # whose text is the one that keywords repair
            if draft is None:  # re-tokenized, because the head often spells the same text with other tokens
                draft = () if head is None else tuple(self._tokenizer.encode(source))
            draft = draft[: min(draft_budget(len(request.audio.samples)), request.max_new_tokens)]
            draft_from = None if not draft else head if request.draft is None else "caller"
            entropy = float(host["entropy"][i])
            own = labels[i, : num_frames(len(request.audio.samples))]
            is_plain = request.options.prompt is None and request.draft is None
            silent = request.options.guards and is_plain and is_silent(text, int(host["speech_frames"][i]))
            silent = silent and not np.isnan(entropy)  # which is no silence, but an error
            rows.append(_Row(ticket, own, text, drafted, draft, draft_from, entropy, silent, spotted, automaton))
        return rows

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

    def _dispatch(self, bucket: Bucket, rows: list[_Row], audio: Any, logits: Any) -> Iterator[_Stage]:
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
        results = {name: getattr(state, name) for name in _RESULTS}
        results["drafted"] = state.draft.lengths

        def collect() -> _Results | _Stage:
            host = jax.device_get(results)
            return self._align(bucket, rows, [self._decoded(row, host, i) for i, row in enumerate(rows)], logits)

        yield collect

    def _align(
        self, bucket: Bucket, rows: list[_Row], decoded: Sequence[Decoded | None], logits: Any
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
        self.compilations.wait(bucket, "align")
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

    def _decode(self, bucket: Bucket, rows: list[_Row], audio: Any) -> DecodeState:
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
        self.compilations.wait(bucket, "prefill")
        verified, cache = self.programs.prefill(
            self._params, tokens, lengths, audio, draft, automata, capacity=bucket.capacity
        )
        self.compilations.wait(bucket, "decode")
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

    def _decoded(self, row: _Row, state: dict[str, np.ndarray], i: int) -> Decoded:
        if row.is_silent:
            return self._ctc_decoded(row)
        count = int(state["num_tokens"][i])
        if np.isnan(row.entropy) or np.isnan(state["log_probs"][i, : count + 1]).any():
            audio = row.request.audio
            error = f"{printable(audio.name)}: {NOT_FINITE}"
            flags = (*audio.flags, *row.request.flags)
            return Decoded(Transcript(audio.name, duration=audio.duration, flags=flags, error=error), row.labels)
        tokens = tuple(state["tokens"][i, :count].tolist())
        passes, drafted, accepted = (int(state[name][i]) for name in ("num_forward_passes", "drafted", "num_accepted"))
        verified = passes == 1 and accepted == drafted
        stats = {
            "route": "greedy" if not drafted else "verified" if verified else "resumed",
            "llm_passes": passes,
            "draft_tokens": drafted,
            "accepted_tokens": accepted,
            "draft_from": row.draft_from,
            "finish": "end" if state["ended"][i] else "length",
        }
        # Rounded, because batch mates may change the last bits.
        confidence = round(float(np.exp(state["log_probs"][i, :count]).mean()), 3) if count else None
        return self._finished(row, tokens, stats, row.draft, state["draft_positions"][i, :count].tolist(), confidence)

    def _ctc_decoded(self, row: _Row) -> Decoded:
        """The result of a row that never reaches the language model."""
        drafted = self._tokenizer.encode(row.drafted_text)
        tokens = tuple(drafted[: row.request.max_new_tokens])
        stats = {
            "route": "silence" if row.is_silent else "ctc",
            "llm_passes": 0,
            "draft_tokens": len(tokens),
            "accepted_tokens": len(tokens),
            "draft_from": None if row.is_silent else "ctc",
            "finish": "end" if len(tokens) == len(drafted) else "length",
        }
        return self._finished(row, tokens, stats, tokens, range(len(tokens)))

    def _finished(
        self,
        row: _Row,
        tokens: tuple[int, ...],
        stats: dict[str, Any],
        draft: tuple[int, ...],
        draft_positions: Sequence[int],
        confidence: float | None = None,
    ) -> Decoded:
        request, text = row.request, self._tokenizer.decode(tokens).strip()
        audio, options = request.audio, request.options
        if request.keywords is not None:
            stats["keywords"] = row.spotted
        doubtful = options.raw and disagreement(text, row.ctc_text) > LOW_AGREEMENT
        verdict = self._verdict(row, text, stats) if options.guards else None
        spans = _accepted_spans(draft_positions)
        if verdict is not None and verdict.text != text and (request.is_final or verdict.problem == "invention"):
            tokens, spans = tuple(self._tokenizer.encode(verdict.text))[: request.max_new_tokens], ()
            text = self._tokenizer.decode(tokens).strip()
            doubtful |= verdict.problem in ("hole", "invention")
            stats["route"] = "ctc" if text == row.ctc_text else stats["route"]
            confidence = None
        noticed = {
            "retried": request.is_retry,
            "silence": row.is_silent,
            "loop": verdict is not None and verdict.problem == "loop",
            "length": verdict is not None and verdict.problem == "length",
            "low-agreement": doubtful,
        }
        flags = (*audio.flags, *request.flags, *(flag for flag, is_set in noticed.items() if is_set))
        transcript = Transcript(
            audio.name, text, tokens, audio.duration, confidence, row.ctc_text, stats, draft, spans, flags
        )
        is_settled = verdict is None or request.is_final or verdict.problem == "invention"
        return Decoded(transcript, row.labels, verdict=None if is_settled else verdict)

    def _verdict(self, row: _Row, text: str, stats: dict[str, Any]) -> Verdict | None:
        options = row.request.options
        keywords = () if row.request.keywords is None or row.request.is_retry else row.request.keywords.texts
        if stats["llm_passes"] == 0 or options.prompt is not None or has_repetition_loop(text, row.ctc_text, keywords):
            return None  # of what a prompt asks for, nothing is known; boosts that repeat are tried without first
        if stats["finish"] == "length" and options.max_new_tokens is not None:
            return None  # as it was asked for
        return judge(
            text,
            row.labels,
            row.ctc_text,
            stopped=stats["finish"] == "length",
            is_transcript=options.is_transcript,
            is_raw=options.raw,
        )


def _accepted_spans(draft_positions: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """Joins each token's draft position (-1 for none) into spans (position in tokens, position in draft, size)."""
    spans: list[tuple[int, int, int]] = []
    for position, draft_position in enumerate(draft_positions):
        if spans and draft_position == spans[-1][1] + spans[-1][2] and position == spans[-1][0] + spans[-1][2]:
            spans[-1] = (*spans[-1][:2], spans[-1][2] + 1)
        elif draft_position >= 0:
            spans.append((position, draft_position, 1))
    return tuple(spans)


def _number(ticket: _Ticket) -> int:
    return ticket.number


def _nearest(tickets: Sequence[_Ticket], first: _Ticket, size: int) -> list[_Ticket]:
    """At most `size` of the tickets, one of them `first`, in order of length: rows alike decode for a similar time."""
    ordered = sorted(tickets, key=lambda ticket: len(ticket.request.audio.samples))
    start = max(0, min(ordered.index(first) - size // 2, len(ordered) - size))
    return ordered[start : start + size]
