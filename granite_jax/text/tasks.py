"""What a model is asked to do: the prompts of model cards, and the recognition of a caller's own prompts.

A prompt of a caller's own is sent only if the model was trained with it, because a model that does not know a prompt
can do anything. `Capabilities.recognize` decides that.
"""

from __future__ import annotations

import contextlib
import functools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from granite_jax.errors import CheckpointError, PromptError
from granite_jax.text.chat_template import MAX_PROMPT_CHARS, ChatTemplate, PromptTokens, check_text

__all__ = [
    "LANGUAGES",
    "TASKS",
    "Capabilities",
    "ChatTemplate",
    "PromptTokens",
    "Prompts",
    "check_task",
    "instruction",
    "language_code",
]

TASKS = ("transcribe", "punctuate", "translate", "translate-punctuated")
LANGUAGES = {
    "en": "English",
    "fr": "French",
    "de": "German",
    "es": "Spanish",
    "pt": "Portuguese",
    "ja": "Japanese",
    "it": "Italian",
    "zh": "Mandarin",
}
"""Languages and their names in prompts. Speech may be in the first six, translated from or to English; Italian and
Mandarin are targets for English speech, and of granite-speech-5.0-2b speech, too."""
SPEECH_LANGUAGES = ("en", "fr", "de", "es", "pt", "ja")

_TRANSCRIBE = "can you transcribe the speech into a written format?"
_ALIASES = {name.lower(): code for code, name in LANGUAGES.items()} | {"chinese": "zh", "mandarin chinese": "zh"}
_KEYWORDS = re.compile(r"\s*\bkeywords:", re.IGNORECASE)
_MAX_KEYWORD_WORDS = 8
# What would make a keyword in a prompt a second instruction, or another turn: what the prompts say, a role, a sentence
# that another follows ("St. Gallen" is none).
_LIKE_AN_INSTRUCTION = re.compile(
    r"(?i:(transcri|translat)\w*\b.*\b(speech|audio|text|into|to|in)\b"
    r"|\b(into|to)\b.*(transcri|translat)"
    r"|(keywords|user|assistant|system)\s*:"
    r"|reconnaître le contenu)"
    r"|[!?;:]\s+\w|[\u3002\uff01\uff1f]\s*\w|(?<!\b[A-Z])(?<!\b[A-Z]\w)(?<!\b[A-Z]\w\w)(?<!\b[A-Z]\w\w\w)\.\s+\w"
)


@dataclass(frozen=True)
class Prompts:
    """The prompts that a model was trained with. The defaults are those of granite-speech-4.1-2b's card, without hints.

    Fields:
      transcribe: for a raw transcript, lower case and without punctuation.
      transcribe_in: the same in other languages than English, as pairs of the speech's language and the prompt.
      with_keywords: takes the place of `transcribe` where keywords are mentioned after it.
      punctuate: for a transcript with punctuation and capitals.
      punctuate_in: the same with a language hint; `{}` stands for the language's name. Empty if there is none.
      translate, translate_punctuated: for a translation, without and with punctuation; `{}` stands for the target.
      hint: a sentence with a language hint before the prompt of any transcript; empty if there is none.
      max_keywords: the most keywords that a prompt mentions.
    """

    transcribe: str = _TRANSCRIBE
    transcribe_in: tuple[tuple[str, str], ...] = ()
    with_keywords: str = "transcribe the speech to text."
    punctuate: str = "transcribe the speech with proper punctuation and capitalization."
    punctuate_in: str = ""
    translate: str = "translate the speech to {}."
    translate_punctuated: str = "translate the speech to {} with proper punctuation and capitalization."
    hint: str = ""
    max_keywords: int = 100

    @property
    def max_chars(self) -> int:
        """The most characters of a prompt and its keywords."""
        return MAX_PROMPT_CHARS * max(1, self.max_keywords // 100)

    def text(
        self,
        task: str,
        *,
        target_language: str | None = None,
        language: str | None = None,
        with_keywords: bool = False,
    ) -> str:
        """The prompt of a task; the arguments as in `instruction`. Raises PromptError if there is no such hint."""
        if target_language is not None:
            wording = self.translate if task == "translate" else self.translate_punctuated
            return wording.format(LANGUAGES[language_code(target_language)])
        plain = self.punctuate if task == "punctuate" else self.with_keywords if with_keywords else self.transcribe
        if language is None:
            return plain
        code = language_code(language)
        if self.hint:
            return self.hint.format(LANGUAGES[code]) + plain
        if task == "punctuate" and self.punctuate_in:
            return self.punctuate_in.format(LANGUAGES[code])
        hinted = {"en": plain, **({} if with_keywords else dict(self.transcribe_in))}
        if task == "transcribe" and self.transcribe_in and code in hinted:
            return hinted[code]
        clause = " and keywords" if with_keywords else ""
        raise PromptError(
            f"this model has no prompt for task {task!r} with the hint that speech is {LANGUAGES[code]}{clause}"
        )


def check_task(task: str, target_language: str | None = None, language: str | None = None) -> None:
    """Checks the fields that choose a prompt, as far as any model goes.

    Raises:
      PromptError: one is unknown, missing, or at odds with another.
    """
    if task not in TASKS:
        raise PromptError(f"unknown task {task!r:.60}, supported: {_listed(TASKS)}")
    is_translation = task.startswith("translate")
    if is_translation and target_language is None:
        raise PromptError(f"task {task!r} needs target_language, one of {_listed(LANGUAGES)}")
    if not is_translation and target_language is not None:
        raise PromptError(f"target_language {target_language!r:.60} is for task 'translate' only, not for {task!r}")
    if is_translation and language is not None:
        raise PromptError(f"language {language!r:.60} is a hint for transcripts, not for task {task!r}")
    for named in (target_language, language):
        if named is not None:
            language_code(named)


def instruction(
    task: str = "transcribe",
    *,
    target_language: str | None = None,
    language: str | None = None,
    prompt: str | None = None,
    keywords: Iterable[str] = (),
    prompts: Prompts | None = None,
) -> str:
    """The text that follows the audio in the user's turn.

    Args:
      task: "transcribe" (lower case, no punctuation), "punctuate", "translate" or "translate-punctuated".
      target_language: target of a translation, as a code ("fr") or a name ("French").
      language: a hint in which language the speech of a transcript is, likewise.
      prompt: a prompt to use instead of the task's, unchecked.
      keywords: names and terms to mention in the prompt.
      prompts: those of the model.

    Raises:
      PromptError: an argument is unknown, missing, at odds with another, or not one line of text; the model has no
        prompt for it; or a keyword reads like an instruction.
    """
    prompts = prompts or Prompts()
    clause = _keyword_clause(keywords)
    if prompt is not None:
        if target_language is not None or language is not None:
            raise PromptError("a prompt excludes target_language and language: a prompt of your own names them itself")
        text = check_text("prompt", prompt, prompts.max_chars)
    else:
        check_task(task, target_language, language)
        text = prompts.text(task, target_language=target_language, language=language, with_keywords=bool(clause))
    return check_text("prompt with keywords", text + clause, prompts.max_chars)


def language_code(language: str) -> str:
    """The code ("fr") of a language given as a code or an English name, in any case."""
    key = language.strip().lower() if isinstance(language, str) else ""
    code = _ALIASES.get(key, key)
    if code not in LANGUAGES:
        supported = ", ".join(f"{code} ({name})" for code, name in LANGUAGES.items())
        raise PromptError(f"unknown language {language!r:.60}, supported: {supported}")
    return code


def _keyword_clause(keywords: Iterable[str]) -> str:
    if isinstance(keywords, str):
        raise PromptError(f"keywords must be a list of strings, not one string ({keywords!r:.60})")
    names = [check_text("keyword", keyword).strip() for keyword in keywords]
    for name in names:
        if "," in name:
            raise PromptError(f"keyword {name!r:.60} has a comma, which separates keywords in the prompt: split it")
        if any(unicodedata.category(char) == "Cf" for char in name):
            raise PromptError(f"keyword {name!a:.60} has invisible characters")
        if len(name.split()) > _MAX_KEYWORD_WORDS or _LIKE_AN_INSTRUCTION.search(name):
            raise PromptError(f"keyword {name!r:.60} reads like an instruction, and would be one in the prompt")
    return f" Keywords: {', '.join(names)}" if names else ""


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


@dataclass(frozen=True)
class Capabilities:
    """What a checkpoint was trained for.

    Fields:
      tasks: names from `TASKS`.
      languages: codes of the languages that it can translate to.
      speech_languages: codes of the languages that it understands.
      prompts: the prompts of its tasks.
      trained_prompts: further prompts that it was trained with.
      segment_seconds: how long a segment of a recording should be at most.
      word_offsets: seconds to add to the starts and to the ends of words, as measured for this CTC head.
    """

    tasks: tuple[str, ...] = TASKS
    languages: tuple[str, ...] = tuple(LANGUAGES)
    speech_languages: tuple[str, ...] = SPEECH_LANGUAGES
    prompts: Prompts = Prompts()
    trained_prompts: tuple[str, ...] = ()
    segment_seconds: float = 30.0
    word_offsets: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], default: Capabilities | None = None) -> Capabilities:
        """Reads {"granite_jax": {"tasks", "languages", "speech_languages", "prompts", ...}} of a config.json.

        "prompts" are the `trained_prompts`; the other keys are named like the fields. Absent keys are taken from
        `default`, which itself defaults to everything. Raises CheckpointError for anything but lists of known names and
        of prompts that are one line of text, and plausible numbers.
        """
        default = default or cls()
        recorded = config.get("granite_jax", {})
        if not isinstance(recorded, Mapping):
            raise CheckpointError(f"config: granite_jax must be an object, not {recorded!r:.60}")
        tasks = _names(recorded, "tasks", TASKS, default.tasks)
        languages = _names(recorded, "languages", tuple(LANGUAGES), default.languages)
        speech_languages = _names(recorded, "speech_languages", tuple(LANGUAGES), default.speech_languages)
        trained = recorded.get("prompts", [])
        try:
            if not isinstance(trained, Sequence) or isinstance(trained, str):
                raise PromptError("it is no list")
            trained_prompts = tuple(check_text("a prompt", prompt) for prompt in trained)
        except PromptError as error:
            raise CheckpointError(f"config: granite_jax.prompts must be a list of prompts, but {error}") from None
        (seconds,) = _numbers(recorded, "segment_seconds", (default.segment_seconds,), 5.0, 600.0)
        start, end = _numbers(recorded, "word_offsets", default.word_offsets, -1.0, 1.0)
        return cls(tasks, languages, speech_languages, default.prompts, trained_prompts, seconds, (start, end))

    def check(self, task: str, target_language: str | None = None, language: str | None = None) -> None:
        """Raises PromptError unless the checkpoint was trained for the task, with that target and hint if given."""
        check_task(task, target_language, language)
        if task not in self.tasks:
            raise PromptError(f"this checkpoint was not trained for task {task!r}, only for {_listed(self.tasks)}")
        if target_language is not None and language_code(target_language) not in self.languages:
            trained = _listed(self.languages) or "no language"
            raise PromptError(f"this checkpoint was not trained to translate to {target_language!r}, only to {trained}")
        if language is not None:
            if language_code(language) not in self.speech_languages:
                trained = _listed(self.speech_languages)
                raise PromptError(f"this checkpoint was not trained for speech in {language!r}, only in {trained}")
            self.prompts.text(task, language=language)

    def instruction(self, **fields: Any) -> str:
        """`instruction` with this checkpoint's prompts."""
        return instruction(**fields, prompts=self.prompts)

    def recognize(self, prompt: str) -> RecognizedPrompt | None:
        """What a prompt asks for; None if the model was not trained with it.

        Case, spaces and kinds of hyphens do not matter. The keywords of a clause at the end are not checked.
        """
        try:
            check_text("prompt", prompt, self.prompts.max_chars)
        except PromptError:
            return None
        if (found := self._known_prompts.get(_folded(prompt))) is not None:
            return found
        base, *clause = _KEYWORDS.split(prompt, maxsplit=1)
        found = self._known_prompts.get(_folded(base), self._bases_of_keywords.get(_folded(base)))
        if not clause or found is None:
            return None
        return found._replace(keywords=tuple(keyword.strip() for keyword in clause[0].split(",")))

    @functools.cached_property
    def _known_prompts(self) -> dict[str, RecognizedPrompt]:
        """By folded text."""
        known = {_folded(text): RecognizedPrompt(prompt=text) for text in self.trained_prompts}
        for choice in self._choices():
            with contextlib.suppress(PromptError):  # the model has no such hint
                known[_folded(self._text(choice))] = choice
        if "transcribe" in self.tasks:
            known.setdefault(_folded(self.prompts.with_keywords), RecognizedPrompt(prompt=self.prompts.with_keywords))
        return known

    @functools.cached_property
    def _bases_of_keywords(self) -> dict[str, RecognizedPrompt]:
        """By folded text, what stands before keywords."""
        bases = {}
        for choice in self._choices():
            with contextlib.suppress(PromptError):
                bases[_folded(self._text(choice, with_keywords=True))] = choice
        return bases

    def _text(self, choice: RecognizedPrompt, with_keywords: bool = False) -> str:
        languages = {"target_language": choice.target_language, "language": choice.language}
        return self.prompts.text(choice.task, **languages, with_keywords=with_keywords)

    def _choices(self) -> Iterator[RecognizedPrompt]:
        for task in self.tasks:
            if task.startswith("translate"):
                yield from (RecognizedPrompt(task, target_language=code) for code in self.languages)
            else:
                yield from (RecognizedPrompt(task, language=code) for code in self.speech_languages)
                yield RecognizedPrompt(task)  # last, so that a prompt that a hint leaves unchanged means no hint


class RecognizedPrompt(NamedTuple):
    """The fields of `TranscribeOptions` that a prompt stands for, and the keywords in it."""

    task: str = "transcribe"
    target_language: str | None = None
    language: str | None = None
    prompt: str | None = None
    keywords: tuple[str, ...] = ()


def _folded(prompt: str) -> str:
    return " ".join(prompt.replace("\u2010", "-").replace("\u2011", "-").split()).casefold()


def _numbers(
    section: Mapping[str, Any], key: str, default: tuple[float, ...], low: float, high: float
) -> tuple[float, ...]:
    """The number, or the list of numbers, under a key: as many as in `default`."""
    value = section.get(key, default)
    values = value if isinstance(value, list | tuple) else [value]
    are_numbers = all(isinstance(v, int | float) and not isinstance(v, bool) and low <= v <= high for v in values)
    if len(values) != len(default) or not are_numbers:
        count = "a number" if len(default) == 1 else f"{len(default)} numbers"
        raise CheckpointError(f"config: granite_jax.{key} must be {count} from {low:g} to {high:g}, not {value!r:.60}")
    return tuple(map(float, values))


def _names(
    section: Mapping[str, Any], key: str, supported: tuple[str, ...], default: tuple[str, ...]
) -> tuple[str, ...]:
    names = section.get(key, default)
    if not isinstance(names, Sequence) or isinstance(names, str) or any(name not in supported for name in names):
        raise CheckpointError(
            f"config: granite_jax.{key} must be a list of names from {_listed(supported)}, not {names!r:.60}"
        )
    return tuple(names)
