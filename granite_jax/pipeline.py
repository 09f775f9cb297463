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

from granite_jax import ctc
from granite_jax.audio import Audio
from granite_jax.config import Config
from granite_jax.decoding import DecodeState
from granite_jax.features import SAMPLING_RATE, num_frames
from granite_jax.programs import Bucket, Encoded, Programs, choose_bucket, draft_budget, pad_drafts
from granite_jax.prompts import PromptTokens
from granite_jax.speculation import Acceptance
from granite_jax.tokenizer import Tokenizer

_READ_AHEAD = 16  # full batches of audio held on the host at a time


@dataclasses.dataclass(frozen=True)
class Transcript:
    """The result for one input.

    Fields:
      audio: name of the input: its path, or a name made from its place in the list.
      text: the transcript or translation.
      tokens: generated ids, without end-of-text and padding.
      duration: seconds of audio.
      ctc_text: greedy text of the encoder's own CTC head: lower case, no punctuation, never a translation.
      stats: `route`, how the text came about: "ctc" (the language model never ran), "verified" (its first pass accepted
        the draft), "resumed" (it went on from the part it accepted) or "greedy" (there was no draft); `llm_passes` (the
        prefill included); `draft_tokens`; `accepted_tokens` (tokens of the text that a draft proposed); `finish`: "end"
        if the model ended the text, "length" if it ran into `max_new_tokens`.
      draft: ids of the draft as it was proposed.
      accepted: the runs of `tokens` that were taken from the draft, each (place in `tokens`, place in `draft`, size).
      error: why there is no result, or None.
    """

    audio: str
    text: str = ""
    tokens: tuple[int, ...] = ()
    duration: float = 0.0
    ctc_text: str = ""
    stats: dict[str, Any] = dataclasses.field(default_factory=dict)
    draft: tuple[int, ...] = ()
    accepted: tuple[tuple[int, int, int], ...] = ()
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Request:
    """One valid input: its place in the list, its audio, the most tokens it may generate, its caller's draft if any."""

    index: int
    audio: Audio
    limit: int
    prompt_length: int
    draft: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class _Row:
    """A request that is encoded."""

    request: Request
    ctc_text: str
    draft: tuple[int, ...]
    entropy: float


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
        row = _Row(Request(0, silence, 1, length), "", (), 0.0)
        audio = self._encode(bucket, [row.request]).audio
        jax.block_until_ready(self._decode(bucket, [row], audio, prompt, math.inf).tokens)

    def run(
        self, requests: Iterable[Request], prompt: PromptTokens, accept: Acceptance
    ) -> Iterator[tuple[int, Transcript]]:
        """Results in the order in which batches finish."""
        encoded: collections.deque[tuple[_Batch, Encoded]] = collections.deque()
        decoding: collections.deque[Callable[[], Results]] = collections.deque()
        survivors: dict[Bucket, list[tuple[_Row, np.ndarray]]] = collections.defaultdict(list)

        def advance() -> Results:
            """Takes the oldest encoded batch on; returns what the CTC gate let pass."""
            (bucket, batch), found = encoded.popleft()
            rows = self._rows(batch, found, accept)
            if accept.ctc_threshold == 0:
                decoding.append(self._submit(bucket, rows, found.audio, prompt, accept))
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
            decoding.append(self._submit(bucket, [row for row, _ in taken], audio, prompt, accept))

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
        for row, request in enumerate([*batch, *[batch[0]] * (size - len(batch))]):
            samples[row, : len(request.audio.samples)] = request.audio.samples
            lengths[row] = len(request.audio.samples)
        return self.programs.encode(self._params, samples, lengths)

    def _rows(self, batch: list[Request], encoded: Encoded, accept: Acceptance) -> list[_Row]:
        """Waits for a batch's labels and makes drafts of them."""
        labels, entropy = jax.device_get((encoded.labels, encoded.entropy))
        rows = []
        for i, request in enumerate(batch):
            text = " ".join(ctc.to_text(labels[i]).split())
            draft = request.draft
            if draft is None:
                draft = tuple(self._tokenizer.encode(text)) if accept.drafts else ()
            room = min(draft_budget(len(request.audio.samples)), request.limit)
            rows.append(_Row(request, text, draft[:room], float(entropy[i])))
        return rows

    def _submit(
        self, bucket: Bucket, rows: list[_Row], audio: Any, prompt: PromptTokens, accept: Acceptance
    ) -> Callable[[], Results]:
        """Dispatches a batch to the language model; the function returned waits for it."""
        state = self._decode(bucket, rows, audio, prompt, accept.verify_threshold)
        # All but the cache, so that it is freed as soon as the device is done with it.
        kept = {name: getattr(state, name) for name in ("tokens", "sources", "counts", "passes", "accepted", "ended")}
        kept["drafted"] = state.draft.lengths

        def collect() -> Results:
            host = jax.device_get(kept)
            return [(row.request.index, self._transcript(row, host, i)) for i, row in enumerate(rows)]

        return collect

    def _decode(
        self, bucket: Bucket, rows: list[_Row], audio: Any, prompt: PromptTokens, verify_threshold: float
    ) -> DecodeState:
        """Runs prefill and decode on a padded batch, without waiting for them."""
        size = self.rows(bucket)
        empty = size - len(rows)
        # Rows that only fill up the batch repeat its first one and generate nothing.
        requests = [row.request for row in rows] + [dataclasses.replace(rows[0].request, limit=0)] * empty
        tokens = np.zeros((size, bucket.prompt), np.int32)
        for i, request in enumerate(requests):
            audio_ids = [self._config.audio_token_id] * self.num_audio_tokens(request.audio)
            tokens[i, : request.prompt_length] = [*prompt.prefix, *audio_ids, *prompt.suffix]
        lengths = np.array([request.prompt_length for request in requests], np.int32)
        limits = np.array([request.limit for request in requests], np.int32)
        draft = pad_drafts([*(row.draft for row in rows), *[()] * empty], bucket.draft)
        thresholds = np.full(size, verify_threshold, np.float32)
        verified, cache = self.programs.prefill(self._params, tokens, lengths, audio, draft, capacity=bucket.capacity)
        return self.programs.decode(self._params, verified, cache, draft, limits, thresholds, room=bucket.room)

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
        drafted = self._tokenizer.encode(row.ctc_text)
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
        return Transcript(audio.name, text, tokens, audio.duration, row.ctc_text, stats, draft, _runs(sources))


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
