"""Requests in, transcripts out: batches on their way through the device.

    submit ──► pending, by bucket ──► encode ──► drafts ──► prefill, decode ──► texts ──► futures

    device   encode 1   encode 2   prefill, decode 1   encode 3   prefill, decode 2   ...
    host                drafts 1   batch 3             drafts 2   texts 1, batch 4

A batch goes when it is full, when it is flushed, when one of its requests has waited for its deadline, or when many
requests were admitted after one of its own. The host makes the drafts of one batch while the device encodes the next,
and reads a result when the next is under way.

The engine has no thread of its own: those who wait for a future drive it, one at a time.
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

from granite_jax.audio.load import Audio
from granite_jax.decoding import DecodeState
from granite_jax.inference.buckets import Bucket, choose_bucket, draft_budget
from granite_jax.inference.options import TranscribeOptions
from granite_jax.inference.programs import Encoded, Programs, pad_drafts
from granite_jax.inference.results import LOW_AGREEMENT, Transcript, disagreement
from granite_jax.keywords.automaton import BatchedAutomata, FullError, KeywordAutomaton, batch_automata
from granite_jax.keywords.lists import Keywords
from granite_jax.keywords.matches import filter_matches, repair
from granite_jax.keywords.spotter import make_keyword_batch
from granite_jax.keywords.utterance import utterance_automaton
from granite_jax.model import ctc
from granite_jax.model.config import Config
from granite_jax.model.features import SAMPLING_RATE, num_frames
from granite_jax.text.tasks import PromptTokens
from granite_jax.text.tokenizer import Tokenizer

_READ_AHEAD = 16  # full batches of audio held on the host at a time
_POLL_SECONDS = 0.05
_RESULTS = ("tokens", "log_probs", "draft_positions", "num_tokens", "num_forward_passes", "num_accepted", "ended")
_LISTS_KEPT = 8  # lists of keywords whose arrays stay on the device


@dataclasses.dataclass(frozen=True)
class Request:
    """One valid input, and what is to be made of it.

    Fields:
      max_new_tokens: the most tokens it may generate.
      prompt_length: tokens of the prompt with the audio's.
      options: how drafts and keywords are used. Requests with different options share batches.
      draft: its caller's, if any.
      keywords: what biases it, if anything.
    """

    audio: Audio
    max_new_tokens: int
    prompt: PromptTokens
    prompt_length: int
    options: TranscribeOptions = dataclasses.field(default_factory=TranscribeOptions)
    draft: tuple[int, ...] | None = None
    keywords: Keywords | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class _Ticket:
    """A request that was admitted: as which, when, and who waits for it."""

    request: Request
    number: int
    time: float
    future: "Future[Transcript]"


@dataclasses.dataclass(frozen=True)
class _Row:
    """A request that is encoded."""

    ticket: _Ticket
    ctc_text: str
    drafted_text: str
    draft: tuple[int, ...]
    entropy: float
    spotted: tuple[str, ...] = ()
    automaton: KeywordAutomaton | None = None

    @property
    def request(self) -> Request:
        return self.ticket.request


_Batch = tuple[Bucket, list[_Ticket]]
_Results = list[tuple[_Ticket, Transcript]]


class Engine:
    """The three programs fed with requests.

    In short:

        futures = [engine.submit(request) for request in requests]
        engine.flush()
        transcripts = [engine.wait(future) for future in futures]
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
        deadline: float = math.inf,
    ):
        """
        Args:
          deadline: seconds after which a request goes in a batch that is not full.
        """
        self.programs = programs
        self.deadline = deadline
        self._config = config
        self._params = params
        self._tokenizer = tokenizer
        self._buckets = tuple(buckets)
        self._batch_size = batch_size
        self._pools: dict[tuple[int, ...], tuple[BatchedAutomata, list[KeywordAutomaton]]] = {}
        self._changed = threading.Condition()  # guards what is pending
        self._pending: dict[Bucket, list[_Ticket]] = collections.defaultdict(list)
        self._unfinished: dict[int, _Ticket] = {}
        self._admitted = 0
        self._flushed = 0  # requests with a lower number wait for no others
        self._driving = threading.Lock()  # guards what is on the device
        self._encoded: collections.deque[tuple[_Batch, Encoded]] = collections.deque()
        self._decoding: collections.deque[Callable[[], _Results]] = collections.deque()
        self._survivors: dict[Bucket, list[tuple[_Row, np.ndarray]]] = collections.defaultdict(list)

    def bucket(self, request: Request, batch: int) -> Bucket | None:
        """The bucket of `batch` rows for a request, or None."""
        samples = len(request.audio.samples)
        return choose_bucket(self._buckets, batch, samples, request.prompt_length, request.max_new_tokens)

    def rows(self, bucket: Bucket) -> int:
        """Rows of a batch over all devices."""
        return bucket.batch * self.programs.devices.replicas

    @property
    def read_ahead(self) -> int:
        """How many requests may be admitted after one before its batch goes, full or not."""
        return _READ_AHEAD * self._batch_size * self.programs.devices.replicas

    def fits(self, request: Request) -> bool:
        """Whether there is any bucket for a request."""
        return any(self.bucket(request, batch) is not None for batch in {1, self._batch_size})

    def num_audio_tokens(self, audio: Audio) -> int:
        """Prompt tokens that the audio takes."""
        return int(self._config.num_audio_tokens(num_frames(len(audio.samples))))

    def compile(self, bucket: Bucket, prompt: PromptTokens) -> None:
        """Runs the programs of a bucket on silence."""
        silence = Audio("warmup", np.zeros(min(bucket.samples, SAMPLING_RATE), np.float32))
        length = len(prompt.prefix) + len(prompt.suffix) + self.num_audio_tokens(silence)
        row = _Row(_Ticket(Request(silence, 1, prompt, length), 0, 0.0, Future()), "", "", (), 0.0)
        with self._driving:
            audio = self._encode(bucket, [row.ticket]).audio
            jax.block_until_ready(self._decode(bucket, [row], audio).tokens)

    # Admission.

    def submit(self, request: Request) -> "Future[Transcript]":
        """Admits a request that `fits`. Its future is done when someone has driven the engine so far: see `wait`."""
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
        """Has all requests that were admitted so far go, in batches that are not full where need be."""
        with self._changed:
            self._flushed = self._admitted
            self._changed.notify_all()

    def wait(self, future: "Future[Transcript]", until: Callable[[], bool] = lambda: False) -> bool:
        """Drives the engine until a future is done, or `until` says so; whether it is done."""
        while not future.done() and not until():
            with self._driving:
                if not future.done():
                    self.advance(_POLL_SECONDS)
        return future.done()

    def advance(self, timeout: float) -> None:
        """Does the next piece of work, or waits for some; only with `_driving` held."""
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
                self._finish(self._decoding.popleft()())
        except BaseException as error:
            self._abandon(error)
            raise

    def _take(self) -> _Batch | None:
        """The next batch that is due: a full one, or one that is to wait no longer."""
        with self._changed:
            for tickets in self._pending.values():
                tickets[:] = [t for t in tickets if not (t.future.cancelled() and self._unfinished.pop(t.number))]
            late = {b: min((t for t in tickets if self._is_late(t)), key=_number, default=None)
                    for b, tickets in self._pending.items()}  # fmt: skip
            full = [b for b, tickets in self._pending.items() if len(tickets) >= self.rows(b)]
            oldest = min((t for t in late.values() if t is not None), key=_number, default=None)
            if oldest is not None:
                bucket = next(b for b, ticket in late.items() if ticket is oldest)
            elif full:
                bucket = max(full, key=lambda b: len(self._pending[b]))
            else:
                return None
            # Rows of similar length decode for a similar time: those around the one that has waited longest.
            waiting = sorted(self._pending[bucket], key=lambda t: len(t.request.audio.samples))
            place = waiting.index(min(waiting, key=_number))
            size = self.rows(bucket)
            start = max(0, min(place - size // 2, len(waiting) - size))
            taken = waiting[start : start + size]
            single = self.bucket(taken[-1].request, 1)  # of the longest
            if bucket.batch > 1 and 4 * len(taken) <= size and single is not None:
                # Mostly empty batches run a row a device: their cost is that of all rows.
                taken = taken[: self.rows(single)]
                chosen = self.bucket(taken[-1].request, 1) or single
            else:
                chosen = bucket
            numbers = set(map(_number, taken))
            self._pending[bucket] = [ticket for ticket in self._pending[bucket] if ticket.number not in numbers]
            # From here on a request cannot be cancelled any more.
            going = [t for t in taken if t.future.set_running_or_notify_cancel() or not self._unfinished.pop(t.number)]
            return (chosen, going) if going else None

    def _is_late(self, ticket: _Ticket) -> bool:
        return (
            ticket.number < self._flushed
            or self._admitted - ticket.number > self.read_ahead
            or time.monotonic() - ticket.time > self.deadline
        )

    def _finish(self, results: _Results) -> None:
        for ticket, transcript in results:
            del self._unfinished[ticket.number]
            ticket.future.set_result(transcript)

    def _abandon(self, error: BaseException) -> None:
        """Tells everyone who waits why there will be no result."""
        with self._changed:
            tickets, self._unfinished = list(self._unfinished.values()), {}
            for held in (self._pending, self._encoded, self._decoding, self._survivors):
                held.clear()
        for ticket in tickets:
            with contextlib.suppress(InvalidStateError):  # it was cancelled
                ticket.future.set_exception(error)

    # On the device.

    def _advance_encoded(self) -> None:
        """Takes the oldest encoded batch on; what the CTC gate lets pass is finished."""
        (bucket, batch), encoded = self._encoded.popleft()
        rows = self._rows(batch, encoded)
        if not any(row.request.options.drafting.ctc_threshold for row in rows):
            self._decoding.extend(self._dispatch(bucket, rows, encoded.audio))
            return
        # The gate's survivors wait for one another, so that the language model sees full batches.
        audio = np.asarray(encoded.audio)
        passed = [row.entropy < row.request.options.drafting.ctc_threshold for row in rows]
        self._survivors[bucket] += [(row, audio[i]) for i, row in enumerate(rows) if not passed[i]]
        self._finish([(row.ticket, self._ctc_transcript(row)) for i, row in enumerate(rows) if passed[i]])
        self._repack(late=False)

    def _repack(self, *, late: bool) -> bool:
        """Dispatches a full batch of survivors, or, if `late`, one with a row that is to wait no longer; if any."""
        for bucket, rows in self._survivors.items():
            size = self.rows(bucket)
            if len(rows) >= size or (late and any(self._is_late(row.ticket) for row, _ in rows)):
                taken, self._survivors[bucket] = rows[:size], rows[size:]
                padded = [*taken, *[taken[0]] * (size - len(taken))]
                audio = self.programs.devices.shard_rows(np.stack([audio for _, audio in padded]))
                self._decoding.extend(self._dispatch(bucket, [row for row, _ in taken], audio))
                return True
        return False

    def _encode(self, bucket: Bucket, batch: list[_Ticket]) -> Encoded:
        """Dispatches a batch to the encoder. Rows that only fill it up repeat its first one."""
        size = self.rows(bucket)
        samples = np.zeros((size, bucket.samples), np.float32)
        lengths = np.zeros(size, np.int32)
        requests = [ticket.request for ticket in batch]
        full = [*requests, *[requests[0]] * (size - len(batch))]
        for row, request in enumerate(full):
            samples[row, : len(request.audio.samples)] = request.audio.samples
            lengths[row] = len(request.audio.samples)
        sounds = make_keyword_batch([request.keywords and request.keywords.labels for request in full])
        return self.programs.encode(self._params, samples, lengths, sounds)

    def _rows(self, batch: list[_Ticket], encoded: Encoded) -> list[_Row]:
        """Waits for a batch's labels, decides which keywords they hold, and makes drafts of them."""
        labels, entropy, scores = jax.device_get((encoded.labels, encoded.entropy, encoded.spotting))
        rows = []
        for i, ticket in enumerate(batch):
            request, biasing = ticket.request, ticket.request.options.biasing
            text = drafted = " ".join(ctc.to_text(labels[i]).split())
            spotted, automaton = (), None
            if (keywords := request.keywords) is not None:
                gate = biasing.threshold
                matches = [] if gate is None else filter_matches(keywords, scores, i, labels[i], gate)
                drafted = repair(labels[i], matches, keywords.texts)
                spotted = tuple(keywords.texts[match.keyword] for match in matches)
                automaton = utterance_automaton(keywords, matches, labels[i], biasing.threshold or -math.inf)
            draft = request.draft
            if draft is None:
                draft = tuple(self._tokenizer.encode(drafted)) if request.options.drafting.drafts else ()
            room = min(draft_budget(len(request.audio.samples)), request.max_new_tokens)
            rows.append(_Row(ticket, text, drafted, draft[:room], float(entropy[i]), spotted, automaton))
        return rows

    def _automata(self, lists: Sequence[KeywordAutomaton | None]) -> BatchedAutomata:
        """The automata of a batch, on all devices; kept there while rows share one."""
        key = tuple(map(id, lists))
        kept = self._pools.get(key)
        if kept is None:
            distinct = list({id(each): each for each in lists if each is not None}.values())
            places = {id(each): place for place, each in enumerate(distinct)}
            pooled = batch_automata(distinct, [places.get(one, -1) for one in key])
            automata = dataclasses.replace(self.programs.devices.put(pooled), starts=pooled.starts)
            kept = automata, distinct  # which keeps the ids from being taken by others
            if len(distinct) <= 1:
                self._pools = {} if len(self._pools) > _LISTS_KEPT else self._pools
                self._pools[key] = kept
        return kept[0]

    def _dispatch(self, bucket: Bucket, rows: list[_Row], audio: Any) -> Iterator[Callable[[], _Results]]:
        """Dispatches a batch to the language model; each function returned waits for its part of it."""
        try:
            state = self._decode(bucket, rows, audio)
        except FullError:
            # Rows with long lists of their own, none of which can be scored: each list by itself has room.
            half = len(rows) // 2
            yield from self._dispatch(bucket, rows[:half], audio)
            rest = self.programs.devices.shard_rows(np.roll(np.asarray(audio), -half, axis=0))
            yield from self._dispatch(bucket, rows[half:], rest)
            return
        # All but the cache, so that it is freed as soon as the device is done with it.
        kept = {name: getattr(state, name) for name in _RESULTS}
        kept["drafted"] = state.draft.lengths

        def collect() -> _Results:
            host = jax.device_get(kept)
            return [(row.ticket, self._transcript(row, host, i)) for i, row in enumerate(rows)]

        yield collect

    def _decode(self, bucket: Bucket, rows: list[_Row], audio: Any) -> DecodeState:
        """Runs prefill and decode on a padded batch, without waiting for them."""
        size = self.rows(bucket)
        empty = size - len(rows)
        # Rows that only fill up the batch repeat its first one and generate nothing.
        requests = [row.request for row in rows] + [dataclasses.replace(rows[0].request, max_new_tokens=0)] * empty
        tokens = np.zeros((size, bucket.prompt), np.int32)
        for i, request in enumerate(requests):
            audio_ids = [self._config.audio_token_id] * self.num_audio_tokens(request.audio)
            tokens[i, : request.prompt_length] = [*request.prompt.prefix, *audio_ids, *request.prompt.suffix]
        lengths = np.array([request.prompt_length for request in requests], np.int32)
        limits = np.array([request.max_new_tokens for request in requests], np.int32)
        draft = pad_drafts([*(row.draft for row in rows), *[()] * empty], bucket.draft)
        thresholds = np.array([request.options.drafting.verify_threshold for request in requests], np.float32)
        automata = self._automata([*(row.automaton for row in rows), *[None] * empty])
        verified, cache = self.programs.prefill(
            self._params, tokens, lengths, audio, draft, automata, capacity=bucket.capacity
        )
        return self.programs.decode(
            self._params, verified, cache, draft, limits, thresholds, automata, max_out_length=bucket.max_out_length
        )

    def _transcript(self, row: _Row, state: dict[str, np.ndarray], i: int) -> Transcript:
        count = int(state["num_tokens"][i])
        tokens = tuple(state["tokens"][i, :count].tolist())
        passes, drafted, accepted = (int(state[name][i]) for name in ("num_forward_passes", "drafted", "num_accepted"))
        verified = passes == 1 and accepted == drafted
        stats = {
            "route": "greedy" if not drafted else "verified" if verified else "resumed",
            "llm_passes": passes,
            "draft_tokens": drafted,
            "accepted_tokens": accepted,
            "finish": "end" if state["ended"][i] else "length",
        }
        # Rounded, because batch mates may change the last bits.
        confidence = round(float(np.exp(state["log_probs"][i, :count]).mean()), 3) if count else None
        return self._finished(row, tokens, stats, row.draft, state["draft_positions"][i, :count].tolist(), confidence)

    def _ctc_transcript(self, row: _Row) -> Transcript:
        """Of a row that never reaches the language model."""
        drafted = self._tokenizer.encode(row.drafted_text)
        tokens = tuple(drafted[: row.request.max_new_tokens])
        stats = {
            "route": "ctc",
            "llm_passes": 0,
            "draft_tokens": len(tokens),
            "accepted_tokens": len(tokens),
            "finish": "end" if len(tokens) == len(drafted) else "length",
        }
        return self._finished(row, tokens, stats, tokens, range(len(tokens)))

    def _finished(
        self,
        row: _Row,
        tokens: tuple[int, ...],
        stats: dict[str, Any],
        draft: tuple[int, ...],
        sources: Sequence[int],
        confidence: float | None = None,
    ) -> Transcript:
        audio, text = row.request.audio, self._tokenizer.decode(tokens).strip()
        if row.request.keywords is not None:
            stats["keywords"] = row.spotted
        doubtful = row.request.options.raw and disagreement(text, row.ctc_text) > LOW_AGREEMENT
        flags = (*audio.flags, "low-agreement") if doubtful else audio.flags
        return Transcript(
            audio.name, text, tokens, audio.duration, confidence, row.ctc_text, stats, draft, _runs(sources), flags
        )


def _runs(sources: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """Each token's place in the draft, or -1, as runs (place in the tokens, place in the draft, size)."""
    runs: list[tuple[int, int, int]] = []
    for place, source in enumerate(sources):
        if runs and source == runs[-1][1] + runs[-1][2] and place == runs[-1][0] + runs[-1][2]:
            runs[-1] = (*runs[-1][:2], runs[-1][2] + 1)
        elif source >= 0:
            runs.append((place, source, 1))
    return tuple(runs)


def _number(ticket: _Ticket) -> int:
    return ticket.number
