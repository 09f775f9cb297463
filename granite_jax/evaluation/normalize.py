"""What is done to references and hypotheses before words are compared: Whisper's normalizers, a package's."""

import functools
from collections.abc import Callable
from typing import Literal

from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

Name = Literal["english", "basic", "lowercase"]
_WITHOUT_SPACES = ("ja", "zh")


@functools.cache
def normalizer(name: Name, language: str = "en") -> Callable[[str], str]:
    """A normalizer of this name.

    Args:
      name: "english": Whisper's English one (arXiv 2212.04356, appendix C), from which the Open ASR leaderboard's is
        made: contractions, numbers and spelling are unified, punctuation and hesitations go. "basic": Whisper's for
        other languages: lower case, no punctuation or brackets. "lowercase": nothing else, as for the LibriSpeech
        biasing lists, whose own script changes nothing.
      language: of the text, as a code. Japanese and Chinese are split into characters by "basic".
    """
    if name == "english":
        return EnglishTextNormalizer()
    if name == "basic":
        return BasicTextNormalizer(split_letters=language in _WITHOUT_SPACES)
    return str.lower


def default_name(language: str) -> Name:
    """The leaderboard's choice for a language's code."""
    return "english" if language == "en" else "basic"
