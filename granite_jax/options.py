"""Options of inference: the model and its devices, what to write, and how drafts and keywords are used.

`ModelOptions` and `TranscribeOptions` have one flat field per option. The Python API, every command, batch jobs,
evaluations and Ray take these two objects, which are checked when they are made.
"""

import dataclasses
import functools
import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from granite_jax.errors import GraniteError, PromptError
from granite_jax.keywords.options import Entry, KeywordOptions, KeywordsIn, keyword_entries, plain_number
from granite_jax.text.chat_template import check_text
from granite_jax.text.tasks import TASKS, check_task

Parallel = Literal["shard_map", "pmap"]
Speculative = Literal["lossless", "relaxed", "relaxed-accurate", "relaxed-fast", False]
DraftFrom = Literal["ctc", "bpe"]
Channels = Literal["mix", "split"]
RecognizerName = Literal["speech-lm", "ctc"]

PRESETS: Mapping[str, tuple[float, float]] = {
    "relaxed": (0.7, 0.2),
    "relaxed-accurate": (0.7, 0.2),
    "relaxed-fast": (3.0, 0.1),
}
"""(τ_CTC in nats, τ_SLM) of arXiv 2603.11243, table 2: the first for accuracy, the last for speed."""

MODES = ("lossless", *PRESETS)
MIN_SEGMENT_SECONDS = 5.0
_OF_THE_LANGUAGE_MODEL = (
    *("task", "target_language", "language", "prompt", "allow_custom_prompt", "max_new_tokens", "speculative"),
    *("draft_from", "ctc_threshold", "verify_threshold", "keyword_boost", "keywords_in"),
)
_MAX_PROMPT = 1 << 20  # characters, whatever the model; how many it takes is checked with its prompts


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model runs, and where. `Transcriber.from_pretrained` takes the same fields.

    Fields:
      checkpoint: "demo", a directory of `granite-jax convert`, a Hugging Face directory, or a hub id.
      revision: branch, tag or commit of a hub id.
      dtype: "bfloat16" or "float32"; default bfloat16 on accelerators that have it, else float32.
      devices: JAX devices to run on; default all local devices, or only the first CPU.
      parallel: how batches are spread over devices: "shard_map", or "pmap" with the same results.
      model_parallel: devices that share one copy of the weights, split between them; for models too big for one.
      batch_size: rows of a full batch on each device; default 64 on a TPU, 32 on a GPU, 8 on a CPU.
      compilation_cache: keep compiled programs in the user's cache directory, unless JAX was given another.
      compile_ahead: begin to compile the programs of all buckets while the weights are read, as many at a time as there
        are cores, instead of each bucket's when it is first needed.
    """

    checkpoint: str | os.PathLike[str] = "demo"
    revision: str | None = None
    dtype: Any = None
    devices: Sequence[Any] | None = None
    parallel: Parallel = "shard_map"
    model_parallel: int = 1
    batch_size: int | None = None
    compilation_cache: bool = True
    compile_ahead: bool = False

    def __post_init__(self) -> None:
        _make_numbers_plain(self)
        for name in ("model_parallel", "batch_size"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise GraniteError(f"{name} is {value!r:.60}, not a positive number")
        if self.parallel not in ("shard_map", "pmap"):
            raise GraniteError(f'parallel is "shard_map" or "pmap", not {self.parallel!r:.60}')


@dataclasses.dataclass(frozen=True)
class SpeculativeOptions:
    """How drafts are used.

    Fields:
      drafts: whether the encoder drafts for inputs that come without a draft.
      ctc_threshold: in nats; a CTC text is final if all of its frames have less entropy. 0 accepts none.
      verify_threshold: likelihood that every draft token must exceed in the language model. Infinite (lossless): the
        tokens must be those of greedy decoding.
      draft_from: the head that drafts; None for the BPE head if there is one.
    """

    drafts: bool = True
    ctc_threshold: float = 0.0
    verify_threshold: float = math.inf
    draft_from: DraftFrom | None = None

    @classmethod
    def from_mode(
        cls, speculative: str | bool, ctc_threshold: float | None = None, verify_threshold: float | None = None
    ) -> "SpeculativeOptions":
        """The options of a mode.

        Args:
          speculative: "lossless", "relaxed" (the same as "relaxed-accurate"), "relaxed-fast", or False.
          ctc_threshold, verify_threshold: in relaxed modes, values that replace the preset's.

        Raises:
          GraniteError: naming the option that is unknown or out of range.
        """
        arguments = {"ctc_threshold": ctc_threshold, "verify_threshold": verify_threshold}
        thresholds = {name: value for name, value in arguments.items() if value is not None}
        if speculative is not False and (not isinstance(speculative, str) or speculative not in MODES):
            raise GraniteError(f"speculative is one of {', '.join(MODES)}, or False, not {speculative!r:.60}")
        if speculative not in PRESETS:
            if thresholds:
                name = next(iter(thresholds))
                raise GraniteError(f"{name} is for relaxed modes, not for speculative={speculative!r}")
            return cls(drafts=speculative == "lossless")
        for name, value in thresholds.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise GraniteError(f"{name} is {value!r:.60}, not a finite number of at least 0")
        ctc, verify = PRESETS[str(speculative)]
        return cls(
            ctc_threshold=thresholds.get("ctc_threshold", ctc),
            verify_threshold=thresholds.get("verify_threshold", verify),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TranscribeOptions:
    """What to write, and how. `Transcriber.transcribe` takes the same fields.

    Fields:
      task: "transcribe" (lower case, no punctuation), "punctuate", "translate" or "translate-punctuated".
      target_language: language of a translation, as a code ("fr") or an English name ("French").
      language: a hint in which language the speech of a transcript is, likewise, for models that take one.
      prompt: another of the prompts that the model was trained with, which replaces the task's. Any other is ignored,
        with a warning and the flag "prompt-fallback", and the raw transcript is written instead.
      allow_custom_prompt: send any other prompt, too. What the model then writes is for research.
      max_new_tokens: default 200, or 6 per second of audio if that is more.
      speculative: how drafts save passes of the language model. "lossless": the same text as without drafts, only
        sooner. "relaxed" (or "relaxed-accurate"), "relaxed-fast": a confident draft of the CTC head is final, and so is
        one that the language model finds plausible (arXiv 2603.11243). False: no drafts. The encoder drafts raw
        transcripts only: other tasks and your own prompts have no drafts, except a `draft` that you pass.
      draft_from: the encoder's head that drafts: "ctc" for characters, or "bpe" for the language model's tokens, which
        is the default where the checkpoint has such a head. "bpe" drafts punctuated transcripts, too, if it is given.
      ctc_threshold: in relaxed modes, in nats: a CTC text is final if all of its frames have less entropy.
      verify_threshold: in relaxed modes: the likelihood that every token of a draft must exceed to be accepted.
      keywords: up to 2,048 names and terms that may be spoken, in the letter case that the text should have (raw
        transcripts are always lower case). An entry is a text, or a pair (text, boost). A
        mapping from texts to boosts is accepted, too.
      keyword_boost: nats added to the last token of a keyword. The first gets a quarter, and all tokens get more where
        the CTC head has heard the keyword. The default is measured (benchmarks/keywords.py); 0 adds nothing.
      keyword_gate: nats per character, below 0: keywords to which the CTC head gives a lower score are left out, so
        that long lists do no harm. Keywords that it cannot spell (digits, other scripts) are always used. False: all
        keywords are used, heard or not.
      keywords_in: "decoder" biases decoding, with lists of any length and any task, and leaves other text as it would
        have been. "prompt" mentions them in the prompt, up to 100 or as many as the model's card
        says ("Keywords: a, b"); other words can then change, too. "both" does both.
      word_timestamps: give each word of a transcript its start, end and confidence, by CTC forced alignment. Segments
        of translations have times, their words have none.
      segment_seconds: longer audio is cut at pauses into segments of at most this length, which are decoded apart and
        joined. "auto": as long as is good for the model, 30 seconds unless its checkpoint says otherwise. None: one
        pass over everything, as far as the model's context goes.
      guards: notice text that the audio does not support, segment by segment: a text that repeats itself without end,
        that stops at the budget of new tokens, that leaves out a passage, or that was written where nobody speaks.
        Such a segment is decoded again in smaller pieces, or gets the encoder's own text. False: the model's text.
      channels: "mix" takes the mean of the channels; "split" transcribes each on its own.
      recognizer: "speech-lm", the language model, which is the default; or "ctc", the encoder's own text: lower case,
        without punctuation, less accurate, and much faster. Options of the language model are then errors. Keywords
        that were heard replace what the encoder misspelled.
    """

    task: str = "transcribe"
    target_language: str | None = None
    language: str | None = None
    prompt: str | None = None
    allow_custom_prompt: bool = False
    max_new_tokens: int | None = None
    speculative: Speculative = "lossless"
    draft_from: DraftFrom | None = None
    ctc_threshold: float | None = None
    verify_threshold: float | None = None
    keywords: tuple[Entry, ...] = ()
    keyword_boost: float | None = None
    keyword_gate: float | Literal[False] | None = None
    keywords_in: KeywordsIn = "decoder"
    word_timestamps: bool = False
    segment_seconds: float | Literal["auto"] | None = "auto"
    guards: bool = True
    channels: Channels = "mix"
    recognizer: RecognizerName | None = None

    def __post_init__(self) -> None:
        _make_numbers_plain(self)
        self._check_recognizer()
        self._check_recording()
        self._check_prompt()
        limit = self.max_new_tokens
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
            raise GraniteError(f"max_new_tokens is {limit!r:.60}, not a positive number")
        object.__setattr__(self, "keywords", keyword_entries(self.keywords))
        _ = self.drafting, self.biasing  # raise an error if a field is invalid

    def _check_recognizer(self) -> None:
        if self.recognizer not in (None, "speech-lm", "ctc"):
            raise GraniteError(f'recognizer is "speech-lm" or "ctc", not {self.recognizer!r:.60}')
        if self.recognizer != "ctc":
            return
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        allowed = {"task": ("transcribe",), "speculative": ("lossless", False)}
        for name in _OF_THE_LANGUAGE_MODEL:
            if getattr(self, name) not in allowed.get(name, (defaults[name],)):
                raise GraniteError(f'{name} is for the language model, which recognizer="ctc" does without')

    def _check_recording(self) -> None:
        for name in ("word_timestamps", "guards"):
            if not isinstance(getattr(self, name), bool):
                raise GraniteError(f"{name} is True or False, not {getattr(self, name)!r:.60}")
        if self.channels not in ("mix", "split"):
            raise GraniteError(f'channels is "mix" or "split", not {self.channels!r:.60}')
        seconds = self.segment_seconds
        is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
        if not (seconds is None or seconds == "auto" or (is_number and MIN_SEGMENT_SECONDS <= seconds < math.inf)):
            raise GraniteError(
                f'segment_seconds is "auto", None or a number of at least {MIN_SEGMENT_SECONDS:g}, not {seconds!r:.60}'
            )
        if self.word_timestamps and not self.is_transcript:
            raise GraniteError("word_timestamps is for transcripts, not for translations and prompts of your own")

    def _check_prompt(self) -> None:
        if not isinstance(self.allow_custom_prompt, bool):
            raise GraniteError(f"allow_custom_prompt is True or False, not {self.allow_custom_prompt!r:.60}")
        if self.prompt is None:
            check_task(self.task, self.target_language, self.language)
            return
        if not isinstance(self.prompt, str):
            raise PromptError(f"prompt must be a string, not {type(self.prompt).__name__}")
        if self.target_language is not None or self.language is not None:
            raise PromptError("a prompt excludes target_language and language: a prompt of your own names them itself")
        if self.task not in TASKS:
            check_task(self.task)
        if self.allow_custom_prompt:
            check_text("prompt", self.prompt, _MAX_PROMPT)

    @property
    def raw(self) -> bool:
        """Whether the text is a raw transcript, as the CTC head writes it."""
        return self.task == "transcribe" and self.prompt is None

    @property
    def is_transcript(self) -> bool:
        """Whether the text has the words that were spoken, so that it can be compared with the CTC head's."""
        return self.task in ("transcribe", "punctuate") and self.prompt is None

    @functools.cached_property
    def drafting(self) -> SpeculativeOptions:
        """How drafts are used."""
        chosen = SpeculativeOptions.from_mode(self.speculative, self.ctc_threshold, self.verify_threshold)
        if self.draft_from not in (None, "ctc", "bpe"):
            raise GraniteError(f'draft_from is "ctc" or "bpe", not {self.draft_from!r:.60}')
        if self.draft_from is not None and not chosen.drafts:
            raise GraniteError(f"draft_from is for drafts, which speculative={self.speculative!r} does without")
        if self.raw:
            return dataclasses.replace(chosen, draft_from=self.draft_from)
        if self.draft_from == "bpe" and self.task == "punctuate" and self.prompt is None:
            return dataclasses.replace(chosen, draft_from="bpe", ctc_threshold=0.0)  # the CTC text has no punctuation
        if self.draft_from is not None and self.prompt is None:
            raise GraniteError(f"draft_from={self.draft_from!r} does not draft for task {self.task!r}")
        return SpeculativeOptions(drafts=False)

    @functools.cached_property
    def biasing(self) -> KeywordOptions:
        """How keywords are used."""
        lower_case = None if self.prompt is not None else self.task == "transcribe"
        return KeywordOptions.from_fields(self.keyword_boost, self.keyword_gate, self.keywords_in, lower_case)


def _make_numbers_plain(options: Any) -> None:
    """Replaces NumPy scalars, which are not JSON, by Python numbers."""
    for field in dataclasses.fields(options):
        object.__setattr__(options, field.name, plain_number(getattr(options, field.name)))


def resolve(
    model: ModelOptions | str | os.PathLike[str], options: TranscribeOptions | None, fields: Mapping[str, Any]
) -> tuple[ModelOptions, TranscribeOptions]:
    """Makes both options objects: `model` can be a checkpoint name, and `fields` replace theirs."""
    model_options = model if isinstance(model, ModelOptions) else ModelOptions(checkpoint=model)
    names = {field.name for field in dataclasses.fields(ModelOptions)}
    return (
        dataclasses.replace(model_options, **{name: value for name, value in fields.items() if name in names}),
        dataclasses.replace(
            options or TranscribeOptions(), **{name: value for name, value in fields.items() if name not in names}
        ),
    )


def check_mixed(options: TranscribeOptions) -> None:
    """Raises GraniteError if the options ask for several results of one input, where each has one line."""
    if options.channels != "mix":
        raise GraniteError('channels="split" is for Transcriber.transcribe and granite-jax transcribe')


Function = TypeVar("Function", bound=Callable[..., Any])


def accepts(*options: type) -> Callable[[Function], Function]:
    """Adds the fields of `options` to the signature of a function that takes them as `**fields`."""

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        parameters = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        names = {parameter.name for parameter in parameters}
        fields = [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
            for cls in options
            for f in dataclasses.fields(cls)
            if f.name not in names
        ]
        setattr(function, "__signature__", signature.replace(parameters=[*parameters, *fields]))  # noqa: B010
        return function

    return decorate


def drafts_for(draft: str | Sequence[str | None] | None, inputs: int) -> list[str | None]:
    """A caller's `draft=` as one entry per input.

    Raises:
      GraniteError: it is neither a text nor a list with an entry for every input.
    """
    if draft is None:
        return [None] * inputs
    drafts = [draft] if isinstance(draft, str) else draft
    if not isinstance(drafts, list | tuple) or not all(text is None or isinstance(text, str) for text in drafts):
        raise GraniteError("draft must be a text, or a list with one text for every input")
    if len(drafts) != inputs:
        raise GraniteError(f"draft has {len(drafts)} texts for {inputs} inputs")
    return list(drafts)
