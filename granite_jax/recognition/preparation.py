"""What inputs with the same options share: the tokens of their prompt, and their keywords, prepared once."""

import threading
from collections.abc import Sequence
from typing import NamedTuple

from granite_jax.keywords.lists import Keywords, prepare, validated
from granite_jax.keywords.options import Entry
from granite_jax.options import TranscribeOptions
from granite_jax.recognition.utterances import NO_PROMPT
from granite_jax.text.chat_template import ChatTemplate, PromptTokens
from granite_jax.text.tasks import Capabilities
from granite_jax.text.tokenizer import Tokenizer

_MAX_CACHED_LISTS = 16


class Prepared(NamedTuple):
    """The prompt, with the keywords that it names; and the keywords that are listened for, if any."""

    prompt: PromptTokens
    keywords: Keywords | None

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt besides those of the audio."""
        return len(self.prompt.prefix) + len(self.prompt.suffix)


class Preparation:
    """Prepares options and lists of keywords, and keeps those that were used last. Any thread can call it."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, capabilities: Capabilities, num_labels: int):
        """
        Args:
          num_labels: of the CTC head.
        """
        self._tokenizer, self._template = tokenizer, template
        self._capabilities, self._num_labels = capabilities, num_labels
        self._lock = threading.Lock()
        self._cached: dict[object, Prepared] = {}

    def prepare(self, options: TranscribeOptions, keywords: Sequence[Entry]) -> Prepared:
        """The prompt of options with a list of keywords, and the list.

        Raises:
          PromptError: the checkpoint does not know the task or a language, or naming a keyword that cannot be used.
          GraniteError: a boost is out of range.
        """
        entries = validated(keywords, options.biasing, self._capabilities.prompts.max_keywords)
        wording = options.task, options.target_language, options.language, options.prompt
        key = (options.recognizer, *wording, options.biasing, entries)
        with self._lock:
            if key not in self._cached:
                mentioned = tuple(text for text, _ in entries) if options.biasing.prompt else ()
                text = self._capabilities.instruction(
                    task=options.task,
                    target_language=options.target_language,
                    language=options.language,
                    prompt=options.prompt,
                    keywords=mentioned,
                )
                prepared = None
                if entries and options.biasing.decoder:
                    prepared = prepare(entries, options.biasing, self._tokenizer, self._num_labels)
                prompt = NO_PROMPT if options.recognizer == "ctc" else self.prompt(text)
                self._cached[key] = Prepared(prompt, prepared)
                while len(self._cached) > _MAX_CACHED_LISTS:
                    del self._cached[next(iter(self._cached))]
            return self._cached[key]

    def prompt(self, text: str) -> PromptTokens:
        """The tokens of an instruction."""
        return self._template.tokens(self._tokenizer, text, self._capabilities.prompts.max_chars)
