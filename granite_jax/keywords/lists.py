"""Keywords on the host: what a caller may ask for, how keywords are written and sound, and which an utterance can hold.

keywords ──► Keywords: tokens of every way to write each, CTC labels of each        once for a list
                │
encode ──► Support: scores and spans of the best ──► heard ──► repaired draft        once for an utterance
                                                       └─────────► Trie: of those heard, more where the draft has them
"""

import dataclasses
import functools
import itertools
import math
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from granite_jax.decoding import Phrase, Trie, build
from granite_jax.decoding.automaton import STATES
from granite_jax.errors import GraniteError, PromptError
from granite_jax.keywords import spotter
from granite_jax.model import ctc
from granite_jax.text.chat_template import check_text
from granite_jax.text.tokenizer import Tokenizer

BOOST = 8.0  # nats: measured by benchmarks/keywords.py
THRESHOLD = -1.2  # nats a character: likewise
# Of the boost, on every token of a keyword behind the same word, or the same two words, as in the draft: likewise.
IN_PLACE = (0.5, 1.5)
MAX_BOOST = 50.0
MAX_KEYWORDS = spotter.MAX_KEYWORDS
MAX_PROMPT_KEYWORDS = 100  # longer lists confuse the model more than they help
MAX_CHARACTERS = 100
PLACES = ("decoder", "prompt", "both")

Entry = str | tuple[str, float | None]
"""A keyword, or a keyword and a boost of its own."""

_SLACK = 4  # frames by which a keyword and the words of the draft in its place may differ at either end
_CUT = 3.0  # nats that a keyword loses where it begins or ends inside a word of the greedy text
_RIVAL = 0.2  # nats a character by which a keyword must sound better than another in the same place to displace it


@dataclasses.dataclass(frozen=True)
class Biasing:
    """How keywords are used.

    Fields:
      boost: nats by which a keyword's last token is lifted.
      threshold: nats a character; keywords that sound worse are left out. None: all are used, heard or not.
      prompt, decoder: whether they go into the prompt, and whether they bias decoding.
      lower_case: whether the task's text is lower case; None where that is unknown.
    """

    boost: float = BOOST
    threshold: float | None = THRESHOLD
    prompt: bool = False
    decoder: bool = True
    lower_case: bool | None = True


def biasing(
    boost: float | None, threshold: float | Literal[False] | None, where: str, lower_case: bool | None
) -> Biasing:
    """Reads a caller's options. Raises GraniteError naming the one that is out of range."""
    if where not in PLACES:
        raise GraniteError(f"keywords_in is one of {', '.join(PLACES)}, not {where!r:.60}")
    boost = BOOST if boost is None else _boost("keyword_boost", boost)
    if threshold is None:
        threshold = THRESHOLD
    elif threshold is not False and not (_is_number(threshold) and -math.inf < threshold < 0):
        raise GraniteError(f"keyword_gate is {threshold!r:.60}, not a number below 0, or False")
    return Biasing(boost, None if threshold is False else threshold, where != "decoder", where != "prompt", lower_case)


def keywords_of(
    keywords: Sequence[Entry] | Sequence[Sequence[Entry] | None] | None, inputs: int, options: Biasing
) -> Sequence[Sequence[Entry]]:
    """A caller's `keywords=` as one list an input, of which a list for all inputs is checked.

    Args:
      keywords: a list for all inputs, or a list with a list (or None) for every input.

    Raises:
      PromptError: a keyword is no readable line of text, too long, or one of too many, named.
      GraniteError: it is no list, or not as long as there are inputs.
    """
    if keywords is None:
        return [()] * inputs
    if isinstance(keywords, str) or not isinstance(keywords, Iterable):
        raise PromptError(f"keywords must be a list of strings, not {keywords!r:.60}")
    entries: list[Any] = list(keywords)
    if not any(entry is None or isinstance(entry, list) for entry in entries):
        return [checked(entries, options)] * inputs
    if not all(entry is None or isinstance(entry, list) for entry in entries):
        raise GraniteError("keywords is a list of keywords for all inputs, or a list with a list for every input")
    if len(entries) != inputs:
        raise GraniteError(f"keywords has {len(entries)} lists for {inputs} inputs")
    return [entry or () for entry in entries]


def read_keywords(path: Path) -> list[Entry]:
    """The keywords of a file: one a line, after a tab its boost if it has one of its own; empty lines mean nothing.

    Raises:
      GraniteError: the file cannot be read, or a boost is no number, by its line.
    """
    try:
        # A spreadsheet's byte-order mark is no part of the first keyword.
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise GraniteError(f"{path}: cannot be read ({error})") from None
    entries: list[Entry] = []
    for number, line in enumerate(lines, start=1):
        keyword, tab, boost = line.partition("\t")
        if not keyword.strip():
            continue
        try:
            entries.append((keyword, _boost("its boost", float(boost))) if tab else keyword)
        except ValueError as error:
            reason = error if isinstance(error, GraniteError) else f"its boost is {boost!r:.60}, not a number"
            raise GraniteError(f"{path}, line {number}: keyword {keyword!r:.60}: {reason}") from None
    return entries


@dataclasses.dataclass(frozen=True, eq=False)
class Keywords:
    """A list of keywords, ready for any utterance.

    Fields:
      texts: each keyword as it is written in a draft.
      phrases: the ways to write a keyword, by its index, with full boosts: of the few that are heard; anywhere in a
        text, or at a place in it.
      heard: the keywords that can be scored, shortest first: the gate's columns.
      labels: int16 `[len(heard), gate.WIDTH]`, their CTC labels, zeros before them.
      always: the keywords that are used whatever is heard.
    """

    texts: tuple[str, ...]
    phrases: Callable[..., tuple[Phrase, ...]]
    heard: tuple[int, ...]
    labels: np.ndarray
    always: tuple[int, ...]

    @functools.cached_property
    def trie(self) -> Trie:
        """Of the keywords that are used whatever is heard."""
        return build(phrase for keyword in self.always for phrase in self.phrases(keyword))


def prepare(
    entries: Sequence[tuple[str, float | None]], options: Biasing, tokenizer: Tokenizer, num_labels: int
) -> Keywords:
    """Tokens and labels of a list of `keywords_of`.

    Raises:
      PromptError: the list takes more states than there are.
    """

    @functools.lru_cache(maxsize=4 * spotter.KEPT)
    def phrases(keyword: int, place: Place | None = None) -> tuple[Phrase, ...]:
        text, boost = entries[keyword]
        return tuple(_phrases(text, place, options.boost if boost is None else boost, options.lower_case, tokenizer))

    labels = [sounds(text, num_labels) if options.threshold is not None else [] for text, _ in entries]
    heard = sorted((i for i in range(len(entries)) if labels[i]), key=lambda i: len(labels[i][: spotter.WIDTH]))
    matrix = np.zeros((len(heard), spotter.WIDTH), np.int16)
    for row, i in enumerate(heard):
        matrix[row, -len(labels[i][: spotter.WIDTH]) :] = labels[i][: spotter.WIDTH]
    always = tuple(i for i in range(len(entries)) if not labels[i])
    # No way to write a keyword has more tokens than bytes.
    texts = (entries[i][0] for i in heard)
    longest = sorted((2 * len({text, text.lower()}) * (1 + len(text.encode())) for text in texts), reverse=True)
    used = sum(longest[: spotter.KEPT]) + sum(len(phrase.tokens) for i in always for phrase in phrases(i))
    if used + 4 > STATES:
        raise PromptError(f"{len(entries)} keywords may take {used} tokens, at most {STATES - 4} are accepted")
    written = tuple(text.lower() if options.lower_case else text for text, _ in entries)
    return Keywords(written, phrases, tuple(heard), matrix, always)


@dataclasses.dataclass(frozen=True)
class Heard:
    """A keyword that an utterance can hold: its index, its score in nats a character, its span in frames."""

    keyword: int
    score: float
    start: int
    end: int


def select(keywords: Keywords, support: spotter.Support, row: int, labels: np.ndarray, threshold: float) -> list[Heard]:
    """The keywords of a row that pass the gate, best first: of several that claim the same frames, the best.

    Args:
      labels: best label of every frame, `[t]`, of the utterance: a keyword that is only part of a word scores less.
    """
    found = []
    for column, score, start, end in zip(*(x[row] for x in vars(support).values()), strict=True):
        if score < threshold:
            break
        spelt = keywords.labels[column]
        spaced = ctc.label_character(int(spelt[-1])) < "\u3000"
        cut = int(_goes_on(labels[end:], spelt[-1])) + int(_goes_on(labels[:start][::-1], spelt[spelt > 0][0]))
        score -= spaced * cut * _CUT / np.count_nonzero(spelt)
        found.append(Heard(keywords.heard[int(column)], float(score), int(start), int(end)))
    passed: list[Heard] = []
    for one in sorted(found, key=lambda one: -one.score):
        rivals = (other for other in passed if other.score - one.score > _RIVAL and _overlap(one, other))
        if one.score >= threshold and next(rivals, None) is None:
            passed.append(one)
    return passed


def _goes_on(labels: np.ndarray, edge: int) -> bool:
    """Whether a word goes on in these frames after the character `edge`, which may last."""
    after = labels[np.argmax(labels != edge) :] if len(labels) and labels[0] == edge else labels
    sounding = after[after != ctc.BLANK]
    return len(sounding) > 0 and sounding[0] != ord(" ")


def _overlap(one: Heard, other: Heard) -> bool:
    """Whether two spans share more than half of the shorter."""
    shared = min(one.end, other.end) - max(one.start, other.start)
    return 2 * shared > min(one.end - one.start, other.end - other.start)


def trie_of(keywords: Keywords, heard: Sequence[Heard], labels: np.ndarray, threshold: float) -> Trie | None:
    """The automaton of the keywords heard and of those that cannot be scored. None if there are none.

    Args:
      labels: best label of every frame, `[t]`, of the utterance.
    """
    if not heard:
        return keywords.trie if keywords.always else None
    phrases = [phrase for keyword in keywords.always for phrase in keywords.phrases(keyword)]
    placed: list[Phrase] = []
    draft = repair(labels, heard, keywords.texts)
    for one in heard:
        scaled = functools.partial(_scaled, share=1 - 0.5 * one.score / threshold)
        phrases += map(scaled, keywords.phrases(one.keyword))
        text = keywords.texts[one.keyword]
        # Where the draft does not have it: what was heard before it.
        for place in places(draft, text) or places(
            f"{repair(labels[: one.start], heard, keywords.texts)} {text}", text
        ):
            placed += map(scaled, keywords.phrases(one.keyword, place))
    # Of a text with very many, the first: `prepare` has made sure that there is room for the others.
    lengths = itertools.accumulate((len(phrase.tokens) for phrase in (*phrases, *placed)), initial=4)
    room = sum(length <= STATES for length in lengths) - 1
    return build([*phrases, *placed][:room])


def _scaled(phrase: Phrase, share: float) -> Phrase:
    return phrase._replace(boost=phrase.boost * share)


class Place(NamedTuple):
    """Where a keyword is in a text: after these words, which may be the text's first."""

    words: tuple[str, ...]
    first: bool


def places(draft: str, keyword: str) -> list[Place]:
    """The places of a keyword in a draft, each by the word before it and by the two words before it."""
    words, spelt = draft.split(), keyword.split()
    found = [
        Place(tuple(words[max(i - count, 0) : i]), i <= count)
        for i in range(len(words))
        for count in range(1, len(IN_PLACE) + 1)
        if words[i : i + len(spelt)] == spelt
    ]
    return list(dict.fromkeys(found))


def repair(labels: np.ndarray, heard: Sequence[Heard], texts: Sequence[str]) -> str:
    """The greedy CTC text with the words that fill a keyword's span replaced by the keyword.

    Args:
      labels: best label of every frame, `[t]`, of one utterance.
      heard: best first; of several in one place, the first is taken.
      texts: as of `Keywords`.
    """
    words = _words(labels)
    for one in heard:
        inside = [
            i
            for i, (_, start, end, _) in enumerate(words)
            if min(end, one.end) - max(start, one.start) > (end - start) / 2
        ]
        if not inside:
            continue
        first, last = inside[0], inside[-1]
        fits = abs(words[first][1] - one.start) <= _SLACK and abs(words[last][2] - one.end) <= _SLACK
        if fits and not any(words[i][3] for i in inside):
            words[first : last + 1] = [(texts[one.keyword], words[first][1], words[last][2], True)]
    return " ".join(text for text, *_ in words)


def _words(labels: np.ndarray) -> list[tuple[str, int, int, bool]]:
    """Words of a greedy CTC path: text, first frame, frame after the last, whether it is a repaired one."""
    words: list[tuple[str, int, int, bool]] = []
    text, start, end, previous = "", 0, 0, ctc.BLANK
    for frame, label in enumerate([*labels.tolist(), ord(" ")]):
        if label not in (previous, ctc.BLANK):
            character = ctc.label_character(label)
            if character.isspace():
                words += [(text, start, end, False)] if text else []
                text = ""
            elif character:
                start = start if text else frame
                text += character
        if label != ctc.BLANK and not ctc.label_character(label).isspace():
            end = frame + 1
        previous = label
    return words


def sounds(text: str, num_labels: int) -> list[int]:
    """The CTC labels by which a keyword is scored: letters that have one, in lower case, and spaces between words.

    Accents and widths of letters without a label are dropped, hiragana become katakana, hyphens separate words. What is
    left out (digits, punctuation, other scripts) is not scored; nothing may be left.
    """
    characters = []
    for character in unicodedata.normalize("NFKC", text).lower():
        if "\u3041" <= character <= "\u3096":
            character = chr(ord(character) + 0x60)
        for option in (character, *unicodedata.normalize("NFD", character)[:1]):
            if option.isalpha() or option in "'ー":
                label = next(iter(_label(option, num_labels)), None)
                if label is not None:
                    characters.append(label)
                    break
        else:
            separates = character.isspace() or unicodedata.category(character) in ("Pd", "Pc")
            if separates and characters and characters[-1] != ord(" "):
                characters.append(ord(" "))
    while characters and characters[-1] == ord(" "):
        characters.pop()
    return characters if any(label not in (ord(" "), ord("'")) for label in characters) else []


def _label(character: str, num_labels: int) -> list[int]:
    try:
        return [label for label in ctc.to_labels(character) if label < num_labels]
    except ValueError:
        return []


def _phrases(
    text: str, place: Place | None, boost: float, lower_case: bool | None, tokenizer: Tokenizer
) -> Iterable[Phrase]:
    """The ways to write a keyword, in the case of the task: at a place, or else with a space before it, and without one
    at the text's start."""
    cased = {True: [text.lower()], False: [text], None: list(dict.fromkeys([text, text.lower()]))}[lower_case]
    # Scripts that write no spaces between words.
    unspaced = unicodedata.category(text[0]) == "Lo"
    for written in cased:
        if place is None:
            ways = [
                Phrase(tuple(tokenizer.encode(lead + written)), boost, bool(lead) or unspaced) for lead in (" ", "")
            ]
        else:
            words = [*place.words, written]
            pieces = [tokenizer.encode(" " * (i > 0 or not place.first) + word) for i, word in enumerate(words)]
            lift = boost * IN_PLACE[-1 if place.first else len(place.words) - 1]
            tokens = tuple(itertools.chain(*pieces))
            ways = [Phrase(tokens, lift, not place.first, len(tokens) - len(pieces[-1]), first=1.0)]
        # An odd tokenizer may make special tokens of ordinary text: these are never written.
        yield from (way for way in ways if boost > 0 and tokenizer.special_ids.isdisjoint(way.tokens))


def checked(entries: Iterable[Any], options: Biasing) -> tuple[tuple[str, float | None], ...]:
    """A list of keywords without repetitions, each with its own boost or None.

    Raises:
      PromptError: a keyword is no readable line of text, too long, or one of too many, named.
      GraniteError: a boost is out of range.
    """
    boosts: dict[str, float | None] = {}
    for entry in entries:
        text: Any
        text, boost = entry if isinstance(entry, tuple) and len(entry) == 2 else (entry, None)
        text = unicodedata.normalize("NFC", " ".join(check_text("keyword", text).split()))
        if len(text) > MAX_CHARACTERS:
            raise PromptError(f"keyword {text!r:.60} has {len(text)} characters, at most {MAX_CHARACTERS} are accepted")
        boosts[text] = boost if boost is None else _boost(f"the boost of keyword {text!r:.60}", boost)
    if len(boosts) > MAX_KEYWORDS:
        raise PromptError(f"{len(boosts)} keywords for one input, at most {MAX_KEYWORDS} are accepted")
    if options.prompt and len(boosts) > MAX_PROMPT_KEYWORDS:
        raise PromptError(
            f"{len(boosts)} keywords are too many for a prompt, at most {MAX_PROMPT_KEYWORDS}: "
            'keywords_in="decoder" takes more'
        )
    return tuple(boosts.items())


def _boost(what: str, value: Any) -> float:
    if not _is_number(value) or not 0 <= value <= MAX_BOOST:
        raise GraniteError(f"{what} is {value!r:.60}, not a number of nats from 0 to {MAX_BOOST:g}")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
