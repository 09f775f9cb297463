"""The host pipeline: audio in any form -> buckets -> batches -> device -> text, in input order."""

import collections
import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from granite_jax import ctc
from granite_jax._pcm import TooLongError
from granite_jax.audio import Audio, load_audio, printable
from granite_jax.checkpoint import open_checkpoint, parse_dtype
from granite_jax.config import Config
from granite_jax.decoding import DecodeState
from granite_jax.errors import ContextError, GraniteError
from granite_jax.features import SAMPLING_RATE, num_frames
from granite_jax.programs import (
    Bucket,
    Encoded,
    Programs,
    choose_bucket,
    default_buckets,
    max_seconds,
    new_token_budget,
)
from granite_jax.prompts import Capabilities, ChatTemplate, PromptTokens, instruction
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
      stats: `route` ("greedy"), `llm_passes` (the prefill included), `draft_tokens`, `accepted_tokens` and `finish`:
        "end" if the model ended the text, "length" if it ran into `max_new_tokens`.
      error: why there is no result, or None.
    """

    audio: str
    text: str = ""
    tokens: tuple[int, ...] = ()
    duration: float = 0.0
    ctc_text: str = ""
    stats: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class _Request:
    """One valid input on its way: its place in the input, its audio, the most tokens it may generate."""

    index: int
    audio: Audio
    limit: int
    prompt_length: int


class Transcriber:
    """Speech to text with one checkpoint, whose weights it holds and whose programs it compiles when first needed.

    In short:

        asr = Transcriber.from_pretrained("demo")
        asr.transcribe(["a.wav", waveform_16k])[0].text
    """

    def __init__(
        self,
        config: Config,
        params: Any,
        tokenizer: Tokenizer,
        *,
        template: ChatTemplate | None = None,
        capabilities: Capabilities | None = None,
        dtype: Any = None,
        batch_size: int | None = None,
        buckets: Sequence[Bucket] | None = None,
    ):
        """
        Args:
          params: the model's parameters; computation runs in `dtype`, by default theirs.
          template: chat template; default that of Granite Speech 4.0.
          capabilities: tasks and languages the checkpoint was trained for; default the released model's.
          batch_size: rows of a full batch; default 64 on a TPU, 32 on a GPU, 8 on a CPU.
          buckets: the shapes to compile for, of 1 row and of `batch_size` rows; default `programs.default_buckets`.
        """
        self.config = config
        self.tokenizer = tokenizer
        self.template = template or ChatTemplate()
        self.capabilities = capabilities or Capabilities()
        self.batch_size = batch_size or {"tpu": 64, "gpu": 32}.get(jax.default_backend(), 8)
        self.buckets = tuple(buckets or default_buckets(config, self.batch_size))
        self._params = params
        self._programs = Programs(config, dtype or jax.tree.leaves(params)[0].dtype)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        dtype: Any = None,
        compilation_cache: bool = True,
        **options: Any,
    ) -> "Transcriber":
        """Loads "demo", an Orbax checkpoint directory of `granite-jax convert`, a Hugging Face directory or a hub id.

        Args:
          revision: branch, tag or commit of a hub id.
          dtype: "bfloat16" or "float32"; default bfloat16 on accelerators that have it, else float32.
          compilation_cache: keep compiled programs in the user's cache directory, unless JAX was given another.
          options: as of the constructor.

        Raises:
          CheckpointError: naming what is missing, damaged or not supported.
        """
        if compilation_cache:
            enable_compilation_cache()
        checkpoint = open_checkpoint(source, revision)
        return cls(
            checkpoint.config,
            checkpoint.load_params(parse_dtype(dtype)),
            checkpoint.tokenizer(),
            template=checkpoint.chat_template(),
            capabilities=checkpoint.capabilities,
            **options,
        )

    @property
    def compilations(self) -> int:
        """How many programs have been compiled so far: at most three a bucket."""
        return self._programs.traces.total()

    def warmup(self, buckets: Sequence[Bucket] | None = None) -> None:
        """Compiles the programs of all buckets (or those given) by running them on silence."""
        prompt = self._prompt(instruction())
        for bucket in buckets or self.buckets:
            silence = Audio("warmup", np.zeros(min(bucket.samples, SAMPLING_RATE), np.float32))
            request = _Request(0, silence, 1, self._prompt_length(prompt, silence))
            jax.block_until_ready(self._dispatch(bucket, [request], prompt)[1].tokens)

    def transcribe(
        self,
        audio: Any,
        *,
        sampling_rate: int | None = None,
        task: str = "transcribe",
        to: str | None = None,
        prompt: str | None = None,
        max_new_tokens: int | None = None,
        on_error: Literal["raise", "return"] = "raise",
        progress: Callable[[int], None] | None = None,
    ) -> list[Transcript]:
        """Transcribes or translates one input or a list of them.

        Args:
          audio: a path, a binary file object, bytes, a float or integer array (16 kHz, or of `sampling_rate`; `[n]`,
            `[n, channels]` or `[channels, n]`), a pair (array, sampling rate), or a list of these.
          sampling_rate: in Hz, of arrays that do not come with their own.
          task: "transcribe" (lower case, no punctuation), "punctuate" or "translate".
          to: target language of a translation, as a code or an English name.
          prompt: a prompt of your own, instead of the task's.
          max_new_tokens: default 200, or 6 a second of audio if that is more.
          on_error: "raise" stops at the first bad input; "return" puts a Transcript with `.error` in its place.
          progress: called with the number of inputs just finished.

        Returns:
          One Transcript an input, in input order. A result does not depend on the other inputs.

        Raises:
          PromptError: task, language or prompt is not supported by the checkpoint.
          AudioError: an input is not readable, too short or not finite, named.
          ContextError: an input does not fit the model's positions together with its prompt and new tokens, named.
        """
        if on_error not in ("raise", "return"):
            raise GraniteError(f'on_error is "raise" or "return", not {on_error!r}')
        if max_new_tokens is not None and max_new_tokens < 1:
            raise GraniteError(f"max_new_tokens is {max_new_tokens}, not a positive number")
        if prompt is None:
            self.capabilities.check(task, to)
        tokens = self._prompt(instruction(task, to=to, prompt=prompt))
        sources = audio if isinstance(audio, list) else [audio]
        results: dict[int, Transcript] = {}

        def finish(index: int, transcript: Transcript) -> None:
            results[index] = transcript
            if progress is not None:
                progress(1)

        def requests() -> Iterator[_Request]:
            for index, source in enumerate(sources):
                name = _name(source, index)
                try:
                    yield self._request(index, source, sampling_rate, name, tokens, max_new_tokens)
                except GraniteError as error:
                    if on_error == "raise":
                        raise
                    finish(index, Transcript(name, error=str(error)))

        for index, transcript in self._run(requests(), tokens):
            finish(index, transcript)
        return [results[index] for index in range(len(sources))]

    def _request(
        self, index: int, source: Any, rate: int | None, name: str, prompt: PromptTokens, max_new_tokens: int | None
    ) -> _Request:
        positions = self.config.decoder.max_position_embeddings
        if isinstance(source, str | os.PathLike | bytes) or hasattr(source, "read"):
            rate = None  # a file knows its own
        try:
            audio = load_audio(source, sampling_rate=rate, name=name, max_seconds=max_seconds(self.config))
        except TooLongError as error:
            raise ContextError(f"{error}, more than the model's context of {positions} positions allows") from None
        length = self._prompt_length(prompt, audio)
        budget = new_token_budget(audio.duration) if max_new_tokens is None else max_new_tokens
        request = _Request(index, audio, budget, length)
        if all(self._bucket(request, batch) is None for batch in {1, self.batch_size}):
            if length + budget > positions:
                beyond = f"the model's context of {positions} positions"
            else:
                beyond = f"every bucket of this Transcriber (the model has {positions} positions)"
            raise ContextError(
                f"{printable(name)}: {audio.duration:.1f} s of audio with its prompt take {length} positions, "
                f"which with {budget} new tokens exceeds {beyond}"
            )
        return request

    def _bucket(self, request: _Request, batch: int) -> Bucket | None:
        samples = len(request.audio.samples)
        return choose_bucket(self.buckets, batch, samples, request.prompt_length, request.limit)

    def _run(self, requests: Iterable[_Request], prompt: PromptTokens) -> Iterator[tuple[int, Transcript]]:
        """Results in the order in which batches finish. While the device runs one batch, the host prepares the next."""
        in_flight: collections.deque[Callable[[], list[tuple[int, Transcript]]]] = collections.deque()
        for bucket, batch in self._batches(requests):
            in_flight.append(self._submit(bucket, batch, prompt))
            if len(in_flight) > 1:
                yield from in_flight.popleft()()
        for collect in in_flight:
            yield from collect()

    def _batches(self, requests: Iterable[_Request]) -> Iterator[tuple[Bucket, list[_Request]]]:
        """Groups requests by bucket: full batches, then what is left, in rows of one where that costs less."""
        held: list[_Request] = []
        for request in requests:
            held.append(request)
            if len(held) >= _READ_AHEAD * self.batch_size:
                yield from self._group(held)
                held = []
        yield from self._group(held)

    def _group(self, requests: list[_Request]) -> Iterator[tuple[Bucket, list[_Request]]]:
        by_bucket: dict[Bucket, list[_Request]] = collections.defaultdict(list)
        for request in sorted(requests, key=lambda r: len(r.audio.samples)):
            bucket = self._bucket(request, self.batch_size) or self._bucket(request, 1)
            assert bucket is not None, "checked when the request was made"
            by_bucket[bucket].append(request)
        for bucket, rows in by_bucket.items():
            while rows:
                batch, rows = rows[: bucket.batch], rows[bucket.batch :]
                singles = [self._bucket(request, 1) for request in batch]
                # Mostly empty batches run row by row: their cost is that of all rows.
                if bucket.batch > 1 and 4 * len(batch) <= bucket.batch and None not in singles:
                    yield from ((single, [request]) for single, request in zip(singles, batch, strict=True) if single)
                else:
                    yield bucket, batch

    def _submit(
        self, bucket: Bucket, batch: list[_Request], prompt: PromptTokens
    ) -> Callable[[], list[tuple[int, Transcript]]]:
        """Dispatches a batch; the function returned waits for it."""
        encoded, state = self._dispatch(bucket, batch, prompt)
        state = dataclasses.replace(state, cache=None)  # frees the cache as soon as the device is done with it

        def collect() -> list[tuple[int, Transcript]]:
            labels, host = jax.device_get((encoded.labels, vars(state)))
            return [(r.index, self._transcript(r, labels[row], host, row)) for row, r in enumerate(batch)]

        return collect

    def _dispatch(self, bucket: Bucket, batch: list[_Request], prompt: PromptTokens) -> tuple[Encoded, DecodeState]:
        """Runs the three programs on a padded batch, without waiting for them."""
        # Rows that only fill up the batch repeat its first one and generate nothing.
        rows = [*batch, *[dataclasses.replace(batch[0], limit=0)] * (bucket.batch - len(batch))]
        samples = np.zeros((bucket.batch, bucket.samples), np.float32)
        tokens = np.zeros((bucket.batch, bucket.prompt), np.int32)
        for row, request in enumerate(rows):
            samples[row, : len(request.audio.samples)] = request.audio.samples
            tokens[row, : request.prompt_length] = self._prompt_ids(prompt, request.audio)
        lengths = np.array([len(request.audio.samples) for request in rows], np.int32)
        prompt_lengths = np.array([request.prompt_length for request in rows], np.int32)
        limits = np.array([request.limit for request in rows], np.int32)
        encoded = self._programs.encode(self._params, samples, lengths)
        logits, cache = self._programs.prefill(
            self._params, tokens, prompt_lengths, encoded.audio, capacity=bucket.capacity
        )
        return encoded, self._programs.decode(self._params, logits, cache, jnp.asarray(limits), room=bucket.room)

    def _transcript(
        self, request: _Request, labels: np.ndarray, state: Mapping[str, np.ndarray], row: int
    ) -> Transcript:
        """The result of one row, from the fields of a `DecodeState` on the host."""
        tokens = tuple(state["tokens"][row, : state["counts"][row]].tolist())
        stats = {
            "route": "greedy",
            "llm_passes": int(state["passes"][row]),
            "draft_tokens": 0,
            "accepted_tokens": 0,
            "finish": "end" if state["ended"][row] else "length",
        }
        return Transcript(
            audio=request.audio.name,
            text=self.tokenizer.decode(tokens).strip(),
            tokens=tokens,
            duration=request.audio.duration,
            ctc_text=" ".join(ctc.to_text(labels).split()),
            stats=stats,
        )

    def _prompt(self, text: str) -> PromptTokens:
        return self.template.tokens(self.tokenizer, text)

    def _prompt_length(self, prompt: PromptTokens, audio: Audio) -> int:
        return len(prompt.prefix) + len(prompt.suffix) + self._num_audio_tokens(audio)

    def _prompt_ids(self, prompt: PromptTokens, audio: Audio) -> list[int]:
        return [*prompt.prefix, *[self.config.audio_token_id] * self._num_audio_tokens(audio), *prompt.suffix]

    def _num_audio_tokens(self, audio: Audio) -> int:
        return self.config.num_audio_tokens(num_frames(len(audio.samples)))


def enable_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache directory, unless JAX was configured with a directory already."""
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        with contextlib.suppress(RuntimeError):  # a user without a home
            root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            jax.config.update("jax_compilation_cache_dir", str(root / "granite_jax" / "xla"))


def _name(source: Any, index: int) -> str:
    if isinstance(source, str | os.PathLike):
        return os.fspath(source) if isinstance(os.fspath(source), str) else repr(source)
    name = getattr(source, "name", None)
    return name if isinstance(name, str) else f"audio[{index}]"
