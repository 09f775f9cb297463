"""Audio in any form -> readers -> segments -> engine -> transcripts, in input order."""

import contextlib
import dataclasses
import functools
import itertools
import os
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Literal, overload

import jax
import numpy as np

from granite_jax.audio.load import (
    AccessError,
    Audio,
    check_samples,
    is_encoded,
    load_audio,
    num_channels,
    open_recording,
    path_of,
    printable,
    read_stream,
)
from granite_jax.audio.resample import TooLongError
from granite_jax.audio.segment import AudioSegment, cut
from granite_jax.checkpoint.directory import parse_dtype
from granite_jax.errors import AudioError, CheckpointError, ContextError, GraniteError, PromptError
from granite_jax.inference import readers
from granite_jax.inference.buckets import Bucket, default_buckets, longest_audio, new_token_budget
from granite_jax.inference.compilation import Compiler, abstract_params, enable_compilation_cache
from granite_jax.inference.engine import Engine
from granite_jax.inference.options import (
    MIN_SEGMENT_SECONDS,
    Channels,
    ModelOptions,
    Parallel,
    TranscribeOptions,
    accepts,
    drafts_for,
)
from granite_jax.inference.programs import Programs, Speculation
from granite_jax.inference.recordings import OnSegment, RecordingDecoder
from granite_jax.inference.requests import Request
from granite_jax.inference.results import Emissions, Transcript
from granite_jax.inference.safeguard import safeguarded
from granite_jax.inference.sharding import DeviceList, DeviceMesh
from granite_jax.keywords.lists import Keywords, lists_by_input, prepare, validated
from granite_jax.keywords.options import Entry, KeywordList, keyword_entries
from granite_jax.model import granite_speech
from granite_jax.model.config import Config
from granite_jax.model.features import SAMPLING_RATE, log_mel, num_frames
from granite_jax.pretrained import open_checkpoint
from granite_jax.text.tasks import Capabilities, ChatTemplate, PromptTokens
from granite_jax.text.tokenizer import Tokenizer

_MAX_CACHED_LISTS = 16  # prepared lists of keywords
_LONG_PASS = 60.0  # seconds
_ANY_LENGTH = 'segment_seconds="auto", the default, takes any length'


class Transcriber:
    """Speech to text with one checkpoint: holds its weights, and compiles its programs when they are first needed.

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
        devices: DeviceList | DeviceMesh | None = None,
        parallel: Parallel = "shard_map",
        model_parallel: int = 1,
        compile_ahead: bool = False,
    ):
        """
        Args:
          params: the model's parameters, or a function that returns them in `dtype`, which it then needs.
          dtype: what computation runs in; default that of `params`.
          template: chat template; default that of Granite Speech 4.0.
          capabilities: tasks and languages the checkpoint was trained for; default the released model's.
          batch_size: rows of a full batch on each device; default 64 on a TPU, 32 on a GPU, 8 on a CPU.
          buckets: the shapes to compile for, of 1 row and of `batch_size` rows; default `buckets.default_buckets`.
          speculation: how drafts are proposed; the defaults are measured.
          devices: devices to run on; default all local devices, or only the first CPU.
          parallel: how batches are spread over devices: "shard_map", or "pmap" with the same results.
          model_parallel: devices that share one copy of the weights, split between them; for models too big for one.
          compile_ahead: begin to compile the programs of all buckets, while a function returns the parameters.
        """
        self.config = config
        self.tokenizer = tokenizer
        self.template = template or ChatTemplate()
        self.capabilities = capabilities or Capabilities()
        self.batch_size = batch_size or {"tpu": 64, "gpu": 32}.get(jax.default_backend(), 8)
        self.buckets = tuple(buckets or default_buckets(config, self.batch_size, self.capabilities.segment_seconds))
        if not isinstance(devices, DeviceMesh):
            devices = DeviceMesh.make(devices, parallel=parallel, model_parallel=model_parallel)
        if callable(params) and dtype is None:
            raise GraniteError("a function that returns the parameters needs their dtype")
        programs = Programs(config, dtype or jax.tree.leaves(params)[0].dtype, speculation, devices)
        compiler = None
        if callable(params):
            compiler = Compiler(programs, abstract_params(programs))
            params = compiler.start_while(params, self.buckets if compile_ahead else ())
        self._preparing = threading.Lock()
        self._lists: dict[Any, tuple[PromptTokens, Keywords | None]] = {}
        self._params = devices.put(params, devices.param_shardings(config))
        self._engine = Engine(
            config,
            self._params,
            programs,
            tokenizer,
            self.buckets,
            self.batch_size,
            compiler=compiler,
            word_offsets=self.capabilities.word_offsets,
        )

    @classmethod
    @accepts(ModelOptions)
    def from_pretrained(
        cls,
        checkpoint: str | os.PathLike[str] = "demo",
        *,
        buckets: Sequence[Bucket] | None = None,
        speculation: Speculation | None = None,
        **fields: Any,
    ) -> "Transcriber":
        """Loads "demo", an Orbax checkpoint directory of `granite-jax convert`, a Hugging Face directory or a hub id.

        Args:
          buckets, speculation: as in the constructor.
          fields: fields of `ModelOptions`. Weights are read straight into their sharding.

        Raises:
          CheckpointError: naming what is missing, damaged or not supported.
          GraniteError: an option of the devices conflicts with the others or with the model.
        """
        options = ModelOptions(checkpoint=checkpoint, **fields)
        if options.compilation_cache:
            enable_compilation_cache()
        opened, dtype = open_checkpoint(options.checkpoint, options.revision), parse_dtype(options.dtype)
        devices = DeviceMesh.make(options.devices, parallel=options.parallel, model_parallel=options.model_parallel)
        return cls(
            opened.config,
            functools.partial(opened.load_params, dtype, sharding=devices.param_shardings(opened.config)),
            opened.tokenizer(),
            template=opened.chat_template(),
            capabilities=opened.capabilities,
            dtype=dtype,
            batch_size=options.batch_size,
            buckets=buckets,
            speculation=speculation,
            devices=devices,
            compile_ahead=options.compile_ahead,
        )

    @classmethod
    def from_options(cls, options: ModelOptions) -> "Transcriber":
        """`from_pretrained` with the fields of `options`."""
        fields = dict(vars(options))
        return cls.from_pretrained(fields.pop("checkpoint"), **fields)

    @property
    def compilations(self) -> int:
        """How many programs were traced so far, to be compiled: at most three per bucket, or five with word times."""
        return sum(map(len, self._engine.programs.traces.values()))

    @property
    def read_ahead(self) -> int:
        """How many inputs are sorted by length together: lists of a multiple of this length fill the most batches."""
        return self._engine.read_ahead

    def warmup(self, buckets: Sequence[Bucket] | None = None, *, words: bool = False) -> None:
        """Compiles the programs of all buckets (or those given), several at a time, and runs them on silence.

        Args:
          words: compile those that time words, too, which audio of several segments needs; for up to a minute.
        """
        prompt = self._prompt(self.capabilities.prompts.transcribe)
        timed = {
            bucket: words and bucket.samples <= _LONG_PASS * SAMPLING_RATE
            for bucket in (self.buckets if buckets is None else buckets)
        }
        for bucket, is_timed in timed.items():
            for with_logits in {False, is_timed}:
                self._engine.compiler.start(bucket, with_logits=with_logits)
        for bucket, is_timed in timed.items():
            self._engine.run_on_silence(bucket, prompt, words=is_timed)

    @overload
    def transcribe(
        self, audio: list[Any], options: TranscribeOptions | None = None, **arguments: Any
    ) -> list[Transcript]: ...

    @overload
    def transcribe(self, audio: Any, options: TranscribeOptions | None = None, **arguments: Any) -> Transcript: ...

    @accepts(TranscribeOptions)
    def transcribe(
        self,
        audio: Any,
        options: TranscribeOptions | None = None,
        *,
        sampling_rate: int | None = None,
        keywords: KeywordList | Sequence[KeywordList | None] | None = None,
        draft: str | Sequence[str | None] | None = None,
        on_error: Literal["raise", "return"] = "raise",
        progress: Callable[[int], None] | None = None,
        on_segment: OnSegment | None = None,
        **fields: Any,
    ) -> list[Transcript] | Transcript:
        """Transcribes or translates one input or a list of them, of any length.

        Args:
          audio: a path, a binary file object, bytes, a float or integer array (16 kHz, or of `sampling_rate`; `[n]`,
            `[n, channels]` or `[channels, n]`), a pair (array, sampling rate), a Hugging Face data set's audio (a dict
            or a decoder), or a list of these.
          options: what to write, and how.
          sampling_rate: in Hz, for arrays that come without one.
          keywords: as in `TranscribeOptions`; or a list with such a list (or None) for each input.
          draft: for lossless mode and any task: a text that may share passages with the result, or a list with a text
            (or None) for each input.
          on_error: "raise" stops at the first bad input; "return" puts a Transcript with `.error` in its place.
          progress: called with the number of inputs just finished.
          on_segment: called with the name of an input and a `Segment` of it, as soon as that is final; in order within
            an input, or a channel of it (`Segment.channel`). It is called by whichever thread finishes a segment, so it
            must be quick, and must not use this Transcriber.
          fields: fields of `TranscribeOptions` that replace those of `options`.

        Returns:
          One Transcript, or a list of them in input order if `audio` is a list or `channels` is "split". A result does
          not depend on the other inputs.

        Raises:
          GraniteError: an option is unknown or out of range.
          PromptError: the checkpoint does not support the task or a language; or naming a keyword that is not usable.
          AudioError: naming an input that is not readable, too short or not finite.
          ContextError: naming an input that does not fit the model's positions with its prompt and new tokens, in one
            pass (`segment_seconds=None`) or in segments of the given length.
          CheckpointError: naming an input for which the weights give NaN.
        """
        is_list = isinstance(audio, list) or _is_tuple_of_files(audio)
        sources = list(audio) if is_list else [audio]
        entries = None if keywords is None else keyword_entries(keywords)
        keyword_lists = None if entries is None else lists_by_input(entries, len(sources))
        if entries is not None and keyword_lists is None:
            fields["keywords"] = entries
        stream = self.stream(
            sources,
            options,
            sampling_rate=sampling_rate,
            keyword_lists=keyword_lists,
            drafts=drafts_for(draft, len(sources)),
            on_error=on_error,
            on_segment=on_segment,
            **fields,
        )
        is_list = is_list or dataclasses.replace(options or TranscribeOptions(), **fields).channels == "split"
        transcripts = []
        for transcript in stream:
            transcripts.append(transcript)
            if progress is not None:
                progress(1)
        return transcripts if is_list else transcripts[0]

    @accepts(TranscribeOptions)
    def stream(
        self,
        audio: Iterable[Any],
        options: TranscribeOptions | None = None,
        *,
        sampling_rate: int | None = None,
        keyword_lists: Iterable[Sequence[Entry] | None] | None = None,
        drafts: Iterable[str | None] | None = None,
        on_error: Literal["raise", "return"] = "raise",
        ordered: bool = True,
        on_segment: OnSegment | None = None,
        **fields: Any,
    ) -> Iterator[Transcript]:
        """Transcribes any number of inputs and yields transcripts while later inputs are still read.

        A few threads read inputs ahead of the device, at most twice `read_ahead` of them, and of each at most two full
        batches of segments.

        Args:
          audio: inputs as in `transcribe`; an endless iterator is fine.
          keyword_lists: a list of keywords (or None, for those of the options) for each input.
          drafts: a draft (or None) for each input.
          ordered: yield in input order; otherwise as transcripts are done.
          options, sampling_rate, on_error, on_segment, fields: as in `transcribe`. With `channels="split"`, each
            channel is a result of its own, and an input's keywords and draft are for all of its channels.

        Raises:
          The same errors as `transcribe`: for the options at once, for an input in place of its transcript.
        """
        if on_error not in ("raise", "return"):
            raise GraniteError(f'on_error is "raise" or "return", not {on_error!r}')
        resolved = dataclasses.replace(options or TranscribeOptions(), **fields)
        own = resolved.keywords
        resolved, flags = safeguarded(resolved, self.capabilities)
        if resolved.keywords != own and keyword_lists is not None:
            raise PromptError("a prompt with keywords of its own excludes keywords: name them in one place")
        if resolved.drafting.draft_from == "bpe" and not self.config.encoder.bpe_output_dim:
            raise GraniteError('draft_from="bpe" needs a BPE head, which this checkpoint does not have')
        if resolved.speculative != "lossless" and drafts is not None:
            drafts = list(drafts)
            if any(draft is not None for draft in drafts):
                raise GraniteError(f'draft is for speculative="lossless", not for {resolved.speculative!r}')
        shared = self._prepared(resolved, resolved.keywords)  # here, because its errors are not those of one input
        seconds = self._segment_limit(resolved, shared[0])
        stopped = threading.Event()
        inputs = zip(
            audio,
            itertools.count(),
            itertools.repeat(None) if keyword_lists is None else keyword_lists,
            itertools.repeat(None) if drafts is None else drafts,
            strict=False,
        )

        def submit(
            name: str, source: Any, channel: int | None, entries: Sequence[Entry] | None, draft: str | None
        ) -> Future[Transcript]:
            decoder = None
            try:
                prompt, keywords = shared if entries is None else self._prepared(resolved, entries)
                tokens = None if draft is None else tuple(self.tokenizer.encode(draft))

                def make_request(samples: np.ndarray) -> Request:
                    request = self._request(Audio(name, samples), resolved, prompt)
                    return dataclasses.replace(request, keywords=keywords, draft=tokens, flags=flags)

                decoder = RecordingDecoder(
                    self._engine,
                    self.tokenizer,
                    make_request,
                    resolved,
                    name,
                    channel=None if channel is None else channel + 1,
                    on_segment=on_segment,
                    is_stopped=stopped.is_set,
                )
                self._submit_segments(decoder, source, sampling_rate, name, seconds, resolved, draft, channel)
                return decoder.result
            except BaseException as error:
                if decoder is not None:
                    decoder.result.cancel()  # of what was read before the error, nothing is wanted
                if not isinstance(error, GraniteError):
                    raise
                failed: Future[Transcript] = Future()
                if on_error == "raise":
                    failed.set_exception(error)
                else:
                    number = None if channel is None else channel + 1
                    failed.set_result(Transcript(name, error=str(error), stats=_transience(error), channel=number))
                return failed

        named = (
            (name, content, channel, entries, draft)
            for source, index, entries, draft in inputs
            for name, content, channel in _channels(source, _name(source, index), resolved.channels)
        )
        transcripts = readers.read_ahead(named, submit, self._engine, 2 * self.read_ahead, ordered, stopped)
        return transcripts if on_error == "return" else _raising(transcripts)

    def ctc_emissions(self, audio: Any, *, sampling_rate: int | None = None) -> Emissions:
        """Features and CTC logits of one input in any form that `transcribe` takes. Raises AudioError, ContextError."""
        samples = self._load(audio, sampling_rate, _name(audio, 0)).samples
        padded = np.zeros((1, -(-len(samples) // SAMPLING_RATE) * SAMPLING_RATE), np.float32)
        padded[0, : len(samples)] = samples
        programs = self._engine.programs
        params, lengths = programs.devices.unstack(self._params), np.array([len(samples)], np.int32)
        arrays = _emissions(self.config, programs.dtype, params, padded, lengths)
        return Emissions(*(np.asarray(array)[0, : num_frames(len(samples))] for array in arrays))

    def _load(self, source: Any, rate: int | None, name: str) -> Audio:
        if is_encoded(source):
            rate = None  # files have their own
        try:
            return load_audio(source, sampling_rate=rate, name=name, max_seconds=self.config.max_seconds)
        except TooLongError as error:
            positions = self.config.decoder.max_position_embeddings
            raise ContextError(f"{error}, more than the model's context of {positions} positions allows") from None

    def _submit_segments(
        self,
        decoder: RecordingDecoder,
        source: Any,
        rate: int | None,
        name: str,
        seconds: float | None,
        options: TranscribeOptions,
        draft: str | None,
        channel: int | None,
    ) -> None:
        """Reads an input and submits it in segments. Raises GraniteError naming it."""
        if seconds is None:
            if channel is not None:
                source = open_recording(
                    source, sampling_rate=None if is_encoded(source) else rate, name=name, channel=channel
                )
            try:
                audio = self._load(source, rate, name)
            except ContextError as error:
                raise ContextError(f"{error}; {_ANY_LENGTH}") from None
            if audio.duration > _LONG_PASS:
                warnings.warn(
                    f"{printable(name)}: {audio.duration:.0f} s in one pass; text gets worse beyond a minute or two, "
                    "which segment_seconds avoids",
                    stacklevel=2,
                )
            decoder.submit(AudioSegment(0, audio.samples, 0, len(audio.samples), is_last=True))
            decoder.close(audio.flags)
            return
        rate = None if is_encoded(source) else rate  # files have their own
        recording = open_recording(source, sampling_rate=rate, name=name, channel=channel)
        with contextlib.closing(recording.blocks()) as blocks:
            for segment in cut(blocks, seconds, overlap=options.is_transcript):
                if segment.is_whole:
                    _check_length(segment, name)
                elif draft is not None:
                    raise GraniteError(
                        f"{printable(name)}: a draft is for audio of one segment, and this is longer than {seconds:g} s"
                    )
                decoder.submit(segment)
                if decoder.result.done():  # an error, or nobody waits for it
                    return
            decoder.close(blocks.flags)

    def segment_seconds(self, options: TranscribeOptions) -> float:
        """The longest audio, in seconds, that is decoded in one pass. Raises GraniteError as `stream` does."""
        options, _ = safeguarded(options, self.capabilities)
        limit = self._segment_limit(options, self._prepared(options, options.keywords)[0])
        return self.config.max_seconds if limit is None else limit

    def _segment_limit(self, options: TranscribeOptions, prompt: PromptTokens) -> float | None:
        """The longest segment, in seconds. Raises ContextError if it is given and does not fit the model."""
        chosen = options.segment_seconds
        if chosen is None:
            return None
        longest = min(
            longest_audio(self.config, self._prompt_length(prompt), options.max_new_tokens),
            max(bucket.samples for bucket in self.buckets) / SAMPLING_RATE,
        )
        if chosen == "auto":
            return max(min(self.capabilities.segment_seconds, longest), MIN_SEGMENT_SECONDS)
        if chosen > longest:
            raise ContextError(
                f"segment_seconds is {chosen:g}, but at most {longest:.0f} s fit the model and its buckets"
            )
        return float(chosen)

    def _request(self, audio: Audio, options: TranscribeOptions, prompt: PromptTokens) -> Request:
        """The request for a segment. Raises ContextError naming its recording."""
        name = audio.name
        positions = self.config.decoder.max_position_embeddings
        length = self._prompt_length(prompt) + self._engine.num_audio_tokens(audio)
        budget = options.max_new_tokens or new_token_budget(audio.duration)
        request = Request(audio, budget, prompt, length, options)
        if not self._engine.fits(request):
            if length + budget > positions:
                limit = f"the model's context of {positions} positions"
            else:
                limit = f"every bucket of this Transcriber (the model has {positions} positions)"
            longest = longest_audio(self.config, self._prompt_length(prompt), options.max_new_tokens)
            is_remedy = options.segment_seconds is None and MIN_SEGMENT_SECONDS <= longest < audio.duration
            raise ContextError(
                f"{printable(name)}: {audio.duration:.1f} s of audio with its prompt take {length} positions, "
                f"which with {budget} new tokens exceeds {limit}; at most {longest:.0f} s fit the model, "
                f"{longest_audio(self.config, self._prompt_length(prompt), 1):.0f} s with max_new_tokens=1"
                f"{f'; {_ANY_LENGTH}' if is_remedy else ''}"
            )
        return request

    def _prepared(self, options: TranscribeOptions, keywords: Sequence[Entry]) -> tuple[PromptTokens, Keywords | None]:
        """The prompt with a list of keywords, and the list prepared for decoding; both are cached for later inputs."""
        entries = validated(keywords, options.biasing, self.capabilities.prompts.max_keywords)
        key = (options.task, options.target_language, options.language, options.prompt, options.biasing, entries)
        with self._preparing:
            if key not in self._lists:
                mentioned = tuple(text for text, _ in entries) if options.biasing.prompt else ()
                text = self.capabilities.instruction(
                    task=options.task,
                    target_language=options.target_language,
                    language=options.language,
                    prompt=options.prompt,
                    keywords=mentioned,
                )
                prepared = None
                if entries and options.biasing.decoder:
                    prepared = prepare(entries, options.biasing, self.tokenizer, self.config.encoder.output_dim)
                self._lists[key] = self._prompt(text), prepared
                while len(self._lists) > _MAX_CACHED_LISTS:
                    del self._lists[next(iter(self._lists))]
            return self._lists[key]

    def _prompt(self, text: str) -> PromptTokens:
        return self.template.tokens(self.tokenizer, text, self.capabilities.prompts.max_chars)

    def _prompt_length(self, prompt: PromptTokens) -> int:
        """Tokens of a prompt besides those of the audio."""
        return len(prompt.prefix) + len(prompt.suffix)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _emissions(config: Config, dtype: Any, params: Any, samples: Any, lengths: Any) -> tuple[jax.Array, jax.Array]:
    features = log_mel(samples, lengths)
    hidden = granite_speech.encode(config, params, features, num_frames(lengths), dtype=dtype).hidden
    return features, granite_speech.ctc_logits(config, params, hidden, dtype=dtype)


def _raising(transcripts: Generator[Transcript]) -> Iterator[Transcript]:
    """Raises the error of a transcript in its place."""
    with contextlib.closing(transcripts):
        for transcript in transcripts:
            if transcript.error is not None:
                raise CheckpointError(transcript.error)
            yield transcript


def _check_length(segment: AudioSegment, name: str) -> None:
    try:
        check_samples(len(segment.samples))
    except AudioError as error:
        raise AudioError(f"{printable(name)}: {error}") from None


def _channels(source: Any, name: str, channels: Channels) -> Iterator[tuple[str, Any, int | None]]:
    """An input under its name, for each of its channels from 0 on; once, without a channel, if they are mixed."""
    if channels == "mix":
        yield name, source, None
        return
    count = 1  # of what cannot be read: the error is reported where it is read again
    with contextlib.suppress(AudioError):
        if hasattr(source, "read"):
            source = read_stream(source)  # several readers cannot share a file
        count = num_channels(source)
    yield from ((name, source, channel) for channel in range(count))


def _transience(error: GraniteError) -> dict[str, Any]:
    """The stats of an input that failed: whether it may not fail another time."""
    return {"transient": True} if isinstance(error, AccessError) else {}


def _is_tuple_of_files(audio: Any) -> bool:
    return isinstance(audio, tuple) and bool(audio) and all(isinstance(source, str | os.PathLike) for source in audio)


def _name(source: Any, index: int) -> str:
    path = path_of(source)
    return f"audio[{index}]" if path is None else path
