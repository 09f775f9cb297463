"""The safeguard of the model cards: a prompt that the model does not know falls back to plain transcription."""

import dataclasses
import inspect
import warnings

from granite_jax.errors import GraniteError, PromptError
from granite_jax.keywords.lists import validated
from granite_jax.options import TranscribeOptions
from granite_jax.text.tasks import Capabilities, RecognizedPrompt

FALLBACK = "prompt-fallback"


def safeguarded(options: TranscribeOptions, capabilities: Capabilities) -> tuple[TranscribeOptions, tuple[str, ...]]:
    """Options whose prompt the model was trained with, and the flags of transcripts that are written with them.

    A prompt of the model's own becomes the task that it stands for, and its keyword clause keywords in the prompt. Any
    other becomes the raw transcript's, with a warning, unless `allow_custom_prompt` is set.

    Raises:
      PromptError: the checkpoint was not trained for the task or a language; or both the prompt and the options have
        keywords.
    """
    if options.prompt is not None:
        recognized = _recognized(options, capabilities)
        if recognized is None and options.allow_custom_prompt:
            return options, ()
        if recognized is None:
            warnings.warn(
                f"the model was not trained with the prompt {options.prompt!r:.60}: the speech is transcribed instead "
                "(allow_custom_prompt sends it nevertheless)",
                stacklevel=_levels_to_caller(),
            )
            return _replaced(options, RecognizedPrompt()), (FALLBACK,)
        options = _replaced(options, recognized)
    if options.prompt is None:
        capabilities.check(options.task, options.target_language, options.language)
    return options, ()


def _levels_to_caller() -> int:
    """The `stacklevel`, in the function that calls this, of the first function outside this package."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").startswith("granite_jax."):
        frame, level = frame.f_back, level + 1
    return level


def _recognized(options: TranscribeOptions, capabilities: Capabilities) -> RecognizedPrompt | None:
    """What the prompt stands for; None if it is not the model's, or its keywords would be refused as `keywords`."""
    found = capabilities.recognize(str(options.prompt))
    if found is None or not found.keywords:
        return found
    fields = found._asdict()
    try:
        in_prompt = dataclasses.replace(options.biasing, prompt=True)
        keywords = [text for text, _ in validated(fields.pop("keywords"), in_prompt, capabilities.prompts.max_keywords)]
        capabilities.instruction(**fields, keywords=keywords)
    except GraniteError:
        return None
    if options.keywords:
        raise PromptError("a prompt with keywords of its own excludes keywords: name them in one place")
    return found


def _replaced(options: TranscribeOptions, recognized: RecognizedPrompt) -> TranscribeOptions:
    fields = recognized._asdict()
    keywords = fields.pop("keywords")
    if keywords:
        fields |= {"keywords": keywords, "keywords_in": "prompt"}
    return dataclasses.replace(options, **fields)
