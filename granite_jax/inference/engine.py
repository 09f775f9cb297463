"""Batches on their way through the device: encode -> drafts -> prefill -> decode -> transcripts.

    device   encode 1   encode 2   prefill, decode 1   encode 3   prefill, decode 2   ...
    host                drafts 1   batch 3             drafts 2   texts 1, batch 4

The host makes the drafts of one batch while the device encodes the next, and reads a result when the next is under way.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from granite_jax.audio.load import Audio
from granite_jax.decoding import Automata, DecodeState, FullError, Trie, pool
from granite_jax.inference.buckets import Bucket, choose_bucket, draft_budget
from granite_jax.inference.options import SpeculativeOptions
from granite_jax.inference.programs import Encoded, Programs, pad_drafts
from granite_jax.inference.results import LOW_AGREEMENT, Transcript, disagreement
from granite_jax.keywords.automaton import trie_of
from granite_jax.keywords.lists import Keywords
from granite_jax.keywords.matches import repair, select
from granite_jax.keywords.options import KeywordOptions
from granite_jax.keywords.spotter import candidates
from granite_jax.model import ctc
from granite_jax.model.config import Config
from granite_jax.model.features import SAMPLING_RATE, num_frames
from granite_jax.text.tasks import PromptTokens
from granite_jax.text.tokenizer import Tokenizer

_READ_AHEAD = 16  # full batches of audio held on the host at a time
_LISTS_KEPT = 8  # lists of keywords whose arrays stay on the device


@dataclasses.dataclass(frozen=True)
class Request:
    """One valid input.

    Fields:
      index: its place in the list.
      limit: the most tokens it may generate.
      prompt_length: tokens of the prompt with the audio's.
      draft: its caller's, if any.
      keywords: what biases it, if anything.
      raw: whether its text is to be what is said, word by word, so that it can be compared with the CTC text.
    """

    index: int
    audio: Audio
    limit: int
    prompt: PromptTokens
    prompt_length: int
    draft: tuple[int, ...] | None = None
    keywords: Keywords | None = None
    raw: bool = True


@dataclasses.dataclass(frozen=True)
class _Row:
    """A request that is encoded."""

    request: Request
    ctc_text: str
    drafted_text: str
    draft: tuple[int, ...]
    entropy: float
    heard: tuple[str, ...] = ()
    trie: Trie | None = None


Results = list[tuple[int, Transcript]]
_Batch = tuple[Bucket, list[Request]]


class Pipeline:
    """The three programs fed with requests."""

    def __init__(
        self,
        config: Config,
        params: Any,
        programs: Programs,
        tokenizer: Tokenizer,
        buckets: Sequence[Bucket],
        batch_size: int,
    ):
        self.programs = programs
        self._config = config
        self._params = params
        self._tokenizer = tokenizer
        self._buckets = tuple(buckets)
        self._batch_size = batch_size
        self._pools: dict[tuple[int, ...], tuple[Automata, list[Trie]]] = {}

    def bucket(self, request: Request, batch: int) -> Bucket | None:
        """The bucket of `batch` rows for a request, or None."""
        samples = len(request.audio.samples)
        return choose_bucket(self._buckets, batch, samples, request.prompt_length, request.limit)

    def rows(self, bucket: Bucket) -> int:
        """Rows of a batch over all devices."""
        return bucket.batch * self.programs.devices.replicas

    @property
    def read_ahead(self) -> int:
        """Requests that are sorted by length together."""
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
        row = _Row(Request(0, silence, 1, prompt, length), "", "", (), 0.0)
        audio = self._encode(bucket, [row.request]).audio
        jax.block_until_ready(self._decode(bucket, [row], audio, math.inf).tokens)

    def run(
        self, requests: Iterable[Request], accept: SpeculativeOptions, biasing: KeywordOptions
    ) -> Iterator[tuple[int, Transcript]]:
        """Results in the order in which batches finish."""
        encoded: collections.deque[tuple[_Batch, Encoded]] = collections.deque()
        decoding: collections.deque[Callable[[], Results]] = collections.deque()
        survivors: dict[Bucket, list[tuple[_Row, np.ndarray]]] = collections.defaultdict(list)

        def advance() -> Results:
            """Takes the oldest encoded batch on; returns what the CTC gate let pass."""
            (bucket, batch), found = encoded.popleft()
            rows = self._rows(batch, found, accept, biasing)
            if accept.ctc_threshold == 0:
                decoding.extend(self._submit(bucket, rows, found.audio, accept))
                return []
            # The gate's survivors wait for one another, so that the language model sees full batches.
            audio = np.asarray(found.audio)
            passed = [row.entropy < accept.ctc_threshold for row in rows]
            survivors[bucket] += [(row, audio[i]) for i, row in enumerate(rows) if not passed[i]]
            if len(survivors[bucket]) >= self.rows(bucket):
                repack(bucket)
            return [(row.request.index, self._ctc_transcript(row)) for i, row in enumerate(rows) if passed[i]]

        def repack(bucket: Bucket) -> None:
            size = self.rows(bucket)
            taken, survivors[bucket] = survivors[bucket][:size], survivors[bucket][size:]
            padded = [*taken, *[taken[0]] * (size - len(taken))]
            audio = self.programs.devices.split(np.stack([audio for _, audio in padded]))
            decoding.extend(self._submit(bucket, [row for row, _ in taken], audio, accept))

        for bucket, batch in self._batches(requests):
            encoded.append(((bucket, batch), self._encode(bucket, batch)))
            if len(encoded) > 1:
                yield from advance()
            while len(decoding) > 1:
                yield from decoding.popleft()()
        while encoded:
            yield from advance()
        for bucket, rows in survivors.items():
            if rows:
                repack(bucket)
        for collect in decoding:
            yield from collect()

    def _batches(self, requests: Iterable[Request]) -> Iterator[_Batch]:
        """Groups requests by bucket: full batches, then what is left, in rows of one where that costs less."""
        held: list[Request] = []
        for request in requests:
            held.append(request)
            if len(held) >= self.read_ahead:
                yield from self._group(held)
                held = []
        yield from self._group(held)

    def _group(self, requests: list[Request]) -> Iterator[_Batch]:
        by_bucket: dict[Bucket, list[Request]] = collections.defaultdict(list)
        for request in sorted(requests, key=lambda r: len(r.audio.samples)):
            bucket = self.bucket(request, self._batch_size) or self.bucket(request, 1)
            assert bucket is not None, "checked when the request was made"
            by_bucket[bucket].append(request)
        for bucket, rows in by_bucket.items():
            for batch in _chunks(rows, self.rows(bucket)):
                # Mostly empty batches run a row a device: their cost is that of all rows.
                single = self.bucket(batch[-1], 1)  # of the longest
                if bucket.batch > 1 and 4 * len(batch) <= self.rows(bucket) and single is not None:
                    for part in _chunks(batch, self.rows(single)):
                        yield self.bucket(part[-1], 1) or single, part
                else:
                    yield bucket, batch

    def _encode(self, bucket: Bucket, batch: list[Request]) -> Encoded:
        """Dispatches a batch to the encoder. Rows that only fill it up repeat its first one."""
        size = self.rows(bucket)
        samples = np.zeros((size, bucket.samples), np.float32)
        lengths = np.full(size, len(batch[0].audio.samples), np.int32)
        full = [*batch, *[batch[0]] * (size - len(batch))]
        for row, request in enumerate(full):
            samples[row, : len(request.audio.samples)] = request.audio.samples
            lengths[row] = len(request.audio.samples)
        sounds = candidates([request.keywords and request.keywords.labels for request in full])
        return self.programs.encode(self._params, samples, lengths, sounds)

    def _rows(
        self, batch: list[Request], encoded: Encoded, accept: SpeculativeOptions, biasing: KeywordOptions
    ) -> list[_Row]:
        """Waits for a batch's labels, decides which keywords they hold, and makes drafts of them."""
        labels, entropy, support = jax.device_get((encoded.labels, encoded.entropy, encoded.support))
        rows = []
        for i, request in enumerate(batch):
            text = drafted = " ".join(ctc.to_text(labels[i]).split())
            heard, trie = (), None
            if (keywords := request.keywords) is not None:
                passed = [] if biasing.threshold is None else select(keywords, support, i, labels[i], biasing.threshold)
                drafted = repair(labels[i], passed, keywords.texts)
                heard = tuple(keywords.texts[one.keyword] for one in passed)
                trie = trie_of(keywords, passed, labels[i], biasing.threshold or -math.inf)
            draft = request.draft
            if draft is None:
                draft = tuple(self._tokenizer.encode(drafted)) if accept.drafts else ()
            room = min(draft_budget(len(request.audio.samples)), request.limit)
            rows.append(_Row(request, text, drafted, draft[:room], float(entropy[i]), heard, trie))
        return rows

    def _automata(self, tries: Sequence[Trie | None]) -> Automata:
        """The automata of a batch, on all devices; kept there while rows share one."""
        key = tuple(map(id, tries))
        kept = self._pools.get(key)
        if kept is None:
            distinct = list({id(trie): trie for trie in tries if trie is not None}.values())
            places = {id(trie): place for place, trie in enumerate(distinct)}
            pooled = pool(distinct, [places.get(one, -1) for one in key])
            automata = dataclasses.replace(self.programs.devices.place(pooled), starts=pooled.starts)
            kept = automata, distinct  # which keeps the ids from being taken by others
            if len(distinct) <= 1:
                self._pools = {} if len(self._pools) > _LISTS_KEPT else self._pools
                self._pools[key] = kept
        return kept[0]

    def _submit(
        self, bucket: Bucket, rows: list[_Row], audio: Any, accept: SpeculativeOptions
    ) -> Iterator[Callable[[], Results]]:
        """Dispatches a batch to the language model; each function returned waits for its part of it."""
        try:
            state = self._decode(bucket, rows, audio, accept.verify_threshold)
        except FullError:
            # Rows with long lists of their own, none of which can be scored: each list by itself has room.
            half = len(rows) // 2
            yield from self._submit(bucket, rows[:half], audio, accept)
            rest = self.programs.devices.split(np.roll(np.asarray(audio), -half, axis=0))
            yield from self._submit(bucket, rows[half:], rest, accept)
            return
        # All but the cache, so that it is freed as soon as the device is done with it.
        kept = {name: getattr(state, name) for name in ("tokens", "sources", "counts", "passes", "accepted", "ended")}
        kept["drafted"] = state.draft.lengths

        def collect() -> Results:
            host = jax.device_get(kept)
            return [(row.request.index, self._transcript(row, host, i)) for i, row in enumerate(rows)]

        yield collect

    def _decode(self, bucket: Bucket, rows: list[_Row], audio: Any, verify_threshold: float) -> DecodeState:
        """Runs prefill and decode on a padded batch, without waiting for them."""
        size = self.rows(bucket)
        empty = size - len(rows)
        # Rows that only fill up the batch repeat its first one and generate nothing.
        requests = [row.request for row in rows] + [dataclasses.replace(rows[0].request, limit=0)] * empty
        tokens = np.zeros((size, bucket.prompt), np.int32)
        for i, request in enumerate(requests):
            audio_ids = [self._config.audio_token_id] * self.num_audio_tokens(request.audio)
            tokens[i, : request.prompt_length] = [*request.prompt.prefix, *audio_ids, *request.prompt.suffix]
        lengths = np.array([request.prompt_length for request in requests], np.int32)
        limits = np.array([request.limit for request in requests], np.int32)
        draft = pad_drafts([*(row.draft for row in rows), *[()] * empty], bucket.draft)
        thresholds = np.full(size, verify_threshold, np.float32)
        automata = self._automata([*(row.trie for row in rows), *[None] * empty])
        verified, cache = self.programs.prefill(
            self._params, tokens, lengths, audio, draft, automata, capacity=bucket.capacity
        )
        return self.programs.decode(
            self._params, verified, cache, draft, limits, thresholds, automata, room=bucket.room
        )

    def _transcript(self, row: _Row, state: dict[str, np.ndarray], i: int) -> Transcript:
        count = int(state["counts"][i])
        tokens = tuple(state["tokens"][i, :count].tolist())
        passes, drafted, accepted = (int(state[name][i]) for name in ("passes", "drafted", "accepted"))
        verified = passes == 1 and accepted == drafted
        stats = {
            "route": "greedy" if not drafted else "verified" if verified else "resumed",
            "llm_passes": passes,
            "draft_tokens": drafted,
            "accepted_tokens": accepted,
            "finish": "end" if state["ended"][i] else "length",
        }
        return self._finished(row, tokens, stats, row.draft, state["sources"][i, :count].tolist())

    def _ctc_transcript(self, row: _Row) -> Transcript:
        """Of a row that never reaches the language model."""
        drafted = self._tokenizer.encode(row.drafted_text)
        tokens = tuple(drafted[: row.request.limit])
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
    ) -> Transcript:
        audio, text = row.request.audio, self._tokenizer.decode(tokens).strip()
        if row.request.keywords is not None:
            stats["keywords"] = row.heard
        doubtful = row.request.raw and disagreement(text, row.ctc_text) > LOW_AGREEMENT
        flags = ("low-agreement",) if doubtful else ()
        return Transcript(audio.name, text, tokens, audio.duration, row.ctc_text, stats, draft, _runs(sources), flags)


def _runs(sources: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """Each token's place in the draft, or -1, as runs (place in the tokens, place in the draft, size)."""
    runs: list[tuple[int, int, int]] = []
    for place, source in enumerate(sources):
        if runs and source == runs[-1][1] + runs[-1][2] and place == runs[-1][0] + runs[-1][2]:
            runs[-1] = (*runs[-1][:2], runs[-1][2] + 1)
        elif source >= 0:
            runs.append((place, source, 1))
    return tuple(runs)


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))
