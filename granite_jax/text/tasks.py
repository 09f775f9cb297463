"""What the model is asked to do: the instructions of IBM's model cards, and the chat template that wraps them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from granite_jax.errors import CheckpointError, PromptError
from granite_jax.text.chat_template import ChatTemplate, PromptTokens, check_text

__all__ = ["LANGUAGES", "TASKS", "Capabilities", "ChatTemplate", "PromptTokens", "instruction", "language_code"]

TASKS = ("transcribe", "punctuate", "translate")
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
"""Translation targets and their names in the prompt. Speech may be in the first six, translated from or to English;
Italian and Mandarin are targets for English speech only."""

_TRANSCRIBE = "can you transcribe the speech into a written format?"
_TRANSCRIBE_WITH_KEYWORDS = "transcribe the speech to text."
_PUNCTUATE = "transcribe the speech with proper punctuation and capitalization."
_TRANSLATE = "translate the speech to {}."
_ALIASES = {name.lower(): code for code, name in LANGUAGES.items()} | {"chinese": "zh", "mandarin chinese": "zh"}


def instruction(
    task: str = "transcribe",
    *,
    target_language: str | None = None,
    prompt: str | None = None,
    keywords: Iterable[str] = (),
) -> str:
    """The text that follows the audio in the user's turn.

    Args:
      task: "transcribe" (lower case, no punctuation), "punctuate" or "translate".
      target_language: target of a translation, as a code ("fr") or a name ("French").
      prompt: a prompt to use instead of the task's.
      keywords: names and terms to mention in the prompt.

    Raises:
      PromptError: an argument is unknown, missing, at odds with another, or not one line of text of at most 8,192
        characters.
    """
    _check_task(task)
    clause = _keyword_clause(keywords)
    if prompt is not None:
        if target_language is not None:
            raise PromptError(
                "prompt and target_language exclude each other: a prompt of your own names the target itself"
            )
        text = check_text("prompt", prompt)
    elif task == "translate":
        if target_language is None:
            raise PromptError(f"task 'translate' needs target_language, one of {_listed(LANGUAGES)}")
        text = _TRANSLATE.format(LANGUAGES[language_code(target_language)])
    elif target_language is not None:
        raise PromptError(f"target_language {target_language!r:.60} is for task 'translate' only, not for {task!r}")
    elif task == "punctuate":
        text = _PUNCTUATE
    else:
        text = _TRANSCRIBE_WITH_KEYWORDS if clause else _TRANSCRIBE
    return check_text("prompt with keywords", text + clause)


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
    listed = next((name for name in names if "," in name), None)
    if listed is not None:
        raise PromptError(f"keyword {listed!r:.60} has a comma, which separates keywords in the prompt: split it")
    return f" Keywords: {', '.join(names)}" if names else ""


def _check_task(task: str) -> None:
    if task not in TASKS:
        raise PromptError(f"unknown task {task!r:.60}, supported: {_listed(TASKS)}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


@dataclass(frozen=True)
class Capabilities:
    """What a checkpoint was trained for: tasks, and codes of the languages it can translate to."""

    tasks: tuple[str, ...] = TASKS
    languages: tuple[str, ...] = tuple(LANGUAGES)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], default: Capabilities | None = None) -> Capabilities:
        """Reads {"granite_jax": {"tasks": [...], "languages": [...]}} of a config.json.

        Absent keys are taken from `default`, which itself defaults to everything. Raises CheckpointError for anything
        but lists of known names.
        """
        default = default or cls()
        section = config.get("granite_jax", {})
        if not isinstance(section, Mapping):
            raise CheckpointError(f"config: granite_jax must be an object, not {section!r:.60}")
        tasks = _names(section, "tasks", TASKS, default.tasks)
        return cls(tasks, _names(section, "languages", tuple(LANGUAGES), default.languages))

    def check(self, task: str, target_language: str | None = None) -> None:
        """Raises PromptError unless the checkpoint was trained for the task, and for that target if given."""
        _check_task(task)
        if task not in self.tasks:
            raise PromptError(f"this checkpoint was not trained for task {task!r}, only for {_listed(self.tasks)}")
        if target_language is not None and language_code(target_language) not in self.languages:
            trained = _listed(self.languages) or "no language"
            raise PromptError(f"this checkpoint was not trained to translate to {target_language!r}, only to {trained}")


def _names(
    section: Mapping[str, Any], key: str, supported: tuple[str, ...], default: tuple[str, ...]
) -> tuple[str, ...]:
    names = section.get(key, default)
    if not isinstance(names, Sequence) or isinstance(names, str) or any(name not in supported for name in names):
        raise CheckpointError(
            f"config: granite_jax.{key} must be a list of names from {_listed(supported)}, not {names!r:.60}"
        )
    return tuple(names)
