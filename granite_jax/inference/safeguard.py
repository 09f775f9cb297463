"""The safeguard of the model cards: a prompt that the model does not know falls back to plain transcription."""

import dataclasses
import warnings

from granite_jax.inference.options import TranscribeOptions
from granite_jax.text.tasks import Capabilities


def safeguarded(options: TranscribeOptions, capabilities: Capabilities) -> tuple[TranscribeOptions, tuple[str, ...]]:
    """Options whose prompt the model was trained with, and the flags of transcripts that are written with them.

    A prompt of the model's own becomes the task that it stands for, or stays as the model knows it. Any other becomes
    the raw transcript's, with a warning, unless `allow_custom_prompt` is set.

    Raises:
      PromptError: the checkpoint was not trained for the task or a language.
    """
    flags: tuple[str, ...] = ()
    if options.prompt is not None and not options.allow_custom_prompt:
        fields = capabilities.recognize(options.prompt)
        if fields is None:
            flags = ("prompt-fallback",)
            fields = {"task": "transcribe", "target_language": None, "language": None, "prompt": None}
            warnings.warn(
                f"the model was not trained with the prompt {options.prompt!r:.60}: the speech is transcribed instead "
                "(allow_custom_prompt sends it nevertheless)",
                stacklevel=2,
            )
        options = dataclasses.replace(options, **fields)
    if options.prompt is None:
        capabilities.check(options.task, options.target_language, options.language)
    return options, flags
