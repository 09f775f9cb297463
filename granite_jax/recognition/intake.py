"""From a caller's options and inputs to jobs: what inputs with the same options share, and what each is decoded as."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np

from granite_jax.audio.load import Audio, is_encoded, load_audio
from granite_jax.audio.resample import TooLongError
from granite_jax.engine.engine import Engine
from granite_jax.engine.readers import Readers
from granite_jax.engine.stages import Request
from granite_jax.errors import ContextError, GraniteError, PromptError, printable
from granite_jax.keywords.options import keyword_entries
from granite_jax.models.registry import default_recognizer, encoder_of, family_of, model_of
from granite_jax.options import MIN_SEGMENT_SECONDS, RecognizerName, TranscribeOptions
from granite_jax.recognition.buckets import longest_audio, new_token_budget
from granite_jax.recognition.inputs import Input
from granite_jax.recognition.jobs import ANY_LENGTH, RecordingJob, read_segments, read_whole
from granite_jax.recognition.preparation import Preparation, Prepared
from granite_jax.recognition.recognizer import Recognizer, make_request
from granite_jax.recognition.recordings import OnSegment, RecordingDecoder
from granite_jax.recognition.safeguard import safeguarded
from granite_jax.recognition.utterances import NO_PROMPT, Utterance
from granite_jax.results import Transcript
from granite_jax.text.chat_template import PromptTokens
from granite_jax.text.tasks import Capabilities, ChatTemplate
from granite_jax.text.tokenizer import Tokenizer
from granite_jax.waveform import SAMPLING_RATE

_MAX_PLANS = 16


class Plan(NamedTuple):
    """What inputs with the same options share.

    Fields:
      flags: of their transcripts.
      seconds: of the longest segment; None for one pass.
    """

    options: TranscribeOptions
    flags: tuple[str, ...]
    prepared: Prepared
    seconds: float | None


class Intake:
    """Begins with inputs: from options to what those that share them have in common, and from there to a job each.

    Any thread can call it.
    """

    def __init__(
        self,
        config: Any,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        capabilities: Capabilities,
        recognizers: Mapping[str, Recognizer],
        engine: Engine,
        readers: Readers,
    ):
        self._config, self._tokenizer, self._capabilities = config, tokenizer, capabilities
        self._recognizers, self._engine, self._readers = recognizers, engine, readers
        self._default: RecognizerName = default_recognizer(config)
        num_labels = encoder_of(config).num_labels(config)
        self._preparation = Preparation(tokenizer, template, capabilities, num_labels)
        self._plans: dict[object, tuple[TranscribeOptions | None, Plan]] = {}  # the options keep their ids from reuse

    def recognizer(self, options: TranscribeOptions | None = None) -> Recognizer:
        """The recognizer that options ask for; by default the first of the model's family."""
        return self._recognizers[(options and options.recognizer) or self._default]

    def default_prompt(self, options: TranscribeOptions | None = None) -> PromptTokens:
        """The tokens of a plain transcription's prompt, if the recognizer takes prompts."""
        is_ctc = ((options and options.recognizer) or self._default) == "ctc"
        return NO_PROMPT if is_ctc else self._preparation.prompt(self._capabilities.prompts.transcribe)

    def plan(
        self,
        options: TranscribeOptions | None,
        fields: Mapping[str, Any],
        *,
        has_keyword_lists: bool = False,
        has_drafts: bool = False,
    ) -> Plan:
        """What inputs with the same options share. Raises GraniteError for the options."""
        key = id(options), has_keyword_lists, has_drafts
        if not fields and key in self._plans:
            return self._plans[key][1]
        given = dataclasses.replace(options or TranscribeOptions(), **fields)
        if given.recognizer is None and self._default != "speech-lm":
            given = dataclasses.replace(given, recognizer=self._default)
        model = model_of(self._config, given.recognizer or self._default)
        resolved, flags = safeguarded(given, self._capabilities)
        if resolved.keywords != given.keywords and has_keyword_lists:
            raise PromptError("a prompt with keywords of its own excludes keywords: name them in one place")
        if resolved.drafting.draft_from == "bpe" and not model.num_bpe_labels(self._config):
            raise GraniteError('draft_from="bpe" needs a BPE head, which this checkpoint does not have')
        if has_drafts and resolved.recognizer == "ctc":
            raise GraniteError('draft is for the language model, which recognizer="ctc" does without')
        if has_drafts and resolved.speculative != "lossless":
            raise GraniteError(f'draft is for speculative="lossless", not for {resolved.speculative!r}')
        shared = self._preparation.prepare(resolved, resolved.keywords)  # its errors are not those of one input
        seconds = self._segment_limit(resolved, shared)
        plan = Plan(resolved, flags, shared, seconds)
        if not fields and not flags:  # whose warning is given each time
            self._plans = ({} if len(self._plans) >= _MAX_PLANS else self._plans) | {key: (options, plan)}
        return plan

    def begin(
        self,
        each: Input,
        plan: Plan,
        *,
        sampling_rate: float | None = None,
        on_segment: OnSegment | None = None,
        deadline: float = math.inf,
    ) -> "Future[Transcript]":
        """Begins with one input; the future has its errors, too.

        Args:
          sampling_rate: in Hz, of an array that comes without one.
          on_segment: called with its name and each of its segments, by the thread that makes it.
          deadline: seconds, as in `Request`.
        """
        options, prepared = plan.options, plan.prepared
        try:
            if each.keywords is not None:
                prepared = self._preparation.prepare(options, keyword_entries(each.keywords))
        except GraniteError as error:
            failed: Future[Transcript] = Future()
            failed.set_exception(error)
            return failed
        recognizer = self.recognizer(options)
        draft = None if each.draft is None else tuple(self._tokenizer.encode(each.draft))

        def make_utterance(samples: np.ndarray) -> Utterance:
            audio = Audio(each.name, samples)
            budget = None
            if options.recognizer != "ctc":
                budget = options.max_new_tokens or new_token_budget(audio.duration)
            return Utterance(audio, options, prepared.prompt, budget, draft, prepared.keywords, plan.flags)

        def request(utterance: Utterance) -> Request:
            made = make_request(recognizer, utterance, deadline=deadline)
            if made is None:
                raise ContextError(self._too_long(utterance, recognizer.prompt_length(utterance)))
            return made

        where = {"sampling_rate": sampling_rate, "channel": each.channel}
        if plan.seconds is None:
            segments = read_whole(each.source, each.name, self.load, **where)
        else:
            segments = read_segments(
                each.source,
                each.name,
                seconds=plan.seconds,
                overlap=options.is_transcript,
                one_only="" if draft is None else "a draft is for audio of one segment",
                **where,
            )
        make_decoder = functools.partial(
            RecordingDecoder,
            make_utterance=make_utterance,
            tokenizer=self._tokenizer,
            options=options,
            name=each.name,
            channel=None if each.channel is None else each.channel + 1,
            word_offsets=recognizer.aligner.word_offsets,
            on_segment=on_segment,
        )
        job = RecordingJob(self._engine, self._readers, segments, make_decoder, request)
        self._readers.add(job)
        return job.result

    def load(self, source: Any, rate: float | None, name: str) -> Audio:
        """Reads an input for one pass. Raises AudioError, or ContextError if it is too long for the model."""
        if is_encoded(source):
            rate = None  # files have their own
        try:
            return load_audio(source, sampling_rate=rate, name=name, max_seconds=self._config.max_seconds)
        except TooLongError as error:
            positions = family_of(self._config.model_type).limits(self._config).get("positions")
            limit = f"the model's context of {positions} positions allows" if positions else "the model takes"
            raise ContextError(f"{error}, more than {limit}") from None

    def _segment_limit(self, options: TranscribeOptions, prepared: Prepared) -> float | None:
        """The longest segment, in seconds. Raises ContextError if it is given and does not fit the model."""
        chosen = options.segment_seconds
        if chosen is None:
            return None
        longest = max(bucket.samples for bucket in self.recognizer(options).buckets) / SAMPLING_RATE
        if options.recognizer != "ctc":
            longest = min(longest, longest_audio(self._config, prepared.num_prompt_tokens, options.max_new_tokens))
        if chosen == "auto":
            return max(min(self._capabilities.segment_seconds, longest), MIN_SEGMENT_SECONDS)
        if chosen > longest:
            raise ContextError(
                f"segment_seconds is {chosen:g}, but at most {longest:.0f} s fit the model and its buckets"
            )
        return float(chosen)

    def _too_long(self, utterance: Utterance, length: int) -> str:
        """Why an utterance with a prompt of `length` tokens fits no bucket."""
        audio, options, budget = utterance.audio, utterance.options, utterance.max_new_tokens
        name = printable(audio.name)
        if budget is None:
            return f"{name}: {audio.duration:.1f} s of audio exceed every bucket of this Transcriber; {ANY_LENGTH}"
        positions = self._config.decoder.max_position_embeddings
        if length + budget > positions:
            limit = f"the model's context of {positions} positions"
        else:
            limit = f"every bucket of this Transcriber (the model has {positions} positions)"
        num_prompt_tokens = len(utterance.prompt.prefix) + len(utterance.prompt.suffix)
        longest = longest_audio(self._config, num_prompt_tokens, options.max_new_tokens)
        is_remedy = options.segment_seconds is None and MIN_SEGMENT_SECONDS <= longest < audio.duration
        return (
            f"{name}: {audio.duration:.1f} s of audio with its prompt take {length} positions, "
            f"which with {budget} new tokens exceeds {limit}; at most {longest:.0f} s fit the model, "
            f"{longest_audio(self._config, num_prompt_tokens, 1):.0f} s with max_new_tokens=1"
            f"{f'; {ANY_LENGTH}' if is_remedy else ''}"
        )
