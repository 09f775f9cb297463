"""The host pipeline: audio in any form -> buckets -> batches -> device -> text, in input order."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from granite_jax.audio.load import Audio, load_audio, printable
from granite_jax.audio.resample import TooLongError
from granite_jax.checkpoint.directory import parse_dtype
from granite_jax.errors import ContextError, GraniteError
from granite_jax.inference.buckets import Bucket, default_buckets, new_token_budget
from granite_jax.inference.engine import Pipeline, Request
from granite_jax.inference.options import Acceptance, Parallel, acceptance, drafts_of
from granite_jax.inference.programs import Programs, Speculation
from granite_jax.inference.results import Acoustics, Transcript
from granite_jax.inference.sharding import DeviceList, Devices
from granite_jax.keywords.lists import Entry, Keywords, checked, keywords_of, prepare
from granite_jax.keywords.options import biasing
from granite_jax.model import granite_speech
from granite_jax.model.config import Config
from granite_jax.model.features import SAMPLING_RATE, log_mel, num_frames
from granite_jax.pretrained import open_checkpoint
from granite_jax.text.tasks import Capabilities, ChatTemplate, PromptTokens, instruction
from granite_jax.text.tokenizer import Tokenizer

_LISTS = 16  # lists of keywords that are kept ready


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
        speculation: Speculation | None = None,
        devices: DeviceList | Devices | None = None,
        parallel: Parallel = "shard_map",
        model_parallel: int = 1,
    ):
        """
        Args:
          params: the model's parameters; computation runs in `dtype`, by default theirs.
          template: chat template; default that of Granite Speech 4.0.
          capabilities: tasks and languages the checkpoint was trained for; default the released model's.
          batch_size: rows of a full batch on each device; default 64 on a TPU, 32 on a GPU, 8 on a CPU.
          buckets: the shapes to compile for, of 1 row and of `batch_size` rows; default `buckets.default_buckets`.
          speculation: how drafts are proposed; the defaults are measured.
          devices: to run on; default the process's own, of CPUs the first alone.
          parallel: how batches are spread over devices: "shard_map", or "pmap" with the same results.
          model_parallel: devices that share one copy of the weights, split between them; for models too big for one.
        """
        self.config = config
        self.tokenizer = tokenizer
        self.template = template or ChatTemplate()
        self.capabilities = capabilities or Capabilities()
        self.batch_size = batch_size or {"tpu": 64, "gpu": 32}.get(jax.default_backend(), 8)
        self.buckets = tuple(buckets or default_buckets(config, self.batch_size))
        if not isinstance(devices, Devices):
            devices = Devices.make(devices, parallel=parallel, model_parallel=model_parallel)
        programs = Programs(config, dtype or jax.tree.leaves(params)[0].dtype, speculation, devices)
        self._params = devices.place(params, devices.param_shardings(config))
        self._pipeline = Pipeline(config, self._params, programs, tokenizer, self.buckets, self.batch_size)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        dtype: Any = None,
        compilation_cache: bool = True,
        devices: DeviceList | None = None,
        parallel: Parallel = "shard_map",
        model_parallel: int = 1,
        **options: Any,
    ) -> "Transcriber":
        """Loads "demo", an Orbax checkpoint directory of `granite-jax convert`, a Hugging Face directory or a hub id.

        Args:
          revision: branch, tag or commit of a hub id.
          dtype: "bfloat16" or "float32"; default bfloat16 on accelerators that have it, else float32.
          compilation_cache: keep compiled programs in the user's cache directory, unless JAX was given another.
          devices, parallel, model_parallel, options: as of the constructor. Weights are read into their places.

        Raises:
          CheckpointError: naming what is missing, damaged or not supported.
          GraniteError: an option of the devices does not go with the others or with the model.
        """
        if compilation_cache:
            enable_compilation_cache()
        checkpoint = open_checkpoint(source, revision)
        placed = Devices.make(devices, parallel=parallel, model_parallel=model_parallel)
        return cls(
            checkpoint.config,
            checkpoint.load_params(parse_dtype(dtype), sharding=placed.param_shardings(checkpoint.config)),
            checkpoint.tokenizer(),
            template=checkpoint.chat_template(),
            capabilities=checkpoint.capabilities,
            devices=placed,
            **options,
        )

    @property
    def compilations(self) -> int:
        """How many programs have been compiled so far: at most three a bucket."""
        return sum(map(len, self._pipeline.programs.traces.values()))

    @property
    def read_ahead(self) -> int:
        """How many inputs are sorted by length together: lists that are multiples of it fill the most batches."""
        return self._pipeline.read_ahead

    def warmup(self, buckets: Sequence[Bucket] | None = None) -> None:
        """Compiles the programs of all buckets (or those given) by running them on silence."""
        prompt = self._prompt(instruction())
        for bucket in buckets or self.buckets:
            self._pipeline.compile(bucket, prompt)

    def transcribe(
        self,
        audio: Any,
        *,
        sampling_rate: int | None = None,
        task: str = "transcribe",
        to: str | None = None,
        prompt: str | None = None,
        max_new_tokens: int | None = None,
        speculative: str | Literal[False] = "lossless",
        ctc_threshold: float | None = None,
        verify_threshold: float | None = None,
        draft: str | Sequence[str | None] | None = None,
        keywords: Sequence[Entry] | Sequence[list[Entry] | None] | None = None,
        keyword_boost: float | None = None,
        keyword_gate: float | Literal[False] | None = None,
        keywords_in: Literal["decoder", "prompt", "both"] = "decoder",
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
          speculative: how drafts save passes of the language model. "lossless": it writes what it would write without
            them, only sooner. "relaxed" (or "relaxed-accurate"), "relaxed-fast": a confident draft of the CTC head is
            final, and so is one that the language model finds plausible (arXiv 2603.11243). False: no drafts. The CTC
            head drafts raw transcripts only: other tasks and prompts of your own go without, unless given a `draft`.
          ctc_threshold: of relaxed modes, in nats: a CTC text all of whose frames have less entropy is final.
          verify_threshold: of relaxed modes: the likelihood that every token of a draft must exceed to be accepted.
          draft: for lossless mode and any task: a text that may share passages with the result, or one (or None) an
            input.
          keywords: names and terms that may be spoken, up to 2,048 an input, in the letter case of the text wanted (raw
            transcripts are lower case whatever it is): a list for all inputs, or a list with a list (or None) for each.
            An entry is a text, or a pair (text, boost of its own).
          keyword_boost: nats by which decoding lifts the last token of a keyword, a quarter as much the first, and all
            of them more where the CTC head has heard it; the default is measured (benchmarks/keywords.py). 0 lifts
            nothing.
          keyword_gate: nats a character, below 0: keywords that sound worse than this by the encoder's CTC head are
            left out, so that long lists do no harm. Keywords that it cannot spell (digits, other scripts) are never
            left out. False: all are used, heard or not.
          keywords_in: "decoder" biases decoding: for lists of any length, any task, and text that is otherwise what it
            would have been. "prompt" mentions them in the prompt, as the released model was trained for ("Keywords: a,
            b"): up to 100, and it may then write other words differently, too. "both" does both.
          on_error: "raise" stops at the first bad input; "return" puts a Transcript with `.error` in its place.
          progress: called with the number of inputs just finished.

        Returns:
          One Transcript an input, in input order. A result does not depend on the other inputs.

        Raises:
          GraniteError: an option is unknown or out of range.
          PromptError: task, language or prompt is not supported by the checkpoint; or a keyword is not usable, named.
          AudioError: an input is not readable, too short or not finite, named.
          ContextError: an input does not fit the model's positions together with its prompt and new tokens, named.
        """
        if on_error not in ("raise", "return"):
            raise GraniteError(f'on_error is "raise" or "return", not {on_error!r}')
        if max_new_tokens is not None and max_new_tokens < 1:
            raise GraniteError(f"max_new_tokens is {max_new_tokens}, not a positive number")
        if prompt is None:
            self.capabilities.check(task, to)
        accept = acceptance(speculative, ctc_threshold, verify_threshold)
        if draft is not None and speculative != "lossless":
            raise GraniteError(f'draft is for speculative="lossless", not for {speculative!r}')
        raw = task == "transcribe" and prompt is None
        if not raw:
            accept = Acceptance(drafts=False)
        lower_case = None if prompt is not None else task == "transcribe"
        options = biasing(keyword_boost, keyword_gate, keywords_in, lower_case)
        sources = audio if isinstance(audio, list) else [audio]
        drafts = [
            None if text is None else tuple(self.tokenizer.encode(text)) for text in drafts_of(draft, len(sources))
        ]
        lists = keywords_of(keywords, len(sources), options)

        @functools.cache
        def instructed(mentioned: tuple[str, ...]) -> PromptTokens:
            return self._prompt(instruction(task, to=to, prompt=prompt, keywords=mentioned))

        instructed(())  # what is wrong with it is no single input's fault

        @functools.lru_cache(maxsize=_LISTS)
        def prepared(entries: tuple[tuple[str, float | None], ...]) -> Keywords | None:
            if not entries or not options.decoder:
                return None
            return prepare(entries, options, self.tokenizer, self.config.encoder.output_dim)

        results: dict[int, Transcript] = {}

        def finish(index: int, transcript: Transcript) -> None:
            results[index] = transcript
            if progress is not None:
                progress(1)

        def requests() -> Iterator[Request]:
            for index, source in enumerate(sources):
                name = _name(source, index)
                try:
                    entries = checked(lists[index], options)
                    asked = instructed(tuple(text for text, _ in entries) if options.prompt else ())
                    request = self._request(index, source, sampling_rate, name, asked, max_new_tokens)
                    yield dataclasses.replace(request, draft=drafts[index], keywords=prepared(entries), raw=raw)
                except GraniteError as error:
                    if on_error == "raise":
                        raise
                    finish(index, Transcript(name, error=str(error)))

        for index, transcript in self._pipeline.run(requests(), accept, options):
            finish(index, transcript)
        return [results[index] for index in range(len(sources))]

    def acoustics(self, audio: Any, *, sampling_rate: int | None = None) -> Acoustics:
        """Features and CTC logits of one input in any form that `transcribe` takes. Raises AudioError, ContextError."""
        samples = self._load(audio, sampling_rate, _name(audio, 0)).samples
        padded = np.zeros((1, -(-len(samples) // SAMPLING_RATE) * SAMPLING_RATE), np.float32)
        padded[0, : len(samples)] = samples
        programs = self._pipeline.programs
        params, lengths = programs.devices.unplaced(self._params), np.array([len(samples)], np.int32)
        found = _acoustics(self.config, programs.dtype, params, padded, lengths)
        return Acoustics(*(np.asarray(array)[0, : num_frames(len(samples))] for array in found))

    def _load(self, source: Any, rate: int | None, name: str) -> Audio:
        if isinstance(source, str | os.PathLike | bytes) or hasattr(source, "read"):
            rate = None  # a file knows its own
        try:
            return load_audio(source, sampling_rate=rate, name=name, max_seconds=self.config.max_seconds)
        except TooLongError as error:
            positions = self.config.decoder.max_position_embeddings
            raise ContextError(f"{error}, more than the model's context of {positions} positions allows") from None

    def _request(
        self,
        index: int,
        source: Any,
        rate: int | None,
        name: str,
        prompt: PromptTokens,
        max_new_tokens: int | None,
    ) -> Request:
        positions = self.config.decoder.max_position_embeddings
        audio = self._load(source, rate, name)
        length = self._prompt_length(prompt, audio)
        budget = new_token_budget(audio.duration) if max_new_tokens is None else max_new_tokens
        request = Request(index, audio, budget, prompt, length)
        if not self._pipeline.fits(request):
            if length + budget > positions:
                beyond = f"the model's context of {positions} positions"
            else:
                beyond = f"every bucket of this Transcriber (the model has {positions} positions)"
            raise ContextError(
                f"{printable(name)}: {audio.duration:.1f} s of audio with its prompt take {length} positions, "
                f"which with {budget} new tokens exceeds {beyond}"
            )
        return request

    def _prompt(self, text: str) -> PromptTokens:
        return self.template.tokens(self.tokenizer, text)

    def _prompt_length(self, prompt: PromptTokens, audio: Audio) -> int:
        return len(prompt.prefix) + len(prompt.suffix) + self._pipeline.num_audio_tokens(audio)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _acoustics(config: Config, dtype: Any, params: Any, samples: Any, lengths: Any) -> tuple[jax.Array, jax.Array]:
    features = log_mel(samples, lengths)
    hidden = granite_speech.encode(config, params, features, num_frames(lengths), dtype=dtype).hidden
    return features, granite_speech.ctc_logits(config, params, hidden, dtype=dtype)


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
