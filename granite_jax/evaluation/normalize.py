"""Normalizers of references and hypotheses: Whisper's, from the package `whisper-normalizer`, and lower case."""

import functools
from collections.abc import Callable
from typing import Literal

from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

Name = Literal["english", "basic", "lowercase"]
_WITHOUT_SPACES = ("ja", "zh")


@functools.cache
def normalizer(name: Name, language: str = "en") -> Callable[[str], str]:
    """Returns the normalizer of this name.

    Args:
      name: "english": Whisper's for English (arXiv 2212.04356, appendix C), on which the Open ASR leaderboard's is
        based: unifies contractions, numbers and spelling, and removes punctuation and hesitations. "basic": Whisper's
        for other languages: lower case, no punctuation or brackets. "lowercase": lower case only, for the LibriSpeech
        biasing lists, whose own script changes nothing.
      language: code of the text's language. "basic" splits Japanese and Chinese into characters.
    """
    if name == "english":
        return EnglishTextNormalizer()
    if name == "basic":
        return BasicTextNormalizer(split_letters=language in _WITHOUT_SPACES)
    return str.lower


def default_name(language: str) -> Name:
    """The leaderboard's choice for a language's code."""
    return "english" if language == "en" else "basic"
