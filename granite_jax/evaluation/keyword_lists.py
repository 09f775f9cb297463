"""Keyword lists in the format of the LibriSpeech biasing lists (arXiv 2104.02194), one line an utterance:

    id <tab> reference <tab> ["rare", "words"] <tab> ["rare", "words", "and", "distractors"]

The reference contains the words of the third column, which B-WER counts. The model is told the words of the fourth
column, or of the third if there is no fourth.
"""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from granite_jax.errors import GraniteError, printable


@dataclass(frozen=True)
class KeywordList:
    """An utterance's reference, its rare words, and the words that the model is told: rare ones and distractors."""

    reference: str
    words: tuple[str, ...]
    biasing: tuple[str, ...] = ()


def read_keyword_lists(paths: Iterable[str | os.PathLike[str]]) -> dict[str, KeywordList]:
    """Reads lists by utterance id. Raises GraniteError with the number of a line that is invalid or repeats an id."""
    lists: dict[str, KeywordList] = {}
    for path in paths:
        try:
            with open(path, encoding="utf-8", newline="\n") as file:
                for number, line in enumerate(file, 1):
                    try:
                        identity, entry = _parse(line.rstrip("\r\n"))
                        if identity in lists:
                            raise GraniteError(f"id {identity!r:.60} comes twice")
                    except GraniteError as error:
                        raise GraniteError(f"{printable(os.fspath(path))}: line {number}: {error}") from None
                    lists[identity] = entry
        except (OSError, UnicodeDecodeError) as error:
            raise GraniteError(f"{printable(os.fspath(path))}: cannot be read ({error})") from None
    return lists


def _parse(line: str) -> tuple[str, KeywordList]:
    columns = line.split("\t")
    if len(columns) not in (3, 4):
        raise GraniteError(f"has {len(columns)} columns, not id, reference, rare words and optionally biasing words")
    words = _words("rare", columns[2])
    return columns[0], KeywordList(columns[1], words, _words("biasing", columns[3]) if len(columns) == 4 else words)


def _words(kind: str, column: str) -> tuple[str, ...]:
    try:
        words = json.loads(column)
    except (ValueError, RecursionError):
        words = None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise GraniteError(f"{kind} words must be a JSON list of strings, not {column!r:.60}")
    return tuple(words)


def lists_of(
    lists: dict[str, KeywordList], identities: list[str], references: list[str], normalize: Callable[[str], str]
) -> list[KeywordList] | None:
    """The lists of a set's utterances; None if no utterance has one.

    Raises:
      GraniteError: an utterance has no list while others have one, or a list is for another text.
    """
    missing = [identity for identity in identities if identity not in lists]
    if len(missing) == len(identities):
        return None
    if missing:
        raise GraniteError(f"utterance {missing[0]!r:.60} and {len(missing) - 1} others have no keyword list")
    for identity, reference in zip(identities, references, strict=True):
        if normalize(lists[identity].reference).split() != normalize(reference).split():
            raise GraniteError(f"the keyword list of utterance {identity!r:.60} is that of another text")
    return [lists[identity] for identity in identities]
