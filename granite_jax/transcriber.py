"""Audio in any form -> readers -> segments -> engine -> transcripts."""

import asyncio
import contextlib
import dataclasses
import functools
import math
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, Literal, overload

import jax
import numpy as np

from granite_jax.audio.load import AccessError
from granite_jax.checkpoint.directory import parse_dtype
from granite_jax.engine.compilation import keep_compiled_programs
from granite_jax.engine.engine import Engine
from granite_jax.engine.readers import Readers
from granite_jax.engine.scheduler import Scheduler
from granite_jax.engine.sharding import DeviceList, DeviceMesh
from granite_jax.engine.streams import Notify, results
from granite_jax.errors import CheckpointError, GraniteError
from granite_jax.files.paths import cache_directory
from granite_jax.keywords.lists import lists_by_input
from granite_jax.keywords.options import KeywordList, keyword_entries
from granite_jax.models.family import ModelConfig
from granite_jax.models.layers.precision import dtype_of
from granite_jax.models.registry import default_recognizer, encoder_of, model_of
from granite_jax.options import (
    ModelOptions,
    Parallel,
    RecognizerName,
    TranscribeOptions,
    accepts,
    check_mixed,
    drafts_for,
)
from granite_jax.pretrained import open_checkpoint
from granite_jax.recognition.buckets import Bucket, default_buckets
from granite_jax.recognition.encoding import ALIGN, ENCODE_WITH_LOGITS
from granite_jax.recognition.inputs import Input, inputs_of, is_one_input, name_of
from granite_jax.recognition.intake import Intake
from granite_jax.recognition.jobs import LONG_PASS
from granite_jax.recognition.partition import param_shardings
from granite_jax.recognition.recognizer import Recognizer
from granite_jax.recognition.recognizers import make_recognizers
from granite_jax.recognition.recordings import OnSegment
from granite_jax.recognition.speech_lm_programs import Speculation
from granite_jax.results import Emissions, Segment, Transcript
from granite_jax.text.tasks import Capabilities, ChatTemplate
from granite_jax.text.tokenizer import Tokenizer
from granite_jax.waveform import SAMPLING_RATE


class Transcriber:
    """Speech to text with one checkpoint: holds its weights, and compiles its programs when they are first needed.

    In short:

        asr = Transcriber.from_pretrained("demo")
        asr.transcribe(["a.wav", waveform_16k])[0].text

    Any thread can call any method, and callbacks can, too.

    Fields:
      readers: the threads that read inputs; `readers.limit` says how many inputs are read at a time.
    """

    def __init__(
        self,
        config: ModelConfig,
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
        recognizer: RecognizerName | None = None,
    ):
        """
        Args:
          params: the model's parameters, or a function that returns them in `dtype`, which it then needs.
          dtype: what computation runs in; default that of `params`.
          template: chat template; default that of Granite Speech 4.0.
          capabilities: tasks and languages the checkpoint was trained for; default the released model's.
          batch_size: rows of a full batch on each device; default 64 on a TPU, 32 on a GPU, 8 on a CPU.
          buckets: the shapes to compile for, of 1 row and of `batch_size` rows; default those of `recognition.buckets`.
          speculation: how drafts are proposed; the defaults are measured.
          devices: devices to run on; default all local devices, or only the first CPU.
          parallel: how batches are spread over devices: "shard_map", or "pmap" with the same results.
          model_parallel: devices that share one copy of the weights, split between them; for models too big for one.
          compile_ahead: begin to compile the programs of all buckets, while a function returns the parameters.
          recognizer: whose programs these are; default the first of the model's family.
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
        self._dtype = dtype or dtype_of(params)
        default: RecognizerName = recognizer or default_recognizer(config)
        model_of(config, default)  # raises if it cannot run the model
        self.params, self._recognizers = make_recognizers(
            config,
            params,
            tokenizer,
            devices,
            dtype=self._dtype,
            buckets=self.buckets,
            speculation=speculation,
            word_offsets=self.capabilities.word_offsets,
            compile_ahead=default if compile_ahead else None,
        )
        self._engine = Engine(Scheduler(devices.replicas, self.batch_size))
        self.readers = Readers(self._engine)
        self._intake = Intake(
            config, tokenizer, self.template, self.capabilities, self._recognizers, self._engine, self.readers
        )
        self._deadline = math.inf
        self._warming = threading.Lock()

    @classmethod
    @accepts(ModelOptions)
    def from_pretrained(
        cls,
        checkpoint: str | os.PathLike[str] = "demo",
        *,
        buckets: Sequence[Bucket] | None = None,
        speculation: Speculation | None = None,
        recognizer: RecognizerName | None = None,
        **fields: Any,
    ) -> "Transcriber":
        """Loads "demo", an Orbax checkpoint directory of `granite-jax convert`, a Hugging Face directory or a hub id.

        Args:
          buckets, speculation, recognizer: as in the constructor.
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
            functools.partial(opened.load_params, dtype, sharding=param_shardings(opened.config, devices)),
            opened.tokenizer(),
            template=opened.chat_template(),
            capabilities=opened.capabilities,
            dtype=dtype,
            batch_size=options.batch_size,
            buckets=buckets,
            speculation=speculation,
            devices=devices,
            compile_ahead=options.compile_ahead,
            recognizer=recognizer,
        )

    @classmethod
    def from_options(cls, options: ModelOptions, recognizer: RecognizerName | None = None) -> "Transcriber":
        """`from_pretrained` with the fields of `options`."""
        fields = dict(vars(options))
        return cls.from_pretrained(fields.pop("checkpoint"), recognizer=recognizer, **fields)

    @property
    def compilations(self) -> int:
        """How many programs were traced so far, to be compiled: at most `max_programs` of each recognizer."""
        return sum(recognizer.programs.num_traces for recognizer in self._recognizers.values())

    @property
    def read_ahead(self) -> int:
        """How many inputs are sorted by length together: lists of a multiple of this length fill the most batches."""
        return self._engine.read_ahead

    @property
    def idle_seconds(self) -> float:
        """Seconds that the device has had nothing to do so far, because audio was read."""
        return self._engine.idle_seconds

    def recognizer(self, options: TranscribeOptions | None = None) -> Recognizer:
        """The recognizer that options ask for."""
        return self._intake.recognizer(options)

    @jax.transfer_guard("allow")  # as in `Engine`
    def warmup(
        self,
        buckets: Sequence[Bucket] | None = None,
        options: TranscribeOptions | None = None,
        *,
        words: bool = False,
    ) -> None:
        """Compiles the programs of all buckets (or those given), several at a time, and runs them on silence.

        Args:
          buckets: of `recognizer(options)`.
          words: compile those that time words, too, which audio of several segments needs; for up to a minute.
        """
        recognizer = self.recognizer(options)
        prompt = self._intake.default_prompt(options)
        timed = {
            bucket: words and bucket.samples <= LONG_PASS * SAMPLING_RATE
            for bucket in (recognizer.buckets if buckets is None else buckets)
        }
        for bucket, is_timed in timed.items():
            recognizer.compiler.start(bucket)
            if is_timed:
                recognizer.compiler.start(bucket, ENCODE_WITH_LOGITS, ALIGN)
        with self._warming:
            for bucket, is_timed in timed.items():
                recognizer.run_on_silence(bucket, prompt, words=is_timed)

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
            an input, or a channel of it (`Segment.channel`). It is called in the thread that waits for results, and may
            use this Transcriber.
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
            drafts=_drafts_or_none(draft, len(sources)),
            on_error=on_error,
            on_segment=on_segment,
            **fields,
        )
        is_list = is_list or dataclasses.replace(options or TranscribeOptions(), **fields).channels == "split"
        transcripts = []
        with contextlib.closing(stream):
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
        keyword_lists: Iterable[KeywordList | None] | None = None,
        drafts: Iterable[str | None] | None = None,
        on_error: Literal["raise", "return"] = "raise",
        ordered: bool = True,
        on_segment: OnSegment | None = None,
        **fields: Any,
    ) -> Generator[Transcript]:
        """Transcribes any number of inputs and yields transcripts as soon as they are done, while later inputs come.

        A thread takes inputs, at most twice `read_ahead` of them ahead of what was yielded; a few others read them, at
        most two full batches of segments of each ahead of the device. An input that comes alone is not kept waiting for
        others. A stream that is left is canceled, and keeps no process alive.

        Args:
          audio: inputs as in `transcribe`; may be endless, slow, or wait for the results of what it has given.
          keyword_lists: a list of keywords (or None, for those of the options) for each input.
          drafts: a draft (or None) for each input.
          ordered: yield in input order; otherwise as transcripts are done.
          options, sampling_rate, on_error, on_segment, fields: as in `transcribe`. With `channels="split"`, each
            channel is a result of its own, and an input's keywords and draft are for all of its channels.

        Raises:
          GraniteError: for the options at once; `keyword_lists` or `drafts` have another length than the inputs, in
            place of the first input that lacks one, or after the last.
          Exception: what the iterator raises, after the results of all that it gave before.
          The same errors as `transcribe`: for an input in place of its transcript.
        """
        if on_error not in ("raise", "return"):
            raise GraniteError(f'on_error is "raise" or "return", not {on_error!r}')
        if not isinstance(audio, Iterable) or is_one_input(audio):
            kind = type(audio).__name__
            raise GraniteError(f"stream takes a list or an iterator of inputs, not one {kind}: transcribe takes that")
        for name, values in (("keyword_lists", keyword_lists), ("drafts", drafts)):
            if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable | None):
                kind = type(values).__name__
                raise GraniteError(f"{name} is a list or an iterator with an entry for each input, not a {kind}")
        lists = {"has_keyword_lists": keyword_lists is not None, "has_drafts": drafts is not None}
        plan = self._intake.plan(options, fields, **lists)
        inputs = inputs_of(audio, plan.options.channels, keyword_lists, drafts)

        def submit(each: Input, notify: Notify) -> Future[Transcript]:
            def call(on_segment: OnSegment, name: str, segment: Segment) -> None:
                notify(functools.partial(on_segment, name, segment))

            on_each = None if on_segment is None else functools.partial(call, on_segment)
            return self._intake.begin(
                each, plan, sampling_rate=sampling_rate, on_segment=on_each, deadline=self._deadline
            )

        finished = results(inputs, submit, self._engine, window=2 * self.read_ahead, ordered=ordered)
        return _transcripts(finished, on_error)

    @accepts(TranscribeOptions)
    def submit(
        self,
        audio: Any,
        options: TranscribeOptions | None = None,
        *,
        sampling_rate: int | None = None,
        keywords: KeywordList | None = None,
        draft: str | None = None,
        on_segment: OnSegment | None = None,
        deadline: float | None = None,
        **fields: Any,
    ) -> "Future[Transcript]":
        """Begins to transcribe one input; returns at once.

        Args:
          audio, options, sampling_rate, keywords, draft, fields: as in `transcribe`, of one input whose channels are
            mixed.
          on_segment: as in `transcribe`, but called in one of the Transcriber's threads.
          deadline: seconds that a segment waits for others of a batch that is not full while the device is busy;
            default that of `serving`, or else until nothing else is being read.

        Returns:
          A future with the Transcript, or with an error as `transcribe` raises. Canceling it takes effect while it
          waits, and between its segments. A process that ends does not wait for it.

        Raises:
          GraniteError: an option is not valid.
        """
        entries = None if keywords is None else keyword_entries(keywords)
        lists = {"has_keyword_lists": entries is not None, "has_drafts": draft is not None}
        plan = self._intake.plan(options, fields, **lists)
        check_mixed(plan.options)
        return self._intake.begin(
            Input(name_of(audio, 0), audio, None, entries, draft),
            plan,
            sampling_rate=sampling_rate,
            on_segment=on_segment,
            deadline=self._deadline if deadline is None else _checked_deadline(deadline),
        )

    async def transcribe_async(
        self, audio: Any, options: TranscribeOptions | None = None, **arguments: Any
    ) -> Transcript:
        """`submit` for asyncio: waits for the Transcript. Arguments as in `submit`; canceling the task cancels it."""
        return await asyncio.wrap_future(self.submit(audio, options, **arguments))

    @contextlib.contextmanager
    def serving(self, deadline: float = 0.05) -> Iterator["Transcriber"]:
        """While inputs come one by one, as to a server: a batch that is not full goes when the device is idle, or when
        one of its segments has waited for `deadline` seconds.
        """
        former, self._deadline = self._deadline, _checked_deadline(deadline)
        try:
            yield self
        finally:
            self._deadline = former

    def expecting(self) -> AbstractContextManager[None]:
        """While inputs are submitted one after another: full batches wait for them."""
        return self._engine.expecting()

    @jax.transfer_guard("allow")  # as in `Engine`
    def ctc_emissions(self, audio: Any, *, sampling_rate: int | None = None) -> Emissions:
        """Features and CTC logits of one input in any form that `transcribe` takes. Raises AudioError, ContextError."""
        samples = self._intake.load(audio, sampling_rate, name_of(audio, 0)).samples
        padded = np.zeros((1, -(-len(samples) // SAMPLING_RATE) * SAMPLING_RATE), np.float32)
        padded[0, : len(samples)] = samples
        programs = self.recognizer().programs
        params, lengths = programs.devices.unstack(self.params), np.array([len(samples)], np.int32)
        *arrays, frames = map(np.asarray, _emissions(self.config, self._dtype, params, padded, lengths))
        return Emissions(*(array[0, : frames[0]] for array in arrays))

    def segment_seconds(self, options: TranscribeOptions) -> float:
        """The longest audio, in seconds, that is decoded in one pass. Raises GraniteError as `stream` does."""
        seconds = self._intake.plan(options, {}).seconds
        return self.config.max_seconds if seconds is None else seconds


@functools.partial(jax.jit, static_argnums=(0, 1))
def _emissions(config: Any, dtype: Any, params: Any, samples: Any, lengths: Any) -> tuple[jax.Array, ...]:
    """Features and CTC logits of rows of audio, and how many frames each has."""
    encoding = encoder_of(config).encode(config, params, samples, lengths, dtype=dtype, with_audio=False)
    packing = encoding.packing
    return packing.unpack(encoding.features), packing.unpack(encoding.labels.logits), packing.lengths


def _checked_deadline(seconds: Any) -> float:
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
        raise GraniteError(f"deadline is {seconds!r:.60}, not a number of seconds")
    return seconds


def _drafts_or_none(draft: Any, count: int) -> list[str | None] | None:
    """A caller's drafts as one for each input; None if there are none."""
    drafts = drafts_for(draft, count)
    return drafts if any(each is not None for each in drafts) else None


def enable_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache directory, unless JAX was configured with a directory already.

    Warns if that directory cannot be written.
    """
    with contextlib.suppress(CheckpointError):  # the user has no home directory
        keep_compiled_programs(cache_directory() / "xla")


def _transcripts(
    finished: "Generator[tuple[Input, Future[Transcript]]]", on_error: Literal["raise", "return"]
) -> Generator[Transcript]:
    """Results of inputs; errors are raised in their places, or are results."""
    with contextlib.closing(finished):
        for each, future in finished:
            try:
                transcript = future.result()
            except GraniteError as error:
                if on_error == "raise":
                    raise
                stats = {"transient": True} if isinstance(error, AccessError) else {}
                number = None if each.channel is None else each.channel + 1
                transcript = Transcript(each.name, error=str(error), stats=stats, flags=error.flags, channel=number)
            yield transcript


def _is_tuple_of_files(audio: Any) -> bool:
    return isinstance(audio, tuple) and bool(audio) and all(isinstance(source, str | os.PathLike) for source in audio)
