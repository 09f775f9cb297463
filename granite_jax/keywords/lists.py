"""Lists of keywords: checked once, and prepared once for any number of utterances."""

import dataclasses
import functools
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from granite_jax.errors import GraniteError, PromptError
from granite_jax.keywords import spotter
from granite_jax.keywords.automaton import STATES, KeywordAutomaton, Phrase, build_automaton
from granite_jax.keywords.options import Entry, KeywordOptions, check_boost, keyword_entries
from granite_jax.keywords.phrases import Place, phrases_of
from granite_jax.models.layers.ctc import SPACE
from granite_jax.models.layers.ctc_alignment import WILDCARD
from granite_jax.models.spelling import spell
from granite_jax.text.chat_template import check_text
from granite_jax.text.tokenizer import Tokenizer

MAX_KEYWORDS = spotter.MAX_KEYWORDS
MAX_CHARACTERS = 100
_FOREIGN_BOOST = re.compile(r"[^\t](\s:|[,;=])\s*\d+(\.\d+)?\s*$")  # of sherpa-onnx and of tables
_PERHAPS_SPOKEN = frozenset("/*")


def lists_by_input(keywords: Any, inputs: int) -> list[tuple[Entry, ...] | None] | None:
    """A caller's `keywords=` as one list (or None) per input; None if it is a list for all inputs.

    Raises:
      PromptError: it is not a list.
      GraniteError: some entries are lists and others are not, or there are not as many as inputs.
    """
    entries = keyword_entries(keywords)
    listed = [entry is None or isinstance(entry, list | Mapping) for entry in entries]
    if not any(listed):
        return None
    if not all(listed):
        raise GraniteError("keywords is a list of keywords for all inputs, or a list with a list for every input")
    if len(entries) != inputs:
        raise GraniteError(f"keywords has {len(entries)} lists for {inputs} inputs")
    return [None if entry is None else keyword_entries(entry) for entry in entries]


def read_keywords(path: Path) -> list[Entry]:
    """The keywords of a file: one per line, optionally with a tab and its boost; empty lines are ignored.

    Raises:
      GraniteError: the file cannot be read, or naming the line of a boost that is not valid.
    """
    try:
        # A spreadsheet's byte-order mark is not part of the first keyword.
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise GraniteError(f"{path}: cannot be read ({error})") from None
    entries: list[Entry] = []
    odd = [number for number, line in enumerate(lines, start=1) if _FOREIGN_BOOST.search(line)]
    if 2 * len(odd) > sum(bool(line.strip()) for line in lines):
        example = lines[odd[0] - 1]
        raise GraniteError(f"{path}, line {odd[0]}: {example!a:.60} seems to end in a boost: put a tab before boosts")
    for number, line in enumerate(lines, start=1):
        keyword, tab, boost = line.partition("\t")
        if not keyword.strip():
            continue
        try:
            entries.append((keyword, check_boost("its boost", float(boost))) if tab else keyword)
        except ValueError as error:
            reason = error if isinstance(error, GraniteError) else f"its boost is {boost!r:.60}, not a number"
            raise GraniteError(f"{path}, line {number}: keyword {keyword!r:.60}: {reason}") from None
    return entries


def validated(
    entries: Iterable[Any], options: KeywordOptions, max_in_prompt: int
) -> tuple[tuple[str, float | None], ...]:
    """A list of keywords without repetitions, each with its own boost or None.

    Args:
      max_in_prompt: the most keywords that the model's prompt mentions.

    Raises:
      PromptError: naming a keyword that is not a readable line of text or is too long; or there are too many.
      GraniteError: a boost is out of range.
    """
    boosts: dict[str, float | None] = {}
    for entry in entries:
        text: Any
        text, boost = entry if isinstance(entry, tuple) and len(entry) == 2 else (entry, None)
        text = unicodedata.normalize("NFC", " ".join(check_text("keyword", text).split()))
        if len(text) > MAX_CHARACTERS:
            raise PromptError(f"keyword {text!r:.60} has {len(text)} characters, at most {MAX_CHARACTERS} are accepted")
        boosts[text] = boost if boost is None else check_boost(f"the boost of keyword {text!r:.60}", boost)
    if len(boosts) > MAX_KEYWORDS:
        raise PromptError(f"{len(boosts)} keywords for one input, at most {MAX_KEYWORDS} are accepted")
    if options.prompt and len(boosts) > max_in_prompt:
        raise PromptError(
            f"{len(boosts)} keywords are too many for a prompt, at most {max_in_prompt}: "
            'keywords_in="decoder" takes more'
        )
    return tuple(boosts.items())


@dataclasses.dataclass(frozen=True, eq=False)
class Keywords:
    """A list of keywords, ready for any utterance.

    Fields:
      texts: each keyword as it is written in a draft.
      phrases: maps a keyword's index and, optionally, a place in a text to the ways to write it there, with full
        boosts. Computed on demand, because few keywords are heard.
      scored: indices of the keywords that can be scored, shortest first: the spotter's columns.
      labels: int16 `[len(scored), spotter.WIDTH]`, their CTC labels, zeros before them.
      whole: indices of the keywords that are scored to the last letter. Of others only a part was heard: they bias
        decoding, but are not written into drafts.
      always: indices of the keywords that are used whatever is heard.
    """

    texts: tuple[str, ...]
    phrases: Callable[..., tuple[Phrase, ...]]
    scored: tuple[int, ...]
    labels: np.ndarray
    whole: frozenset[int]
    always: tuple[int, ...]

    @functools.cached_property
    def always_automaton(self) -> KeywordAutomaton:
        """The automaton of the keywords in `always`."""
        return build_automaton(phrase for keyword in self.always for phrase in self.phrases(keyword))


def prepare(
    entries: Sequence[tuple[str, float | None]], options: KeywordOptions, tokenizer: Tokenizer, num_labels: int
) -> Keywords:
    """Prepares a list returned by `validated` for decoding.

    Raises:
      PromptError: the list may need more states than there are.
    """

    @functools.lru_cache(maxsize=4 * spotter.KEPT)
    def phrases(keyword: int, place: Place | None = None) -> tuple[Phrase, ...]:
        text, boost = entries[keyword]
        return tuple(phrases_of(text, place, options.boost if boost is None else boost, options.lower_case, tokenizer))

    spellings = [ctc_labels(text, num_labels) if options.threshold is not None else ([], False) for text, _ in entries]
    labels = [spelling for spelling, _ in spellings]
    whole = frozenset(
        i for i, (spelling, is_whole) in enumerate(spellings) if is_whole and len(spelling) <= spotter.WIDTH
    )
    scored = sorted((i for i in range(len(entries)) if labels[i]), key=lambda i: len(labels[i][: spotter.WIDTH]))
    matrix = np.zeros((len(scored), spotter.WIDTH), np.int16)
    for row, i in enumerate(scored):
        matrix[row, -len(labels[i][: spotter.WIDTH]) :] = labels[i][: spotter.WIDTH]
    always = tuple(i for i in range(len(entries)) if not labels[i])
    # A phrase has no more tokens than bytes.
    texts = (entries[i][0] for i in scored)
    longest = sorted((2 * len({text, text.lower()}) * (1 + len(text.encode())) for text in texts), reverse=True)
    num_tokens = sum(longest[: spotter.KEPT]) + sum(len(phrase.tokens) for i in always for phrase in phrases(i))
    if num_tokens + 4 > STATES:
        raise PromptError(f"{len(entries)} keywords may take {num_tokens} tokens, at most {STATES - 4} are accepted")
    draft_texts = tuple(text.lower() if options.lower_case else text for text, _ in entries)
    return Keywords(draft_texts, phrases, tuple(scored), matrix, whole, always)


def ctc_labels(text: str, num_labels: int) -> tuple[list[int], bool]:
    """The CTC labels by which a keyword is scored, and whether these are of all that is spoken of it.

    Digits, symbols and other scripts have no labels and are not scored; there can be no labels.
    """
    spelled = spell(text, num_labels)
    labels = [label for label in spelled if label != WILDCARD]
    labels = [label for i, label in enumerate(labels) if label != SPACE or labels[i - 1 : i] not in ([], [SPACE])]
    labels = labels[: len(labels) - (labels[-1:] == [SPACE])]
    if not set(labels) - {SPACE, ord("'")}:
        return [], False
    return labels, WILDCARD not in spelled and not _PERHAPS_SPOKEN & set(text)
